"""The lazy exact reading against the full one: probabilities, bounds, what it costs."""

from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest

from mlc_notebooks.alignment import divide_prior, zero_shot
from mlc_notebooks.data import LabelSet, load_task
from mlc_notebooks.engine import PackedTree, SettingsChanged
from mlc_notebooks.metrics import judged
from mlc_notebooks.models.tokens import Form
from mlc_notebooks.probing import Trace, probe_steps, steps
from mlc_notebooks.probing.lazy import PartialReading, TrieArrays, to_read, totals_of
from mlc_notebooks.probing.reading import FormTrie
from mlc_notebooks.probing.saved import END_COLUMNS

TOLERANCE = 1e-4
ROUNDING = 5e-6  # float32, in passes of other sizes
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


@pytest.mark.parametrize("seed", range(120))
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
        totals = totals_of(partial)
        scale = np.exp(totals.scale)
        assert (totals.found * scale <= true + 1e-9).all()
        assert (true <= (totals.found + totals.most) * scale + 1e-9).all()
        assert (0 <= totals.guess).all() and (totals.guess <= totals.most * (1 + 1e-9)).all()
        if true.sum() > 0:
            share = true / true.sum()
            low, high = totals.ends().T
            assert (low <= share + 1e-9).all() and (share <= high + 1e-9).all()
            assert (low <= totals.prob + 1e-9).all() and (totals.prob <= high + 1e-9).all()
            assert (np.abs(totals.prob - share) <= totals.bound() + 1e-9).all()
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
    totals = totals_of(partial)
    assert totals.scale == -1800
    assert totals.prob.tolist() == [0, 1]


# ---------------------------------------------------------------- on the embedded model


def probed(lm, names, **options):
    how = dict(labels=LabelSet(LABELS[names]), demonstrations=SHOWN, progress=False)
    if names != "7":
        how["demonstrations"] = [(TEXTS[0], LABELS[names][:1]), (TEXTS[1], LABELS[names][1:3])]
    return probe_steps(lm, TEXTS, **{**how, "shots": 0, **options})


def farthest(lazy: Trace) -> float:
    "How far any probability may be from its ends."
    return np.abs(lazy.bounds - lazy.probs[:, :, None]).max()


def assert_within_bounds(lazy: Trace, full: Trace, tolerance: float = TOLERANCE):
    assert lazy.items.equals(full.items)
    assert full.bounds is None and lazy.bounds.shape == (*lazy.logprobs.shape, 2)
    low, high = np.moveaxis(lazy.bounds, 2, 0)
    assert (low <= full.probs + ROUNDING).all() and (full.probs <= high + ROUNDING).all()
    assert farthest(lazy) <= tolerance + ROUNDING
    assert (lazy.steps["mass_low"] <= full.steps["mass"] + ROUNDING).all()
    assert (full.steps["mass"] <= lazy.steps["mass_high"] + ROUNDING).all()
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


def test_a_tolerance_of_one_part_in_a_billion_is_the_full_reading(tuned_lm):
    full = probed(tuned_lm, "27", tolerance=0)
    nearly = probed(tuned_lm, "27", tolerance=1e-9)
    np.testing.assert_allclose(nearly.logprobs, full.logprobs, atol=1e-3)
    assert farthest(nearly) <= ROUNDING and nearly.bounds.dtype == np.float32
    assert (nearly.bounds[:, :, 1] - nearly.bounds[:, :, 0]).max() <= ROUNDING


@pytest.mark.parametrize("options", [dict(batch_size=1), dict(no_cache=True), dict(hidden=True)])
def test_batches_and_trees_agree(tuned_lm, options):
    "A rounding error may decide whether a branch is read, so what agrees is the probabilities."
    names = "prefixes" if "no_cache" in options else "27"  # the plain twin takes its time
    lazy = probed(tuned_lm, names)
    other = probed(tuned_lm, names, **options)
    assert other.items.equals(lazy.items)
    assert np.abs(other.probs - lazy.probs).max() < TOLERANCE


def test_a_step_that_decoding_did_not_compute(base_lm):
    "Without examples the base model writes no list: step 1 is read where one would begin."
    ask = dict(labels=LABELS["27"], shots=0, progress=False)
    full = probe_steps(base_lm, TEXTS, **ask, tolerance=0)
    assert full.steps["flags"].map(lambda flags: "forced" in flags).any()
    lazy = probe_steps(base_lm, TEXTS, **ask)
    assert (np.abs(lazy.probs - full.probs) <= TOLERANCE + ROUNDING).all()
    assert farthest(lazy) <= TOLERANCE + ROUNDING


def test_what_is_known_is_not_computed_again_and_memory_is_given_back(tuned_lm, monkeypatch):
    asked = []
    trees = []
    compute = PackedTree.compute

    def spy(tree, nodes, *args, **options):
        asked.append(len(nodes))
        trees.append(tree)
        return compute(tree, nodes, *args, **options)

    monkeypatch.setattr(PackedTree, "compute", spy)
    counts = {}
    for tolerance in (0, 1e-4, 1e-2):
        asked.clear()
        probed(tuned_lm, "100", decoding="guided", tolerance=tolerance)
        counts[tolerance] = sum(asked)
        assert not trees[-1].kept
        assert len(trees[-1].slots.free) == trees[-1].slots.end - trees[-1].prefix_length
    assert counts[1e-2] < counts[1e-4] < 0.75 * counts[0]


