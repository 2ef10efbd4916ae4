"""Hostile inputs of the data room: each is refused in a sentence that names it, or read rightly."""

import gzip
import io
import json
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mlc_notebooks.data import (
    FORMATS,
    SOURCES,
    AnnotatedTexts,
    LabelSet,
    Template,
    answer_format,
    binary_prompts,
    check_texts,
    demonstrations_for,
    draw_demonstrations,
    draw_from_cells,
    even_counts,
    generate_boxes,
    list_prompts,
    load_table,
    load_task,
    parse_answer,
    reachable_share,
    rename_labels,
    reorder_labels,
    similar_demonstrations,
    unannotated,
    unary_prompts,
    without_texts,
)
from mlc_notebooks.probing import as_task

DATA = Path(__file__).parent / "data"
NAN = float("nan")
HUGE = 10**400
LABELS = LabelSet(["joy", "anger"])
TASK = unannotated(["a", "b", "c"], LABELS)
POOL = load_task("goemotions").pool.select(range(60))
ONES = [np.array([[1, 0]])]
FRAME = pd.DataFrame({"id": ["1"], "text": ["hm"], "labels": ["joy"]})


def items(ids=("1",), texts=("hm",), labels=LABELS, annotations=ONES):
    return AnnotatedTexts("mine", ids, texts, labels, annotations)


def no_direction(texts):
    "An encoder that has gone wrong."
    return np.full((len(texts), 3), NAN)


def prompt(text="hm", demonstrations=(), **options):
    return list_prompts([text], LABELS, demonstrations, **options)


