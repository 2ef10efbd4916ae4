"""Inputs that cannot be right are refused, in one sentence that names them, before any work.

A table per kind: arguments, settings and plans of runs, manifests, parts, folders, saved traces,
models that compute NaN, searches in the output tree, and questions.
"""

import io
import json
import pickle
import re
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from mlc_notebooks.alignment import (
    Branch,
    ask_questions,
    best_first,
    inclusion_bounds,
    marginals_calibrated,
    sample_outputs,
    sampled_marginals,
)
from mlc_notebooks.data import AnnotatedTexts, LabelSet, Template, list_prompts, unannotated
from mlc_notebooks.engine import (
    Node,
    NonFiniteOutput,
    PackedTree,
    PlainTree,
    SettingsChanged,
    discard_runs,
    first_non_finite,
    in_batches,
    open_run,
    part_bytes,
    prompt_tree,
    read_part,
)
from mlc_notebooks.models import load_lm
from mlc_notebooks.probing import Trace, attention_shares, probe_steps

LABELS = LabelSet(["good", "bad", "odd"], "else")
TEXTS = ["This is text 0", "This is text 1!", "This is text 2!!"]
BARE = Template("", "{text}", "")  # so that yes and no begin with different bytes
NAN, INFINITE = float("nan"), float("inf")
LIST = ["a list"]
ARRAY = np.arange(3)


def short(one):
    "A case's name: short, and the same in every process."
    if isinstance(one, set):
        one = sorted(one)
    return re.sub(r" at 0x[0-9a-f]+", "", str(one))[:40]


@pytest.fixture(scope="module")
def lm(tiny_folder):
    return load_lm(tiny_folder)


@pytest.fixture(scope="module")
def task():
    pool = AnnotatedTexts(
        "made",
        list("pqrs"),
        [f"Shown {i}" for i in range(4)],
        LABELS,
        [np.eye(3, dtype=int)[[0]]] * 4,
    )
    return unannotated(TEXTS, LABELS, name="made", splits={"train": pool})


@contextmanager
def refused(error, says, model=None):
    "Exactly this error is raised, with this in its one line; the model is not run."
    passes = []
    hook = model and model.model.register_forward_hook(lambda *_: passes.append(1))
    try:
        with pytest.raises(error) as caught:
            yield
    finally:
        if hook:
            hook.remove()
    message = str(caught.value)
    assert type(caught.value) is error, repr(caught.value)
    assert says in message and len(message) < 900 and not passes, message


PROBING = [
    (dict(shots=-1), ValueError, "shots is -1"),
    (dict(shots=2.0), ValueError, "shots is 2.0"),
    (dict(shots=True), ValueError, "shots is True"),
    (dict(shots="2"), ValueError, "shots is '2'"),
    (dict(shots=None), ValueError, "shots is None"),
    (dict(shots=5, multi_share=None), ValueError, "5"),
    (dict(seed=-1), ValueError, "seed is -1"),
    (dict(seed=0.5), ValueError, "seed is 0.5"),
    (dict(seed=None), ValueError, "seed is None"),
    (dict(multi_share=-0.1), ValueError, "multi_share is -0.1"),
    (dict(multi_share=50), ValueError, "multi_share is 50"),
    (dict(multi_share=NAN), ValueError, "multi_share is nan"),
    (dict(multi_share="half"), ValueError, "multi_share is 'half'"),
    (dict(batch_size=0), ValueError, "batch_size is 0"),
    (dict(batch_size=-4), ValueError, "batch_size is -4"),
    (dict(batch_size=2.5), ValueError, "batch_size is 2.5"),
    (dict(batch_size="all"), ValueError, "batch_size is 'all'"),
    (dict(decoding="beam"), ValueError, "decoding is 'beam'"),
    (dict(decoding=None), ValueError, "decoding is None"),
    (dict(decoding=LIST), ValueError, "decoding is ['a list']"),
    (dict(reading="Exact"), ValueError, "reading is 'Exact'"),
    (dict(reading=ARRAY), ValueError, "reading is array([0, 1, 2])"),
    (dict(collisions="ignore"), ValueError, "collisions is 'ignore'"),
    (dict(long_text="cut"), ValueError, "long_text is 'cut'"),
    (dict(hidden="last"), ValueError, "hidden is 'last'"),
    (dict(hidden=2), ValueError, "hidden is 2"),
    (dict(hidden=ARRAY), ValueError, "hidden is array([0, 1, 2])"),
    (dict(attention="first"), ValueError, "attention is 'first'"),
    (dict(no_cache="yes"), ValueError, "no_cache is 'yes'"),
    (dict(chat="yes"), ValueError, "chat is 'yes'"),
    (dict(fmt="yaml"), ValueError, "'yaml'"),
    (dict(fmt=LIST), TypeError, "fmt is ['a list'], a list"),
    (dict(fmt=None), TypeError, "fmt is None"),
    (dict(template="Text: {text}"), TypeError, "template is 'Text: {text}', a str"),
    (dict(folder=""), ValueError, "folder is ''"),
    (dict(folder=7), ValueError, "folder is 7"),
]


