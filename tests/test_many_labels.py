"Many labels: metrics of rankings, descriptions of labels, candidates that are read exactly"

import gzip
import pickle
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import ndcg_score

from mlc_notebooks.alignment.candidate_reading import (
    ANOTHER,
    ask_candidates,
    read_candidates,
)
from mlc_notebooks.alignment.candidates import (
    candidate_recall,
    label_similarity,
    nearest_labels,
)
from mlc_notebooks.alignment.trace_methods import max_over_generations
from mlc_notebooks.data.label_files import read_label_file
from mlc_notebooks.data.labels import LabelSet
from mlc_notebooks.data.own_tables import load_table
from mlc_notebooks.data.prompts import LIST_TEMPLATE, described, list_prompts
from mlc_notebooks.data.texts import AnnotatedTexts, rename_labels, reorder_labels
from mlc_notebooks.metrics.many_labels import (
    label_propensities,
    many_label_table,
    ndcg_at,
    occurring_macro_f1,
    precision_at,
    propensity_precision_at,
    recall_at,
)
from mlc_notebooks.models.lm import load_lm
from mlc_notebooks.probing.steps import probe_steps
from mlc_notebooks.probing.trace import Trace


def _task(name, sets, labels, splits=None):
    "A task in which one annotator has chosen these sets."
    ids = [f"{name}{i}" for i in range(len(sets))]
    votes = [labels.vector(chosen)[None] for chosen in sets]
    texts = [f"text {item}" for item in ids]
    return AnnotatedTexts(name, ids, texts, labels, votes, splits=splits or {})


@pytest.fixture(scope="module")
def ranked():
    "Scores with ties and gold sets, each item with at least one label: (300, 40)."
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 12, (300, 40)) / 12
    gold = rng.random((300, 40)) < 0.06
    gold[np.arange(300), rng.integers(0, 40, 300)] = True
    return scores, gold


@pytest.mark.parametrize("k", [1, 3, 5, 40])
def test_ndcg_agrees_with_scikit_learn(ranked, k):
    scores, gold = ranked
    each = [ndcg_score(g[None], s[None], k=k) for s, g in zip(scores, gold)]
    np.testing.assert_allclose(ndcg_at(scores, gold, k), each, atol=1e-12)


def _broken_by_lot(scores, gold, k, rng):
    "How many of the first k labels are right, ties broken by lot: the slow twin."
    lots = rng.random(scores.shape)
    order = np.lexsort((lots, -scores), axis=1)
    return np.take_along_axis(gold, order, axis=1)[:, :k].sum(axis=1)


@pytest.mark.parametrize("k", [1, 5])
def test_tied_ranks_are_worth_what_lots_give_on_average(ranked, k):
    scores, gold = ranked
    rng = np.random.default_rng(0)
    right = np.mean([_broken_by_lot(scores, gold, k, rng) for _ in range(4000)], axis=0)
    np.testing.assert_allclose(precision_at(scores, gold, k) * k, right, atol=0.05)
    np.testing.assert_allclose(recall_at(scores, gold, k) * gold.sum(axis=1), right, atol=0.05)


def test_a_constant_ranks_like_chance_wherever_the_frequent_labels_stand():
    gold = np.zeros((10, 50), bool)
    gold[:, 0] = True  # first in the alphabet
    constant = np.full(gold.shape, 0.3)
    np.testing.assert_allclose(precision_at(constant, gold, 1), 1 / 50)
    np.testing.assert_allclose(recall_at(constant, gold, 10), 10 / 50)


def test_items_without_gold_labels_have_no_value():
    gold = np.array([[0, 0], [1, 0]])
    scores = np.array([[0.3, 0.2], [0.1, 0.9]])
    for metric in (precision_at, recall_at, ndcg_at):
        values = metric(scores, gold, 1)
        assert np.isnan(values[0]) and values[1] == 0


def test_propensities_are_those_of_the_extreme_classification_repository():
    rng = np.random.default_rng(0)
    labels = LabelSet([f"l{i}" for i in range(30)])
    sets = [
        [name for i, name in enumerate(labels) if rng.random() < 1 / (i + 2)] for _ in range(80)
    ]
    train = _task("train", sets, labels)
    counts = train.majority().sum().to_numpy()
    n, a, b = 80, 0.55, 1.5
    inverse = 1 + (np.log(n) - 1) * np.power(b + 1, a) * np.power(counts + b, -a)  # as published
    np.testing.assert_allclose(1 / label_propensities(train), inverse, rtol=1e-12)


