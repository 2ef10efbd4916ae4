"""Who answered: ids beside the answers, carried through everything that is done to a task."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from mlc_notebooks.data import (
    AnnotatedTexts,
    LabelSet,
    annotated,
    annotator_ids,
    answer_table,
    answers_of,
    load_table,
    load_task,
    rename_labels,
    reorder_labels,
    training_data,
    unannotated,
    without_answers,
    without_texts,
)

EMOTIONS = LabelSet(["anger", "joy"])
NAMES = ["Ann", "Bo", "Cy", "Di"]


def made(n=40, seed=0) -> AnnotatedTexts:
    "n texts, each answered by none to four people."
    rng = np.random.default_rng(seed)
    votes = []
    people = []
    for _ in range(n):
        who = rng.permutation(NAMES)[: rng.integers(0, 5)]
        people.append([str(name) for name in who])
        votes.append(rng.integers(0, 2, (len(who), 2)).astype(np.uint8))
    ids = [f"i{k}" for k in range(n)]
    texts = [f"text {k}" for k in range(n)]
    test = AnnotatedTexts("made", ids, texts, EMOTIONS, votes, annotators=people)
    train = replace(test.select(range(10)), texts=[f"train {k}" for k in range(10)])
    return replace(test, splits={"train": train, "test": test})


def said(task) -> dict:
    "Who said what about which text, with the labels by name."
    found = {}
    for item, rows, people in zip(task.ids, task.annotations, task.annotators, strict=True):
        for row, person in zip(rows, people, strict=True):
            found[item, person] = set(task.labels.chosen(row))
    return found


@pytest.mark.parametrize(
    "change",
    [
        lambda task: task.sample(25, seed=3),
        lambda task: task.select([7, 3, 30]),
        lambda task: task.at(["i9", "i2"]),
        lambda task: task.split("train"),
        lambda task: task.pool,
        annotated,
        lambda task: annotated(task).sample(20, seed=1, kind="main"),
        lambda task: without_texts(task, ["text 3"]),
        lambda task: reorder_labels(task, ["joy", "anger"]),
        lambda task: reorder_labels(task, ["joy", "anger"]).pool,
        lambda task: training_data(task.split("train"))[0],
        lambda task: without_answers(task, ["i0", "i1"]),
    ],
)
def test_ids_stay_beside_their_answers(change):
    task = made()
    answers = said(change(task))
    assert answers
    assert answers == {key: chosen for key, chosen in said(task).items() if key in answers}


def test_renamed_labels():
    renamed = rename_labels(made(), ["wut", "freude"])
    back = rename_labels(renamed, ["anger", "joy"])
    assert said(back) == said(made()) and said(renamed.pool).keys() == said(made().pool).keys()


def test_nobody_is_named_where_nobody_is_known():
    task = unannotated(["a", "b"], EMOTIONS)
    assert task.annotators is None and task.select([1]).annotators is None
    assert without_answers(task, ["0"]).annotators is None
    with pytest.raises(ValueError, match="texts does not say who answered"):
        answer_table(task)


@pytest.mark.parametrize(
    "annotators, message",
    [
        ([["Ann", "Bo"]], "made: 2 items and annotators of 1"),
        ([["Ann"], ["Ann"]], "item 'a' has 2 answers and 1 annotators"),
        ([["Ann", "Ann"], ["Bo"]], "item 'a' names an annotator twice"),
        ([["Ann", 7], ["Bo"]], "item 'a' has the annotator 7"),
        ([["Ann", " "], ["Bo"]], "item 'a' has the annotator ' '"),
    ],
)
def test_ids_that_do_not_fit(annotators, message):
    votes = [np.array([[1, 0], [0, 0]]), np.array([[0, 1]])]
    with pytest.raises(ValueError, match=message):
        AnnotatedTexts("made", ["a", "b"], ["x", "y"], EMOTIONS, votes, annotators=annotators)


def test_one_string_is_no_list_of_people():
    votes = [np.array([[1, 0], [0, 0], [1, 1]])]
    with pytest.raises(TypeError, match="one string, 'Ann'"):
        AnnotatedTexts("made", ["a"], ["x"], EMOTIONS, votes, annotators=["Ann"])


def test_the_table_of_answers():
    task = made()
    table = answer_table(task)
    assert table.index.names == ["id", "annotator"] and table.index.is_unique
    assert {key: set(row.index[row == 1]) for key, row in table.iterrows()} == said(task)
    means = table.groupby("id", sort=False).mean()
    assert np.allclose(means, task.distribution().loc[means.index])


@pytest.mark.parametrize("name", NAMES)
def test_one_persons_task(name):
    task = made()
    own = answers_of(task, name)
    expected = {key: chosen for key, chosen in said(task).items() if key[1] == name}
    assert said(own) == expected and said(own.split("test")) == expected
    assert said(own.pool) == {key: v for key, v in said(task.pool).items() if key[1] == name}


def test_somebody_unknown():
    with pytest.raises(ValueError, match="choose one of Ann, Bo, Cy, Di"):
        answers_of(made(), "Eve")


def test_answers_taken_away():
    task = made()
    item = next(item for item, people in zip(task.ids, task.annotators) if people)
    fewer = without_answers(task, [item])
    assert fewer.at([item]).annotators == ((),) and len(fewer.at([item]).annotations[0]) == 0
    assert len(fewer) == len(task)


def test_convabuse_names_its_people():
    task = load_task("convabuse")
    assert annotator_ids(task.split("train")) == [f"Annotator{n}" for n in range(1, 9)]
    assert answers_of(task, "Annotator3").agreement()["annotators"].eq(1).all()


def test_a_users_table_keeps_its_people():
    rows = pd.DataFrame(
        {
            "id": ["1", "1", "2", "2"],
            "text": ["hm", "hm", "oh", "oh"],
            "labels": ["joy", "anger; joy", "none", None],
            "annotator": ["Ann", "Bo", "Bo", "Cy"],
        }
    )
    task = load_table(rows)
    assert task.annotators == (("Ann", "Bo"), ("Bo",))
    assert said(task) == {("1", "Ann"): {"joy"}, ("1", "Bo"): {"anger", "joy"}, ("2", "Bo"): set()}
    assert load_table(rows.drop_duplicates("id").drop(columns="annotator")).annotators is None