# what is tried, the error, what its message must have
LABEL_SETS = [
    (lambda: LabelSet({"joy", "anger"}), TypeError, "labels is a set.*sort it"),
    (lambda: LabelSet(frozenset(["joy", "anger"])), TypeError, "sort it"),
    (lambda: LabelSet({"joy": 1, "a": 2}.keys() & {"joy", "a"}), TypeError, "sort it"),
    (lambda: LabelSet({"joy": 1, "anger": 0}), TypeError, "labels is a dict"),
    (lambda: LabelSet(FRAME), TypeError, "labels is a table"),
    (lambda: LabelSet("joy"), TypeError, "labels is one string, 'joy'"),
    (lambda: LabelSet(b"joy"), TypeError, "labels is one string, b'joy'"),
    (lambda: LabelSet(None), TypeError, "labels is None"),
    (lambda: LabelSet(3), TypeError, "labels is 3"),
    (lambda: LabelSet(np.array([["joy", "a"]])), TypeError, "labels is array"),
    (lambda: LabelSet(["joy", None]), TypeError, "got None"),
    (lambda: LabelSet(["joy", NAN]), TypeError, "got nan"),
    (lambda: LabelSet(["joy", b"anger"]), TypeError, "got b'anger'"),
    (lambda: LabelSet([1, 2]), TypeError, "got 1"),
    (lambda: LabelSet(["joy", ["anger"]]), TypeError, r"got \['anger'\]"),
    (lambda: LabelSet(["joy", "joy"]), ValueError, "'joy' and 'joy'"),
    (lambda: LabelSet(["joy", "\0"]), ValueError, "cannot be printed"),
    (lambda: LabelSet(["joy", "\ud800"]), ValueError, "cannot be printed"),
    (lambda: LabelSet(["joy", "a" * 60_000]), ValueError, "60,000 characters"),
    (lambda: LabelSet(["joy", "a" * 2_000_000]), ValueError, "2,000,000 characters"),
    (lambda: LabelSet(["joy"], none="n" * 60_000), ValueError, "60,000 characters"),
    (lambda: LabelSet(["joy"], none=5), TypeError, "got 5"),
    (lambda: LabelSet([f"label {i}" for i in range(20_000)]), ValueError, "20,000 labels"),
    (lambda: LABELS.vector("joy"), TypeError, "one string, 'joy'"),
    (lambda: LABELS.vector(["jy"]), ValueError, "'jy' is not one of.*did you mean 'joy'"),
    (lambda: LABELS.vector(["j" * 2_000_000]), ValueError, "is not one of"),
    (lambda: LABELS.chosen([1, NAN]), ValueError, "zeros and ones"),
    (lambda: LABELS.chosen([0.4, 0.6]), ValueError, "zeros and ones"),
    (lambda: LABELS.chosen([1]), ValueError, "no vector of 2"),
    (lambda: LABELS.reorder({"joy", "anger"}), TypeError, "sort it"),
    (lambda: LABELS.reorder(["joy", 3]), ValueError, "no reordering"),
    (lambda: reorder_labels(TASK, "joy"), TypeError, "labels is one string"),
    (lambda: reorder_labels(TASK, ["joy", "fear"]), ValueError, "'fear'"),
    (lambda: rename_labels(TASK, {"x", "y"}), TypeError, "sort it"),
    (lambda: rename_labels(TASK, ["x"]), ValueError, "1 names for the 2 labels"),
    (lambda: rename_labels(TASK, ["x", None]), TypeError, "got None"),
]
TEXTS = [
    (lambda: unannotated(FRAME, LABELS), TypeError, "texts is a table"),
    (lambda: unannotated({"text": "hm"}, LABELS), TypeError, "texts is a dict"),
    (lambda: unannotated({"hm", "oh"}, LABELS), TypeError, "texts is a set.*sort it"),
    (lambda: unannotated("hm", LABELS), TypeError, "texts is one string, 'hm'"),
    (lambda: unannotated(b"hm", LABELS), TypeError, "texts is one string"),
    (lambda: unannotated(None, LABELS), TypeError, "texts is None"),
    (lambda: unannotated([NAN], LABELS), ValueError, "item '0' is nan"),
    (lambda: unannotated([None], LABELS), ValueError, "item '0' is None"),
    (lambda: unannotated([b"hm"], LABELS), ValueError, "item '0' is b'hm'"),
    (lambda: unannotated([["hm"]], LABELS), ValueError, r"item '0' is \['hm'\]"),
    (lambda: unannotated(np.array([["a", "b"]]), LABELS), TypeError, "texts is array"),
    (lambda: unannotated(["hm"], ["joy", "anger"]), TypeError, "give a LabelSet"),
    (lambda: unannotated(["hm"], 3), TypeError, "labels is 3"),
    (lambda: unannotated(["a", "b"], LABELS, ids=["1", "1"]), ValueError, "id '1' occurs more"),
    (lambda: unannotated(["a"], LABELS, ids=[""]), ValueError, "the id at position 0 is ''"),
    (lambda: unannotated(["a"], LABELS, ids=[" "]), ValueError, "the id at position 0 is ' '"),
    (lambda: unannotated(["a"], LABELS, ids=[7]), ValueError, "the id at position 0 is 7"),
    (lambda: unannotated(["a"], LABELS, ids=[NAN]), ValueError, "the id at position 0 is nan"),
    (lambda: unannotated(["a"], LABELS, ids=[None]), ValueError, "position 0 is None"),
    (lambda: unannotated(["a"], LABELS, ids="12"), ValueError, "2 ids, 1 texts"),
    (lambda: unannotated(["a"], LABELS, ids=b"1"), TypeError, "ids is one string"),
    (lambda: unannotated(["a"], LABELS, ids={"1"}), TypeError, "ids is a set"),
    (lambda: unannotated(["a"], LABELS, ids=["1", "2"]), ValueError, "2 ids, 1 texts"),
    (lambda: items(annotations=[np.array([[NAN, 0]])]), ValueError, "other than 0 and 1"),
    (lambda: items(annotations=[np.array([[0.5, 0]])]), ValueError, "item '1' has annotations"),
    (lambda: items(annotations=[np.array([1, 0])]), ValueError, r"shape \(2,\)"),
    (lambda: items(annotations=[[[1, 0]]]), TypeError, "item '1'.*give an array"),
    (lambda: items(annotations=[None]), TypeError, "item '1'.*give an array"),
    (lambda: TASK.select([True, False, True]), ValueError, "position is True"),
    (lambda: TASK.select([3]), ValueError, "position is 3"),
    (lambda: TASK.select([-1]), ValueError, "position is -1"),
    (lambda: TASK.at(["9"]), ValueError, "no item '9'"),
    (lambda: TASK.at("012"), TypeError, "ids is one string"),
    (lambda: TASK.majority(NAN), ValueError, "threshold is nan"),
    (lambda: TASK.majority(0), ValueError, "threshold is 0"),
    (lambda: TASK.majority(7), ValueError, "threshold is 7"),
    (lambda: without_texts(TASK, "a"), TypeError, "texts is one string"),
    (lambda: as_task(FRAME, ["joy"]), TypeError, "texts is a table"),
    (lambda: as_task({"text": "hm"}, ["joy"]), TypeError, "texts is a dict"),
    (lambda: as_task("hm", ["joy"]), TypeError, "texts is one string"),
    (lambda: as_task(["hm", NAN], ["joy"]), ValueError, "item '1' is nan"),
    (lambda: as_task(["hm"], {"joy", "fear"}), TypeError, "sort it"),
    (lambda: check_texts(["1"], [3.5]), TypeError, "item '1' must be a string, got 3.5"),
    (lambda: check_texts(["1"], ["\ud800"]), ValueError, "surrogate"),
]
DRAWS = [
    (lambda: TASK.sample(0), ValueError, "n is 0"),
    (lambda: TASK.sample(-3), ValueError, "n is -3"),
    (lambda: TASK.sample(2.0), ValueError, "n is 2.0"),
    (lambda: TASK.sample(NAN), ValueError, "n is nan"),
    (lambda: TASK.sample(True), ValueError, "n is True"),
    (lambda: TASK.sample("2"), ValueError, "n is '2'"),
    (lambda: TASK.sample(4), ValueError, "3 items to draw from, cannot draw 4"),
    (lambda: TASK.sample(HUGE), ValueError, "cannot draw 1000"),
    (lambda: TASK.sample(2, seed=-1), ValueError, "seed is -1"),
    (lambda: TASK.sample(2, seed=None), ValueError, "seed is None"),
    (lambda: TASK.sample(2, seed=0.5), ValueError, "seed is 0.5"),
    (lambda: TASK.sample(2, kind="even"), ValueError, "kind is 'even': choose one of random"),
    (lambda: TASK.sample(2, kind=["random"]), ValueError, "kind is"),
    (lambda: even_counts({"a": 3}, -1), ValueError, "n is -1"),
    (lambda: even_counts({"a": 3}, NAN), ValueError, "n is nan"),
    (lambda: even_counts({"a": -3}, 1), ValueError, "size of 'a' is -3"),
    (lambda: draw_from_cells(pd.Series(["a"]), 1, seed=-1), ValueError, "seed is -1"),
    (lambda: draw_demonstrations(POOL, -1), ValueError, "shots is -1"),
    (lambda: draw_demonstrations(POOL, 2.5), ValueError, "shots is 2.5"),
    (lambda: draw_demonstrations(POOL, NAN), ValueError, "shots is nan"),
    (lambda: draw_demonstrations(POOL, HUGE), ValueError, "demonstrations wanted"),
    (lambda: draw_demonstrations(POOL, 61), ValueError, "61 demonstrations wanted of 60"),
    (lambda: draw_demonstrations(POOL, 2, seed=-1), ValueError, "seed is -1"),
    (lambda: draw_demonstrations(POOL, 2, multi_share=7), ValueError, "multi_share is 7"),
    (lambda: draw_demonstrations(POOL, 2, multi_share=-0.1), ValueError, "multi_share is -0.1"),
    (lambda: draw_demonstrations(POOL, 2, multi_share=NAN), ValueError, "multi_share is nan"),
    (lambda: draw_demonstrations(POOL, 2, multi_share="all"), ValueError, "multi_share is 'all'"),
    (lambda: draw_demonstrations(POOL, 2, exclude="hm"), TypeError, "exclude is one string"),
    (lambda: draw_demonstrations(None, 2), TypeError, "the pool is None"),
    (lambda: draw_demonstrations(["hm"], 2), TypeError, r"the pool is \['hm'\]"),
    (lambda: demonstrations_for(None, 2), TypeError, "the task is None"),
    (lambda: demonstrations_for(TASK, 2), ValueError, "no train split"),
    (lambda: demonstrations_for(TASK, "2"), ValueError, "shots is '2'"),
    (lambda: demonstrations_for(TASK, 0, seed=-1), ValueError, "seed is -1"),
    (lambda: demonstrations_for(TASK, 0, multi_share=9), ValueError, "multi_share is 9"),
    (
        lambda: similar_demonstrations(POOL, ["hm"], 2, lambda texts: np.zeros((len(texts), 3))),
        ValueError,
        "no direction for the text 'hm'",
    ),
    (
        lambda: similar_demonstrations(
            POOL, ["hm"], 2, lambda texts: np.full((len(texts), 3), NAN)
        ),
        ValueError,
        "no direction for the text 'hm'",
    ),
    (
        lambda: similar_demonstrations(POOL, ["hm"], 2, lambda texts: np.ones(3)),
        ValueError,
        r"shape \(3,\) for 1 texts",
    ),
    (lambda: similar_demonstrations(POOL, "hm", 2, len), TypeError, "texts is one string"),
    (lambda: generate_boxes(n=0), ValueError, "n is 0"),
    (lambda: generate_boxes(n=2.5), ValueError, "n is 2.5"),
    (lambda: generate_boxes(n=HUGE), ValueError, "n is 1000"),
    (lambda: generate_boxes(n="many"), ValueError, "n is 'many'"),
    (lambda: generate_boxes(boxes=10**9), ValueError, "boxes is 1000000000"),
    (lambda: generate_boxes(boxes=True), ValueError, "boxes is True"),
    (lambda: generate_boxes(moves=-1), ValueError, "moves is -1"),
    (lambda: generate_boxes(moves=NAN), ValueError, "moves is nan"),
    (lambda: generate_boxes(moves=10**9), ValueError, "moves is 1000000000"),
    (lambda: generate_boxes(objects=49), ValueError, "objects is 49.*at most 48"),
    (lambda: generate_boxes(seed=-1), ValueError, "seed is -1"),
    (lambda: generate_boxes(seed=None), ValueError, "seed is None"),
    (lambda: generate_boxes(train=None), ValueError, "train is None"),
]
PROMPTS = [
    (lambda: list_prompts("hm", LABELS), TypeError, "texts is one string"),
    (lambda: list_prompts(FRAME, LABELS), TypeError, "texts is a table"),
    (lambda: prompt(3.5), TypeError, "got 3.5"),
    (lambda: prompt(None), TypeError, "got None"),
    (lambda: prompt(demonstrations=[("hm", "joy")]), TypeError, "one string, 'joy'"),
    (lambda: prompt(demonstrations=[("hm", ["jy"])]), ValueError, "did you mean 'joy'"),
    (lambda: prompt(demonstrations=[("hm", {"joy", "anger"})]), TypeError, "sort it"),
    (lambda: prompt(demonstrations=[("hm",)]), ValueError, "give a pair"),
    (lambda: prompt(demonstrations=[("hm", ["joy"], "x")]), ValueError, "give a pair"),
    (lambda: prompt(demonstrations=[("", ["joy"])]), ValueError, "demonstration '' is empty|''"),
    (lambda: prompt(demonstrations=[("a\0", ["joy"])]), ValueError, "NUL"),
    (lambda: prompt(demonstrations=[3]), TypeError, "demonstrations of a text is 3"),
    (lambda: prompt(demonstrations={"hm": ["joy"]}), TypeError, "demonstrations is a dict"),
    (lambda: prompt(demonstrations=[[], []]), ValueError, "2 lists of demonstrations for 1"),
    (lambda: prompt(label_noun=3), TypeError, "label_noun must be a string, got 3"),
    (lambda: prompt(label_noun="x" * 60_000), ValueError, "label_noun has 60,000 characters"),
    (lambda: prompt(fmt="xml"), ValueError, "unknown answer format 'xml'"),
    (lambda: prompt(fmt=["json"]), ValueError, "unknown answer format"),
    (lambda: answer_format(None), ValueError, "unknown answer format None"),
    (lambda: parse_answer("joy", LABELS, "xml"), ValueError, "unknown answer format"),
    (lambda: FORMATS["json"].render("joy", LABELS), TypeError, "one string, 'joy'"),
    (lambda: Template("x" * 2_000_000, "{text}"), ValueError, "instruction has 2,000,000"),
    (lambda: Template("", "x" * 2_000_000 + "{text}"), ValueError, "item has 2,000,006"),
    (lambda: Template("", "{text}" * 300_000), ValueError, "item has 1,800,000"),
    (lambda: Template("", "{text}" * 300), ValueError, "must contain {text} once"),
    (lambda: Template("", "{text}", "\n" * 60_000), ValueError, "before_answer has 60,000"),
    (lambda: Template(None, "{text}"), TypeError, "instruction must be a string, got None"),
    (lambda: Template("", b"{text}"), TypeError, "item must be a string"),
    (lambda: Template("", "{text} "), ValueError, "ends with white space"),
    (lambda: unary_prompts(None, LABELS), TypeError, "got None"),
    (lambda: unary_prompts("hm", LABELS, label_noun=NAN), TypeError, "label_noun"),
    (lambda: unary_prompts("hm", LABELS, [("hm", "joy")]), ValueError, "a demonstration is"),
    (lambda: binary_prompts(3, [("joy", "anger")]), TypeError, "got 3"),
    (lambda: binary_prompts("hm", [("joy",)]), ValueError, "a pair is"),
    (lambda: load_task(None), TypeError, "got None"),
    (lambda: load_task(["goemotions"]), TypeError, "must be a string"),
    (lambda: load_task("goemotion"), ValueError, "unknown task 'goemotion'"),
    (lambda: load_task("goemotions", split="tset"), ValueError, "no split 'tset'"),
    (lambda: load_task("goemotions", rows=3), TypeError, "rows"),
]
HOSTILE = [*LABEL_SETS, *TEXTS, *DRAWS, *PROMPTS]


