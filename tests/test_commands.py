"""Hostile command lines, files, models and terminals: one line, an exit code, no traceback."""

import ast
import configparser
import gzip
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from mlc_notebooks.report.audit_command import mlc_audit
from mlc_notebooks.report.cli import mlc_align, mlc_fetch, mlc_probe
from mlc_notebooks.report.exits import ISSUES, in_options

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "mlc-probe": mlc_probe,
    "mlc-align": mlc_align,
    "mlc-fetch": mlc_fetch,
    "mlc-audit": mlc_audit,
}
CSV = "text,labels\nI love it,joy\nHow dare you,anger\nboth of them,joy; anger\n"
JSONL = '{"text": "a", "labels": ["joy"]}\n{"text": "b", "labels": ["anger"]}\n'
LONG = "x" * 300
FORTY = ",".join(f"label number {n}" for n in range(40))


# What may be wrong, by kind: (command, its arguments, a word of the message)


def numbers():
    for option in ("--shots", "--n", "--seed"):
        for value in ("-1", "1.5", "many", "", "nan", "0x10", "1" + 400 * "0", "1" + 5000 * "0"):
            yield "mlc-probe", [f"{option}={value}"], option
    for command in ("mlc-align", "mlc-audit"):
        yield command, ["--n", "0"], "--n"
    yield "mlc-align", ["--n", "900000"], "--n"
    yield "mlc-probe", ["--n", "1"], "--n"
    yield "mlc-probe", ["--task", "goemotions", "--shots", "100000"], "--shots"
    yield "mlc-probe", ["--file", "my.csv", "--shots", "4"], "--shots 0"


def choices():
    for option in ("--dtype", "--sample", "--decoding", "--reading", "--format", "--long-text"):
        for value in ("", "nonsense", "int8", 2000 * "x"):
            yield "mlc-probe", [option, value], option


def empty_texts():
    for command in ("mlc-probe", "mlc-align", "mlc-audit"):
        for option in ("--file", "--model", "--out", "--text", "--labels"):
            for value in ("", "  ", "a\0b"):
                yield command, [option, value], option


def long_names():
    for option in ("--file", "--out"):
        yield "mlc-probe", [option, LONG], option
        yield "mlc-align", [option, f"folder/{LONG}.csv"], option
    yield "mlc-probe", ["--file", "bare.csv", "--labels", LONG + ".txt"], "--labels"
    yield "mlc-probe", ["--task", LONG], "xxx"


def tasks():
    for name in ("goemotion", "../x", "a/b", "\x1b[31m", "$$", "goemotions-28", "none"):
        yield "mlc-probe", ["--task", name], "unknown task"
    yield "mlc-probe", ["--task", "goemotions", "goemotions"], "--task names goemotions"
    yield "mlc-probe", ["--task", "goemotions", "--file", "my.csv"], "not both"
    yield "mlc-probe", ["--task", "goemotions", "--labels", "a,b"], "--labels"
    yield "mlc-align", ["--task", "a", "b"], "b"


def labels():
    for given in ("joy,joy", ",", "joy,,anger", "joy,none", "a\nb,c", " ,b", "joy,Joy"):
        yield "mlc-probe", ["--file", "bare.csv", "--labels", given], "label"
    for given in ("labels.txt", "a/b.txt", "nowhere.csv"):
        yield "mlc-probe", ["--file", "bare.csv", "--labels", given], given
    for given in ("empty.txt", "twice.txt", "folder"):
        yield "mlc-probe", ["--file", "bare.csv", "--labels", given], "label"
    yield "mlc-probe", ["--file", "my.csv", "--labels", FORTY], "label number 39"
    yield "mlc-align", ["--file", "bare.csv", "--labels", "a,b"], "nobody annotated"


ENDINGS = ("csv", "tsv", "jsonl", "parquet", "csv.gz", "jsonl.gz", "parquet.gz")


def damaged_files():
    for ending in ENDINGS:
        for damage in ("empty", "noise", "zeros"):
            yield "mlc-probe", ["--file", f"{damage}.{ending}"], f"{damage}.{ending}"
    for ending in ("jsonl", "parquet", "csv.gz", "jsonl.gz", "parquet.gz"):
        yield "mlc-align", ["--file", f"half.{ending}"], f"half.{ending}"
    for name in ("nowhere.csv", "folder.csv", "my.csv/x.csv", "my.docx", "my", "folder"):
        yield "mlc-probe", ["--file", name], name


