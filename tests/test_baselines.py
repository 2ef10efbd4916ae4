"""Baselines that read nothing, words, people beside methods, error rates of single annotators, and
counts that say what they count: hand-worked cases and slow twins."""

import numpy as np
import pandas as pd
import pytest

from mlc_notebooks.alignment import all_baselines
from mlc_notebooks.data import AnnotatedTexts, LabelSet, load_task
from mlc_notebooks.metrics import (
    BLIND_BASELINES,
    against_annotators,
    align_report,
    blind_baselines,
    compare_methods,
    item_metrics,
    macro_auroc,
    matched_prior_marginals,
    metric_table,
    noise_ceiling,
    people_report,
    perspectivist_error,
    prior_marginals,
    share_interval,
    zero_marginals,
)
from mlc_notebooks.report import best_method

LABELS = LabelSet(["joy", "fear", "anger"])
ONE_OF = LabelSet(["joy", "fear", "anger"], None)


def make_task(seed=0, n=12, labels=LABELS, most=4, train=None) -> AnnotatedTexts:
    "n items with 1 to `most` annotators each."
    rng = np.random.default_rng(seed)
    votes = []
    for _ in range(n):
        annotators = rng.integers(1, most + 1)
        if labels.is_multi:
            votes.append((rng.random((annotators, 3)) < [0.6, 0.3, 0.1]).astype(int))
        else:
            votes.append(np.eye(3, dtype=int)[rng.integers(0, 3, annotators)])
    ids = [f"t{seed}-{i}" for i in range(n)]
    texts = [f"text {seed} {i}" for i in range(n)]
    return AnnotatedTexts(
        "made", ids, texts, labels, votes, splits={"train": train} if train else {}
    )


def made_marginals(task, seed=0) -> pd.DataFrame:
    p = np.random.default_rng(seed).random((len(task), 3))
    if not task.labels.is_multi:
        p = p / p.sum(axis=1, keepdims=True)
    return pd.DataFrame(p, list(task.ids), list(task.labels))


# Baselines


def test_the_matched_prior_leaves_each_item_out():
    task = make_task()
    found = matched_prior_marginals(task)
    for place, item in enumerate(task.ids):
        others = task.select([i for i in range(len(task)) if i != place])
        np.testing.assert_allclose(found.loc[item], others.distribution().mean())
    alone = task.select([0])
    with pytest.raises(ValueError, match="made has 1 annotated items"):
        matched_prior_marginals(alone)
    np.testing.assert_allclose(matched_prior_marginals(make_task(labels=ONE_OF)).sum(axis=1), 1)


def test_blind_baselines_are_those_that_a_task_allows():
    train = make_task(seed=1)
    assert tuple(blind_baselines(make_task(train=train))) == BLIND_BASELINES
    assert list(blind_baselines(make_task())) == ["all zeros", "constant", "matched prior"]
    one_of = make_task(labels=ONE_OF)
    assert list(blind_baselines(one_of)) == ["constant", "matched prior"]
    assert list(blind_baselines(one_of.select([0]))) == ["constant"]
    with pytest.raises(ValueError, match="exactly one label a text"):
        zero_marginals(one_of)


def test_every_baseline_is_in_the_report_and_none_may_be_renamed():
    task = make_task(train=make_task(seed=1))
    mine = made_marginals(task)
    report = align_report({"mine": mine}, task, resamples=3)
    assert report["method"].unique().tolist()[:5] == ["mine", *BLIND_BASELINES]
    for name in (*BLIND_BASELINES, "annotators, smoothed"):
        with pytest.raises(ValueError, match="is a row that the report adds itself"):
            align_report({name: mine}, task, resamples=3)
    assert best_method(report, "NLL") == "mine"

    table = report.pivot(index="method", columns="metric", values="value")
    assert np.isnan(table.loc["matched prior", "AUROC"])  # each item left out: no ranking of items
    assert table.loc["all zeros", "AUROC"] == 0.5
    for name, marginals in blind_baselines(task).items():
        alone = metric_table(marginals, task, resamples=3).set_index("metric")["value"]
        assert table.loc[name, "NLL"] == alone["NLL"]


def test_baselines_that_are_given_take_the_place_of_the_blind_ones():
    task = make_task()
    mine, other = made_marginals(task), made_marginals(task, seed=1)
    report = align_report({"mine": mine}, task, resamples=3, baselines={"other": other[::-1]})
    methods = report.loc[report["target"] == "q", "method"].unique().tolist()
    assert methods == ["mine", "other"]
    with pytest.raises(ValueError, match="'other' has no item 't0-0'"):
        align_report(mine, task, baselines={"other": other[1:]})
    with pytest.raises(ValueError, match="'mine' is a row that"):
        align_report({"mine": mine}, task, baselines={"mine": other})


