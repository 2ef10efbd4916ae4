import os

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from mlc_notebooks.engine import packs
from mlc_notebooks.models import LM, fetch_model, load_lm

# The properties in test_fuzz.py see the same examples in every run. To search longer, among other
# examples each time (the same as --hypothesis-profile=search):
#   HYPOTHESIS_PROFILE=search pytest tests/test_fuzz.py
settings.register_profile("fixed", max_examples=100, derandomize=True, deadline=None)
settings.register_profile("search", max_examples=5000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


# `make check` leaves out what loads a real model or trains one: pytest -m "not slow".
REAL_MODELS = {"base_lm", "tuned_lm", "tokenizer", "tiny_lms", "cache"}
SLOW_FILES = {
    "test_adapters",
    "test_benchmarks",
    "test_cli",
    "test_demux",
    "test_fetch",
    "test_models",
    "test_packaging",
    "test_rl",
    "test_runs",
    "test_sft",
    "test_supervised",
    "test_training_folders",
}


# More cases of what `make test` has a case of; `make test-thorough` runs them, before a release.
THOROUGH = {
    "test_bounded": [
        "test_every_true_value_lies_within_its_bounds[brighter-eng]",
        "test_every_true_value_lies_within_its_bounds[convabuse]",
    ],
    "test_classify": [
        "test_rows_of_another_file_teach[tsv]",
        "test_rows_of_another_file_teach[xlsx]",
    ],
    "test_probing": [
        "test_batches_and_order_change_nothing[exact-free]",
        "test_batches_and_order_change_nothing[first_token-free]",
        "test_other_ways_to_ask_agree_with_their_twin[free-True]",
        "test_other_ways_to_ask_agree_with_their_twin[free-comma]",
        "test_other_ways_to_ask_agree_with_their_twin[free-polysyndeton]",
        "test_other_ways_to_ask_agree_with_their_twin[guided-True]",
        "test_other_ways_to_ask_agree_with_their_twin[guided-comma]",
        "test_other_ways_to_ask_agree_with_their_twin[guided-True-comma]",
    ],
    "test_training_folders": [
        "test_a_damaged_checkpoint_never_gives_other_weights[demux]",
        "test_a_damaged_checkpoint_never_gives_other_weights[rl]",
        "test_killed_at_any_moment[rl]",
        "test_killed_at_operations_on_files[demux]",
        "test_killed_at_operations_on_files[rl]",
    ],
}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.name in THOROUGH.get(item.path.stem, ()):
            item.add_marker("thorough")
        if item.path.stem in SLOW_FILES or REAL_MODELS & set(item.fixturenames):
            item.add_marker("slow")


@pytest.fixture(scope="session")
def base_lm():
    "SmolLM2-135M-Instruct as it comes."
    return load_lm("smollm2-135m")


@pytest.fixture(scope="session")
def tuned_lm():
    "The same with the embedded adapter."
    return load_lm("smollm2-135m-emotions")


@pytest.fixture(scope="session")
def next_logprobs():
    "Full-vocabulary log-probabilities after some ids: one plain forward pass of transformers."

    @torch.inference_mode()
    def compute(lm, ids):
        return lm.model(torch.tensor([list(ids)])).logits[0, -1].float().log_softmax(-1).numpy()

    return compute


_SHAPE = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=64,
    max_position_embeddings=1024,
    initializer_range=0.5,
)  # which makes the predictions about as sharp as a real model's
_ARCHITECTURES = {
    "llama": _SHAPE,
    "qwen2": _SHAPE,
    "gpt_neox": _SHAPE,
    "gemma3_text": {
        **_SHAPE,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=1024, initializer_range=0.5),
}


@pytest.fixture(scope="session")
def tokenizer():
    "SmolLM2's."
    return AutoTokenizer.from_pretrained(fetch_model("smollm2-135m"))


@pytest.fixture(scope="session")
def tiny_lms(tokenizer):
    "Random models of the architectures that people bring, by name."
    torch.manual_seed(0)
    ids = dict(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=tokenizer.eos_token_id)

    def make(kind, shape):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **ids, **shape)).eval()

    return {kind: LM(kind, make(kind, shape), tokenizer) for kind, shape in _ARCHITECTURES.items()}


def _write_as_told(tokenizer):
    """A GPT-2 that writes what it is told, with this tokenizer.

    The embedding of a position points to the token that comes after it. `write(start, ids)` makes
    it write `ids` after a prompt of `start` tokens; the tokens it reads move its probabilities.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt2",
        vocab_size=len(tokenizer),
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=1024,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    model.lm_head.weight.copy_(torch.nn.functional.normalize(model.lm_head.weight))
    lm = LM("scripted", model, tokenizer)
    assert packs(lm)

    def write(start, ids):
        model.transformer.wpe.weight[start - 1 : start - 1 + len(ids)] = (
            8 * model.lm_head.weight[list(ids)]
        )
        return lm

    return write


@pytest.fixture(scope="session")
def write_as_told():
    "The function `_write_as_told`, for other tokenizers than SmolLM2's."
    return _write_as_told


@pytest.fixture(scope="module")
def scripted(tokenizer):
    "A function `scripted(start, ids)`, see `_write_as_told`, with SmolLM2's tokenizer."
    return _write_as_told(tokenizer)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    "A Llama with random weights that reads and writes bytes."
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    letters = sorted(ByteLevel.alphabet())
    tokens = Tokenizer(BPE({letter: i for i, letter in enumerate(["<end>", *letters])}, []))
    tokens.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokens.decoder = ByteLevelDecoder()
    PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<end>").save_pretrained(folder)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=257,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            eos_token_id=0,
            bos_token_id=None,
            pad_token_id=0,
        )
    )
    with torch.no_grad():
        model.lm_head.weight *= 10  # or all bytes would be about equally likely
    model.save_pretrained(folder)
    return folder
