"""The seven rooms: their order, and the stubs by which each hands on its public names.

    python tests/rooms.py     # after nbdev-export: write mlc_notebooks/ROOM/__init__.py and .pyi

`lazy_loader` reads a room's stub, so that `from mlc_notebooks.data import load_table` works and
loads no other module of the room than the one that holds the name.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mlc_notebooks"
ROOMS = ("data", "models", "engine", "probing", "metrics", "alignment", "report")
INIT = '''"""{about}"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
'''
ABOUT = {
    "data": "Texts, labels, annotators, and the prompts made of them.",
    "models": "Language models and their tokenizers.",
    "engine": "How a model is asked economically, and how long runs survive.",
    "probing": "The label distribution at every step of an answer.",
    "metrics": "Statistics of the phenomenon, and distances to annotators.",
    "alignment": "From what a model says to an honest probability for every label.",
    "report": "Figures, the page about a run, and the commands.",
}


def modules(room: str) -> list[str]:
    "The modules of a room in the order of their notebooks, which is the order of its imports."
    notebooks = sorted((ROOT / "nbs" / room).glob("[0-9]*.ipynb"))
    return [path.stem.split("_", 1)[1] for path in notebooks]


def public_names(path: Path) -> list[str]:
    "What a module lists in `__all__`."
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__":
            return ast.literal_eval(node.value)
    return []


def stub(room: str) -> str:
    "The content of a room's `__init__.pyi`."
    names = {name: public_names(PACKAGE / room / f"{name}.py") for name in modules(room)}
    lines = [f"from . import {name} as {name}" for name in names]
    # Where several modules list a name, the last one hands it on: METHODS is filled there.
    owner = {name: module for module, public in names.items() for name in public}
    for module, public in names.items():
        mine = sorted(name for name in public if owner[name] == module)
        lines += [f"from .{module} import {name} as {name}" for name in mine]
    return "\n".join(lines) + "\n"


def main():
    for room in ROOMS:
        folder = PACKAGE / room
        (folder / "__init__.py").write_text(INIT.format(about=ABOUT[room]), encoding="utf-8")
        (folder / "__init__.pyi").write_text(stub(room), encoding="utf-8")


if __name__ == "__main__":
    main()
