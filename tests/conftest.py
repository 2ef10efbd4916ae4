import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mlc_notebooks.models import load_lm


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


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    "A Llama with random weights that reads and writes bytes."
    torch.manual_seed(0)
    folder, letters = tmp_path_factory.mktemp("tiny"), sorted(ByteLevel.alphabet())
    tokens = Tokenizer(BPE({letter: i for i, letter in enumerate(["<end>", *letters])}, []))
    tokens.pre_tokenizer, tokens.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<end>").save_pretrained(folder)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                         num_key_value_heads=2, eos_token_id=0, bos_token_id=None, pad_token_id=0))
    with torch.no_grad():
        model.lm_head.weight *= 10  # or all bytes would be about equally likely
    model.save_pretrained(folder)
    return folder
