"""Reading from a model that tells only its likeliest tokens, against reading it in full."""

import re
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from mlc_notebooks.alignment import mean_marginals, score_ends, zero_shot
from mlc_notebooks.alignment.trace_methods import compare_to_none, hard, max_over_generations
from mlc_notebooks.data import LabelSet, load_task
from mlc_notebooks.engine import LikeliestOnly, SettingsChanged
from mlc_notebooks.engine.scheduler import Prediction
from mlc_notebooks.engine.tree import Node
from mlc_notebooks.metrics import align_report, phenomenon_table, reading_check
from mlc_notebooks.metrics.phenomenon import summarise
from mlc_notebooks.models.language_model import NotOffered
from mlc_notebooks.models.tokens import Form
from mlc_notebooks.probing import Trace, probe_steps
from mlc_notebooks.probing.bounded import SeenReading, first_token_totals, seen_totals
from mlc_notebooks.probing.lazy import TrieArrays
from mlc_notebooks.probing.reading import FormTrie
from mlc_notebooks.report import summary_sentence, write_report

ROUNDING = 5e-6  # float32, in passes of other sizes
CONTEXT = Node(None, [0])
ENDS = [6, 7]  # tokens that end a label; 8 is what else could be written


# ---------------------------------------------------------------- without a model


def random_trie(rng, lead=0):
    "Random spellings over six tokens; with a lead, each begins with one of two tokens."
    spellings = {tuple(rng.integers(0, 6, rng.integers(1, 4)).tolist()) for _ in range(10)}
    outcomes = int(rng.integers(2, 7))
    forms = []
    for i, ids in enumerate(sorted(spellings)):
        if lead:
            ids = (int(rng.integers(4, 6)), *ids)
        forms.append(Form(i % outcomes, ids, lead))
    return FormTrie(forms), min(outcomes, len(forms))


def random_rows(rng, trie):
    "Probabilities (1 + nodes, 9) of all tokens after each node, sharp or flat."
    logits = rng.normal(0, rng.choice([0.5, 3, 8]), (len(trie.tokens) + 1, 9))
    probs = np.exp(logits)
    return probs / probs.sum(axis=1, keepdims=True)


def tell(row, likeliest):
    "What is told of a distribution (9,): a prediction with NaN for all but the likeliest."
    told = np.argsort(-row)[:likeliest]
    values = np.full(9, np.nan)
    values[told] = np.log(row[told])
    rest = max(1 - row[told].sum(), 1e-300)
    each = min(row[told].min(), rest)
    return Prediction(CONTEXT, values, int(told[0]), 1.0, float(np.log(each)), float(np.log(rest)))


def read(trie, outcomes, rows, likeliest, whole=True, tolerance=0.0):
    "The reading of a step of which each row tells so many tokens."
    arrays = TrieArrays(trie, {token: token for token in range(9)}, outcomes)
    partial = SeenReading(arrays, ENDS, whole)
    wanted = np.array([0])
    while len(wanted):
        partial.take_predictions(wanted, [tell(rows[node], likeliest) for node in wanted])
        wanted = partial.wanted(tolerance)
    return partial


def true_amounts(trie, rows, outcomes):
    "The obvious twin: P(spelling and an end), token by token, summed by outcome."
    amounts = np.zeros(outcomes)
    for form in trie.forms:
        probability = rows[trie.position[form.ids] + 1, ENDS].sum()
        for i, token in enumerate(form.ids):
            probability *= rows[trie.position[form.ids[:i]] + 1, token]
        amounts[form.outcome] += probability
    return amounts


def true_first_tokens(trie, rows, outcomes):
    "The largest P(spelling) of each outcome; the trie holds first tokens only."
    amounts = np.zeros(outcomes)
    for form in trie.forms:
        probability = 1.0
        for i, token in enumerate(form.ids):
            probability *= rows[trie.position[form.ids[:i]] + 1, token]
        amounts[form.outcome] = max(amounts[form.outcome], probability)
    return amounts


