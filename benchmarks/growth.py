"""How the cost of step probing grows: time and peak memory against texts, labels, shots and model
size.

    make growth                                      # a table and a figure in runs/benchmark
    .venv/bin/python benchmarks/growth.py --small    # the same in about three minutes, to try it
    .venv/bin/python benchmarks/growth.py --sweeps readings    # only what exact reading costs

Every point is a process of its own, which loads the model and probes once; time is that of
`probe_steps`, memory the peak of the process, imports and loading included.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from contenders import TokenCounter
from tqdm import tqdm

from mlc_notebooks.data import AnnotatedTexts, LabelSet, load_task
from mlc_notebooks.models import WHEEL_MODELS, cache_folder, load_lm
from mlc_notebooks.probing import probe_steps

HERE = Path(__file__).parent
USUAL = {"texts": 64, "labels": 7, "shots": 10, "model": "smollm2-135m", "reading": "first_token"}
SWEEPS = {
    "texts": (64, 256, 1024, 4096, 10_000),
    "labels": (4, 10, 25, 50, 100, 200),
    "shots": (0, 5, 10, 20, 40),
}
SMALL = {"texts": (16, 64), "labels": (4, 25), "shots": (0, 10)}
READINGS = {  # on the same texts: the two readings, and exact without a tolerance
    "first_token": {"reading": "first_token"},
    "exact": {"reading": "exact"},
    "everything": {"reading": "exact", "tolerance": 0},
}
READ_LABELS = {7: 64, 200: 16, 1000: 16}  # how many texts with so many labels
GOALS = {7: 1.3, 200: 3.0}  # times first_token
AXES = {
    "texts": "texts",
    "labels": "labels (exact reading)",
    "shots": "demonstrations",
    "model": "million parameters",
}


def numbered(texts: list[str], wanted: int) -> list[str]:
    """As many texts as wanted: after the first round each has a running number in front, so that
    none is computed twice.
    """
    return [
        text if i < len(texts) else f"{i}. {text}"
        for i, text in ((i, texts[i % len(texts)]) for i in range(wanted))
    ]


def made_up_labels(count: int) -> LabelSet:
    """Names of three syllables that no language has; nearly all begin with tokens that others begin
    with too.
    """
    syllables = [a + b for a, b in product("bdfgklmnprstvz", "aeiou")]
    rng = np.random.default_rng(0)
    names = list(dict.fromkeys("".join(rng.choice(syllables, 3)) for _ in range(2 * count)))[:count]
    return LabelSet(names)


def relabelled(task: AnnotatedTexts, labels: LabelSet) -> AnnotatedTexts:
    "The texts with one to three random labels each, the same in the train split."
    rng = np.random.default_rng(0)

    def annotate(texts):
        chosen = [rng.choice(len(labels), rng.integers(1, 4), replace=False) for _ in texts.texts]
        return replace(
            texts,
            labels=labels,
            annotations=[np.isin(range(len(labels)), c)[None].astype(np.uint8) for c in chosen],
            splits={},
        )

    return replace(annotate(task), splits={"train": annotate(task.pool)})


def growth_task(texts: int, labels: int) -> AnnotatedTexts:
    "GoEmotions, with as many texts and labels as asked for."
    task = load_task("goemotions").sample(min(texts, 1000), seed=0)
    if texts > len(task):
        many = numbered(list(task.texts), texts)
        task = replace(
            task,
            ids=[str(i) for i in range(texts)],
            texts=many,
            annotations=[task.annotations[i % len(task)] for i in range(texts)],
        )
    return task if labels == len(task.labels) else relabelled(task, made_up_labels(labels))


def peak_megabytes() -> float:
    "Largest resident memory of this process; NaN where the system does not tell (Linux does)."
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), np.nan)


def measure(point: dict) -> dict:
    "Time, tokens and memory of one point, in this process."
    lm, task = (
        load_lm(point["model"], dtype=point["dtype"]),
        growth_task(point["texts"], point["labels"]),
    )
    probe_steps(lm, ["warm up", "warmer"], 0, labels=["yes", "no"], progress=False)
    counter, started = TokenCounter(lm.model), time.perf_counter()
    how = {"reading": point["reading"], "tolerance": point.get("tolerance", 1e-4)}
    trace = probe_steps(lm, task, point["shots"], **how, collisions="warn", progress=False)
    seconds = time.perf_counter() - started
    weights = sum(parameter.numel() for parameter in lm.model.parameters())
    return {
        **point,
        "million_parameters": weights / 1e6,
        "weights_mb": weights * lm.model.dtype.itemsize / 2**20,
        "seconds": seconds,
        "seconds_a_text": seconds / len(task),
        "tokens_a_text": counter.take() / len(task),
        "steps_a_text": len(trace.steps) / len(task),
        "peak_mb": peak_megabytes(),
        "widest_interval": 0.0
        if trace.bounds is None
        else float(np.ptp(trace.bounds, axis=2).max()),
    }


def in_own_process(point: dict) -> dict | None:
    "`measure` in a new process; None, with a note, where it fails."
    done = subprocess.run(
        [sys.executable, __file__, "--point", json.dumps(point)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        print(f"{point} failed: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def reading_points(small: bool) -> list[tuple[str, dict]]:
    "(sweep, point) of both readings of few and of many labels."
    counts = {7: 16, 50: 4} if small else READ_LABELS
    found = []
    for labels, texts in counts.items():
        for name, how in READINGS.items():
            if name == "everything" and labels > 200:
                continue  # minutes per text
            point = {**USUAL, "labels": labels, "texts": texts, **how}
            found.append(("readings", point))
    return found


def reading_ratios(table: pd.DataFrame) -> pd.DataFrame:
    "Exact over first_token: seconds and tokens, by dtype and number of labels."
    rows = []
    table = table[table["sweep"] == "readings"]
    for (dtype, labels), part in table.groupby(["dtype", "labels"], sort=False):
        first = part[part["reading"] == "first_token"].iloc[0]
        for _, point in part[part["reading"] == "exact"].iterrows():
            rows.append(
                {
                    "dtype": dtype,
                    "labels": labels,
                    "texts": point["texts"],
                    "read": "everything" if point["tolerance"] == 0 else "to within 1e-4",
                    "seconds_a_text": point["seconds_a_text"],
                    "first_token": first["seconds_a_text"],
                    "ratio": point["seconds_a_text"] / first["seconds_a_text"],
                    "ratio_of_tokens": point["tokens_a_text"] / first["tokens_a_text"],
                    "goal": np.nan if point["tolerance"] == 0 else GOALS.get(labels, np.nan),
                    "peak_mb": point["peak_mb"],
                    "line_mb": 1.5 * point["weights_mb"] + 700,
                }
            )
    return pd.DataFrame(rows)


def points(small: bool) -> list[tuple[str, dict]]:
    "(sweep, point) of all that is measured; models that are not in the cache are left out."
    sweeps = SMALL if small else SWEEPS
    usual = {**USUAL, "texts": 16} if small else USUAL
    special = {
        "labels": {"reading": "exact", "texts": 16}
    }  # every spelling of every label is read at each step
    found = [
        (name, {**usual, **special.get(name, {}), name: value})
        for name, values in sweeps.items()
        for value in values
    ]
    here = [name for name in WHEEL_MODELS if (cache_folder() / name / "config.json").exists()]
    found += [
        ("model", {**usual, "texts": 16, "model": name}) for name in (here[:1] if small else here)
    ]
    return found + reading_points(small)


def draw(table: pd.DataFrame, path: Path):
    "Time above, memory below, a column for each thing that grows, a colour for each dtype."
    import matplotlib.pyplot as plt  # not above: every point counts the memory of what it imports
    import seaborn as sns

    sns.set_theme(style="whitegrid", palette="colorblind")
    figure, axes = plt.subplots(
        2, len(AXES), figsize=(3.6 * len(AXES), 6), sharex="col", layout="constrained"
    )
    for column, (sweep, title) in enumerate(AXES.items()):
        size = "million_parameters" if sweep == "model" else sweep
        above, below = axes[:, column]
        of_sweep = table[table["sweep"] == sweep].sort_values(size)
        for color, (dtype, part) in zip(
            sns.color_palette("colorblind"), of_sweep.groupby("dtype", sort=False)
        ):
            above.plot(part[size], 1000 * part["seconds_a_text"], "o-", color=color, label=dtype)
            below.plot(part[size], part["peak_mb"], "o-", color=color)
            below.plot(part[size], 1.5 * part["weights_mb"] + 700, "--", color=color)
        below.set_xlabel(title)
        if sweep != "shots":
            ticks = sorted(set(of_sweep[size]))
            below.set_xscale("log")
            below.set_xticks(ticks, [f"{value:,.0f}" for value in ticks])
            below.minorticks_off()
        for axis in (above, below):
            axis.set_ylim(0, 1.15 * max(line.get_ydata().max() for line in axis.lines))
        below.tick_params(axis="x", rotation=45 if sweep in ("texts", "model") else 0)
    axes[0, 0].set_ylabel("milliseconds a text")
    axes[1, 0].set_ylabel("peak memory (MB)")
    axes[1, 0].plot([], [], "--", color="grey", label="1.5 x weights + 700 MB")
    for axis in axes[:, 0]:
        axis.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="few points, about three minutes")
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"]
    )
    parser.add_argument(
        "--sweeps", nargs="+", default=[*AXES, "readings"], choices=[*AXES, "readings"]
    )
    parser.add_argument("--out", type=Path, default=HERE.parent / "runs" / "benchmark")
    parser.add_argument(
        "--record", action="store_true", help="also copy table and figure to benchmarks/recorded"
    )
    parser.add_argument("--point", help=argparse.SUPPRESS)  # one measurement, as JSON
    arguments = parser.parse_args()
    if arguments.point:
        print(json.dumps(measure(json.loads(arguments.point))))
        sys.exit()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = []
    wanted = [one for one in points(arguments.small) if one[0] in arguments.sweeps]
    for (sweep, point), dtype in tqdm([*product(wanted, arguments.dtypes)], desc="points"):
        if row := in_own_process({**point, "dtype": dtype}):
            rows.append({"sweep": sweep, **row})
            pd.DataFrame(rows).to_csv(arguments.out / "growth.csv", index=False)
    table = pd.DataFrame(rows)
    print(table.to_string(index=False))
    files = ["growth.csv"]
    if set(AXES) <= set(arguments.sweeps):
        draw(table, arguments.out / "growth.png")
        files.append("growth.png")
    if "readings" in arguments.sweeps:
        ratios = reading_ratios(table)
        ratios.to_csv(arguments.out / "growth_readings.csv", index=False)
        print(ratios.round(3).to_string(index=False))
        files.append("growth_readings.csv")
    if arguments.record:
        (HERE / "recorded").mkdir(exist_ok=True)
        for name in files:
            if name != "growth.csv" or "growth.png" in files:  # a part replaces no whole
                shutil.copy(arguments.out / name, HERE / "recorded")
