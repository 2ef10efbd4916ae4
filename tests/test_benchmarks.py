"The benchmark runs as it stands: ours, on a few texts."

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_the_comparison_runs(tmp_path):
    choice = [
        "--texts",
        "3",
        "--repeats",
        "1",
        "--dtypes",
        "float32",
        "--contenders",
        "ours",
        "--parts",
        "steps",
        "steps_1",
        "unary",
    ]
    subprocess.run(
        [sys.executable, BENCHMARKS / "compare.py", *choice, "--out", tmp_path],
        check=True,
        capture_output=True,
    )
    repeats = pd.read_csv(tmp_path / "repeats.csv")
    assert repeats["part"].tolist() == ["steps", "steps_1", "unary"]
    assert (repeats["seconds_a_text"] > 0).all()


def test_the_gpu_script_runs_on_a_cpu(tmp_path):
    out = tmp_path / "gpu.jsonl"
    choice = "--shape small --dtype float32 --device cpu --texts 3 --rival-texts 1".split()
    subprocess.run(
        [sys.executable, BENCHMARKS / "gpu.py", *choice, "--out", out],
        check=True,
        capture_output=True,
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    apart = [row["largest"] for row in rows if row["part"] == "agreement"]
    assert len(apart) == 4 and max(apart) < 1e-4
    timed = {row["way"] for row in rows if row["part"] in ("engine", "rival")}
    assert {"shared prefix", "masks", "transformers, padded batches of 32"} <= timed
