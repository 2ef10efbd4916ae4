"""Runs that are killed, starved of disk or memory, damaged, or given to two processes.

All of them end with the same bits.
"""

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from transformers import LlamaConfig, LlamaForCausalLM

from mlc_notebooks.alignment import average_prompts, inclusion_bounds, sampled_marginals, zero_shot
from mlc_notebooks.data import AnnotatedTexts, LabelSet, load_task
from mlc_notebooks.engine import (
    SettingsChanged,
    check_same_settings,
    discard_runs,
    in_batches,
    part_bytes,
    read_part,
)
from mlc_notebooks.engine.batches import advance, progress_bar
from mlc_notebooks.models import LM, load_lm
from mlc_notebooks.probing import Trace, probe_steps

FORK = multiprocessing.get_context(
    "fork"
)  # a child has model and libraries at once, so hundreds of them can be killed
LABELS = ["good", "bad", "odd"]  # and "else" for none: the random model writes all three
ASK = dict(shots=0, decoding="guided", batch_size=2, progress=False)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "A forked child cannot use the threads that its parent had started."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def lm(tiny_folder):
    return load_lm(tiny_folder)


def made_task(n=24, labels=LABELS, prefix="t", text="This is text"):
    votes = [np.eye(3, dtype=int)[[i % 3]] for i in range(n)]
    return AnnotatedTexts(
        "made",
        [f"{prefix}{i}" for i in range(n)],
        [f"{text} {i}{'!' * (i * 7 % 11)}" for i in range(n)],
        LabelSet(labels, "else"),
        votes,
    )


@pytest.fixture(scope="module")
def whole(lm):
    "The trace of a run that nothing happened to, without a folder."
    return probe_steps(lm, made_task(), hidden=True, attention=True, **ASK)


def assert_same_bits(one: Trace, other: Trace):
    pd.testing.assert_frame_equal(one.items, other.items, check_exact=True)
    pd.testing.assert_frame_equal(one.steps, other.steps, check_exact=True)
    for name in ("logprobs", "hidden", "attention"):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert (mine is None) == (theirs is None)
        assert mine is None or (mine.dtype, mine.shape, mine.tobytes()) == (
            theirs.dtype,
            theirs.shape,
            theirs.tobytes(),
        )


def in_child(work, *args):
    "A process of its own that does this."
    child = FORK.Process(target=work, args=args)
    child.start()
    return child


def exit_code(child):
    child.join(60)
    return child.exitcode


def probe(lm, folder):
    return probe_steps(lm, made_task(), hidden=True, attention=True, folder=folder, **ASK)


def no_halves(folder):
    return not list(folder.rglob("*.part"))


def test_a_folder_changes_nothing(lm, whole, tmp_path):
    "Neither while its batches are computed nor when they are read; and reading computes none."
    assert_same_bits(probe(lm, tmp_path), whole)
    written = {
        path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name != "run.lock"
    }
    assert len(written) == 12 + 1 and len(whole.steps) == 72
    again = probe(lm, tmp_path)
    assert_same_bits(again, whole)
    assert written == {path: path.stat().st_mtime_ns for path in written}
    discard_runs(tmp_path)
    assert not tmp_path.exists()
    assert_same_bits(again, whole)  # what was read does not lean on the files


def wait_for_parts(child, folder, count):
    "Until the folder has so many parts, or the child is done."
    while child.is_alive() and len(list(folder.glob("*.safetensors"))) < count:
        time.sleep(0.005)


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment(lm, whole, tmp_path, seed):
    "kill -9 at random moments, some batches on from the last kill, until a run comes to its end."
    rng, kills, folder = random.Random(seed), 0, tmp_path / "run"
    while True:
        before = len(list(folder.glob("*.safetensors")))
        child, started = in_child(probe, lm, folder), time.time()
        wait_for_parts(child, folder, before + rng.randrange(6))
        time.sleep(rng.random() * max(0.02, (time.time() - started) / 4))
        child.kill()
        if exit_code(child) == 0:
            break
        kills += 1
    assert kills >= 2
    assert_same_bits(probe(lm, folder), whole)
    assert no_halves(folder)


