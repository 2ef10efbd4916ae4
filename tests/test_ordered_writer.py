"""The honest ordered writer: both closed forms against an enumeration of all sets and orders, its
steps beside those of a trace that the writer itself drew, and the split of runner-ups by order."""

from itertools import permutations, product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mlc_notebooks.data import AnnotatedTexts, LabelSet
from mlc_notebooks.metrics import (
    compare_with_writer,
    first_step_profiles,
    first_written,
    next_at_random,
    next_label_shares,
    runner_up_kinds,
    runner_up_shares,
    spike_split,
    writer_profile,
    writer_steps,
)
from mlc_notebooks.metrics.ordered_writer import SPIKE_PARTS
from mlc_notebooks.probing import Trace

LABELS = LabelSet(["joy", "fear", "anger"])  # not in the alphabet's order


def all_lists(p, in_order: bool) -> dict[tuple, float]:
    "The slow twin: every list that the writer may write, with its probability."
    lists = {}
    for chosen in product([False, True], repeat=len(p)):
        probability = np.prod(np.where(chosen, p, 1 - np.asarray(p)))
        members = tuple(np.flatnonzero(chosen).tolist())
        orders = [members] if in_order else list(permutations(members))
        for order in orders:
            lists[order] = probability / len(orders)
    return lists


def after(p, prefix: tuple, in_order: bool) -> np.ndarray:
    "What stands after the prefix (L + 1,): a label, or the end."
    found = np.zeros(len(p) + 1)
    for written, probability in all_lists(p, in_order).items():
        if written[: len(prefix)] == prefix:
            found[written[len(prefix)] if len(written) > len(prefix) else -1] += probability
    return found / found.sum()


def one_answer(probs, wrote, labels=LABELS) -> Trace:
    "A trace of one text; wrote: what each step wrote."
    outcomes = tuple(dict.fromkeys(name for name in wrote if name in labels.outcomes))
    items = pd.DataFrame({"text": ["x"], "outcomes": [outcomes], "flags": [()]}, ["a"])
    items.index.name = "id"
    steps = pd.DataFrame({"example": "a", "step": range(1, len(wrote) + 1), "wrote": wrote})
    steps = steps.assign(mass=0.9, go=0.3, stop=0.1, prompt_tokens=9, generated_tokens=3)
    steps["flags"] = [()] * len(wrote)
    return Trace(labels, items, steps, np.log(probs), {})


def beliefs(p, labels=LABELS) -> pd.DataFrame:
    return pd.DataFrame([p], ["a"], list(labels))


inner = st.floats(0.01, 0.99)
tables = st.integers(1, 5).flatmap(lambda n: arrays(float, n, elements=inner))


@given(tables)
def test_step_1_is_that_of_all_lists(p):
    assert first_written(p[None])[0] == pytest.approx(after(p, (), True), abs=1e-12)
    assert next_at_random(p[None])[0] == pytest.approx(after(p, (), False), abs=1e-12)


@given(tables, st.data())
def test_later_steps_are_those_of_all_lists(p, data):
    prefix = tuple(data.draw(st.permutations(range(len(p)))))[: data.draw(st.integers(1, len(p)))]
    written = np.isin(np.arange(len(p)), prefix)
    found = next_at_random(p[None], written[None])[0]
    assert found == pytest.approx(after(p, prefix, False), abs=1e-12)

    names = [f"l{i}" for i in range(len(p))]
    labels = LabelSet(names)
    kept = [names[i] for i in sorted(prefix)]
    trace = one_answer(np.full((len(kept), len(p) + 1), 1 / (len(p) + 1)), kept, labels)
    twin = [after(p, tuple(sorted(prefix))[:t], True) for t in range(len(kept) + 1)]
    tidy = writer_steps(trace, beliefs(p, labels))
    expected = tidy["expected"].to_numpy().reshape(len(kept), -1)
    for step in range(1, len(kept)):
        assert expected[step, :-1] == pytest.approx(twin[step][:-1] / twin[step][:-1].sum())
        assert expected[step, -1] == 0
    going_on = tidy.groupby("step")["expected_go"].first()
    assert going_on.to_numpy() == pytest.approx([1 - row[-1] for row in twin[1:]], abs=1e-12)


