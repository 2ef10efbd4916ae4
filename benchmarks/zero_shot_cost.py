"""What each zero-shot method costs: tokens computed and time per text; and Bradley-Terry against a
per-text Adam loop.

    make benchmark-cost, or: python benchmarks/zero_shot_cost.py [--texts 16] [--shots 10]

All in one process, on the same texts, model, dtype and threads. Tokens computed are counted where
they enter the model.
"""

import argparse
import functools
import time

import numpy as np
import pandas as pd
import torch
from contenders import TokenCounter

from mlc_notebooks.alignment import METHODS, bradley_terry, methods_for, zero_shot
from mlc_notebooks.data import load_task
from mlc_notebooks.models import load_lm


def counted(counter, run):
    "Seconds and tokens of a run."
    counter.take()
    started = time.perf_counter()
    run()
    return time.perf_counter() - started, counter.take()


def methods_table(task, lm, shots):
    zero_shot(lm, task.select([0, 1]), ["hard"], shots, progress=False)  # warm
    rows, counter = [], TokenCounter(lm.model)
    trace_cost = counted(counter, lambda: zero_shot(lm, task, ["hard"], shots, progress=False))
    rows.append(("step probing (all methods that read a trace)", *trace_cost))
    for name in methods_for(task):
        method = METHODS[name]
        if method.needs == "model":
            ask = functools.partial(zero_shot, lm, task, [name], shots, progress=False)
            rows.append((name, *counted(counter, ask)))
    table = pd.DataFrame(rows, columns=["method", "seconds", "tokens"])
    table["tokens a text"], table["ms a text"] = (
        table["tokens"] / len(task),
        1000 * table["seconds"] / len(task),
    )
    table["ms a token"] = 1000 * table["seconds"] / table["tokens"]
    table["a token, against step probing"] = table["ms a token"] / table["ms a token"].iloc[0]
    return table.drop(columns=["seconds", "tokens"]).round(2)


def adam(wins, ridge=0.01, steps=5000):
    "The published way: one text at a time, Adam on the same objective."
    strengths = torch.zeros(wins.shape[0], requires_grad=True)
    target, optimizer = torch.tensor(wins, dtype=torch.float32), None
    optimizer = torch.optim.Adam([strengths], lr=0.01)
    for _ in range(steps):
        loss = (
            -(target * torch.nn.functional.logsigmoid(strengths[:, None] - strengths[None])).sum()
            + ridge / 2 * (strengths**2).sum()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return strengths.detach().numpy()


def solver_table(texts=1000, outcomes=9, timed=20):
    "1,000 texts of 8 labels and none; the loop is timed on 20 and scaled."
    soft = np.random.default_rng(0).uniform(0.02, 0.98, size=(texts, outcomes, outcomes))
    wins = np.triu(soft, 1) + np.tril(1 - soft.transpose(0, 2, 1), -1)
    started = time.perf_counter()
    fast = bradley_terry(wins)
    newton = time.perf_counter() - started
    started = time.perf_counter()
    slow = np.stack([adam(item) for item in wins[:timed]])
    loop = (time.perf_counter() - started) * texts / timed
    return pd.Series(
        {
            "Newton, all texts (s)": newton,
            f"Adam loop, scaled from {timed} texts (s)": loop,
            "times as fast": loop / newton,
            "largest difference": np.abs(fast[:timed] - slow).max(),
        }
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--shots", type=int, default=10)
    asked = parser.parse_args()
    task = load_task("brighter-eng").sample(asked.texts, seed=0)
    print(
        f"{asked.texts} texts of brighter-eng, {asked.shots}-shot, smollm2-135m-emotions, "
        f"float32, {torch.get_num_threads()} threads\n"
    )
    print(methods_table(task, load_lm("smollm2-135m-emotions"), asked.shots).to_string(index=False))
    print("\nBradley-Terry, 1,000 texts of 8 labels\n" + solver_table().round(4).to_string())
