"""Each loader on a small hand-made file in the official format, and on the real files where
MLC_DATA has them; and the container that they all fill."""

import ast
import gzip
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from mlc_notebooks.data import (
    FLAGS,
    IRREGULAR_FLAGS,
    SOURCES,
    AnnotatedTexts,
    LabelSet,
    draw_demonstrations,
    load_table,
    load_task,
    text_key,
    unannotated,
    without_texts,
)

DATA = Path(__file__).parent / "data"
PACKAGE = Path(__file__).parent.parent / "mlc_notebooks"
SPLITS = ("train", "dev", "test")


def small(name, **options):
    return load_task(name, folder=DATA / SOURCES[name].folder, **options)


def q(task, item):
    return {label: share for label, share in task.distribution().loc[item].items() if share}


def test_goemotions_aggregated():
    task = small("goemotions")
    assert task.aggregated and task.label_noun == "emotions"
    assert task.gold_sets() == [
        ("joy",),
        ("fear",),
    ]  # love is joy; neutral beside an emotion is dropped
    assert task.pool.texts[0] == 'She said "wow" and left.'
    assert task.split("dev").gold_sets() == [()]
    assert load_task("goemotions-27", folder=DATA / "goemotions").gold_sets() == [
        ("love",),
        ("fear",),
    ]


def test_goemotions_raters():
    task = small("goemotions", raw=True)
    assert not task.aggregated
    assert q(task, "s2") == {"fear": 1.0, "sadness": 0.5}
    assert (
        len(task.pool.annotations[task.pool.ids.index("t2")]) == 1
    )  # a comment marked unclear is no annotation


def test_brighter():
    assert small("brighter", language="eng").gold_sets() == [("joy", "surprise")]
    swedish = small("brighter", language="swe")
    assert q(swedish, "swe_3") == {"anger": 1.0, "sadness": pytest.approx(2 / 3)}
    assert q(small("brighter", language="swe", threshold=2), "swe_3") == {
        "anger": pytest.approx(1 / 3),
        "sadness": pytest.approx(2 / 3),
    }
    assert len(swedish.split("dev").annotations[0]) == 2  # an empty cell: did not see the text
    assert small("brighter", language="swe", annotators=False).aggregated


def test_convabuse():
    task = small("convabuse")
    assert task.texts == ("Agent: Hello User: Hi Agent: How are you? User: You are a dim machine",)
    assert q(task, "3") == {
        "intellectual": 1.0,
        "explicit": 0.5,
    }  # "1, 0" counts, "0, 0, 1" does not
    assert task.split("dev").agreement().unanimous.tolist() == [0.0]
    assert small("convabuse", labels=["explicit", "implicit"]).labels.names == (
        "explicit",
        "implicit",
    )


def test_crowdtruth():
    task = small("crowdtruth")
    sizes = [len(task.split(s)) for s in SPLITS]
    assert sum(sizes) == 40 and sizes[0] > sizes[2] > sizes[1]
    assert q(task, task.ids[0]) == {
        "per:founded_org": pytest.approx(2 / 3),
        "per:employee_or_member_of": pytest.approx(1 / 3),
    }
    assert task.texts[0].endswith("Terms: Ann and Bolt")


def test_mfrc():
    task = small("mfrc")
    assert task.ids == ("1",) and task.gold_sets() == [()]
    assert q(task.pool, "0") == {
        "care": 0.5,
        "equality": 0.5,
    }  # Care with Non-Moral is dropped, Thin Morality is none


def test_semeval():
    task = small("semeval2018")
    assert task.gold_sets() == [("anticipation", "joy", "optimism")] and task.texts == (
        'A "quoted day, half open',
    )


def test_hatexplain():
    task = small("hatexplain")
    assert not task.labels.is_multi and task.texts == ("the sun is out",)
    assert task.distribution().to_numpy().tolist() == [pytest.approx([1 / 3] * 3)]
    assert task.gold_sets() == [("hatespeech",)]  # a tie goes to the first label


