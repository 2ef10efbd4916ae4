"""Set decisions: brute force over all sets, trees enumerated by hand, decisions scored."""

from itertools import product

import numpy as np
import pandas as pd
import pytest

from mlc_notebooks.alignment import (
    RecordedTrees,
    best_candidate,
    best_expected_f1,
    best_f1_set,
    compare_decisions,
    decide_independent,
    decide_sets,
    inclusion_by_size,
    independent_inclusion,
    sets_of_trees,
    tree_marginals,
    written_sets,
)
from mlc_notebooks.data import AnnotatedTexts, LabelSet
from mlc_notebooks.metrics import example_f1, example_jaccard

LABELS = LabelSet(["joy", "fear", "anger"])


def every_set(labels):
    return np.array(list(product([False, True], repeat=labels)))


def set_score(found, gold, kind, empty):
    "F1 or Jaccard of two sets, by its definition."
    found, gold = set(np.flatnonzero(found)), set(np.flatnonzero(gold))
    if not found and not gold:
        return empty
    if kind == "f1":
        return 2 * len(found & gold) / (len(found) + len(gold))
    return len(found & gold) / len(found | gold)


def greatest_expectation(probabilities, labels, kind, empty=1.0):
    "The slow twin: every set against every set."
    every = every_set(labels)
    expected = []
    for found in every:
        scores = [set_score(found, gold, kind, empty) for gold in every]
        expected.append(probabilities @ np.array(scores))
    return max(expected), dict(zip(map(tuple, every.tolist()), expected))


@pytest.mark.parametrize("empty", [1.0, 0.0, 0.4])
@pytest.mark.parametrize("labels", [1, 2, 4])
def test_gfm_is_the_best_of_all_sets(labels, empty):
    rng = np.random.default_rng(labels)
    for concentration in (0.05, 0.3, 1) * 5:
        probabilities = rng.dirichlet(np.full(2**labels, concentration))
        inclusion = inclusion_by_size(every_set(labels), probabilities)
        chosen, expected = best_f1_set(*inclusion, empty)
        best, of_set = greatest_expectation(probabilities, labels, "f1", empty)
        assert expected == pytest.approx(best)
        assert of_set[tuple(chosen.tolist())] == pytest.approx(best)


def test_independent_labels_are_a_distribution_over_sets():
    rng = np.random.default_rng(0)
    every = every_set(4)
    for p in rng.uniform(size=(10, 4)):
        probabilities = np.where(every, p, 1 - p).prod(axis=1)
        fast, fast_empty = independent_inclusion(p)
        slow, slow_empty = inclusion_by_size(every, probabilities)
        np.testing.assert_allclose(fast, slow, atol=1e-12)
        assert fast_empty == pytest.approx(slow_empty)
        chosen = best_f1_set(fast, fast_empty)[0]
        assert chosen.tolist() == best_expected_f1(p)[0].astype(bool).tolist()


def test_minimum_bayes_risk_over_all_candidates_is_brute_force():
    rng = np.random.default_rng(1)
    every = every_set(4)
    for _ in range(15):
        probabilities = rng.dirichlet(np.full(16, 0.2))
        for kind, metric in (("f1", example_f1), ("jaccard", example_jaccard)):
            best, of_set = greatest_expectation(probabilities, 4, kind)
            chosen, expected = best_candidate(every, probabilities, metric, every)
            assert expected == pytest.approx(best)
            likely = probabilities > 0.01
            few, reached = best_candidate(every[likely], probabilities[likely], metric)
            assert reached <= best + 1e-12


def random_tree(rng, labels):
    "A whole tree of outputs: every prefix that does not hold all labels."
    prefixes = [()]
    for prefix in prefixes:
        if len(prefix) < labels - 1:
            prefixes += [(*prefix, label) for label in range(labels) if label not in prefix]
    parent = [prefixes.index(prefix[:-1]) if prefix else -1 for prefix in prefixes]
    last = [prefix[-1] if prefix else -1 for prefix in prefixes]
    following, go = [], []
    for prefix in prefixes:
        weights = rng.uniform(size=labels + 1)
        weights[list(prefix)] = 0
        weights[labels] *= not prefix
        following.append(weights / weights.sum())
        go.append(rng.uniform(size=labels) * (len(prefix) < labels - 1))
    arrays = [np.array(one) for one in (parent, last, following, go)]
    zeros = np.zeros(len(prefixes), int)
    return RecordedTrees(("a",), LABELS.names, zeros, *arrays), prefixes


def sets_by_hand(trees, prefixes):
    "P(set) by walking through all ordered lists."
    found = dict.fromkeys(map(tuple, every_set(3).tolist()), 0.0)

    def walk(prefix, reached):
        row = prefixes.index(prefix)
        if not prefix:
            found[False, False, False] += trees.following[row, 3]
        for label in set(range(3)) - set(prefix):
            here = reached * trees.following[row, label]
            written = tuple(i in (*prefix, label) for i in range(3))
            found[written] += here * (1 - trees.go[row, label])
            if len(prefix) < 2:
                walk((*prefix, label), here * trees.go[row, label])

    walk((), 1.0)
    return found