@pytest.mark.parametrize("changed, error, says", PROBING, ids=short)
def test_arguments_of_probing(lm, task, changed, error, says):
    with refused(error, says, lm):
        probe_steps(lm, task, **dict(shots=2, multi_share=None, progress=False) | changed)


TABLE = pd.DataFrame({"text": TEXTS})
ASKED = [
    (TABLE, ["joy"], TypeError, "texts is a table"),
    (dict(enumerate(TEXTS)), ["joy"], TypeError, "texts is a dict"),
    (set(TEXTS), ["joy"], TypeError, "texts is a set"),
    (TEXTS[0], ["joy"], TypeError, "texts is one string"),
    (TEXTS[0].encode(), ["joy"], TypeError, "texts is one string"),
    (3, ["joy"], TypeError, "texts is 3"),
    (None, ["joy"], TypeError, "texts is None"),
    ([*TEXTS, NAN], ["joy"], ValueError, "item '3' is nan"),
    ([*TEXTS, None], ["joy"], ValueError, "item '3' is None"),
    ([b"bytes"], ["joy"], ValueError, "item '0' is b'bytes'"),
    ([TEXTS], ["joy"], ValueError, "item '0' is ['This is text 0'"),
    ([], ["joy"], ValueError, "no texts"),
    (["fine", "\n "], ["joy"], ValueError, "'1' is empty"),
    (["fine", "half \ud800"], ["joy"], ValueError, "item '1'"),
    (TEXTS, None, ValueError, "labels="),
    (TEXTS, [], ValueError, "at least one label"),
    (TEXTS, "joy", TypeError, "'joy'"),
    (TEXTS, ["joy", "Joy"], ValueError, "'Joy'"),
    (TEXTS, ["joy", 3], TypeError, "3"),
    (["word " * 900], ["joy"], ValueError, "item '0'"),
]


@pytest.mark.parametrize("texts, labels, error, says", ASKED, ids=short)
def test_texts_and_labels_of_probing(lm, texts, labels, error, says):
    with refused(error, says, lm):
        probe_steps(lm, texts, shots=0, labels=labels, progress=False)


def test_a_tokenizer_of_another_model(tiny_folder, task):
    lm = load_lm(tiny_folder)
    lm.model.resize_token_embeddings(100)
    with refused(ValueError, "but the model has tokens 0 to 99: they do not belong together", lm):
        probe_steps(lm, task, shots=0, progress=False)


def test_a_name_is_no_model(task):
    with refused(TypeError, "lm is 'smollm2-135m', a str"):
        probe_steps("smollm2-135m", task, shots=0, progress=False)
    with refused(TypeError, "task is ['This is text 0'"):
        inclusion_bounds("smollm2-135m", TEXTS, shots=0)


def keep(folder, plan=((0, 1), (2,)), settings=None):
    positions = [position for batch in plan for position in batch]
    return in_batches(lambda batch: batch, positions, 2, folder=folder, settings=settings)