@pytest.mark.parametrize("tried, error, says", HOSTILE, ids=map(str, range(len(HOSTILE))))
def test_a_hostile_input_is_refused_in_a_sentence(tried, error, says):
    began = time.process_time()
    with pytest.raises(error, match=says) as caught:
        tried()
    message = str(caught.value)
    assert len(message) < 600 and " " in message
    assert time.process_time() - began < 5  # nothing quadratic before the refusal


def test_there_are_many():
    assert len(HOSTILE) >= 150


RIGHT = [
    (lambda: LabelSet(np.array(["joy", "anger"])).names, ("joy", "anger")),
    (lambda: LabelSet(pd.Series(["joy", "anger"])).names, ("joy", "anger")),
    (lambda: LabelSet({"joy": 1, "anger": 0}.keys()).names, ("joy", "anger")),
    (lambda: LabelSet(name for name in ["joy", "anger"]).names, ("joy", "anger")),
    (lambda: LabelSet(["a" * 1000]).names, ("a" * 1000,)),
    (lambda: LABELS.chosen(np.array([True, False])), ("joy",)),
    (lambda: unannotated(FRAME["text"], LABELS).texts, ("hm",)),
    (lambda: unannotated((text for text in "ab"), LABELS).texts, ("a", "b")),
    (lambda: unannotated(["a"], LABELS, ids=np.array(["x"])).ids, ("x",)),
    (lambda: len(TASK.sample(np.int64(2), seed=np.int32(1))), 2),
    (lambda: TASK.select(np.array([2, 0])).texts, ("c", "a")),
    (lambda: TASK.at(pd.Index(["1"])).texts, ("b",)),
    (lambda: len(draw_demonstrations(POOL, 0)), 0),
    (lambda: len(draw_demonstrations(POOL, 4, multi_share=0)), 4),
    (lambda: len(draw_demonstrations(POOL, 4, multi_share=None)), 4),
    (lambda: even_counts({"a": 2, "b": 0}, 0), {"a": 0, "b": 0}),
    (lambda: prompt("a {labels} b")[0].item, "Input: a {labels} b"),
    (lambda: prompt("{" * 100_000)[0].item, "Input: " + "{" * 100_000),
    (lambda: list_prompts(pd.Series(["hm"]), LABELS)[0].item, "Input: hm"),
    (lambda: prompt(demonstrations=[["hm", ["joy"]]])[0].demonstrations[0][0], "Input: hm"),
]


