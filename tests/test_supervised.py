"""Predictors: what they learn from, that they agree with scikit-learn, that they are the same after
saving.
"""

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize
from scipy.sparse import csr_matrix
from scipy.special import expit
from sklearn.decomposition import TruncatedSVD
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mlc_notebooks.alignment import (
    LinearProbe,
    Neighbours,
    WordRegression,
    first_label_states,
    fit_linear,
    fit_neighbours,
    fit_on_states,
    fit_probe,
    fit_words,
)
from mlc_notebooks.data import (
    AnnotatedTexts,
    LabelSet,
    load_task,
    text_key,
    training_data,
    without_other_splits,
)
from mlc_notebooks.probing import probe_steps

LABELS = LabelSet(["joy", "fear"])
ONE = LabelSet(["joy", "fear", "anger"], none=None)


def texts(name, lines, votes, labels=LABELS, splits=None):
    ids = [f"{name}{i}" for i in range(len(lines))]
    return AnnotatedTexts(
        "made",
        ids,
        lines,
        labels,
        [np.array(v, np.uint8).reshape(-1, len(labels)) for v in votes],
        splits=splits or {},
    )


@pytest.fixture
def repeating():
    "A task whose train split repeats texts of test and dev in another spelling, under other ids."
    test = texts("t", ["Hello  World", "unseen words"], [[1, 0], [0, 1]])
    dev = texts("d", ["A dev text"], [[1, 0]])
    train = texts(
        "r",
        ["hello world", "a DEV text ", "good day", "good night", "good grief"],
        [[0, 1], [0, 1], [1, 0], [1, 0], [0, 1]],
    )
    splits = {"train": train, "dev": dev, "test": test}
    return texts("r", train.texts, train.annotations, splits=splits)


def bag(lines):
    "Unit vectors out of letter counts: an encoder for tests."
    counts = np.array(
        [
            [line.lower().count(letter) + 0.01 for letter in "abcdefghijklmnopqrstuvwxyz"]
            for line in lines
        ]
    )
    return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def test_texts_of_other_splits_are_not_learned(repeating):
    assert without_other_splits(repeating).ids == ("r2", "r3", "r4")
    assert not {"hello", "world", "dev"} & set(fit_words(repeating).vectorizer.vocabulary_)
    assert len(fit_neighbours(repeating, bag, k=2).vectors) == 3


def test_goemotions_repeats_texts_and_none_of_them_is_learned():
    task = load_task("goemotions")
    held_out = {text_key(text) for name in ("dev", "test") for text in task.splits[name].texts}
    train = task.split("train")
    assert any(text_key(text) in held_out for text in train.texts)  # or this test could not fail
    assert not any(text_key(text) in held_out for text in training_data(train)[0].texts)


def test_nothing_to_learn_from(repeating):
    with pytest.raises(ValueError, match="nothing to learn from"):
        fit_words(repeating.select([0, 1]))
    nobody = texts("n", ["one", "two"], [np.zeros((0, 2)), np.zeros((0, 2))])
    with pytest.raises(ValueError, match="nothing to learn from"):
        training_data(nobody)


def test_soft_targets_are_the_annotators_shares():
    task = texts("s", ["a", "b"], [[[1, 0], [0, 0], [0, 0], [0, 0]], [[1, 1], [1, 0], [0, 0]]])
    np.testing.assert_allclose(training_data(task, soft=True)[1], [[0.25, 0], [2 / 3, 1 / 3]])
    np.testing.assert_array_equal(training_data(task)[1], [[0, 0], [1, 0]])


@pytest.fixture
def points():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 5))
    return x, expit(x @ rng.normal(size=(5, 2)))


def test_linear_model_equals_scikit_learn_on_hard_targets(points):
    x, q = points
    hard = (q > 0.5).astype(float)
    by_label = np.stack(
        [LogisticRegression(max_iter=2000).fit(x, y).predict_proba(x)[:, 1] for y in hard.T], 1
    )
    np.testing.assert_allclose(fit_linear(x, hard, LABELS)(x), by_label, atol=1e-6)