BATCHES = [
    (dict(size=0), "size is 0"),
    (dict(size=-1), "size is -1"),
    (dict(size=1.5), "size is 1.5"),
    (dict(size=None), "size is None"),
    (dict(positions=[0, 2]), "the plan [[0, 2]] is none"),
    (dict(positions=[0, 0]), "the plan [[0, 0]] is none"),
    (dict(positions=[1, 2]), "the plan [[1, 2]] is none"),
    (dict(positions=[0.0, 1.0]), "the plan [[0.0, 1.0]] is none"),
    (dict(positions=["a", "b"]), "the plan [['a', 'b']] is none"),
    (dict(work=lambda batch: batch[1:]), "2 answers for a batch of 3"),
    (dict(work=lambda batch: [*batch, 7]), "4 answers for a batch of 3"),
    (dict(folder=""), "folder is ''"),
    (dict(folder=3.5), "folder is 3.5"),
]


@pytest.mark.parametrize("changed, says", BATCHES, ids=short)
@pytest.mark.parametrize("on_disk", [False, True])
def test_arguments_of_a_run(tmp_path, changed, says, on_disk):
    given = dict(work=lambda batch: batch, positions=range(3), size=4, settings={})
    with refused(ValueError, says):
        in_batches(**given | dict(folder=tmp_path if on_disk else None) | changed)
    assert not list(tmp_path.glob("*.safetensors"))


SETTINGS = [
    ({"tolerance": NAN}, "the setting tolerance is nan"),
    ({"tolerance": [0.5, INFINITE]}, "the setting tolerance is [0.5, inf]"),
    ({"seed": np.int64(3)}, "the setting seed is np.int64(3)"),
    ({"prior": ARRAY}, "the setting prior is array([0, 1, 2])"),
    ({"fmt": object}, "the setting fmt is <class 'object'>"),
    ({"shown": {1, 2}}, "the setting shown is {1, 2}"),
]


@pytest.mark.parametrize("settings, says", SETTINGS, ids=short)
def test_settings_that_json_cannot_hold(tmp_path, settings, says):
    with refused(ValueError, says):
        keep(tmp_path, settings=settings)


def test_an_opened_run_needs_a_plan(tmp_path):
    for plan in ([[0], []], [[0], [0]], [[1]]):
        with refused(ValueError, f"the plan {plan} is none"):
            with open_run(tmp_path, plan, {}):
                pass
    with refused(TypeError, "settings is ['a list']"):
        with open_run(tmp_path, [[0]], LIST):
            pass
    assert not (tmp_path / "manifest.json").exists()


def batch(items, part="0000000.safetensors", **more):
    return {"items": items, "part": part, **more}


MANIFESTS = {
    "empty": b"",
    "cut": b'{"settings": {}, "batches": [{"items": [0, 1',
    "zeros": bytes(200),
    "binary": b"\xff\xfe\x00\x80",
    "a list": b"[]",
    "null": b"null",
    "a number": b"3",
    "no settings": json.dumps({"batches": []}),
    "settings that are a list": json.dumps({"settings": [["a", 1]], "batches": []}),
    "no batches": json.dumps({"settings": {}}),
    "batches that are an object": json.dumps({"settings": {}, "batches": {"0": []}}),
    "a batch that is a list": json.dumps({"settings": {}, "batches": [[0, 1, 2]]}),
    "a batch without positions": json.dumps({"settings": {}, "batches": [{"part": "x"}]}),
    "positions that are text": json.dumps({"settings": {}, "batches": [batch("012")]}),
    "positions that are floats": json.dumps({"settings": {}, "batches": [batch([0.0, 1, 2])]}),
    "positions that are true": json.dumps({"settings": {}, "batches": [batch([0, True, 2])]}),
    "a position twice": json.dumps({"settings": {}, "batches": [batch([0, 1, 1])]}),
    "a position left out": json.dumps({"settings": {}, "batches": [batch([0, 2])]}),
    "an empty batch": json.dumps({"settings": {}, "batches": [batch([]), batch([0, 1, 2])]}),
    "a part elsewhere": json.dumps({"settings": {}, "batches": [batch([0, 1, 2], "../x")]}),
    "no part": json.dumps({"settings": {}, "batches": [{"items": [0, 1, 2]}]}),
    "nested without end": b"[" * 100_000,
}


