"""The lazy exact reading against the reading of everything: probabilities, bounds, what it costs."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy.special import softmax

from mlc_notebooks.data import LabelSet, load_task
from mlc_notebooks.engine import SettingsChanged, continuous_batching, prompt_tree
from mlc_notebooks.engine.tree import Node
from mlc_notebooks.models import AnswerTokens
from mlc_notebooks.models.tokens import Form
from mlc_notebooks.probing import Trace, probe_steps
from mlc_notebooks.probing.lazy import LazyReader, PartialReading, TrieArrays, to_read
from mlc_notebooks.probing.reading import FormTrie, Step, StepReader

TOLERANCE = 1e-4
ROUNDING = 2e-6  # float32, in passes of other sizes
SHOWN = [("I can't wait for tonight!", ("joy",)), ("He shouted and I ran.", ("anger", "fear"))]
TEXTS = ["My card was stolen in Rome!", "I am so glad that you came, but I miss my sister."]

VERBS = ("block", "blame", "order", "cancel", "close", "change", "check", "find", "pay", "return")
NOUNS = ("card", "car", "cardigan", "order", "account", "bill", "bill date", "pin", "bag", "loan")
LABELS = {
    "7": list(load_task("goemotions").labels),
    "27": list(load_task("goemotions-27").labels),
    "prefixes": ["joy", "joyful", "joyfulness", "joyous", "j", "Joy Division", "anger", "fear"],
    "100": [f"{verb} {noun}" for verb, noun in product(VERBS, NOUNS)],
}


# ---------------------------------------------------------------- without a model


def random_trie(rng):
    "A trie of random spellings over six tokens, some of them beginnings of others."
    spellings = {tuple(rng.integers(0, 6, rng.integers(1, 5)).tolist()) for _ in range(14)}
    outcomes = rng.integers(2, 8)
    forms = [Form(i % outcomes, ids) for i, ids in enumerate(sorted(spellings))]
    return FormTrie(forms), min(outcomes, len(forms))


def random_rows(rng, trie):
    """Log-probabilities (1 + nodes, 8) of six tokens, of two that end a label (6 and 7), sharp or
    flat; some tokens are impossible.
    """
    logits = rng.normal(0, rng.choice([0.5, 3, 8]), (len(trie.tokens) + 1, 9))
    logits[rng.random(logits.shape) < 0.05] = -np.inf
    logits[:, 8] = 0  # what else could be written
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return logprobs[:, :8].astype(np.float32)


def true_amounts(trie, rows, outcomes):
    "The obvious twin: P(spelling and an end), token by token, summed by outcome."
    amounts = np.zeros(outcomes)
    for form in trie.forms:
        probability = 1.0
        for i, token in enumerate(form.ids):
            probability *= np.exp(float(rows[trie.position[form.ids[:i]] + 1, token]))
        probability *= np.exp(rows[trie.position[form.ids] + 1, 6:].astype(float)).sum()
        amounts[form.outcome] += probability
    return amounts


@pytest.mark.parametrize("seed", range(200))
def test_the_bound_holds_after_every_round(seed):
    rng = np.random.default_rng(seed)
    trie, outcomes = random_trie(rng)
    rows = random_rows(rng, trie)
    true = true_amounts(trie, rows, outcomes)
    arrays = TrieArrays(trie, {token: token for token in range(8)}, outcomes)
    partial = PartialReading(arrays, [6, 7])
    partial.take(np.array([0]), rows[:1])
    tolerance = 10.0 ** -rng.integers(1, 6)

    rounds = 0
    while True:
        totals = partial.totals()
        scale = np.exp(totals.scale)
        assert (totals.found * scale <= true + 1e-9).all()
        assert (true <= (totals.found + totals.most) * scale + 1e-9).all()
        assert (0 <= totals.guess).all() and (totals.guess <= totals.most * (1 + 1e-9)).all()
        if true.sum() > 0:
            apart = np.abs(totals.prob - true / true.sum())
            assert (apart <= totals.bound() + 1e-9).all()
        wanted = to_read(partial, tolerance)
        if not len(wanted):
            break
        assert not partial.read[wanted].any()
        partial.take(wanted, rows[wanted])
        rounds += 1

    assert rounds <= len(trie.tokens)
    assert totals.bound().max() <= tolerance or not len(partial.unread())


def test_a_label_of_thousands_of_nats_is_read():
    "Probabilities are scaled: what would be 0 as a number still has a log-probability."
    trie = FormTrie([Form(0, (0, 1)), Form(1, (2,))])
    arrays = TrieArrays(trie, {0: 0, 1: 1, 2: 2, 3: 3}, outcomes=2)
    partial = PartialReading(arrays, [3])
    rows = np.full((4, 4), -900.0)
    partial.take(np.array([0]), rows[:1])
    while len(wanted := to_read(partial, 1e-4)):
        partial.take(wanted, rows[wanted])
    totals = partial.totals()
    assert totals.scale == -1800
    assert totals.prob.tolist() == [0, 1]


# ---------------------------------------------------------------- on the embedded model


def probed(lm, names, **options):
    how = dict(labels=LabelSet(LABELS[names]), demonstrations=SHOWN, progress=False)
    if names != "7":
        how["demonstrations"] = [(TEXTS[0], LABELS[names][:1]), (TEXTS[1], LABELS[names][1:3])]
    return probe_steps(lm, TEXTS, **{**how, "shots": 0, **options})


def assert_within_bounds(lazy: Trace, full: Trace, tolerance: float = TOLERANCE):
    apart = np.abs(lazy.probs - full.probs)
    assert lazy.items.equals(full.items)
    assert full.bounds is None and lazy.bounds.shape == lazy.logprobs.shape
    assert (apart <= lazy.bounds + ROUNDING).all()
    assert lazy.bounds.max() <= tolerance + ROUNDING
    assert np.isfinite(lazy.logprobs).all() and lazy.logprobs.dtype == full.logprobs.dtype
    np.testing.assert_allclose(lazy.steps["mass"], full.steps["mass"], atol=2 * tolerance)
    for column in ("go", "stop"):
        np.testing.assert_allclose(lazy.steps[column], full.steps[column], atol=1e-4)


CASES = [
    ("7", "json", "free"),
    ("7", "polysyndeton", "guided"),
    ("27", "comma", "free"),
    ("27", "json", "guided"),
    ("prefixes", "json", "free"),
    ("prefixes", "comma", "guided"),
    ("100", "json", "guided"),
]


@pytest.mark.parametrize("names, fmt, decoding", CASES, ids="-".join)
def test_lazy_is_within_its_bounds(tuned_lm, names, fmt, decoding):
    how = dict(fmt=fmt, decoding=decoding)
    if names == "7":
        how["demonstrations"] = [(TEXTS[0], ["anger"]), (TEXTS[1], ["joy", "sadness"])]
    full = probed(tuned_lm, names, tolerance=0, **how)
    assert_within_bounds(probed(tuned_lm, names, **how), full)
    assert_within_bounds(probed(tuned_lm, names, tolerance=1e-2, **how), full, 1e-2)