def test_linear_model_on_shares_minimises_their_cross_entropy(points):
    x, q = points
    target = q[:, 0]

    def loss(w):
        p = np.clip(expit(x @ w[:-1] + w[-1]), 1e-12, 1 - 1e-12)
        return -(target * np.log(p) + (1 - target) * np.log(1 - p)).sum() + (w[:-1] ** 2).sum() / 2

    best = minimize(loss, np.zeros(6)).x
    np.testing.assert_allclose(
        fit_linear(x, q, LABELS)(x)[:, 0], expit(x @ best[:-1] + best[-1]), atol=1e-3
    )


@pytest.mark.parametrize("seen", [(0, 1, 2), (0, 2), (1,)])
def test_single_label_rows_sum_to_one_whatever_was_seen(points, seen):
    x, _ = points
    y = np.array(seen)[np.arange(len(x)) % len(seen)]
    p = fit_linear(x, np.eye(3)[y], ONE)(x)
    np.testing.assert_allclose(p.sum(1), 1)
    assert (p[:, [i for i in range(3) if i not in seen]] < 0.05).all() and np.isfinite(p).all()


def test_a_label_without_positives_has_a_small_probability(points):
    x, _ = points
    np.testing.assert_allclose(fit_linear(x, np.zeros((80, 2)), LABELS)(x), 0.5 / 81)