def test_propensity_precision_is_at_most_what_the_best_ranking_earns(ranked):
    scores, gold = ranked
    rng = np.random.default_rng(2)
    scores = rng.random(scores.shape)  # no ties: the slow twin below has none
    propensities = rng.uniform(0.1, 1, 40)
    earned, best = propensity_precision_at(scores, gold, propensities, 3)
    for s, g, mine, most in zip(scores, gold, earned, best):
        first = sorted(range(40), key=lambda label: -s[label])[:3]
        worth = sorted((1 / propensities[label] for label in np.flatnonzero(g)), reverse=True)
        assert mine == pytest.approx(sum(1 / propensities[i] for i in first if g[i]) / 3)
        assert most == pytest.approx(sum(worth[:3]) / 3)
    assert (earned <= best + 1e-12).all()
    even = propensity_precision_at(scores, gold, np.ones(40), 3)[0]
    np.testing.assert_allclose(even, precision_at(scores, gold, 3))


def test_macro_f1_leaves_out_labels_that_never_occur():
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(3)
    gold = rng.random((100, 20)) < 0.1
    gold[:, 15:] = False
    found = rng.random((100, 20)) < 0.2
    wanted = f1_score(gold[:, :15], found[:, :15], average="macro")
    assert occurring_macro_f1(found, gold) == pytest.approx(wanted)


def test_the_table_counts_what_it_leaves_out():
    labels = LabelSet(["a", "b", "c", "d"])
    train = _task("train", [["a"], ["a", "b"], ["c"], []], labels)
    task = _task("test", [["a"], [], ["b"], ["a", "b"]], labels, {"train": train})
    scores = task.majority()[["d", "b", "a", "c"]].iloc[::-1] * 0.8  # in another order
    table = many_label_table(scores, task, ks=(1, 2), resamples=50).set_index("metric")
    assert table.loc["P@1", ["value", "n", "excluded"]].tolist() == [1, 3, 1]
    assert table.loc["P@2", "value"] == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)
    a, b = 1 / label_propensities(train)[["a", "b"]]
    earned = a + b + (a + b) / 2  # a and b tie for the text that has both
    assert table.loc["PSP@1", "value"] == pytest.approx(earned / (a + b + b))
    assert table.loc["macro-F1", ["value", "n", "excluded"]].tolist() == [1, 4, 2]
    assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()


def test_the_table_refuses_what_does_not_fit():
    labels = LabelSet(["a", "b"])
    task = _task("test", [["a"], ["b"]], labels)
    scores = pd.DataFrame([[1, 0], [0, 1]], task.ids, list(labels))
    assert "PSP@1" not in set(many_label_table(scores, task, ks=(1,))["metric"])  # no train split
    with pytest.raises(ValueError, match="k is 3"):
        many_label_table(scores, task, ks=(3,))
    with pytest.raises(ValueError, match="no item 'x'"):
        many_label_table(scores.rename({"test0": "x"}), task, ks=(1,))
    with pytest.raises(ValueError, match="propensities has no value of 'b'"):
        many_label_table(scores, task, ks=(1,), propensities=pd.Series({"a": 1.0}))
    with pytest.raises(ValueError, match="NaN|nan"):
        many_label_table(scores.astype(float).mask(scores == 1), task, ks=(1,))
    with pytest.raises(ValueError, match="least 3|at least three"):
        label_propensities(task)


DESCRIBED = LabelSet(["joy", "fear"], descriptions={"fear": "afraid,\nor {labels} worried"})


def test_descriptions_go_where_their_labels_go():
    task = _task("test", [["joy"]], DESCRIBED)
    assert reorder_labels(task, ["fear", "joy"]).labels.descriptions == DESCRIBED.descriptions
    renamed = rename_labels(task, ["gaudium", "metus"]).labels
    assert renamed.descriptions == {"metus": DESCRIBED.descriptions["fear"]}
    assert (
        DESCRIBED == LabelSet(["joy", "fear"]) and len({DESCRIBED, LabelSet(["joy", "fear"])}) == 1
    )
    copied = pickle.loads(pickle.dumps(DESCRIBED))
    assert copied.descriptions == DESCRIBED.descriptions


def test_prompts_show_descriptions_on_request_only():
    plain = list_prompts(["Hm."], LabelSet(["joy", "fear"]))
    assert list_prompts(["Hm."], DESCRIBED) == plain
    (shown,) = list_prompts(["Hm."], DESCRIBED, template=described(LIST_TEMPLATE))
    assert shown.instruction == plain[0].instruction + "fear: afraid, or {labels} worried\n"
    with pytest.raises(ValueError, match="none has one"):
        list_prompts(["Hm."], LabelSet(["joy", "fear"]), template=described(LIST_TEMPLATE))


