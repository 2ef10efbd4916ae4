"""Tables as people have them: what `load_table` makes of them, or how it refuses.

Each small file stands for a kind of fault that public bug reports of other tools describe.
"""

import gzip
import json
import warnings

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlc_notebooks.data import describe_table, load_table


def read(folder, name, content, **options):
    "The task of a file with this content, and the warnings."
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return load_table(path, **options), [str(warning.message) for warning in caught]


def answers(task):
    "What stands for each text: its labels, or None where nobody has labelled it."
    return [
        task.at([item]).gold_sets()[0] if len(votes) else None
        for item, votes in zip(task.ids, task.annotations)
    ]


JOY = ("joy",)
BOTH = ("anger", "joy")
LISTS = {
    "semicolon": "joy; anger",
    "bar": "joy|anger",
    "json": '["joy", "anger"]',
    "python": "['joy', 'anger']",
    "tuple": "('joy', 'anger')",
    "set": "{'joy', 'anger'}",
    "numpy": "['joy' 'anger']",
    "numpy over two lines": "['joy'\n 'anger']",
    "flags": '{"joy": 1, "anger": 1, "fear": 0}',
    "true and false": "{'joy': True, 'anger': True, 'fear': False}",
    "label studio": '{"choices": ["joy", "anger"]}',
    "repeated": "joy; anger; joy",
}


@pytest.mark.parametrize("cell", LISTS.values(), ids=LISTS)
def test_lists_inside_of_a_cell(tmp_path, cell):
    table = pd.DataFrame({"text": ["a", "b"], "labels": [cell, "joy"]})
    task, told = read(tmp_path, "a.csv", table.to_csv(index=False))
    assert answers(task) == [BOTH, JOY] and not told


@pytest.mark.parametrize("name", ["NA", "null", "nan", "None", "N/A", "NaN", "n/a", "true", "-"])
def test_words_that_look_like_missing_values(tmp_path, name):
    csv = f"id,text,labels\n{name},{name},{name}\n2,b,joy\n"
    none = "no label" if name == "None" else "none"
    task, told = read(tmp_path, "a.csv", csv, none=none)
    assert task.ids == (name, "2") and task.texts == (name, "b")
    assert answers(task) == [(name,), JOY] and not told


def test_a_blank_cell_is_no_answer_and_none_is_one(tmp_path):
    csv = "text,labels\na,joy\nb,\nc,none\nd,[]\ne,  \n"
    task, told = read(tmp_path, "a.csv", csv)
    assert answers(task) == [JOY, None, (), (), None] and not told
    wide = "text,joy,anger\na,1,0\nb,,\nc,0,0\n"
    task, _ = read(tmp_path, "b.csv", wide)
    assert answers(task) == [JOY, None, ()]
    lines = '{"text": "a", "labels": ["joy"]}\n{"text": "b"}\n{"text": "c", "labels": null}\n'
    task, _ = read(tmp_path, "c.jsonl", lines + '{"text": "d", "labels": []}\n')
    assert answers(task) == [JOY, None, None, ()]


def test_ids_and_texts_stay_as_they_stand(tmp_path):
    ids = ["007", "1234567890123456789", "1e5", "1.50", "TRUE", "-0"]
    texts = ["0042", "1e5", "12", "1,5", "2020-01-01", "+4"]
    table = pd.DataFrame({"id": ids, "text": texts, "labels": "joy"})
    for name in ("a.csv", "a.tsv", "a.csv.gz"):
        content = table.to_csv(index=False, sep="\t" if "tsv" in name else ",").encode()
        task, _ = read(tmp_path, name, gzip.compress(content) if "gz" in name else content)
        assert task.ids == tuple(ids) and task.texts == tuple(texts)
    table.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    assert load_table(tmp_path / "a.jsonl").ids == tuple(ids)
    lines = '{"id": 1234567890123456789, "text": 42, "labels": ["joy"]}\n'
    task, _ = read(tmp_path, "b.jsonl", lines)
    assert (task.ids, task.texts) == (("1234567890123456789",), ("42",))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_with_a_mark(tmp_path, encoding):
    csv = "text,labels\nCafé 喜,joy\n"
    lines = json.dumps({"text": "Café 喜", "labels": ["joy"]}, ensure_ascii=False)
    for name, content in (("a.csv", csv), ("a.tsv", csv.replace(",", "\t")), ("a.jsonl", lines)):
        task, _ = read(tmp_path, name, content.encode(encoding))
        assert task.texts == ("Café 喜",) and answers(task) == [JOY]
    (tmp_path / "labels.txt").write_text("joy\nanger\n", encoding=encoding)
    task, _ = read(tmp_path, "b.csv", "text\nhm\n", labels=tmp_path / "labels.txt")
    assert task.labels.names == ("joy", "anger")