@pytest.mark.parametrize("tried, expected", RIGHT, ids=map(str, range(len(RIGHT))))
def test_what_looks_odd_and_is_right(tried, expected):
    assert tried() == expected


CSV = b"text,labels\n" + b"hm,joy\noh,fear\n" * 4000


def damaged_tables():
    "Files (name, bytes) that no reader should take, or not without a word."
    whole = gzip.compress(CSV)
    yield "cut.csv.gz", whole[:-20]
    yield "cut_in_half.csv.gz", whole[: len(whole) // 2]
    yield "no_gzip.csv.gz", CSV
    yield "flipped.csv.gz", whole[:60] + bytes([whole[60] ^ 255]) + whole[61:]
    yield "empty.csv.gz", b""
    yield "empty.csv", b""
    yield "latin.csv", "text,labels\nnaïve,joy\n".encode("latin-1")
    yield "utf16.csv", "text,labels\nhm,joy\n".encode("utf-16-le")
    yield "cut_utf16.csv", "text,labels\nhm,joy\n".encode("utf-16")[:-1]
    yield "binary.csv", bytes(range(256)) * 8
    yield "zipped.csv", zipped("table.csv", CSV)
    yield "cut.jsonl", b'{"text": "hm", "labels": ["joy"]}\n{"text": "o'
    yield "words.jsonl", b"this is no json"
    yield "cut.jsonl.gz", gzip.compress(b'{"text": "hm", "labels": ["joy"]}\n')[:-9]
    yield "cut.parquet", FRAME.to_parquet()[:-30]
    yield "words.parquet", b"PAR1 this is no table PAR1"
    yield "empty.parquet", b""
    yield "table.zip", zipped("table.csv", CSV)
    yield "cut.zip", zipped("table.csv", CSV)[:-40]
    yield "table.feather", b"ARROW1"


def zipped(name: str, content: bytes) -> bytes:
    "A zip archive of one file."
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize("name, content", list(damaged_tables()), ids=lambda value: str(value)[:20])
def test_a_damaged_table_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=name):
        load_table(tmp_path / name)