def test_boxes():
    for moved in (False, True):
        task = small("boxes", moved_contents=moved)
        assert task.gold_sets() == [("apple", "key"), ()] and task.labels.none == "nothing"
        assert task.texts[1].endswith("Box 1 contains")


def test_msp_podcast():
    several = small("msp-podcast")
    assert q(several.pool, "a.wav") == {
        "Happy": 0.5,
        "Excited": 0.5,
    }  # after Other nothing counts; Neutral is none
    assert q(several, "b.wav") == {"Concerned": 1.0, "Sad": 0.5}
    single = small("msp-podcast", several=False)
    assert not single.labels.is_multi and q(single, "b.wav") == {"Sad": 1.0}


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_a_missing_file_is_named_with_its_source_and_licence(name, tmp_path):
    options = {"raw": True} if name == "goemotions" else {}
    with pytest.raises(FileNotFoundError) as error:
        load_task(name, folder=tmp_path, **options)
    assert (
        str(tmp_path) in str(error.value)
        and SOURCES[name].home in str(error.value)
        and SOURCES[name].licence in str(error.value)
    )


def test_gzipped_files_are_read(tmp_path):
    shutil.copytree(DATA / "semeval2018", tmp_path / "set")
    for path in (tmp_path / "set").rglob("*.txt"):
        with gzip.open(f"{path}.gz", "wb") as file:
            file.write(path.read_bytes())
        path.unlink()
    assert (
        load_task("semeval2018", folder=tmp_path / "set").gold_sets()
        == small("semeval2018").gold_sets()
    )


@pytest.mark.parametrize(
    "name, options, sizes, annotators",
    [
        ("goemotions", {}, (43410, 5426, 5427), 1.0),
        ("brighter-afr", {}, (1222, 98, 1065), 3.0),
        ("brighter-arq", {}, (None, None, None), 7.4),
        ("brighter-swe", {}, (None, None, None), 3.0),
        ("brighter-ron", {}, (None, None, None), 5.4),
        ("crowdtruth", {}, (None, None, None), 15.0),
    ],
)
def test_the_real_files(name, options, sizes, annotators):
    base = name.split("-")[0]
    folder = Path(os.environ.get("MLC_DATA", "/nowhere")) / SOURCES[base].folder
    if not folder.is_dir():
        pytest.skip("MLC_DATA is not set to a folder with this data set")
    task = load_task(name, folder=folder, **options)
    for split, size in zip(SPLITS, sizes):
        assert size is None or len(task.split(split)) == size
    assert task.agreement()["annotators"].mean() == pytest.approx(annotators, abs=0.25)


def test_the_default_threshold_is_the_organisers_own():
    "The Swedish majority against the aggregated labels: threshold 1 reproduces them, 2 does not."
    folder = Path(os.environ.get("MLC_DATA", "/nowhere")) / "brighter"
    if not folder.is_dir():
        pytest.skip("MLC_DATA is not set to a folder with this data set")
    aggregated = load_task("brighter-swe", folder=folder, annotators=False).majority()
    share = {
        t: (m.to_numpy() == aggregated.loc[m.index].to_numpy()).mean()
        for t in (1, 2)
        for m in [load_task("brighter-swe", folder=folder, threshold=t).majority()]
    }
    assert share[1] > 0.99 > 0.95 > share[2]


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_own_tables(ending, tmp_path):
    import pandas as pd

    frame = pd.DataFrame(
        {
            "text": ["a", "b", "c"],
            "labels": ["joy; fear", "none", "joy"],
            "split": ["train", "test", "test"],
        }
    )
    path = tmp_path / f"mine.{ending}"
    write = {
        "csv": lambda: frame.to_csv(path, index=False),
        "tsv": lambda: frame.to_csv(path, sep="\t", index=False),
        "jsonl": lambda: frame.assign(labels=[["joy", "fear"], [], ["joy"]]).to_json(
            path, orient="records", lines=True
        ),
        "parquet": lambda: frame.to_parquet(path),
    }
    write[ending]()
    task = load_table(path)
    assert (
        task.name == "mine"
        and task.gold_sets() == [(), ("joy",)]
        and task.pool.gold_sets() == [("fear", "joy")]
    )