def test_words_are_a_baseline_where_there_is_a_train_split():
    "On real texts they rank, and no table that reads nothing does."
    task = load_task("convabuse").sample(100, seed=0, kind="main")
    baselines = all_baselines(task)
    assert list(baselines) == [*BLIND_BASELINES, "words (TF-IDF)"]
    both = {name: baselines[name] for name in ("words (TF-IDF)", "label prior")}
    words = compare_methods(both, task, against="label prior", resamples=100)
    words = words.set_index("metric")
    assert words.loc["AUROC", "low"] > 0.1 and words.loc["L1", "high"] < 0
    assert list(all_baselines(make_task())) == ["all zeros", "constant", "matched prior"]


# People


def test_people_are_never_compared_with_themselves():
    """Item t has the votes joy, joy, nothing: the others give 1/2, 1/2 and 1. With one more person
    who answers the prior (.2): (1 + .2) / 3 twice and 2.2 / 3. A ceiling against the q of all
    three, 2/3, would have a distance of 1/3, 1/3 and 2/3."""
    labels = LabelSet(["joy"])
    answers = [np.array([[1]]), *[np.array([[0]])] * 4]
    train = AnnotatedTexts("train", "abcde", list("abcde"), labels, answers)
    votes = [np.array([[1], [1], [0]])]
    task = AnnotatedTexts("tiny", ["t"], ["x"], labels, votes, splits={"train": train})
    table = noise_ceiling(task, resamples=2)
    table = table.query("metric == 'L1'").set_index("method")
    assert table.loc["annotators, leave-one-out", "value"] == pytest.approx((0.5 + 0.5 + 1) / 3)
    expected = (2 * (1 - 1.2 / 3) + 2.2 / 3) / 3
    assert table.loc["annotators, smoothed", "value"] == pytest.approx(expected)
    assert table["target"].tolist() == ["one annotator", "one annotator", "other half"]


@pytest.mark.parametrize("labels", [LABELS, ONE_OF])
def test_the_smoothed_ceiling_is_its_slow_twin(labels):
    "Annotator by annotator; without a train split the prior is that of the other items."
    task = make_task(labels=labels)
    several = task.select([i for i, votes in enumerate(task.annotations) if len(votes) > 1])
    priors = matched_prior_marginals(several).to_numpy()
    expected = []
    for votes, prior in zip(several.annotations, priors):
        losses = []
        for own in range(len(votes)):
            others = [votes[i] for i in range(len(votes)) if i != own]
            p = (np.sum(others, axis=0) + prior) / (len(others) + 1)
            losses.append(item_metrics(p[None], votes[own][None], labels.is_multi).iloc[0])
        expected.append(pd.concat(losses, axis=1).mean(axis=1))
    expected = pd.concat(expected, axis=1).mean(axis=1)
    table = noise_ceiling(task, resamples=2).query("method == 'annotators, smoothed'")
    np.testing.assert_allclose(table.set_index("metric")["value"][expected.index], expected)
    assert (table["excluded"] == len(task) - len(several)).all()


@pytest.mark.parametrize("labels", [LABELS, ONE_OF])
def test_methods_against_annotators(labels):
    "NLL and error rate are linear in q, so they are those of the report; L1 is not."
    task = make_task(labels=labels)
    task = task.select([i for i, votes in enumerate(task.annotations) if len(votes) > 1])
    p = made_marginals(task)
    own = against_annotators(p, task, resamples=2).set_index("metric")["value"]
    of_all = metric_table(p, task, resamples=2).set_index("metric")["value"]
    for metric in ("NLL", "error rate"):
        assert own[metric] == pytest.approx(of_all[metric])
    by_hand = [
        np.abs(votes - p.loc[item].to_numpy()).sum(axis=1).mean()
        for item, votes in zip(task.ids, task.annotations)
    ]
    assert own["L1"] == pytest.approx(np.mean(by_hand))
    assert own["L1"] > of_all["L1"]


def test_the_report_about_people_has_one_target_and_the_same_items():
    task = make_task(train=make_task(seed=1))
    several = sum(len(votes) > 1 for votes in task.annotations)
    report = people_report(made_marginals(task), task, resamples=3)
    assert set(report["target"]) == {"one annotator"} and (report["n"] == several).all()
    assert report["method"].unique().tolist()[-2:] == [
        "annotators, leave-one-out",
        "annotators, smoothed",
    ]
    assert f"{len(task) - several} items with fewer than two annotators" in report.note
    with pytest.raises(ValueError, match="no item has two annotators"):
        people_report(made_marginals(task), make_task(most=1, train=make_task(seed=1)))


def test_people_print_in_a_block_of_their_own():
    report = align_report(made_marginals(make_task()), make_task(), resamples=3)
    methods, single, half = repr(report).split("\n\n")
    assert "method" in methods and "annotators" not in methods
    assert single.lstrip().count("annotators, smoothed") == 1 and "against one annotator" in single
    assert "annotators, split-half" in half and "items, q from annotators" in half
    assert report._repr_html_().count("<table") == 3