def test_encodings_that_have_to_be_named(tmp_path):
    western = "text,labels\nCafé,joy\n".encode("cp1252")
    task, _ = read(tmp_path, "a.csv", western, encoding="cp1252")
    assert task.texts == ("Café",)
    for content, said in (
        (western, "line 2 is not utf-8"),
        ("text\nhm\n".encode("utf-16-le"), "utf-16-le"),
    ):
        with pytest.raises(ValueError, match=said):
            read(tmp_path, "a.csv", content, labels=["joy"])
    with pytest.raises(ValueError, match="unknown encoding 'latin-99'"):
        read(tmp_path, "a.csv", western, encoding="latin-99")


def test_other_delimiters(tmp_path):
    for mark in ";\t|":
        csv = f"text{mark}joy{mark}anger\nI won, hurray{mark}1{mark}0\n"
        task, _ = read(tmp_path, "a.csv", csv)
        assert task.texts == ("I won, hurray",) and answers(task) == [JOY]
    decimal_commas = "text;joy;anger\nhm;0,67;0\n"
    task, _ = read(tmp_path, "a.csv", decimal_commas, soft=True)
    assert task.distribution().to_numpy().tolist() == [[0.67, 0]]
    for told in ("sep=;\r\ntext;labels\r\nhm;joy\r\n", "text,labels\rhm,joy\r"):
        task, _ = read(tmp_path, "a.csv", told)
        assert task.texts == ("hm",) and answers(task) == [JOY]
    task, _ = read(tmp_path, "a.csv", "text~labels\nhm~joy\n", delimiter="~")
    assert answers(task) == [JOY]


def test_separators_between_labels(tmp_path):
    csv = 'text,labels\na,"joy, anger"\nb,joy\nc,anger\n'
    task, told = read(tmp_path, "a.csv", csv)
    assert answers(task)[0] == BOTH and "separator=" in told[0] and "joy, anger" in told[0]
    for mark in ",/#+":
        table = pd.DataFrame({"text": ["a", "b"], "labels": [f"joy{mark}anger", f"joy{mark} fear"]})
        task, told = read(tmp_path, "b.csv", table.to_csv(index=False), separator=mark)
        assert answers(task) == [BOTH, ("fear", "joy")] and not told
        task, told = read(tmp_path, "b.csv", table.to_csv(index=False))
        assert len(task.labels) == 2 and "several labels hold 'joy'" in told[0]
    commas = 'text,labels\na,"joy, anger"\n'
    task, told = read(tmp_path, "c.csv", commas, labels=["joy", "anger", "fear"])
    assert answers(task) == [("joy", "anger")] and "separator=" in told[0]


def test_a_column_called_label_and_numbers_for_names(tmp_path):
    lines = '{"id": 1, "text": "a", "label": ["joy"]}\n{"id": 2, "text": "b", "label": ["anger"]}\n'
    for labels in (None, ["joy", "anger"]):
        task, _ = read(tmp_path, "a.jsonl", lines, labels=labels)
        assert answers(task) == [JOY, ("anger",)]
    numbers = '{"text": "a", "labels": [0, 2]}\n{"text": "b", "labels": []}\n'
    task, _ = read(tmp_path, "b.jsonl", numbers, labels=["joy", "anger", "fear"])
    assert answers(task) == [("joy", "fear"), ()]
    task, told = read(tmp_path, "b.jsonl", numbers)
    assert task.labels.names == ("0", "2") and "places in a list of names" in told[0]
    multi_hot = '{"text": "a", "labels": [1, 0, 1]}\n{"text": "b", "labels": [0, 0, 0]}\n'
    task, _ = read(tmp_path, "c.jsonl", multi_hot, labels=["joy", "anger", "fear"])
    assert answers(task) == [("joy", "fear"), ()]
    with pytest.raises(ValueError, match="label number 7 is beyond the 2 labels"):
        read(tmp_path, "d.csv", "text,label\na,7\n", labels=["joy", "anger"])