def test_no_text_under_test_is_shown(tmp_path):
    "Leakage is judged by text: GoEmotions repeats texts across splits."
    task = load_task("goemotions")
    both = set(map(text_key, task.texts)) & set(map(text_key, task.pool.texts))
    assert both  # the trap is there
    for seed in range(3):
        shown = draw_demonstrations(task.pool, 200, seed, exclude=task.texts)
        assert not {text_key(text) for text, _ in shown} & set(map(text_key, task.texts))


def flags_set_in(path: Path) -> set[str]:
    "The strings that a module puts into sets, by braces or by `add`: they are flags."
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        strings = []
        if isinstance(node, ast.Set):
            strings = [element for element in node.elts if not isinstance(element, ast.Starred)]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add":
            strings = node.args
        for string in strings:
            for part in ast.walk(string):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    found.add(part.value)
    return found


def test_the_table_has_every_flag_that_is_set():
    "The parser and the probing code set flags by name; each is in the table, and nothing else is."
    modules = [PACKAGE / "data" / f"{name}.py" for name in ("answers", "json_parts")]
    modules += sorted((PACKAGE / "probing").glob("*.py"))
    assert set().union(*map(flags_set_in, modules)) == set(FLAGS)
    assert all(flag.name == name for name, flag in FLAGS.items())
    assert {flag.level for flag in FLAGS.values()} == {"prompt", "answer", "step"}
    assert IRREGULAR_FLAGS == {name for name, flag in FLAGS.items() if flag.irregular}


def test_a_task_shows_itself_in_a_few_lines():
    task = load_task("convabuse")
    assert repr(task) == (
        "<convabuse: 853 texts, 12 labels, 2 to 6 annotators per text, "
        "splits: train 2501, dev 831, test 853>"
    )
    assert repr(load_task("goemotions")).count("aggregated") == 1
    assert repr(unannotated(["hm"], LabelSet(["joy"]))) == (
        "<texts: 1 text, 1 label, 0 annotators per text>"
    )
    assert len(repr(task.labels)) < 250


def test_a_task_as_html():
    "Counts of labels and three texts; what people wrote cannot become a part of the page."
    joy = np.array([[1, 0], [1, 0], [0, 1]])
    texts = ["<script>alert(1)</script> & more", "fine", "unread", "the fourth"]
    annotations = [joy, joy[2:], joy[:0], joy]
    labels = LabelSet(["joy", "<b>fear</b>"])
    task = AnnotatedTexts("a & b", ["1", "2", "3", "4"], texts, labels, annotations)
    page = task._repr_html_()
    assert "<script" not in page and "<b>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in page
    assert "a &amp; b: 4 texts" in page
    assert "<td>joy</td>" in page and "nobody was asked" in page and "the fourth" not in page
    assert "<td>2</td>" in page and "<td>1</td>" in page  # texts with each label
    assert "<td>none</td>" in AnnotatedTexts("n", ["1"], ["x"], labels, [0 * joy])._repr_html_()
    assert unannotated([], labels)._repr_html_()


def test_items_by_id():
    task = load_task("brighter-eng")
    ids = task.ids[5:2:-1]
    some = task.at(ids)
    assert some.ids == ids and some.texts == task.texts[5:2:-1]
    assert some.gold_sets() == task.gold_sets()[5:2:-1] and some.splits is task.splits
    with pytest.raises(ValueError, match="brighter-eng has no item 'nowhere'"):
        task.at([ids[0], "nowhere"])


def test_texts_that_nobody_annotated():
    labels = LabelSet(["joy", "fear"])
    splits = {"train": small("mfrc")}
    task = unannotated(["a", "b"], labels, ["x", "y"], "mine", "emotions", splits)
    assert (task.ids, task.name, task.label_noun) == (("x", "y"), "mine", "emotions")
    assert task.pool.name == "mfrc" and task.distribution().isna().all(axis=None)
    with pytest.raises(ValueError, match="item 'x' has no annotations"):
        task.majority()
    assert without_texts(task, [" A "]).texts == ("b",)
