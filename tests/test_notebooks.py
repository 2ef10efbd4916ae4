"""What is committed of the notebooks' outputs is fit to be read."""

import json
import re
from pathlib import Path

import pytest

NBS = Path(__file__).parent.parent / "nbs"
NOTEBOOKS = sorted(path for path in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)


def outputs(path: Path) -> list[dict]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [output for cell in cells for output in cell.get("outputs", ())]


def texts(output: dict) -> dict[str, str]:
    "The text of an output by its kind: stream, text/plain, text/html."
    data = {kind: "".join(text) for kind, text in output.get("data", {}).items() if "text" in kind}
    return data | {"stream": "".join(output.get("text", ""))}


def is_empty_table(html: str) -> bool:
    "Whether a table has no cell with something in it beside its headings."
    bodies = re.findall(r"<tbody>(.*?)</tbody>", html, re.DOTALL)
    return any(not re.search(r"<td[^>]*>\s*[^<\s]", body) for body in bodies)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: str(path.relative_to(NBS)))
def test_outputs_are_clean(path):
    for output in outputs(path):
        assert output["output_type"] != "error"
        for kind, text in texts(output).items():
            assert "Empty DataFrame" not in text
            assert not (kind == "text/html" and is_empty_table(text)), "an empty table"
            assert "Warning:" not in text, "a warning"
            assert not re.search(r"\d%\|", text), "what a progress bar left"
            assert not re.search(r"/(home|root|tmp|work|Users)/", text), "a path of a machine"


def test_an_empty_table_is_seen():
    table = "<table><thead><tr><th>task</th></tr></thead><tbody>{}</tbody></table>"
    assert is_empty_table(table.format("\n  "))
    assert is_empty_table(table.format("<tr><th>model</th><td></td></tr>"))
    assert not is_empty_table(table.format("<tr><th>model</th><td>0.5</td></tr>"))
