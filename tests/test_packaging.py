"""One source of truth: what stands in two files is the same, and a wheel carries what the library
needs.
"""

import ast
import re
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

from packaging.requirements import Requirement

import mlc_notebooks

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONFIG = ConfigParser(delimiters=["="])
CONFIG.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = CONFIG["DEFAULT"]


def test_settings_and_pyproject_agree():
    assert SETTINGS["lib_name"] == PROJECT["name"]
    assert SETTINGS["description"] == PROJECT["description"]
    assert SETTINGS["license"] == PROJECT["license"]
    assert f">={SETTINGS['min_python']}" == PROJECT["requires-python"]
    assert SETTINGS["author"] == PROJECT["authors"][0]["name"]
    assert PROJECT["urls"]["Repository"].endswith(f"{SETTINGS['user']}/{SETTINGS['repo']}")
    assert SETTINGS["version"] == mlc_notebooks.__version__


def normal(name):
    "A distribution's name as the package index compares it."
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*keys):
    "Requirements of settings.ini, by normal name."
    found = [Requirement(line) for key in keys for line in SETTINGS[key].split()]
    return {normal(requirement.name): requirement for requirement in found}


def imported(folder):
    "The packages that are not Python's own which the modules of a folder import, anywhere in them."
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"mlc_notebooks"}


def undeclared(folder, *keys):
    "Imported packages without a requirement in these lists."
    known = declared(*keys)
    of_module = packages_distributions() | {"llama_cpp": ["llama-cpp-python"]}
    missing = []
    for module in sorted(imported(folder)):
        distributions = map(normal, of_module.get(module, [module]))
        if not any(name in known for name in distributions):
            missing.append(module)
    return missing


def test_every_imported_package_is_declared():
    extras = [key for key in SETTINGS if key.endswith("_requirements") and key[:4] != "dev_"]
    assert {"numpy", "yaml", "peft"} <= imported("mlc_notebooks")
    # vllm is no extra: its releases ask for other releases of our requirements (models.vllm)
    assert undeclared("mlc_notebooks", "requirements", *extras) == ["vllm"]
    neighbours = {path.stem for path in (ROOT / "tests").rglob("*.py")} | {"vllm", "ray"}
    assert set(undeclared("tests", "requirements", "dev_requirements")) <= neighbours


def test_the_releases_that_were_tested_are_releases_that_are_allowed():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = [Requirement(line) for line in lines if not line.startswith("#")]
    tested = {normal(one.name): next(iter(one.specifier)) for one in tested}
    assert all(pin.operator == "==" for pin in tested.values())
    for name, requirement in declared("requirements", "dev_requirements").items():
        if name in ("torch", "tomli"):  # torch is named in the Makefile; tomli is for Python 3.10
            continue
        assert requirement.specifier.contains(tested[name].version), requirement


def test_the_wheel_carries_data_and_notices(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--disable-pip-version-check",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
    for needed in (
        "samples/goemotions/test.tsv.gz",
        "samples/brighter/track_a/test/eng.csv.gz",
        "samples/goemotions/README.md",
        "samples/convabuse/ConvAbuseEMNLPtest.csv.gz",
        "adapters/smollm2-135m-emotions/adapter_model.safetensors",
        "report/page.html",
        "report/page.css",
        "report/page.js",
    ):
        assert f"mlc_notebooks/{needed}" in names
    assert any(name.endswith("NOTICE") for name in names) and any(
        name.endswith("LICENSE") for name in names
    )
    assert "Requires-Dist: torch>=2.6" in metadata and "Provides-Extra: train" in metadata
