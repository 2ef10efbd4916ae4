"""One source of truth: what stands in two files is the same, and a wheel carries what the library
needs.
"""

import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

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
    ):
        assert f"mlc_notebooks/{needed}" in names
    assert any(name.endswith("NOTICE") for name in names) and any(
        name.endswith("LICENSE") for name in names
    )
    assert "Requires-Dist: torch>=2.6" in metadata and "Provides-Extra: train" in metadata
