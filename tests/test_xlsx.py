"""Spreadsheets as people have them: each cell is read on purpose, or refused by its name."""

import io
import subprocess
import sys
import warnings
import zipfile
from datetime import date, datetime

import openpyxl
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openpyxl.cell import Cell

from mlc_notebooks.data import describe_table, load_table
from mlc_notebooks.data.results import write_results
from mlc_notebooks.data.spreadsheets import read_sheet, sheet_bytes
from mlc_notebooks.data.table_files import read_table_file

HEADER = ["id", "text", "labels"]
TICKETS = [HEADER, ["007", "Lost", "joy; fear"], [8, "Late", "none"], [9, "Hm", None]]


def book_of(rows):
    "A workbook with one sheet."
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    return book


def read(folder, book, name="tickets.xlsx", **options):
    "The task of a workbook, and the warnings."
    path = folder / name
    if isinstance(book, bytes):
        path.write_bytes(book)
    else:
        book.save(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return load_table(path, **options), [str(warning.message) for warning in caught]


def with_values(content, values):
    "The file with values beside its formulas, as a spreadsheet program stores them."
    given, out = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
    with zipfile.ZipFile(out, "w") as changed:
        for name in given.namelist():
            text = given.read(name)
            if name.startswith("xl/worksheets/sheet"):
                for before, after in values.items():
                    assert before.encode() in text
                    text = text.replace(before.encode(), after.encode())
            changed.writestr(name, text)
    return out.getvalue()


def saved(book):
    "The bytes of a workbook."
    file = io.BytesIO()
    book.save(file)
    return file.getvalue()


def test_a_sheet_is_a_table(tmp_path):
    task, told = read(tmp_path, book_of(TICKETS))
    assert task.ids == ("007", "8", "9") and task.texts == ("Lost", "Late", "Hm")
    assert [len(votes) for votes in task.annotations] == [1, 1, 0] and not told
    assert task.at(["007", "8"]).gold_sets() == [("fear", "joy"), ()]
    wide = [["text", "joy", "fear"], ["Lost", 1, False], ["Late", "yes", 0.0], ["Hm", None, None]]
    task, told = read(tmp_path, book_of(wide))
    assert task.at(["0", "1"]).gold_sets() == [("joy",), ("joy",)] and not told
    described = describe_table(tmp_path / "tickets.xlsx")
    assert "sheet 'Sheet'" in repr(described)
    shares = [["text", "joy"], ["Lost", 0.67]]
    task, _ = read(tmp_path, book_of(shares), soft=True)
    assert task.distribution().to_numpy().tolist() == [[0.67]]


CELLS = {
    "a whole number": (7, "General", "7"),
    "a whole number with a point": (7.0, "0.00", "7"),
    "shown with zeros": (7, "00000", "00007"),
    "typed as text": ("00007", "General", "00007"),
    "a fraction": (0.1 + 0.2, "General", "0.3"),
    "a percentage": (0.5, "0%", "0.5"),
    "true": (True, "General", "TRUE"),
    "a date": (date(2026, 1, 2), "DD.MM.YYYY", "2026-01-02"),
    "a moment": (datetime(2026, 1, 2, 9, 30), "dd.mm.yy h:mm", "2026-01-02 09:30:00"),
    "NA": ("NA", "General", "NA"),
    "spaces": (" hm ", "General", " hm "),
    "lines": ("a\nb", "General", "a\nb"),
    "a stored return": ("a_x000D_\nb", "General", "a\r\nb"),
    "a formula's text": ("'=1+1", "General", "'=1+1"),
}


@pytest.mark.parametrize("value, shown_as, text", CELLS.values(), ids=CELLS)
def test_a_cell_as_text(tmp_path, value, shown_as, text):
    book = book_of([["text", "note"], ["hm", value]])
    book.active["B2"].number_format = shown_as
    book.save(tmp_path / "a.xlsx")
    described = describe_table(tmp_path / "a.xlsx", labels=["joy"])
    assert described.table["note"].tolist() == [text] and not described.doubts


def test_what_a_spreadsheet_may_have_changed_is_said_where_it_matters(tmp_path):
    rows = [[*HEADER, "closed"], [1234567890123456789, "Lost", date(2026, 2, 1), date(2026, 3, 1)]]
    task, told = read(tmp_path, book_of(rows))
    assert task.labels.names == ("2026-02-01",) and len(told) == 2
    assert "column 'id': cell A2 holds a number of more than 15 digits" in told[0]
    assert "column 'labels': cell C2 holds a date, read as 2026-02-01" in told[1]


def test_errors_of_a_sheet(tmp_path):
    rows = [["text", "labels", "rate"], ["Lost", "joy", "#DIV/0!"], ["Late", "#N/A", 1]]
    with pytest.raises(ValueError, match="tickets.xlsx: column 'labels': cell B3.*#N/A"):
        read(tmp_path, book_of(rows))
    rows[2][1] = "joy"
    _, told = read(tmp_path, book_of(rows))
    assert len(told) == 1 and "column 'rate': cell C2 holds the error #DIV/0!" in told[0]
    marks = [["text", "joy"], ["Lost", 1], ["Late", "#N/A"]]
    with pytest.raises(ValueError, match="row 2: column 'joy': '#N/A' is neither 0 nor 1"):
        read(tmp_path, book_of(marks))


def test_formulas(tmp_path):
    rows = [["text", "labels"], ["Lost", '=IF(1,"joy","")'], ["Late", '=IF(0,"joy","")']]
    content = saved(book_of(rows))
    with pytest.raises(ValueError, match="cell B2 holds a formula, and the file has no value"):
        read(tmp_path, content)
    formula = '<c r="B{}"><f>IF({},"joy","")</f><v></v></c>'
    stored = '<c r="B{}" t="str"><f>IF({},"joy","")</f><v>{}</v></c>'
    variants = [(formula.format(2, 1), stored.format(2, 1, "joy"))]
    variants.append((formula.format(3, 0), stored.format(3, 0, "")))
    sheet = zipfile.ZipFile(io.BytesIO(content)).read("xl/worksheets/sheet1.xml").decode()
    values = {}
    for before, after in variants:
        if before not in sheet:  # another way of writing an empty element
            before = before.replace("<v></v>", "<v />")
        values[before] = after
    task, told = read(tmp_path, with_values(content, values))
    assert task.at(["0"]).gold_sets() == [("joy",)] and not told
    assert len(task.annotations[1]) == 0  # the empty text is blank


def test_merged_cells(tmp_path):
    rows = [[*HEADER, "annotator"], [1, "Lost", "joy", "Ann"], [None, None, "fear", "Bo"]]
    book = book_of(rows)
    book.active.merge_cells("A2:A3")
    book.active.merge_cells("B2:B3")
    task, told = read(tmp_path, book)
    assert task.ids == ("1",) and task.distribution().to_numpy().tolist() == [[0.5, 0.5]]
    assert len(told) == 1 and "read into each row: 2 areas" in told[0]
    titled = book_of([["Tickets of May", None, None], *TICKETS])
    titled.active.merge_cells("A1:C1")
    with pytest.raises(ValueError, match="A1:C1 are merged over several columns"):
        read(tmp_path, titled)


def test_hidden_blank_and_coloured(tmp_path):
    book = book_of([[], [None, *HEADER], [None, 1, "Lost", "joy"], [], [None, 2, "Late", "fear"]])
    sheet = book.active
    sheet.row_dimensions[5].hidden = True
    sheet.column_dimensions["D"].hidden = True
    sheet["XFD9000"].fill = openpyxl.styles.PatternFill("solid", "FFFF00")
    sheet["A1048576"].fill = openpyxl.styles.PatternFill("solid", "FFFF00")
    task, told = read(tmp_path, book)
    assert task.ids == ("1", "2") and task.gold_sets() == [("joy",), ("fear",)]
    assert "hidden, and read all the same: row 5" in told[0] and "['labels']" in told[1]
    notes = describe_table(tmp_path / "tickets.xlsx").notes
    assert notes == ("blank rows of the sheet that are left out: 1",)


def test_several_sheets(tmp_path):
    book = book_of(TICKETS)
    book.active.title = "cover"
    book.active.sheet_state = "hidden"
    book.create_sheet("open").append(["text", "labels"])
    book["open"].append(["Lost", "joy"])
    book.create_sheet("nothing")
    task, told = read(tmp_path, book)
    assert task.texts == ("Lost",) and len(told) == 1
    assert "the sheet 'open' is read, and not ['cover']" in told[0] and "sheet=" in told[0]
    task, told = read(tmp_path, book, sheet="cover")
    assert len(task) == 3 and not told
    with pytest.raises(ValueError, match="no sheet 'done' among"):
        read(tmp_path, book, sheet="done")
    (tmp_path / "a.csv").write_text("text,labels\nhm,joy\n")
    with pytest.raises(ValueError, match="has no sheets"):
        load_table(tmp_path / "a.csv", sheet="open")


def test_what_is_no_xlsx(tmp_path):
    whole = saved(book_of(TICKETS))
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("notes.txt", "hm")
    old = bytes.fromhex("d0cf11e0a1b11ae1") + b"\0" * 600
    damaged = {"cut": whole[:-200], "zip": other.getvalue(), "text": b"text,labels\n", "none": b""}
    for content in damaged.values():
        with pytest.raises(ValueError, match="tickets.xlsx: the file is damaged or no xlsx"):
            read(tmp_path, content)
    with pytest.raises(ValueError, match="protected by a password, or an old xls"):
        read(tmp_path, old)
    with pytest.raises(ValueError, match="the sheet 'Sheet' is empty"):
        read(tmp_path, book_of([]))
    with pytest.raises(ValueError, match="no rows"):
        read(tmp_path, book_of([HEADER]))
    with pytest.raises(ValueError, match="column 2 has no name"):
        read(tmp_path, book_of([["text", None], ["hm", "joy"]]))
    with pytest.raises(ValueError, match=r"cannot read \.xls, use one of.*xlsx"):
        load_table("tickets.xls")


def test_without_openpyxl_it_is_said_what_to_install(tmp_path):
    (tmp_path / "tickets.xlsx").write_bytes(saved(book_of(TICKETS)))
    code = (
        "import sys; sys.modules['openpyxl'] = None\n"
        "from mlc_notebooks.report.cli import mlc_probe\n"
        f"sys.exit(mlc_probe(['--file', {str(tmp_path / 'tickets.xlsx')!r}, '--describe']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "pip install 'mlc_notebooks[excel]'" in done.stderr


def test_the_command_reads_a_sheet(tmp_path, capsys):
    from mlc_notebooks.report.cli import mlc_probe

    book = book_of(TICKETS)
    book.create_sheet("more").append(["text"])
    book.save(tmp_path / "tickets.xlsx")
    assert mlc_probe(["--file", str(tmp_path / "tickets.xlsx"), "--describe"]) == 0
    shown = capsys.readouterr().out
    assert "fear 1, joy 1, none 1" in shown and "name another one with --sheet" in shown
    book_of([*TICKETS, [10, "Oh", "no label"]]).save(tmp_path / "b.xlsx")
    assert mlc_probe(["--file", str(tmp_path / "b.xlsx"), "--none", "no label", "--describe"]) == 0
    assert "no label 1" in capsys.readouterr().out
    options = ["--file", str(tmp_path / "tickets.xlsx"), "--sheet", "more", "--describe"]
    assert mlc_probe(options) == 2
    assert "no rows" in capsys.readouterr().err


def test_written_texts_are_texts():
    texts = ["=1+1", "+49 30", "-", "@all", "#N/A", "a\rb\n_x000D_", "\x07\ufffe", "0042", " hm "]
    frame = pd.DataFrame({"=id": texts, "p_joy": [0.1] * 9, "sure": [True, None] + [False] * 7})
    content = sheet_bytes(frame)
    sheet = openpyxl.load_workbook(io.BytesIO(content)).active
    cells: list[Cell] = [row[0] for row in sheet.iter_rows()]
    assert {cell.data_type for cell in cells} == {"s"}
    read = read_sheet(content)
    assert [row[0] for row in read.rows] == ["=id", *texts] and not read.faults
    assert [row[2] for row in read.rows[1:4]] == ["TRUE", "", "FALSE"]
    assert sheet["B2"].value == 0.1 and sheet.freeze_panes == "A2"
    with pytest.raises(ValueError, match="row 1, column 'text': a cell of a sheet holds at most"):
        sheet_bytes(pd.DataFrame({"text": ["x" * 32_768]}))


LETTERS = st.sampled_from(
    [*"ab ;|,\"'\n\r\t=+-@_x000D_\\[{%#/é😀\x01\x0b\x7f\x85\u2028\ufeff\ufffe"]
)


@settings(max_examples=30)
@given(
    texts=st.lists(
        st.text(LETTERS | st.characters(codec="utf-8", exclude_characters="\0"), min_size=1),
        min_size=1,
    )
)
def test_any_text_comes_back_from_every_kind_of_file(texts, tmp_path_factory):
    texts = [text if text.strip() else f"a{text}" for text in texts]
    frame = pd.DataFrame({"id": list(map(str, range(len(texts)))), "text": texts, "p_joy": 0.1})
    for kind in ("csv", "tsv", "jsonl", "parquet", "xlsx"):
        path = tmp_path_factory.getbasetemp() / f"texts.{kind}"
        write_results(path, frame)
        assert read_table_file(path).rows["text"].tolist() == texts
