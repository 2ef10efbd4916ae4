"""Decoding heads against a slow twin, on points to learn by heart, and on the embedded model."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from mlc_notebooks.alignment import (
    DecodingHead,
    fit_head,
    fit_heads,
    head_differences,
    head_predictions,
    heads_table,
    labels_ahead,
    rival_predictions,
    score_heads,
)
from mlc_notebooks.data import LabelSet, load_task
from mlc_notebooks.metrics import next_labels
from mlc_notebooks.probing import Trace, probe_steps


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def random_head(rng, outcomes=3, width=5) -> DecodingHead:
    "A head with all weights drawn, in float64."
    head = DecodingHead(np.zeros((outcomes, width))).double()
    for weights in head.parameters():
        weights.data = torch.tensor(rng.normal(size=weights.shape))
    return head


def slow_logits(head, state) -> list[float]:
    "The logits of one state, number by number."
    weight = head.block.weight.tolist()
    bias = head.block.bias.tolist()
    changed = []
    for i, own in enumerate(state):
        inner = bias[i] + sum(w * x for w, x in zip(weight[i], state))
        changed.append(own + inner / (1 + math.exp(-inner)))
    return [sum(u * x for u, x in zip(row, changed)) for row in head.unembedding.tolist()]


def slow_loss(head, states, targets) -> float:
    "The mean cross-entropy, number by number."
    losses = []
    for state, target in zip(states.tolist(), targets):
        logits = slow_logits(head, state)
        losses.append(math.log(sum(math.exp(z) for z in logits)) - logits[target])
    return sum(losses) / len(losses)


def test_the_head_and_its_loss_are_those_of_a_slow_twin(rng):
    head = random_head(rng)
    states = rng.normal(size=(7, 5))
    targets = rng.integers(0, 3, 7)
    logits = head(torch.tensor(states))
    np.testing.assert_allclose(logits.tolist(), [slow_logits(head, s) for s in states], atol=1e-12)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(targets))
    assert loss.item() == pytest.approx(slow_loss(head, states, targets), abs=1e-12)


def test_gradients_are_the_slopes_of_the_slow_loss(rng):
    head = random_head(rng)
    states = rng.normal(size=(7, 5))
    targets = rng.integers(0, 3, 7)
    logits = head(torch.tensor(states))
    torch.nn.functional.cross_entropy(logits, torch.tensor(targets)).backward()
    for weights in (head.unembedding, head.block.weight, head.block.bias):
        place = (0,) * weights.dim()
        slope = weights.grad[place].item()
        losses = []
        for change in (1e-5, -2e-5):
            weights.data[place] += change
            losses.append(slow_loss(head, states, targets))
        weights.data[place] += 1e-5
        assert slope == pytest.approx((losses[0] - losses[1]) / 2e-5, abs=1e-6)


def test_twenty_points_are_learned_by_heart(rng):
    points = rng.normal(size=(20, 40))
    targets = rng.integers(0, 4, 20)
    states = np.tile(points, (5, 1))  # so that the dev part holds the same points
    start = np.zeros((4, 40))
    for frozen in (False, True):
        rows = rng.normal(size=(4, 40)) / 6 if frozen else start
        head = fit_head(states, np.tile(targets, 5), rows, frozen, rate=1e-2)
        assert (head.probabilities(points).argmax(1) == targets).all()
        assert np.array_equal(head.unembedding.detach().numpy(), rows.astype(np.float32)) == frozen


def test_without_steps_a_head_is_the_unembedding(rng):
    states = rng.normal(size=(30, 6))
    rows = rng.normal(size=(4, 6))
    head = fit_head(states, rng.integers(0, 4, 30), rows, most_steps=0)
    odds = np.exp(states @ rows.T)
    shares = odds / odds.sum(1, keepdims=True)
    np.testing.assert_allclose(head.probabilities(states), shares, atol=1e-5)


def test_the_same_seed_gives_the_same_head(rng):
    states = rng.normal(size=(60, 8))
    targets = rng.integers(0, 3, 60)
    rows = rng.normal(size=(3, 8))
    once, again, other = (
        fit_head(states, targets, rows, seed=seed).probabilities(states) for seed in (1, 1, 2)
    )
    assert np.array_equal(once, again)
    assert not np.array_equal(once, other)


STATES = np.ones((12, 4))
TARGETS = np.zeros(12, int)
ROWS = np.ones((3, 4))


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(states=STATES[:9], targets=TARGETS[:9]), "there are 9 states: give at least 10"),
        (dict(states=STATES[:, :3]), r"the states have the shape \(12, 3\): give \(n, 4\)"),
        (dict(states=np.where(np.eye(12, 4), np.nan, 1)), "the state of row 0 holds NaN"),
        (dict(targets=TARGETS[:11]), r"the targets have the shape \(11,\)"),
        (dict(targets=TARGETS + 3), "the target of row 0 is 3: give a whole number"),
        (dict(targets=TARGETS - 1), "the target of row 0 is -1"),
        (dict(rate=0), "rate is 0: give a number above 0"),
        (dict(patience=-1), "patience is -1"),
        (dict(seed=-1), "seed is -1"),
    ],
)
def test_what_cannot_be_fitted_is_named(changed, message):
    given = dict(states=STATES, targets=TARGETS, unembedding=ROWS) | changed
    with pytest.raises(ValueError, match=message):
        fit_head(**given)


# --- the embedded model --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task():
    return load_task("brighter-eng")


@pytest.fixture(scope="module")
def train(tuned_lm, task):
    texts = task.split("train").sample(40, seed=3)
    how = dict(shots=0, reading="first_token", hidden="first", progress=False)
    return probe_steps(tuned_lm, texts, **how)


@pytest.fixture(scope="module")
def trace(tuned_lm, task):
    texts = task.sample(24, seed=3)
    return probe_steps(tuned_lm, texts, shots=0, hidden="first", progress=False)


@pytest.fixture(scope="module")
def heads(tuned_lm, train):
    return fit_heads(tuned_lm, train)


@pytest.fixture(scope="module")
def control(tuned_lm, train):
    return fit_heads(tuned_lm, train, shuffled=True)


def written_at(trace, step):
    "The outcome of each answer at this place, with a loop."
    found = []
    for outcomes in trace.items["outcomes"]:
        names = [name for name in outcomes if name != "none"]
        found.append(names[step - 1] if len(names) >= step else "none")
    return found


def test_labels_ahead_are_the_answers_in_order(trace):
    for step in (1, 2, 3):
        assert labels_ahead(trace, step).tolist() == written_at(trace, step)


def test_an_untrained_head_is_the_models_own(tuned_lm, train, trace):
    start = fit_heads(tuned_lm, train, steps=[2])
    weight = tuned_lm.model.get_output_embeddings().weight.detach().numpy()
    first_tokens = [8876, 86, 2641, 99, 10485, 19444]  # "anger", "f", "joy", "s", "sur", "none"
    state = trace.states(30).to_numpy()
    named = (state @ weight[first_tokens].T).argmax(1)
    outcomes = np.array(trace.labels.outcomes)
    assert (outcomes[named] == written_at(trace, 1)).mean() > 0.9
    assert start.heads[2].unembedding.shape == (6, 576)


def test_the_control_knows_no_more_than_the_marginal(heads, control, trace):
    table = heads_table(score_heads(heads, trace, control))
    prob = table[table["step"] == 2].set_index(["asked", "source"])["prob"]
    for asked in ("which label", "which outcome"):
        assert abs(prob[asked, "shuffled"] - prob[asked, "marginal"]) < 0.15
        assert prob[asked, "head"] > prob[asked, "shuffled"]


def test_the_runner_up_is_that_of_the_phenomenon(heads, trace):
    scores = score_heads(heads, trace)
    ours = scores[(scores["source"] == "runner-up") & (scores["step"] == 2)].set_index("example")
    steps = next_labels(trace)
    theirs = steps[(steps["step"] == 1) & ~steps["last"]].set_index("example").loc[ours.index]
    assert len(ours) > 5
    assert ours["favourite"].tolist() == theirs["runner_up"].tolist()
    assert ours["right"].astype(float).tolist() == theirs["runner_up_next"].tolist()


def test_rivals_by_hand(heads, train, trace):
    rivals = rival_predictions(heads, trace)
    second = np.array(written_at(train, 2))
    first = np.array(written_at(train, 1))
    outcomes = trace.labels.outcomes
    share = [((second == name).sum() + 0.5) / (len(train) + 0.5 * 6) for name in outcomes]
    np.testing.assert_allclose(rivals["marginal"][2].iloc[0], share)
    for item, begun in labels_ahead(trace, 1).items():
        alike = second[first == begun]
        counts = [(alike == name).sum() + s for name, s in zip(outcomes, share)]
        found = rivals["after the first"][2].loc[item]
        np.testing.assert_allclose(found, np.array(counts) / (len(alike) + 1))
        assert rivals["runner-up"][2].loc[item, begun] == 0


def test_differences_are_those_of_the_shares(heads, control, trace):
    scores = score_heads(heads, trace, control)
    right = heads_table(scores).set_index(["step", "asked", "source"])["right"]
    for row in head_differences(scores).itertuples():
        expected = right[row.step, row.asked, "head"] - right[row.step, row.asked, row.over]
        assert row.value == pytest.approx(expected)
        assert row.low <= row.value <= row.high


def test_heads_of_texts_are_heads_of_their_trace(tuned_lm, task, trace):
    few = task.split("train").sample(12, seed=5)
    how = dict(shots=0, reading="first_token", hidden="first", progress=False)
    asked = probe_steps(tuned_lm, few, **how)
    of_texts = head_predictions(fit_heads(tuned_lm, few, [2], progress=False), trace)[2]
    of_trace = head_predictions(fit_heads(tuned_lm, asked, [2]), trace)[2]
    pd.testing.assert_frame_equal(of_texts, of_trace, atol=1e-4)


def changed(trace, labels=None, hidden=True, **settings) -> Trace:
    "The trace with other labels or settings, or without its hidden states."
    states = trace.hidden if hidden else None
    made = trace.settings | settings
    labels = labels or trace.labels
    return Trace(labels, trace.items, trace.steps, trace.logprobs, made, states)


def test_other_answers_are_refused(tuned_lm, heads, train, trace):
    backwards = LabelSet(trace.labels.names[::-1])
    one_of = LabelSet(trace.labels.names, none=None)
    refused = [
        (changed(trace, labels=backwards), "the same labels in the same order"),
        (changed(trace, weights_hash="other"), "weights_hash of the trace is 'other'"),
        (changed(trace, shots=10), "shots of the trace is 10"),
        (changed(trace, hidden=False), "keeps no hidden states"),
    ]
    for other, message in refused:
        with pytest.raises(ValueError, match=message):
            head_predictions(heads, other)
    with pytest.raises(ValueError, match="there is no second label"):
        fit_heads(tuned_lm, changed(train, labels=one_of))
    with pytest.raises(ValueError, match="a step is 1"):
        fit_heads(tuned_lm, train, steps=[1])
    with pytest.raises(ValueError, match="weights_hash of the trace is 'other'"):
        fit_heads(tuned_lm, changed(train, weights_hash="other"))
