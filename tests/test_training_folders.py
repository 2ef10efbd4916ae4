"""Training folders: several processes, SIGKILL, damaged files. The weights are the same, or the run
is refused by name.
"""

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time

import pytest
import torch
from test_demux import fit as fit_tiny_demux
from test_demux import made_task as demux_task
from test_demux import tiny as encoder_folder  # noqa: F401
from test_rl import SHORT
from test_rl import made_task as rl_task

from mlc_notebooks.alignment import (
    SFT,
    Demux,
    Example,
    TuningSettings,
    fine_tune,
    fit_rl,
    rl,
)
from mlc_notebooks.models import load_lm

FORK = multiprocessing.get_context("fork")  # a child has the libraries at once
KINDS = ["sft", "demux", "rl"]
WEIGHTS = {
    "sft": "adapter_model.safetensors",
    "demux": "model.safetensors",
    "rl": "adapter_model.safetensors",
}
rng = random.Random(0)
EXAMPLES = [
    Example([rng.randrange(257) for _ in range(n)], [i > 4 for i in range(n)])
    for n in (rng.randrange(8, 16) for _ in range(32))
]
SETTINGS = TuningSettings(r=2, batch_size=4, dev_every=2, learning_rate=1e-2)
EARLY = TuningSettings(r=None, batch_size=4, dev_every=2, learning_rate=0.2, patience=2)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "A forked child cannot use the threads that its parent had started."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def letter_reward():
    "A reward that random bytes earn too: the share of letters."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            rl, "set_reward", lambda answer, *_: sum(map(str.isalpha, answer)) / (len(answer) or 1)
        )
        yield


@pytest.fixture(scope="module")
def train(tiny_folder, request):
    "A training of some steps by its kind, in a folder."
    encoder = request.getfixturevalue("encoder_folder")

    def run(kind, folder, settings=SETTINGS):
        if kind == "sft":
            lm = load_lm(tiny_folder)
            fine_tune(lm, EXAMPLES, EXAMPLES[:4], folder, settings, progress=False)
        elif kind == "demux":
            fit_tiny_demux(encoder, demux_task(), out=folder)
        else:
            fit_rl(rl_task(), load_lm(tiny_folder), folder, **SHORT)

    return run


def bits(folder, kind):
    "A hash of the weights that a run has left."
    return hashlib.sha256((folder / WEIGHTS[kind]).read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    "The weights of a run that nothing happened to, by kind."
    found = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind) / "run"
        train(kind, folder)
        found[kind] = bits(folder, kind)
    return found


def in_child(work, *arguments):
    child = FORK.Process(target=work, args=arguments)
    child.start()
    return child


def compete(train, kind, folder, begin, said):
    "Train once, and say how it ended."
    begin.wait()
    try:
        train(kind, folder)
    except RuntimeError as error:
        said.put(str(error))
    else:
        said.put(bits(folder, kind))


def outcomes(train, kind, folder, count):
    "How each of several processes ended that began at the same time."
    begin, said = FORK.Barrier(count), FORK.SimpleQueue()
    children = [in_child(compete, train, kind, folder, begin, said) for _ in range(count)]
    for child in children:
        child.join(300)
    assert [child.exitcode for child in children] == [0] * count
    return [said.get() for _ in children]


@pytest.mark.parametrize("kind, count", [("sft", 2), ("demux", 5), ("rl", 2)])
def test_processes_at_one_folder_end_with_the_same_weights_or_are_refused(
    train, whole, tmp_path, kind, count
):
    found = outcomes(train, kind, tmp_path / "run", count)
    assert whole[kind] in found
    refused = [outcome for outcome in found if outcome != whole[kind]]
    assert all("in use by another process: wait until" in outcome for outcome in refused)
    assert bits(tmp_path / "run", kind) == whole[kind]
    train(kind, tmp_path / "run")  # it is finished, and loaded
    assert bits(tmp_path / "run", kind) == whole[kind]


def killed_at(train, kind, folder, count):
    "The process kills itself just before its `count`-th operation on a file of the folder."
    left = iter(range(count - 1))

    def watch(event, args):
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            if str(folder) in str(args[0]) and next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    train(kind, folder)


@pytest.mark.filterwarnings("ignore:.*The training goes on from")
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_operations_on_files(train, whole, tmp_path, kind):
    "Each process gets further than the one before; the last one is left alone."
    rng, count, kills = random.Random(kind), 1, 0
    while True:
        child = in_child(killed_at, train, kind, tmp_path / "run", count)
        child.join(120)
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        kills += 1
        count += rng.randrange(3, 25)
    assert kills >= 3
    assert bits(tmp_path / "run", kind) == whole[kind]
    assert not list((tmp_path / "run").glob("**/*.part"))
    assert not (tmp_path / "run" / "checkpoints").exists()


def finished(child):
    "Whether the process came to its end by itself; otherwise it was killed."
    child.join(120)
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode == 0