def killed_at(lm, folder, count):
    "The process kills itself just before its `count`-th operation on a file of the folder."
    left = iter(range(count - 1))

    def watch(event, args):
        if (
            event in ("open", "os.rename", "os.remove")
            and str(folder) in str(args[0])
            and next(left, None) is None
        ):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    probe(lm, folder)


def test_killed_before_every_operation_on_a_file(lm, whole, tmp_path):
    "Each run is killed some operations later than the one before; the last one is left alone."
    kills = 0
    for count in range(1, 60):
        code = exit_code(in_child(killed_at, lm, tmp_path / "run", count))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
        assert sum(path.suffix == ".part" for path in (tmp_path / "run").glob("*")) <= 1
    assert code == 0 and kills >= 8
    assert_same_bits(probe(lm, tmp_path / "run"), whole)


def count_batches(batch, done, size):
    done.append(batch)
    return [("x" * size, {i}) for i in batch]


def expected(size):
    return [("x" * size, {i}) for i in range(12)]


def with_quota(folder, limit, said):
    "No file may be longer than `limit` bytes."
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        in_batches(
            lambda batch: count_batches(batch, [], 120),
            range(12),
            2,
            folder=folder,
            settings={"a": 1},
        )
        said.send("done")
    except OSError as error:
        said.send(str(error))


def test_a_quota_stops_a_run_and_breaks_nothing(tmp_path):
    "Room grows from run to run; where a file did not fit, the folder stays whole."
    said, mine = [], FORK.Pipe(duplex=False)
    for limit in range(100, 1600, 50):
        folder = tmp_path / "run"
        assert exit_code(in_child(with_quota, folder, limit, mine[1])) == 0
        said.append(mine[0].recv())
        if said[-1] == "done":
            break
        assert str(folder) in said[-1] and "make room" in said[-1] and no_halves(folder)
        if (folder / "manifest.json").exists():
            json.loads((folder / "manifest.json").read_text())
    assert said[-1] == "done" and "manifest.json" in said[0]
    refused = [line.split(" could not")[0].split(": ")[1] for line in said[:-1]]
    assert refused.index("0000000.safetensors") < len(refused) - 1 - refused[::-1].index(
        "manifest.json"
    )  # which outgrew its room, later on
    assert in_batches(None, range(12), 2, folder=folder, settings={"a": 1}) == expected(120)


def test_a_full_disk(tmp_path):
    "A tmpfs of 64 kB; when there is room again, the run goes on."
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        (disk / "other").write_bytes(bytes(20_000))

        def run(done):
            return in_batches(
                lambda batch: count_batches(batch, done, 3000),
                range(12),
                3,
                folder=disk / "run",
                settings={},
            )

        first, second = [], []
        with pytest.raises(OSError, match=r"disk/run: .*No space left on device.*make room"):
            run(first)
        assert len(first) > 1 and no_halves(disk)
        (disk / "other").unlink()
        assert run(second) == expected(3000)
        assert first[:-1] + second == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("harm", ["flipped", "cut", "emptied", "gone"])
def test_a_damaged_part_is_computed_again(lm, whole, tmp_path, harm):
    probe(lm, tmp_path)
    part = tmp_path / "0000004.safetensors"
    content = bytearray(part.read_bytes())
    if harm == "gone":
        part.unlink()
    else:
        content[-9] ^= 1
        part.write_bytes({"flipped": content, "cut": content[:-1], "emptied": b""}[harm])
    kept = {
        path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors") if path != part
    }
    with pytest.warns(UserWarning, match="0000004.safetensors is damaged or gone: its 2 texts"):
        assert_same_bits(probe(lm, tmp_path), whole)
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_bits(probe(lm, tmp_path), whole)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"settings": 3, "batches": []}',
        b"\xff\xfe",
        "[2, 2]",
        "../2.safetensors",
    ],
)
def test_a_damaged_manifest_is_an_error_with_a_way_out(tmp_path, content):
    def run():
        return in_batches(lambda batch: batch, range(4), 2, folder=tmp_path, settings={"a": 1})

    assert run() == [0, 1, 2, 3]
    manifest = tmp_path / "manifest.json"
    if isinstance(content, str):  # valid JSON, but not what a run writes
        content = (
            manifest.read_text()
            .replace("[2, 3]" if content[0] == "[" else "0000002.safetensors", content)
            .encode()
        )
    manifest.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"manifest.json is damaged \(.*to begin anew, or give another folder"
    ):
        run()


