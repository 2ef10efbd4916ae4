"""The study `bias`: a few texts are recorded, and the notebook reads what was recorded."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbclient import NotebookClient

from mlc_notebooks.alignment import max_over_generations
from mlc_notebooks.data import load_task, safe_name
from mlc_notebooks.probing import Trace

STUDIES = Path(__file__).parent.parent / "nbs" / "studies"
RUN = "bias-small/smollm2-135m-emotions/brighter-eng"
DRAWS = ("as it is", "another draw")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    "A folder with `runs` and `out`, of the small recording, from data in the package."
    home = tmp_path_factory.mktemp("bias")
    folders = ["--runs", str(home / "runs"), "--out", str(home / "out")]
    packaged = {name: value for name, value in os.environ.items() if name != "MLC_DATA"}
    command = [sys.executable, STUDIES / "record_bias.py", "--small", *folders]
    subprocess.run(command, check=True, env=packaged)
    return home


@pytest.mark.slow
def test_scores_are_those_of_the_answers(recorded, monkeypatch):
    monkeypatch.delenv("MLC_DATA", raising=False)
    draws = [Trace.load(recorded / "runs" / RUN / safe_name(name)) for name in DRAWS]
    tables = [max_over_generations(trace) for trace in draws]
    p = (tables[0] + tables[1].loc[tables[0].index]) / 2
    q = load_task("brighter-eng").at(p.index).distribution()[p.columns].to_numpy()
    p = np.clip(p.to_numpy(), 1e-8, 1 - 1e-8)
    nll = -(q * np.log(p) + (1 - q) * np.log(1 - p)).sum(axis=1)

    scores = pd.read_parquet(recorded / "out" / "scores.parquet")
    of_run = scores.query("task == 'brighter-eng' and model == 'smollm2-135m-emotions'")
    found = of_run[of_run["remedy"] == "two draws averaged"].set_index("id")
    assert found.loc[tables[0].index, "NLL"].to_numpy() == pytest.approx(nll, rel=1e-5)
    assert (found["short"] ^ found["long"]).all()


@pytest.mark.slow
def test_records_hold_no_texts(recorded, monkeypatch):
    monkeypatch.delenv("MLC_DATA", raising=False)
    texts = set()
    for name in ("brighter-eng", "convabuse"):
        task = load_task(name)
        for part in (task, *task.splits.values()):
            texts.update(text for text in part.texts if len(text) > 30)
    for path in (recorded / "out").iterdir():
        table = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
        for column in table.select_dtypes(["object", "string"]):
            assert texts.isdisjoint(table[column].dropna()), (path.name, column)


@pytest.mark.slow
def test_the_notebook_reads_them(recorded, monkeypatch):
    monkeypatch.setenv("MLC_BIAS_RECORDS", str(recorded / "out"))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # which other tests may set: no figure is kept
    notebook = nbformat.read(STUDIES / "bias.ipynb", as_version=4)
    assert len(notebook.cells) <= 40
    where = {"metadata": {"path": str(STUDIES)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
