"""Zero-shot methods: hand-worked traces, slow twins, known faults of the published code."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize
from scipy.special import log_expit

from mlc_notebooks.alignment import (
    METHODS,
    OLD_NAMES,
    ask_pairs,
    ask_questions,
    average_prompts,
    binary_breakdown,
    bradley_terry,
    compare_to_none,
    hard,
    max_over_generations,
    mean_marginals,
    path_product,
    unary_breakdown,
    written_probability,
    zero_shot,
)
from mlc_notebooks.data import (
    AnnotatedTexts,
    LabelSet,
    binary_demonstrations,
    binary_prompts,
    load_task,
    unary_demonstrations,
)
from mlc_notebooks.metrics import compare_methods
from mlc_notebooks.probing import Trace, probe_steps

LABELS = LabelSet(["joy", "fear", "anger"])


def made_trace(*answers, labels=LABELS):
    "A trace from answers, each a list of (wrote, probabilities over the outcomes)."
    rows = [
        (f"t{i}", step, wrote, probs)
        for i, answer in enumerate(answers)
        for step, (wrote, probs) in enumerate(answer, 1)
    ]
    steps = pd.DataFrame(
        {
            "example": [r[0] for r in rows],
            "step": [r[1] for r in rows],
            "wrote": [r[2] for r in rows],
            "mass": 1.0,
            "go": 0.5,
            "stop": 0.5,
            "flags": [()] * len(rows),
            "prompt_tokens": 9,
            "generated_tokens": 3,
        }
    )
    items = pd.DataFrame(
        {
            "outcomes": [tuple(w for w, _ in answer if w in labels.outcomes) for answer in answers],
            "flags": [()] * len(answers),
        },
        pd.Index([f"t{i}" for i in range(len(answers))], name="id"),
    )
    return Trace(labels, items, steps, np.log([r[3] for r in rows]), {})


def test_hard_equals_max_over_generations_on_one_hot_steps():
    tiny = 1e-12
    trace = made_trace(
        [("joy", [1 - 3 * tiny, tiny, tiny, tiny]), ("anger", [tiny, tiny, 1 - 3 * tiny, tiny])],
        [("none", [tiny, tiny, tiny, 1 - 3 * tiny])],
    )
    np.testing.assert_allclose(hard(trace, eps=1e-8), max_over_generations(trace), atol=2e-8)


@pytest.mark.parametrize(
    "name", [name for name, method in METHODS.items() if method.needs == "trace"]
)
def test_no_label_none_and_broken_outputs_give_numbers(name):
    trace = made_trace(
        [(None, [0.4, 0.3, 0.2, 0.1])],
        [("none", [0.1, 0.1, 0.1, 0.7])],
        [("glee", [0.3, 0.3, 0.3, 0.1]), ("joy", [0.7, 0.1, 0.1, 0.1])],
    )
    trace.items["outcomes"] = [(), ("none",), ("joy",)]
    scores = METHODS[name].function(trace)
    assert scores.shape == (3, 3) and list(scores.columns) == list(LABELS)
    assert (
        np.isfinite(scores).all(axis=None)
        and (scores >= 0).all(axis=None)
        and (scores <= 1).all(axis=None)
    )


@pytest.mark.parametrize(
    "name", [name for name, method in METHODS.items() if method.needs == "trace"]
)
def test_label_permutation_is_followed(name):
    rng, turn = np.random.default_rng(0), [2, 0, 1]
    probs = rng.dirichlet(np.ones(4), size=3)
    one = made_trace([("joy", probs[0]), ("anger", probs[1])], [("none", probs[2])])
    other = made_trace(
        [("joy", probs[0][[*turn, 3]]), ("anger", probs[1][[*turn, 3]])],
        [("none", probs[2][[*turn, 3]])],
        labels=LabelSet([list(LABELS)[i] for i in turn]),
    )
    pd.testing.assert_frame_equal(
        METHODS[name].function(one), METHODS[name].function(other)[list(LABELS)]
    )


def test_a_generation_without_a_label_is_read_not_made_up():
    "Published: a uniform row. Here: the distribution of the forced first step."
    trace = made_trace([(None, [0.4, 0.3, 0.2, 0.1])])
    assert max_over_generations(trace).iloc[0].tolist() == pytest.approx([0.4, 0.3, 0.2])
    assert compare_to_none(trace).iloc[0].tolist() == pytest.approx([0.8, 0.75, 2 / 3])


def test_none_is_always_read(tuned_lm):
    "Published: a missing logit of `none` is set to 0. Here every step has its log-probability."
    trace = probe_steps(
        tuned_lm, load_task("brighter-eng").sample(4, seed=0), shots=0, progress=False
    )
    assert np.isfinite(trace.logprobs[:, -1]).all() and (trace.logprobs[:, -1] < 0).all()


def test_bradley_terry_is_deterministic_and_never_nan():
    """Published: starts from unseeded noise, and its loss can become NaN.

    Here certain wins too have finite strengths.
    """
    certain = np.triu(np.ones((1, 4, 4)), 1)
    first, second = bradley_terry(certain), bradley_terry(certain)
    assert np.isfinite(first).all() and (first == second).all() and (np.diff(first[0]) < 0).all()


def test_demonstrations_show_none():
    "Published: the multi-label sampler never shows `none`."
    pool = load_task("brighter-eng").pool
    assert any("none" in shown[1:3] for shown in unary_demonstrations(pool, 20, seed=0))
    assert any("none" in shown[1:3] for shown in binary_demonstrations(pool, 20, seed=0))


def wins_of(soft):
    return np.triu(soft, 1) + np.tril(1 - soft.transpose(0, 2, 1), -1)


@pytest.mark.parametrize("ridge", [0.01, 0.5])
def test_bradley_terry_against_bfgs(ridge):
    wins = wins_of(np.random.default_rng(1).uniform(0.02, 0.98, size=(6, 5, 5)))
    found = bradley_terry(wins, ridge)
    for item, strengths in zip(wins, found):

        def loss(t, item=item):
            return -(item * log_expit(t[:, None] - t[None])).sum() + ridge / 2 * (t**2).sum()

        np.testing.assert_allclose(strengths, minimize(loss, np.ones(5), tol=1e-12).x, atol=1e-5)
        assert abs(strengths.sum()) < 1e-8


def test_bradley_terry_without_ridge_against_choix():
    choix = pytest.importorskip("choix")
    wins = wins_of(np.random.default_rng(2).uniform(0.05, 0.95, size=(4, 6, 6)))
    for item, strengths in zip(wins, bradley_terry(wins, ridge=0)):
        np.testing.assert_allclose(strengths, choix.ilsr_pairwise_dense(item, alpha=0), atol=5e-8)


def test_bradley_terry_says_what_is_wrong():
    with pytest.raises(ArithmeticError, match="position 1: some outcomes always win"):
        bradley_terry(np.array([[[0, 0.5], [0.5, 0]], [[0, 1.0], [0, 0]]]), ridge=0)
    with pytest.raises(ValueError, match="item 0 has a win of nan, of outcome 0 over 1"):
        bradley_terry(np.array([[[0, np.nan], [0.5, 0]]]))


@pytest.fixture(scope="module")
def task():
    return load_task("brighter-eng").sample(5, seed=2)


@pytest.mark.parametrize("method", [unary_breakdown, binary_breakdown])
def test_cached_questions_equal_the_twin(tuned_lm, task, method):
    fast = method(tuned_lm, task, shots=2, progress=False)
    slow = method(tuned_lm, task.select(range(2)), shots=2, progress=False, no_cache=True)
    alone = method(tuned_lm, task.select(range(2)), shots=2, progress=False)
    np.testing.assert_allclose(slow, alone, atol=1e-4)
    assert fast.shape == (5, 5) and ((fast > 0) & (fast < 1)).all(axis=None)


def test_tokens_computed_are_the_distinct_nodes(tuned_lm, task):
    "Shared by all questions once, shared within a text once, never between texts."
    names = [(a, b) for a in task.labels.outcomes for b in task.labels.outcomes if a < b]
    prompts = [binary_prompts(text, names, (), task.label_noun) for text in task.texts]
    asked = ask_questions(tuned_lm, prompts, ("a", "b"), progress=False)
    rows = [[tuple(tuned_lm.encode_prompt(p)) for p in questions] for questions in prompts]
    every = [row for questions in rows for row in questions]
    shared = next(i for i in range(min(map(len, every))) if len({row[i] for row in every}) > 1)
    distinct = shared + sum(
        len({row[:k] for row in questions for k in range(shared + 1, len(row) + 1)})
        for questions in rows
    )
    assert asked.tokens == distinct
    assert asked.prompt_tokens == sum(map(len, every)) > 3 * distinct


def test_both_orders_cancel_a_preference_for_a_place(tuned_lm, task):
    "A model that always says `a` must not favour the outcomes listed first."
    from mlc_notebooks.alignment.pairs import _wins

    pairs = [(0, 1), (0, 2), (1, 2)]
    always_first = np.ones((1, 6))
    wins = _wins(always_first, pairs + [(b, a) for a, b in pairs], 3, soft=True)
    np.testing.assert_allclose(bradley_terry(wins), 0, atol=1e-12)
    one = binary_breakdown(
        tuned_lm, task.select(range(2)), shots=0, both_orders=True, progress=False
    )
    assert ((one > 0) & (one < 1)).all(axis=None)


def test_answers_must_begin_apart(tuned_lm):
    prompts = [binary_prompts("x", [("joy", "fear")])]
    with pytest.raises(ValueError, match="begin with the same token"):
        ask_questions(tuned_lm, prompts, ("yes", "yes please"), progress=False)


def test_single_label_rows_sum_to_one(tuned_lm):
    labels = LabelSet(["joy", "fear", "anger"], none=None)
    task = AnnotatedTexts(
        "one",
        ["a", "b"],
        ["I love it", "How dare you"],
        labels,
        [np.eye(3, dtype=int)[:1]] * 2,
        label_noun="emotions",
    )
    scores = zero_shot(tuned_lm, task, shots=0, progress=False)
    assert set(scores) == {
        "hard",
        "compare_to_none",
        "unary_breakdown",
        "yes_no_text_first",
        "yes_no_label_first",
        "binary_breakdown",
        "binary_breakdown_both_orders",
    }
    for table in scores.values():
        np.testing.assert_allclose(table.sum(axis=1), 1, atol=1e-6)
    with pytest.raises(ValueError, match="several labels"):
        zero_shot(tuned_lm, task, ["marginals"], shots=0)


def test_rivals_by_hand():
    trace = made_trace([("joy", [0.5, 0.25, 0.125, 0.125]), ("fear", [0.1, 0.7, 0.1, 0.1])])
    assert written_probability(trace).iloc[0].tolist() == pytest.approx([0.5, 0.7, 0])
    assert path_product(trace).iloc[0].tolist() == pytest.approx(
        [0.5, 0.5 * 0.5 * 0.7, 0]
    )  # p_go is one half


def test_answers_to_pairs_serve_one_order_and_both(tuned_lm, task):
    few = task.select(range(2))
    answers = ask_pairs(tuned_lm, few, shots=0, progress=False)
    for both in (False, True):
        asked_again = binary_breakdown(tuned_lm, few, shots=0, both_orders=both, progress=False)
        pd.testing.assert_frame_equal(
            binary_breakdown(tuned_lm, few, both_orders=both, answers=answers),
            asked_again,
            atol=1e-4,
        )


def test_mean_of_prompts_by_hand():
    first = pd.DataFrame([[0.2, 0.8]], ["a"], ["joy", "fear"])
    second = pd.DataFrame([[0.4, 0.6]], ["a"], ["fear", "joy"])  # labels in another order
    mean = mean_marginals([first, second])
    np.testing.assert_allclose(mean.to_numpy(), [[0.4, 0.6]])
    assert mean.attrs["variance"] == pytest.approx(
        (0.08 + 0.08) / 2
    )  # of (.2, .6) and of (.8, .4), n - 1
    assert mean_marginals([first]).attrs["variance"] == 0


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_registry_is_never_empty():
    "Whichever name of the room is taken first, all methods are there, the cheapest first."
    code = "from mlc_notebooks.alignment import METHODS; print(*METHODS)"
    names = run_python(code)
    assert names[:3] == ["hard", "compare_to_none", "max_over_generations"]
    assert "max_over_generations_averaged" in names and "annotators_in_context" in names
    assert len(names) == 25
    assert run_python("from mlc_notebooks.alignment import methods_for; " + code) == names
    others = run_python("from mlc_notebooks.alignment import depth_first; " + code)
    assert sorted(others) == sorted(names)


def test_names_are_identifiers_and_those_of_the_functions():
    for name, method in METHODS.items():
        assert name.isidentifier() and name == method.name == method.function.__name__


def test_old_names_are_understood_with_a_warning(tuned_lm, task):
    assert set(OLD_NAMES.values()) <= set(METHODS) and not set(OLD_NAMES) & set(METHODS)
    few, ask = task.select(range(2)), dict(shots=0, progress=False)
    new = "max_over_generations_calibrated"
    (old,) = [name for name in OLD_NAMES if OLD_NAMES[name] == new]
    with pytest.warns(FutureWarning, match=f"is now called {new!r}") as warned:
        found = zero_shot(tuned_lm, few, [old], **ask)
    assert list(found) == [new] and warned[0].filename == __file__
    pd.testing.assert_frame_equal(found[new], zero_shot(tuned_lm, few, [new], **ask)[new])
    with pytest.warns(FutureWarning, match=f"is now called {new!r}") as warned:
        mean = average_prompts(tuned_lm, few, old, seeds=[0], **ask)
    assert warned[0].filename == __file__
    pd.testing.assert_frame_equal(mean, found[new])


def test_averaging_prompts(tuned_lm, task):
    few = task.select(range(3))
    single = zero_shot(tuned_lm, few, ["max_over_generations"], shots=0, progress=False)[
        "max_over_generations"
    ]
    pd.testing.assert_frame_equal(
        average_prompts(tuned_lm, few, shots=0, seeds=[0], progress=False), single
    )
    each = [
        average_prompts(tuned_lm, few, shots=0, seeds=[seed], progress=False) for seed in (0, 1)
    ]
    both = average_prompts(tuned_lm, few, shots=0, seeds=[0, 1], progress=False)
    np.testing.assert_allclose(both, (each[0] + each[1]) / 2)
    assert both.attrs["variance"] > 0

    def loss(scores):
        return compare_methods(
            {"uniform": scores * 0 + 0.5, "scores": scores}, few, "uniform"
        ).set_index(["method", "metric"])["difference"]

    for metric in ("NLL", "L1", "Brier"):  # convex in p
        assert (
            loss(both)["scores", metric]
            <= np.mean([loss(one)["scores", metric] for one in each]) + 1e-9
        )
    with pytest.raises(ValueError, match="at least one"):
        average_prompts(tuned_lm, few, seeds=[])
