"""What a study records of tasks with exactly one label per text."""

import json

import pandas as pd
import pytest

from mlc_notebooks.alignment import (
    StudyRecords,
    StudyRun,
    gather_records,
    one_prompt_tables,
    record_run,
)

INTENTS = ["activate_my_card", "exchange_rate", "lost_or_stolen_card"]
QUESTIONS = ["how do I switch on card {}", "what is a pound worth {}", "somebody took my purse {}"]


@pytest.fixture
def requests(tmp_path, monkeypatch):
    "Requests in the format of banking77: a third of each intent."
    home = tmp_path / "banking77"
    home.mkdir()
    (home / "categories.json").write_text(json.dumps(INTENTS))
    for split, first in (("train", 0), ("test", 100)):
        rows = [(QUESTIONS[i % 3].format(first + i), INTENTS[i % 3]) for i in range(30)]
        pd.DataFrame(rows, columns=["text", "category"]).to_csv(home / f"{split}.csv", index=False)
    monkeypatch.setenv("MLC_DATA", str(tmp_path))


@pytest.mark.slow
def test_a_run_with_one_label_per_text_has_no_trees(tuned_lm, tmp_path, requests):
    run = StudyRun("m", "banking77", texts=4, shots=2)
    home = record_run(run, tuned_lm, tmp_path / "runs", progress=False)
    assert not (home / "trees.parquet").exists()

    gather_records(tmp_path / "runs", tmp_path / "out")
    records = StudyRecords(tmp_path / "out")
    tables = one_prompt_tables(records, 0)
    assert "max_over_generations" in tables and "marginals" not in tables
    assert list(tables["hard"].columns) == list(records.labels(0))
    assert records.trace(0).steps["step"].eq(1).all()
