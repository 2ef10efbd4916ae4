"The benchmark runs as it stands: ours, on a few texts."

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
    assert (
        repeats["part"].tolist() == ["steps", "steps_1", "unary"]
        and (repeats["seconds_a_text"] > 0).all()
    )