@pytest.mark.parametrize(
    "name, changed",
    [
        ("decoding", dict(decoding="free")),
        ("reading", dict(reading="first_token")),
        ("format", dict(fmt="comma")),
        ("hidden", dict(hidden="first")),
        ("attention", dict(attention=False)),
        ("batch_size", dict(batch_size=3)),
        ("seed", dict(seed=1)),
        ("no_cache", dict(no_cache=True)),
        ("shots", dict(demonstrations=[("Fine.", ("odd",))])),
        ("prompts", dict(demonstrations=[("Fine.", ("odd",))])),
        ("items", made_task(prefix="i")),
        ("prompts", made_task(text="That is text")),
        ("texts", made_task(15)),
        ("labels", made_task(labels=["odd", "good", "bad"])),
    ],
)
def test_changed_settings_are_refused_and_named(lm, tmp_path, name, changed):
    ask = dict(ASK, hidden=True, attention=True)
    small = made_task()
    probe_steps(lm, small, folder=tmp_path, **ask)
    task, ask = (small, ask | changed) if isinstance(changed, dict) else (changed, ask)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        SettingsChanged, match=rf"[:;] {name} was .+, now .+to begin anew, or give another folder"
    ):
        probe_steps(lm, task, folder=tmp_path, **ask)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_another_model_machine_or_dtype_is_refused(lm, tiny_folder, tmp_path):
    probe(lm, tmp_path)
    other = load_lm(tiny_folder)
    with torch.no_grad():
        other.model.lm_head.weight[0, 0] += 1
    with pytest.raises(
        SettingsChanged, match="settings: weights was '[0-9a-f]{16}', now '[0-9a-f]{16}'. Delete"
    ):
        probe(other, tmp_path)
    with pytest.raises(SettingsChanged, match="dtype was 'float32', now 'bfloat16'"):
        probe(load_lm(tiny_folder, dtype="bfloat16"), tmp_path)
    torch.set_num_threads(2)
    try:
        with pytest.raises(SettingsChanged, match="settings: threads was 1, now 2. Delete"):
            probe(lm, tmp_path)
    finally:
        torch.set_num_threads(1)


def interrupted(lm, folder, events):
    "Probe; errors are raised in the first pass after so many parts were kept: {parts: error}."
    events = dict(events)

    def interrupt(*_):
        if (error := events.pop(len(list(folder.glob("*.safetensors"))), None)) is not None:
            raise error

    hook = lm.model.get_input_embeddings().register_forward_pre_hook(interrupt)
    try:
        return probe_steps(lm, made_task(), folder=folder, **ASK | {"batch_size": 6})
    finally:
        hook.remove()


def test_a_batch_halved_for_memory_is_halved_again(lm, tmp_path):
    def out_of_memory():
        return RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
        )

    at_once = interrupted(lm, tmp_path / "a", {1: out_of_memory()})
    with pytest.raises(KeyboardInterrupt):
        interrupted(lm, tmp_path / "b", {1: out_of_memory(), 2: KeyboardInterrupt()})
    assert_same_bits(
        probe_steps(lm, made_task(), folder=tmp_path / "b", **ASK | {"batch_size": 6}), at_once
    )
    plans = [
        json.loads((tmp_path / name / "manifest.json").read_text())["batches"] for name in "ab"
    ]
    assert plans[0] == plans[1] and [len(batch["items"]) for batch in plans[0]] == [6, 3, 3, 6, 6]


def hold(folder, begun):
    def work(batch):
        begun.set()
        time.sleep(60)

    in_batches(work, range(4), 2, folder=folder, settings={})


