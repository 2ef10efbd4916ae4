"""What the documents for heirs name is there."""

import importlib
import re
from pathlib import Path

import pytest
from rooms import ROOMS

ROOT = Path(__file__).parent.parent
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
WAY = re.findall(rf"`((?:{'|'.join(ROOMS)})\.\w+\.\w+)`", ARCHITECTURE)
INDEX = re.findall(r"^\| [^|]+ \| (`\w+/\w+\.\w+`.*?) \|$", ARCHITECTURE, re.MULTILINE)


@pytest.mark.parametrize("name", WAY)
def test_the_way_of_a_text_names_functions(name):
    module, function = name.rsplit(".", 1)
    assert hasattr(importlib.import_module(f"mlc_notebooks.{module}"), function)


@pytest.mark.parametrize("row", INDEX)
def test_the_index_names_files_and_functions(row):
    paths = re.findall(r"`(\w+/\w+\.\w+)`", row)
    assert paths and all((ROOT / "mlc_notebooks" / path).is_file() for path in paths)
    names = re.findall(r"`(\w+)`", row)
    module = importlib.import_module(f"mlc_notebooks.{paths[0][:-3].replace('/', '.')}")
    assert all(hasattr(module, name) for name in names)


def test_both_tables_were_found():
    assert len(WAY) > 15 and len(INDEX) > 15


def test_contributing_names_pages_that_are_there():
    for page in re.findall(r"`(nbs/\S+\.ipynb)`", CONTRIBUTING):
        assert (ROOT / page).is_file(), page
