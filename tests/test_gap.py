"""The gap to the annotators: the parts sum to it, each part by hand, the map rises, the ceiling is
that of `noise_ceiling`."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mlc_notebooks.alignment import (
    cross_calibrated,
    fit_rising,
    gap_split,
    leave_one_out_metrics,
)
from mlc_notebooks.alignment.gap import GAP_PARTS
from mlc_notebooks.data import AnnotatedTexts, LabelSet
from mlc_notebooks.metrics import align_report, item_metrics, noise_ceiling

LABELS = LabelSet(["joy", "fear"])


def make_task(annotations, labels=LABELS, aggregated=False) -> AnnotatedTexts:
    ids = [f"i{n}" for n in range(len(annotations))]
    texts = [f"text {n}" for n in range(len(annotations))]
    votes = [np.array(rows, np.uint8) for rows in annotations]
    return AnnotatedTexts("tiny", ids, texts, labels, votes, aggregated=aggregated)


def table(values, labels=LABELS) -> pd.DataFrame:
    return pd.DataFrame(values, [f"i{n}" for n in range(len(values))], list(labels))


def parts_of(split, method="method", metric="NLL") -> pd.Series:
    rows = split[(split["method"] == method) & (split["metric"] == metric)]
    return rows.set_index("part")["value"]


VOTES = [[[1, 0], [1, 0], [0, 0]], [[0, 1], [0, 1]], [[1, 1], [0, 0], [0, 1], [1, 0]], [[0, 0]]]
shares = arrays(float, (4, 2), elements=st.floats(0, 1))


@settings(max_examples=30)
@given(shares, shares, shares, st.sampled_from([1e-8, 0.01]))
def test_parts_sum_to_what_the_report_says(method, marginals, calibrated, eps):
    task = make_task(VOTES)
    split = gap_split(
        table(method), table(marginals), table(calibrated), task, eps=eps, resamples=2
    )
    judged = task.select([0, 1, 2])  # the last item has one annotator
    metrics = item_metrics(method[:3], judged.distribution().to_numpy(), eps=eps)
    for metric in ("NLL", "L1"):
        parts = parts_of(split, metric=metric)
        assert parts[list(GAP_PARTS)].sum() == pytest.approx(parts["total"], abs=1e-9)
        assert parts["total"] == pytest.approx(metrics[metric].mean(), abs=1e-9)
    assert split["n"].eq(3).all() and split["excluded"].eq(1).all()


def test_each_part_by_hand():
    """One label, aggregated: it applies to the first of two texts. L1 of the method 1 and 1, of the
    marginals .6 and .4, of the calibrated .1 and .3: means 1, .5 and .2."""
    one = LabelSet(["joy"])
    task = make_task([[[1]], [[0]]], one, aggregated=True)
    tables = [table([[a], [b]], one) for a, b in ((0, 1), (0.4, 0.4), (0.9, 0.3))]
    split = gap_split(*tables, task)
    parts = parts_of(split, metric="L1")
    assert parts.tolist() == pytest.approx([0, 0.2, 0.3, 0.5, 1, 1])
    assert parts.index.tolist() == [*GAP_PARTS, "gap", "total"]
    assert split["ceiling"].unique().tolist() == ["0 (aggregated labels)"]


def test_intervals_share_their_draws():
    "A method that is the marginals has a read-out of 0 in each draw; its total moves."
    rng = np.random.default_rng(0)
    task = make_task(rng.integers(0, 2, (30, 3, 2)))
    marginals = table(rng.uniform(size=(30, 2)))
    split = gap_split({"same": marginals}, marginals, marginals, task, resamples=50)
    rows = split[split["metric"] == "NLL"].set_index("part")
    assert rows.loc[["calibration", "read-out"], ["value", "low", "high"]].eq(0).all(axis=None)
    assert rows.loc["total", "low"] < rows.loc["total", "value"] < rows.loc["total", "high"]


def test_the_total_is_that_of_align_report():
    rng = np.random.default_rng(1)
    task = make_task(rng.integers(0, 2, (12, 3, 2)))
    marginals = table(rng.uniform(size=(12, 2)))
    report = align_report(marginals, task, resamples=2).set_index(["method", "metric"])["value"]
    split = gap_split(marginals, marginals, marginals, task, resamples=2)
    for metric in ("NLL", "L1"):
        assert parts_of(split, metric=metric)["total"] == pytest.approx(report["method", metric])
        people = report["annotators, leave-one-out", metric]
        assert parts_of(split, metric=metric)["ceiling"] == pytest.approx(people)


def test_a_ceiling_of_ones_own():
    task = make_task(VOTES)
    marginals = table(np.full((4, 2), 0.5))
    own = pd.DataFrame({"NLL": [0.5] * 4, "L1": [0.25] * 4}, task.ids)
    split = gap_split(marginals, marginals, marginals, task, ceiling=own)
    assert parts_of(split, metric="L1")["ceiling"] == 0.25
    assert split["n"].eq(4).all() and split["ceiling"].eq("as given").all()


def test_the_ceiling_by_item_is_that_of_noise_ceiling():
    task = make_task(VOTES)
    by_item = leave_one_out_metrics(task)
    slow = []
    for position in range(3):
        found = noise_ceiling(task.select([position]), seeds=1, resamples=1)
        found = found[found["method"] == "annotators, leave-one-out"].set_index("metric")["value"]
        slow.append(found[["NLL", "L1"]].tolist())
    assert by_item.index.tolist() == list(task.ids[:3])
    assert by_item.to_numpy() == pytest.approx(np.array(slow))


def test_the_map_rises_and_rare_labels_are_pooled():
    rng = np.random.default_rng(0)
    truth = rng.uniform(size=(400, 2)) * [1, 0.05]
    votes = (rng.uniform(size=truth.shape) < truth)[:, None]
    task = make_task(votes)
    fitted = fit_rising(table(truth**2), task)
    assert fitted.has_enough == (True, False)
    line = table(np.linspace(0, 1, 400)[:, None].repeat(2, axis=1))
    assert (fitted(line).diff().dropna() >= 0).all(axis=None)
    again = fit_rising(table(truth**2), task, least=1)
    assert again.has_enough == (True, True)
    assert not again(line)["fear"].equals(fitted(line)["fear"])


def test_no_item_meets_a_map_that_has_seen_it():
    "A label that follows chance cannot be learned by cross-fitting, however free the map."
    rng = np.random.default_rng(0)
    task = make_task(rng.integers(0, 2, (300, 1, 2)))
    chance = table(rng.uniform(size=(300, 2)))
    q = task.distribution().to_numpy()
    crossed = item_metrics(cross_calibrated(chance, task, least=1).to_numpy(), q)["NLL"].mean()
    seen = item_metrics(fit_rising(chance, task, least=1)(chance).to_numpy(), q)["NLL"].mean()
    assert seen < 2 * np.log(2) < crossed


def test_rows_sum_to_one_where_one_label_applies():
    one_of_two = LabelSet(["joy", "fear"], none=None)
    rng = np.random.default_rng(0)
    first = rng.integers(0, 2, (40, 3))
    task = make_task(np.stack([first, 1 - first], axis=2), one_of_two)
    p = rng.uniform(size=40)
    marginals = table(np.column_stack([p, 1 - p]), one_of_two)
    mapped = fit_rising(marginals, task)(marginals)
    assert mapped.sum(axis=1).to_numpy() == pytest.approx(np.ones(40))
    parts = parts_of(gap_split(marginals, marginals, mapped, task, eps=0.01, resamples=2))
    assert parts[list(GAP_PARTS)].sum() == pytest.approx(parts["total"])


def test_what_does_not_fit_is_refused():
    task = make_task(VOTES)
    whole = table(np.full((4, 2), 0.5))
    with pytest.raises(ValueError, match="marginals has no row for item 'i2'"):
        gap_split(whole, whole[:2], whole, task)
    with pytest.raises(ValueError, match="no item 'i9'"):
        gap_split(whole.rename({"i0": "i9"}), whole, whole, task)
    with pytest.raises(ValueError, match="no item has two annotators"):
        gap_split(whole[3:], whole, whole, task)
    with pytest.raises(ValueError, match="is no probability"):
        gap_split(whole * 3, whole, whole, task)


def test_folds_need_different_texts():
    "Texts that are all alike are one fold, and nothing would be left to fit to."
    task = make_task([[[1, 0]], [[0, 1]]] * 10)
    alike = replace(task, texts=["same"] * len(task))
    with pytest.raises(ValueError, match="5 folds of 1 different texts"):
        cross_calibrated(table(np.full((20, 2), 0.5)), alike)
