"""mlc-classify: the table of a user comes back with probabilities; what is refused, and how."""

import json
import os
import signal
import subprocess
import sys

import pandas as pd
import pytest

from mlc_notebooks.data import load_table
from mlc_notebooks.report.classify import mlc_classify
from mlc_notebooks.report.cli import mlc_align, mlc_probe

TICKETS = """ticket_no,message,topics,note
00012,"I was charged twice this month, please refund",billing,a
00013,I cannot log in since the update,login; bug,b
00014,The app crashes when I open a photo,bug,
00015,How do I change my password?,login,=1+1
00016,Thanks for the great service!,none,e
00017,"My invoice is wrong
and I am angry",,f
00018,Login page shows an error 500,,g
"""
READ = ["--id", "ticket_no", "--text", "message", "--labels-column", "topics"]


@pytest.fixture
def tickets(tmp_path):
    path = tmp_path / "tickets.csv"
    path.write_text(TICKETS)
    return path


def classify(*argv):
    return mlc_classify([str(argument) for argument in argv])


def as_text(path):
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def test_the_table_comes_back(tickets, capsys):
    "Own columns as they were, in their order; a probability per label; nothing else is left."
    assert classify("--file", tickets, *READ, "--shots", 2) == 0
    said = capsys.readouterr().out
    assert "Does the model read the texts?" in said and "lower is better" in said
    assert "TF-IDF" in said and "2 examples (per_label), platt fitted to 5 rows" in said

    given, found = as_text(tickets), as_text(tickets.with_name("tickets_classified.csv"))
    added = ["p_billing", "p_bug", "p_login", "labels", "flags"]
    assert list(found) == [*given, *added]
    assert found[list(given)].equals(given)
    p = found[added[:3]].astype(float)
    assert ((p >= 0) & (p <= 1)).all(axis=None)
    for row, labels in zip(p.to_numpy(), found["labels"]):
        chosen = [name[2:] for name, value in zip(added, row) if value >= 0.5]
        assert labels == ("; ".join(chosen) or "none")
    assert (found["flags"] == "shown_as_example").sum() == 2
    assert {path.name for path in tickets.parent.iterdir()} == {
        "tickets.csv",
        "tickets_classified.csv",
    }


def test_without_labelled_rows(tmp_path, capsys):
    path = tmp_path / "texts.csv"
    path.write_text("text\nI love it\nHow dare you\n")
    out = tmp_path / "out.jsonl"
    tuned = ["--model", "smollm2-135m-emotions"]
    assert classify("--file", path, "--labels", "joy,anger", "--out", out, *tuned) == 0
    told = capsys.readouterr()
    assert "no row has labels" in told.err and "no examples, not calibrated" in told.out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [set(row) for row in rows] == [{"text", "p_joy", "p_anger", "labels", "flags"}] * 2
    assert rows[0]["p_joy"] > rows[0]["p_anger"] and rows[1]["p_anger"] > rows[1]["p_joy"]


@pytest.mark.parametrize("kind", ["parquet", "xlsx", "tsv", "labelstudio.json"])
def test_rows_of_another_file_teach(tmp_path, tickets, kind):
    new = tmp_path / "new.csv"
    new.write_text("ticket_no,message\n007,The button does nothing\n008,Refund me now\n")
    out = tmp_path / f"new.{kind}"
    options = ["--shots", 4, "--coverage", ".5", "--threshold", "expected_f1"]
    assert classify("--file", new, "--train", tickets, *READ, *options, "--out", out) == 0
    if kind == "labelstudio.json":
        tasks = json.loads(out.read_text())
        assert [task["data"]["id"] for task in tasks] == ["007", "008"]
        return
    readers = {"parquet": pd.read_parquet, "xlsx": pd.read_excel, "tsv": pd.read_table}
    found = readers[kind](out)
    assert found["ticket_no"].astype(str).str.zfill(3).tolist() == ["007", "008"]
    assert {"p_billing", "p_bug", "p_login", "labels", "flags", "abstain"} <= set(found)


def test_exactly_one_label(tmp_path):
    path = tmp_path / "one.csv"
    path.write_text("text,labels\nI love it,good\nI hate it,bad\nWonderful,good\nAwful thing,\n")
    out = tmp_path / "out.csv"
    assert classify("--file", path, "--one-label", "--shots", 1, "--out", out) == 0
    found = as_text(out)
    assert found[["p_good", "p_bad"]].astype(float).sum(axis=1).round(4).eq(1).all()
    assert set(found["model_labels"]) <= {"good", "bad"}


def test_results_are_a_table_that_can_be_read_again(tickets):
    out = tickets.with_name("tickets_classified.csv")
    assert classify("--file", tickets, *READ, "--shots", 1) == 0
    task = load_table(out, text="message", id="ticket_no", labels_column="labels", none="none")
    assert len(task) == 7
    assert classify("--file", out, *READ, "--shots", 1, "--out", out.with_name("b.csv")) == 0
    assert {"labels", "model_labels", "model_p_bug"} <= set(as_text(out.with_name("b.csv")))


