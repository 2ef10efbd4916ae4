"""Free decoding with the first_token reading against figures from the paper's published code."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mlc_notebooks.data import LabelSet, unannotated
from mlc_notebooks.probing import probe_steps

PUBLISHED = json.loads(
    (Path(__file__).parent / "data/step_scores_published.json").read_text(encoding="utf-8")
)


def demonstrations():
    "The pairs that the published prompt shows."
    lines = PUBLISHED["prompt_prefix"].splitlines()[1:]
    return [
        (item.removeprefix("Input: "), json.loads(answer)["label"])
        for item, answer in zip(lines[::2], lines[1::2])
    ]


@pytest.fixture(scope="module")
def trace(base_lm):
    labels, texts = LabelSet(PUBLISHED["labels"]), [item["text"] for item in PUBLISHED["items"]]
    task = unannotated(texts, labels, name="published", label_noun="emotions")
    shown = [
        (text, [name for name in chosen if name != "none"]) for text, chosen in demonstrations()
    ]
    return probe_steps(
        base_lm, task, demonstrations=shown, decoding="free", reading="first_token", progress=False
    )


def test_the_prompt_is_the_published_one(trace):
    first = PUBLISHED["items"][0]["text"]
    assert trace.settings["prompt"] == PUBLISHED["prompt_prefix"] + PUBLISHED["query"].replace(
        "{text}", first
    )


@pytest.mark.parametrize("position", range(len(PUBLISHED["items"])))
def test_probabilities_at_shared_label_positions(trace, position):
    """Both definitions share the label positions of the answer itself.

    They differ by design: the published code counts any later occurrence of a label's first token,
    also past the end of the answer. So it may list more positions than the answer has labels; those
    are not compared.
    """
    published = PUBLISHED["items"][position]
    frame = trace.frame()
    mine = frame[frame["example"] == str(position)].pivot(
        index="step", columns="label", values="prob"
    )
    assert (
        published["out"]
        .lstrip(".")
        .lstrip("\n")
        .startswith(trace.items["output"].iloc[position].lstrip(".").lstrip("\n"))
    )
    assert len(mine) <= len(published["all_scores"])
    for step, scores in zip(mine.index, published["all_scores"]):
        assert np.abs(mine.loc[step] - pd.Series(scores)).max() < 1e-3


def test_a_preamble_is_flagged(trace):
    flagged = ["preamble" in flags for flags in trace.items["flags"]]
    assert flagged == [item["out"].startswith(".") for item in PUBLISHED["items"]]