def test_the_sets_of_a_tree_are_all_its_lists():
    trees, prefixes = random_tree(np.random.default_rng(2), 3)
    sets = sets_of_trees(trees)
    by_hand = sets_by_hand(trees, prefixes)
    assert sets["probability"].sum() == pytest.approx(1)
    assert sum(by_hand.values()) == pytest.approx(1)
    for row in sets.itertuples():
        written = (bool(row.joy), bool(row.fear), bool(row.anger))
        assert row.probability == pytest.approx(by_hand[written])
    marginals = sets["probability"] @ sets[list(LABELS)]
    np.testing.assert_allclose(marginals, tree_marginals(trees).loc["a"], atol=1e-12)


def test_what_was_not_read_is_missing_and_decisions_are_among_the_rest():
    whole, prefixes = random_tree(np.random.default_rng(3), 3)
    start = np.array(prefixes.index(()))[None]
    arrays = [getattr(whole, name)[start] for name in ("parent", "last", "following", "go")]
    sets = sets_of_trees(RecordedTrees(("a",), LABELS.names, np.zeros(1, int), *arrays))
    onward = whole.following[0, :3] @ whole.go[0]
    assert sets["probability"].sum() == pytest.approx(1 - onward)
    assert (sets[list(LABELS)].sum(axis=1) <= 1).all()
    assert decide_sets(sets, LABELS, "likeliest").to_numpy().sum() <= 1


def test_decisions_of_several_texts_keep_their_order_and_their_rule():
    tables = [
        pd.DataFrame([[1, 0, 0], [0, 1, 1]], ["b", "a"], list(LABELS)),
        pd.DataFrame([[0, 1, 0], [0, 1, 1]], ["b", "a"], list(LABELS)),
        pd.DataFrame([[0, 1, 1], [0, 0, 0]], ["a", "b"], list(LABELS)),
    ]
    sets = written_sets(tables, LABELS)
    assert sets.groupby(level=0)["probability"].sum().to_numpy() == pytest.approx(1)
    for rule in ("threshold", "likeliest", "f1", "jaccard"):
        decided = decide_sets(sets, LABELS, rule)
        assert list(decided.index) == ["b", "a"]
        assert decided.loc["a"].tolist() == [0, 1, 1]
    assert decide_sets(sets, LABELS, "threshold").loc["b"].tolist() == [0, 0, 0]
    without_empty = decide_sets(sets, LABELS, "f1", empty=0)
    assert without_empty.loc["b"].tolist() == [1, 1, 0]


def test_independent_decisions_are_those_of_the_page_about_thresholds():
    rng = np.random.default_rng(4)
    p = pd.DataFrame(rng.uniform(size=(20, 3)), map(str, range(20)), list(LABELS))
    decided = decide_independent(p[["anger", "joy", "fear"]], LABELS)
    assert decided.to_numpy().tolist() == best_expected_f1(p.to_numpy()).tolist()
    with pytest.raises(ValueError, match="is no probability"):
        decide_independent(p * 2, LABELS)


def test_decisions_are_compared_by_item():
    votes = [np.array([[1, 0, 0]]), np.array([[1, 1, 0]]), np.array([[0, 0, 0]])]
    task = AnnotatedTexts("three", ["a", "b", "c"], ["x", "y", "z"], LABELS, votes)
    first = pd.DataFrame([[1, 0, 0], [1, 0, 0], [0, 0, 0]], list("abc"), list(LABELS))
    second = pd.DataFrame([[0, 0, 1], [1, 1, 0], [0, 0, 0]], list("bac"), list(LABELS))
    found = compare_decisions({"one": first, "two": second}, task, against="one")
    found = found.set_index(["rule", "metric"])
    assert found.loc[("one", "example-F1"), "value"] == pytest.approx((1 + 2 / 3 + 1) / 3)
    assert found.loc[("two", "example-F1"), "value"] == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert found.loc[("two", "Jaccard"), "difference"] == pytest.approx((-0.5 - 0.5 + 0) / 3)
    with pytest.raises(ValueError, match="choose one of one, two"):
        compare_decisions({"one": first, "two": second}, task, against="three")
    with pytest.raises(ValueError, match="give 0 or 1"):
        compare_decisions({"one": first * 0.5}, task, against="one")


def test_a_label_called_like_the_column_is_refused():
    labels = LabelSet(["probability", "fear"])
    table = pd.DataFrame([[1, 0]], ["a"], list(labels))
    with pytest.raises(ValueError, match="rename it"):
        written_sets([table], labels)