@pytest.mark.filterwarnings("ignore:.*The training goes on from")
@pytest.mark.parametrize("kind", ["sft", "rl"])
def test_killed_at_any_moment(train, whole, tmp_path, kind):
    "Moments are shares of the time that a whole run takes on this machine."
    start = time.perf_counter()
    assert finished(in_child(train, kind, tmp_path / "timed"))
    seconds = time.perf_counter() - start
    rng = random.Random(kind)
    for share in (0.1, *(rng.random() for _ in range(4))):
        child = in_child(train, kind, tmp_path / "run")
        time.sleep(share * seconds)
        child.kill()
        finished(child)
    assert finished(in_child(train, kind, tmp_path / "run"))
    assert bits(tmp_path / "run", kind) == whole[kind]


class Stop(Exception):
    pass


def stopped_at_the_end(train, kind, folder, settings=SETTINGS):
    "A run that has all its checkpoints, and was stopped before the model was written."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            f"mlc_notebooks.alignment.{'demux' if kind == 'demux' else kind}.written_aside",
            lambda folder: (_ for _ in ()).throw(Stop),
        )
        with pytest.raises(Stop):
            train(kind, folder, settings)
    return sorted((folder / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime)


def delete(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_checkpoint_never_gives_other_weights(train, whole, tmp_path, kind):
    "Each of its files in turn is deleted, cut off or changed by one bit."
    newest = stopped_at_the_end(train, kind, tmp_path / "stopped")[-1]
    names = [path.name for path in newest.iterdir()]
    if kind != "rl":
        assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} < set(names)
    for number, name in enumerate(sorted(names)):
        run = shutil.copytree(tmp_path / "stopped", tmp_path / "run")
        [delete, truncate, flip][number % 3](run / "checkpoints" / newest.name / name)
        with pytest.warns(UserWarning, match=f"{newest.name}: {name} is .*goes on from"):
            train(kind, run)
        assert bits(run, kind) == whole[kind], name
        shutil.rmtree(run)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_whole_checkpoint_the_run_begins_anew(train, whole, tmp_path, kind):
    for checkpoint in stopped_at_the_end(train, kind, tmp_path / "run"):
        (checkpoint / "files.json").write_text("")
    with pytest.warns(UserWarning, match="files.json is damaged"):
        train(kind, tmp_path / "run")
    assert bits(tmp_path / "run", kind) == whole[kind]


def test_a_lost_best_checkpoint(train, tmp_path):
    "With patience the run goes back to the lowest dev loss, whose checkpoint is gone."
    train("sft", tmp_path / "whole", EARLY)
    checkpoints = stopped_at_the_end(train, "sft", tmp_path / "run", EARLY)
    newest = max(checkpoints, key=lambda path: int(path.name.split("-")[1]))
    best = json.loads((newest / "trainer_state.json").read_text())["best_global_step"]
    assert newest.name != f"checkpoint-{best}"
    shutil.rmtree(newest.parent / f"checkpoint-{best}")
    with pytest.warns(UserWarning, match=f"checkpoint-{best}, the one with the lowest dev loss"):
        train("sft", tmp_path / "run", EARLY)
    name = "model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_run_that_is_damaged_says_so(train, tmp_path, kind):
    train(kind, tmp_path / "run")
    for name in sorted(path.name for path in (tmp_path / "run").iterdir()):
        if name in ("run.lock", "settings.json", "files.json"):
            continue
        for damage in (delete, truncate, flip):
            run = shutil.copytree(tmp_path / "run", tmp_path / "copy")
            damage(run / name)
            if (name, damage) != ("log.csv", delete):  # then it is not finished, and done again
                message = f"copy holds a finished run, but {name} is .* or delete .*copy to train"
                with pytest.raises(ValueError, match=message):
                    train(kind, run)
            shutil.rmtree(run)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("content", ["", "[]", '{"seed": 0', None])
def test_broken_settings_are_named(train, tmp_path, kind, content):
    (tmp_path / "checkpoint-2").mkdir()
    message = "settings.json is damaged .*: delete .* to begin anew, or give another folder"
    if content is None:
        message = "holds checkpoint-2, but no settings.json .*: give another folder"
    else:
        (tmp_path / "settings.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        train(kind, tmp_path)


def test_logs_of_older_versions(train, tmp_path):
    "They have no list of files: weights that are gone and a broken log are seen all the same."
    train("sft", tmp_path)
    (tmp_path / "files.json").unlink()
    train("sft", tmp_path)
    (tmp_path / "log.csv").write_text("")
    with pytest.raises(ValueError, match="log.csv is damaged"):
        train("sft", tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="its weights are missing"):
        train("sft", tmp_path)


def test_loading_looks_at_the_files(train, tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished run"):
        SFT.load(tmp_path)
    for kind, load in (("sft", SFT.load), ("demux", Demux.load)):
        train(kind, tmp_path / kind)
        flip(tmp_path / kind / WEIGHTS[kind])
        with pytest.raises(ValueError, match=f"{WEIGHTS[kind]} is not as it was written"):
            load(tmp_path / kind)


def test_other_settings_are_welcome_while_there_is_nothing_to_mix(train, whole, tmp_path):
    "The first learning rate was too high: the same folder takes a lower one."
    with pytest.raises(FloatingPointError, match=r"step \d+: lower the learning rate"):
        train("sft", tmp_path, TuningSettings(r=None, learning_rate=1e30, batch_size=4))
    train("sft", tmp_path)
    assert bits(tmp_path, "sft") == whole["sft"]
