"""Inclusion marginals: random trees against enumeration, the model's tree against a plain one."""

from itertools import permutations

import numpy as np
import pytest

from mlc_notebooks.alignment import (
    Branch,
    OutputTree,
    best_first,
    inclusion_bounds,
    sample_outputs,
    sampled_marginals,
)
from mlc_notebooks.data import LabelSet, load_task, unannotated
from mlc_notebooks.engine import prompt_tree
from mlc_notebooks.probing import StepReader, ask_for_lists


def drawn_tree(labels, seed, sharpness=1.0):
    rng = np.random.default_rng(seed)
    return {
        prefix: Branch.read(
            sharpness * rng.normal(size=labels + 1), rng.uniform(size=labels), prefix
        )
        for size in range(labels)
        for prefix in permutations(range(labels), size)
    }


def every_output(tree, labels):
    "(labels in order, probability) of all outputs, by multiplying along each path."
    yield (), tree[()].following[-1]
    for size in range(1, labels + 1):
        for order in permutations(range(labels), size):
            p = 1.0
            for i, label in enumerate(order):
                p *= tree[order[:i]].following[label] * (
                    tree[order[: i - 1]].go[order[i - 1]] if i else 1
                )
            yield order, p * (1 - tree[order[:-1]].go[order[-1]])


@pytest.mark.parametrize("labels, outputs", [(3, 16), (4, 65)])
@pytest.mark.parametrize("seed", range(5))
def test_exact_marginals_equal_enumeration(labels, outputs, seed):
    tree = drawn_tree(labels, seed)
    listed = dict(every_output(tree, labels))
    assert len(listed) == outputs
    assert sum(listed.values()) == pytest.approx(1, abs=1e-12)
    (found,) = best_first(
        lambda wanted: [tree[prefix] for _, prefix in wanted],
        1,
        labels,
        tolerance=0,
        most_looks=None,
    )
    by_hand = [sum(p for order, p in listed.items() if label in order) for label in range(labels)]
    np.testing.assert_allclose(found.marginals, by_hand, atol=1e-12)
    assert found.marginals.sum() == pytest.approx(
        sum(len(order) * p for order, p in listed.items())
    )
    assert found.missing == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("looks", [1, 3, 9, 27])
def test_bounds_contain_the_marginals_and_missing_is_what_was_not_followed(looks):
    tree = drawn_tree(4, seed=7, sharpness=3)

    def expand(wanted):
        return [tree[prefix] for _, prefix in wanted]

    (exact,) = best_first(expand, 1, 4, tolerance=0, most_looks=None)
    (part,) = best_first(expand, 1, 4, tolerance=0, most_looks=looks, at_once=1)
    assert part.looks == min(looks, exact.looks)
    assert (part.marginals <= exact.marginals + 1e-12).all()
    assert (exact.marginals <= part.upper + 1e-12).all()
    assert (part.marginals <= part.estimate + 1e-12).all() and (
        part.estimate <= part.upper + 1e-12
    ).all()
    assert (
        exact.marginals.sum() - part.marginals.sum() >= part.missing - 1e-9
    )  # what is missing writes one label more at least


def test_search_stops_at_the_tolerance():
    tree = drawn_tree(4, seed=1)

    def expand(wanted):
        return [tree[prefix] for _, prefix in wanted]

    (loose,) = best_first(expand, 1, 4, tolerance=0.2, most_looks=None, at_once=1)
    (tight,) = best_first(expand, 1, 4, tolerance=0.01, most_looks=None, at_once=1)
    assert loose.looks < tight.looks and loose.missing <= 0.2 and tight.missing <= 0.01


@pytest.mark.parametrize("labels", [3, 4])
def test_both_kinds_of_sampling_converge(labels):
    tree = drawn_tree(labels, seed=2)

    def expand(wanted):
        return [tree[prefix] for _, prefix in wanted]

    (exact,) = best_first(expand, 1, labels, tolerance=0, most_looks=None)
    counted, smoothed = sample_outputs(expand, 1, labels, samples=40000, seed=0)
    np.testing.assert_allclose(counted[0], exact.marginals, atol=5 * 0.5 / 200)
    np.testing.assert_allclose(smoothed[0], exact.marginals, atol=5 * 0.5 / 200)
    few = np.array(
        [
            [estimate[0] for estimate in sample_outputs(expand, 1, labels, samples=5, seed=s)]
            for s in range(400)
        ]
    )
    np.testing.assert_allclose(
        few.mean(0), [exact.marginals] * 2, atol=0.05
    )  # unbiased with few samples too
    assert (few.std(0)[1] < few.std(0)[0]).all()


def test_one_label_and_texts_apart():
    trees = {
        0: Branch.read(np.log([0.3, 0.7]), np.array([0.9]), ()),
        1: Branch.read(np.log([0.8, 0.2]), np.array([0.1]), ()),
    }
    found = best_first(lambda wanted: [trees[text] for text, _ in wanted], 2, 1, tolerance=0)
    np.testing.assert_allclose(
        [one.marginals[0] for one in found], [0.3, 0.8]
    )  # the only label ends the list


