"""Loading models."""

import copy
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from mlc_notebooks.models import LM, WeightHash, adapter_folder, load_lm, weights_hash


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


def edited(name, **changed):
    "A JSON file of the folder with other values."

    def change(folder):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))

    return change


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(name):
    "A file that was cut off in its middle."

    def change(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return change


def with_weights(change_weights):
    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        change_weights(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def without_a_layer(tensors):
    for name in [name for name in tensors if "layers.1" in name]:
        del tensors[name]


def in_pieces(folder):
    "An index that names a file that is not there."
    pieces = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(pieces))
    (folder / "model.safetensors").unlink()


FOLDERS = {
    "config cut off": (cut("config.json"), "config.json is damaged"),
    "config empty": (written("config.json", b""), "config.json is damaged"),
    "config a list": (written("config.json", b"[]"), "config.json is damaged"),
    "config not UTF-8": (written("config.json", b"\xff\xfe\x00"), "config.json is damaged"),
    "config nested": (written("config.json", b"[" * 10**5), "config.json is damaged"),
    "no model_type": (written("config.json", b"{}"), "names no model_type"),
    "unknown model_type": (edited("config.json", model_type="llama9"), "llama9"),
    "model_type a list": (edited("config.json", model_type=["llama"]), "cannot be loaded"),
    "width a text": (edited("config.json", hidden_size="wide"), "cannot be loaded"),
    "width negative": (edited("config.json", hidden_size=-32), "cannot be loaded"),
    "another width": (edited("config.json", hidden_size=64), "weights of another shape"),
    "one layer more": (edited("config.json", num_hidden_layers=3), "lacks weights of the model"),
    "one layer less": (edited("config.json", num_hidden_layers=1), "has no place for: model.lay"),
    "code of its own": (
        edited("config.json", model_type="mine", auto_map={"AutoConfig": "mine.Mine"}),
        "which is run with trust_remote_code=True only",
    ),
    "a layer missing": (with_weights(without_a_layer), "lacks weights of the model"),
    "no output": (with_weights(lambda t: t.pop("lm_head.weight")), "drawn at random: lm_head.weig"),
    "no weights": (with_weights(dict.clear), "lacks weights of the model"),
    "weights cut off": (cut("model.safetensors"), "model.safetensors is damaged"),
    "weights empty": (written("model.safetensors", b""), "model.safetensors is damaged"),
    "weights are text": (written("model.safetensors", b"weights" * 99), "safetensors is damaged"),
    "a piece missing": (in_pieces, "has no model-00001-of-00002.safetensors"),
    "index cut off": (
        lambda f: (in_pieces(f), cut("model.safetensors.index.json")(f)),
        "index.json is damaged",
    ),
    "tokenizer cut off": (cut("tokenizer.json"), "tokenizer.json is damaged"),
    "tokenizer empty": (written("tokenizer.json", b""), "tokenizer.json is damaged"),
    "tokenizer of nothing": (written("tokenizer.json", b"{}"), "cannot be loaded"),
    "tokenizer settings": (written("tokenizer_config.json", b"{"), "tokenizer_config.json is dama"),
    "generation settings": (written("generation_config.json", b"]"), "generation_config.json is"),
}


@pytest.mark.parametrize("damage", FOLDERS)
def test_a_damaged_folder_is_named(damage, tiny_folder, tmp_path):
    spoil, message = FOLDERS[damage]
    shutil.copytree(tiny_folder, tmp_path / "model")
    spoil(tmp_path / "model")
    with pytest.raises((ValueError, OSError), match=message) as refused:
        load_lm(tmp_path / "model")
    assert str(tmp_path / "model") in str(refused.value)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


def test_weights_of_another_task_are_no_damage(tiny_folder, tmp_path):
    "A head beside the language model is left alone, and tied weights are not missing."
    shutil.copytree(tiny_folder, tmp_path / "model")
    with_weights(lambda tensors: tensors.update({"v_head.weight": torch.ones(1, 32)}))(
        tmp_path / "model"
    )
    load_lm(tmp_path / "model")
    edited("config.json", tie_word_embeddings=True)(tmp_path / "model")
    with_weights(lambda tensors: tensors.pop("lm_head.weight"))(tmp_path / "model")
    lm = load_lm(tmp_path / "model")
    assert lm.model.lm_head.weight is lm.model.model.embed_tokens.weight


NAMES = {
    "": "cannot load ''",
    " ": "cannot load ' '",
    "x" * 60_000: r"cannot load 'xxx.{,80}\.\.\.x",
    "a/" * 30_000: "no model folder",
    "null\0byte": "cannot load 'null",
    "two\nlines": r"cannot load 'two\\nlines'",
    "smolm2-135m": "Did you mean smollm2-135m\\?",
    "SmolLM2-135M-emotion": "Did you mean smollm2-135m-emotions\\?",
    "qwen2.5-coder-7b": "Did you mean qwen2.5-coder-",
    "nobody/smollm2-135m": "cannot load 'nobody/smollm2-135m'",
    "../nowhere": "no model folder '../nowhere'",
    "~nobody-here/model": "no model folder",
    "C:\\models\\mine": "cannot load 'C:",
}


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_wrong_name_ends_in_a_sentence(name, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    start = time.perf_counter()
    with pytest.raises(OSError, match=NAMES[name]) as refused:
        load_lm(name)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600
    assert time.perf_counter() - start < 10


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch):
    asked = []

    def unreachable(host, *rest, **options):
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    with pytest.raises(OSError, match="cannot load 'nobody/nothing'"):
        load_lm("nobody/nothing")
    assert len(asked) <= 1


def test_a_hub_model_in_the_cache_is_loaded_without_the_hub(tiny_folder, tmp_path, monkeypatch):
    store = tmp_path / "models--somebody--tiny"
    shutil.copytree(tiny_folder, store / "snapshots" / "0" / "")
    (store / "refs").mkdir()
    (store / "refs" / "main").write_text("0")
    code = f"""
from mlc_notebooks.models import load_lm
lm = load_lm("somebody/tiny")
assert lm.name == "somebody/tiny"
assert lm.fingerprint == load_lm({str(tiny_folder)!r}).fingerprint
"""
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    (tmp_path / "model").chmod(0)
    with pytest.raises(PermissionError, match="cannot be read"):
        load_lm(tmp_path / "model")


def test_types_and_devices_that_are_not_there(tiny_folder):
    for dtype in ("float13", "int8", "bool", "", "nn", None, 32, "float8_e4m3fn"):
        with pytest.raises(ValueError, match="unknown dtype"):
            load_lm(tiny_folder, dtype=dtype)
    for device in ("gpu", "cuda:99", "meta", "", 7.5, None):
        with pytest.raises(ValueError, match="use 'cpu' or 'auto'"):
            load_lm(tiny_folder, device=device)
    assert load_lm(tiny_folder, dtype=torch.bfloat16).dtype == "bfloat16"


def test_a_fingerprint_is_that_of_the_model_as_it_is_now(tiny_folder):
    lm = load_lm(tiny_folder)
    seen = {lm.fingerprint["weights"]}

    def is_new():
        before = len(seen)
        assert lm.fingerprint["weights"] == weights_hash(lm.model)
        seen.add(lm.fingerprint["weights"])
        return len(seen) == before + 1

    embedding = lm.model.model.embed_tokens.weight
    with torch.no_grad():
        embedding[200, 5] += 1e-6  # one number
    assert is_new()
    with torch.inference_mode():
        embedding[200, 5] += 1e-6
    assert is_new()
    lm.model.load_state_dict({k: v + 0.25 for k, v in lm.model.state_dict().items()})
    assert is_new()
    optimizer = torch.optim.SGD(lm.model.parameters(), lr=0.1)
    lm.model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimizer.step()
    assert is_new()
    lm.model.lm_head.weight = torch.nn.Parameter(lm.model.lm_head.weight.detach() + 1)
    assert is_new()
    lm.model.lm_head.weight.data *= 2  # not counted by the library
    assert is_new()
    lm.model.lm_head.weight.data = lm.model.lm_head.weight.data.clone()
    assert not is_new()  # the same bytes in another place
    lm.model.to(torch.bfloat16)
    assert is_new()
    twin = copy.deepcopy(lm)
    assert twin.fingerprint == lm.fingerprint
    with torch.no_grad():
        twin.model.lm_head.weight[0, 0] += 1
    assert twin.fingerprint != lm.fingerprint


def test_a_weight_that_takes_anothers_place_is_noticed():
    "Memory that is given back is used again, often at once."
    hashes = WeightHash()
    layer = torch.nn.Linear(64, 64, bias=False)
    for value in range(20):
        del layer.weight
        layer.weight = torch.nn.Parameter(torch.full((64, 64), 0.0))
        with torch.no_grad():
            layer.weight[33, 17] = value
        assert hashes(layer) == weights_hash(layer)


def test_tensors_of_inference_mode_are_read_every_time():
    with torch.inference_mode():
        layer = torch.nn.Linear(64, 64)
        hashes = WeightHash()
        first = hashes(layer)
        layer.weight[33, 17] += 1
        assert hashes(layer) != first
