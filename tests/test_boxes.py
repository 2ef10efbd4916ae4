"""The made Boxes task: its texts are replayed from their words alone, and must give the gold."""

import re
from collections import Counter

import numpy as np
import pytest

from mlc_notebooks.data import (
    BOX_OBJECTS,
    FORMATS,
    GENERATORS,
    draw_demonstrations,
    generate_boxes,
    load_task,
    text_key,
)
from mlc_notebooks.models import AnswerTokens
from mlc_notebooks.probing import probe_steps

SPLITS = ("train", "dev", "test")
FIRST = (
    "At first, box 1 holds the whistle and the kettle; box 2 holds the ladder and the candle; "
    "box 3 holds the towel and the envelope; box 4 holds nothing; box 5 holds the yarn. "
    "Then the towel is taken out of box 3. Then everything in box 5 is tipped into box 4. "
    "Then the yarn is moved from box 4 to box 3. Then the envelope is moved from box 3 to box 2. "
    "What does box 5 hold at the end?"
)
SENTENCE = re.compile(
    r"At first, (?P<start>.+)|Then the (?P<put>\w+) is put into box (?P<put_to>\d+)"
    r"|Then the (?P<taken>\w+) is taken out of box (?P<taken_from>\d+)"
    r"|Then the (?P<moved>\w+) is moved from box (?P<moved_from>\d+) to box (?P<moved_to>\d+)"
    r"|Then box (?P<emptied>\d+) is emptied"
    r"|Then everything in box (?P<tipped>\d+) is tipped into box (?P<tipped_to>\d+)"
    r"|What does box (?P<asked>\d+) hold at the end"
)


def replay(text):
    "Where each object is, sentence by sentence; the set that the asked box holds."
    place = {}  # object: box
    *sentences, rest = re.split(r"[.?] ?", text)
    assert rest == "" and text.endswith("?")
    for sentence in sentences:
        said = {
            key: value for key, value in SENTENCE.fullmatch(sentence).groupdict().items() if value
        }
        if "start" in said:
            for clause in said["start"].split("; "):
                box, held = re.fullmatch(r"box (\d+) holds (.+)", clause).groups()
                place |= dict.fromkeys(re.findall(r"the (\w+)", held), box)
                assert ("the " in held) != (held == "nothing")
        elif "put" in said:
            assert said["put"] not in place
            place[said["put"]] = said["put_to"]
        elif "taken" in said:
            assert place.pop(said["taken"]) == said["taken_from"]
        elif "moved" in said:
            assert place[said["moved"]] == said["moved_from"] != said["moved_to"]
            place[said["moved"]] = said["moved_to"]
        elif "emptied" in said:
            assert said["emptied"] in place.values()
            place = {thing: box for thing, box in place.items() if box != said["emptied"]}
        elif "tipped" in said:
            assert said["tipped"] in place.values() and said["tipped"] != said["tipped_to"]
            place = {
                thing: said["tipped_to"] if box == said["tipped"] else box
                for thing, box in place.items()
            }
    return {thing for thing, box in place.items() if box == said["asked"]}


