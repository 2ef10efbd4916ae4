"""The seven rooms: imports go forward only, each room hands on its names, an import is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from rooms import PACKAGE, ROOMS, ROOT, modules, public_names, stub

import mlc_notebooks.all

ORDER = [f"mlc_notebooks.{room}.{name}" for room in ROOMS for name in modules(room)]


def imported(path: Path) -> list[str]:
    "The modules of this package that a file imports anywhere, also inside functions."
    package = ["mlc_notebooks", *path.relative_to(PACKAGE).parts[:-1]]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module in ORDER:
                found.append(module)
            else:  # from a room: its modules, or names that the room hands on
                found += [f"{module}.{alias.name}" for alias in node.names]
    return [owner(name) for name in found if name.startswith("mlc_notebooks.")]


def owner(name: str) -> str:
    "The module of a name that a room hands on."
    room = name.removeprefix("mlc_notebooks.").split(".")[0]
    if name in ORDER or room not in ROOMS:
        return name
    public = name.rsplit(".", 1)[1]
    line = next(line for line in stub(room).splitlines() if line.endswith(f"as {public}"))
    return f"mlc_notebooks.{room}{line.split()[1]}"


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_forward_only(room):
    for name in modules(room):
        module = f"mlc_notebooks.{room}.{name}"
        for other in imported(PACKAGE / room / f"{name}.py"):
            assert other in ORDER, f"{module} imports {other}, which no notebook exports"
            assert ORDER.index(other) < ORDER.index(module), f"{module} imports {other}"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_hands_on_the_public_names_of_its_modules(room):
    assert (PACKAGE / room / "__init__.pyi").read_text(encoding="utf-8") == stub(room)


@pytest.mark.parametrize("room", ROOMS)
def test_no_name_is_hidden_by_a_module(room):
    "Once a module is imported, it stands in its room under its name, where a function would be."
    public = {
        name for module in modules(room) for name in public_names(PACKAGE / room / f"{module}.py")
    }
    assert not public & set(modules(room))


def test_every_module_has_its_notebook():
    exported = {str(path.relative_to(PACKAGE)) for path in PACKAGE.glob("*/*.py")}
    expected = {f"{room}/{name}.py" for room in ROOMS for name in ["__init__", *modules(room)]}
    assert exported == expected


def test_all_is_small_and_complete():
    names = mlc_notebooks.all.__all__
    assert len(names) == len(set(names)) <= 100
    assert all(hasattr(mlc_notebooks.all, name) for name in names)


def test_heavy_libraries_are_imported_where_they_are_used():
    heavy = ["sklearn", "seaborn", "scipy.stats", "peft", "accelerate", "sentence_transformers"]
    code = f"import sys, mlc_notebooks.all; print([m for m in {heavy} if m in sys.modules])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
