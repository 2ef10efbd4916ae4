"""Step probing against the published code's way, in one run on one machine.

    make benchmark                                    # both ways, 256 texts 10-shot, float32
    .venv/bin/python benchmarks/probe_speed.py --memory   # peak memory at 256 and at 5,000 texts

The published code asks about one text at a time: `generate` on the full prompt, 18 new tokens, with scores, hidden states
and attentions returned. Its time is taken over the first `--baseline` of the texts, since it does not depend on how many
there are. Run it on a quiet machine; what it prints is a ratio of two times taken in the same process.
"""
import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from mlc_notebooks.data import load_task
from mlc_notebooks.models import load_lm
from mlc_notebooks.probing import probe_steps
from mlc_notebooks.prompts import draw_demonstrations, list_prompts


def published_way(lm, prompts, new_tokens=18):
    "Seconds for one text at a time, as the paper's published code does it."
    lm.model.set_attn_implementation("eager")  # attentions are returned
    started = time.time()
    for prompt in prompts:
        ids = torch.tensor([lm.encode_prompt(prompt)])
        lm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
                          do_sample=False, output_scores=True, output_hidden_states=True, output_attentions=True,
                          return_dict_in_generate=True, pad_token_id=lm.tokenizer.eos_token_id)
    seconds = time.time() - started
    lm.model.set_attn_implementation("sdpa")
    return seconds


def compare(texts: int, baseline: int, model: str) -> dict:
    "Seconds a text of both ways, and their ratio."
    task = load_task("goemotions").sample(texts, seed=0)
    shown = draw_demonstrations(task.pool, 10, 0, exclude=task.texts)
    prompts = list_prompts(task.texts, task.labels, shown, task.kind)
    lm = load_lm(model)
    probe_steps(lm, task.select(range(8)), demonstrations=shown, progress=False)  # warm up
    result = {"model": model, "dtype": lm.dtype, "texts": texts, "threads": torch.get_num_threads()}
    for reading in ("first_token", "exact"):
        started = time.time()
        probe_steps(lm, task, demonstrations=shown, reading=reading)
        result[f"{reading}: seconds a text"] = (time.time() - started) / texts
    result["published way: seconds a text"] = published_way(lm, prompts[:baseline]) / baseline
    result["published way: texts timed"] = baseline
    for reading in ("first_token", "exact"):
        result[f"{reading}: times as fast"] = result["published way: seconds a text"] / result[f"{reading}: seconds a text"]
    return result


def peak_memory(texts: int, model: str) -> int:
    "Peak resident memory in MB of a process of its own that probes so many texts, 0-shot."
    code = (f"from mlc_notebooks.all import *\ntask = load_task('goemotions').sample({texts}, seed=0)\n"
            f"probe_steps(load_lm({model!r}), task, shots=0, reading='first_token')\n"
            "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)")
    return int(subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--baseline", type=int, default=32, help="texts that the published way is timed on")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    if args.memory:
        print(json.dumps({f"peak MB, {n} texts": peak_memory(n, args.model) for n in (256, 5000)}, indent=1))
    else:
        print(json.dumps(compare(args.texts, args.baseline, args.model), indent=1))
        print("peak MB of this process", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
