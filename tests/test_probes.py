"""Linear probes on states whose content is known, with the controls beside them."""

import warnings

import numpy as np
import pandas as pd
import pytest
from scipy.stats import special_ortho_group
from sklearn.decomposition import TruncatedSVD
from sklearn.metrics import f1_score
from sklearn.preprocessing import StandardScaler

from mlc_notebooks.alignment import fit_on_states, probe_predictions
from mlc_notebooks.data import AnnotatedTexts, LabelSet
from mlc_notebooks.probing import Trace

LABELS = LabelSet(["anger", "fear", "joy", "sadness"])
ITEMS, WIDTH = 300, 48


def make_task(gold, labels=LABELS, texts=None) -> AnnotatedTexts:
    "One annotator an item; gold 0/1 (n, L)."
    ids = [f"item {i}" for i in range(len(gold))]
    return AnnotatedTexts(
        "made",
        ids,
        texts or [f"text {i}" for i in range(len(gold))],
        labels,
        [row[None] for row in gold],
    )


def make_trace(task, outcomes, states, **settings) -> Trace:
    "A trace of one step a text; states (n, layers, width)."
    items = pd.DataFrame({"text": task.texts, "outcomes": outcomes}, pd.Index(task.ids, name="id"))
    steps = pd.DataFrame({"example": task.ids, "step": 1})
    return Trace(
        task.labels,
        items,
        steps,
        np.zeros((len(task), len(task.labels.outcomes))),
        settings,
        states,
    )


def in_directions(values, rng, strength=2.0):
    "0/1 values (n, k) along k random orthogonal directions, in noise: (n, WIDTH)."
    axes = special_ortho_group.rvs(WIDTH, random_state=rng)[: values.shape[1]]
    return strength * (2.0 * values - 1) @ axes * np.sqrt(WIDTH) / 2 + rng.normal(
        size=(len(values), WIDTH)
    )


def write(values, order):
    "Outcomes of 0/1 rows, written in an order of labels of each row's own."
    return [
        tuple(LABELS.names[i] for i in places if row[i]) or ("none",)
        for row, places in zip(values, order)
    ]


@pytest.fixture(scope="module")
def made():
    """Gold and written sets are independent; layer 0 is noise, layer 1 holds gold, layer 2 the
    written set, 3 the later labels.
    """
    rng = np.random.default_rng(7)
    gold, outputs = rng.integers(0, 2, (2, ITEMS, len(LABELS)), dtype=np.uint8)
    outcomes = write(outputs, rng.permuted(np.tile(np.arange(len(LABELS)), (ITEMS, 1)), axis=1))
    later = np.array([LABELS.vector(names[1:]) for names in outcomes])
    states = [
        rng.normal(size=(ITEMS, WIDTH)),
        *(in_directions(values, rng) for values in (gold, outputs, later)),
    ]
    task = make_task(gold)
    return make_trace(task, outcomes, np.stack(states, 1)), task


@pytest.fixture(scope="module")
def found(made):
    return probe_predictions(*made)


def micro(held):
    return f1_score(held.truth, held.predicted, average="micro", zero_division=0)


@pytest.mark.parametrize("layer, target", [(1, "Gold"), (2, "Pred"), (3, "Pred 2+")])
def test_a_probe_finds_what_is_linearly_there(found, layer, target):
    """And no control does: the shuffled probe is at chance, as is the probe of a layer that holds
    something else.
    """
    chance = 0.6  # a fair coin for each of the labels that half of the items have scores .5
    assert micro(found[layer, target, "probe"]) > 0.95
    assert micro(found[layer, target, "shuffled"]) < chance
    assert micro(found[-1, target, "majority"]) < chance
    assert micro(found[0, target, "probe"]) < chance


def test_what_one_layer_holds_is_not_in_another(found):
    assert micro(found[1, "Pred", "probe"]) < 0.6 and micro(found[2, "Gold", "probe"]) < 0.6


def test_xor_is_not_linearly_there():
    """Each label is the XOR of two features that stand plainly in the state: every pair of them is
    as frequent with as without.
    """
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 2, (ITEMS, 2 * len(LABELS)), dtype=np.uint8)
    gold = bits[:, ::2] ^ bits[:, 1::2]
    task = make_task(gold)
    found = probe_predictions(
        make_trace(task, task.gold_sets(), in_directions(bits, rng)[:, None]), task
    )
    probe, shuffled = micro(found[0, "Gold", "probe"]), micro(found[0, "Gold", "shuffled"])
    assert probe < 0.65 and abs(probe - shuffled) < 0.15


