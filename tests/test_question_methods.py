"""Yes or no, written percentages, annotators in context: slow twins and hand-worked cases."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from mlc_notebooks.alignment import (
    ask_annotators,
    ask_percentages,
    ask_yes_no,
    inclusion_marginals,
    mean_over_annotators,
    methods_for,
    own_demonstrations,
    percentage_prompts,
    read_percentages,
    with_fallback,
    yes_no_marginals,
    yes_no_prompts,
    zero_shot,
)
from mlc_notebooks.data import AnnotatedTexts, LabelSet, load_task

LABELS = LabelSet(["joy", "fear"])
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def task():
    return load_task("brighter-eng").sample(3, seed=5)


# Yes or no


@pytest.mark.parametrize("first", ["text", "label"])
def test_questions_are_read_as_if_each_stood_alone(tiny_lms, task, first):
    lm = tiny_lms["llama"]
    found = ask_yes_no(lm, task, first, shots=2, **QUIET)
    twin = ask_yes_no(lm, task, first, shots=2, no_cache=True, **QUIET)
    np.testing.assert_allclose(found.logprobs, twin.logprobs, atol=1e-4)
    assert np.shape(found.logprobs) == (3, len(task.labels), 2)
    assert found.tokens < found.prompt_tokens / 2


def test_label_first_keeps_texts_and_labels_apart(tiny_lms, task):
    "More texts than are asked at a time: each has the answers that it has alone."
    lm = tiny_lms["llama"]
    many = task.split("test").select(range(19))
    found = np.stack(ask_yes_no(lm, many, "label", shots=0, **QUIET).logprobs)
    alone = ask_yes_no(lm, many.select([17]), "label", shots=0, **QUIET)
    np.testing.assert_allclose(found[17], alone.logprobs[0], atol=1e-4)
    assert found.shape == (19, len(task.labels), 2)


def test_half_of_the_demonstrations_are_right(task):
    gold = {
        " ".join(text.split()): set(chosen)
        for text, chosen in zip(task.pool.texts, task.pool.gold_sets())
    }
    for first in ("text", "label"):
        (prompt, *_), *_ = yes_no_prompts(task, first, shots=10)
        assert [answer for _, answer in prompt.demonstrations] == ["Yes", "No"] * 5
        for item, answer in prompt.demonstrations:
            asked = re.search(r'Does "(.*?)" fit, Yes or No', item)[1]
            text = " ".join(re.search("Input: (.*)", item)[1].split())
            assert (asked in (gold[text] or {"none"})) == (answer == "Yes")


def test_answers_must_begin_differently(tiny_lms, task):
    with pytest.raises(ValueError, match="begin with the same token"):
        ask_yes_no(tiny_lms["llama"], task, answers=("Yes", "Yes!"), shots=0, **QUIET)


def test_yes_no_marginals_by_hand():
    logprobs = np.log([[[0.3, 0.1], [0.02, 0.02]], [[0.5, 0.5], [0.1, 0.9]]])
    np.testing.assert_allclose(yes_no_marginals(logprobs), [[0.75, 0.5], [0.5, 0.1]])
    single = yes_no_marginals(logprobs, multi=False)
    np.testing.assert_allclose(single, [[0.6, 0.4], [5 / 6, 1 / 6]])


def test_yes_no_runs_by_name_and_resumes(tiny_lms, task, tmp_path):
    lm = tiny_lms["llama"]
    names = ["yes_no_text_first", "yes_no_label_first"]
    found = zero_shot(lm, task, names, shots=2, **QUIET)
    kept = zero_shot(lm, task, names, shots=2, folder=tmp_path, **QUIET)
    again = zero_shot(lm, task, names, shots=2, folder=tmp_path, **QUIET)
    for name in names:
        pd.testing.assert_frame_equal(kept[name], found[name])
        pd.testing.assert_frame_equal(again[name], found[name])
        assert 0 <= found[name].attrs["mass"] <= 1
        assert found[name].attrs["tokens"] > 0


# Written percentages


def test_whatever_is_not_the_format_has_no_numbers():
    whole = {"joy": 80, "fear": 5}
    valid = {
        "plain": json.dumps(whole),
        "preamble": "Of course. " + json.dumps(whole),
        "capitals": '{"Joy": 80, "Fear": 5}',
        "other order": '{"fear": 5, "joy": 80}',
        "many lines": json.dumps(whole, indent=2),
        "more after": json.dumps(whole) + "\nInput: Hm.",
    }
    wrong = {
        "": "invalid",
        "joy: 80, fear: 5": "invalid",
        "{'joy': 80, 'fear': 5}": "invalid",
        '{"joy": 80, "fear": }': "invalid",
        '{"joy": 80, "fear": 5': "truncated",
        "{" * 5000: "truncated",
        '{"joy": 80, "fear": 5, "none": 0}': "invented",
        '{"JOY": 80, "fear": 5}': "invented",
        '{"joy": 80, "joy": 80, "fear": 5}': "repeated",
        "{}": "missing",
        '{"joy": 80, "fear": null}': "no_percentage",
        '{"joy": 80, "fear": -1}': "no_percentage",
        '{"joy": 80, "fear": 101}': "no_percentage",
        '{"joy": 80, "fear": 5.0}': "no_percentage",
        '{"joy": NaN, "fear": 5}': "no_percentage",
        '{"joy": {"fear": 5}, "fear": 5}': "no_percentage",
        '{"joy": true, "fear": 5}': "no_percentage",
    }
    read = read_percentages(valid | {text: text for text in wrong}, LABELS)
    assert read.flags[list(valid)].eq("").all()
    assert (read.marginals.loc[list(valid)] == [0.8, 0.05]).all(axis=None)
    assert read.flags[list(wrong)].tolist() == list(wrong.values())
    assert read.marginals.loc[list(wrong)].isna().all(axis=None)
    assert list(read.valid.index) == list(valid)
    assert read.counts["valid"] == len(valid) and read.counts.sum() == len(valid) + len(wrong)


def test_a_fallback_is_asked_for_by_name_and_counted():
    read = read_percentages({"a": '{"joy": 80, "fear": 5}', "b": "?"}, LABELS)
    other = pd.DataFrame([[0.1, 0.2], [0.3, 0.4]], ["b", "a"], ["fear", "joy"])
    filled = with_fallback(read, other)
    assert filled.loc["a"].tolist() == [0.8, 0.05] and filled.loc["b"].tolist() == [0.2, 0.1]
    assert filled.attrs["replaced"] == 1
    with pytest.raises(ValueError, match="no row for item 'b'"):
        with_fallback(read, other.loc[["a"]])
    with pytest.raises(ValueError, match="is no probability"):
        with_fallback(read, other * 9)


def test_demonstrations_show_the_annotators_shares():
    votes = [np.array([[1, 0], [1, 0], [0, 1]]), np.zeros((2, 2), int), np.array([[1, 1]])]
    pool = AnnotatedTexts("pool", ["p", "q", "r"], ["one", "two", "three"], LABELS, votes)
    task = AnnotatedTexts("test", ["t"], ["four"], LABELS, votes[:1], splits={"train": pool})
    (prompt,) = percentage_prompts(task, shots=2)
    shown = {item: json.loads(answer) for item, answer in prompt.demonstrations}
    expected = {"one": [67, 33], "two": [0, 0], "three": [100, 100]}
    for item, answer in shown.items():
        assert list(answer.items()) == list(zip(LABELS, expected[item.removeprefix("Input: ")]))
    assert '{"joy": ..., "fear": ...}' in prompt.plain()


def test_written_answers_are_those_of_the_slow_twin(tuned_lm, task, tmp_path):
    few = task.select([0, 1])
    found = ask_percentages(tuned_lm, few, shots=2, **QUIET)
    twin = ask_percentages(tuned_lm, few.select([1]), shots=2, no_cache=True, **QUIET)
    assert found.outputs.iloc[1] == twin.outputs.iloc[0]
    assert all(found.outputs.str.len() > 0)
    assert (found.marginals.isna().any(axis=1) == (found.flags != "")).all()
    kept = ask_percentages(tuned_lm, few, shots=2, folder=tmp_path, **QUIET)
    again = ask_percentages(tuned_lm, few, shots=2, folder=tmp_path, **QUIET)
    for other in (kept, again):
        pd.testing.assert_frame_equal(other.marginals, found.marginals)


# Annotators in context


@pytest.fixture(scope="module")
def people():
    return load_task("convabuse").sample(2, seed=0)


def test_examples_are_the_persons_own_and_no_text_under_test(people):
    pool = people.pool
    person = pool.annotators[0][0]
    shown = own_demonstrations(people, person, shots=8, seed=1)
    answered = {}
    for text, who, votes in zip(pool.texts, pool.annotators, pool.annotations):
        if person in who:
            answered.setdefault(text, []).append(pool.labels.chosen(votes[who.index(person)]))
    assert len(shown) == 8
    assert all(chosen in answered[text] for text, chosen in shown)
    assert not {text for text, _ in shown} & set(people.texts)


def test_the_mean_is_over_people_asked_one_by_one(tiny_lms, people, tmp_path):
    lm = tiny_lms["llama"]
    tables = ask_annotators(lm, people, shots=2, most=2, folder=tmp_path, **QUIET)
    for person, table in tables.items():
        shown = own_demonstrations(people, person, shots=2)
        alone = inclusion_marginals(lm, people, demonstrations=shown, **QUIET)
        pd.testing.assert_frame_equal(table, alone)
    first, second = tables.values()
    np.testing.assert_allclose(mean_over_annotators(tables), (first + second) / 2)


def test_the_mean_over_those_who_answered():
    def table(*rows):
        return pd.DataFrame(rows, ["x", "y", "z"], list(LABELS))

    tables = {"ann": table([0, 1], [0, 0], [1, 1]), "bob": table([1, 1], [1, 0], [0, 1])}
    votes = [np.zeros((len(who), 2), int) for who in (1 * [0], 2 * [0], 1 * [0])]
    who = [["ann"], ["bob", "cy"], ["cy"]]
    task = AnnotatedTexts("t", list("xyz"), ["1", "2", "3"], LABELS, votes, annotators=who)
    mean = mean_over_annotators(tables, task)
    assert mean.to_numpy().tolist() == [[0, 1], [1, 0], [0.5, 1]]
    assert mean.attrs["by_all"] == 1


def test_annotators_are_asked_only_where_the_data_says_who_answered(people, task):
    assert "annotators_in_context" in methods_for(people)
    assert "annotators_in_context" not in methods_for(task)
    with pytest.raises(ValueError, match="needs a train split that says who answered"):
        zero_shot(None, task, ["annotators_in_context"])