def test_a_table_takes_its_labels_and_descriptions_from_a_file(tmp_path):
    table = tmp_path / "my.csv"
    table.write_text("text,labels\nI won,joy\nA bear,fear;joy\n")
    labels = tmp_path / "labels.csv"
    labels.write_text('name,description\nfear,"afraid,\nor worried"\njoy,\n', encoding="utf-8-sig")
    task = load_table(table, labels=labels)
    assert task.labels.names == ("fear", "joy")
    assert task.labels.descriptions == {"fear": "afraid,\nor worried"}
    assert task.majority().to_numpy().tolist() == [[0, 1], [1, 1]]
    gzipped = tmp_path / "labels.csv.gz"
    gzipped.write_bytes(gzip.compress(labels.read_bytes()))
    assert read_label_file(gzipped) == task.labels


@pytest.mark.parametrize(
    "content, message",
    [
        ("label,meaning\njoy,glad\n", "no column 'name' among \\['label', 'meaning'\\]"),
        ("name,meaning\njoy,glad\n", "no column 'description'"),
        ("name,description\njoy,glad\n,afraid\n", "row 2 has no name"),
        ("name,description\njoy,glad\njoy,happy\n", "labels.csv: labels 'joy' and 'joy'"),
        ("name,description\njoy,glad,happy\n", "row 1 has more fields"),
        ("name,description\n", "labels.csv: 0 label"),
    ],
)
def test_a_table_of_labels_that_may_be_misread_is_refused(tmp_path, content, message):
    path = tmp_path / "labels.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_label_file(path)


@pytest.fixture(scope="module")
def lm():
    return load_lm("smollm2-135m-emotions")


def test_a_trace_keeps_descriptions(lm, tmp_path):
    labels = LabelSet(["joy", "fear"], descriptions={"fear": "afraid"})
    template = described(LIST_TEMPLATE)
    trace = probe_steps(lm, ["A bear!"], shots=0, labels=labels, template=template, progress=False)
    assert "\nfear: afraid\n" in trace.settings["prompt"]
    trace.save(tmp_path / "kept")
    assert Trace.load(tmp_path / "kept").labels.descriptions == labels.descriptions


TOPICS = {
    "bread": "dough yeast oven",
    "soup": "broth pot spoon",
    "fish": "salmon grill lemon",
    "rice": "grain water steam",
}
COOKING = LabelSet(list(TOPICS), descriptions={"bread": TOPICS["bread"], "fish": TOPICS["fish"]})
WORDS = sorted({word for text in TOPICS.values() for word in [*text.split(), *TOPICS, "other"]})


def _bag_of_words(texts):
    "An encoder that counts words: similarity can be worked out by hand."
    return np.array([[0.1] + [text.split().count(word) for word in WORDS] for text in texts])


def _cooking():
    train = _task("train", [["bread"], ["soup", "fish"], ["rice"]], COOKING)
    train = replace(train, texts=("oven dough", "pot lemon", "steam steam"))
    task = _task("test", [["bread"], ["soup", "fish"], []], COOKING, {"train": train})
    return replace(task, texts=("yeast in the oven", "a lemon and a spoon", "Oven  DOUGH"))


def test_similarity_is_the_cosine_with_names_and_nearest_examples():
    task = _cooking()
    near = {
        by: label_similarity(task, by=by, encoder=_bag_of_words) for by in ("names", "examples")
    }

    def cosine(first, second):
        a, b = _bag_of_words([first, second])
        return a @ b / np.sqrt(a @ a * (b @ b))

    names = near["names"]
    wanted = cosine(task.texts[1], "fish: salmon grill lemon")  # with its description
    assert names.loc["test1", "fish"] == pytest.approx(wanted)
    assert names.loc["test1", "soup"] == pytest.approx(cosine(task.texts[1], "soup"))
    examples = near["examples"]
    assert examples.loc["test1", "soup"] == pytest.approx(cosine(task.texts[1], "pot lemon"))
    assert (examples["bread"] == -1).all()  # its only example is also a text under test
    ranks = 1 / (60 + names.rank(axis=1, ascending=False))
    ranks += 1 / (60 + examples.rank(axis=1, ascending=False))
    both = label_similarity(task, encoder=_bag_of_words)
    np.testing.assert_allclose(both, ranks)


