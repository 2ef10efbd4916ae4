"""Supervised fine-tuning: the tokens learned, the loss and its gradient, runs that are stopped."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from mlc_notebooks.alignment import (
    SFT,
    Example,
    TuningSettings,
    answer_loss,
    fine_tune,
    fit_sft,
    in_similar_lengths,
    list_examples,
    mean_answer_loss,
    sft,
    sft_example,
    training,
)
from mlc_notebooks.data import AnnotatedTexts, LabelSet, claimed, load_task
from mlc_notebooks.models import load_lm

LABELS = LabelSet(["joy", "fear", "anger"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, base_lm):
    "The folder of a tiny random model with SmolLM2's tokenizer."
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            max_position_embeddings=512,
        )
    ).save_pretrained(folder)
    base_lm.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def examples(base_lm):
    return list_examples(base_lm, load_task("goemotions").split("dev").sample(20, seed=0))


def test_only_the_answer_is_learned(base_lm):
    example = sft_example(
        base_lm, 'He said {"label": ["joy"]}', ["anger", "joy"], LABELS, "emotions"
    )
    answer = base_lm.encode_text('\n{"label": ["joy", "anger"]}') + [base_lm.tokenizer.eos_token_id]
    assert example.ids[-len(answer) :] == answer
    assert example.scored == [False] * (len(example.ids) - len(answer)) + [True] * len(answer)


def test_label_orders(base_lm):
    task = AnnotatedTexts(
        "made",
        ["a"],
        ["so it goes"],
        LABELS,
        [np.array([[1, 1, 0]], np.uint8)],
        label_noun="emotions",
    )

    def said(order, seed):
        return base_lm.decode(list_examples(base_lm, task, order, seed)[0].ids)

    assert '["fear", "joy"]' in said("alphabetical", 0)
    assert len({said("shuffled", seed) for seed in range(8)}) > 1
    with pytest.raises(ValueError, match="label_order is 'random'"):
        list_examples(base_lm, task, "random")


@pytest.mark.parametrize("packed", [False, True])
def test_loss_and_gradient_equal_a_plain_computation(tiny, examples, packed):
    model = load_lm(tiny).model.train()
    batch = examples[:3]
    total, count = answer_loss(model, batch, 2, packed)
    total.backward()
    fast = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    slow = 0.0
    tokens = 0
    for example in batch:  # one row at a time, every logit, float32
        logits = model(torch.tensor([example.ids])).logits[0].log_softmax(-1)
        for position, scored in enumerate(example.scored):
            if scored:
                slow = slow - logits[position - 1, example.ids[position]]
                tokens += 1
    slow.backward()
    assert tokens == count
    # bfloat16 against float32
    assert float(total.detach()) == pytest.approx(float(slow.detach()), rel=5e-3)
    for name, p in model.named_parameters():
        similarity = torch.nn.functional.cosine_similarity(
            fast[name].flatten(), p.grad.flatten(), dim=0
        )
        assert similarity > 0.99, name


def test_batches_of_similar_length_hold_every_example_once(examples):
    ordered = in_similar_lengths(examples, 8, seed=0)
    assert sorted(map(id, ordered)) == sorted(map(id, examples))
    assert in_similar_lengths(examples, 8, 0) == ordered != in_similar_lengths(examples, 8, 1)


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    "settings",
    [
        TuningSettings(r=4, batch_size=4, dev_every=2, learning_rate=1e-2),
        TuningSettings(r=None, batch_size=4, dev_every=2, learning_rate=1e-2),
        TuningSettings(r=None, batch_size=2, dev_every=2, learning_rate=0.2, patience=2),
    ],
)  # the dev loss soon rises
def test_a_stopped_run_ends_like_one_that_was_not(tiny, examples, tmp_path, monkeypatch, settings):
    times = 2 if settings.patience is None else 4

    def run(folder):
        return fine_tune(
            load_lm(tiny), examples * times, examples[:4], folder, settings, progress=False
        )

    whole = run(tmp_path / "whole")

    inner = training.answer_loss
    calls = []

    def stop_at_the_sixth(*batch, **how):
        calls.append(torch.is_grad_enabled())  # a training step, not a look at the dev examples
        if sum(calls) == 6:
            raise Stop
        return inner(*batch, **how)

    monkeypatch.setattr(training, "answer_loss", stop_at_the_sixth)
    with pytest.raises(Stop):
        run(tmp_path / "stopped")
    monkeypatch.undo()
    assert (tmp_path / "stopped" / "checkpoints" / "checkpoint-4").exists()
    (tmp_path / "stopped" / "checkpoints" / "checkpoint-6").mkdir()  # one that was being written

    def stop_before_saving(*args):
        raise Stop

    monkeypatch.setattr(sft, "save_tuned", stop_before_saving)
    with pytest.raises(Stop):
        run(tmp_path / "stopped")
    monkeypatch.undo()
    resumed = run(tmp_path / "stopped")

    name = "adapter_model.safetensors" if settings.r else "model.safetensors"
    first, second = (load_file(tmp_path / folder / name) for folder in ("whole", "stopped"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    columns = ["step", "train_loss", "dev_loss"]
    np.testing.assert_array_equal(whole[columns], resumed[columns])
    assert whole["step"].max() < 40 or settings.patience is None
    assert not (tmp_path / "stopped" / "checkpoints").exists()
    assert (resumed["minutes"].diff().dropna() >= 0).all()


def test_a_finished_run_is_not_run_again_and_another_is_refused(tiny, examples, tmp_path):
    settings = TuningSettings(r=2, batch_size=8, dev_every=5)
    log = fine_tune(load_lm(tiny), examples, examples[:4], tmp_path, settings, progress=False)
    before = (tmp_path / "adapter_model.safetensors").stat().st_mtime_ns
    assert fine_tune(
        load_lm(tiny), examples, examples[:4], tmp_path, settings, progress=False
    ).equals(log)
    assert (tmp_path / "adapter_model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="batch_size was 8, now 4"):
        fine_tune(
            load_lm(tiny),
            examples,
            examples[:4],
            tmp_path,
            TuningSettings(r=2, batch_size=4, dev_every=5),
            progress=False,
        )
    with pytest.raises(ValueError, match="sha256"):
        fine_tune(load_lm(tiny), examples[::-1], examples[:4], tmp_path, settings, progress=False)
    tuned = load_lm(tmp_path)  # the adapter's folder names the model it belongs to
    assert mean_answer_loss(tuned.model, examples[:4], 2) == pytest.approx(
        log["dev_loss"].iloc[-1], abs=0.02
    )


def test_one_process_at_a_time(tiny, examples, tmp_path):
    settings = TuningSettings(r=2, batch_size=8, dev_every=5)
    with claimed(tmp_path), pytest.raises(RuntimeError, match="in use by another process"):
        fine_tune(load_lm(tiny), examples, examples[:4], tmp_path, settings, progress=False)


def test_early_stopping_goes_back_to_the_lowest_dev_loss(tiny, examples, tmp_path):
    settings = TuningSettings(r=None, batch_size=2, dev_every=2, learning_rate=0.2, patience=2)
    log = fine_tune(load_lm(tiny), examples * 4, examples[:4], tmp_path, settings, progress=False)
    assert log["step"].max() < 40 and log["dev_loss"].iloc[-1] > log["dev_loss"].min()
    assert mean_answer_loss(load_lm(tmp_path).model, examples[:4], 2) == pytest.approx(
        log["dev_loss"].min(), rel=5e-3
    )


def test_a_diverging_loss_says_so(tiny, examples, tmp_path):
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        settings = TuningSettings(r=None, learning_rate=1e30, batch_size=4)
        fine_tune(load_lm(tiny), examples * 3, examples[:2], tmp_path, settings, progress=False)


def test_bad_input_is_met_before_work(tiny, examples, tmp_path):
    lm = load_lm(tiny)
    with pytest.raises(ValueError, match="0 train and 20 dev"):
        fine_tune(lm, [], examples, tmp_path / "a")
    task = load_task("goemotions")
    with pytest.raises(ValueError, match="nothing to learn from"):
        fit_sft(task.split("train").select([]), lm, tmp_path / "b")
    alone = AnnotatedTexts("made", ["a"], ["so it goes"], LABELS, [np.array([[1, 1, 0]], np.uint8)])
    with pytest.raises(ValueError, match="no dev split"):
        fit_sft(alone, lm, tmp_path / "c")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, value",
    [
        ("r", 0),
        ("r", 2.5),
        ("alpha", float("nan")),
        ("learning_rate", 0),
        ("learning_rate", "1e-3"),
        ("batch_size", 0),
        ("batch_size", None),
        ("dev_every", 0),
        ("patience", 0),
        ("seed", -1),
        ("seed", 2**32),
        ("seed", True),
    ],
)
def test_settings_that_make_no_sense(name, value):
    with pytest.raises(ValueError, match=f"^{name} is {value!r}: give a (whole )?number"):
        TuningSettings(**{name: value})


def test_examples_and_models_that_cannot_be_trained(tiny, examples, tmp_path):
    lm = load_lm(tiny)
    long = Example([5] * 513, [False] * 512 + [True])
    with pytest.raises(ValueError, match="train example 1 has 513 tokens, and .* reads 512"):
        fine_tune(lm, [examples[0], long], examples[:2], tmp_path / "a")
    with pytest.raises(ValueError, match="dev example 0 has no token that the loss counts"):
        fine_tune(lm, examples, [Example([1, 2], [False, False])], tmp_path / "a")
    with pytest.raises(ValueError, match="start is .*nowhere.*: it holds no adapter_model"):
        fine_tune(lm, examples, examples, tmp_path / "a", start=tmp_path / "nowhere")
    task = load_task("goemotions")
    with pytest.raises(ValueError, match="epochs is 0: give a whole number of at least 1"):
        fit_sft(task.split("train"), lm, tmp_path / "a", epochs=0)
    with pytest.raises(ValueError, match="must be the same"):
        fit_sft(task.split("train"), lm, tmp_path / "a", dev=load_task("brighter-eng"))
    assert not list(tmp_path.iterdir())


def test_a_tuned_model_is_not_taken_for_the_one_that_was_loaded(tiny, examples, tmp_path):
    """A second adapter, trained on top of the first, would be saved for the model without it; and
    what is continued must begin with the same weights.
    """
    settings = TuningSettings(r=2, batch_size=8, dev_every=5)
    lm = load_lm(tiny)
    fine_tune(lm, examples, examples[:4], tmp_path / "a", settings, progress=False)
    assert lm.name == str(tmp_path / "a")
    with pytest.raises(ValueError, match="holds the adapter of an earlier training: load"):
        fine_tune(lm, examples, examples[:4], tmp_path / "b", settings, progress=False)
    other = load_lm(tiny)
    other.model.lm_head.weight.data *= 2
    with pytest.raises(ValueError, match="weights was "):
        fine_tune(other, examples, examples[:4], tmp_path / "a", settings, progress=False)


def test_fit_sft_learns_no_text_of_another_split(tiny, tmp_path):
    task = load_task("goemotions")
    train, test = task.split("train").sample(12, seed=0), task.sample(3, seed=0)
    leaked = [text.upper() for text in test.texts]
    poisoned = AnnotatedTexts(
        "goemotions",
        [*train.ids, "x", "y", "z"],
        [*train.texts, *leaked],
        task.labels,
        [*train.annotations, *test.annotations],
        label_noun=task.label_noun,
        splits=task.splits,
    )
    settings = TuningSettings(r=2, dev_every=5, batch_size=8)
    model = fit_sft(
        poisoned,
        load_lm(tiny),
        tmp_path,
        settings,
        label_order="shuffled",
        epochs=2,
        progress=False,
    )
    about = json.loads((tmp_path / "sft.json").read_text())
    assert about["texts"] == 12
    assert json.loads((tmp_path / "settings.json").read_text())["examples"] == 24
    again = SFT.load(tmp_path)
    few = test.select([0, 1])
    for name in ("hard", "max_over_generations", "compare_to_none", "marginals"):
        marginals = model.predict(few, name, progress=False)
        assert list(marginals.columns) == list(task.labels)
        assert ((marginals >= 0) & (marginals <= 1)).all(axis=None)
    np.testing.assert_allclose(
        again.predict(few, progress=False), model.predict(few, progress=False)
    )


def test_texts_that_measure_the_loss_are_not_learned(tiny, tmp_path):
    train = load_task("goemotions").split("train").sample(12, seed=0)
    fit_sft(
        train,
        load_lm(tiny),
        tmp_path,
        TuningSettings(r=2, dev_every=5, batch_size=8),
        dev=train.select(range(4)),
        progress=False,
    )
    assert json.loads((tmp_path / "sft.json").read_text())["texts"] == 8