def test_parquet_of_datasets(tmp_path):
    feature = {"feature": {"names": ["joy", "anger"], "_type": "ClassLabel"}, "_type": "Sequence"}
    info = json.dumps({"info": {"features": {"text": {"_type": "Value"}, "labels": feature}}})
    rows = pa.table({"text": ["a", "b", "c"], "labels": [[1, 0], [], None], "id": [1, 2, None]})
    pq.write_table(rows.replace_schema_metadata({"huggingface": info}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="row 3, column 'id': it has no id"):
        load_table(tmp_path / "a.parquet")
    pq.write_table(
        rows.drop(["id"]).replace_schema_metadata({"huggingface": info}), tmp_path / "a.parquet"
    )
    assert answers(load_table(tmp_path / "a.parquet")) == [BOTH, (), None]
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="damaged or no parquet"):
        load_table(tmp_path / "a.parquet")


DOCCANO = '{"id": 4, "text": "a", "label": ["joy", "anger"], "Comments": []}'
MIN = '[{"id": 1, "text": "a", "mood": {"choices": ["joy", "anger"]}, "annotator": 3}]'
STUDIO = json.dumps(
    [
        {
            "id": 1,
            "data": {"text": "a"},
            "annotations": [
                {
                    "completed_by": 3,
                    "was_cancelled": False,
                    "result": [
                        {
                            "from_name": "mood",
                            "type": "choices",
                            "value": {"choices": ["joy", "anger"]},
                        }
                    ],
                }
            ],
            "predictions": [{"result": [{"value": {"choices": ["fear"]}}]}],
        }
    ]
)
ARGILLA = json.dumps(
    [
        {
            "id": "x",
            "status": "completed",
            "fields": {"text": "a"},
            "responses": {"mood": [{"value": ["joy", "anger"], "user_id": "u"}]},
        }
    ]
)
PRODIGY = (
    '{"text": "a", "_input_hash": 5, "options": [], "accept": ["joy", "anger"], "answer": "accept"}'
)


@pytest.mark.parametrize(
    "name, content, options",
    [
        ("doccano.jsonl", DOCCANO, {}),
        ("doccano.jsonl", DOCCANO.replace('"text"', '"data"'), {"text": "data"}),
        ("min.json", MIN, {"labels_column": "mood"}),
        ("studio.json", STUDIO, {}),
        ("studio.json", STUDIO, {"labels_column": "mood"}),
        ("argilla.json", ARGILLA, {}),
        ("prodigy.jsonl", PRODIGY, {}),
    ],
)
def test_exports_of_annotation_tools(tmp_path, name, content, options):
    task, told = read(tmp_path, name, content, **options)
    assert task.texts == ("a",) and answers(task) == [BOTH] and not told


def test_people(tmp_path):
    csv = "task,worker,text,labels\n1,w1,I won,joy\n1,w2,I won,anger\n2,w1,He lied,anger\n"
    task, told = read(tmp_path, "a.csv", csv)
    assert len(task) == 3 and "annotator=" in told[0]
    task, told = read(tmp_path, "a.csv", csv, id="task", annotator="worker")
    assert task.ids == ("1", "2") and not told
    assert task.distribution()["joy"].tolist() == [0.5, 0]
    with pytest.raises(ValueError, match="rows 1 and 2 have the same id '1'.*annotator="):
        read(tmp_path, "a.csv", csv, id="task")

    twice = "id,annotator,text,labels\n1,Ann,He lied,anger\n1,Ann,He lied,{}\n1,Bo,He lied,joy\n"
    task, told = read(tmp_path, "b.csv", twice.format("anger"))
    assert task.distribution()["anger"].tolist() == [0.5] and "counts once" in told[0]
    with pytest.raises(ValueError, match="rows 1 and 2: 'Ann' gave two different answers"):
        read(tmp_path, "b.csv", twice.format("joy"))