def odd_tables():
    yield "mlc-probe", ["--file", "my.csv", "--text", "comment"], "comment"
    yield "mlc-probe", ["--file", "no_rows.csv"], "no rows"
    yield "mlc-probe", ["--file", "bare.csv"], "labels"
    yield "mlc-probe", ["--file", "no_text.csv"], "text"
    yield "mlc-align", ["--file", "my.csv", "--sample", "multi", "--n", "3"], "--n"


def folders():
    for out in ("my.csv", "my.csv/x", "/dev/null/x", "/proc/nobody/x"):
        for command in ("mlc-probe", "mlc-align", "mlc-audit"):
            yield command, ["--file", "my.csv", "--out", out], f"--out {out}"


MODEL_DAMAGE = {  # by name: the file of the model folder, and what becomes of it
    "no-config": ("config.json", None),
    "empty-config": ("config.json", b""),
    "list-config": ("config.json", b"[]"),
    "half-config": ("config.json", 0.5),
    "odd-config": ("config.json", b'{"model_type": "nonsense"}'),
    "null-config": ("config.json", b'{"model_type": "llama", "hidden_size": null}'),
    "no-weights": ("model.safetensors", None),
    "empty-weights": ("model.safetensors", b""),
    "half-weights": ("model.safetensors", 0.5),
    "zero-weights": ("model.safetensors", bytes(5000)),
    "noise-weights": ("model.safetensors", bytes(range(256)) * 20),
    "no-tokenizer": ("tokenizer.json", None),
    "empty-tokenizer": ("tokenizer.json", b""),
    "list-tokenizer": ("tokenizer.json", b"[]"),
    "half-tokenizer": ("tokenizer.json", 0.5),
    "odd-tokenizer-config": ("tokenizer_config.json", b"["),
}
ADAPTER = '{"base_model_name_or_path": "/nowhere/at/all", "r": 4, "peft_type": "LORA"}'
ADAPTERS = {
    "adapter-empty": ("", None),
    "adapter-list": ("[]", None),
    "adapter-half": (ADAPTER[:40], b"x"),
    "adapter-no-weights": (ADAPTER, None),
    "adapter-no-base": ('{"r": 4}', b"x"),
    "adapter-lost-base": (ADAPTER, b"x"),
}


def damaged_models():
    for name in [*MODEL_DAMAGE, *ADAPTERS]:
        yield "mlc-probe", ["--file", "my.csv", "--model", name], name
    for name in ("/nowhere/at/all", "./nowhere", "my.csv"):
        yield "mlc-align", ["--file", "my.csv", "--model", name], name


def methods():
    for names in (["nope"], ["hard", "nope"], ["all", "hard"], [""], ["--"]):
        word = "--methods" if names == ["--"] else "method"
        yield "mlc-align", ["--file", "my.csv", "--methods", *names], word


def fetched():
    for name in ("gemma", "../x", "/", LONG, "\x1b[31m", "smollm2-135m-emotions "):
        yield "mlc-fetch", [name], "unknown model"
    for argv in ([""], ["a", "b"], ["--nope"]):
        yield "mlc-fetch", argv, "error"


def strangers():
    for argv in (["--nope"], ["stray"], ["--shots"], ["--task"], ["--file"], ["--bell\a", LONG]):
        yield "mlc-probe", argv, argv[0].rstrip("\a")
    yield "mlc-probe", ["--file", "my.csv", "--chat"], "--chat"


KINDS = (
    numbers, choices, empty_texts, long_names, tasks, labels, damaged_files, odd_tables, folders,
    damaged_models, methods, fetched, strangers,
)  # fmt: skip
CASES = [(kind.__name__, *case) for kind in KINDS for case in kind()]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_folder):
    "A folder with all files and models that the cases name."
    home = tmp_path_factory.mktemp("place")
    (home / "my.csv").write_text(CSV)
    (home / "my").write_text(CSV)
    (home / "my.docx").write_text(CSV)
    (home / "bare.csv").write_text("text\nI love it\nno\n")
    (home / "no_rows.csv").write_text("text,labels\n")
    (home / "no_text.csv").write_text('text,labels\n"",joy\nb,anger\n')
    (home / "empty.txt").write_text("")
    (home / "twice.txt").write_text("joy\njoy\n")
    for name in ("folder", "folder.csv"):
        (home / name).mkdir()
    write_damaged_files(home)
    for name, (file, damage) in MODEL_DAMAGE.items():
        shutil.copytree(tiny_folder, home / name)
        damage_file(home / name / file, damage)
    for name, (config, weights) in ADAPTERS.items():
        (home / name).mkdir()
        (home / name / "adapter_config.json").write_text(config)
        if weights:
            (home / name / "adapter_model.safetensors").write_bytes(weights)
    return home


