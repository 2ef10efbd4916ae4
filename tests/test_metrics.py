"""The statistics of the phenomenon: values worked out by hand, slow twins, properties that must
hold, degenerate traces."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import (
    average_precision_score,
    f1_score,
    jaccard_score,
    label_ranking_average_precision_score,
    roc_auc_score,
)

from mlc_notebooks.data import AnnotatedTexts, LabelSet
from mlc_notebooks.metrics import (
    alignment,
    bootstrap,
    bootstrap_mean,
    bootstrap_sets,
    calibration_error,
    first_and_final,
    first_final_agreement,
    first_step_quality,
    item_metrics,
    label_order,
    label_ranking_precision,
    mean_table,
    next_label_shares,
    next_labels,
    noise_ceiling,
    order_accuracy,
    paired_difference,
    phenomenon_table,
    profiles,
    rank_histogram,
    sets,
    sorted_profile,
    spikiness,
    statistics,
    step_profile,
)
from mlc_notebooks.probing import Trace

pytestmark = pytest.mark.filterwarnings("error")
EMOTIONS = LabelSet(["joy", "fear", "anger"])  # not in the alphabet's order
INTERVAL = ["quantity", "value", "low", "high", "n"]
COUNTED = [*INTERVAL, "rows", "rows_are", "excluded"]  # n counts texts


def make_trace(labels, answers, flags=()) -> Trace:
    """answers: {id: [(wrote, probabilities over Y+), ...]}, one pair a step; wrote None: a
    forced step 1."""
    labels = labels if isinstance(labels, LabelSet) else LabelSet(labels)
    outcomes = [
        tuple(dict.fromkeys(wrote for wrote, _ in answer if wrote in labels.outcomes))
        for answer in answers.values()
    ]
    items = pd.DataFrame(
        {"text": "x", "output": "", "outcomes": outcomes, "flags": [tuple(flags)] * len(answers)},
        pd.Index(list(answers), name="id"),
    )
    steps = pd.DataFrame(
        [
            (item, step, wrote, 0.75, 0.375, 0.125, ("forced",) if wrote is None else ())
            for item, answer in answers.items()
            for step, (wrote, _) in enumerate(answer, 1)
        ],
        columns=["example", "step", "wrote", "mass", "go", "stop", "flags"],
    )
    return Trace(
        labels,
        items,
        steps,
        np.log([probs for answer in answers.values() for _, probs in answer]),
        {},
    )


def make_task(labels, gold) -> AnnotatedTexts:
    "gold: {id: labels}."
    votes = [labels.vector(chosen)[None] for chosen in gold.values()]
    return AnnotatedTexts("tiny", list(gold), ["x"] * len(gold), labels, votes)


def cell(table, column="value", **where):
    "The one entry of `column` in the row where the other columns have these values."
    row = table[np.logical_and.reduce([table[key] == value for key, value in where.items()])]
    assert len(row) == 1, f"{len(row)} rows with {where}"
    return row[column].iloc[0]


@pytest.fixture
def answers():
    """Columns: joy, fear, anger, none.
    a: the runner-up of step 1, fear, is written next.
    b: the runner-up of step 1, fear, is written, but not next; at step 2 anger is second, but
    written already.
    c: nothing applies.
    d: the runner-up of step 1, anger, is never written.
    e: one label, which was not the likeliest.
    """
    return make_trace(
        EMOTIONS,
        {
            "a": [("joy", [0.5, 0.25, 0.125, 0.125]), ("fear", [0.125, 0.5, 0.25, 0.125])],
            "b": [
                ("anger", [0.125, 0.25, 0.5, 0.125]),
                ("joy", [0.4, 0.2, 0.3, 0.1]),
                ("fear", [0.1, 0.6, 0.2, 0.1]),
            ],
            "c": [("none", [0.1, 0.05, 0.15, 0.7])],
            "d": [("fear", [0.2, 0.4, 0.3, 0.1]), ("joy", [0.7, 0.1, 0.15, 0.05])],
            "e": [("anger", [0.5, 0.1, 0.3, 0.1])],
        },
    )


@pytest.fixture
def gold():
    return make_task(
        EMOTIONS, {"a": ["joy"], "b": ["anger"], "c": [], "d": ["joy"], "e": ["anger"]}
    )


@pytest.fixture
def few_draws(monkeypatch):
    "For tests of values: three draws from the bootstrap, which is slow and tested by itself."

    def three(statistic, n_items, *_, **__):
        return bootstrap(statistic, n_items, 3)

    for module in (alignment, profiles, sets, statistics):
        monkeypatch.setattr(module, "bootstrap", three)


# Intervals


def test_bootstrap_of_two_items():
    """A mean of 0 and 1 is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4: 2.5 and 97.5 % are 0 and
    1, 30 and 70 % are 1/2."""
    values = np.array([0.0, 1.0])

    def mean(chosen):
        return values[chosen].mean()

    assert bootstrap(mean, 2) == (0.5, 0, 1)
    assert bootstrap(mean, 2, coverage=0.4) == (0.5, 0.5, 0.5)
    assert bootstrap(mean, 1) == (0, 0, 0)


def test_bootstrap_of_an_array_is_that_of_each_entry():
    values = np.random.default_rng(0).normal(size=(30, 2))
    together = bootstrap(lambda chosen: values[chosen].mean(axis=0), 30, resamples=50, seed=4)
    for column, mine in enumerate(values.T):
        alone = bootstrap_mean(mine, resamples=50, seed=4)
        np.testing.assert_allclose([part[column] for part in together], alone)


def test_bootstrap_leaves_out_draws_without_a_value():
    "The statistic is 1 where item 0 is drawn and undefined elsewhere."
    assert bootstrap(lambda chosen: 1.0 if 0 in chosen else np.nan, 3) == (1, 1, 1)
    assert np.isnan(bootstrap(lambda chosen: np.nan, 3)).all()


def test_bootstrap_mean():
    assert bootstrap_mean([3.0]) == (3, 3, 3)
    assert bootstrap_mean([1, 0]) == (0.5, 0, 1)  # booleans: tests/test_statistics.py
    assert np.isnan(bootstrap_mean([])).all()


def test_paired_difference_joins_by_item():
    "1 - 1/2 and 2 - 3/2 are 1/2 both, whatever is drawn."
    first, second = pd.Series({"a": 1.0, "b": 2.0}), pd.Series({"b": 1.5, "a": 0.5})
    assert paired_difference(first, second) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="'c'"):
        paired_difference(first, pd.Series({"a": 1.0, "b": 2.0, "c": 0.0}))


def test_mean_table():
    "Mean over rows (1 + 0 + 1) / 3 of two items; the NaN counts for y only: (2 + 4) / 2."
    frame = pd.DataFrame(
        {"example": ["a", "a", "b", "b"], "x": [1, 0, 1, np.nan], "y": [2, np.nan, np.nan, 4]}
    )
    table = mean_table(frame, ["x", "y"])
    assert list(table.columns) == [*INTERVAL, "rows"]
    np.testing.assert_allclose(table["value"], [2 / 3, 3])
    assert table[["n", "rows"]].to_numpy().tolist() == [[2, 3], [2, 2]]
    np.testing.assert_allclose(
        table.loc[0, ["low", "high"]].astype(float), [0.5, 1]
    )  # a twice: 1/2, b twice: 1


def mean_of_drawn(of_item, chosen):
    "The mean over all values of the items chosen."
    pooled = [value for i in chosen for value in of_item[i]]
    return sum(pooled) / len(pooled)


def slow_mean_table(frame, values, by, seed):
    "The values of each drawn item, one after the other."
    rows = []
    for key in sorted(set(frame[by])):
        for name in values:
            part = frame[(frame[by] == key) & frame[name].notna()]
            of_item = [
                part.loc[part["example"] == item, name].tolist()
                for item in part["example"].unique()
            ]

            mean = partial(mean_of_drawn, of_item)
            interval = bootstrap(mean, len(of_item), resamples=40, seed=seed)
            rows.append((key, name, *interval, len(of_item), len(part)))
    return pd.DataFrame(rows, columns=[by, *INTERVAL, "rows"])


@pytest.mark.parametrize("seed", range(5))
def test_mean_table_is_its_slow_twin(seed):
    "Exactly: values are multiples of 1/8, whose sums are exact in any order."
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"example": rng.choice(list("dcba"), 40), "group": rng.integers(0, 3, 40)})
    frame[["x", "y"]] = rng.integers(-8, 8, (40, 2)) / 8
    frame.loc[rng.random(40) < 0.2, "y"] = np.nan
    fast = mean_table(frame, ["x", "y"], by=["group"], resamples=40, seed=seed)
    pd.testing.assert_frame_equal(
        fast, slow_mean_table(frame, ["x", "y"], "group", seed), check_exact=True
    )


# Spikiness


def test_step_profile():
    """a, step 1: 1/2 1/4 1/8 1/8 has 1.75 bits; over Y 4/7 2/7 1/7, log2 7 - (4 x 2 + 2 x 1) / 7
    bits.
    a, step 2: four quarters, 2 bits; over Y log2 3. b: 1.75 bits; over Y 1/4 1/4 1/2, 1.5 bits.
    p_go 3/8 / (3/8 + 1/8)."""
    profile = step_profile(
        make_trace(
            EMOTIONS,
            {
                "a": [("joy", [0.5, 0.25, 0.125, 0.125]), ("fear", [0.25] * 4)],
                "b": [("none", [0.125, 0.125, 0.25, 0.5])],
            },
        )
    )
    np.testing.assert_allclose(profile["top"], [0.5, 0.25, 0.5])
    np.testing.assert_allclose(profile["second"], [0.25, 0.25, 0.25])
    np.testing.assert_allclose(profile["ratio"], [2, 1, 2])
    np.testing.assert_allclose(profile["entropy"], [1.75, 2, 1.75])
    np.testing.assert_allclose(profile["entropy_labels"], [np.log2(7) - 10 / 7, np.log2(3), 1.5])
    np.testing.assert_allclose(profile["mass"], 0.75)
    np.testing.assert_allclose(profile["p_go"], 0.75)
    assert profile["steps"].tolist() == [2, 2, 1] and profile["last"].tolist() == [
        False,
        True,
        True,
    ]


def test_spikiness(few_draws):
    """Last at step 1: c and e, so top (.7 + .5) / 2 and second (.15 + .3) / 2; at step 2: a and
    d, the intermediate one is b."""
    table = spikiness(
        make_trace(
            EMOTIONS,
            {
                "a": [("joy", [0.5, 0.25, 0.125, 0.125]), ("fear", [0.125, 0.5, 0.25, 0.125])],
                "b": [
                    ("anger", [0.125, 0.25, 0.5, 0.125]),
                    ("joy", [0.4, 0.2, 0.3, 0.1]),
                    ("fear", [0.1, 0.6, 0.2, 0.1]),
                ],
                "c": [("none", [0.1, 0.05, 0.15, 0.7])],
                "e": [("anger", [0.5, 0.1, 0.3, 0.1])],
            },
        )
    )
    assert list(table.columns) == ["step", "position", *INTERVAL, "rows"]
    at = dict(step=1, position="last")
    assert [
        cell(table, quantity=name, **at) for name in ("top", "second", "mass")
    ] == pytest.approx([0.6, 0.225, 0.75])
    at = dict(step=1, position="intermediate")
    assert [
        cell(table, quantity=name, **at) for name in ("top", "second", "entropy")
    ] == pytest.approx([0.5, 0.25, 1.75])
    assert cell(table, "n", quantity="entropy_labels", **at) == 2
    assert cell(table, quantity="second", step=2, position="intermediate") == pytest.approx(0.3)
    assert cell(table, quantity="second", step=2, position="last") == pytest.approx(0.25)


def test_spikiness_has_the_median_ratio():
    "Ratios 2, 7 and 8: the median is 7, the mean 5.67."
    table = spikiness(
        make_trace(
            EMOTIONS,
            {
                "a": [("none", [0.125, 0.125, 0.25, 0.5])],
                "b": [("none", [0.1, 0.1, 0.1, 0.7])],
                "c": [("joy", [0.8, 0.1, 0.05, 0.05])],
            },
        )
    )
    assert cell(table, quantity="ratio") == pytest.approx(7)
    assert (
        cell(table, "low", quantity="ratio"),
        cell(table, "high", quantity="ratio"),
    ) == pytest.approx((2, 8))


def test_sorted_profile(few_draws, answers):
    "Sorted: .5 .25 .125 .125 twice, .7 .15 .1 .05, .4 .3 .2 .1, .5 .3 .1 .1; step 3 is b's alone."
    table = sorted_profile(answers)
    assert list(table.columns) == ["rank", *INTERVAL, "rows"]
    np.testing.assert_allclose(table["value"], [2.6 / 5, 1.25 / 5, 0.65 / 5, 0.5 / 5])
    np.testing.assert_allclose(sorted_profile(answers, step=3)["value"], [0.6, 0.2, 0.1, 0.1])


def test_float32_log_probabilities_are_summarised_in_float64():
    """Section 5. In float32 exp(-110) and exp(-120) are both 0, so that fear would win a tie
    that there is not."""
    trace = make_trace(EMOTIONS, {"a": [("joy", [0.5, 0.25, 0.125, 0.125])]})
    trace.logprobs = np.array([[0, -120, -110, -0.5]], np.float32)
    assert next_labels(trace)["runner_up"].tolist() == ["anger"]
    trace.logprobs = np.array([[-120, -120, -120, 0]], np.float32)
    np.testing.assert_allclose(step_profile(trace)["entropy_labels"], np.log2(3))


# What is written next


def test_next_labels(answers):
    """a1: fear is second and runner-up, held .25, is written next and then has .5.
    b1: fear is second and runner-up (.25), is written later but not next; joy, next, held .125;
    fear has .2 at step 2.
    b2: anger is second (.3), but written: the runner-up is fear, next, held .2; anger has .2 at
    step 3.
    b3: every label is written, no runner-up.   c1: anger is second, and the runner-up.
    d1: anger is second and runner-up (.3), is never written; joy, next, held .2; anger has .15
    at step 2.
    d2: anger is second, and the only label left.   e1: anger is second (.3), but written: joy is
    the runner-up."""
    steps, x = next_labels(answers), np.nan
    assert steps["example"].tolist() == list("aabbbcdde") and steps["step"].tolist() == [
        1,
        2,
        1,
        2,
        3,
        1,
        1,
        2,
        1,
    ]
    assert steps["last"].tolist() == [False, True, False, False, True, True, False, True, True]
    assert steps["runner_up"].fillna("").tolist() == [
        "fear",
        "anger",
        "fear",
        "fear",
        "",
        "anger",
        "anger",
        "anger",
        "joy",
    ]
    expected = {
        "second": [0.25, 0.25, 0.25, 0.3, 0.2, 0.15, 0.3, 0.15, 0.3],
        "next_now": [0.25, x, 0.125, 0.2, x, x, 0.2, x, x],
        "second_after": [0.5, x, 0.2, 0.2, x, x, 0.15, x, x],
        "runner_up_next": [1, x, 0, 1, x, x, 0, x, x],
        "runner_up_never": [x, x, 0, x, x, x, 1, x, x],
        "second_next": [1, x, 0, 0, x, x, 0, x, x],
        "second_never": [x, x, 0, 0, x, x, 1, x, x],
    }  # b2's second stands earlier in the answer
    for name, values in expected.items():
        np.testing.assert_allclose(steps[name], values, err_msg=name)


def test_next_label_shares(few_draws, answers):
    """Intermediate steps: a1, b1, b2, d1, of three items; b1 and d1 are those whose runner-up is
    not next."""
    table = next_label_shares(answers)
    assert list(table.columns) == ["step", *INTERVAL, "rows"]
    expected = {
        "runner_up_next": 1 / 2,
        "runner_up_never": 1 / 2,
        "second_next": 1 / 4,
        "next_now": (0.25 + 0.125 + 0.2 + 0.2) / 4,
        "second_after": (0.5 + 0.2 + 0.2 + 0.15) / 4,
    }
    for name, value in expected.items():
        assert cell(table, step="all", quantity=name) == pytest.approx(value), name
    assert (
        cell(table, "n", step="all", quantity="second_next"),
        cell(table, "rows", step="all", quantity="second_next"),
    ) == (3, 4)
    assert cell(table, step=1, quantity="runner_up_next") == pytest.approx(1 / 3)
    assert (
        cell(table, step=2, quantity="runner_up_next") == 1
        and cell(table, "n", step=2, quantity="runner_up_never") == 0
    )


def test_invented_and_repeated_labels_are_steps(few_draws):
    """Step 1: the runner-up, fear, is written at step 4; rage, next, is no label and has no
    probability.
    Step 2: runner-up anger (.5) is never written; joy, next, is a repeat and held .125; fear is
    second, then .5.
    Step 3: runner-up fear, next. Fear is written at step 4, though it is the second label of the
    answer."""
    trace = make_trace(
        EMOTIONS,
        {
            "a": [
                ("joy", [0.5, 0.25, 0.125, 0.125]),
                ("rage", [0.125, 0.25, 0.5, 0.125]),
                ("joy", [0.25, 0.5, 0.125, 0.125]),
                ("fear", [0.25] * 4),
            ]
        },
    )
    steps = next_labels(trace)
    assert steps["runner_up"].tolist() == ["fear", "anger", "fear", "anger"]
    np.testing.assert_allclose(steps["runner_up_next"], [0, 0, 1, np.nan])
    np.testing.assert_allclose(steps["runner_up_never"], [0, 1, np.nan, np.nan])
    np.testing.assert_allclose(steps["next_now"], [np.nan, 0.125, 0.5, np.nan])
    np.testing.assert_allclose(steps["second_after"], [0.25, 0.5, 0.25, np.nan])
    histogram = rank_histogram(trace)
    assert [
        cell(histogram, rank=rank, written_at=at) for rank, at in [(1, "1"), (2, "4"), (3, "never")]
    ] == [1, 1, 1]


def test_a_step_without_a_runner_up_is_not_counted():
    """At step 2 both labels are written; a repeat follows, but there is no runner-up that could
    be written or not."""
    steps = next_labels(
        make_trace(
            ["joy", "fear"],
            {"a": [("joy", [0.5, 0.3, 0.2]), ("fear", [0.3, 0.5, 0.2]), ("joy", [0.5, 0.3, 0.2])]},
        )
    )
    np.testing.assert_allclose(steps["runner_up_next"], [1, np.nan, np.nan])
    assert steps["runner_up_never"].isna().all()
    assert steps["second_next"].tolist()[:2] == [
        1,
        1,
    ]  # over Y+ without exclusions there is always a second


# The first step and the whole answer


def test_label_ranking_precision():
    """Relevant at ranks 1 and 3: (1/1 + 2/3) / 2. All tied: 2 of 3 at least as high, twice.
    Nothing relevant: no value."""
    scores, relevant = (
        [[0.5, 0.3, 0.2], [0.3, 0.3, 0.3], [0.5, 0.3, 0.2], [0.5, 0.3, 0.2]],
        [[1, 0, 1], [1, 1, 0], [0, 0, 0], [1, 1, 1]],
    )
    np.testing.assert_allclose(label_ranking_precision(scores, relevant), [5 / 6, 2 / 3, np.nan, 1])


@pytest.mark.parametrize("tied", [False, True])
def test_label_ranking_precision_is_scikit_learns(tied):
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 4, (200, 6)).astype(float) if tied else rng.random((200, 6))
    relevant = rng.integers(0, 2, (200, 6))
    mine, some = label_ranking_precision(scores, relevant), relevant.any(1)
    assert np.isnan(mine[~some]).all() and (~some).any()
    assert mine[some].mean() == pytest.approx(
        label_ranking_average_precision_score(relevant[some], scores[some])
    )
    np.testing.assert_allclose(
        mine[some], [average_precision_score(*row) for row in zip(relevant[some], scores[some])]
    )


def test_first_and_final(answers):
    """a: joy, fear are the top two, in this order. b: all three; of its pairs (anger joy) and
    (anger fear) stand as at
    step 1, (joy fear) does not: (2 - 1) / 3. d: the top two are fear, anger; fear, joy rank 1
    and 3. e: anger ranks 2nd."""
    items, x = first_and_final(answers), np.nan
    assert items["example"].tolist() == list("abde") and items["labels"].tolist() == [2, 3, 2, 1]
    np.testing.assert_allclose(items["top_k_match"], [1, 1, 0, 0])
    np.testing.assert_allclose(items["order_correlation"], [1, 1 / 3, 1, x])
    np.testing.assert_allclose(items["average_precision"], [1, 1, (1 + 2 / 3) / 2, 1 / 2])


def test_first_final_agreement(few_draws, answers):
    "Means of the four items above; several labels: a, b, d."
    table = first_final_agreement(answers)
    assert list(table.columns) == ["answers", *INTERVAL, "rows"]
    for group, values in {
        "all": [1 / 2, 7 / 9, 5 / 6],
        "several labels": [2 / 3, 7 / 9, 17 / 18],
        "one label": [0, np.nan, 1 / 2],
    }.items():
        np.testing.assert_allclose(
            table.loc[table["answers"] == group, "value"], values, err_msg=group
        )
    assert cell(table, "n", answers="one label", quantity="order_correlation") == 0


def test_rank_histogram(few_draws, answers):
    """Step 1 ranks a: joy fear anger, written at 1, 2, never. b: anger fear joy, at 1, 3, 2. d:
    fear anger joy, at 1,
    never, 2. c and e have not several labels; there is no fourth rank."""
    table = rank_histogram(answers)
    assert set(table.columns) == {"rank", "written_at", *INTERVAL, "rows"} and set(
        table["quantity"]
    ) == {"share"}
    shares = table.pivot(index="rank", columns="written_at", values="value")
    assert shares.index.tolist() == [1, 2, 3] and (table["n"] == 3).all()
    np.testing.assert_allclose(
        shares[["1", "2", "3", "never"]],
        [[1, 0, 0, 0], [0, 1 / 3, 1 / 3, 1 / 3], [0, 2 / 3, 0, 1 / 3]],
    )


# Order and quality


def test_order_accuracy(few_draws, answers, gold):
    """First: joy (right), anger (right), fear. Second: fear, joy, joy (right, d). Third: fear
    (b). e has one label only."""
    table = order_accuracy(answers, gold)
    assert list(table.columns) == ["position", *INTERVAL, "rows"]
    np.testing.assert_allclose(table["value"], [2 / 3, 1 / 3, 0])
    assert table["n"].tolist() == [3, 3, 1]
    with pytest.raises(ValueError, match="no item 'a'"):
        order_accuracy(answers, make_task(EMOTIONS, {"z": []}))


def test_label_order(few_draws):
    """Listed as Zeal, anger, fear; in the alphabet's order anger, fear, Zeal, whatever the case.
    a, b: anger, Zeal: the alphabet's and the reverse. c: Zeal, fear: the instruction's. d: fear,
    Zeal, anger: none of them."""
    p = [0.25] * 4
    trace = make_trace(
        ["Zeal", "anger", "fear"],
        {
            "a": [("anger", p), ("Zeal", p)],
            "b": [("anger", p), ("Zeal", p)],
            "c": [("Zeal", p), ("fear", p)],
            "d": [("fear", p), ("Zeal", p), ("anger", p)],
            "e": [("fear", p)],
        },
    )
    table = label_order(trace).set_index("quantity")
    assert table["value"].to_dict() == {
        "alphabetical": 1 / 2,
        "instruction's order": 1 / 4,
        "reverse of the instruction's": 1 / 2,
    }
    assert (table["n"] == 4).all()


def test_first_step_quality(few_draws, answers, gold):
    """Ranking: joy 1st (a), anger 1st (b), joy 3rd (d), anger 2nd (e); c has no gold label.
    AUROC of joy: .5 and .2 against .125, .1, .5: (2.5 + 2) / 6; of anger: .5 and .3 against
    .125, .15, .3: (3 + 2.5) / 6;
    fear is in no gold set."""
    table = first_step_quality(answers, gold)
    assert list(table.columns) == [*INTERVAL, "excluded"]

    def bits(*probs):
        return -sum(p * np.log2(p) for p in probs)

    entropy = (
        1.75
        + 1.75
        + bits(0.1, 0.05, 0.15, 0.7)
        + bits(0.2, 0.4, 0.3, 0.1)
        + bits(0.5, 0.1, 0.3, 0.1)
    ) / 5
    np.testing.assert_allclose(
        table["value"], [entropy, (1 + 1 + 1 / 3 + 1 / 2) / 4, (4.5 / 6 + 5.5 / 6) / 2]
    )
    assert table["n"].tolist() == [5, 4, 5] and table["excluded"].tolist() == [0, 1, 1]


@pytest.mark.parametrize("tied", [False, True])
def test_auroc_is_scikit_learns(few_draws, tied):
    rng = np.random.default_rng(2)
    scores = rng.integers(1, 4, (60, 4)) if tied else rng.random((60, 4))
    trace = make_trace(
        EMOTIONS, {f"t{i}": [("none", row / row.sum())] for i, row in enumerate(scores)}
    )
    gold = rng.integers(0, 2, (60, 3))
    task = make_task(EMOTIONS, {f"t{i}": EMOTIONS.chosen(row) for i, row in enumerate(gold)})
    mine = cell(first_step_quality(trace, task, resamples=2), quantity="AUROC")
    assert mine == pytest.approx(roc_auc_score(gold, trace.probs[:, :3], average="macro"))


def test_phenomenon_holds_every_table(few_draws, answers, gold):
    table = phenomenon_table(answers, gold)
    assert list(table.columns) == ["statistic", "at", *COUNTED]
    parts = [
        spikiness(answers),
        sorted_profile(answers),
        next_label_shares(answers),
        first_final_agreement(answers),
        rank_histogram(answers),
        label_order(answers),
        order_accuracy(answers, gold),
        first_step_quality(answers, gold),
    ]
    np.testing.assert_allclose(table["value"], pd.concat(parts)["value"])
    assert cell(table, at="step all", quantity="second_next") == 1 / 4
    judged = table[(table["at"] == "step all") & (table["quantity"] == "second_next")]
    assert judged[["n", "rows", "rows_are"]].to_numpy().tolist() == [[3, 4, "steps"]]
    others = table[table["statistic"] != "next label"]
    assert (others["rows"] == others["n"]).all() and set(others["rows_are"]) == {"texts"}
    assert cell(table, at="rank 3, written_at 2") == pytest.approx(2 / 3)
    without = phenomenon_table(answers)
    assert set(table["statistic"]) - set(without["statistic"]) == {
        "order accuracy",
        "first step quality",
    }


# Label sets, and marginals beside annotators


@pytest.mark.parametrize("seed", range(5))
def test_set_metrics_are_scikit_learns(few_draws, seed):
    "Some sets are empty on one side or on both, and the last label is never found nor gold."
    rng = np.random.default_rng(seed)
    found, gold = rng.random((2, 40, 5)) < 0.3
    found[:, 4] = gold[:, 4] = False
    found[:2] = gold[1:3] = False
    expected = [
        f1_score(gold, found, average="samples", zero_division=1),
        f1_score(gold, found, average="micro", zero_division=0),
        f1_score(gold, found, average="macro", zero_division=0),
        jaccard_score(gold, found, average="samples", zero_division=1),
    ]
    table = bootstrap_sets(found, gold)
    np.testing.assert_allclose(table["value"], expected)
    assert table["metric"].tolist() == ["example-F1", "micro-F1", "macro-F1", "Jaccard"]


def test_set_metrics_of_no_texts():
    table = bootstrap_sets(np.zeros((0, 3)), np.zeros((0, 3)))
    assert table["value"].isna().all() and (table["n"] == 0).all()


def slow_item_metrics(p, q, multi):
    "NLL, L1 and Brier of one item, label by label."
    nll = l1 = brier = 0.0
    for mine, theirs in zip(p, q):
        mine_clipped = min(max(mine, 1e-8), 1 - 1e-8)
        nll -= theirs * np.log(mine_clipped)
        if multi:
            nll -= (1 - theirs) * np.log(1 - mine_clipped)
        l1 += abs(mine - theirs)
        brier += (mine - theirs) ** 2 / len(p)
    return nll, l1, brier


@pytest.mark.parametrize("multi", [True, False])
def test_item_metrics_are_their_slow_twin(multi):
    """Zeros and ones among the marginals are clipped. (1 - 1e-8 is rounded, so not to the last
    digit.)"""
    rng = np.random.default_rng(3)
    p = rng.dirichlet([0.3] * 4, 50)
    p[:4] = np.eye(4)
    q = rng.multinomial(3, [0.25] * 4, 50) / 3
    found = item_metrics(p, q, multi)[["NLL", "L1", "Brier"]]
    expected = [slow_item_metrics(*row, multi) for row in zip(p, q)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_calibration_error_is_its_slow_twin():
    "Pair by pair into bins; 1 belongs to the last one."
    rng = np.random.default_rng(4)
    p, q = rng.random((2, 30, 3))
    p[0] = [0, 1, 0.5]
    error = 0
    for low in range(10):
        inside = [
            (mine, theirs)
            for mine, theirs in zip(p.ravel(), q.ravel())
            if min(int(mine * 10), 9) == low
        ]
        if inside:
            means = np.mean(inside, axis=0)
            error += abs(means[0] - means[1]) * len(inside) / p.size
    assert calibration_error(p, q) == pytest.approx(error)


def test_noise_ceiling_by_hand(few_draws):
    """L1. a: each of the two who said joy is predicted with (1/2, 1/2) by the others, the third,
    who said fear, with (1, 0):
    1, 1 and 2. b: both agree. Split in half, a has (1, 0) or (0, 1) against (1/2, 1/2) or (1,
    0). c has one annotator."""
    labels = LabelSet(["joy", "fear"])
    votes = [
        np.array([[1, 0], [1, 0], [0, 1]]),
        np.array([[1, 1], [1, 1]]),
        np.array([[1, 0]]),
    ]
    task = AnnotatedTexts("tiny", ["a", "b", "c"], ["x", "y", "z"], labels, votes)
    table = noise_ceiling(task)
    left_out = dict(method="annotators, leave-one-out", metric="L1")
    assert cell(table, **left_out) == pytest.approx((4 / 3 + 0) / 2)
    assert 0.5 <= cell(table, method="annotators, split-half", metric="L1") <= 1
    assert (table["n"] == 2).all() and (table["excluded"] == 1).all()
    assert noise_ceiling(task.select([2])).empty


# Degenerate traces


def test_ties_go_to_the_label_that_comes_first(few_draws):
    """Behind joy, fear is second and the runner-up; the top two are joy and fear, so b, which
    wrote fear and anger, differs."""
    even = [0.25] * 4
    trace = make_trace(
        EMOTIONS, {"a": [("joy", even), ("fear", even)], "b": [("fear", even), ("anger", even)]}
    )
    steps = next_labels(trace)
    assert steps["runner_up"].tolist() == ["fear", "anger", "joy", "joy"]
    assert steps["second_next"].tolist()[::2] == [1, 0] and steps["runner_up_next"].tolist()[
        ::2
    ] == [1, 0]
    items = first_and_final(trace)
    assert items["top_k_match"].tolist() == [1, 0]
    np.testing.assert_allclose(
        items["average_precision"], 2 / 3
    )  # three labels at least as high, two of them written
    assert items["order_correlation"].isna().all()  # step 1 has no order
    assert (
        cell(rank_histogram(trace), rank=1, written_at="1") == 1 / 2
        and cell(rank_histogram(trace), rank=1, written_at="never") == 1 / 2
    )


P = [0.4, 0.3, 0.2, 0.1]
DEGENERATE = {
    "forced": make_trace(EMOTIONS, {"a": [(None, P)], "b": [(None, P)]}, ["forced"]),
    "only none": make_trace(EMOTIONS, {"a": [("none", P)], "b": [("none", P)]}),
    "one text, one step": make_trace(EMOTIONS, {"a": [("joy", P)]}),
    "one label": make_trace(["spam"], {"a": [("spam", [0.6, 0.4])], "b": [("none", [0.1, 0.9])]}),
    "single-label": make_trace(
        LabelSet(["yes", "no"], None), {"a": [("yes", [0.6, 0.4])], "b": [("no", [0.1, 0.9])]}
    ),
    "truncated": make_trace(
        EMOTIONS, {"a": [("joy", P), ("fear", P)], "b": [("anger", P)]}, ["truncated"]
    ),
    "invented": make_trace(
        EMOTIONS, {"a": [("rage", P), ("spite", P)], "b": [("rage", P)]}, ["invented"]
    ),
    "repeated": make_trace(EMOTIONS, {"a": [("joy", P)] * 9, "b": [("fear", P)] * 2}, ["repeated"]),
    "none beside a label": make_trace(
        EMOTIONS, {"a": [("none", P), ("joy", P)], "b": [("joy", P), ("none", P)]}, ["none_mixed"]
    ),
}
COLUMNS = {
    spikiness: ["step", "position"],
    sorted_profile: ["rank"],
    next_label_shares: ["step"],
    first_final_agreement: ["answers"],
    rank_histogram: ["rank", "written_at"],
    label_order: [],
}


@pytest.mark.parametrize("trace", DEGENERATE.values(), ids=DEGENERATE.keys())
def test_degenerate_traces_keep_the_columns(few_draws, trace):
    for table, keys in COLUMNS.items():
        assert {*keys, *INTERVAL} <= set(table(trace).columns), table.__name__
    for chosen in ([], trace.labels.names):
        if trace.labels.is_multi:
            task = make_task(trace.labels, {"a": chosen, "b": chosen})
            assert {"position", *INTERVAL} <= set(order_accuracy(trace, task).columns)
            table = phenomenon_table(trace, task)
            assert list(table.columns) == ["statistic", "at", *COUNTED]
    assert len(step_profile(trace)) == len(next_labels(trace)) == len(trace.steps)


def test_a_forced_step_is_a_last_one_and_no_answer(few_draws):
    trace = DEGENERATE["forced"]
    assert set(spikiness(trace)["position"]) == {"last"} and next_labels(trace)[
        "runner_up"
    ].tolist() == ["joy", "joy"]
    assert (next_label_shares(trace)["n"] == 0).all() and (label_order(trace)["n"] == 0).all()
    assert first_and_final(trace).empty and rank_histogram(trace).empty


def test_one_label():
    "Over Y there is nothing to be unsure of; the label's rank is 1."
    trace = DEGENERATE["one label"]
    np.testing.assert_allclose(step_profile(trace)["entropy_labels"], 0, atol=1e-12)
    np.testing.assert_allclose(step_profile(trace)["second"], [0.4, 0.1])
    assert first_and_final(trace)[
        ["example", "top_k_match", "average_precision"]
    ].to_numpy().tolist() == [["a", 1, 1]]


def test_a_single_label_task(few_draws):
    "Y+ is Y; the runner-up of the one step is the other label. AUROC of .6 and .1 for yes in a: 1."
    trace = DEGENERATE["single-label"]
    profile = step_profile(trace)
    np.testing.assert_allclose(profile["entropy"], profile["entropy_labels"])
    assert next_labels(trace)["runner_up"].tolist() == ["no", "yes"]
    quality = first_step_quality(trace, make_task(trace.labels, {"a": ["yes"], "b": ["no"]}))
    np.testing.assert_allclose(quality["value"].iloc[1:], [1, 1])


@pytest.mark.parametrize("chosen, ranked", [([], 0), (["joy", "fear", "anger"], 5)])
def test_a_task_with_one_class_only(few_draws, answers, chosen, ranked):
    """No label has both classes: no AUROC, three labels excluded. With every label right any
    ranking is, without any there is none."""
    table = first_step_quality(answers, make_task(EMOTIONS, dict.fromkeys("abcde", chosen)))
    assert (
        np.isnan(table.loc[2, ["value", "low", "high"]].astype(float)).all()
        and table.loc[2, "excluded"] == 3
    )
    assert (table.loc[1, "n"], table.loc[1, "excluded"]) == (ranked, 5 - ranked)
    assert table.loc[1, "value"] == 1 if ranked else np.isnan(table.loc[1, "value"])


# Properties of random traces

SEEDS = pytest.mark.parametrize("seed", range(20))
NAMES = ("joy", "fear", "anger", "love", "shame")


def random_answers(seed, texts=15):
    "Free outputs of every kind: labels, repeats, inventions, none, nothing."
    rng = np.random.default_rng(seed)
    written = [
        ["none"],
        [None],
        *(rng.choice([*NAMES, *NAMES, "rage"], rng.integers(1, 5)).tolist() for _ in range(texts)),
    ]
    answers = {
        f"t{i}": [(name, rng.dirichlet([0.5] * 6)) for name in names]
        for i, names in enumerate(written)
    }
    return answers, {item: [name for name in NAMES if rng.random() < 0.4] for item in answers}


def named(table):
    "Value and n by what they are."
    assert not table.duplicated(["statistic", "at", "quantity"]).any()
    return table.set_index(["statistic", "at", "quantity"])[["value", "n"]].sort_index()


@SEEDS
def test_the_order_of_the_labels_changes_nothing_else(few_draws, seed):
    "But the two rows of the instruction's order."
    answers, gold = random_answers(seed)
    order = np.random.default_rng(seed).permutation(5)
    shuffled = {
        item: [(wrote, probs[[*order, 5]]) for wrote, probs in answer]
        for item, answer in answers.items()
    }
    tables = [
        named(phenomenon_table(make_trace(labels, rows), make_task(labels, gold)))
        for labels, rows in (
            (LabelSet(NAMES), answers),
            (LabelSet([NAMES[i] for i in order]), shuffled),
        )
    ]
    listed = tables[0].index.get_level_values("quantity").str.contains("instruction")
    assert listed.sum() == 2
    pd.testing.assert_frame_equal(*(table[~listed] for table in tables))


@SEEDS
def test_doubled_items_change_no_value(few_draws, seed):
    labels, (answers, gold) = LabelSet(NAMES), random_answers(seed)

    def twice(items):
        return {**items, **{f"{item} again": value for item, value in items.items()}}

    once, doubled = (
        named(
            phenomenon_table(make_trace(labels, double(answers)), make_task(labels, double(gold)))
        )
        for double in (dict, twice)
    )
    pd.testing.assert_series_equal(once["value"], doubled["value"])
    assert (doubled["n"] == 2 * once["n"]).all()


@SEEDS
def test_rank_statistics_depend_on_ranks_only(few_draws, seed):
    "Probabilities squared and divided by their sum keep their order."
    answers, _ = random_answers(seed)
    plain, squared = make_trace(NAMES, answers), make_trace(NAMES, answers)
    squared.logprobs = 2 * plain.logprobs
    of_rank = [
        "runner_up_next",
        "runner_up_never",
        "second_next",
        "second_never",
        "top_k_match",
        "order_correlation",
        "average_precision",
        "share",
    ]
    for table in (next_label_shares, first_final_agreement, rank_histogram):
        before, after = (
            found[found["quantity"].isin(of_rank)] for found in (table(plain), table(squared))
        )
        assert len(before)
        pd.testing.assert_frame_equal(before, after)
    assert not np.allclose(spikiness(plain)["value"], spikiness(squared)["value"])