@given(st.integers(1, 40).flatmap(lambda n: arrays(float, n, elements=st.floats(0, 1))))
def test_distributions_sum_to_one_with_many_labels(p):
    for found in (first_written(p[None]), next_at_random(p[None])):
        assert found.min() >= 0
        assert found.sum() == pytest.approx(1)
    written = np.arange(len(p)) % 3 == 0
    assert next_at_random(p[None], written[None]).sum() == pytest.approx(1)


def test_a_random_order_is_the_mean_over_orders():
    p = np.array([0.9, 0.2, 0.6, 0.4])
    mean = np.zeros(5)
    for order in permutations(range(4)):
        mean[[*order, 4]] += first_written(p[None, list(order)])[0] / 24
    assert next_at_random(p[None])[0] == pytest.approx(mean)


def test_by_hand():
    """Beliefs .5, .4, .2 in the order listed; joy and anger are written. After joy: fear .4, anger
    .6 x .2 = .12, the end .48; given that a label follows: .4 / .52 and .12 / .52."""
    probs = [[0.7, 0.1, 0.1, 0.1], [0.2, 0.3, 0.4, 0.1]]
    trace = one_answer(probs, ["joy", "anger"])
    tidy = writer_steps(trace, beliefs([0.5, 0.4, 0.2]))
    assert tidy["expected"].tolist() == pytest.approx(
        [0.5, 0.2, 0.06, 0.24, 0, 0.4 / 0.52, 0.12 / 0.52, 0]
    )
    profile = writer_profile(trace, beliefs([0.5, 0.4, 0.2])).set_index("step")
    assert profile["impossible"].tolist() == pytest.approx([0, 0.2 + 0.1])
    kl = 3 / 7 * np.log2(3 / 7 / (0.4 / 0.52)) + 4 / 7 * np.log2(4 / 7 / (0.12 / 0.52))
    assert profile.loc[2, "kl"] == pytest.approx(kl)
    assert profile["writer_p_go"].tolist() == pytest.approx([0.52, 0])
    assert profile["p_go"].tolist() == pytest.approx([0.75, 0.75])


def test_a_model_that_is_the_writer_is_at_no_distance():
    p = [0.5, 0.4, 0.2]
    first = after(p, (), True)
    second = np.append(after(p, (0,), True)[:-1] / 0.52, 0) + 1e-12
    found = compare_with_writer(one_answer([first, second], ["joy", "fear"]), beliefs(p))
    close = found[found["quantity"] != "p_go"]
    assert close["difference"].to_numpy() == pytest.approx(np.zeros(len(close)), abs=1e-9)
    assert found["n"].eq(1).all()


@pytest.mark.parametrize("order", ["listed", "random", ["anger", "joy", "fear"]])
def test_columns_of_the_table_do_not_matter(order):
    trace = one_answer([[0.7, 0.1, 0.1, 0.1], [0.2, 0.3, 0.4, 0.1]], ["joy", "fear"])
    table = beliefs([0.5, 0.4, 0.2])
    turned = table[["anger", "joy", "fear"]]
    assert writer_steps(trace, table, order).equals(writer_steps(trace, turned, order))


@pytest.mark.parametrize("wrote", [["fear", "joy", "anger"], ["glee", "joy"], ["anger", "anger"]])
def test_what_the_writer_cannot_have_written_is_left_out_and_counted(wrote):
    "The last step: after fear, joy; after a word that is no label; and where nothing can follow."
    trace = one_answer(np.full((len(wrote), 4), 0.25), wrote)
    of_step = writer_steps(trace, beliefs([0.5, 0.4, 0.2])).groupby("step")["expected"]
    assert of_step.count().tolist() == [*[4] * (len(wrote) - 1), 0]
    found = compare_with_writer(trace, beliefs([0.5, 0.4, 0.2])).set_index(["step", "quantity"])
    counts = found.loc[("later", "top"), ["rows", "excluded"]]
    assert counts.tolist() == [len(wrote) - 2, 1]


def test_a_label_out_of_order_is_mass_that_cannot_come():
    trace = one_answer([[0.25] * 4, [0.6, 0.1, 0.2, 0.1]], ["fear", "joy"])
    listed = writer_profile(trace, beliefs([0.5, 0.4, 0.2]))["impossible"]
    assert listed.tolist() == pytest.approx([0, 0.8])  # all but anger
    any_order = writer_profile(trace, beliefs([0.5, 0.4, 0.2]), "random")["impossible"]
    assert any_order.tolist() == pytest.approx([0, 0.2])  # fear again, and none


