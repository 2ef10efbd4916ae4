"""Policy-gradient tuning: rewards by hand, the loss written out, runs that are interrupted."""

import copy
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from mlc_notebooks.alignment import (
    answer_logprobs,
    fit_rl,
    group_advantages,
    policy_loss,
    rl,
    sample_answers,
    set_reward,
)
from mlc_notebooks.data import AnnotatedTexts, LabelSet, list_prompts, load_task
from mlc_notebooks.models import load_lm, merge_adapter

LABELS = LabelSet(["joy", "fear", "anger"])


@pytest.mark.parametrize(
    "answer, gold, reward",
    [
        ('\n{"label": ["joy", "fear"]}', ["fear", "joy"], 1),
        ('\n{"label": ["joy"]}', ["joy", "fear"], 1 / 2),
        ('\n{"label": ["joy", "anger"]}', ["joy", "fear"], 1 / 3),
        ('\n{"label": ["anger"]}', ["joy"], 0),
        ('\n{"label": ["none"]}', [], 1),
        ('\n{"label": []}', [], 1),
        ('\n{"label": ["none"]}', ["joy"], 0),
        ('\n{"label": ["joy"]}', [], 0),
        ('\n{"label": ["joy", "joy", "fear"]}', ["joy", "fear"], 1),  # repeated
        ('\n{"label": ["joy", "glee"]}', ["joy"], 1 / 2),  # invented
        ('\n{"label": ["glee"]}', [], 0),
        ('Sure:\n{"label": ["joy"]}', ["joy"], 1),  # a preamble is still valid
        ('\n{"label": ["joy", "fe', ["joy"], 0),  # cut off
        ('\n{"label": ["joy" "fear"]}', ["joy", "fear"], 0),
        ("joy", ["joy"], 0),
        ("", [], 0),
    ],
)
def test_reward_by_hand(answer, gold, reward):
    assert set_reward(answer, gold, LABELS) == pytest.approx(reward)


def test_advantages_compare_answers_to_the_same_text():
    rewards = torch.tensor([[1, 0, 0.5, 0.5], [1, 1, 1, 1]])
    assert group_advantages(rewards).tolist() == [[0.5, -0.5, 0, 0], [0, 0, 0, 0]]


def test_loss_and_gradient_against_the_written_out_sum():
    "Answers of three and two tokens, five tokens to choose from; gradients by their formulas."
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, dtype=torch.double, requires_grad=True)
    start = torch.randn(2, 3, 5, dtype=torch.double)
    ids = torch.tensor([[1, 4, 2], [0, 3, 0]])
    lengths = [3, 2]
    advantages = torch.tensor([0.7, -0.7], dtype=torch.double)
    beta = 0.3
    written = torch.tensor([[1, 1, 1], [1, 1, 0]])

    def pick(values):
        return values.log_softmax(-1).gather(2, ids[..., None])[..., 0]

    loss, kl = policy_loss(pick(logits), pick(start), written, advantages, beta)
    loss.backward()
    probs = logits.detach().softmax(-1).numpy()
    expected = 0
    expected_kl = 0
    gradient = np.zeros((2, 3, 5))
    reference = start.softmax(-1).numpy()
    for i in range(2):
        for t in range(lengths[i]):
            token = int(ids[i, t])
            ratio = reference[i, t, token] / probs[i, t, token]
            k3 = ratio - 1 - np.log(ratio)
            expected += (-float(advantages[i]) + beta * k3) / 2
            expected_kl += k3 / 2
            score = np.eye(5)[token] - probs[i, t]  # gradient of log p
            gradient[i, t] = (-float(advantages[i]) + beta * (1 - ratio)) * score / 2
    assert float(loss.detach()) == pytest.approx(expected)
    assert float(kl) == pytest.approx(expected_kl)
    np.testing.assert_allclose(logits.grad.numpy(), gradient, atol=1e-12)


@pytest.fixture
def tiny(tiny_folder):
    return load_lm(tiny_folder)


def made_task(n=6, **splits):
    votes = [np.eye(3, dtype=int)[[i % 3]] for i in range(n)]
    texts = [f"This is text {i}{'!' * i}" for i in range(n)]
    return AnnotatedTexts("made", [f"t{i}" for i in range(n)], texts, LABELS, votes, splits=splits)


@pytest.fixture
def letter_reward(monkeypatch):
    "A reward that random bytes earn too: the share of letters."

    def letters(answer):
        return [c for c in answer if c.isascii() and c.isalpha()]

    monkeypatch.setattr(
        rl, "set_reward", lambda answer, gold, labels: len(letters(answer)) / max(1, len(answer))
    )