def test_with_hidden_states_only_what_was_decoded_is_kept(tuned_lm, monkeypatch):
    "The nodes of a reading are given back although the answers' tokens stay for the states."
    sizes = []
    read_states = steps.read_states

    def spy(tree, *args):
        sizes.append(sum(len(node.ids) for node in tree.kept))
        return read_states(tree, *args)

    monkeypatch.setattr(steps, "read_states", spy)
    lazy = probed(tuned_lm, "27", hidden="first")
    assert lazy.hidden is not None
    full = probed(tuned_lm, "27", hidden="first", tolerance=0)
    assert full.hidden.shape == lazy.hidden.shape and sizes[0] == sizes[1]


def test_first_token_has_no_tolerance(tuned_lm):
    trace = probed(tuned_lm, "7", reading="first_token", tolerance=1e-2)
    assert trace.bounds is None and trace.settings["tolerance"] == 0


@pytest.mark.parametrize("wrong", [-1, 1.5, float("nan"), "1e-4", None, True])
def test_a_tolerance_is_a_number_from_0_to_1(tuned_lm, wrong):
    with pytest.raises(ValueError, match="tolerance is"):
        probed(tuned_lm, "7", tolerance=wrong)


# ---------------------------------------------------------------- what is kept


def test_a_trace_keeps_its_bounds(tuned_lm, tmp_path):
    lazy = probed(tuned_lm, "27")
    again = Trace.load(lazy.save(tmp_path))
    assert again.bounds.tobytes() == lazy.bounds.tobytes()
    assert again.settings["tolerance"] == TOLERANCE
    assert again.frame().equals(lazy.frame())

    path = tmp_path / "trace.parquet"
    table = pd.read_parquet(path)
    for column in ("low", "high"):
        for wrong in (-0.1, 2.0, np.nan, "much"):
            table.assign(**{column: wrong}).to_parquet(path, index=False)
            with pytest.raises(ValueError, match=f"trace.parquet is damaged.*{column}"):
                Trace.load(tmp_path)


def test_traces_of_earlier_versions_are_read(tuned_lm, tmp_path):
    lazy = probed(tuned_lm, "27")
    path = lazy.save(tmp_path) / "trace.parquet"
    table = pd.read_parquet(path)
    before = table.drop(columns=["low", "high", *END_COLUMNS])
    before.to_parquet(path, index=False)  # as versions that read everything saved it
    old = Trace.load(tmp_path)
    assert old.bounds is None and old.logprobs.tobytes() == lazy.logprobs.tobytes()

    apart = np.maximum(table["high"] - table["prob"], table["prob"] - table["low"])
    before.assign(bound=apart.astype(np.float32)).to_parquet(path, index=False)  # and the next
    old = Trace.load(tmp_path)
    assert (old.bounds[:, :, 0] <= lazy.bounds[:, :, 0] + 1e-6).all()
    assert (lazy.bounds[:, :, 1] <= old.bounds[:, :, 1] + 1e-6).all()
    assert np.abs(old.bounds - lazy.bounds).max() <= TOLERANCE
    assert "mass_low" not in old.frame() and old.bounded_mass.max() < 1e-2
    assert Trace.load(old.save(tmp_path / "again")).bounds.tobytes() == old.bounds.tobytes()
    before.assign(bound=2.0).to_parquet(path, index=False)
    with pytest.raises(ValueError, match="trace.parquet is damaged.*bound"):
        Trace.load(tmp_path)


def test_a_run_goes_on_with_its_own_tolerance(tuned_lm, tmp_path):
    how = dict(batch_size=1, folder=tmp_path / "run")
    whole = probed(tuned_lm, "27", **how)
    newest = max((tmp_path / "run").glob("*.safetensors"))
    newest.unlink()
    with pytest.warns(UserWarning, match="its 1 texts are computed again"):
        again = probed(tuned_lm, "27", **how)
    assert again.logprobs.tobytes() == whole.logprobs.tobytes()
    assert again.bounds.tobytes() == whole.bounds.tobytes()
    with pytest.raises(SettingsChanged, match="tolerance was 0.0001, now 0"):
        probed(tuned_lm, "27", **how, tolerance=0)


def test_part_of_a_trace_keeps_its_bounds_and_a_calibrated_one_has_none(tuned_lm):
    task = load_task("goemotions").sample(3, seed=0)
    nobody = replace(task, annotations=[*task.annotations[:2], task.annotations[2][:0]])
    trace = probe_steps(tuned_lm, nobody, shots=0, progress=False)
    part = judged(trace, nobody)
    assert len(part) == 2 and part.bounds.shape == (*part.logprobs.shape, 2)
    assert divide_prior(trace).bounds is None


def test_methods_that_take_ratios_read_everything(tuned_lm):
    task = load_task("goemotions").sample(2, seed=0)
    full = probe_steps(tuned_lm, task, shots=0, tolerance=0, progress=False)
    found = zero_shot(tuned_lm, task, ["compare_to_none"], shots=0, progress=False)
    expected = zero_shot(tuned_lm, task, ["compare_to_none"], shots=0, trace=full)
    assert found["compare_to_none"].equals(expected["compare_to_none"])
