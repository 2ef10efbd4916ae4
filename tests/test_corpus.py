"Corpora in one process: odd inputs, a model that fails for a while, runs that go on."

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from mlc_notebooks.alignment import probe_dataset
from mlc_notebooks.data import LabelSet
from mlc_notebooks.models import load_lm

LABELS = LabelSet(["good", "bad", "odd"], "else")


@pytest.fixture(scope="module")
def lm(tiny_folder):
    return load_lm(tiny_folder)


@pytest.fixture
def ask(lm, tmp_path):
    "A function that probes a source into a folder, three rows a block."

    def run(source, out="run", **more):
        options = dict(decoding="guided", block_size=3, progress=False) | more
        return probe_dataset(source, LABELS, lm=lm, out=tmp_path / out, **options)

    return run


def parquet(folder, **columns):
    path = Path(folder, "texts.parquet")
    pd.DataFrame(columns).to_parquet(path)
    return path


TEXTS = ["One.", None, "", "Two.", "with\0NUL", "too long " * 300, "Three."]


def test_rows_that_cannot_be_asked_are_rows_with_an_error(ask, tmp_path):
    run = ask(parquet(tmp_path, key=range(100, 107), text=TEXTS), id="key", keep_text=False)
    rows = run.frame().set_index("id")
    assert list(rows.index) == [str(i) for i in range(100, 107)]
    assert rows.index[rows["error"].notna()].tolist() == ["101", "102", "104", "105"]
    assert run.errors == 4 and "text" not in rows
    for item, why in {"101": "null", "102": "empty", "104": "NUL", "105": "exceed the"}.items():
        assert why in rows.loc[item, "error"]
        assert rows.loc[item, ["p_good", "labels", "output"]].isna().all()
    alone = ask(parquet(tmp_path, text=["One."]), "alone").frame()
    assert rows.loc["100", "p_good"] == pytest.approx(alone.loc[0, "p_good"], abs=1e-6)


@pytest.mark.parametrize(
    "columns, id, message",
    [
        ({"words": ["a"]}, None, "has no column 'text': it has words"),
        ({"text": ["a"], "key": ["x"]}, "number", "has no column 'number'"),
        ({"text": ["a", "b", "c", "d"], "key": ["x", "y", "z", "x"]}, "key", "'x' occurs more"),
        ({"text": ["a", "b"], "key": ["x", None]}, "key", "the id of row 1 is None"),
        ({"text": ["a"], "key": [1.5]}, "key", "'key' holds double: give whole numbers"),
        ({"text": [1]}, None, "'text' holds int64: give strings"),
        ({"text": []}, None, "there are no rows: the source is empty"),
    ],
)
def test_columns_that_cannot_be_used_are_named(ask, tmp_path, columns, id, message):
    with pytest.raises(ValueError, match=message):
        ask(parquet(tmp_path, **columns), id=id)


def test_a_model_that_is_gone_for_a_while_loses_nothing(ask, lm, tmp_path):
    "The blocks that could not be answered wait; the same call answers them, with the same bits."
    source = parquet(tmp_path, text=[f"This is text {i}." for i in range(30)])
    whole = ask(source, "whole").frame()

    def gone(*_):
        lines = Path(tmp_path, "run", "blocks.jsonl")
        if lines.exists() and lines.read_text().count("sha256") >= 4:
            raise ConnectionError("no answer")

    hook = torch.nn.modules.module.register_module_forward_pre_hook(gone)
    with pytest.raises(RuntimeError, match="3 blocks could not be answered.*ConnectionError: no"):
        ask(source)
    hook.remove()
    resumed = ask(source)
    assert (resumed.computed, resumed.errors) == (18, 0)
    pd.testing.assert_frame_equal(resumed.frame(), whole, check_exact=True)


def test_another_model_in_mid_run_is_refused(ask, lm, tmp_path):
    source = parquet(tmp_path, text=[f"This is text {i}." for i in range(6)])
    run = ask(source)
    made = Path(run.out, "made.json")
    before = json.loads(made.read_text())
    Path(run.out, "rows", "0000001.parquet").unlink()
    made.write_text(json.dumps(before | {"weights_hash": "another"}))
    with pytest.warns(UserWarning, match="gone"), pytest.raises(ValueError, match="another"):
        ask(source)


def test_a_source_that_changed_is_refused(ask, tmp_path):
    source = parquet(tmp_path, text=["One.", "Two."])
    ask(source)
    with pytest.raises(ValueError, match="source was"):
        ask(parquet(tmp_path, text=["One.", "Two.", "Three."]))
    for wrong in ({"workers": 2}, {"cpus": 0}, {"block_size": 0}, {"shots": 3}):
        with pytest.raises(ValueError):
            ask(source, "other", **wrong)