REFUSED = {
    "a blank mark": (
        "text,joy,anger\na,1,\nb,0,1\n",
        "row 1: column 'anger': a blank label.*blank_as_zero",
    ),
    "-1": ("text,joy,anger\na,1,0\nb,-1,1\n", "row 2: column 'joy': '-1' is neither"),
    "a share": ("text,joy,anger\na,0.67,0\nb,1,0\n", "row 1: column 'joy': '0.67'.*soft=True"),
    "shares only": ("text,joy,anger\na,0.67,0.5\n", "'0.67'.*soft=True"),
    "a word among marks": ("text,joy\na,yes\nb,no\nc,maybe\n", "row 3: column 'joy': 'maybe'"),
    "scores": ('text,labels\na,"{""joy"": 0.9}"\n', "row 1: '0.9' is no mark.*soft=True"),
    "trailing comma": ("id,text,joy\n1,a,1,\n", "row 1 has more fields than the header"),
    "unquoted comma": ("text,labels\na,joy\nNo, he lied,anger\n", "row 2 has more fields"),
    "a short row": ("id,text,joy\n1,a\n", "row 1 has fewer fields"),
    "a stray quote": ('text,labels\n"Stop" she cried,joy\n', "row 1 cannot be read.*double"),
    "an open quote": ('text,labels\na,joy\n"b,joy\nc,joy\n', "row 2 cannot be read"),
    "a swallowed row": ('id,text\n1,"a\n2,b"\n3,c\n', "row 1 may have swallowed the next"),
    "a blank id": ("id,text,labels\n1,a,joy\n,b,joy\n", "row 2, column 'id': it has no id"),
    "a doubled id": ("id,text,labels\n1,a,joy\n1,b,joy\n", "rows 1 and 2 have the same id '1'"),
    "a blank text": ("text,labels\na,joy\n ,joy\n", "row 2, column 'text': it has no text"),
    "a blank split": ("text,labels,split\na,joy,\n", "row 1, column 'split': it has no split"),
    "no list": ("text,labels\na,[joy\n", "row 1: the labels '\\[joy' are no list"),
    "no name": ("text,labels\na,;\n", "row 1: the labels ';' hold no name"),
    "none beside a label": ("text,labels\na,joy; none\n", "row 1: 'none' stands beside labels"),
    "two spellings": ("text,labels\na,joy\nb,Joy\n", "the same up to capital letters"),
    "doubled columns": ("text,joy,joy\na,1,0\n", "two columns are called 'joy'"),
    "a nameless column": ("text,,joy\na,b,1\n", "column 2 has no name"),
    "nothing": ("", "the file is empty"),
    "what Python prints": (
        "text,labels\na,\"array(['joy'], dtype=object)\"\n",
        "row 1: the labels .* are what Python prints",
    ),
    "multi-hot without names": ("text,labels\na,[0 1 1]\n", "name the labels, in their order"),
    "a header": ("text,labels\n", "no rows"),
    "no labels": ("text,likes\na,7\n", "name the labels with labels="),
    "another name": ("Text,labels\na,joy\n", "no column 'text' among"),
    "a nameless person": (
        "id,annotator,text,labels\n1,,a,joy\n",
        "row 1 has labels and no annotator",
    ),
    "two texts": ("id,annotator,text,labels\n1,A,a,joy\n1,B,b,joy\n", "different texts: '1'"),
}


@pytest.mark.parametrize("content, said", REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path, content, said):
    with pytest.raises(ValueError, match=said) as refusal:
        read(tmp_path, "visits.csv", content)
    assert "visits.csv" in str(refusal.value)