@pytest.mark.parametrize("content", MANIFESTS.values(), ids=MANIFESTS.keys())
def test_manifests_that_are_none(tmp_path, content):
    "They are named, and everything in the folder stays as it was, also when runs are discarded."
    keep(tmp_path)
    manifest = tmp_path / "manifest.json"
    manifest.write_bytes(content.encode() if isinstance(content, str) else content)
    (tmp_path / "0000000.safetensors.part").write_text("half")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for attempt in (lambda: keep(tmp_path), lambda: discard_runs(tmp_path)):
        with refused(ValueError, f"{manifest} is damaged ("):
            attempt()
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_manifest_of_another_run(tmp_path):
    "NaN that somebody wrote into the settings, and a plan of other texts."
    keep(tmp_path, settings={"tolerance": 0.5})
    manifest = tmp_path / "manifest.json"
    whole = manifest.read_text()
    manifest.write_text(whole.replace("0.5", "NaN"))
    with refused(SettingsChanged, "tolerance was nan, now 0.5"):
        keep(tmp_path, settings={"tolerance": 0.5})
    manifest.write_text(whole)
    with refused(SettingsChanged, "holds a run of 3 texts, now there are 4"):
        keep(tmp_path, plan=((0, 1), (2, 3)), settings={"tolerance": 0.5})


def test_a_manifest_or_a_run_that_is_no_file(tmp_path):
    (tmp_path / "run/manifest.json").mkdir(parents=True)
    with refused(ValueError, "run/manifest.json is damaged"):
        keep(tmp_path / "run")
    (tmp_path / "note").write_text("mine")
    with refused(NotADirectoryError, "note is a file: give a folder"):
        keep(tmp_path / "note")


