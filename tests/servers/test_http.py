"""A vLLM server asked over HTTP beside the local engine: the same numbers in float32.

`test_vllm.py` compares steps on more texts, with vLLM as a library; what HTTP adds does not depend
on how many texts there are.
"""

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
)

from mlc_notebooks.models import load_lm

TEXTS = 8


@pytest.fixture(scope="module")
def local():
    return load_lm("smollm2-135m-emotions", device="cpu")


@pytest.fixture(scope="module")
def lm(vllm_server, model_folder):
    "The embedded model, computed by a vLLM server."
    return load_lm(vllm_server.url, model=vllm_server.model, tokenizer=str(model_folder))


def test_any_token_is_told(lm, local):
    assert lm.likeliest is None
    assert lm.end_ids == local.end_ids
    assert lm.fingerprint["tokenizer"] == local.fingerprint["tokenizer"]


@pytest.mark.parametrize("reading", ["exact", "first_token"])
@pytest.mark.parametrize("decoding", ["free", "guided"])
def test_steps_agree(local, lm, texts, decoding, reading):
    check_steps(local, lm, texts.select(range(TEXTS)), decoding=decoding, reading=reading)


@pytest.mark.parametrize("name", METHODS_ON_MORE_TEXTS)
def test_methods_agree(local, lm, texts, name):
    check_method(local, lm, texts.select(range(FEW)), name)


def test_inclusion_marginals_agree(local, lm, texts):
    check_marginals(local, lm, texts.select(range(FEW)))


def test_more_tokens_than_one_request_may_name(local, lm):
    check_watching_many(local, lm)


def test_it_writes_on(local, lm, texts):
    check_writing_on(local, lm, [local.encode_text(text) for text in texts.texts[:4]])


def test_emoji_newlines_and_digits_agree(local, lm):
    check_odd_texts(local, lm)