JSON_REFUSED = {
    "a broken line": ('{"text": "a", "labels": []}\n{"text": ', "line 2 is no JSON"),
    "no object": ('["a"]\n', "no list of objects"),
    "a number": ("7\n", "line 1 is no object"),
    "spans": ('{"text": "a", "labels": [[0, 5, "PER"]]}', "row 1: the entry"),
    "null in a list": ('{"text": "a", "labels": ["joy", null]}', "row 1: the entry None"),
    "a doubled name": ('{"text": "a", "text": "b"}', "line 1 is no JSON.*occurs twice"),
    "binary answers": (
        '{"text": "a", "label": "joy", "answer": "reject", "_input_hash": 1}',
        "Prodigy's binary answers",
    ),
    "columns of columns": ('{"text": {"0": "a"}, "labels": {"0": ["joy"]}}', "the text is"),
    "a text that is a list": ('{"text": ["a"], "labels": ["joy"]}', "the text is"),
}


@pytest.mark.parametrize("content, said", JSON_REFUSED.values(), ids=JSON_REFUSED)
def test_refused_json(tmp_path, content, said):
    with pytest.raises(ValueError, match=said) as refusal:
        read(tmp_path, "visits.jsonl", content)
    assert "visits.jsonl" in str(refusal.value)


def test_stray_quotes_of_a_tsv_belong_to_its_texts(tmp_path):
    tsv = 'id\ttext\tlabels\n1\ta\tjoy\n2\t"Never again\tjoy\n3\tb\tjoy\n4\t"Stop" she cried\tjoy\n'
    task, _ = read(tmp_path, "a.tsv", tsv)
    assert task.texts == ("a", '"Never again', "b", '"Stop" she cried')
    closed = 'id\ttext\tlabels\n1\t"a\tjoy\n2\tb"\tjoy\n'
    task, _ = read(tmp_path, "b.tsv", closed)
    assert task.texts == ('"a', 'b"')
    quoted = 'id\ttext\tlabels\n1\t"say ""hm"", in\ntwo lines"\tjoy\n'
    task, _ = read(tmp_path, "c.tsv", quoted)
    assert task.texts == ('say "hm", in\ntwo lines',)


def test_the_description_tells_what_was_understood(tmp_path):
    path = tmp_path / "visits.csv"
    path.write_text("key;text;joy;anger;likes\n1;a;1;0;7\n2;b;;;3\n")
    described = describe_table(path, id="key")
    words = repr(described)
    assert "delimiter ';'" in words and "texts that nobody has labelled: 1" in words
    assert described.columns["role"].to_dict() == {
        "key": "id",
        "text": "text",
        "joy": "label",
        "anger": "label",
        "likes": "not used",
    }
    assert described.columns["filled"].to_dict()["joy"] == 1
    assert "labels, all splits: joy 1, anger 0, none 0" in words


def test_a_column_of_lists_beside_columns_of_marks_is_pointed_out(tmp_path):
    _, told = read(tmp_path, "a.csv", "text,label,joy,anger\na,joy,1,0\nb,anger,0,1\n")
    assert "the columns of 0 and 1 ['joy', 'anger'] are not used" in told[0]
    task, told = read(tmp_path, "a.csv", "text,joy,anger\na,1,\n")
    assert task.labels.names == ("joy",) and "'anger' is blank in all rows" in told[0]


def test_percentages_beside_columns_of_marks_are_pointed_out(tmp_path):
    csv = 'text,joy,anger,fear\na,1,67%,0 %\nb,0,"12,5%",100%\n'
    task, told = read(tmp_path, "a.csv", csv)
    assert task.labels.names == ("joy",) and len(told) == 1
    assert "['anger', 'fear'] hold percentages and are not used" in told[0] and "soft=" in told[0]
    assert not read(tmp_path, "a.csv", csv, labels=["joy"])[1]
    with pytest.raises(ValueError, match="no labels.*the columns \\['anger'\\] hold percentages"):
        read(tmp_path, "b.csv", "text,anger\na,67%\n")


@pytest.mark.parametrize("yes, no", [("x", ""), ("Y", "N"), ("yes", "no"), ("TRUE", "FALSE")])
def test_marks_that_people_write(tmp_path, yes, no):
    csv = f"text,joy,anger\na,{yes},{no}\nb,{yes},{yes}\n"
    task, _ = read(tmp_path, "a.csv", csv, blank_as_zero=True)
    assert answers(task) == [JOY, ("joy", "anger")]