SHORT = dict(steps=7, texts=2, group=4, learning_rate=1e-2, progress=False)


def test_log_probabilities_and_gradients_against_one_pass_an_answer(tiny):
    prompts = [
        tiny.encode_prompt(p)
        for p in list_prompts(["Short.", "A text that is quite a bit longer"], LABELS)
    ]
    answers = sample_answers(
        tiny.model,
        prompts,
        3,
        8,
        lambda ids: len(ids) == 8 - ids[0] % 3,
        torch.Generator().manual_seed(0),
    )
    assert len({len(a) for a in answers}) > 1
    weights = torch.randn(6)
    fast, written = answer_logprobs(tiny.model, prompts, answers)
    assert written.sum(1).tolist() == [len(a) for a in answers]
    (fast.sum(1) * weights).sum().backward()
    gradients = [p.grad.clone() for p in tiny.model.parameters()]
    tiny.model.zero_grad()
    for row, answer in enumerate(answers):
        logprobs = (
            tiny.model(torch.tensor([prompts[row // 3] + answer])).logits[0, :-1].log_softmax(-1)
        )
        slow = logprobs[torch.arange(len(answer)) - len(answer), answer]
        torch.testing.assert_close(fast[row, : len(answer)], slow, atol=1e-4, rtol=0)
        (slow.sum() * weights[row]).backward()
    for gradient, parameter in zip(gradients, tiny.model.parameters()):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-4, rtol=1e-3)


def test_answers_are_drawn_from_the_models_distribution(tiny):
    "Second tokens of 4,000 draws against the softmax after the first token that was drawn most."
    prompts = [tiny.encode_prompt(p) for p in list_prompts(["Short.", "A longer one"], LABELS)]
    drawn = sample_answers(
        tiny.model, prompts, 4000, 2, lambda ids: False, torch.Generator().manual_seed(0)
    )
    for prompt, answers in zip(prompts, (drawn[:4000], drawn[4000:])):
        first, _ = Counter(ids[0] for ids in answers).most_common(1)[0]
        seconds = [ids[1] for ids in answers if ids[0] == first]
        with torch.no_grad():
            once, twice = tiny.model(torch.tensor([prompt + [first]])).logits[0, -2:].softmax(-1)
        for probs, tokens in ((once, [ids[0] for ids in answers]), (twice, seconds)):
            shares = np.bincount(tokens, minlength=257) / len(tokens)
            assert (
                np.abs(shares - probs.numpy())
                < 5 * (probs.numpy() / len(tokens)) ** 0.5 + 1 / len(tokens)
            ).all()


def test_a_run_raises_its_reward_and_load_lm_finds_it(tiny, letter_reward, tmp_path):
    before = copy.deepcopy(tiny.model.state_dict())
    policy = fit_rl(
        made_task(), tiny, tmp_path / "rl", **{**SHORT, "steps": 24, "group": 8, "beta": 0.0}
    )
    assert policy.log["step"].tolist() == list(range(1, 25))
    assert np.isfinite(policy.log).all(axis=None)
    assert policy.log["kl"][0] == 0
    assert policy.log["reward"][-5:].mean() > policy.log["reward"][:5].mean() + 0.05
    for name, tensor in tiny.model.state_dict().items():  # the starting model stays
        assert torch.equal(before[name], tensor), name
    merged = copy.deepcopy(tiny.model)
    merge_adapter(merged, tmp_path / "rl")
    for name, tensor in load_lm(tmp_path / "rl").model.state_dict().items():
        torch.testing.assert_close(tensor, merged.state_dict()[name])
    assert policy.lm.fingerprint == load_lm(tmp_path / "rl").fingerprint != tiny.fingerprint
    assert sorted(p.name for p in (tmp_path / "rl").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "files.json",
        "log.csv",
        "run.lock",
        "settings.json",
    ]


def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    tiny, letter_reward, tmp_path, monkeypatch
):
    whole = fit_rl(made_task(), tiny, tmp_path / "whole", **SHORT)
    one_step = rl._one_step
    done = []

    def stopped(*arguments):
        if len(done) == 6:
            raise KeyboardInterrupt
        done.append(1)
        return one_step(*arguments)

    monkeypatch.setattr(rl, "_one_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        fit_rl(made_task(), tiny, tmp_path / "parts", **SHORT)
    with pytest.raises(FileNotFoundError):
        load_lm(tmp_path / "parts")  # half a run is no model
    done.clear()
    torch.manual_seed(99)  # whatever happened in between
    parts = fit_rl(made_task(), tiny, tmp_path / "parts", **SHORT)
    assert len(done) == 2  # from the checkpoint after step 5
    pd.testing.assert_frame_equal(parts.log, whole.log, check_exact=True)
    first, second = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "parts")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_finished_run_is_loaded_and_other_settings_are_refused(
    tiny, letter_reward, tmp_path, monkeypatch
):
    first = fit_rl(made_task(), tiny, tmp_path, **SHORT)
    monkeypatch.setattr(rl, "_tune", None)
    pd.testing.assert_frame_equal(fit_rl(made_task(), tiny, tmp_path, **SHORT).log, first.log)
    for name, value in dict(
        steps=8, texts=3, group=3, learning_rate=1e-3, beta=0.1, r=4, alpha=8, seed=1
    ).items():
        with pytest.raises(ValueError, match=f"{name} was "):
            fit_rl(made_task(), tiny, tmp_path, **{**SHORT, name: value})
    with pytest.raises(ValueError, match="sha256 was "):
        fit_rl(made_task(5), tiny, tmp_path, **SHORT)
    tiny.model.lm_head.weight.data *= 2
    with pytest.raises(ValueError, match="weights was "):
        fit_rl(made_task(), tiny, tmp_path, **SHORT)


def test_a_short_leash_keeps_the_policy_at_the_start(tiny, letter_reward, tmp_path):
    far, near = (
        fit_rl(made_task(), tiny, tmp_path / str(beta), **{**SHORT, "steps": 12, "beta": beta}).log[
            "kl"
        ]
        for beta in (0.0, 1000.0)
    )
    assert near[1:].mean() < far[1:].mean() / 5


def test_what_cannot_be_trained_on_is_refused(tiny, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="nothing to learn from"):
        fit_rl(made_task().select([]), tiny, tmp_path / "a", **SHORT)
    with pytest.raises(ValueError, match="nothing to learn from"):
        fit_rl(made_task(test=made_task()), tiny, tmp_path / "b", **SHORT)
    with pytest.raises(ValueError, match="group is 1"):
        fit_rl(made_task(), tiny, tmp_path / "c", **{**SHORT, "group": 1})
    for name, value in dict(steps=0, texts=1.5, r=0, learning_rate=0, alpha=0, seed=-1).items():
        with pytest.raises(ValueError, match=f"^{name} is {value}: give"):
            fit_rl(made_task(), tiny, tmp_path / "c", **{**SHORT, name: value})
    with pytest.raises(ValueError, match="beta is nan: give a number of at least 0"):
        fit_rl(made_task(), tiny, tmp_path / "c", **{**SHORT, "beta": float("nan")})
    tiny.context_length = 40
    with pytest.raises(ValueError, match="item 't0'"):
        fit_rl(made_task(), tiny, tmp_path / "d", **SHORT)
    assert not list(tmp_path.iterdir())  # a refused run leaves nothing behind
    monkeypatch.setattr(
        rl, "policy_loss", lambda *arguments: (torch.tensor(float("nan")), torch.tensor(0.0))
    )
    del tiny.context_length
    with pytest.raises(FloatingPointError, match="step 1"):
        fit_rl(made_task(), tiny, tmp_path / "e", **SHORT)


def test_texts_of_other_splits_are_not_read(tiny, letter_reward, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        rl, "list_prompts", lambda texts, *rest: seen.extend(texts) or list_prompts(texts, *rest)
    )
    fit_rl(made_task(test=made_task(2)), tiny, tmp_path, **{**SHORT, "steps": 2})
    assert seen == list(made_task().texts[2:])


def test_the_real_model(tuned_lm, tmp_path):
    policy = fit_rl(
        load_task("goemotions").split("train"),
        tuned_lm,
        tmp_path,
        steps=2,
        texts=2,
        group=4,
        progress=False,
    )
    log = policy.log
    assert log["kl"][0] == 0
    assert (log["kl"][1] > 0) == (log["learned_from"][0] > 0)
    assert log["kl"][1] < 1
    assert (log["flagged"] < 0.5).all() and log["reward"].mean() > 0.2
    assert (policy.lm.fingerprint["weights"] != tuned_lm.fingerprint["weights"]) == (
        log["learned_from"].max() > 0
    )
    assert policy.lm.fingerprint["tokenizer"] == tuned_lm.fingerprint["tokenizer"]