def write_damaged_files(home: Path):
    pd.DataFrame({"text": ["a"], "labels": ["joy"]}).to_parquet(home / "good.parquet")
    whole = {"csv": CSV.encode(), "tsv": CSV.replace(",", "\t").encode(), "jsonl": JSONL.encode()}
    whole["parquet"] = (home / "good.parquet").read_bytes()
    for ending in ENDINGS:
        content = whole[ending.removesuffix(".gz")]
        content = gzip.compress(content) if ending.endswith(".gz") else content
        damaged = {"half": content[: len(content) // 2], "noise": bytes(range(256)) * 3}
        damaged |= {"empty": b"", "zeros": bytes(1000)}
        for name, part in damaged.items():
            (home / f"{name}.{ending}").write_bytes(part)


def damage_file(path: Path, damage: bytes | float | None):
    "Remove the file, replace its content, or keep a share of it."
    content = path.read_bytes()
    path.unlink()
    if damage is not None:
        part = damage if isinstance(damage, bytes) else content[: int(damage * len(content))]
        path.write_bytes(part)


def ended(capsys, command: str, argv: list[str]) -> tuple[int, list[str]]:
    "The exit code of a command, and its lines that tell of an error."
    code = COMMANDS[command](argv)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return code, [line for line in said.splitlines() if line.startswith(f"{command}: error: ")]


def test_there_are_enough_cases():
    assert len(CASES) >= 120 and len(KINDS) >= 12


@pytest.mark.parametrize(
    "kind, command, argv, word", CASES, ids=[str(n) for n in range(len(CASES))]
)
def test_hostile_input_ends_in_one_line(
    kind, command, argv, word, place, tiny_folder, capsys, monkeypatch
):
    monkeypatch.chdir(place)
    monkeypatch.delenv("MLC_DATA", raising=False)
    usual = [] if command == "mlc-fetch" else ["--model", str(tiny_folder), "--out", "out"]
    code, lines = ended(capsys, command, [*usual, *argv])
    assert code in (1, 2), (kind, argv, lines)
    assert len(lines) == 1 and word in lines[0], lines
    assert len(lines[0]) < 1500 and lines[0].isprintable()
    assert "multi_share" not in lines[0] and "shots=" not in lines[0]


HARMLESS = {
    "numbers": ["--labels", "1,2,3"],
    "forty": ["--labels", FORTY],
    "formulas": ["--labels", r"$$,$\foo$,a_b^c"],
    "scripts": ["--labels", "悲しみ,怒り,गुस्सा,😀"],
    "paths": ["--labels", "../x,<b>,C:\\"],
    "prefixes": ["--labels", "joy,joyful"],
}


@pytest.mark.parametrize("argv", HARMLESS.values(), ids=HARMLESS)
def test_odd_labels_get_a_report(argv, place, tiny_folder, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    out = ["--out", str(tmp_path / "out")]
    asked = ["--file", "bare.csv", "--model", str(tiny_folder)]
    assert ended(capsys, "mlc-probe", [*asked, *out, *argv]) == (0, [])
    assert (tmp_path / "out/report.html").is_file()


@pytest.mark.parametrize(
    "name", ["...csv", "report.html.csv", "batches.csv", "<img src=x>$$.csv", "a" * 240 + ".csv"]
)
def test_a_file_of_any_name_gets_a_report_in_its_folder(name, tiny_folder, capsys, tmp_path):
    (tmp_path / name).write_text(CSV.replace("I love it", '"I paid $5 for lunch and $6, $$ _x^2_"'))
    out = tmp_path / "in/out"
    asked = ["--file", str(tmp_path / name), "--model", str(tiny_folder), "--out", str(out)]
    assert ended(capsys, "mlc-probe", asked) == (0, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "in"])
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["out"]
    assert len(list(out.iterdir())) == 2 and (out / "report.html").is_file()
    assert len(list(out.glob("*/trace.parquet"))) == 1


def test_what_nobody_thought_of_is_written_to_a_file(place, tiny_folder, capsys, tmp_path):
    "Settings of a tokenizer that no library checks."
    odd = tmp_path / "odd"
    shutil.copytree(tiny_folder, odd)
    settings = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**settings, "num_attention_heads": "four"}))
    out = tmp_path / "out"
    asked = ["--file", str(place / "my.csv"), "--model", str(odd), "--out", str(out)]
    code, lines = ended(capsys, "mlc-probe", asked)
    assert code == 1 and str(out / "mlc-probe-error.txt") in lines[0]
    assert "Traceback" in (out / "mlc-probe-error.txt").read_text()


