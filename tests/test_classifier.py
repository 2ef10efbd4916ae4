"""LabelClassifier: scikit-learn's own checks, real answers, and what is refused."""

import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import check_estimator
from sklearn.utils.validation import validate_data

from mlc_notebooks.alignment import LabelClassifier, compare_with_cheaper, out_of_fold
from mlc_notebooks.data import load_task
from mlc_notebooks.metrics import calibration_error


class RowsAsTexts(LabelClassifier):
    "Numbers become texts and names, since scikit-learn's checks give numbers."

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        tags.input_tags.string = False
        return tags

    def fit(self, X, y):
        X, y = validate_data(self, X, y, multi_output=True)
        super().fit(as_texts(X), as_names(y))
        if y.ndim == 1:
            self.classes_ = np.unique(y)  # in the order of their names too
        return self

    def ask(self, X, folder=None):
        self._check_fitted()
        return super().ask(as_texts(validate_data(self, X, reset=False)), folder)

    def score(self, X, y):
        return super().score(X, as_names(np.asarray(y)))


def as_texts(X):
    return [" ".join(f"{value:.1f}" for value in row[:5]) for row in X]


def as_names(y):
    if y.ndim == 2:
        return pd.DataFrame(y, columns=[f"label {i}" for i in range(y.shape[1])])
    return [f"class {value}" for value in y]


NOT_FITTING = {
    "check_classifiers_regression_target": "numbers between 0 and 1 are shares of annotators here",
    "check_supervised_y_2d": "a table with one column is one label that applies or not",
    "check_methods_subset_invariance": "batches agree to 1e-4 in float32, and 1e-7 is asked",
    "check_fit2d_1sample": "the message speaks of the one label that there is",
}