def test_a_second_process_is_told(tmp_path):
    "And when the first one is killed, the folder is free at once."
    begun, run = (
        FORK.Event(),
        lambda: in_batches(lambda batch: batch, range(4), 2, folder=tmp_path, settings={}),
    )
    child = in_child(hold, tmp_path, begun)
    assert begun.wait(30)
    for attempt in (run, lambda: discard_runs(tmp_path)):
        with pytest.raises(
            RuntimeError, match=f"{tmp_path.name} is in use by another process.*another folder"
        ):
            attempt()
    child.kill()
    assert exit_code(child) == -signal.SIGKILL
    assert run() == [0, 1, 2, 3]


def compete(folder, said):
    while True:
        try:
            said.send(
                in_batches(
                    lambda batch: time.sleep(0.01) or batch,
                    range(40),
                    2,
                    folder=folder,
                    settings={},
                )
            )
            return
        except RuntimeError:
            time.sleep(0.003)


def test_many_processes_at_one_folder(tmp_path):
    "All of them insist; one works, some are killed, each ends with the same answers."
    mine, theirs = FORK.Pipe(duplex=False)
    children = [in_child(compete, tmp_path, theirs) for _ in range(6)]
    for child in children[:3]:
        time.sleep(0.06)
        child.kill()
    codes = [exit_code(child) for child in children]
    assert set(codes[3:]) == {0}
    for _ in range(codes.count(0)):
        assert mine.recv() == list(range(40))


def test_every_method_goes_on(base_lm, tmp_path):
    """zero_shot, trees and averages give the same without a folder, with one, and with parts gone.

    A small random model with a real tokenizer, in which the answers begin with different tokens.
    """
    torch.manual_seed(0)
    lm = LM(
        "small",
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=49152,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
            )
        ).eval(),
        base_lm.tokenizer,
    )
    task, ask = made_task(3), dict(shots=0, progress=False)
    names = [
        "max_over_generations",
        "unary_breakdown",
        "binary_breakdown",
        "binary_breakdown_both_orders",
        "marginals_calibrated",
        "marginals_sampled",
        "depth_first",
        "max_over_generations_averaged",
    ]
    plain, folder = zero_shot(lm, task, names, **ask), tmp_path / "scores"
    for attempt in range(2):
        kept = zero_shot(lm, task, names, folder=folder, **ask)
        for name in names:
            pd.testing.assert_frame_equal(kept[name], plain[name], check_exact=True)
            assert kept[name].attrs == plain[name].attrs
        parts = sorted(folder.rglob("*.safetensors"))
        for part in parts if attempt == 0 else []:
            part.unlink()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert len(parts) >= len(names) + 4
            zero_shot(lm, task, names, folder=folder, **ask)
    bounds = [
        inclusion_bounds(lm, task, folder=folder / "bounds" if kept else None, **ask)
        for kept in (False, True, True)
    ]
    for other in bounds[1:]:
        for field in ("low", "high", "estimate", "missing", "looks"):
            assert getattr(other, field).equals(getattr(bounds[0], field))
    with pytest.raises(SettingsChanged, match="tolerance was 0.01, now 0.5"):
        inclusion_bounds(lm, task, folder=folder / "bounds", tolerance=0.5, **ask)
    sampled_marginals(lm, task, folder=folder / "drawn", **ask)
    with pytest.raises(SettingsChanged, match="seed was 0, now 1"):
        sampled_marginals(lm, task, folder=folder / "drawn", sample_seed=1, **ask)
    average_prompts(lm, task, seeds=(0, 1), folder=folder / "mean", **ask)
    assert sorted(path.name for path in (folder / "mean").iterdir()) == ["prompt 0", "prompt 1"]


def test_discarding_leaves_everything_else(tmp_path):
    in_batches(lambda batch: batch, range(4), 2, folder=tmp_path / "runs/a", settings={})
    for name in ("model.safetensors", "notes.txt"):
        (tmp_path / "runs/a" / name).write_text("mine")
    discard_runs(tmp_path / "runs")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "a",
        "model.safetensors",
        "notes.txt",
        "runs",
    ]
    discard_runs(tmp_path / "nowhere")