def test_faults_are_reported_where_the_project_is():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    here = settings["DEFAULT"]
    assert f"https://github.com/{here['user']}/{here['repo']}/issues" == ISSUES


# Terminals and disks: whole processes


def process(*argv, **options) -> subprocess.Popen:
    command = [str(Path(sys.executable).parent / argv[0]), *map(str, argv[1:])]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) | options
    return subprocess.Popen(command, **pipes)


def small_files_only():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))


@pytest.mark.slow
def test_a_full_disk_leaves_no_half_report(place, tiny_folder, tmp_path):
    asked = ["--file", place / "my.csv", "--model", tiny_folder, "--out", tmp_path / "out"]
    run = process("mlc-probe", *asked, preexec_fn=small_files_only)
    _, said = run.communicate()
    assert run.returncode == 1 and "Traceback" not in said
    assert "report.html could not be written" in said
    left = [path.name for path in (tmp_path / "out").iterdir()]
    assert "report.html" not in left and not any(name.endswith(".part") for name in left)
    run = process("mlc-probe", *asked)
    run.communicate()
    assert run.returncode == 0 and (tmp_path / "out/report.html").is_file()


@pytest.mark.slow
def test_a_pipe_that_is_closed_is_no_error(place, tiny_folder, tmp_path):
    for argv in (["--help"], ["--file", place / "my.csv", "--model", tiny_folder]):
        run = process("mlc-probe", *argv, "--out", tmp_path / "out")
        run.stdout.close()
        said = run.stderr.read()
        assert run.wait() == 0 and "Traceback" not in said and "Exception" not in said
    assert (tmp_path / "out/report.html").is_file()


@pytest.mark.slow
def test_a_terminal_that_lacks_the_letters(place, tiny_folder, tmp_path):
    (tmp_path / "悲しみ.csv").write_text(CSV)
    asked = ["--file", tmp_path / "悲しみ.csv", "--model", tiny_folder, "--out", tmp_path / "out"]
    run = process("mlc-probe", *asked, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    said, complained = run.communicate()
    assert run.returncode == 0, complained
    assert r"\u60b2" in said and "Report: " in said


def takes_interrupts():
    "A shell starts jobs in the background with interrupts ignored; this process takes them again."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_ctrl_c_ends_in_one_line(tiny_folder, tmp_path):
    rows = "".join(f"text number {n},joy\n" for n in range(20_000))
    (tmp_path / "many.csv").write_text(f"text,labels\n{rows}")
    out = tmp_path / "out"
    asked = ["--file", tmp_path / "many.csv", "--model", tiny_folder, "--out", out]
    run = process("mlc-probe", *asked, preexec_fn=takes_interrupts)
    started = time.time()
    while not (out / "batches").exists() and time.time() - started < 100:
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    said = run.communicate()[1]
    assert run.returncode == 130 and "Traceback" not in said
    assert said.count("mlc-probe: error: interrupted") == 1


# Arguments of functions that no command calls, and of HTML.
PYTHON_ONLY = {"attention", "boxes", "both_orders", "class", "dev", "hidden", "moves", "objects"}
PYTHON_ONLY |= {"n", "seeds", "test_share", "examples", "by", "coverage", "descriptions", "style"}
PYTHON_ONLY |= {"structured", "plain_key_host", "device", "logprobs", "wait", "prior", "pi"}
PYTHON_ONLY |= {"calibration"}
NAMED = re.compile(r"(?<![\w-])([a-z_]+)=(?!=)")


def texts_of(tree):
    "The texts of a module that may be part of a message; {} stands for what is put in."
    docs = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if may_have_doc(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            yield "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if " " in node.value and node.value not in docs:
                yield node.value


def may_have_doc(node):
    return isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))


def test_messages_name_options_and_not_arguments():
    "Each argument that a message names is an option, is said in words, or is no command's."
    unknown = {}
    for path in sorted((ROOT / "mlc_notebooks").glob("*/*.py")):
        if path.stem in ("exits", "__init__"):
            continue
        for text in texts_of(ast.parse(path.read_text(encoding="utf-8"))):
            said = re.sub(r"Python's \w+=['\w]+", "", in_options(text))
            for name in set(NAMED.findall(said)) - PYTHON_ONLY:
                unknown.setdefault(name, []).append((path.stem, text[:90]))
    assert not unknown
    assert in_options("use no_cache=True") == "try --dtype float32, or Python's no_cache=True"