def assert_true_is_within(totals, true):
    assert (totals.found <= true + 1e-12).all()
    assert (true <= totals.found + totals.most + 1e-12).all()
    assert (true.sum() - true <= totals.found.sum() - totals.found + totals.others + 1e-12).all()
    assert totals.found.sum() <= true.sum() + 1e-12
    assert true.sum() <= totals.found.sum() + totals.unread + 1e-12
    if totals.found.any():
        low, high = totals.ends().T
        share = true / true.sum()
        assert (low <= share + 1e-12).all() and (share <= high + 1e-12).all()


@pytest.mark.parametrize("seed", range(150))
def test_the_truth_lies_within_the_ends(seed):
    rng = np.random.default_rng(seed)
    trie, outcomes = random_trie(rng)
    rows = random_rows(rng, trie)
    true = true_amounts(trie, rows, outcomes)
    for tolerance in (0.0, 1e-3, 0.1):
        partial = read(trie, outcomes, rows, rng.integers(1, 9), tolerance=tolerance)
        assert_true_is_within(seen_totals(partial), true)
    everything = seen_totals(read(trie, outcomes, rows, 9))
    np.testing.assert_allclose(everything.found, true, rtol=1e-9)
    assert everything.unread < 1e-12


@pytest.mark.parametrize("seed", range(150))
def test_the_truth_lies_within_the_ends_of_first_tokens(seed):
    rng = np.random.default_rng(seed)
    lead = seed % 2
    trie, outcomes = random_trie(rng, lead)
    cut = FormTrie([Form(form.outcome, form.ids[: lead + 1], lead) for form in trie.forms])
    rows = random_rows(rng, cut)
    partial = read(cut, outcomes, rows, rng.integers(1, 9), whole=False)
    totals, mass = first_token_totals(partial, cut)
    assert_true_is_within(replace(totals, unread=np.inf), true_first_tokens(cut, rows, outcomes))
    if not lead:
        beginnings = rows[0, sorted({form.ids[0] for form in cut.forms})].sum()
        assert mass <= beginnings + 1e-12 and beginnings <= mass + totals.unread + 1e-12
        assert not totals.most[totals.found > 0].any()  # one first token was told: it is certain


def filled(partial, outcome, of_others):
    """The most that tokens not told can have together, given out one by one.

    Of those that lead to the outcome, or of those that lead to any other.
    """
    trie = partial.trie
    pairs = pd.Series(trie.pair_outcome).groupby(trie.pair_node).agg(set)
    total = 0.0
    for node in np.flatnonzero(partial.read):
        children = [n for n in np.flatnonzero(partial.untold) if trie.parents[n] == node]
        tokens = [pairs[child] for child in children]
        tokens += [{trie.ends[node]}] * partial.untold_ends[node]
        left = np.exp(partial.rest[node])
        for leads_to in tokens:
            if leads_to != {outcome} if of_others else outcome in leads_to:
                given = min(np.exp(partial.each[node]), left)
                left -= given
                total += given * np.exp(partial.reach[node])
    return total


@pytest.mark.parametrize("seed", range(40))
def test_no_narrower_ends_are_right(seed):
    "Each end is what comes out for some probabilities that agree with all that was told."
    rng = np.random.default_rng(seed)
    trie, outcomes = random_trie(rng)
    rows = random_rows(rng, trie)
    partial = read(trie, outcomes, rows, rng.integers(2, 7))
    totals = seen_totals(partial)
    found = totals.found.sum()
    if not found:
        return

    for outcome in range(outcomes):
        mine = filled(partial, outcome, of_others=False)
        others = filled(partial, outcome, of_others=True)
        highest = (totals.found[outcome] + mine) / (found + mine)
        lowest = totals.found[outcome] / (found + others)
        np.testing.assert_allclose(totals.ends()[outcome], [lowest, highest], atol=1e-12)


# ---------------------------------------------------------------- on the embedded model

TASKS = {"goemotions": 0.01, "brighter-eng": 0.01, "convabuse": 0.3}  # bounded mass, at most


def probed(lm, task, **options):
    return probe_steps(lm, task, **{"shots": 0, "progress": False, **options})


