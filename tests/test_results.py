"""Results beside a user's own rows: what went in comes out, in every kind of file."""

import csv
import json

import openpyxl
import pandas as pd
import pytest

from mlc_notebooks.data import describe_table, load_table
from mlc_notebooks.data.results import (
    KINDS,
    add_results,
    label_studio_predictions,
    results_kind,
    write_results,
)

TEXTS = ["I won, hurray", '=HYPERLINK("x")', "two\r\nlines", "-5 | a;b", "Never again", "NA"]
LABELS = ["joy", "sad; tired", "fear"]
TICKETS = pd.DataFrame(
    {
        "number": ["007", "1e5", "0", "9007199254740993", "0042", "1.50"],
        "text": TEXTS,
        "Remark": [None, "null", "a\tb", "@x", " ", "10%"],
    }
)
P = [[1 / 3, 1e-9, 1.0], [0.5, 0.25, 0.1], [0.9, 0.8, 0.7], [0, 0, 0], [0.1, 0.6, 0.2]]
KINDS_OF_TABLES = [kind for kind in KINDS if kind != "labelstudio.json"]


def results_of(described, p=P):
    "Probabilities, labels from .5 on, and flags, for the texts of a description."
    ids = list(described.task.ids)
    probabilities = pd.DataFrame(p[: len(ids)], pd.Index(ids, name="id"), LABELS)
    rows = probabilities.to_dict("index")
    chosen = {item: tuple(label for label in LABELS if rows[item][label] >= 0.5) for item in ids}
    return (
        probabilities,
        chosen,
        {item: ("preamble",) if i == 1 else () for i, item in enumerate(ids)},
    )


@pytest.fixture
def described(tmp_path):
    table = TICKETS.assign(split=["test"] * 5 + ["train"])
    table.to_csv(tmp_path / "in.csv", index=False)
    return describe_table(tmp_path / "in.csv", id="number", labels=LABELS)


@pytest.mark.parametrize("kind", KINDS_OF_TABLES)
def test_what_went_in_comes_out(tmp_path, described, kind):
    probabilities, chosen, flags = results_of(described)
    abstain = dict.fromkeys(chosen, False) | {"0": True}
    frame = add_results(described.table, described.items, probabilities, chosen, flags, abstain)
    path = tmp_path / f"out.{kind}"
    write_results(path, frame)

    again = describe_table(path, id="number", labels=LABELS)
    columns = [*TICKETS, "split", *(f"p_{label}" for label in LABELS), "labels", "flags", "abstain"]
    assert list(again.table) == columns
    own = again.table[list(TICKETS)].astype(object)
    expected = described.table[list(TICKETS)]
    assert own.where(own.notna(), None).equals(expected.where(expected.notna(), None))
    assert again.task.ids == tuple(TICKETS["number"][:5]) and again.task.texts == tuple(TEXTS[:5])
    assert again.task.gold_sets() == [chosen[item] for item in again.task.ids]
    assert len(again.task.pool.annotations[0]) == 0  # not asked about
    written = again.table["p_joy"][:5].astype(float).tolist()
    exact = kind == "parquet"
    assert written == [row[0] if exact else float(f"{row[0]:.6g}") for row in P]
    assert [str(cell).lower() for cell in again.table["abstain"][:5]] == ["false"] * 2 + [
        "true",
        "false",
        "false",
    ]


def test_csv_as_other_programs_read_it(tmp_path, described):
    frame = add_results(described.table, described.items, *results_of(described))
    write_results(tmp_path / "out.csv", frame)
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows] == TEXTS
    assert rows[0]["p_joy"] == "0.333333" and rows[0]["p_sad; tired"] == "1e-09"
    assert [row["labels"] for row in rows[:4]] == [
        "fear",
        "joy",
        '["joy", "sad; tired", "fear"]',
        "none",
    ]
    assert [row["flags"] for row in rows[:2]] == ["", "preamble"] and rows[5]["labels"] == ""
    assert pd.read_csv(tmp_path / "out.csv")["p_fear"].isna().tolist() == [False] * 5 + [True]


def test_formulas_of_strangers_are_text_in_a_sheet(tmp_path, described):
    frame = add_results(described.table, described.items, *results_of(described))
    write_results(tmp_path / "out.xlsx", frame)
    sheet = openpyxl.load_workbook(tmp_path / "out.xlsx").active
    assert (sheet["B3"].value, sheet["B3"].data_type) == (TEXTS[1], "s")
    assert (sheet["A2"].value, sheet["A2"].data_type) == ("007", "s")
    assert (sheet["E2"].value, sheet["E2"].data_type) == (0.333333, "n")


def test_columns_of_the_user_are_never_overwritten(described):
    table = described.table.assign(labels="x", p_joy="high", model_p_joy="low", flags=None)
    frame = add_results(table, described.items, *results_of(described))
    assert list(frame)[: len(list(table))] == list(table)
    assert frame[list(table)].equals(table)
    new = ["model_2_p_joy", "p_sad; tired", "p_fear", "model_labels", "model_flags"]
    assert list(frame)[len(list(table)) :] == new


