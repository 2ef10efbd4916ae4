"""A lazy look at the output tree finds what the full look finds, to within its tolerance."""

import numpy as np
import pytest

from mlc_notebooks.alignment import (
    FollowingTries,
    count_tokens,
    inclusion_marginals,
    look_fully,
    look_lazily,
    record_trees,
    tree_marginals,
    usual_forms,
)
from mlc_notebooks.data import LabelSet, load_task, unannotated
from mlc_notebooks.engine import Node, prompt_tree
from mlc_notebooks.probing import StepReader, ask_for_lists

NAMES = ["joy", "joyful", "anger", "Fear of the dark", "sadness", "surprise"]


def after(context, reader, prefix):
    "The node that predicts the label after these ones, and the nodes on the way."
    nodes = [context]
    for position, label in enumerate(prefix):
        form = usual_forms(reader.answer_tokens, position)[label]
        nodes.append(Node(nodes[-1], [*form.ids, *reader.answer_tokens.separator]))
    return nodes


@pytest.mark.parametrize("fmt", ["json", "comma"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_it_is_the_full_look_to_within_the_tolerance(tiny_lms, kind, fmt):
    lm = tiny_lms[kind]
    task = unannotated(["What a day.", "No."], LabelSet(NAMES))
    questions = ask_for_lists(lm, task, shots=0, fmt=fmt)
    reader = StepReader(questions.answer_tokens, "exact")
    tree = prompt_tree(lm, questions.rows.shared)
    tries = FollowingTries(reader)
    prefixes = [(), (0,), (2, 0), (5, 1, 3, 2), (0, 1, 2, 3, 4)]
    contexts = []
    for prefix in prefixes:
        start = Node(tree.root, questions.rows.tails[len(prefix) % 2])
        *way, last = after(Node(start, questions.answer_tokens.opening), reader, prefix)
        tree.compute([start, *way], reader.watch)
        contexts.append(last)

    full = look_fully(tree, reader, prefixes, contexts)
    for tolerance in (1e-9, 1e-3, 0.05, 0.3):
        lazy = look_lazily(tree, tries, prefixes, contexts, tolerance)
        for prefix, one, twin in zip(prefixes, lazy, full):
            assert np.abs(one.following - twin.following).max() <= tolerance + 1e-6
            assert one.following.sum() == pytest.approx(1)
            asked = one.following[:-1] > tolerance
            np.testing.assert_allclose(one.go[asked], twin.go[asked], atol=1e-5)
            is_last = len(prefix) + 1 == len(NAMES)
            assert (one.go[~asked] == (0 if is_last else 1)).all()


def test_marginals_of_a_real_model(tuned_lm):
    task = load_task("brighter-eng").sample(6, seed=1, kind="multi")
    how = dict(shots=0, most_looks=6, progress=False)
    with count_tokens(tuned_lm) as full:
        twin = inclusion_marginals(tuned_lm, task, **how)
    with count_tokens(tuned_lm) as lazy:
        trees = record_trees(tuned_lm, task, reading_tolerance=1e-3, **how)
    assert np.abs(tree_marginals(trees) - twin).to_numpy().max() < 0.01
    assert lazy.tokens < full.tokens


def test_a_tolerance_is_a_share(tuned_lm):
    task = load_task("brighter-eng").sample(2, seed=1)
    with pytest.raises(ValueError, match="reading_tolerance is 1.5: give a number"):
        record_trees(tuned_lm, task, shots=0, reading_tolerance=1.5, progress=False)