def plain_branch(logprobs_after, tokens, start, prefix):
    "What may follow a prefix, token by token with plain forward passes."

    def usual(label, position):
        return next(form for form in tokens.forms_at(position) if form.outcome == label)

    context = start + list(tokens.opening)
    for position, label in enumerate(prefix):
        context += [*usual(label, position).ids, *tokens.separator]

    totals = np.full(len(tokens.labels.outcomes), -np.inf)
    for form in tokens.forms_at(len(prefix)):
        value, ids = 0.0, list(context)
        for token in form.ids:
            value += logprobs_after(ids)[token]
            ids.append(token)
        ended = np.log(np.exp(logprobs_after(ids)[tokens.terminators]).sum())
        totals[form.outcome] = np.logaddexp(totals[form.outcome], value + ended)

    go = []
    for label in range(len(tokens.labels)):
        ids = context + list(usual(label, len(prefix)).ids)
        after = np.exp(logprobs_after(ids))
        after_quote = np.exp(logprobs_after(ids + [tokens.bare]))
        on = after[tokens.go].sum() + after[tokens.bare] * after_quote[tokens.bare_go].sum()
        off = after[tokens.stop].sum() + after[tokens.bare] * after_quote[tokens.bare_stop].sum()
        go.append(on / (on + off))
    return Branch.read(totals, np.array(go), prefix)


@pytest.fixture(scope="module")
def two_texts():
    labels = LabelSet(["anger", "fear", "joy"])
    texts = ["I was so scared, and then we laughed.", "Nobody listens to me!!"]
    return unannotated(texts, labels, name="two", label_noun="emotions")


def test_branches_equal_those_of_plain_passes(tuned_lm, next_logprobs, two_texts):
    """Four of the twenty prefixes of two texts.

    They are as strong as all: how a branch is read depends on the text, on whether it stands at
    the first place or a later one (other spellings), and on the tokens before it. Both texts, and
    the places 0, 1 and 2, are read here, the last after two labels against the label order. That
    the marginals are the right sum over branches is the next test's, for all prefixes.
    """
    asked = ask_for_lists(tuned_lm, two_texts, shots=0)
    tokens = asked.answer_tokens
    tree = prompt_tree(tuned_lm, asked.rows.shared)
    trees = OutputTree(asked, tree, StepReader(tokens, "exact"), range(2))
    wanted = [(0, ()), (1, ()), (0, (2,)), (0, (2, 0))]
    seen = {}  # many spellings begin alike: each path is computed once

    def logprobs_after(ids):
        key = tuple(ids)
        if key not in seen:
            seen[key] = next_logprobs(tuned_lm, ids)
        return seen[key]

    for (text, prefix), found in zip(wanted, trees.expand(wanted)):
        plain = plain_branch(logprobs_after, tokens, asked.rows[text], prefix)
        np.testing.assert_allclose(found.following, plain.following, atol=1e-4)
        np.testing.assert_allclose(found.go, plain.go, atol=1e-4)


def test_the_models_marginals_are_the_sum_over_its_branches(tuned_lm, two_texts):
    asked = ask_for_lists(tuned_lm, two_texts, shots=0)
    tree = prompt_tree(tuned_lm, asked.rows.shared)
    trees = OutputTree(asked, tree, StepReader(asked.answer_tokens, "exact"), range(2))
    prefixes = [order for size in range(3) for order in permutations(range(3), size)]
    by_hand = []
    for text in range(2):
        branches = dict(zip(prefixes, trees.expand([(text, prefix) for prefix in prefixes])))
        outputs = list(every_output(branches, 3))
        by_hand.append([sum(p for order, p in outputs if label in order) for label in range(3)])
    found = inclusion_bounds(
        tuned_lm, two_texts, shots=0, tolerance=0, most_looks=None, progress=False
    )
    np.testing.assert_allclose(found.low, by_hand, atol=1e-4)
    np.testing.assert_allclose(found.high, by_hand, atol=1e-4)
    assert (found.looks == 1 + 3 + 6).all()


def test_batches_change_nothing_and_samples_come_close(tuned_lm):
    task = load_task("brighter-eng").sample(6, seed=4, kind="main")
    whole = inclusion_bounds(tuned_lm, task, shots=0, progress=False)
    alone = inclusion_bounds(tuned_lm, task.select([2]), shots=0, progress=False)
    np.testing.assert_allclose(whole.low.loc[alone.low.index], alone.low, atol=1e-4)
    assert ((whole.missing <= 0.01) | (whole.looks >= 64)).all()
    sampled = sampled_marginals(tuned_lm, task, shots=0, samples=200, progress=False)
    assert np.abs(sampled - whole.low).to_numpy().max() < 0.15
    again = sampled_marginals(tuned_lm, task, shots=0, samples=200, progress=False)
    assert (again == sampled).all(axis=None)