WRONG = [
    (["--out", "tickets.csv"], "is the table of --file"),
    (["--out", "x.docx"], ".labelstudio.json"),
    (["--out", "there.csv"], "there already: give another --out, or --overwrite"),
    (["--out", "folder"], "x"),
    (["--threshold", "7"], "--threshold"),
    (["--coverage", "90"], "--coverage"),
    (["--coverage", ".99"], "calibration items are too few"),
    (["--method", "best"], "method is 'best'"),
    (["--train", "nowhere.csv"], "nowhere.csv"),
    (["--train", "bare.csv"], "bare.csv"),
    (["--file", "bare.csv", "--labels", "a,b", "--coverage", ".9"], "needs labelled rows"),
    (["--file", "bare.csv"], "label"),
    (["--shots", "-1"], "--shots"),
    (["--model", "nowhere"], "nowhere"),
]


@pytest.mark.parametrize("options, word", WRONG, ids=[" ".join(options) for options, _ in WRONG])
def test_what_is_wrong_is_named_in_one_line(tickets, monkeypatch, capsys, options, word):
    monkeypatch.chdir(tickets.parent)
    (tickets.parent / "there.csv").write_text("mine")
    (tickets.parent / "folder").mkdir()
    (tickets.parent / "bare.csv").write_text("message,ticket_no\na,1\nb,2\n")
    reading = READ[:4] if "bare.csv" in options[1:2] and options[0] == "--file" else READ
    assert classify("--file", "tickets.csv", *reading, *options) == (
        1 if "--model" in options else 2
    )
    said = capsys.readouterr().err
    assert word in said.splitlines()[-1]
    assert "Traceback" not in said and "text/s" not in said  # no model time was spent
    assert (tickets.parent / "there.csv").read_text() == "mine"
    assert tickets.read_text() == TICKETS


def test_estimate_writes_nothing(tickets, capsys):
    assert classify("--file", tickets, *READ, "--estimate") == 0
    assert "12 texts" in capsys.readouterr().out
    assert [path.name for path in tickets.parent.iterdir()] == ["tickets.csv"]


def test_describe_runs_no_model(tickets, capsys):
    assert classify("--file", tickets, *READ, "--describe", "--model", "nowhere") == 0
    assert "texts that nobody has labelled: 2" in capsys.readouterr().out


def test_a_stopped_command_goes_on(tickets):
    "Killed when the first batch is there; given again, it ends, and nothing is left over."
    code = "import sys; from mlc_notebooks.report import classify as c; sys.exit(c.mlc_classify())"
    command = [sys.executable, "-c", code, "--file", str(tickets), *READ, "--shots", "2"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    kept = tickets.with_name("tickets_classified.csv.batches")
    while child.poll() is None and not list(kept.rglob("*.safetensors")):
        pass
    child.send_signal(signal.SIGKILL)
    child.wait()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert not kept.exists() and tickets.with_name("tickets_classified.csv").exists()


@pytest.mark.parametrize("command", [mlc_probe, mlc_align])
def test_other_commands_take_training_rows(command, tickets, tmp_path, capsys):
    "--shots with a file, and fewer texts of several labels than the usual half."
    options = ["--train", tickets, "--shots", 4, "--out", tmp_path / "out"]
    new = tmp_path / "new.csv"
    new.write_text("ticket_no,message,topics\n1,The button does nothing,bug\n2,Refund,billing\n")
    assert command([str(value) for value in ["--file", new, *READ, *options]]) == 0
    assert "4-shot" in capsys.readouterr().out


def test_words_in_place_of_a_model(tickets, capsys):
    assert classify("--file", tickets, *READ, "--words", "--model", "nowhere") == 0
    said = capsys.readouterr().out
    assert "counted in 5 labelled rows" in said and "Rows with each label: billing" in said
    found = as_text(tickets.with_name("tickets_classified.csv"))
    assert found["p_login"].astype(float).idxmax() in (1, 3) and set(found["flags"]) == {""}


def test_what_flags_mean_is_said(tickets, capsys):
    assert classify("--file", tickets, *READ, "--shots", 2, "--decoding", "guided") == 0
    said = capsys.readouterr().out
    assert "flag shown_as_example, 2 rows: shown with its labels" in said
    assert "Rows with each label:" in said and "--words counts words instead" in said


def test_describe_with_training_rows(tickets, capsys):
    "Also where the new table has no column of labels."
    new = tickets.with_name("new.csv")
    new.write_text("ticket_no,message\n1,The button does nothing\n")
    assert classify("--file", new, "--train", tickets, *READ, "--describe") == 0
    assert "splits: test 1, train 5" in capsys.readouterr().out
