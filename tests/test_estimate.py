"""An estimate counts tokens exactly and times the prompts of the run that it is about."""

import math

import pytest

from mlc_notebooks.data import demonstrations_for, load_task, similar_demonstrations
from mlc_notebooks.probing import Estimate, ask_for_lists, estimate_run, probe_steps
from mlc_notebooks.probing import estimate as page


@pytest.fixture(scope="module")
def task():
    return load_task("goemotions").sample(40, seed=1)


@pytest.mark.parametrize("how", [{}, dict(fmt="comma"), dict(multi_share=None), dict(seed=3)])
def test_tokens_are_those_of_the_run(tiny_lms, task, how):
    lm = tiny_lms["llama"]
    found = estimate_run(lm, task, shots=2, sample=4, **how)
    rows = ask_for_lists(lm, task, shots=2, **how).rows
    assert found.texts == 40 and found.sampled == 4 and found.device == "cpu"
    assert found.shared_tokens == len(rows.shared)
    assert found.text_tokens == sum(map(len, rows.tails))
    assert found.prompt_tokens == sum(rows.lengths())
    assert found.longest_prompt == max(rows.lengths())
    assert 0 <= found.low <= found.seconds <= found.high < math.inf
    assert found.weights_megabytes * 2**20 == sum(w.nbytes for w in lm.model.parameters())
    assert found.megabytes > found.weights_megabytes


def test_the_sample_is_asked_with_the_prompts_of_the_run(tiny_lms, task, monkeypatch):
    "What is timed are prompts of the whole run, whatever is drawn for it or given per text."
    lm = tiny_lms["llama"]
    asked = []

    def recorded(*arguments, **options):
        trace = probe_steps(*arguments, **options)
        asked.append((list(trace.items.index), trace.settings["prompt"]))
        return trace

    monkeypatch.setattr(page, "probe_steps", recorded)
    drawn = demonstrations_for(task, 2, seed=5)
    near = similar_demonstrations(
        task.pool, task.texts, 1, lambda texts: [[1, len(t)] for t in texts]
    )
    for how in (dict(shots=2, seed=5), dict(demonstrations=drawn), dict(demonstrations=near)):
        asked.clear()
        estimate_run(lm, task, sample=8, **how)
        prompts = ask_for_lists(lm, task, **how).prompts
        by_item = {item: prompt.plain() for item, prompt in zip(task.ids, prompts)}
        assert [len(items) for items, _ in asked] == [1, 8, 2, 2, 2, 2]
        assert all(by_item[items[0]] == prompt for items, prompt in asked)
        sample = asked[1][0]
        assert sorted(item for items, _ in asked[2:] for item in items) == sorted(sample)


def test_a_sample_of_all_texts_and_one_text(tiny_lms):
    for texts in (["hm"], ["hm", "oh no", "I won"]):
        found = estimate_run(tiny_lms["llama"], texts, 0, labels=["joy", "fear"], sample=8)
        assert found.sampled == found.texts == len(texts)
        assert found.low == found.seconds == found.high
        assert "texts that were timed" in repr(found)


def test_extrapolation_by_hand():
    "A second once, and a tenth of a second per token: from 8 texts of 10 tokens to 1,000 tokens."
    parts = [(1 + 0.1 * 20, 20.0)] * 4
    expected, low, high = page._extrapolated((1 + 0.1 * 80, 80.0), parts, 1000.0)
    assert expected == pytest.approx(101) and low == pytest.approx(101)
    assert high == pytest.approx(9 / 80 * 1000)  # if the second came again with every 8 texts
    uneven = [(1 + rate * 20, 20.0) for rate in (0.08, 0.12, 0.08, 0.12)]
    expected, low, high = page._extrapolated((9.0, 80.0), uneven, 1000.0)
    error = 0.02 / math.sqrt(3)  # the standard error of the mean of .08, .12, .08, .12
    assert expected - low == pytest.approx(2 * error * 1000) and expected == pytest.approx(101)
    still = page._extrapolated((0.0, 80.0), [(0.0, 20.0)] * 4, 1000.0)
    assert still == (0, 0, 0)


def test_of_the_right_order(tuned_lm, task):
    "Wide bounds, since the machine may do other things: tests do not measure time."
    found = estimate_run(tuned_lm, task, 0, sample=4)
    taken = probe_steps(tuned_lm, task, 0, progress=False).settings["seconds"]
    assert taken / 10 < found.seconds < taken * 10


def test_what_a_run_refuses_is_refused(tiny_lms, task):
    lm = tiny_lms["llama"]
    long = ["word " * 2000, "hm"]
    with pytest.raises(ValueError, match="exceed the 1024 tokens"):
        estimate_run(lm, long, 0, labels=["joy"])
    cut = estimate_run(lm, long, 0, labels=["joy"], long_text="truncate")
    assert cut.longest_prompt < 1024
    with pytest.raises(ValueError, match="sample is 0"):
        estimate_run(lm, task, sample=0)
    with pytest.raises(ValueError, match="there are no texts"):
        estimate_run(lm, task.select([]), 0)
    assert isinstance(estimate_run(lm, task, 0, sample=1, folder="nowhere"), Estimate)