def test_certain_beliefs_cost_what_eps_says():
    trace = one_answer([[0.25] * 4], ["joy"])
    costs = [
        writer_profile(trace, beliefs([1, 0, 0]), eps=eps)["kl"].item() for eps in (1e-3, 1e-6)
    ]
    assert 0 < costs[0] < costs[1] < np.inf
    assert writer_profile(trace, beliefs([1, 0, 0]))["writer_top"].item() == 1


def test_what_does_not_fit_is_refused():
    trace = one_answer([[0.25] * 4], ["joy"])
    with pytest.raises(ValueError, match="no row for item 'a'"):
        writer_steps(trace, beliefs([0.5, 0.4, 0.2]).rename({"a": "b"}))
    with pytest.raises(ValueError, match="is no probability"):
        writer_steps(trace, beliefs([1.5, 0.4, 0.2]))
    with pytest.raises(ValueError, match="order is \\['joy'\\]"):
        writer_steps(trace, beliefs([0.5, 0.4, 0.2]), ["joy"])
    single = LabelSet(["joy", "fear", "anger"], none=None)
    with pytest.raises(ValueError, match="exactly one label applies"):
        writer_steps(one_answer([[0.5, 0.25, 0.25]], ["joy"], single), beliefs([0.5, 0.4, 0.1]))


def test_the_parts_of_a_spike_sum_to_it():
    trace = one_answer([[0.7, 0.1, 0.1, 0.1]], ["joy"])
    task = AnnotatedTexts("t", ["a"], ["x"], LABELS, [np.array([[1, 1, 0], [1, 0, 0]])])
    split = spike_split(trace, beliefs([0.8, 0.4, 0.1]), task).set_index(["quantity", "part"])
    for quantity in ("top", "second", "entropy"):
        parts = split["value"][quantity]
        assert parts[list(SPIKE_PARTS)].sum() == pytest.approx(parts["model"])
    # q is 1, .5, 0: joy first with 1 x (1 - .5 / 2) in a random order, with 1 as listed
    assert split["value"]["top"].tolist() == pytest.approx([0.75, 0.25, -0.2, -0.1, 0.7])


def test_profiles_hold_every_rank_and_label():
    trace = one_answer([[0.1, 0.6, 0.2, 0.1]], ["fear"])
    found = first_step_profiles(trace, beliefs([0.5, 0.4, 0.2])).groupby(["source", "by"])
    assert found["value"].apply(list)["model", "rank"] == pytest.approx([0.6, 0.2, 0.1, 0.1])
    assert found["key"].apply(list)["model", "label"] == list(LABELS.outcomes)
    assert found["value"].apply(list)["model", "label"] == pytest.approx([0.1, 0.6, 0.2, 0.1])


def test_runner_ups_by_hand():
    """Order joy, fear, anger. Step 1 writes joy, runner-up fear; anger is next, so fear was passed
    over. Step 2 writes anger; the runner-up fear cannot come, and comes."""
    probs = [[0.6, 0.2, 0.1, 0.1], [0.1, 0.2, 0.6, 0.1], [0.2, 0.6, 0.1, 0.1]]
    trace = one_answer(probs, ["joy", "anger", "fear"])
    split = runner_up_kinds(trace)
    assert split["kind"].tolist() == ["can come", "cannot come"]
    assert split["next"].tolist() == [0, 1]
    assert split["passed"].tolist()[:1] == [1]
    shares = runner_up_shares(trace).set_index(["kind", "quantity"])
    assert shares.loc[("can come", "share"), ["value", "rows"]].tolist() == [0.5, 2]
    assert shares.loc[("can come", "next"), "value"] == 0
    assert shares.loc[("cannot come", "next"), "value"] == 1


def test_the_kinds_together_are_the_shares_without_a_split():
    probs = [[0.6, 0.2, 0.1, 0.1], [0.1, 0.2, 0.6, 0.1], [0.2, 0.6, 0.1, 0.1]]
    trace = one_answer(probs, ["joy", "anger", "fear"])
    together = runner_up_kinds(trace).query("not last")["next"].mean()
    unsplit = next_label_shares(trace).query("step == 'all' and quantity == 'runner_up_next'")
    assert together == pytest.approx(unsplit["value"].item())


def test_no_kind_after_a_word_that_is_no_label():
    trace = one_answer(np.full((3, 4), 0.25), ["joy", "glee", "fear"])
    assert runner_up_kinds(trace)["step"].tolist() == [1]
    with pytest.raises(ValueError, match="order is 'random'"):
        runner_up_kinds(trace, "random")