def test_each_answer_of_a_person_gets_the_result_of_its_text(tmp_path):
    judged = pd.DataFrame(
        {
            "id": ["b", "a", "b"],
            "annotator": ["Ann", "Ann", "Bo"],
            "text": ["oh", "hm", "oh"],
            "labels": ["joy", "none", "fear"],
        }
    )
    described = describe_table(judged, labels=LABELS)
    frame = add_results(described.table, described.items, *results_of(described))
    assert frame["id"].tolist() == ["b", "a", "b"]
    assert frame["p_joy"].tolist() == [1 / 3, 0.5, 1 / 3]
    assert frame["model_labels"].tolist() == [["fear"], ["joy"], ["fear"]]


def test_cells_of_json_stay_what_they_are(tmp_path):
    lines = [
        {"text": "a", "labels": ["joy"], "meta": {"n": 7}, "mixed": ["x"], "ok": True},
        {"text": "b", "labels": [], "meta": {"n": 8}, "mixed": "y", "ok": False},
    ]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    described = describe_table(path, labels=LABELS)
    for kind in KINDS_OF_TABLES:
        frame = add_results(described.table, described.items, *results_of(described))
        write_results(tmp_path / f"out.{kind}", frame)
        again = describe_table(tmp_path / f"out.{kind}", labels=LABELS)
        assert again.task.gold_sets() == [("joy",), ()]
    first = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert first["meta"] == {"n": "7"} and first["ok"] is True and first["flags"] is None
    assert pd.read_parquet(tmp_path / "out.parquet")["mixed"].tolist() == ["x", "y"]


EXPORT = [
    {
        "id": 11,
        "data": {"text": "I won", "id": "007"},
        "annotations": [
            {
                "completed_by": 3,
                "result": [{"from_name": "mood", "type": "choices", "value": {"choices": ["joy"]}}],
            }
        ],
    },
    {"id": 12, "data": {"text": "Well", "id": "008"}, "annotations": []},
]


def test_from_label_studio_to_label_studio(tmp_path):
    (tmp_path / "export.json").write_text(json.dumps(EXPORT))
    described = describe_table(tmp_path / "export.json", labels=LABELS)
    task = described.task
    assert task.ids == ("007", "008")
    probabilities, chosen, _ = results_of(described)
    tasks = label_studio_predictions(
        task.texts, task.ids, probabilities, chosen, "smollm2-135m", from_name="mood"
    )
    path = tmp_path / "out.labelstudio.json"
    write_results(path, tasks)
    (first, second) = json.loads(path.read_text())
    assert first["data"]["p_joy"] == 0.333333
    assert first["predictions"] == [
        {
            "model_version": "smollm2-135m",
            "score": 0.666667,
            "result": [
                {
                    "from_name": "mood",
                    "to_name": "text",
                    "type": "choices",
                    "value": {"choices": ["fear"]},
                }
            ],
        }
    ]
    assert second["predictions"][0]["score"] == 0.5
    again = load_table(path, labels=LABELS)
    assert (again.ids, again.texts) == (task.ids, task.texts)
    assert [len(votes) for votes in again.annotations] == [0, 0]
    # annotated there, and exported again: the ids of the user are still there
    for number, one in enumerate((first, second)):
        one |= {"id": 40 + number, "annotations": EXPORT[0]["annotations"]}
    path.write_text(json.dumps([first, second]))
    assert load_table(path).ids == ("007", "008")


def test_a_table_of_results_is_no_table_of_gold_labels(tmp_path, described):
    frame = add_results(described.table, described.items, *results_of(described))
    write_results(tmp_path / "out.csv", frame)
    again = describe_table(tmp_path / "out.csv", id="number", labels=LABELS)
    assert any("there it has a model's labels" in doubt for doubt in again.doubts)


def test_refused(tmp_path, described):
    probabilities, chosen, flags = results_of(described)
    for name in ("out", "out.json", "out.xls", "out.csv.gz"):
        with pytest.raises(ValueError, match=r"ends in \.csv, \.tsv, \.jsonl, \.parquet, \.xlsx"):
            results_kind(tmp_path / name)
    with pytest.raises(TypeError, match="label_studio_predictions"):
        write_results(tmp_path / "out.labelstudio.json", TICKETS)
    with pytest.raises(TypeError, match="the table that add_results returns"):
        write_results(tmp_path / "out.csv", [])
    with pytest.raises(ValueError, match="no row is about the item '0'"):
        add_results(TICKETS, list("abcdef"), probabilities, chosen, flags)
    with pytest.raises(ValueError, match="5 ids for a table of 6 rows"):
        add_results(TICKETS, described.items[:5], probabilities, chosen, flags)
    long = TICKETS.assign(text="x" * 40_000)
    with pytest.raises(ValueError, match="at most 32,767 characters"):
        write_results(tmp_path / "out.xlsx", long)
    with pytest.raises(OSError, match="could not be written"):
        write_results(tmp_path / "nowhere" / "out.csv", TICKETS)
    assert not list(tmp_path.glob("out*"))
