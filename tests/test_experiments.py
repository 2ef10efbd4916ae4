"""Experiments on the prompt: their pure parts by hand, and one small run of each on the tuned
model."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from mlc_notebooks.data import (
    AnnotatedTexts,
    LabelSet,
    demonstrations_for,
    list_prompts,
    load_task,
    rename_labels,
    reorder_labels,
    unannotated,
)
from mlc_notebooks.metrics import (
    derangement,
    experiments,
    flip_demonstrations,
    unrelated_words,
    vary_demonstration_labels,
    vary_label_order,
    vary_multi_share,
    vary_shots,
)
from mlc_notebooks.models import AnswerTokens

ASK = dict(reading="first_token", progress=False)
TIDY = ["seed", "quantity", "value", "low", "high", "n"]


@pytest.fixture(scope="module")
def task():
    "Eight texts of BRIGHTER English, evenly without, with one and with several labels."
    return load_task("brighter-eng").sample(8, seed=1, kind="main")


@pytest.fixture
def probed(monkeypatch):
    "The calls of `probe_steps` and their traces, in the order in which they ran."
    calls, probe_steps = [], experiments.probe_steps

    def spy(lm, task, shots, **options):
        trace = probe_steps(lm, task, shots, **options)
        calls.append((task, options, trace))
        return trace

    monkeypatch.setattr(experiments, "probe_steps", spy)
    return calls


@pytest.fixture
def no_model(monkeypatch):
    "Fails where the model would run."
    monkeypatch.setattr(
        experiments, "probe_steps", lambda *args, **options: pytest.fail("model time was spent")
    )


def value_of(table, quantity, **keys):
    rows = table[
        (table["quantity"] == quantity) & (table[list(keys)] == pd.Series(keys)).all(axis=1)
    ]
    assert len(rows) == 1
    return rows["value"].iloc[0]


@pytest.mark.parametrize("size", [2, 3, 7, 27])
def test_a_derangement_moves_every_label(size):
    labels = LabelSet([f"label {i}" for i in range(size)])
    for seed in range(20):
        swaps = derangement(labels, seed)
        assert list(swaps) == list(labels) and sorted(swaps.values()) == sorted(labels)
        assert all(name != other for name, other in swaps.items())
        assert derangement(labels, seed) == swaps
    assert size == 2 or len({tuple(derangement(labels, seed).values()) for seed in range(20)}) > 1


def test_flipped_demonstrations_by_hand():
    labels, swaps = LabelSet(["a", "b", "c"]), {"a": "c", "b": "a", "c": "b"}
    shown = [("one", ("a",)), ("two", ("a", "b")), ("three", ()), ("four", ("a", "b", "c"))]
    assert flip_demonstrations(shown, labels, swaps) == [
        ("one", ("c",)),
        ("two", ("a", "c")),
        ("three", ()),
        ("four", ("a", "b", "c")),
    ]


def test_reordering_keeps_votes_and_gold_sets_in_every_split(task):
    turned = reorder_labels(task, ["joy", "surprise", "anger", "sadness", "fear"])
    for old, new in [
        (task, turned),
        *((task.splits[name], turned.splits[name]) for name in task.splits),
    ]:
        assert list(new.labels) == ["joy", "surprise", "anger", "sadness", "fear"]
        pd.testing.assert_frame_equal(new.distribution()[list(old.labels)], old.distribution())
        assert [set(chosen) for chosen in new.gold_sets()] == [
            set(chosen) for chosen in old.gold_sets()
        ]
    assert task.labels.names == (
        "anger",
        "fear",
        "joy",
        "sadness",
        "surprise",
    )  # the old one is left alone
    with pytest.raises(ValueError, match="no reordering"):
        reorder_labels(task, ["joy"])


def test_renaming_keeps_columns(task):
    named = rename_labels(task, ["v", "w", "x", "y", "z"])
    assert np.array_equal(named.majority(), task.majority()) and np.array_equal(
        named.pool.majority(), task.pool.majority()
    )
    assert list(named.pool.labels) == ["v", "w", "x", "y", "z"] and named.labels.none == "none"


@pytest.mark.parametrize("fmt", ["json", "comma", "polysyndeton"])
def test_unrelated_words_begin_differently(tuned_lm, fmt):
    labels = LabelSet(["Anchor", "button", "joy"])
    words = unrelated_words(tuned_lm, labels, seed=3, fmt=fmt)
    assert words == sorted(words) and len(set(words)) == 3 and not {"anchor", "button"} & set(words)
    assert AnswerTokens(tuned_lm, LabelSet(words), fmt).collisions() == []


def test_multi_share(tuned_lm, task, probed):
    table = vary_multi_share(tuned_lm, task, shares=(0, 1), shots=2, seeds=(0, 1), **ASK)
    assert list(table.columns) == ["share", *TIDY] and table["n"].dtype.kind == "i"
    assert table[["share", "seed"]].drop_duplicates().to_numpy().tolist() == [
        [0, 0],
        [0, 1],
        [1, 0],
        [1, 1],
    ]
    assert (table.loc[~table["quantity"].str.contains("demonstrations"), "n"] == 8).all()
    for share in (0, 1):
        assert (
            value_of(table, "share of demonstrations with several labels", share=share, seed=0)
            == share
        )
        assert (
            value_of(table, "mean number of gold labels", share=share, seed=0)
            == task.majority().sum(axis=1).mean()
        )
    for _, options, trace in probed:
        share = float(np.mean([len(chosen) > 1 for _, chosen in options["demonstrations"]]))
        found = value_of(table, "mean number of labels written", share=share, seed=options["seed"])
        assert found == trace.predictions().sum(axis=1).mean()
        assert not {text for text, _ in options["demonstrations"]} & set(task.texts)
    assert len({trace.settings["prompt_hash"] for *_, trace in probed}) == 4


def test_label_order(tuned_lm, task, probed):
    table = vary_label_order(tuned_lm, task, seeds=(0,), shots=2, **ASK)
    assert list(table.columns) == ["order", "listed", *TIDY] and list(table["order"].unique()) == [
        "alphabetical",
        "random",
        "reverse",
    ]
    assert (
        table.loc[table["order"] == "reverse", "listed"]
        .eq("surprise, sadness, joy, fear, anger")
        .all()
    )
    instructions = {", ".join(asked.labels): trace.settings["prompt"] for asked, _, trace in probed}
    assert (
        "per input: surprise, sadness, joy, fear and anger."
        in instructions["surprise, sadness, joy, fear, anger"]
    )
    texts = [sorted(text for text, _ in options["demonstrations"]) for _, options, _ in probed]
    assert texts[0] == texts[1] == texts[2]  # the orders differ, not what is shown
    for asked, options, trace in probed:
        several = [[name for name in row if name != "none"] for row in trace.items["outcomes"]]
        several = [row for row in several if len(row) > 1]
        in_order = [row == [name for name in asked.labels if name in row] for row in several]
        row = table[
            (table["listed"] == ", ".join(asked.labels))
            & (table["quantity"] == "instruction's order")
        ].iloc[0]
        assert row["n"] == len(several) > 0 and row["value"] == np.mean(in_order)
        for _, chosen in options["demonstrations"]:
            assert list(chosen) == [name for name in asked.labels if name in chosen]


def test_shots(tuned_lm, task, probed):
    table = vary_shots(tuned_lm, task, shots=(0, 2), seeds=(0, 1), **ASK)
    assert list(table.columns) == ["shots", *TIDY]
    assert table[["shots", "seed"]].drop_duplicates().to_numpy().tolist() == [
        [0, 0],
        [2, 0],
        [2, 1],
    ]
    assert list(table["quantity"].unique()) == [
        "example-F1",
        "distinct answers",
        "share of outputs with several labels",
        "top probability, step 1",
        "entropy (bits), step 1",
    ]
    assert (table["n"] == 8).all() and table["value"].notna().all()
    assert value_of(table, "entropy (bits), step 1", shots=0) != value_of(
        table, "entropy (bits), step 1", shots=2, seed=0
    )
    assert [len(options["demonstrations"]) for _, options, _ in probed] == [
        2,
        2,
        0,
    ]  # the longest prompt goes first


def test_demonstration_labels(tuned_lm, task, probed):
    table = vary_demonstration_labels(tuned_lm, task, shots=2, seeds=(0,), **ASK)
    assert list(table.columns) == ["kind", *TIDY] and list(table["kind"].unique()) == [
        "gold",
        "flipped",
        "unrelated",
    ]
    assert (table.groupby("kind", sort=False)["quantity"].apply(list).map(len) == 10).all()
    labelled = int(task.majority().any(axis=1).sum())
    at_step_one = table[table["quantity"] == "probability at step 1, gold"]
    assert (
        0 < labelled < 8
        and (at_step_one["n"] == labelled).all()
        and at_step_one["value"].nunique() == 3
    )
    swaps = derangement(task.labels, 0)
    shown = demonstrations_for(task, 2, seed=0)
    by_kind = {
        "unrelated"
        if asked.labels != task.labels
        else "gold"
        if options["demonstrations"] == shown
        else "flipped": (asked, options["demonstrations"])
        for asked, options, _ in probed
    }
    assert by_kind["flipped"][1] == flip_demonstrations(shown, task.labels, swaps) != shown
    gold, flipped = (
        list_prompts(["x"], asked.labels, demos, asked.label_noun)[0]
        for asked, demos in (by_kind["gold"], by_kind["flipped"])
    )
    assert gold.instruction == flipped.instruction and gold.demonstrations != flipped.demonstrations
    asked, demonstrations = by_kind["unrelated"]
    back = dict(zip(asked.labels, task.labels))
    assert [
        (text, tuple(back[name] for name in chosen)) for text, chosen in demonstrations
    ] == shown


def test_a_model_that_follows_flipped_demonstrations_scores_on_the_deranged_labels(
    tuned_lm, task, monkeypatch
):
    """With answers made by hand: exactly the deranged gold labels, written in the labels of
    whatever task is asked."""
    swaps, gold = derangement(task.labels, 0), task.majority()
    deranged = [tuple(swaps[name] for name in chosen) for chosen in task.gold_sets()]

    def obedient(lm, asked, shots, **options):
        called = dict(zip(task.labels, asked.labels))
        sets = deranged if asked.labels == task.labels else task.gold_sets()
        outcomes = [tuple(called[name] for name in chosen) or ("none",) for chosen in sets]
        steps = pd.DataFrame({"example": task.ids, "step": 1, "mass": 1.0, "go": 0.5, "stop": 0.5})
        items = pd.DataFrame(
            {"outcomes": outcomes, "flags": [()] * 8}, pd.Index(task.ids, name="id")
        )
        return experiments.Trace(asked.labels, items, steps, np.zeros((8, 6)), {})

    monkeypatch.setattr(experiments, "probe_steps", obedient)
    table = vary_demonstration_labels(
        tuned_lm, task, kinds=("flipped", "unrelated"), shots=2, progress=False
    )
    for score in ("example-F1", "micro-F1", "share of written labels"):
        assert value_of(table, f"{score}, deranged gold", kind="flipped") == 1
        assert value_of(table, f"{score}, gold", kind="unrelated") == 1
    for target in ("gold", "deranged gold"):  # a flat step gives each outcome a sixth
        expected = gold.sum(axis=1)[gold.any(axis=1)].mean() / 6
        assert np.isclose(
            value_of(table, f"probability at step 1, {target}", kind="flipped"), expected
        )


@pytest.mark.parametrize(
    "experiment, options, message",
    [
        (
            vary_multi_share,
            dict(shares=(0, 1.2)),
            "a value of shares is 1.2: give a number of at least 0",
        ),
        (vary_multi_share, dict(shares=()), r"shares is \(\): give a list"),
        (
            vary_multi_share,
            dict(shots=0),
            "a value of shots is 0: give a whole number of at least 1",
        ),
        (vary_multi_share, dict(multi_share=0.2), "sets multi_share itself"),
        (
            vary_label_order,
            dict(orders=("alphabetical", "sorted")),
            "a value of orders is 'sorted': choose one of .*reverse",
        ),
        (vary_label_order, dict(orders="random"), "orders is 'random': give a list"),
        (vary_label_order, dict(demonstrations=[]), "sets demonstrations itself"),
        (vary_shots, dict(shots=(0, -1)), "a value of shots is -1"),
        (vary_shots, dict(shots=(0, 2.5)), "a value of shots is 2.5"),
        (vary_shots, dict(shots=(0, 10**6)), "lower shots"),
        (vary_shots, dict(seeds=0), "seeds is 0: give a list"),
        (
            vary_demonstration_labels,
            dict(kinds=("gold", "wrong")),
            "a value of kinds is 'wrong': choose one of .*flipped",
        ),
        (vary_demonstration_labels, dict(shots=0), "a value of shots is 0"),
        (vary_demonstration_labels, dict(seed=3), "sets seed itself"),
    ],
)
def test_what_cannot_be_asked_costs_no_model_time(
    tuned_lm, task, no_model, experiment, options, message
):
    with pytest.raises(ValueError, match=message):
        experiment(tuned_lm, task, **options)


@pytest.mark.parametrize(
    "experiment", [vary_multi_share, vary_label_order, vary_shots, vary_demonstration_labels]
)
def test_a_task_without_train_split(tuned_lm, task, no_model, experiment):
    with pytest.raises(ValueError, match="no train split"):
        experiment(tuned_lm, replace(task, splits={}))


@pytest.mark.parametrize("experiment", [vary_multi_share, vary_shots, vary_demonstration_labels])
def test_a_task_without_gold_labels(tuned_lm, task, no_model, experiment):
    bare = unannotated(task.texts, task.labels, task.ids, task.name, splits=task.splits)
    with pytest.raises(ValueError, match="has no annotations"):
        experiment(tuned_lm, bare)


def test_single_label_tasks(tuned_lm, no_model):
    votes = [np.eye(3, dtype=np.uint8)[[i]] for i in range(3)]
    single = AnnotatedTexts(
        "kinds", "123", ["a", "b", "c"], LabelSet(["x", "y", "z"], none=None), votes
    )
    single = replace(single, splits={"train": replace(single, texts=["d", "e", "f"])})
    for experiment in (vary_multi_share, vary_label_order):
        with pytest.raises(ValueError, match="exactly one label a text"):
            experiment(tuned_lm, single, shots=1)