def test_the_models_own_answers_are_scored_on_the_same_items(made, found):
    trace, task = made
    performance = found[-1, "Perf", "outputs"]
    held = performance.truth.index
    assert (performance.predicted == trace.predictions().loc[held]).all(axis=None)
    assert (performance.truth == task.majority().loc[held]).all(axis=None)
    for key in ((1, "Gold", "probe"), (2, "Pred", "shuffled"), (-1, "Gold", "majority")):
        assert list(found[key].truth.index) == list(held)
    assert len(held) == round(0.3 * ITEMS)


def test_later_labels_are_those_after_the_first_written(made, found):
    trace, task = made
    truth = found[3, "Pred 2+", "probe"].truth
    assert 0 < len(truth) < len(found[3, "Pred", "probe"].truth)
    for item in truth.index:
        assert LABELS.chosen(truth.loc[item]) == tuple(sorted(trace.items["outcomes"][item][1:]))


def test_the_majority_is_the_most_frequent_set_of_the_training_part():
    gold = np.array([[1, 1, 0, 0]] * 15 + [[0, 0, 1, 0]] * 12 + [[0, 0, 0, 0]] * 13, dtype=np.uint8)
    task = make_task(gold)
    found = probe_predictions(
        make_trace(task, task.gold_sets(), np.zeros((40, 1, 4))), task, test_share=0.1
    )
    held = found[-1, "Gold", "majority"]
    counts = task.majority().drop(held.truth.index).value_counts()
    assert (held.predicted == np.array(counts.index[0])).all(axis=None) and len(held.predicted) == 4


def test_the_seed_decides_everything(made):
    trace, task = made
    one, same, other = (probe_predictions(trace, task, layers=[1], seed=seed) for seed in (3, 3, 4))
    for key in one:
        for table, again in zip(one[key], same[key]):
            pd.testing.assert_frame_equal(table, again)
    assert list(one[1, "Gold", "probe"].truth.index) != list(other[1, "Gold", "probe"].truth.index)


def test_labels_of_one_class_are_predicted_constant_and_quietly():
    rng = np.random.default_rng(2)
    gold = rng.integers(0, 2, (60, 4), dtype=np.uint8)
    gold[:, 1], gold[:, 2] = 0, 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probe = fit_on_states(rng.normal(size=(60, 12)), gold, LABELS)
        prob = probe(rng.normal(size=(5, 12)))
        task = make_task(gold)
        probe_predictions(make_trace(task, task.gold_sets(), rng.normal(size=(60, 2, 12))), task)
        probe_predictions(
            make_trace(task, task.gold_sets(), np.ones((60, 1, 12))), task
        )  # nothing to tell apart
    assert prob.shape == (5, 4) and ((prob > 0) & (prob < 1))[:, [0, 3]].all()
    np.testing.assert_allclose(prob[:, 1], 0.5 / 61)  # half a text with the label is added ...
    np.testing.assert_allclose(prob[:, 2], 60.5 / 61)  # ... and half a text without it


@pytest.mark.parametrize("items, width, kept", [(50, 40, 10), (20, 400, 19), (20, 2, 1)])
def test_the_svd_takes_what_the_data_allow(items, width, kept):
    "A quarter of the width, or one direction fewer than there are items."
    rng = np.random.default_rng(0)
    states = rng.normal(size=(items, width))
    gold = rng.integers(0, 2, (items, len(LABELS)))
    weight = fit_on_states(states, gold, LABELS).weight * states.std(axis=0)[:, None]
    axes = TruncatedSVD(kept, random_state=0).fit(StandardScaler().fit_transform(states))
    within = axes.components_.T @ (axes.components_ @ weight)
    np.testing.assert_allclose(within, weight, atol=1e-6)
    fewer = axes.components_[:-1]
    assert kept == 1 or not np.allclose(fewer.T @ (fewer @ weight), weight, atol=1e-3)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("several", [0, 6])
def test_too_few_texts_with_several_labels_leave_an_empty_table(several):
    gold = np.eye(4, dtype=np.uint8)[np.arange(40) % 4]
    task = make_task(gold)
    outcomes = [("joy", "fear")] * several + [("anger",)] * (40 - several)
    found = probe_predictions(
        make_trace(task, outcomes, np.random.default_rng(0).normal(size=(40, 1, 8))), task
    )
    for key in ((0, "Pred 2+", "probe"), (0, "Pred 2+", "shuffled"), (-1, "Pred 2+", "majority")):
        assert [table.shape for table in found[key]] == [(0, 4)] * 3
    assert len(found[0, "Pred", "probe"].truth) == 12