SIZES = [
    {},
    {"moves": 0},
    {"moves": 12},
    {"boxes": 1},
    {"boxes": 2, "objects": 4, "moves": 3},
    {"boxes": 12, "objects": 48},
    {"objects": 1, "boxes": 9, "moves": 6},
    {"seed": 7, "moves": 1},
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_words_alone_give_the_gold_sets(sizes):
    task = generate_boxes(**{"n": 300, "train": 40, "dev": 40, **sizes})
    assert (
        task.labels.names == tuple(sorted(BOX_OBJECTS[: sizes.get("objects", 24)]))
        and task.labels.none == "none"
    )
    for split in SPLITS:
        texts = task.split(split)
        assert [replay(text) for text in texts.texts] == [set(gold) for gold in texts.gold_sets()]
        moves = [text.count(". Then ") for text in texts.texts]
        assert set(moves) == {sizes.get("moves", 4)}
        assert all(
            text.isprintable() and text == text.strip() and "  " not in text for text in texts.texts
        )


def test_no_text_occurs_twice():
    "Also where the texts nearly run out: leakage is judged by text."
    for task in (
        load_task("boxes-made"),
        generate_boxes(n=30, train=30, dev=10, boxes=1, objects=4, moves=1),
    ):
        texts = [text_key(text) for split in SPLITS for text in task.split(split).texts]
        assert len(set(texts)) == len(texts)
        ids = [item for split in SPLITS for item in task.split(split).ids]
        assert len(set(ids)) == len(ids)


def test_sizes_of_the_gold_sets_are_mixed():
    task = generate_boxes(n=1000)
    share = {
        size: count / 1000
        for size, count in Counter(min(len(gold), 3) for gold in task.gold_sets()).items()
    }
    assert set(share) == {0, 1, 2, 3} and all(0.15 < value < 0.35 for value in share.values())
    assert (
        task.distribution().mean().between(0.03, 0.12).all()
    )  # no object is much commoner than another
    initial = [
        set(re.findall(r"the (\w+)", re.search(rf"box {asked} holds ([^;.]*)", text)[1]))
        for text in task.texts
        for asked in re.findall(r"What does box (\d+)", text)
    ]
    changed = np.mean([start != set(gold) for start, gold in zip(initial, task.gold_sets())])
    assert 0.5 < changed < 0.9  # copying what the box held at first is not enough


def test_it_is_a_task_like_the_others():
    task = load_task("boxes-made")
    assert (task.name, task.label_noun, task.aggregated) == ("boxes-made", "objects", True)
    assert [len(task.split(split)) for split in SPLITS] == [400, 100, 200] and len(task.pool) == 400
    assert {votes.shape for votes in task.annotations} == {(1, 24)}
    assert load_task("boxes-made", split="dev").texts == task.split("dev").texts
    assert len(load_task("boxes-made", n=7, boxes=3, moves=2).sample(7)) == 7
    assert task.sample(30, kind="main").sampling["cells"] == {"multi": 10, "none": 10, "single": 10}
    assert min(map(len, task.sample(60, kind="multi").gold_sets())) == 2
    shown = draw_demonstrations(task.pool, 10, exclude=task.texts)
    assert sum(len(chosen) > 1 for _, chosen in shown) == 5


def test_the_seed_decides_and_larger_tasks_begin_alike():
    first, again, other = generate_boxes(n=50), generate_boxes(n=50), generate_boxes(n=50, seed=1)
    for split in SPLITS:
        assert first.split(split).texts == again.split(split).texts != other.split(split).texts
    assert generate_boxes(n=80, train=3, dev=2).texts[:50] == first.texts
    # Stored traces stay comparable only as long as a seed means the same texts.
    # (NumPy may change its streams: then say so.)
    assert first.texts[0] == FIRST and generate_boxes.__defaults__ == (200, 5, 24, 4, 0, 400, 100)


@pytest.mark.parametrize("objects", [24, len(BOX_OBJECTS)])
@pytest.mark.parametrize("fmt", FORMATS)
def test_no_two_objects_begin_with_the_same_token(base_lm, fmt, objects):
    assert (
        AnswerTokens(
            base_lm, generate_boxes(n=1, objects=objects, train=1, dev=1).labels, fmt
        ).collisions()
        == []
    )


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"n": 0}, "n is 0: give a whole number of at least 1"),
        ({"boxes": 0}, "boxes is 0: give a whole number of at least 1"),
        ({"moves": -1}, "moves is -1: give a whole number of at least 0"),
        ({"objects": 0}, "objects is 0: give a whole number of at least 1"),
        ({"objects": 49}, "objects is 49: give .* of at most 48"),
        ({"train": 0}, "train is 0: give a whole number of at least 1"),
        ({"dev": -3}, "dev is -3: give a whole number of at least 1"),
        (
            {"boxes": 1, "objects": 1, "moves": 0},
            "boxes=1, objects=1 and moves=0 hardly give more than 2 different texts: raise",
        ),
    ],
    ids=str,
)
def test_bad_arguments_name_the_value_and_the_way_out(wrong, says):
    with pytest.raises(ValueError, match=says):
        generate_boxes(**wrong)


def test_a_generated_task_reads_no_files(tmp_path):
    assert set(GENERATORS) == {"boxes-made"}
    with pytest.raises(ValueError, match="reads no files: leave out folder="):
        load_task("boxes-made", folder=tmp_path)
    with pytest.raises(ValueError, match="unknown task 'boxes-make': choose one of .*'boxes-made'"):
        load_task("boxes-make")


@pytest.mark.parametrize("fmt", ["json", "polysyndeton"])
def test_it_can_be_probed(tuned_lm, fmt):
    task = load_task("boxes-made", boxes=2, moves=1).sample(3, seed=0)
    trace = probe_steps(tuned_lm, task, shots=2, decoding="guided", fmt=fmt, progress=False)
    assert trace.logprobs.shape[1] == 25 and np.isfinite(trace.logprobs).all()
    assert set().union(*trace.items["outcomes"]) <= set(task.labels.outcomes)