# Metrics


def slow_errors(sets, votes, multi):
    "Annotator by annotator, label by label."
    found = []
    for predicted, own in zip(sets, votes):
        errors = []
        for place, answer in enumerate(own):
            mine = predicted if np.ndim(predicted) == 1 else predicted[place]
            wrong = [one != other for one, other in zip(mine, answer)]
            errors.append(np.mean(wrong) if multi else float(any(wrong)))
        found.append(np.mean(errors))
    return found


@pytest.mark.parametrize("labels", [LABELS, ONE_OF])
def test_error_rate_is_its_slow_twin(labels):
    task = make_task(n=30, labels=labels)
    p = made_marginals(task).to_numpy()
    q = task.distribution().to_numpy()
    multi = labels.is_multi
    sets = p >= 0.5 if multi else np.eye(3)[p.argmax(axis=1)] == 1
    expected = slow_errors(sets, task.annotations, multi)
    np.testing.assert_allclose(item_metrics(p, q, multi)["error rate"], expected)
    np.testing.assert_allclose(perspectivist_error(sets, task.annotations, multi), expected)
    np.testing.assert_allclose(item_metrics(p, q, multi)["Manhattan"], np.abs(p - q).mean(axis=1))

    own_sets = [1 - votes for votes in task.annotations]
    expected = slow_errors(own_sets, task.annotations, multi)
    np.testing.assert_allclose(perspectivist_error(own_sets, task.annotations, multi), expected)
    assert (perspectivist_error(task.annotations, task.annotations, multi) == 0).all()


def test_no_set_for_all_annotators_beats_the_majority():
    task = make_task(n=30)
    majority = perspectivist_error(task.majority().to_numpy(), task.annotations)
    for code in range(8):
        same = np.tile([code >> i & 1 for i in range(3)], (30, 1))
        assert (perspectivist_error(same, task.annotations) >= majority - 1e-12).all()


def test_error_rates_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="2 sets and 1 items"):
        perspectivist_error([[1], [0]], [np.array([[1]])])
    with pytest.raises(
        ValueError, match=r"item 0: sets of the shape \(2, 1\), annotations \(3, 1\)"
    ):
        perspectivist_error([[[1], [0]]], [np.ones((3, 1))])
    assert np.isnan(perspectivist_error([[1]], [np.zeros((0, 1))])).all()


def test_accuracy_of_single_labels_is_a_share():
    task = make_task(n=20, labels=ONE_OF, most=1)
    table = metric_table(task.distribution(), task).set_index("metric")
    low = share_interval(20, 20)[1]
    assert table.loc["example-F1", ["value", "low", "high"]].tolist() == [1, low, 1]
    assert table.loc["error rate", "high"] == pytest.approx(1 - low)


def test_compared_rankings_are_those_of_the_two_methods():
    "LRAP over the items with gold labels; AUROC drawn for both methods together."
    task = make_task(n=40)
    both = {"a": made_marginals(task), "b": made_marginals(task, seed=1)}
    compared = compare_methods(both, task, against="b", resamples=50, seed=3)
    compared = compared.set_index("metric")
    values = {
        name: metric_table(p, task, resamples=2).set_index("metric")["value"]
        for name, p in both.items()
    }
    for metric in ("Manhattan", "error rate", "LRAP", "AUROC"):
        expected = values["a"][metric] - values["b"][metric]
        assert compared.loc[metric, "difference"] == pytest.approx(expected)
    gold = task.majority().to_numpy()
    assert compared.loc["LRAP", "n"] == gold.any(axis=1).sum() < 40

    rng = np.random.default_rng(3)
    drawn = []
    for _ in range(50):
        chosen = rng.integers(0, 40, 40)
        auroc = [macro_auroc(gold[chosen], p.to_numpy()[chosen]) for p in both.values()]
        drawn.append(auroc[0] - auroc[1])
    ends = np.quantile(drawn, [0.025, 0.975])
    np.testing.assert_allclose(compared.loc["AUROC", ["low", "high"]].astype(float), ends)
    with_prior = both | {"matched prior": matched_prior_marginals(task)}
    rows = compare_methods(with_prior, task, against="b", resamples=20)
    assert not ((rows["method"] == "matched prior") & (rows["metric"] == "AUROC")).any()


def test_prior_and_smoothing_take_the_train_split():
    train = make_task(seed=1, n=30)
    task = make_task(train=train)
    np.testing.assert_allclose(prior_marginals(task).iloc[0], train.distribution().mean())
    with_train = noise_ceiling(task, resamples=2).set_index(["method", "metric"])["value"]
    without = noise_ceiling(make_task(), resamples=2).set_index(["method", "metric"])["value"]
    assert with_train["annotators, smoothed", "NLL"] != without["annotators, smoothed", "NLL"]
    same = "annotators, leave-one-out"
    assert with_train[same, "NLL"] == without[same, "NLL"]
