"""Methods without labels, from tables and recorded trees: slow twins, worked cases, refusals."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from mlc_notebooks.alignment import (
    METHODS,
    RecordedTrees,
    alpha_losses,
    ask_orders,
    ask_prompts,
    average_prompts,
    check_methods,
    count_tokens,
    cross_prompt_slope,
    cyclic_orders,
    em_shares,
    expected_length,
    foretelling_loss,
    inclusion_bounds,
    join_path_and_tree,
    marginals_stop_calibrated,
    methods_for,
    path_marginals,
    record_trees,
    shift_to_length,
    shrink,
    stop_calibrate,
    stop_shift,
    take_back,
    temper,
    tree_marginals,
    trees_frame,
    trees_from_frame,
    zero_shot,
)
from mlc_notebooks.data import LabelSet, load_task, unannotated
from mlc_notebooks.probing import probe_steps

LABELS = ("joy", "fear", "anger")
SEEDS = st.integers(0, 2**32 - 1)


def tables_of(seed, prompts=3, texts=7, spread=3.0):
    "Made-up marginals of several prompts."
    rng = np.random.default_rng(seed)
    values = expit(rng.normal(-1, spread, size=(prompts, texts, len(LABELS))))
    return [pd.DataFrame(table, columns=list(LABELS)) for table in values]


# --- recorded trees ------------------------------------------------------------------------------


def whole_tree(seed, texts=2):
    "Every prefix of made-up trees over the three labels."
    rng = np.random.default_rng(seed)
    rows = []
    for text in range(texts):
        at = {}
        for size in range(len(LABELS)):
            for prefix in permutations(range(len(LABELS)), size):
                following = rng.dirichlet(np.ones(4))
                if prefix:
                    following[[*prefix, 3]] = 0
                    following /= following.sum()
                go = rng.uniform(0.05, 0.95, 3) * (size + 1 < len(LABELS))
                at[prefix] = len(rows)
                parent = at[prefix[:-1]] if prefix else -1
                rows.append((text, parent, prefix[-1] if prefix else -1, following, go))
    text, parent, last, following, go = map(np.array, zip(*rows))
    ids = tuple(f"t{i}" for i in range(texts))
    return RecordedTrees(ids, LABELS, text, parent, last, following, go)


def by_enumeration(trees, shift):
    "Marginals (n, L): every list that could be written, one after the other."
    found = np.zeros((len(trees), len(LABELS)))
    for text in range(len(trees)):
        (start,) = np.flatnonzero((trees.text == text) & (trees.parent == -1))
        waiting = [(start, 1.0, ())]
        while waiting:
            row, p, written = waiting.pop()
            for label in set(range(len(LABELS))) - set(written):
                here = p * trees.following[row, label]
                go = trees.go[row, label]
                go = go and expit(logit(go) + shift)
                found[text, [*written, label]] += here * (1 - go)  # the list ends
                below = np.flatnonzero((trees.parent == row) & (trees.last == label))
                for deeper in below:
                    waiting.append((deeper, here * go, (*written, label)))
    return found


@settings(max_examples=25)
@given(SEEDS, st.floats(-5, 5))
def test_marginals_of_a_whole_tree_are_those_of_all_lists(seed, shift):
    trees = whole_tree(seed)
    found = tree_marginals(trees, shift)
    np.testing.assert_allclose(found, by_enumeration(trees, shift), atol=1e-9)
    assert found.attrs["missing"] == pytest.approx(0, abs=1e-12)


@settings(max_examples=25)
@given(SEEDS)
def test_longer_lists_the_more_readily_the_model_goes_on(seed):
    trees = whole_tree(seed)
    lengths = [expected_length(trees, shift) for shift in (-4, -1, 0, 1, 4)]
    assert lengths == sorted(lengths)


@settings(max_examples=25)
@given(SEEDS, st.floats(-2, 2))
def test_trees_come_back_from_their_table(seed, shift):
    trees = whole_tree(seed)
    again = trees_from_frame(trees_frame(trees))
    assert again.labels == trees.labels
    pd.testing.assert_frame_equal(tree_marginals(again, shift), tree_marginals(trees, shift))


def test_recorded_trees_survive_parquet(tmp_path):
    trees = whole_tree(0)
    trees_frame(trees).to_parquet(tmp_path / "trees.parquet")
    again = trees_from_frame(pd.read_parquet(tmp_path / "trees.parquet"))
    pd.testing.assert_frame_equal(tree_marginals(again, 1.0), tree_marginals(trees, 1.0))


def test_what_was_recorded_gives_what_was_searched(tuned_lm, tmp_path):
    task = load_task("brighter-eng").sample(3, seed=1)
    how = dict(shots=2, most_looks=5, progress=False)
    trees = record_trees(tuned_lm, task, folder=tmp_path / "kept", **how)
    bounds = inclusion_bounds(tuned_lm, task, **how)
    np.testing.assert_allclose(tree_marginals(trees), bounds.estimate, atol=1e-5)
    assert tree_marginals(trees).attrs["missing"] == pytest.approx(bounds.missing.mean(), abs=1e-5)
    again = record_trees(tuned_lm, task, folder=tmp_path / "kept", **how)
    pd.testing.assert_frame_equal(tree_marginals(again, 2.0), tree_marginals(trees, 2.0))


# --- stop calibration ----------------------------------------------------------------------------


@settings(max_examples=15)
@given(SEEDS, SEEDS)
def test_lists_are_equally_long_after_the_shift(first, second):
    few, many = whole_tree(first), whole_tree(second)
    shift = stop_shift(few, many)
    apart = expected_length(few, shift) - expected_length(many, -shift)
    if abs(shift) < 12:
        assert apart == pytest.approx(0, abs=1e-4)
    else:
        assert np.sign(apart) == -np.sign(shift)
    assert stop_shift(many, few) == pytest.approx(-shift, abs=1e-4)
    assert stop_shift(few, few) == pytest.approx(0, abs=1e-5)


def test_stop_calibration_agrees_with_a_search_over_all_lists():
    few, many = whole_tree(3), whole_tree(4)

    def apart(shift):
        lengths = [by_enumeration(one, s).sum() for one, s in ((few, shift), (many, -shift))]
        return (lengths[0] - lengths[1]) ** 2

    shift = minimize_scalar(apart, bounds=(-12, 12), method="bounded").x
    assert stop_shift(few, many) == pytest.approx(shift, abs=1e-2)
    mean = (by_enumeration(few, shift) + by_enumeration(many, -shift)) / 2
    np.testing.assert_allclose(stop_calibrate(few, many), mean, atol=1e-2)


def test_a_length_out_of_reach_is_approached():
    trees = whole_tree(5)
    assert shift_to_length(trees, 0) == -12 and shift_to_length(trees, 3) == 12
    middle = shift_to_length(trees, expected_length(trees, 0.5))
    assert middle == pytest.approx(0.5, abs=1e-4)


def test_one_label_has_no_stop_to_shift():
    one = RecordedTrees(
        ("a",),
        ("joy",),
        np.zeros(1, int),
        np.array([-1]),
        np.array([-1]),
        np.array([[0.3, 0.7]]),
        np.zeros((1, 1)),
    )
    surer = replace(one, following=np.array([[0.9, 0.1]]))
    assert stop_shift(one, surer) == 0
    assert stop_calibrate(one, surer).iloc[0, 0] == pytest.approx(0.6)


# --- shrunken batch calibration ------------------------------------------------------------------


def taken_by_loops(table, alpha):
    "The formula, number by number."
    means = [sum(table[label]) / len(table) for label in table]
    pi = sum(means) / len(means)
    taken = table.copy()
    for label, mean in zip(table, means):
        for item in table.index:
            excess = np.log(mean / (1 - mean)) - np.log(pi / (1 - pi))
            p = table.at[item, label]
            odds = np.exp(np.log(p / (1 - p)) - alpha * excess)
            taken.at[item, label] = odds / (1 + odds)
    return taken


@settings(max_examples=25)
@given(SEEDS, st.floats(0, 1.5))
def test_means_are_taken_back_by_the_formula(seed, alpha):
    (table,) = tables_of(seed, prompts=1, spread=1.5)
    pd.testing.assert_frame_equal(take_back(table, alpha), taken_by_loops(table, alpha))


@settings(max_examples=25)
@given(SEEDS, st.floats(0, 1))
def test_texts_keep_their_order_within_a_label(seed, alpha):
    (table,) = tables_of(seed, prompts=1)
    ranks = take_back(table, alpha).rank(method="min")
    pd.testing.assert_frame_equal(ranks, table.rank(method="min"))


@settings(max_examples=6)
@given(SEEDS)
def test_shrinking_never_foretells_worse_than_doing_nothing(seed):
    tables = tables_of(seed, spread=1.0)
    losses = alpha_losses(tables)
    assert losses.min() <= losses[0]
    assert (losses.diff().diff().dropna() > -1e-9).all()  # convex
    assert shrink(tables)[0].attrs["alpha"] == losses.idxmin()
    turned = [table[["anger", "joy", "fear"]] for table in tables]
    pd.testing.assert_frame_equal(shrink(turned)[1][list(LABELS)], shrink(tables)[1])


def test_the_loss_is_that_of_drawn_lists():
    one, other = tables_of(0, prompts=2, spread=1.0)
    rng = np.random.default_rng(0)
    drawn = rng.uniform(size=(20_000, *other.shape)) < other.to_numpy()
    p = one.to_numpy()
    expected = -np.where(drawn, np.log(p), np.log(1 - p)).sum(axis=2).mean()
    found = foretelling_loss([one, other], [other, other])  # the pair (one, other), and (other, .)
    own = -(other * np.log(other) + (1 - other) * np.log(1 - other)).sum(axis=1).mean()
    assert 2 * found - own == pytest.approx(expected, abs=0.02)


def share_loss(p, expected):
    "Minus the log-likelihood of a share, of posteriors under the expected one."

    def loss(share):
        odds = p / expected * share + (1 - p) / (1 - expected) * (1 - share)
        return -np.log(odds).sum()

    return loss


@settings(max_examples=8)
@given(SEEDS)
def test_em_finds_the_likeliest_shares(seed):
    (table,) = tables_of(seed, prompts=1, texts=30, spread=1.5)
    prior = pd.Series([0.3, 0.5, 0.2], LABELS)
    found = em_shares(table, prior, tolerance=1e-8, rounds=20_000)
    for label in LABELS:
        loss = share_loss(table[label].to_numpy(), prior[label])
        best = minimize_scalar(loss, bounds=(1e-9, 1 - 1e-9), method="bounded").fun
        assert loss(np.clip(found[label], 1e-9, 1 - 1e-9)) == pytest.approx(best, abs=1e-4)


def test_em_says_nothing_when_begun_at_the_models_own_means():
    (table,) = tables_of(1, prompts=1)
    pd.testing.assert_series_equal(em_shares(table, table.mean()), table.mean())
    with pytest.raises(ValueError, match="EM gives their own means back"):
        take_back(table, 1.0, pi="em")
    half = pd.Series(0.5, LABELS)
    moved = take_back(table, 1.0, pi="em", prior=half)
    expected = take_back(table, 1.0, pi=em_shares(table, half).clip(1e-6, 1 - 1e-6))
    pd.testing.assert_frame_equal(moved, expected)


def test_marginals_of_0_and_1_and_labels_that_are_never_written():
    table = pd.DataFrame({"joy": [0.0, 1.0], "fear": [0.0, 0.0]}, ["a", "b"])
    for eps in (1e-6, 1e-3):
        (taken,) = shrink([table], alpha=1.0, eps=eps)
        assert np.isfinite(taken).all(axis=None) and taken.gt(0).all(axis=None)
        assert taken["fear"].nunique() == 1
        tempered = temper([table], slope=0.5, eps=eps)[0]
        assert tempered.loc["b", "joy"] == pytest.approx(expit(0.5 * logit(1 - eps)))
    slope = cross_prompt_slope([table, 1 - table])
    assert slope == pytest.approx(0, abs=1e-4)  # the opposite of what the other says
    assert shrink([table, 1 - table])[0].attrs["alpha"] >= 0


def test_one_text_is_compared_as_far_as_it_goes():
    tables = [table.iloc[:1] for table in tables_of(2, prompts=2)]
    for table in (*shrink(tables), *temper(tables)):
        assert table.shape == (1, 3) and np.isfinite(table).all(axis=None)


@pytest.mark.parametrize("method", [shrink, temper])
def test_one_prompt_is_refused_with_the_way_out(method):
    (table,) = tables_of(0, prompts=1)
    for given_tables in (table, [table]):
        with pytest.raises(ValueError, match=r"there are 1: give a list of tables, one per prompt"):
            method(given_tables)
    with pytest.raises(ValueError, match="table 1 has other items"):
        method([table, table.iloc[1:]])
    with pytest.raises(ValueError, match="no column 'anger'"):
        method([table, table[["joy", "fear"]]])


# --- cross-prompt temperature --------------------------------------------------------------------


@settings(max_examples=15)
@given(SEEDS)
def test_the_slope_is_that_of_a_logistic_regression(seed):
    tables = tables_of(seed, spread=1.5)
    pairs = list(permutations([logit(table.to_numpy()).ravel() for table in tables], 2))
    scores = np.concatenate([one for one, _ in pairs])[:, None]
    targets = expit(np.concatenate([other for _, other in pairs]))
    model = LogisticRegression(C=1e10, fit_intercept=False, tol=1e-10, max_iter=1000)
    answers = np.repeat([1, 0], len(targets))
    model.fit(np.vstack([scores, scores]), answers, np.concatenate([targets, 1 - targets]))
    expected = max(0.0, model.coef_[0, 0])
    slope = cross_prompt_slope(tables)
    assert slope == pytest.approx(expected, abs=2e-3)
    for table, tempered in zip(tables, temper(tables)):
        np.testing.assert_allclose(logit(tempered), slope * logit(table), atol=1e-6)


# --- written or tree -----------------------------------------------------------------------------


def test_the_path_of_a_real_answer_is_followed_in_its_tree(tuned_lm):
    task = load_task("brighter-eng").sample(4, seed=2)
    trace = probe_steps(tuned_lm, task, 0, decoding="guided", tolerance=0, progress=False)
    trees = record_trees(tuned_lm, task, shots=0, progress=False)
    path = path_marginals(trace)
    for text, item in enumerate(task.ids):
        (row,) = np.flatnonzero((trees.text == text) & (trees.parent < 0))
        along = trees.following[row, :-1].copy()
        written = [name for name in trace.items.loc[item, "outcomes"] if name in task.labels]
        for name in written[:-1]:
            label = trees.labels.index(name)
            p_go = trees.go[row, label]
            (row,) = np.flatnonzero((trees.parent == row) & (trees.last == label))
            along += p_go * trees.following[row, :-1]
        np.testing.assert_allclose(path.loc[item], along.clip(max=1), atol=1e-3)


@settings(max_examples=25)
@given(SEEDS)
def test_each_number_comes_from_where_it_is_known(seed):
    tree, path = tables_of(seed, prompts=2)
    rng = np.random.default_rng(seed)
    written = pd.DataFrame(rng.integers(0, 2, tree.shape), tree.index, tree.columns)
    joined = join_path_and_tree(written, path.sample(frac=1, random_state=1), tree)
    for item in tree.index:
        for label in LABELS:
            source = path if written.at[item, label] else tree
            assert joined.at[item, label] == source.at[item, label]


# --- cyclic orders -------------------------------------------------------------------------------


@given(st.integers(1, 12))
def test_over_all_turns_each_label_stands_at_each_place_once(size):
    labels = [f"l{i}" for i in range(size)]
    turns = np.array(cyclic_orders(labels))
    for place in turns.T:
        assert sorted(place) == sorted(labels)
    for orders in range(1, size + 1):
        some = cyclic_orders(labels, orders)
        assert len({tuple(turn) for turn in some}) == orders and some[0] == labels


def test_one_order_is_the_method_itself(tuned_lm):
    task = load_task("brighter-eng").sample(3, seed=0)
    ask = dict(shots=0, progress=False)
    name = "max_over_generations"
    (table,) = ask_orders(tuned_lm, task, name, orders=1, **ask)
    pd.testing.assert_frame_equal(table, zero_shot(tuned_lm, task, [name], **ask)[name])
    both = ask_prompts(tuned_lm, task, name, (0, 1), **ask)
    mean = average_prompts(tuned_lm, task, name, (0, 1), **ask)
    np.testing.assert_allclose(mean, (both[0] + both[1]) / 2)


# --- as methods ----------------------------------------------------------------------------------

NEW = (
    "marginals_stop_calibrated",
    "marginals_shrunken",
    "written_or_tree",
    "marginals_tempered",
    "marginals_order_averaged",
    "marginals_and_path",
    "marginals_and_path_shrunken",
)


def test_methods_say_what_they_need_before_the_model_runs():
    task = unannotated(["a", "b"], LabelSet(list(LABELS)))
    assert set(NEW) <= set(METHODS)
    assert set(NEW) <= set(methods_for(task))
    assert set(NEW) - set(methods_for(task, shots=0)) == {"marginals_stop_calibrated"}
    assert "marginals_shrunken" not in methods_for(task.select([0]))
    with pytest.raises(ValueError, match="shots is 0: give at least 1"):
        zero_shot(None, task, ["marginals_stop_calibrated"], shots=0)
    with pytest.raises(ValueError, match="compares texts: give at least 2"):
        zero_shot(None, task.select([0]), ["marginals_shrunken"], shots=0)
    single = unannotated(["a", "b"], LabelSet(list(LABELS), none=None))
    for name in NEW:
        with pytest.raises(ValueError, match="for tasks with several labels"):
            check_methods([name], single)


def test_new_methods_on_the_model(tuned_lm, tmp_path):
    task = load_task("brighter-eng").sample(2, seed=0)
    names = [name for name in NEW if name != "marginals_stop_calibrated"]
    ask = dict(shots=0, progress=False)
    with count_tokens(tuned_lm) as count:
        found = zero_shot(tuned_lm, task, names, folder=tmp_path, **ask)
    assert count.tokens > 0
    for name, table in found.items():
        assert list(table.columns) == list(task.labels) and list(table.index) == list(task.ids)
        assert table.ge(0).all(axis=None) and table.le(1).all(axis=None), name
    again = zero_shot(tuned_lm, task, names, folder=tmp_path, **ask)
    for name in names:
        pd.testing.assert_frame_equal(again[name], found[name])


def test_stop_calibration_on_the_model(tuned_lm):
    task = load_task("brighter-eng").sample(2, seed=0)
    how = dict(shots=2, most_looks=4, progress=False)
    table = marginals_stop_calibrated(tuned_lm, task, **how)
    few, many = [record_trees(tuned_lm, task, multi_share=share, **how) for share in (0.0, 1.0)]
    np.testing.assert_allclose(table, stop_calibrate(few, many), atol=1e-4)
    with pytest.raises(ValueError, match="has no train split to draw examples from"):
        marginals_stop_calibrated(tuned_lm, replace(task, splits={}), shots=2)