def assert_within(seen, full):
    "Every value of the full reading lies within its ends."
    assert seen.items["output"].equals(full.items["output"])
    low, high = np.moveaxis(seen.bounds, 2, 0)
    assert (low <= full.probs + ROUNDING).all() and (full.probs <= high + ROUNDING).all()
    assert (seen.logprobs <= full.logprobs + 1e-4).all()  # what was seen is the lower end
    assert (seen.steps["mass_low"] == seen.steps["mass"]).all()
    for name, share in {
        "mass": full.steps["mass"],
        "p_go": full.frame()["p_go"][:: len(low.T)],
    }.items():
        share = share.to_numpy()
        known = ~np.isnan(share)
        assert (seen.steps[f"{name}_low"][known] <= share[known] + ROUNDING).all(), name
        assert (share[known] <= seen.steps[f"{name}_high"][known] + ROUNDING).all(), name
        assert seen.steps[f"{name}_low"].notna().equals(pd.Series(known)), name


@pytest.mark.parametrize("name", TASKS)
def test_every_true_value_lies_within_its_bounds(tuned_lm, name):
    task = load_task(name).sample(64, seed=0)
    full = probed(tuned_lm, task, tolerance=0)
    seen = probed(LikeliestOnly(tuned_lm, 20), task)
    assert_within(seen, full)
    shares = summarise(seen).loc[["bounded mass", "share of unseen steps"], "value"]
    assert np.isclose(shares["bounded mass"], seen.bounded_mass.mean())
    assert 0 < shares["bounded mass"] < TASKS[name]

    low, high = score_ends(seen, "max_over_generations")
    scores = max_over_generations(full)
    assert (low <= scores + ROUNDING).all(axis=None) and (scores <= high + ROUNDING).all(axis=None)
    assert f"{seen.bounded_mass.mean():.2%} of the probability" in repr(seen)


CASES = [
    ("exact", "comma", 20, 1e-4),
    ("exact", "polysyndeton", 5, 0),
    ("first_token", "json", 5, 0),
    ("first_token", "polysyndeton", 3, 0),
    ("exact", "json", 1, 1e-2),
]


@pytest.mark.parametrize("reading, fmt, likeliest, tolerance", CASES)
def test_readings_formats_and_fewer_tokens(tuned_lm, reading, fmt, likeliest, tolerance):
    task = load_task("goemotions").sample(2, seed=2)
    how = dict(fmt=fmt, reading=reading)
    full = probed(tuned_lm, task, tolerance=0, **how)
    seen = probed(LikeliestOnly(tuned_lm, likeliest), task, tolerance=tolerance, **how)
    low, high = np.moveaxis(seen.bounds, 2, 0)
    assert (low <= full.probs + ROUNDING).all() and (full.probs <= high + ROUNDING).all()
    assert (seen.unseen == np.isnan(seen.probs).all(axis=1)).all()
    nothing = seen.bounds[seen.unseen]
    assert (nothing[..., 0] == 0).all() and (nothing[..., 1] == 1).all()


def test_branches_that_were_not_seen_are_not_asked_about(tuned_lm):
    task = load_task("goemotions").sample(2, seed=2)
    few = LikeliestOnly(tuned_lm, 20)
    asked = []
    read_next = few.read_next
    few.read_next = lambda rows, watch: asked.append(len(rows)) or read_next(rows, watch)
    seen = probed(few, task)
    steps = len(seen.steps)
    tokens = seen.steps["generated_tokens"].groupby(seen.steps["example"]).max().sum()
    assert sum(asked) < 12 * steps + 3 * tokens


# ---------------------------------------------------------------- where nothing was seen


@pytest.fixture(scope="module")
def partly_seen(base_lm):
    "The base model writes no list without examples: of some texts nothing was seen."
    task = load_task("goemotions").sample(12, seed=0)
    trace = probed(LikeliestOnly(base_lm, 2), task)
    unseen = set(trace.steps.loc[trace.unseen, "example"])
    assert 0 < len(unseen) < len(trace), len(unseen)
    return task, trace, unseen