def test_candidates_and_their_recall():
    task = _cooking()
    near = label_similarity(task, by="names", encoder=_bag_of_words)
    chosen = nearest_labels(near, 2)
    assert chosen.sum(axis=1).tolist() == [2, 2, 2]
    assert chosen.loc["test0", "bread"] == 1 and chosen.loc["test1", "fish"] == 1
    table = candidate_recall(near, task, ks=(1, 4)).set_index("k")
    assert table.loc[4, ["recall", "n", "excluded"]].tolist() == [1, 2, 1]
    assert nearest_labels(near * 0, 3).iloc[0].tolist() == [1, 1, 1, 0]  # ties in label order
    with pytest.raises(ValueError, match="no train split|no examples"):
        label_similarity(["Hm."], COOKING, by="examples", encoder=_bag_of_words)


def test_candidates_are_read_as_probe_steps_reads_them(lm):
    task = _cooking()
    chosen = nearest_labels(label_similarity(task, encoder=_bag_of_words), 2)
    shown = [("Boil it.", ["soup"]), ("Water and grain.", ["rice", "bread"])]
    reading = read_candidates(lm, task, chosen.iloc[::-1], shown, progress=False)
    for item, text, row in zip(task.ids, task.texts, chosen.to_numpy()):
        own = LabelSet([*COOKING.chosen(row), ANOTHER])
        pairs = []
        for shown_text, names in shown:
            listed = [name for name in names if name in own]
            pairs.append((shown_text, listed + [ANOTHER] * (len(listed) < len(names))))
        trace = probe_steps(lm, [text], 0, labels=own, demonstrations=pairs, progress=False)
        wanted = max_over_generations(trace).iloc[0]
        np.testing.assert_allclose(
            reading.probs.loc[item, list(own)[:-1]], wanted.iloc[:-1], atol=1e-4
        )
        assert reading.another[item] == pytest.approx(wanted[ANOTHER], abs=1e-4)
    marginals = reading.marginals()
    outside = marginals.to_numpy()[reading.read.to_numpy() == 0].reshape(3, -1)
    np.testing.assert_allclose(outside.sum(axis=1), reading.another)
    assert (reading.marginals("zero") <= marginals).all(axis=None)


def test_candidates_are_asked_about_one_by_one(lm):
    task = _cooking()
    chosen = nearest_labels(label_similarity(task, encoder=_bag_of_words), 2)
    asked = ask_candidates(lm, task, chosen, progress=False)
    alone = ask_candidates(lm, task.select([1]), chosen.loc[["test1"]], progress=False)
    np.testing.assert_allclose(asked.probs.loc["test1"], alone.probs.loc["test1"], atol=1e-4)
    assert ((asked.probs > 0) == (chosen == 1)).all(axis=None)
    assert asked.another.isna().all()


def test_a_reading_of_candidates_goes_on_where_it_was_stopped(lm, tmp_path, monkeypatch):
    task = _cooking()
    chosen = nearest_labels(label_similarity(task, encoder=_bag_of_words), 2)
    whole = read_candidates(lm, task, chosen, progress=False, folder=tmp_path / "run")
    monkeypatch.setattr(type(lm.model), "forward", None)  # nothing is left to compute
    again = read_candidates(lm, task, chosen, progress=False, folder=tmp_path / "run")
    pd.testing.assert_frame_equal(whole.probs, again.probs)
    with pytest.raises(ValueError, match="other settings"):
        read_candidates(lm, task, 1 - chosen, progress=False, folder=tmp_path / "run")


def test_a_reading_refuses_what_does_not_fit_before_the_model_runs(lm, monkeypatch):
    task = _cooking()
    chosen = nearest_labels(label_similarity(task, encoder=_bag_of_words), 2)
    monkeypatch.setattr(type(lm.model), "forward", None)
    for candidates, message in (
        (chosen.iloc[:2], "not those of the 3 texts"),
        (chosen * 0, "'test0' has no candidates"),
        (chosen * 2, "give 0 or 1"),
        (chosen.drop(columns="rice"), "no column 'rice'"),
    ):
        with pytest.raises(ValueError, match=message):
            read_candidates(lm, task, candidates, progress=False)
    with pytest.raises(ValueError, match="method is 'marginals'"):
        read_candidates(lm, task, chosen, method="marginals", progress=False)
    with pytest.raises(ValueError, match="which is a label of"):
        read_candidates(lm, task, chosen, another="soup", progress=False)
    long = replace(task, texts=(*task.texts[:2], "word " * 9000))
    with pytest.raises(ValueError, match="item 'test2': its prompt of"):
        read_candidates(lm, long, chosen, progress=False)
