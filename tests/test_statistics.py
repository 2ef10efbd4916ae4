"""Exact intervals of shares, items and prompts drawn together, Holm's correction: beside scipy,
slow twins and values worked out by hand."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mlc_notebooks.metrics import (
    bootstrap_crossed,
    bootstrap_mean,
    bootstrap_means,
    bootstrap_sets,
    bounded_mean,
    compare_family,
    crossed_mean,
    exact_ends,
    holm,
    mean_table,
    paired_difference,
    share_interval,
)

# Shares


@pytest.mark.parametrize("n", [1, 7, 40, 853])
@pytest.mark.parametrize("coverage", [0.5, 0.95, 0.999])
def test_share_interval_is_that_of_scipy(n, coverage):
    for hits in {0, 1, n // 3, n - 1, n}:
        low, high = stats.binomtest(hits, n).proportion_ci(coverage, method="exact")
        assert share_interval(hits, n, coverage) == pytest.approx((hits / n, low, high))


def test_share_interval_of_nothing_and_of_part_of_an_item():
    "Parts of an item lie between the two whole counts."
    assert np.isnan(share_interval(0, 0)).all()
    below, between, above = (share_interval(hits, 10)[1] for hits in (3, 3.5, 4))
    assert below < between < above


@pytest.mark.parametrize(
    "given, message",
    [((2, 1), "hits is 2"), ((-1, 3), "hits is -1"), ((1, -1), "n is -1"), ((1, 3, 2), "coverage")],
)
def test_share_interval_refuses(given, message):
    with pytest.raises(ValueError, match=message):
        share_interval(*given)


def test_booleans_are_shares_wherever_a_mean_is_taken():
    all_right = np.ones(30, bool)
    exact = share_interval(30, 30)
    assert exact[1] == pytest.approx(0.025 ** (1 / 30))
    assert bootstrap_mean(all_right) == bootstrap_mean(all_right.tolist()) == exact
    assert bootstrap_mean(pd.Series(all_right, dtype="boolean")) == exact
    table = bootstrap_means({"right": all_right, "wrong": ~all_right, "number": np.ones(30)})
    assert table["low"].tolist() == [exact[1], 0, 1]
    assert table["high"].tolist() == pytest.approx([1, 1 - exact[1], 1])


def test_a_difference_of_shares_is_no_share():
    "Two methods that are right on all texts differ by 0 and not by a share of 0 hits."
    right = pd.Series(True, range(30))
    assert paired_difference(right, right) == (0, 0, 0)
    assert paired_difference(right, ~right) == (1, 1, 1)


def test_values_between_0_and_1():
    assert bounded_mean([0.5, 1, 1]) == bootstrap_mean([0.5, 1, 1])
    assert bounded_mean([0, 1, 1.0]) == share_interval(2, 3)
    assert bounded_mean([1 + 1e-12, 0.5]) == bootstrap_mean([1 + 1e-12, 0.5])
    with pytest.raises(ValueError, match="holds -0.5 at position 1: give 0 to 1"):
        bounded_mean([0, -0.5])
    low, high = exact_ends(np.array([[1, 0.5], [1, 1]]), [1, 0.5], [1, 1])
    np.testing.assert_allclose(low, [share_interval(2, 2)[1], 0.5])
    np.testing.assert_array_equal(high, [1, 1])


def test_set_metrics_of_perfect_answers():
    "Twenty texts, all right: example-F1 and Jaccard are shares, the pooled metrics are not."
    sets = np.tile([[1, 0]], (20, 1))
    table = bootstrap_sets(sets, sets).set_index("metric")
    low = share_interval(20, 20)[1]
    assert table.loc["example-F1", ["low", "high"]].tolist() == [low, 1]
    assert table.loc["Jaccard", ["low", "high"]].tolist() == [low, 1]
    assert table.loc["micro-F1", "low"] == 1


def korn_graubard(frame):
    "The share and its interval, item by item, as in Korn and Graubard (1998), without t quantiles."
    rows = len(frame)
    share = sum(frame["x"]) / rows
    variance = 0
    for _, of_item in frame.groupby("example"):
        variance += (sum(of_item["x"]) - share * len(of_item)) ** 2 / rows**2
    effective = min(rows, share * (1 - share) / variance)
    hits = share * effective
    low = stats.beta.ppf(0.025, hits, effective - hits + 1)
    high = stats.beta.ppf(0.975, hits + 1, effective - hits)
    return share, low, high


@pytest.mark.parametrize("seed", range(4))
def test_a_share_over_rows_is_its_slow_twin(seed):
    rng = np.random.default_rng(seed)
    level = rng.beta(2, 1, 25)
    items = np.repeat(range(25), rng.integers(1, 5, 25))
    frame = pd.DataFrame({"example": items, "x": (rng.random(len(items)) < level[items])})
    found = mean_table(frame, ["x"]).loc[0, ["value", "low", "high"]].astype(float)
    assert found.tolist() == pytest.approx(korn_graubard(frame))
    numbers = frame.astype({"x": float})
    same = mean_table(numbers, ["x"], shares=["x"]).loc[0, ["value", "low", "high"]]
    assert same.astype(float).tolist() == found.tolist()


def test_a_share_with_one_row_per_item_is_binomial():
    frame = pd.DataFrame({"example": range(9), "x": [1, 0, 1, 1, np.nan, 1, 1, 0, 1]})
    frame["x"] = frame["x"].astype("boolean")
    row = mean_table(frame, ["x"]).loc[0]
    assert row[["value", "low", "high"]].astype(float).tolist() == pytest.approx(
        share_interval(6, 8)
    )
    assert row[["n", "rows"]].tolist() == [8, 8]


def test_a_share_of_rows_that_all_agree_counts_texts():
    frame = pd.DataFrame({"example": np.repeat(range(10), 4), "x": True})
    row = mean_table(frame, ["x"]).loc[0]
    assert row[["value", "low", "high"]].astype(float).tolist() == pytest.approx(
        share_interval(10, 10)
    )
    assert row[["n", "rows"]].tolist() == [10, 40]


def test_a_column_of_numbers_is_no_share():
    "Numbers of labels that happen to be 0 and 1; and a column of shares with other values."
    frame = pd.DataFrame({"example": range(20), "labels": 1, "f1": [0.5, *[1.0] * 19]})
    table = mean_table(frame, ["labels", "f1"], shares=["f1"])
    assert table.loc[0, ["low", "high"]].tolist() == [1, 1]
    expected = mean_table(frame, ["f1"])
    assert table.loc[1, "low"] == expected.loc[0, "low"]
    with pytest.raises(ValueError, match="a column of shares is 'x'"):
        mean_table(frame, ["labels"], shares=["x"])


# Items and prompts


def slow_crossed(cells, resamples, seed):
    "Cell by cell, with the same draws."
    rng = np.random.default_rng(seed)
    n, prompts = len(cells), len(cells[0])
    means = []
    for _ in range(resamples):
        items = rng.integers(0, n, n)
        chosen = rng.integers(0, prompts, prompts)
        drawn = [cells[i][j] for i in items for j in chosen]
        known = [value for value in drawn if not np.isnan(value)]
        means.append(sum(known) / len(known) if known else np.nan)
    return np.nanquantile(means, [0.025, 0.975])


@pytest.mark.parametrize("seed", range(3))
def test_crossed_mean_is_its_slow_twin(seed):
    cells = np.random.default_rng(seed).normal(size=(12, 3))
    cells[seed, 1] = np.nan
    value, low, high = crossed_mean(pd.DataFrame(cells), resamples=60, seed=seed)
    assert value == pytest.approx(np.nanmean(cells))
    assert (low, high) == pytest.approx(slow_crossed(cells.tolist(), 60, seed))


def test_one_prompt_is_the_plain_bootstrap():
    "Beside scipy's percentile bootstrap, whose draws are others."
    values = np.random.default_rng(0).normal(size=200)
    found = crossed_mean(pd.Series(values), resamples=4000)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert found[1:] == pytest.approx(tuple(theirs), abs=0.01)
    assert found[1:] == pytest.approx(bootstrap_mean(values, resamples=4000)[1:], abs=0.01)


def test_equal_prompts_add_nothing_and_different_ones_do():
    values = np.random.default_rng(0).normal(size=(100, 1))
    one = crossed_mean(pd.DataFrame(values), resamples=2000)
    equal = crossed_mean(pd.DataFrame(np.tile(values, 4)), resamples=2000)
    apart = crossed_mean(pd.DataFrame(values + [-1, -0.5, 0.5, 1]), resamples=2000)
    assert equal == pytest.approx(one, abs=0.03)
    assert apart[0] == pytest.approx(one[0])
    assert apart[2] - apart[1] > 3 * (one[2] - one[1])


def test_crossed_statistics_see_both_positions():
    def largest(items, prompts):
        return items.max() * 10 + prompts.max()

    value, low, high = bootstrap_crossed(largest, 3, 2, resamples=200)
    assert (value, high) == (21, 21) and low < 21


@pytest.mark.parametrize(
    "values, message",
    [
        ([1, 2], "values is list"),
        (pd.DataFrame({"a": [np.nan]}), "holds no number"),
        (pd.DataFrame({"a": [np.inf, 1]}), "holds an infinite value"),
    ],
)
def test_crossed_mean_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        crossed_mean(values)


# Families


def slow_holm(p_values):
    "Smallest first: each against as many as are left; none below the one before it."
    left = dict(enumerate(p_values))
    adjusted = {}
    largest = 0.0
    while left:
        place = min(left, key=lambda i: (left[i], i))
        largest = max(largest, min(1.0, left[place] * len(left)))
        adjusted[place] = largest
        del left[place]
    return [adjusted[i] for i in range(len(p_values))]


def test_holm():
    "The example of R's p.adjust, method 'holm', and random families beside the slow twin."
    p = [0.01, 0.02, 0.03, 0.04, 0.05]
    np.testing.assert_allclose(holm(p), [0.05, 0.08, 0.09, 0.09, 0.09])
    rng = np.random.default_rng(0)
    for size in (1, 2, 5, 30):
        p = rng.random(size) ** 4
        p[: size // 3] = p[-1]  # ties
        np.testing.assert_allclose(holm(p), slow_holm(p))
    bonferroni = np.minimum(1, p * len(p))
    assert (holm(p) <= bonferroni).all() and (holm(p) >= p).all()
    assert holm([0.04]) == [0.04]
    with pytest.raises(ValueError, match="a p-value is nan"):
        holm([np.nan])


def make_family(seed, shift):
    rng = np.random.default_rng(seed)
    return {
        f"c{i}": pd.Series(rng.normal(shift * i, 1, size=120), [f"t{j}" for j in range(120)])
        for i in range(5)
    }


@pytest.mark.parametrize("seed", range(3))
def test_intervals_of_a_family_agree_with_its_p_values(seed):
    "An interval excludes 0 where the adjusted p is below .05; one comparison is the plain one."
    family = make_family(seed, shift=0.1)
    table = compare_family(family, resamples=1000)
    excludes = (table["low"] > 0) | (table["high"] < 0)
    clear = (table["p_holm"] - 0.05).abs() > 0.005
    assert clear.any() and (excludes == (table["p_holm"] <= 0.05))[clear].all()
    np.testing.assert_allclose(table["p_holm"], slow_holm(table["p"]))
    by_t_test = [stats.ttest_1samp(values, 0).pvalue for values in family.values()]
    np.testing.assert_allclose(table["p"], by_t_test, atol=0.08)

    alone = compare_family({"c0": family["c0"]}, resamples=1000).loc[0]
    plain = crossed_mean(family["c0"], resamples=1000)
    assert alone[["difference", "low", "high"]].astype(float).tolist() == pytest.approx(plain)
    assert alone["p"] == alone["p_holm"]


def test_a_family_widens_its_intervals():
    "Five comparisons of nothing but one: its level is .05 / 5, that of the four others .05 / 4."
    family = make_family(0, shift=0)
    family["c4"] = family["c4"] + 1
    table = compare_family(family, resamples=1000).set_index("comparison")
    assert table.index[table["p_holm"] < 0.05].tolist() == ["c4"]
    for name, level in {"c4": 0.01, "c0": 0.0125}.items():
        plain = crossed_mean(family[name], resamples=1000, coverage=1 - level)
        assert table.loc[name, ["low", "high"]].astype(float).tolist() == pytest.approx(plain[1:])


def test_families_take_prompts_and_refuse_nothing():
    rng = np.random.default_rng(0)
    over_prompts = pd.DataFrame(rng.normal(0.4, 1, size=(60, 1)) + [-0.6, 0, 0.6])
    table = compare_family({"prompts": over_prompts, "one": over_prompts[1]}, resamples=1000)
    assert table["prompts"].tolist() == [3, 1] and table["n"].tolist() == [60, 60]
    assert table["p"].iloc[0] > table["p"].iloc[1]  # what may be the prompt is less certain
    for wrong in ({}, None, [over_prompts]):
        with pytest.raises(ValueError, match="differences is no dict"):
            compare_family(wrong)