def test_a_damaged_file_of_labels_is_named(tmp_path):
    (tmp_path / "labels.txt").write_bytes("jöy\nfear\n".encode("latin-1"))
    with pytest.raises(ValueError, match="labels.txt: line 1 is not utf-8"):
        load_table(FRAME, labels=tmp_path / "labels.txt")
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        load_table(FRAME, labels=tmp_path / "nowhere.txt")


def damage(path: Path, how: str):
    "Damages a file in place."
    whole = path.read_bytes()
    if how == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "binary":
        path.write_bytes(bytes(range(255, 127, -1)) * 4)
    elif how == "other":
        path.write_bytes(b'{"something": "else"}\n')
    elif how == "gzip":
        path.unlink()
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(whole)[:-9])


HANDMADE = sorted(folder.name for folder in DATA.iterdir() if folder.is_dir())


@pytest.mark.parametrize("how", ["cut", "binary", "other", "gzip"])
@pytest.mark.parametrize("folder", HANDMADE)
def test_damaged_official_files(tmp_path, folder, how):
    "Each file of each data set, damaged in turn: a sentence with the folder, or still a task."
    names = [name for name, source in SOURCES.items() if source.folder == folder]
    assert len(names) == 1
    copy = tmp_path / folder
    for file in sorted(path for path in (DATA / folder).rglob("*") if path.is_file()):
        shutil.copytree(DATA / folder, copy)
        damage(copy / file.relative_to(DATA / folder), how)
        try:
            task = load_task(names[0], folder=copy)
        except (ValueError, OSError) as error:
            assert str(copy) in str(error) or names[0] in str(error), error
        else:
            assert len(task) and len(task.labels)  # the file is read with other options
        shutil.rmtree(copy)


def test_json_that_is_no_object(tmp_path):
    (tmp_path / "list.jsonl").write_text(json.dumps([1, 2, 3]) + "\n")
    with pytest.raises((ValueError, OSError), match="list.jsonl"):
        load_table(tmp_path / "list.jsonl")


@pytest.mark.parametrize("multi, few", [(3, 5), (1, 9), (0, 8), (8, 0), (5, 3), (40, 40)])
@pytest.mark.parametrize("shots", [0, 1, 5, 8])
def test_a_share_that_the_pool_can_give(multi, few, shots):
    votes = [np.array([[1, 1]])] * multi + [np.array([[1, 0]])] * few
    texts = [f"text {number}" for number in range(multi + few)]
    pool = AnnotatedTexts("pool", list(map(str, range(len(texts)))), texts, LABELS, votes)
    share = reachable_share(pool, shots)
    drawn = draw_demonstrations(pool, shots, multi_share=share)
    shown = sum(len(labels) > 1 for _, labels in drawn)
    half = round(shots / 2)
    assert len(drawn) == shots
    assert shown == half or shown == multi < half or shots - shown == few < shots - half
    if shown == half:
        assert share == 0.5 and drawn == draw_demonstrations(pool, shots)
