"""Inclusion marginals: trees drawn by chance against enumeration, the model's tree against a plain one."""

from itertools import permutations

import numpy as np
import pytest

from mlc_notebooks.alignment import (
    Branch,
    best_first,
    inclusion_bounds,
    sample_outputs,
    sampled_marginals,
)
from mlc_notebooks.data import AnnotatedTexts, LabelSet, list_prompts, load_task
from mlc_notebooks.models import AnswerTokens


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


def plain_branch(lm, next_logprobs, tokens, start, prefix):
    "What may follow a prefix, token by token with plain forward passes."
    kind = "later" if prefix else "first"
    forms = {
        label: [f for f in getattr(tokens, kind) if f.outcome == label]
        for label in range(len(tokens.labels.outcomes))
    }
    context = start + list(tokens.opening)
    for place, label in enumerate(prefix):
        usual = next(f for f in (tokens.later if place else tokens.first) if f.outcome == label)
        context += [*usual.ids, *tokens.separator]
    scores, go = [], []
    for label, spelt in forms.items():
        total = -np.inf
        for form in spelt:
            value, ids = 0.0, list(context)
            for token in form.ids:
                value += next_logprobs(lm, ids)[token]
                ids.append(token)
            after = next_logprobs(lm, ids)
            total = np.logaddexp(total, value + np.log(np.exp(after[tokens.terminators]).sum()))
        scores.append(total)
        ids = context + list(spelt[0].ids)
        after, behind = (
            np.exp(next_logprobs(lm, ids)),
            np.exp(next_logprobs(lm, ids + [tokens.bare])),
        )
        on = after[tokens.go].sum() + after[tokens.bare] * behind[tokens.bare_go].sum()
        off = after[tokens.stop].sum() + after[tokens.bare] * behind[tokens.bare_stop].sum()
        go.append(on / (on + off))
    return Branch.read(scores, np.array(go[:-1]), prefix)


def test_the_models_tree_equals_one_made_with_plain_passes(tuned_lm, next_logprobs):
    labels = LabelSet(["anger", "fear", "joy"])
    texts = ["I was so scared, and then we laughed.", "Nobody listens to me!!"]
    task = AnnotatedTexts(
        "two", ["a", "b"], texts, labels, [np.zeros((0, 3))] * 2, label_noun="emotions"
    )
    tokens, prompts = (
        AnswerTokens(tuned_lm, labels),
        list_prompts(texts, labels, label_noun="emotions"),
    )
    by_hand = []
    for prompt in prompts:
        start = tuned_lm.encode_prompt(prompt)
        tree = {
            prefix: plain_branch(tuned_lm, next_logprobs, tokens, start, prefix)
            for size in range(3)
            for prefix in permutations(range(3), size)
        }
        by_hand.append(
            [sum(p for order, p in every_output(tree, 3) if label in order) for label in range(3)]
        )
    found = inclusion_bounds(tuned_lm, task, shots=0, tolerance=0, most_looks=None, progress=False)
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
