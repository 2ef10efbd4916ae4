"""How long training takes, and what it reaches: a linear probe, SFT with all weights and with LoRA,
Demux.

    make benchmark-training, or: python benchmarks/training.py [--small]

GoEmotions with its seven groups; one process, one method after the other, all cores. Seconds hold
everything from texts to a predictor: the probe's hidden states, the dev texts that stop a training.
Scores are those of 200 dev texts, written greedily after SFT, at a threshold of 0.5 otherwise.
"""

import argparse
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch

from mlc_notebooks.alignment import TuningSettings, fit_demux, fit_probe, fit_sft
from mlc_notebooks.data import load_task, training_data
from mlc_notebooks.metrics import align_report
from mlc_notebooks.models import load_lm

MODEL = "smollm2-135m"


def methods(folder: Path) -> dict:
    "name: (training texts, train texts -> predictor, how it predicts)."

    def sft(name, r):
        return lambda train: fit_sft(
            train, load_lm(MODEL), folder / name, TuningSettings(r=r), progress=False
        )

    written = {"method": "hard", "progress": False}
    return {
        "probe": (
            1600,
            lambda train: fit_probe(train, load_lm(MODEL), progress=False),
            {"progress": False},
        ),
        "SFT, all weights": (1600, sft("full", None), written),
        "SFT, LoRA of rank 64": (1600, sft("lora", 64), written),
        "Demux": (
            5000,
            lambda train: fit_demux(train, out=folder / "demux", progress=False),
            {"progress": False},
        ),
    }


def timed(name, texts, fit, how, task) -> dict:
    "Fit on the first `texts` training texts of a random order, and judge."
    train, held = (
        training_data(task.split("train"))[0].sample(texts, seed=0),
        task.split("dev").sample(200, seed=1),
    )
    started = time.perf_counter()
    predictor = fit(train)
    seconds = time.perf_counter() - started
    report = align_report({name: predictor.predict(held, **how)}, held, resamples=200)
    row = {"method": name, "texts": texts, "seconds": seconds}
    for metric in ("micro-F1", "example-F1", "L1"):
        found = report[(report["metric"] == metric) & (report["method"] == name)].iloc[0]
        row[metric] = f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
    return row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="80 texts each, to try it")
    parser.add_argument("--methods", nargs="+")
    asked = parser.parse_args()
    task, rows = load_task("goemotions"), []
    print(
        f"{MODEL}, float32, {torch.get_num_threads()} threads, torch {torch.__version__}\n",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, (texts, fit, how) in methods(Path(folder)).items():
            if not asked.methods or name in asked.methods:
                rows.append(timed(name, 80 if asked.small else texts, fit, how, task))
                print({**rows[-1], "seconds": round(rows[-1]["seconds"])}, flush=True)
    print("\n" + pd.DataFrame(rows).round(1).to_string(index=False))