@pytest.fixture(scope="module")
def checks(tiny_folder):
    "The outcome of each of scikit-learn's checks by its name."
    estimator = RowsAsTexts(str(tiny_folder), shots=1, calibration=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return check_estimator(estimator, on_fail=None, on_skip=None)


def test_scikit_learns_checks(checks):
    "All but those that do not fit texts and names; the reasons stand beside them."
    failed = {
        check["check_name"]: check["exception"] for check in checks if check["status"] == "failed"
    }
    assert set(failed) == set(NOT_FITTING), failed
    assert sum(check["status"] == "passed" for check in checks) >= 50


@pytest.fixture(scope="module")
def known():
    "Texts and shares that a tuned model can learn a map from."
    task = load_task("brighter-eng").sample(90, seed=0)
    return task.texts, task.distribution()


@pytest.fixture(scope="module")
def fitted(tuned_lm, known):
    texts, shares = known
    return LabelClassifier(tuned_lm, coverage=0.8).fit(texts[:60], shares[:60])


def test_all_forms_of_labels_say_the_same(tuned_lm, known):
    texts, shares = known[0][:8], known[1][:8]
    names = list(shares.columns)
    lists = [[name for name in names if row[name]] for _, row in shares.iterrows()]
    forms = {
        "frame": (shares, None),
        "columns in another order": (shares[names[::-1]], names),
        "array": (shares.to_numpy(int), names),
        "booleans": (shares.to_numpy().astype(bool), names),
        "lists": (lists, names),
        "a column of lists": (pd.Series(lists), names),
        "sets": ([set(row) for row in lists], names),
    }
    found = {}
    for form, (y, labels) in forms.items():
        classifier = LabelClassifier(tuned_lm, shots=3, labels=labels, calibration=None)
        found[form] = classifier.fit(texts, y)
    first = found["frame"]
    for form, classifier in found.items():
        assert classifier.examples_ == first.examples_, form
        assert list(classifier.classes_) == names, form


@pytest.mark.parametrize("X", [list, tuple, np.array, pd.Series, pd.DataFrame])
def test_all_forms_of_texts_say_the_same(fitted, known, X):
    texts = list(known[0][60:63])
    assert np.array_equal(fitted.predict_proba(X(texts)), fitted.predict_proba(texts))


BAD = [
    (["a", "b"], pd.DataFrame({"joy": [1]}), "2 texts and 1 rows of labels"),
    (["a", None], pd.DataFrame({"joy": [1, 0]}), "position 1 is None"),
    (["a", 3.5], pd.DataFrame({"joy": [1, 0]}), "position 1 is 3.5"),
    (["a", "b"], np.eye(2), "no names"),
    (["a", "b"], pd.DataFrame({"joy": [1, 2]}), "item '1' has annotations other than 0 and 1"),
    (["a", "b"], pd.DataFrame({"joy": [1, np.nan]}), "item '1'"),
    ("a", pd.DataFrame({"joy": [1]}), "X is"),
    (pd.DataFrame({"a": ["x"], "b": ["y"]}), [["joy"]], "2 columns"),
    (["a", "b"], [["joy"], "fear"], "y"),
]


@pytest.mark.parametrize("X, y, message", BAD, ids=[message for *_, message in BAD])
def test_what_is_no_training_set_is_refused_by_name(tuned_lm, X, y, message):
    with pytest.raises((ValueError, TypeError), match=message):
        LabelClassifier(tuned_lm).fit(X, y)


def test_few_rows_are_all_used(tuned_lm, known):
    "Six rows: five folds, each shown to the others; the whole six are shown to new texts."
    texts, shares = known
    classifier = LabelClassifier(tuned_lm, shots=8).fit(texts[:6], shares[:6])
    assert len(classifier.examples_.pairs) == len(classifier.known_.raw) == 6


def test_a_text_never_helps_its_duplicate(tuned_lm, known):
    "Rows that stand there twice are shown or asked about, never both."
    texts, shares = known
    twice = [*texts[:24], *texts[:24]]
    classifier = LabelClassifier(tuned_lm, shots=4)
    classifier.fit(twice, pd.concat([shares[:24], shares[:24]]))
    shown = {text for text, _ in classifier.examples_.pairs}
    asked = classifier.known_.rows.at(classifier.known_.raw.index).texts
    assert not shown & set(asked) and len(asked) == 40


def test_similar_examples(tuned_lm, known):
    texts, shares = known
    classifier = LabelClassifier(tuned_lm, shots=2, examples="similar").fit(texts[:20], shares[:20])
    (shown,) = classifier.examples_.shown_to([texts[3]])
    assert shown[-1][0] == texts[3]  # a known text is its own nearest row
    assert len(classifier.known_.raw) == 20


def test_saved_and_loaded(fitted, known, tmp_path, tuned_lm, base_lm):
    fitted.save(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    again = LabelClassifier.load(tmp_path)
    new = known[0][60:64]
    assert np.allclose(again.predict_proba(new), fitted.predict_proba(new), atol=1e-4)
    assert again.limit_ == fitted.limit_
    with pytest.raises(ValueError, match="fitted with other weights"):
        LabelClassifier.load(tmp_path, model=base_lm).predict(new)
    (tmp_path / "predictor.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="damaged"):
        LabelClassifier.load(tmp_path)


def test_a_stopped_fit_goes_on(tuned_lm, known, tmp_path):
    "Finished batches are in the folder, and used."
    texts, shares = known[0][:30], known[1][:30]
    first = LabelClassifier(tuned_lm).fit(texts, shares, folder=tmp_path)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    again = LabelClassifier(tuned_lm).fit(texts, shares, folder=tmp_path)
    assert written == {path: path.stat().st_mtime_ns for path in written} and written
    assert np.array_equal(first.calibrator_.slope, again.calibrator_.slope)


def test_scikit_learn_searches_and_clones(tuned_lm, known):
    texts, shares = list(known[0][:20]), known[1][:20].to_numpy(int)
    names = list(known[1].columns)
    classifier = LabelClassifier(tuned_lm, labels=names, shots=2, calibration=None)
    assert clone(classifier).model is tuned_lm
    search = GridSearchCV(classifier, {"threshold": [0.2, 0.9]}, cv=2).fit(texts, shares)
    assert set(search.best_params_) == {"threshold"}
    lower = FunctionTransformer(lambda X: [text.lower() for text in X])
    pipeline = make_pipeline(lower, clone(classifier))
    p = cross_val_predict(pipeline, texts, shares, cv=2, method="predict_proba")
    assert p.shape == (20, 5) and (p >= 0).all() and (p <= 1).all()


def test_calibrated_and_honest(fitted, known):
    "Out of fold the calibrated probabilities lose less, and their sets hold what they promise."
    loss = {}
    task = fitted.known_.rows.at(fitted.known_.raw.index)
    q = task.distribution().to_numpy()
    for name, p in out_of_fold(fitted).items():
        p = p.clip(1e-8, 1 - 1e-8).to_numpy()
        loss[name] = -(q * np.log(p) + (1 - q) * np.log(1 - p)).sum(axis=1).mean()
    assert loss["language model"] == min(loss.values())
    assert calibration_error(fitted.known_.calibrated.to_numpy(), q) < calibration_error(
        fitted.known_.raw.to_numpy(), q
    )
    covered = (fitted.possible(fitted.known_.calibrated).to_numpy() >= q).all(axis=1)
    assert covered.mean() >= 0.8
    assert "language model" in compare_with_cheaper(fitted).advice


def test_one_labelled_text_is_too_few(tuned_lm):
    for texts in (["a"], ["a", "A "]):
        with pytest.raises(ValueError, match="one labelled text is too few"):
            LabelClassifier(tuned_lm, labels=["joy"]).fit(texts, [["joy"]] * len(texts))
