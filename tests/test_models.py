"""Loading models."""

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from mlc_notebooks.models import LM, adapter_folder, load_lm


def test_a_folder_is_loaded_as_a_model(base_lm, tmp_path):
    "A model of one's own, saved by transformers."
    base_lm.model.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        load_lm(tmp_path)
    base_lm.tokenizer.save_pretrained(tmp_path)
    again = load_lm(tmp_path)
    assert again.fingerprint == base_lm.fingerprint


def test_a_language_model_is_shown_in_one_line(base_lm):
    assert repr(base_lm) == "LM('smollm2-135m', 135 million weights, float32, cpu)"


def test_no_pickle_is_read(base_lm, tmp_path):
    base_lm.model.config.save_pretrained(tmp_path)
    base_lm.tokenizer.save_pretrained(tmp_path)
    torch.save(base_lm.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_lm(tmp_path)


def test_the_adapter_is_merged_as_peft_does_it(tuned_lm):
    peft = pytest.importorskip("peft")
    base = load_lm("smollm2-135m").model
    reference = peft.PeftModel.from_pretrained(
        base, adapter_folder("smollm2-135m-emotions")
    ).merge_and_unload()
    ids = torch.tensor([tuned_lm.encode_text("Input: What a day!\n")])
    with torch.inference_mode():
        assert (reference(ids).logits - tuned_lm.model(ids).logits).abs().max() < 1e-3


def test_the_dequantised_tokenizer_spells_plainly(base_lm):
    "Digits one by one, emoji as bytes, newlines as tokens of their own."

    def pieces(text):
        return [base_lm.token_texts[i] for i in base_lm.encode_text(text)]

    assert pieces("2024") == ["2", "0", "2", "4"]
    assert pieces("a\n\nb") == ["a", "\n", "\n", "b"]
    for text in ("😀🇫🇷", "naïve – “quotes”", "tab\tand  spaces", "שלום"):
        assert base_lm.decode(base_lm.encode_text(text)) == text


def test_letters_of_a_sentencepiece_vocabulary_are_no_marks():
    "In Gemma's vocabulary Ċ is a letter; in a byte-level one it stands for a newline."
    words = {"<0x0A>": 0, "▁joy": 1, "Ċa": 2, "\n": 3}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words)))
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=5))
    lm = LM("words", SimpleNamespace(config=config), tokenizer)
    assert lm.token_texts == ["\n", " joy", "Ċa", "\n", ""]
    assert lm.tokens_beginning("\n").tolist() == [0, 3]