def test_methods_and_statistics_say_how_many(partly_seen, tmp_path):
    task, trace, unseen = partly_seen
    assert f"{trace.unseen.sum()} steps unseen" in repr(trace)
    scores = max_over_generations(trace)
    lost = set(scores.index[scores.isna().any(axis=1)])
    assert lost and lost <= unseen
    assert scores.attrs["unseen_texts"] == len(lost)
    assert scores.attrs["bounded_mass"] == pytest.approx(trace.bounded_mass.mean())
    assert mean_marginals([scores, scores]).attrs["unseen_texts"] == len(lost)
    assert not hard(trace).attrs and np.isnan(compare_to_none(trace)).any(axis=None)

    report = align_report({"max": scores, "hard": hard(trace)}, task)
    assert report.query("method == 'max'")["n"].max() == len(trace) - len(lost)
    assert f"Left out: {len(lost)} with a label" in report.note
    with pytest.warns(UserWarning, match=f"{len(unseen)} of 12 texts are left out"):
        table = phenomenon_table(trace, task).set_index(["statistic", "quantity"])
    assert table.loc[("bounded", "share of unseen steps"), "value"] == trace.unseen.mean()
    assert table.loc["spikiness", "n"].max() == len(trace) - len(unseen)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(reading_check(trace, task).evidence)
        assert f"at {trace.unseen.sum()} of {len(trace.steps)} steps" in summary_sentence(trace)
        page = write_report({"base": trace}, tmp_path / "report", {"base": task})
    html = page.read_text(encoding="utf-8")
    assert ">?<" in html and "nothing seen" in html
    assert not re.search(r"\bnan\b", re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL))


def test_every_method_of_a_trace_takes_it(partly_seen):
    task, trace, unseen = partly_seen
    names = [
        "compare_to_none",
        "max_over_generations_calibrated",
        "compare_to_none_calibrated",
        "written_probability",
        "path_product",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = zero_shot(None, task, names, trace=trace)
    for name, table in found.items():
        assert table.attrs["bounded_mass"] > 0, name
        assert table.drop(index=list(unseen)).notna().any(axis=None), name


# ---------------------------------------------------------------- what is kept, what is refused


def test_a_trace_keeps_both_ends(partly_seen, tmp_path):
    _, trace, _ = partly_seen
    again = Trace.load(trace.save(tmp_path))
    assert again.bounds.tobytes() == trace.bounds.tobytes()
    assert again.logprobs.tobytes() == trace.logprobs.tobytes()
    assert (again.unseen == trace.unseen).all() and again.likeliest == 2
    assert again.frame().equals(trace.frame()) and repr(again) == repr(trace)


def test_a_run_goes_on_with_as_many_tokens_only(tuned_lm, tmp_path):
    task = load_task("goemotions").sample(2, seed=0)
    first = probed(LikeliestOnly(tuned_lm, 20), task, folder=tmp_path / "run")
    again = probed(LikeliestOnly(tuned_lm, 20), task, folder=tmp_path / "run")
    assert again.bounds.tobytes() == first.bounds.tobytes()
    with pytest.raises(SettingsChanged, match="likeliest was 20, now 10"):
        probed(LikeliestOnly(tuned_lm, 10), task, folder=tmp_path / "run")


def test_what_needs_other_tokens_is_refused(tuned_lm):
    task = load_task("goemotions").sample(2, seed=0)
    few = LikeliestOnly(tuned_lm, 20)
    with pytest.raises(NotOffered, match="only the 20 likeliest"):
        probed(few, task, decoding="guided")
    for method in ("unary_breakdown", "binary_breakdown", "marginals"):
        with pytest.raises(NotOffered, match="only the 20 likeliest"):
            zero_shot(few, task, [method], shots=0, progress=False)
    single = LabelSet(["joy", "fear"], none=None)
    with pytest.raises(ValueError, match="single-label|several labels"):
        trace = probed(few, ["I won!"], labels=single)
        score_ends(trace, "max_over_generations")