@pytest.mark.parametrize("done", [0, 20])
def test_no_estimate_before_a_tenth_of_the_work_is_done(done):
    "A tenth of what this call computes: the first texts are the longest, or what was done before."
    with progress_bar(40, done, "asking", True) as bar:
        for computed in range(1, 8):
            advance(bar, 1)
            assert ("<" in str(bar)) == (computed * 10 >= 40 - done)
        assert f"{done + 7}/40" in str(bar)
    with progress_bar(40, done, "asking", False) as silent:
        advance(silent, 1)


def test_each_changed_setting_is_named():
    before = json.loads(json.dumps({"seed": 0, "labels": ("a", "b"), "dtype": "float32"}))
    check_same_settings("there", before, {"dtype": "float32", "seed": 0, "labels": ("a", "b")})
    with pytest.raises(SettingsChanged) as error:
        check_same_settings("there", before, {"seed": 1, "labels": ["a", "b"], "new": 2})
    for named in ("seed was 0, now 1", "new was None, now 2", "dtype was 'float32', now None"):
        assert named in str(error.value)
    assert "labels" not in str(error.value) and "Delete there to begin anew" in str(error.value)


NUMBERS = st.one_of(
    hnp.integer_dtypes(endianness="="),
    hnp.unsigned_integer_dtypes(endianness="="),
    hnp.floating_dtypes(endianness="=", sizes=(16, 32, 64)),
    hnp.boolean_dtypes(),
)
ARRAYS = hnp.arrays(NUMBERS, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
KEYS = st.one_of(st.none(), st.booleans(), st.integers(), st.text(), st.floats(allow_nan=False))
VALUES = st.recursive(
    st.one_of(
        KEYS,
        st.floats(),
        ARRAYS,
        ARRAYS.map(lambda array: array.T),
        ARRAYS.filter(lambda array: array.size).map(lambda array: array.flat[0]),
    ),
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.sets(st.one_of(KEYS, st.tuples(KEYS))),
        st.dictionaries(st.one_of(KEYS, st.tuples(KEYS, KEYS)), inner),
    ),
    max_leaves=12,
)


def same(one, other):
    "The same types and bits all the way down."
    if type(one) is not type(other):
        return False
    if isinstance(one, (np.ndarray, np.generic)):
        return (
            one.dtype == other.dtype
            and one.shape == other.shape
            and one.tobytes() == other.tobytes()
        )
    if isinstance(one, float):
        return repr(one) == repr(other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return same(list(one.items()), list(other.items()))
    return one == other


@settings(max_examples=100, deadline=None)
@given(st.lists(VALUES))
def test_a_part_gives_back_what_was_put_in(tmp_path_factory, answers):
    path = tmp_path_factory.getbasetemp() / "part.safetensors"
    path.write_bytes(part_bytes(answers))
    assert same(read_part(path), answers)


def test_what_a_part_cannot_hold_is_named():
    for value in (
        object(),
        np.array(["text"]),
        np.array([1j]),
        np.array([None]),
        {1: [pd.DataFrame()]},
    ):
        with pytest.raises(TypeError, match="a part cannot hold"):
            part_bytes([value])


def test_a_real_model_goes_on_to_the_same_bits(tuned_lm, tmp_path):
    "On SmolLM2, whose products are large enough for every kernel; interrupted after each batch."
    task, ask = (
        load_task("brighter-eng").sample(6, seed=4),
        dict(shots=0, batch_size=2, progress=False),
    )
    at_once = probe_steps(tuned_lm, task, **ask)
    for parts in (1, 2):

        def interrupt(*_, parts=parts):
            if len(list(tmp_path.glob("*.safetensors"))) == parts:
                raise KeyboardInterrupt

        hook = tuned_lm.model.get_input_embeddings().register_forward_pre_hook(interrupt)
        try:
            probe_steps(tuned_lm, task, folder=tmp_path, **ask)
        except KeyboardInterrupt:
            pass
        finally:
            hook.remove()
    assert_same_bits(probe_steps(tuned_lm, task, folder=tmp_path, **ask), at_once)
