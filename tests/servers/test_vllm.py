"""vLLM as a library beside the local engine: the same numbers in float32.

Run by the Python of vLLM's environment; elsewhere it is skipped. 64 texts take
five minutes more: MLC_PARITY_TEXTS=64 make test-servers.
"""

import os

import pytest
from parity import (
    FEW,
    METHODS_ON_MORE_TEXTS,
    check_marginals,
    check_method,
    check_odd_texts,
    check_steps,
    check_watching_many,
    check_writing_on,
    methods_on_few_texts,
)

from mlc_notebooks.models import load_lm

TEXTS = int(os.environ.get("MLC_PARITY_TEXTS", 16))

pytest.importorskip("vllm", reason="vLLM is tested by the Python of its own environment")


@pytest.fixture(scope="module")
def local():
    return load_lm("smollm2-135m-emotions", device="cpu")


@pytest.fixture(scope="module")
def lm():
    "The embedded model, computed by vLLM."
    from mlc_notebooks.models import load_vllm

    options = dict(max_model_len=2048, block_size=32, enforce_eager=True)
    return load_vllm("smollm2-135m-emotions", **options)


def test_it_is_the_same_model(local, lm):
    assert lm.fingerprint == local.fingerprint
    assert lm.end_ids == local.end_ids
    assert lm.vocabulary_size == local.vocabulary_size
    assert lm.dtype == "float32"


@pytest.mark.parametrize("reading", ["exact", "first_token"])
@pytest.mark.parametrize("decoding", ["free", "guided"])
def test_steps_agree(local, lm, texts, decoding, reading):
    check_steps(local, lm, texts.select(range(TEXTS)), decoding=decoding, reading=reading)


@pytest.mark.parametrize("name", METHODS_ON_MORE_TEXTS)
def test_methods_agree(local, lm, texts, name):
    check_method(local, lm, texts.select(range(8)), name)


def test_inclusion_marginals_agree(local, lm, texts):
    check_marginals(local, lm, texts.select(range(FEW)))


@pytest.mark.parametrize("name", methods_on_few_texts())
def test_other_methods_agree(local, lm, texts, name):
    check_method(local, lm, texts.select(range(FEW)), name)


def test_more_tokens_than_one_request_may_name(local, lm):
    check_watching_many(local, lm)


def test_it_writes_on(local, lm, texts):
    check_writing_on(local, lm, [local.encode_text(text) for text in texts.texts[:4]])


def test_emoji_newlines_and_digits_agree(local, lm):
    check_odd_texts(local, lm)


def test_a_prompt_may_fill_the_context(lm):
    row = lm.encode_text(" a") * lm.context_length
    assert lm.read_next([row], [5]).logprobs.shape == (1, 1)
