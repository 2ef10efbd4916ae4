"""Texts per second with one worker and with two, of one thread each, on Ray.

    make benchmark-scale, or: PYTHON benchmarks/scale.py [--texts 768] [--repeats 3] [--record]

Of a quiet machine with two cores. Both ask the same corpus in the same blocks with the embedded
model; one process without Ray stands beside them. Only the time after each worker's first finished
block is counted, so that starting Ray and loading models, which a long run does once, is left out;
the table has the whole time too.
The goal: two workers answer at least 1.6 times as many texts per second as one. A worker asks Ray
for a quarter of a CPU, since Ray keeps one for itself; what it uses is its one thread.
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pandas as pd  # noqa: E402

from mlc_notebooks.alignment import probe_dataset  # noqa: E402
from mlc_notebooks.data import load_task  # noqa: E402

GOAL = 1.6
RECORDED = Path(__file__).parent / "recorded" / "scale.csv"


def corpus_file(folder, texts):
    "A file with so many of the embedded texts, again from the first where they end."
    task = load_task("goemotions")
    rows = [task.texts[i % len(task)] for i in range(texts)]
    path = Path(folder, "texts.parquet")
    pd.DataFrame({"text": rows}).to_parquet(path)
    return path, task


def finished(out):
    "When each block was finished, its rows and its worker, in the order of time."
    found = []
    for line in Path(out, "blocks.jsonl").read_text().splitlines():
        if line:
            line = json.loads(line)
            written = Path(out, "rows", f"{line['block']:07}.parquet").stat().st_mtime
            found.append((written, line["rows"], line["worker"]))
    return sorted(found)


def steady_rate(out):
    "Texts per second after each worker has finished a block, and the number of workers."
    blocks = finished(out)
    workers = len({worker for _, _, worker in blocks})
    answered = sum(rows for _, rows, _ in blocks[workers:])
    return answered / (blocks[-1][0] - blocks[workers - 1][0]), workers


def timed(name, source, task, out, block_size, **where):
    "A row of the table."
    run = probe_dataset(
        source,
        task.labels,
        out=out,
        lm="smollm2-135m-emotions",
        label_noun=task.label_noun,
        block_size=block_size,
        progress=False,
        **where,
    )
    rate, workers = steady_rate(out)
    shutil.rmtree(out)
    found = {"contender": name, "texts_a_second": rate, "workers_that_answered": workers}
    return found | {"whole_seconds": run.seconds, "errors": run.errors}


CONTENDERS = {
    "one process": {},
    "one worker": {"ray": "local", "workers": 1, "cpus": 0.25},
    "two workers": {"ray": "local", "workers": 2, "cpus": 0.25},
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=768)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--record", action="store_true", help=f"also write {RECORDED.name}")
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        source, task = corpus_file(folder, asked.texts)
        for repeat in range(asked.repeats):
            for name, where in CONTENDERS.items():
                out = Path(folder, "run")
                found = timed(name, source, task, out, asked.block_size, **where)
                rows.append({"repeat": repeat, **found})
                print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    median = table.groupby("contender")["texts_a_second"].median()
    ratio = median["two workers"] / median["one worker"]
    print(f"\n{table.round(2).to_string(index=False)}\n")
    print(f"two workers answer {ratio:.2f} times as many texts per second as one (goal: {GOAL})")
    if asked.record:
        table.round(3).to_csv(RECORDED, index=False)
    raise SystemExit(int(ratio < GOAL))


if __name__ == "__main__":
    main()
