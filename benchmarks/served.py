"""Throughput over HTTP beside vLLM's own offline speed, for the same requests in one run.

    make benchmark-served, or: python benchmarks/served.py [--texts 64] [--repeats 3] [--rivals ...]

A probing run is recorded once: each question of the engine, with its rows of token ids and the
tokens to tell. Then the same questions are asked, in their order, of `llm.generate` in a process of
its own, and over HTTP by `ServedLM` of a server with the same options. Both have empty prefix
caches before each repeat. The goal: at least 0.8 of the offline speed.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

MODEL = "smollm2-135m-emotions"
GOAL = 0.8
RECORDED = Path(__file__).parent / "recorded" / "served.csv"
MOST_IDS = 128  # tokens that one request may name
ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def offline(job: dict):
    "Run by vLLM's Python: times `llm.generate`, one line of JSON per repeat."
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints goes to the log
    from vllm import LLM, SamplingParams

    options = dict(max_model_len=2048, enable_prefix_caching=True, disable_log_stats=True)
    options |= dict(block_size=job["block_size"], enforce_eager=job["eager"])
    llm = LLM(job["folder"], dtype=job["dtype"], **options)
    how = dict(max_tokens=1, temperature=0, detokenize=False, flat_logprobs=True)

    def ask(question):
        prompts = [{"prompt_token_ids": row} for row in question["rows"]]
        tokens = 0
        for first in range(0, len(question["watch"]), MOST_IDS):
            named = question["watch"][first : first + MOST_IDS]
            params = SamplingParams(**how, logprob_token_ids=named)
            for row, answer in zip(prompts, llm.generate(prompts, params, use_tqdm=False)):
                tokens += len(row["prompt_token_ids"]) - (answer.num_cached_tokens or 0)
        return tokens

    questions = json.loads(Path(job["questions"]).read_text())
    for question in questions[:2]:
        ask(question)
    for _ in range(job["repeats"]):
        llm.reset_prefix_cache()
        started = time.perf_counter()
        tokens = sum(map(ask, questions))
        told = {"seconds": time.perf_counter() - started, "tokens": tokens}
        print(json.dumps(told), file=replies, flush=True)


def recorded_questions(texts: int, shots: int) -> list[dict]:
    "What a probing run asks: free decoding, the exact reading. Answered here by the local engine."
    from mlc_notebooks.data import load_task
    from mlc_notebooks.engine import Node, PackedTree, TokenRows
    from mlc_notebooks.models import LanguageModel, NextTokens, load_lm
    from mlc_notebooks.probing import probe_steps

    local = load_lm(MODEL)
    questions = []

    class Recording(LanguageModel):
        "Writes down what it is asked."

        name, tokenizer, device, dtype = MODEL, local.tokenizer, "recorded", local.dtype
        vocabulary_size, context_length = local.vocabulary_size, local.context_length
        end_ids, fingerprint = local.end_ids, local.fingerprint

        def read_next(self, rows, watch):
            questions.append({"rows": [list(map(int, row)) for row in rows], "watch": list(watch)})
            known = TokenRows(rows)  # their common beginning is computed once
            tree = PackedTree(local, known.shared)
            found = tree.compute([Node(tree.root, tail) for tail in known.tails], watch)
            return NextTokens(found.logprobs, found.best, found.margin)

    task = load_task("goemotions").sample(texts, seed=0)
    probe_steps(Recording(), task, shots, progress=False)
    return questions


def run_offline(python: Path, job: dict) -> list[dict]:
    "Seconds and computed tokens of each repeat, in a process of its own."
    with open(job["log"], "wb") as log:
        command = [str(python), __file__, "--offline", json.dumps(job)]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=log, env=os.environ | ENVIRONMENT, check=False
        )
    if done.returncode:
        sys.exit(f"vLLM ended with status {done.returncode}: see {job['log']}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def run_served(python: Path, job: dict) -> list[dict]:
    "The same over HTTP: the server in one process, this one asks."
    from mlc_notebooks.models import free_port, load_lm, start_server, vllm_command

    port = free_port()
    options = ["--max-model-len", "2048", "--block-size", str(job["block_size"])]
    if job["eager"]:
        options.append("--enforce-eager")
    command = vllm_command(job["folder"], port, python, job["dtype"], options)
    environment = ENVIRONMENT | {"VLLM_SERVER_DEV_MODE": "1"}  # which has /reset_prefix_cache
    questions = json.loads(Path(job["questions"]).read_text())
    log = Path(job["log"]).with_name("server.log")
    repeats = []
    with start_server(command, port, environment, log) as server:
        lm = load_lm(server.url, model=server.model, tokenizer=job["folder"])
        for question in questions[:2]:
            lm.read_next(question["rows"], question["watch"])
        for _ in range(job["repeats"]):
            reset = server.url.removesuffix("/v1") + "/reset_prefix_cache"
            urllib.request.urlopen(urllib.request.Request(reset, method="POST"), timeout=60)
            started = time.perf_counter()
            for question in questions:
                lm.read_next(question["rows"], question["watch"])
            repeats.append({"seconds": time.perf_counter() - started})
    return repeats


def table(offline_runs: list[dict], served_runs: list[dict], rows: int, texts: int):
    "Median, fastest and slowest repeat of both, and rows per second."
    import pandas as pd

    found = []
    for name, runs in (("vLLM offline", offline_runs), ("over HTTP", served_runs)):
        seconds = pd.Series([run["seconds"] for run in runs])
        found.append(
            {
                "asked": name,
                "seconds": seconds.median(),
                "fastest": seconds.min(),
                "slowest": seconds.max(),
                "rows/s": rows / seconds.median(),
                "texts/s": texts / seconds.median(),
            }
        )
    return pd.DataFrame(found).set_index("asked").round(2)


def main(asked: argparse.Namespace):
    from mlc_notebooks.models import whole_folder

    python = asked.rivals / "vllm" / "bin" / "python"
    if not python.exists():
        sys.exit("vLLM is absent: make benchmark-rivals installs it")
    asked.out.mkdir(parents=True, exist_ok=True)
    questions = recorded_questions(asked.texts, asked.shots)
    rows = sum(len(question["rows"]) for question in questions)
    path = asked.out / "questions.json"
    path.write_text(json.dumps(questions))
    print(f"{asked.texts} texts, {asked.shots} shots: {len(questions)} questions, {rows} rows")

    job = {
        "folder": str(whole_folder(MODEL).resolve()),
        "dtype": asked.dtype,
        "block_size": asked.block_size,
        "repeats": asked.repeats,
        "eager": asked.eager,
        "questions": str(path.resolve()),
        "log": str((asked.out / "offline.log").resolve()),
    }
    offline_runs = run_offline(python, job)
    tokens = offline_runs[0]["tokens"] / asked.texts
    print(f"blocks of {asked.block_size} tokens: {tokens:,.0f} tokens computed a text")
    if asked.only_offline:
        return
    found = table(offline_runs, run_served(python, job), rows, asked.texts)
    ratio = found.loc["vLLM offline", "seconds"] / found.loc["over HTTP", "seconds"]
    print(found.to_string())
    if asked.record:
        found.assign(texts=asked.texts, repeats=asked.repeats).round(2).to_csv(RECORDED)
    print(f"over HTTP: {ratio:.2f} of the offline speed; goal {GOAL}: {ratio >= GOAL}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--shots", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--rivals", type=Path, default=ROOT / ".venv-rivals")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "served")
    parser.add_argument("--only-offline", action="store_true", help="the tokens a text, no server")
    parser.add_argument(
        "--eager", action="store_true", help="both without torch.compile: to try it"
    )
    parser.add_argument("--record", action="store_true", help=f"also write {RECORDED.name}")
    parser.add_argument("--offline", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.offline:
        offline(json.loads(asked.offline))
    else:
        main(asked)