def test_the_same_text_is_never_on_both_sides():
    texts = [f"Text {i // 4}" if i % 2 else f" text  {i // 4} " for i in range(80)]
    task = make_task(np.eye(4, dtype=np.uint8)[np.arange(80) % 4], texts=texts)
    held = probe_predictions(make_trace(task, task.gold_sets(), np.ones((80, 1, 4))), task)[
        -1, "Perf", "outputs"
    ].truth.index
    number = np.arange(80) // 4
    is_held = np.isin(task.ids, held)
    assert 0 < is_held.sum() < 80 and not set(number[is_held]) & set(number[~is_held])


def test_single_label_tasks_get_one_label_each():
    rng, labels = np.random.default_rng(5), LabelSet(["yes", "no", "perhaps"], None)
    gold = np.eye(3, dtype=np.uint8)[rng.integers(0, 3, 120)]
    task = make_task(gold, labels)
    found = probe_predictions(
        make_trace(task, task.gold_sets(), in_directions(gold, rng)[:, None]), task
    )
    assert (found[0, "Gold", "probe"].predicted.sum(axis=1) == 1).all() and micro(
        found[0, "Gold", "probe"]
    ) > 0.95
    assert not len(found[0, "Pred 2+", "probe"].truth)


def test_step_1_alone_is_enough(made):
    "Traces of several steps, and of first steps only, give the same states."
    trace, task = made
    double = pd.DataFrame({"example": np.repeat(task.ids, 2), "step": np.tile([1, 2], ITEMS)})
    whole = Trace(
        LABELS, trace.items, double, trace.logprobs, {}, np.repeat(trace.hidden, 2, axis=0)
    )
    lean = Trace(LABELS, trace.items, double, trace.logprobs, {"hidden": "first"}, trace.hidden)
    for layer in (0, 3):
        assert whole.states(layer).equals(lean.states(layer)) and whole.states(layer).equals(
            trace.states(layer)
        )
    assert whole.states(0, step=2).equals(whole.states(0))
    with pytest.raises(ValueError, match="step 1 only, not of step 2"):
        lean.states(0, step=2)


def test_the_tasks_order_of_labels_counts(made):
    "A trace made with the labels listed in another order gives the same tables."
    trace, task = made
    turned = LABELS.reorder(LABELS.names[::-1])
    again = probe_predictions(
        Trace(turned, trace.items, trace.steps, trace.logprobs, {}, trace.hidden), task, layers=2
    )
    for key, held in probe_predictions(trace, task, layers=np.array([2])).items():
        for one, other in zip(held, again[key]):
            pd.testing.assert_frame_equal(one, other)


def test_what_is_refused(made):
    trace, task = made
    with pytest.raises(ValueError, match=r"probe_steps\(\.\.\., hidden=True\)"):
        probe_predictions(Trace(LABELS, trace.items, trace.steps, trace.logprobs, {}), task)
    with pytest.raises(ValueError, match="no layer 4: layers go from 0"):
        probe_predictions(trace, task, layers=[0, 4])
    with pytest.raises(ValueError, match="no layer 'first': .* or pass 'last'"):
        probe_predictions(trace, task, layers="first")
    with pytest.raises(ValueError, match="no layer -1"):
        trace.states(-1)
    with pytest.raises(ValueError, match="has no item 'item 5'"):
        probe_predictions(trace, task.select(range(5)))
    for share in (0, 1, 0.99, -1):
        with pytest.raises(ValueError, match="at least 10 and 1"):
            probe_predictions(trace, task, test_share=share)
    nobody = make_task(task.majority().to_numpy())
    bare = [votes if i != 4 else votes[:0] for i, votes in enumerate(nobody.annotations)]
    with pytest.raises(ValueError, match="item 'item 4' has no annotations"):
        probe_predictions(trace, AnnotatedTexts("made", nobody.ids, nobody.texts, LABELS, bare))


def test_only_the_traces_own_items_need_annotations(made):
    "An item of the task that the trace does not have may lack them."
    trace, task = made
    more = AnnotatedTexts(
        "made",
        (*task.ids, "unasked"),
        (*task.texts, "?"),
        LABELS,
        (*task.annotations, np.zeros((0, 4))),
    )
    assert (
        probe_predictions(trace, more, layers="last").keys()
        == probe_predictions(trace, task, layers=[3]).keys()
    )