def safetensors_with(header: dict, data=b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def answers_of(structure) -> bytes:
    return safetensors_with({"__metadata__": {"answers": structure}})


class Harm:
    "What a pickle could do."

    def __reduce__(self):
        return Path.write_text, (Path("harm.txt"), "done")


def zipped() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("arr_0.npy", "x")
    return content.getvalue()


PARTS = {
    "empty": b"",
    "cut": part_bytes([1, "two", np.arange(4)])[:-3],
    "a pickle": pickle.dumps(Harm()),
    "a zip": zipped(),
    "text": b"joy\n" * 50,
    "an endless header": (2**40).to_bytes(8, "little") + b"{}",
    "no metadata": safetensors_with({}),
    "other metadata": safetensors_with({"__metadata__": {"format": "pt"}}),
    "answers that are no JSON": answers_of("{"),
    "answers that are no list": answers_of('{"tuple": [1]}'),
    "an array that is not there": answers_of('[{"array": "0"}]'),
    "an unknown kind": answers_of('[{"eval": "1 + 1"}]'),
    "two kinds": answers_of('[{"tuple": [], "set": []}]'),
    "a set of lists": answers_of('[{"set": [[1], [2]]}]'),
    "a dict of one": answers_of('[{"dict": [[1]]}]'),
    "a number that is a list": answers_of('[{"number": []}]'),
    "nested without end": answers_of('[{"tuple": ' * 20_000),
}


@pytest.mark.parametrize("content", PARTS.values(), ids=PARTS.keys())
def test_parts_that_are_none(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0000000.safetensors").write_bytes(content)
    with refused(ValueError, "0000000.safetensors is damaged, or no part of a run ("):
        read_part(tmp_path / "0000000.safetensors")
    assert not (tmp_path / "harm.txt").exists()


def test_a_part_of_other_texts_is_refused(tmp_path):
    "With the right hash in the manifest, as a hand could write it."
    keep(tmp_path)
    content = part_bytes([0, 1, 2, 3, 4])
    (tmp_path / "0000000.safetensors").write_bytes(content)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["batches"][0]["sha256"] = __import__("hashlib").sha256(content).hexdigest()
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with refused(ValueError, "5 answers for a batch of 2"):
        keep(tmp_path)


STRANGERS = [
    "notes.part",
    "movie.mp4.part",
    "0000007.safetensors.part",  # no part of this plan
    "0000007.safetensors",
    "2024-model.safetensors",
    "settings.json.part",
]


def test_strangers_files_are_left_alone(tmp_path):
    "By a run that begins, goes on and is discarded, while its own halves go."
    run = tmp_path / "run"
    run.mkdir()
    for name in STRANGERS:
        (run / name).write_text("mine")
    (run / "empty").mkdir()
    keep(run)
    for name in ("manifest.json.part", "0000000.safetensors.part", "0000002.safetensors.part"):
        (run / name).write_text("half")
    assert keep(run) == [0, 1, 2]
    written = {"manifest.json", "run.lock", "0000000.safetensors", "0000002.safetensors"}
    assert {path.name for path in run.iterdir()} == {*STRANGERS, *written, "empty"}
    discard_runs(tmp_path)
    assert {path.name for path in run.iterdir()} == {*STRANGERS, "empty"}
    assert all((run / name).read_text() == "mine" for name in STRANGERS)


@pytest.fixture(scope="module")
def trace(lm, task):
    ask = dict(shots=0, decoding="guided", hidden=True, attention=True, progress=False)
    return probe_steps(lm, task, **ask)


def rewrite(name, change):
    "Harm: a saved table is changed by hand."

    def harm(folder):
        table = pd.read_parquet(folder / name)
        change(table).to_parquet(folder / name)

    return harm


def overwrite(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(name):
    def harm(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return harm


def header(change):
    def harm(folder):
        found = json.loads((folder / "trace.json").read_text())
        change(found)
        (folder / "trace.json").write_text(json.dumps(found))

    return harm


def array(name, change):
    def harm(folder):
        changed = np.asarray(change(np.load(folder / name)))
        np.save(folder / name, changed, allow_pickle=True)

    return harm


def with_value(column, value):
    def change(table):
        values = table[column].tolist()
        values[1] = value
        return table.assign(**{column: values})

    return change


TRACES = [
    ("trace.json", cut("trace.json")),
    ("trace.json", overwrite("trace.json", b"")),
    ("trace.json", overwrite("trace.json", b"[]")),
    ("trace.json", overwrite("trace.json", b"\xff\xfe")),
    ("trace.json", overwrite("trace.json", b"[" * 100_000)),
    ("trace.json", header(lambda found: found.pop("labels"))),
    ("trace.json", header(lambda found: found.update(labels=3))),
    ("trace.json", header(lambda found: found.update(labels=[1, 2]))),
    ("trace.json", header(lambda found: found.update(labels=["good", "Good"]))),
    ("trace.json", header(lambda found: found.update(settings=[1]))),
    ("trace.json", header(lambda found: found.update(settings={"tolerance": NAN}))),
    ("trace.parquet", header(lambda found: found.update(labels=["good", "bad"]))),
    ("trace.parquet", header(lambda found: found.update(labels=["bad", "good", "odd"]))),
    ("trace.parquet", cut("trace.parquet")),
    ("trace.parquet", overwrite("trace.parquet", b"")),
    ("trace.parquet", overwrite("trace.parquet", b"example,step\n1,2\n")),
    ("trace.parquet", overwrite("trace.parquet", pickle.dumps(Harm()))),
    ("trace.parquet", rewrite("trace.parquet", lambda table: table.drop(columns="mass"))),
    ("trace.parquet", rewrite("trace.parquet", lambda table: table[1:])),
    ("trace.parquet", rewrite("trace.parquet", lambda table: table[4:])),
    ("trace.parquet", rewrite("trace.parquet", lambda table: table[:0])),
    ("trace.parquet", rewrite("trace.parquet", lambda table: table.sort_values("logprob"))),
    ("trace.parquet", rewrite("trace.parquet", with_value("logprob", NAN))),
    ("trace.parquet", rewrite("trace.parquet", with_value("logprob", INFINITE))),
    ("trace.parquet", rewrite("trace.parquet", lambda table: table.astype({"logprob": str}))),
    ("trace.parquet", rewrite("trace.parquet", lambda table: table.assign(mass=NAN))),
    ("trace.parquet", rewrite("trace.parquet", lambda table: table.assign(step="one"))),
    ("trace.parquet", rewrite("trace.parquet", lambda table: table.assign(step=1))),
    ("trace.parquet", rewrite("trace.parquet", lambda table: table.assign(flags=3))),
    ("trace.parquet", rewrite("items.parquet", lambda table: table[::-1])),
    ("items.parquet", cut("items.parquet")),
    ("items.parquet", overwrite("items.parquet", zipped())),
    ("items.parquet", rewrite("items.parquet", lambda table: table.drop(columns="flags"))),
    ("items.parquet", rewrite("items.parquet", lambda table: table.assign(outcomes=3))),
    ("items.parquet", rewrite("items.parquet", lambda table: pd.concat([table, table]))),
    ("hidden.npy", cut("hidden.npy")),
    ("hidden.npy", overwrite("hidden.npy", b"")),
    ("hidden.npy", overwrite("hidden.npy", zipped())),
    ("hidden.npy", overwrite("hidden.npy", pickle.dumps(Harm()))),
    ("hidden.npy", array("hidden.npy", lambda states: states[1:])),
    ("hidden.npy", array("hidden.npy", lambda states: states[:, 0])),
    ("hidden.npy", array("hidden.npy", lambda states: states.astype(str))),
    ("hidden.npy", array("hidden.npy", lambda states: states.astype(object))),
    ("attention.npy", array("attention.npy", lambda shares: shares[:, :, :2])),
    ("attention.npy", array("attention.npy", lambda shares: shares * NAN)),
]


@pytest.mark.parametrize("number", range(len(TRACES)))
def test_saved_traces_that_are_none(trace, tmp_path, monkeypatch, number):
    monkeypatch.chdir(tmp_path)
    named, harm = TRACES[number]
    folder = trace.save(tmp_path / "trace")
    harm(folder)
    with refused(ValueError, f"{folder / named} is damaged, or no file of a saved trace ("):
        Trace.load(folder)
    assert not (tmp_path / "harm.txt").exists()


@pytest.mark.parametrize("gone", ["trace.json", "trace.parquet", "items.parquet"])
def test_a_trace_without_one_of_its_files(trace, tmp_path, gone):
    folder = trace.save(tmp_path / "trace")
    (folder / gone).unlink()
    with refused(FileNotFoundError, gone):
        Trace.load(folder)


def test_states_that_a_trace_does_not_have(trace, tmp_path):
    for layer in (-1, 3, 1.5, "1", None):
        with refused(ValueError, f"no layer {layer}"):
            trace.states(layer)
    for step in (0, -1, 1.0, "1", None):
        with refused(ValueError, f"step is {step!r}"):
            trace.states(1, step)
    folder = trace.save(tmp_path)
    array("hidden.npy", lambda states: np.where(states == states[0, 1, 0], NAN, states))(folder)
    with refused(ValueError, "hidden states of layer 1 at step 1 hold NaN"):
        Trace.load(folder).states(1)
    bare = Trace(trace.labels, trace.items, trace.steps, trace.logprobs, {})
    for read in (lambda: bare.states(1), lambda: attention_shares(bare)):
        with refused(ValueError, "this trace keeps no"):
            read()
    assert repr(bare).startswith("Trace of 3 texts")


def test_saving_that_is_stopped_leaves_no_half_trace(trace, tmp_path, monkeypatch):
    "An array that cannot be written: the old tables are not found with new ones beside them."
    folder = trace.save(tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with refused(OSError, "hidden.npy could not be written (No space left on device)"):
        trace.save(folder)
    assert not list(folder.glob("*.part"))
    with refused(FileNotFoundError, "holds no trace"):
        Trace.load(folder)
    monkeypatch.undo()
    assert len(Trace.load(trace.save(folder))) == 3


def scaled(model, factor):
    "Each number of the first layer's outputs grows so much."
    model.model.layers[0].mlp.down_proj.weight.mul_(factor)


DAMAGE = {
    "a NaN weight": (
        "float32",
        lambda model: model.model.layers[1].mlp.up_proj.weight[3, 5].fill_(NAN),
        "model.layers.1.mlp.up_proj (float32). Weights that are not finite: 1.",
    ),
    "an infinite weight": (
        "float32",
        lambda model: model.model.layers[0].self_attn.o_proj.weight[0].fill_(INFINITE),
        "model.layers.0.self_attn.o_proj (float32). Weights that are not finite: 32.",
    ),
    "a NaN norm": (
        "bfloat16",
        lambda model: model.model.norm.weight.fill_(NAN),
        "model.norm (bfloat16). Weights that are not finite: 32.",
    ),
    "NaN in all weights": (
        "float32",
        lambda model: [weight.fill_(NAN) for weight in model.parameters()],
        "model.embed_tokens (float32)",
    ),
    "one NaN in the head": (
        "float32",
        lambda model: model.lm_head.weight[200, 0].fill_(NAN),
        "lm_head (float32). Weights that are not finite: 1.",
    ),
    "an overflow in float16": (
        "float16",
        lambda model: scaled(model, 1e4) or scaled(model, 1e4),
        "(float16). float16 holds no number above 65,504: load the model with dtype='bfloat16'",
    ),
    "an overflow in float32": (
        "float32",
        lambda model: [model.lm_head.weight.mul_(1e37), model.model.norm.weight.mul_(1e3)],
        "lm_head (float32). Its weights are finite, but too large for float32",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.parametrize("way", ["packed", "plain", "guided", "hidden", "tree", "questions"])
def test_models_that_compute_nan(tiny_folder, task, case, way):
    "Refused by every kind of pass, and the first layer that does it is named."
    dtype, damage, says = DAMAGE[case]
    lm = load_lm(tiny_folder, dtype=dtype)
    with torch.no_grad():
        damage(lm.model)
    ask = dict(shots=0, progress=False)
    asked = [list_prompts([text], LABELS, template=BARE) for text in TEXTS]
    ways = {
        "packed": lambda: PackedTree(lm, lm.encode_text(TEXTS[0]), shared_prefix=False),
        "plain": lambda: probe_steps(lm, task, no_cache=True, **ask),
        "guided": lambda: probe_steps(lm, task, decoding="guided", **ask),
        "hidden": lambda: probe_steps(lm, task, hidden="first", attention=True, **ask),
        "tree": lambda: inclusion_bounds(lm, task, **ask),
        "questions": lambda: ask_questions(lm, asked, ("yes", "no"), progress=False),
    }
    with refused(NonFiniteOutput, says):
        ways[way]()


def test_impossible_tokens_are_fine(tiny_folder, task):
    "A model that never writes some tokens gives them a log-probability of minus infinity."
    lm = load_lm(tiny_folder)
    never = torch.zeros(lm.model.config.vocab_size, dtype=bool)
    never[[4, 5, 6, 256]] = True  # no character of an answer

    def forbid(module, inputs, logits):
        return logits.masked_fill(never, -INFINITE)

    hook = lm.model.lm_head.register_forward_hook(forbid)
    trace = probe_steps(lm, task, shots=0, decoding="guided", progress=False)
    assert np.isfinite(trace.logprobs).all()
    for tree in (prompt_tree(lm, [5, 6]), PlainTree(lm, [5, 6])):
        found = tree.compute([Node(tree.root, [7])], [4, 8])
        assert found.logprobs[0, 0] == -INFINITE and np.isfinite(found.logprobs[0, 1])
        assert np.isfinite(found.margin).all()

    never[2] = True  # the quote that ends a label
    with refused(
        ValueError, "at label 1 the model gives every label, and none, a probability of 0"
    ):
        probe_steps(lm, task, shots=0, decoding="guided", progress=False)

    hook.remove()
    only = torch.ones_like(never).index_fill(0, torch.tensor([9]), False)
    lm.model.lm_head.register_forward_hook(lambda *call: call[2].masked_fill(only, -INFINITE))
    found = PlainTree(lm, [5]).compute([Node(None, [7])], [9])
    assert (found.logprobs.item(), found.best.item(), found.margin.item()) == (0, 9, INFINITE)
    assert first_non_finite(lm, [5]) is None  # hooks of modules see what they return themselves


FOLLOWING = [0.0, 0.0, 0.0, 0.0]
SEARCH = [
    (dict(tolerance=-0.1), "tolerance is -0.1"),
    (dict(tolerance=NAN), "tolerance is nan"),
    (dict(tolerance="small"), "tolerance is 'small'"),
    (dict(tolerance=2), "tolerance is 2"),
    (dict(most_looks=0), "most_looks is 0"),
    (dict(most_looks=6.4), "most_looks is 6.4"),
    (dict(cutoff=-1), "cutoff is -1"),
    (dict(cutoff=NAN), "cutoff is nan"),
    (dict(cutoff=None), "cutoff is None"),
]


def expand(wanted):
    return [Branch.read(FOLLOWING, [0.5] * 3, prefix) for _, prefix in wanted]


@pytest.mark.parametrize("changed, says", SEARCH, ids=short)
def test_limits_of_a_search(lm, task, changed, says):
    with refused(ValueError, says):
        best_first(expand, 1, 3, **changed)
    with refused(ValueError, says, lm):
        inclusion_bounds(lm, task, shots=0, progress=False, **changed)


def test_a_search_at_no_prefix_at_once():
    with refused(ValueError, "at_once is 0"):
        best_first(expand, 1, 3, at_once=0)


PRIORS = [
    ([0.25] * 4, "prior has shape (4,)"),
    (np.full((2, 3), 0.3), "prior has shape (2, 3): give probabilities (steps, 4)"),
    (np.zeros((0, 4)), "prior has shape (0, 4)"),
    (np.full((1, 4), "x"), "prior has shape (1, 4)"),
    (np.array([[0.5, 0.5, 0, 0]]), "prior is divided out"),
    (np.array([[0.5, 0.5, NAN, 0.1]]), "prior is divided out"),
    (np.array([[0.5, 0.5, -0.1, 0.1]]), "prior is divided out"),
]


@pytest.mark.parametrize("prior, says", PRIORS, ids=short)
def test_priors_that_are_none(lm, task, prior, says):
    for method in (inclusion_bounds, sampled_marginals, marginals_calibrated):
        with refused(ValueError, says, lm):
            method(lm, task, shots=0, prior=prior, progress=False)


DRAWS = [
    (dict(samples=0), "samples is 0"),
    (dict(samples=2.0), "samples is 2.0"),
    (dict(samples=None), "samples is None"),
    (dict(sample_seed=-1), "seed is -1"),
    (dict(sample_seed="x"), "seed is 'x'"),
    (dict(rao_blackwell="no"), "rao_blackwell is 'no'"),
    (dict(shots=-2), "shots is -2"),
    (dict(multi_share=7), "multi_share is 7"),
    (dict(folder=""), "folder is ''"),
]


@pytest.mark.parametrize("changed, says", DRAWS, ids=short)
def test_arguments_of_sampling(lm, task, changed, says):
    with refused(ValueError, says, lm):
        sampled_marginals(lm, task, **dict(shots=0, progress=False) | changed)


def test_outcomes_without_a_probability(lm):
    for logprobs in ([NAN] * 4, [-INFINITE] * 4, [INFINITE, 0, 0, 0]):
        with refused(ValueError, "after the labels () no outcome is possible"):
            Branch.read(logprobs, [0.5] * 3, ())
    with refused(ValueError, "after the labels (0, 1) no outcome is possible"):
        Branch.read([0, 0, -INFINITE, 0], [0.5] * 3, (0, 1))
    with refused(ValueError, "after the labels (2, 1) the list neither goes on nor stops"):
        Branch.read([0.0] * 5, [0.5, NAN, 0.5, 0.5], (2,))
    written = Branch.read([0.0] * 5, [NAN, 0.5, 0.5, 0.5], (0,))  # it cannot follow again
    assert np.isfinite(written.following).all()
    for samples in (0, -1, 1.0):
        with refused(ValueError, f"samples is {samples}"):
            sample_outputs(expand, 1, 3, samples=samples)
    single = unannotated(TEXTS, LabelSet(["good", "bad"], None))
    with refused(ValueError, "single-label task", lm):
        inclusion_bounds(lm, single, shots=0, progress=False)


def test_questions_in_no_folder(lm):
    asked = [list_prompts([text], LABELS, template=BARE) for text in TEXTS]
    for folder, says in (("", "folder is ''"), (5, "folder is 5")):
        with refused(ValueError, says):
            ask_questions(lm, asked, ("yes", "no"), progress=False, folder=folder)
    with refused(ValueError, "begin with the same token", lm):
        ask_questions(lm, asked, ("yes", "yellow"), progress=False)