def test_composed_probe_equals_its_three_steps(points):
    """Written out with scikit-learn: standardise, reduce to a quarter of the width, one regression
    per label.
    """
    x, q = points
    x = np.c_[x, x**2, np.ones(len(x))] * 3 + 1
    hard = (q > 0.5).astype(int)
    composed = fit_on_states(x, hard, LABELS)(x)
    for column, target in enumerate(hard.T):
        three = make_pipeline(
            StandardScaler(),
            TruncatedSVD(x.shape[1] // 4, random_state=0),
            LogisticRegression(max_iter=2000, random_state=0),
        ).fit(x, target)
        np.testing.assert_allclose(composed[:, column], three.predict_proba(x)[:, 1], atol=1e-6)


def test_states_are_those_of_the_trace(tuned_lm):
    task = load_task("goemotions").sample(6, seed=0)
    trace = probe_steps(tuned_lm, task, 2, decoding="guided", hidden="first", progress=False)
    states = first_label_states(tuned_lm, task, 2, progress=False)
    np.testing.assert_allclose(
        states, trace.states(trace.hidden.shape[1] - 1).loc[list(task.ids)].to_numpy(), atol=2e-3
    )


def test_saved_predictors_predict_the_same(tmp_path, tuned_lm, base_lm):
    task = load_task("goemotions")
    train, test = task.split("train").sample(60, seed=0), task.sample(5, seed=0)
    probe = fit_probe(train, tuned_lm, shots=2, progress=False)
    probe.save(tmp_path / "probe")
    pd.testing.assert_frame_equal(
        LinearProbe.load(tmp_path / "probe", tuned_lm).predict(test, progress=False),
        probe.predict(test, progress=False),
    )
    with pytest.raises(ValueError, match="fitted on smollm2-135m-emotions"):
        LinearProbe.load(tmp_path / "probe", base_lm)

    words, near = fit_words(train), fit_neighbours(train, bag, k=5)
    words.save(tmp_path / "words")
    near.save(tmp_path / "near")
    pd.testing.assert_frame_equal(
        WordRegression.load(tmp_path / "words").predict(test), words.predict(test)
    )
    pd.testing.assert_frame_equal(
        Neighbours.load(tmp_path / "near", bag).predict(test), near.predict(test)
    )
    with pytest.raises(ValueError, match="holds a WordRegression, not a Neighbours"):
        Neighbours.load(tmp_path / "words", bag)
    with pytest.raises(FileNotFoundError, match="no saved predictor"):
        WordRegression.load(tmp_path)
    assert not list(tmp_path.rglob("*.p*kl")) and {p.suffix for p in tmp_path.rglob("*.*")} == {
        ".json",
        ".safetensors",
    }


def test_predictions_follow_the_order_of_the_tasks_labels():
    from mlc_notebooks.data import reorder_labels

    task = load_task("goemotions")
    words = fit_words(task.split("train").sample(200, seed=0))
    test = task.sample(4, seed=0)
    turned = reorder_labels(test, sorted(task.labels, reverse=True))
    pd.testing.assert_frame_equal(words.predict(turned), words.predict(test)[list(turned.labels)])
    with pytest.raises(ValueError, match="was fitted on"):
        words.predict(load_task("brighter-eng").sample(3, seed=0))


def test_rows_that_are_refused(points):
    x, q = points
    broken = x.copy()
    broken[3, 1] = np.nan
    shares = q.copy()
    shares[5, 0] = 1.5
    for features, targets, message in (
        (broken, q, "features of row 3 are not finite numbers"),
        (csr_matrix(np.where(np.isnan(broken), np.inf, broken)), q, "features of row 3"),
        (x, shares, "targets of row 5 are .* give 0 to 1"),
        (x, np.where(shares > 1, np.nan, shares), "targets of row 5"),
        (x[:3], q, r"shape \(3, 5\) and targets \(80, 2\)"),
        (x[:0], q[:0], "a row per text, and at least one"),
        (x, q[:, :1], r"give \(n, d\) and \(n, 2\)"),
        (x[0], q, r"shape \(5,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_linear(features, targets, LABELS)
    with pytest.raises(ValueError, match="row 3 are not finite"):
        fit_on_states(broken, q, LABELS)
    for C in (0, -1, float("nan")):
        with pytest.raises(ValueError, match=f"C is {C}: give a number above 0"):
            fit_linear(x, q, LABELS, C=C)
    with pytest.raises(ValueError, match="there are 3 features, and the model was fitted on 5"):
        fit_linear(x, q, LABELS)(x[:, :3])


def test_a_layer_that_is_not_there(base_lm):
    few = load_task("goemotions").split("train").select(range(2))
    for layer in (31, -32, 0.5, "last"):
        with pytest.raises(ValueError, match=f"layer is {layer!r}: give a whole number"):
            fit_probe(few, base_lm, layer=layer, progress=False)


def test_damaged_predictors_are_refused(tmp_path):
    words = fit_words(load_task("goemotions").split("train").sample(60, seed=0))
    words.save(tmp_path)
    numbers = tmp_path / "predictor.safetensors"
    before = bytearray(numbers.read_bytes())
    before[-1] ^= 1
    for content in (b"", bytes(before[:-9]), bytes(before)):
        numbers.write_bytes(content)
        with pytest.raises(ValueError, match="predictor.safetensors is gone or damaged"):
            WordRegression.load(tmp_path)
    numbers.unlink()
    with pytest.raises(ValueError, match="fit the predictor again"):
        WordRegression.load(tmp_path)
    (tmp_path / "predictor.json").write_text("")
    with pytest.raises(ValueError, match="predictor.json is damaged"):
        WordRegression.load(tmp_path)


def test_texts_without_words():
    with pytest.raises(ValueError, match="the 2 training texts have no words to learn from"):
        fit_words(texts("r", ["!", "?"], [[1, 0], [0, 1]]))
    with pytest.raises(ValueError, match=r"encode made an array of the shape \(1, 26\) from 2"):
        fit_neighbours(texts("r", ["a", "b"], [[1, 0], [0, 1]]), lambda t: bag(t)[:1], k=1)


def test_neighbours_are_their_mean_annotation():
    train = texts("r", ["aaa", "aab", "zzz"], [[1, 0], [1, 1], [0, 0]])
    found = fit_neighbours(train, bag, k=2).predict(texts("t", ["aa", "zz"], [[1, 0], [0, 0]]))
    np.testing.assert_allclose(found.loc["t0"], [1, 0.5])
    with pytest.raises(ValueError, match="k is 4"):
        fit_neighbours(train, bag, k=4)
