"""Texts in figures and pages: drawn as they stand, whatever stands in them."""

import html
import io
import re
import warnings
import xml.etree.ElementTree as ET
from importlib import import_module
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.text import Text

from mlc_notebooks.data import AnnotatedTexts, LabelSet, html_part, load_table
from mlc_notebooks.metrics import (
    AlignReport,
    Audit,
    audit,
    first_step_profiles,
    next_labels,
    order_accuracy,
    rank_histogram,
    sorted_profile,
    step_profile,
)
from mlc_notebooks.probing import Trace
from mlc_notebooks.report import fonts_for, plain_texts, set_plainly, trace_folders, write_report

PAGES = (
    "plots_steps",
    "plots_order",
    "plots_internals",
    "plots_alignment",
    "plots_parts",
    "plots_audit",
    "summary",
)
LABELS = ["$$", r"$\foo$", "a_b^c", r"back\slash", "$x^2$", "<b>&"]
TEXT = r"I paid $5 for lunch and $6, $\foo{$, 100 % _sure_ & <i>"
NAME = r"$\frac{$ ../my$_file"


def make_trace(labels=LABELS, text=TEXT, name=NAME) -> Trace:
    "Three answers of two labels each, made up."
    labels = LabelSet(labels)
    ids = [f"{text[:9]} {n}" for n in range(3)]
    items = pd.DataFrame({"text": [f"{text} {n}" for n in range(3)]}, pd.Index(ids, name="id"))
    items["output"] = str(list(labels))
    items["outcomes"] = [tuple(labels)[:2]] * 3
    items["flags"] = [()] * 3
    steps = pd.DataFrame({"example": np.repeat(ids, 2), "step": [1, 2] * 3})
    steps["wrote"] = list(labels)[:2] * 3
    steps["mass"], steps["go"], steps["stop"] = 0.9, [-0.1, -3] * 3, [-3, -0.1] * 3
    steps["prompt_tokens"], steps["generated_tokens"] = 9, 3
    steps["flags"] = [()] * 6
    logprobs = np.log(np.random.default_rng(0).dirichlet(np.ones(len(labels.outcomes)), 6))
    made = dict(model=name, task=name, shots=0, decoding="free", reading="exact", seconds=1.0)
    made |= dict(aggregated=True, prompt=text, versions={"python": "3"}, attention=False)
    return Trace(labels, items, steps, logprobs, made)


def gold(trace: Trace) -> AnnotatedTexts:
    votes = [np.eye(len(trace.labels), dtype=np.uint8)[:1]] * len(trace)
    return AnnotatedTexts(NAME, list(trace.items.index), trace.items["text"], trace.labels, votes)


def rows(**columns) -> pd.DataFrame:
    return pd.DataFrame(columns).assign(value=0.5, low=0.4, high=0.6, n=9)


def two(frame: pd.DataFrame) -> pd.DataFrame:
    "The frame of two traces with hostile names."
    return pd.concat([frame.assign(trace=NAME), frame.assign(trace="$$")])


def probes() -> pd.DataFrame:
    targets = ["Pred", "Gold", "Pred 2+", "$$"]
    frames = [
        rows(target=targets).assign(layer=layer, control=control, score="$F_1$")
        for layer in (0, 1)
        for control in ("probe", "shuffled")
    ]
    return pd.concat(frames)


def attention(**more) -> pd.DataFrame:
    parts = ["prompt", "first label tokens", "$$", r"$\foo$"]
    frame = pd.DataFrame({"part": parts, "total": 0.25, "per_token": 0.1, "example": NAME})
    return pd.concat([frame.assign(step=step, **more) for step in (1, 2)])


def parts() -> pd.DataFrame:
    "The parts of two gaps, of methods with hostile names."
    names = ["knowledge", "calibration", "read-out", "gap"]
    frames = [rows(part=names).assign(method=method) for method in (NAME, "$$")]
    return pd.concat(frames).assign(metric="$N_L$", ceiling=r"$\foo$")


def half(trace: Trace) -> pd.DataFrame:
    "Marginals of one half for each text and label."
    return pd.DataFrame(0.5, trace.items.index, list(trace.labels))


def audited() -> Audit:
    "An audit of a dozen texts with hostile labels and names."
    texts = [f"{TEXT} {number}" for number in range(12)]
    votes = np.zeros((12, 1, 6), bool)
    for number in range(12):
        votes[number, 0, [number % 6, number % 4]] = True
    return audit(AnnotatedTexts(NAME, list("abcdefghijkl"), texts, LabelSet(LABELS), votes))


DRAWN = {  # every figure function, with hostile names wherever it takes names
    "plot_steps": lambda plot, trace: plot(trace),
    "plot_top_second": lambda plot, trace: plot(trace),
    "plot_sorted_profile": lambda plot, trace: plot(two(sorted_profile(trace))),
    "plot_intermediate_last": lambda plot, trace: plot(step_profile(trace)),
    "plot_next_labels": lambda plot, trace: plot(next_labels(trace)),
    "plot_rank_histogram": lambda plot, trace: plot(rank_histogram(trace)),
    "plot_order_accuracy": lambda plot, trace: plot(two(order_accuracy(trace, gold(trace)))),
    "plot_label_order": lambda plot, trace: plot(
        rows(order=LABELS[:2] * 2, quantity=["$$"] * 2 + [r"$\foo$"] * 2)
    ),
    "plot_condition": lambda plot, trace: plot(
        two(rows(**{"$x_1$": LABELS}, quantity="$y$")), "$x_1$", "$y$", reference=0.5
    ),
    "plot_probes": lambda plot, trace: plot(probes(), "$F_1$"),
    "plot_probes_by_layer": lambda plot, trace: plot(probes(), "$F_1$"),
    "plot_attention": lambda plot, trace: plot(attention()),
    "plot_attention_by_layer": lambda plot, trace: plot(attention(layer=1)),
    "plot_alignment": lambda plot, trace: plot(
        rows(method=[*LABELS, NAME], metric="$N_L$"), ["$N_L$"]
    ),
    "plot_writer": lambda plot, trace: plot(first_step_profiles(trace, half(trace))),
    "plot_gap": lambda plot, trace: plot(two(parts()), "$N_L$"),
    "plot_audit": lambda plot, trace: plot(audited()),
    "plot_summary": lambda plot, trace: plot(trace, gold(trace)),
}


def plots() -> dict:
    "All figure functions of the room, by name."
    found = {}
    for page in PAGES:
        module = import_module(f"mlc_notebooks.report.{page}")
        found |= {n: getattr(module, n) for n in module.__all__ if n.startswith("plot_")}
    return found


@pytest.fixture(autouse=True)
def closed_figures():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as: a glyph is missing
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield
    plt.close("all")


def written(figure) -> str:
    "All that a figure shows as text, from what was rendered: formulas would be torn into pieces."
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight")
    texts = ET.fromstring(buffer.getvalue()).iter("{http://www.w3.org/2000/svg}text")
    return "\n".join("".join(text.itertext()) for text in texts)


def of_users(figure) -> set[str]:
    "The lines of texts in a figure that matplotlib could take for formulas."
    texts = {text.get_text() for text in figure.findobj(Text) if text.get_visible()}
    return {line for text in texts for line in text.split("\n") if re.search(r"[$\\^]", line)}


@pytest.mark.parametrize("name", plots())
def test_no_figure_takes_a_text_for_a_formula(name):
    drawn = DRAWN[name](plots()[name], make_trace())
    figure = drawn.figure
    shown = written(figure)
    hostile = of_users(figure)
    for line in hostile:
        assert " ".join(line.split()) in " ".join(shown.split())
    names_appear = name not in ("plot_intermediate_last", "plot_next_labels", "plot_rank_histogram")
    assert bool(hostile) == names_appear
    figure.set_size_inches(4, 9)  # a user may save it again in another form
    for form in ("png", "pdf"):
        figure.savefig(io.BytesIO(), format=form)


def test_panels_of_a_caller_stay_the_callers():
    figure, (left, right) = plt.subplots(1, 2)
    left.set_title("$x^2$")
    plots()["plot_sorted_profile"](two(sorted_profile(make_trace())), right)
    right.set_title("$$")  # on our axes: a text
    figure.canvas.draw()
    assert left.title.get_parse_math() and not right.title.get_parse_math()
    assert NAME in written(figure)


def test_a_logarithmic_scale_chosen_later_has_powers():
    axes = plots()["plot_sorted_profile"](sorted_profile(make_trace()))
    axes.set_yscale("log")
    assert "mathdefault" not in written(axes.figure)


def test_settings_of_a_user_change_nothing():
    with mpl.rc_context({"text.usetex": True, "axes.formatter.use_mathtext": True}):
        axes = plots()["plot_alignment"](rows(method=LABELS, metric="NLL"), ["NLL"])
        assert "$x^2$" in written(axes.figure) and "mathdefault" not in written(axes.figure)


def test_scripts_without_a_font_are_codes_with_a_note():
    names = ["悲しみ", "怒り", "क्रोध", "joy"]
    if not fonts_for("".join(names))[1]:
        pytest.skip("this computer has fonts for Japanese and Hindi")
    figure = plots()["plot_steps"](make_trace(names, text="今日は"), 0).figure
    shown = " ".join(written(figure).split())
    assert r"\u60b2" in shown and r"\u6012" in shown and "Noto Sans CJK" in shown
    assert "悲" not in shown and "joy" in shown


def add_font(path, family: str, characters: str):
    "A font file with squares for these characters, made known to matplotlib."
    pen = TTGlyphPen(None)
    for n, point in enumerate([(0, 0), (0, 700), (700, 700), (700, 0)]):
        (pen.lineTo if n else pen.moveTo)(point)
    pen.closePath()
    names = [".notdef", *(f"g{n}" for n in range(len(characters)))]
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(names)
    font.setupCharacterMap({ord(c): f"g{n}" for n, c in enumerate(characters)})
    font.setupGlyf({name: pen.glyph() for name in names})
    font.setupHorizontalMetrics(dict.fromkeys(names, (800, 0)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": family, "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(path)
    font_manager.fontManager.addfont(path)


def test_a_font_that_has_the_characters_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [*font_manager.fontManager.ttflist])
    missing = "".join(sorted(fonts_for("悲しみ怒りक्रोध\U00010380")[1]))
    assert missing, "a script of Ugarit has no font here"
    add_font(tmp_path / "mine.ttf", "My Script", missing)
    assert fonts_for(missing) == (["My Script"], set())
    figure = plots()["plot_steps"](make_trace([f"{missing[0]}a", "joy"]), 0).figure
    assert f"{missing[0]}a" in written(figure) and "Install" not in written(figure)


def test_an_odd_label_stays_itself():
    for name in ("\x07bell", "zero\u200dwidth", "\ue123", "\ud800", "tab\there", "a" * 300):
        drawn = plain_texts(lambda name=name: plt.figure().text(0, 0, name))()
        assert set_plainly(drawn) == set() and drawn.get_text()
        drawn.figure.canvas.draw()


# Pages


HOSTILE = ["..", "../x", "a/b", "/abs", "report.html", "batches", "my", "MY", "x" * 300, "<img>$$"]


def test_folders_of_traces_are_safe_and_different():
    folders = trace_folders(HOSTILE)
    assert len({folder.casefold() for folder in folders.values()}) == len(HOSTILE)
    for folder in folders.values():
        assert folder not in ("report.html", "batches", ".", "..") and "/" not in folder
        assert len(folder.encode()) <= 100
    assert folders["my"] == "my"


def test_a_report_of_hostile_names_stays_in_its_folder(tmp_path):
    traces = {name: make_trace() for name in HOSTILE[:7]}
    page = write_report(traces, tmp_path / "out", panels=1).read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    folders = trace_folders(traces)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"report.html", *folders.values()}
    for folder in folders.values():
        assert f"{folder}/trace.parquet" in page
        assert len(Trace.load(tmp_path / "out" / folder)) == 3
    body = re.sub(r"data:image/png;base64,[^\"]*", "", page)
    assert "<i>" not in body and "<b>&" not in body
    assert html.escape(TEXT, quote=False)[:40] in body


def test_labels_without_a_font_are_named_on_the_page(tmp_path):
    names = ["悲しみ", "joy"]
    if not fonts_for("悲しみ")[1]:
        pytest.skip("this computer has a font for Japanese")
    page = write_report({"t": make_trace(names)}, tmp_path, panels=0).read_text(encoding="utf-8")
    assert "no font" in page and "悲しみ. Install Noto Sans CJK" in " ".join(page.split())


def test_html_in_a_notebook_escapes_everything(tmp_path):
    name = "<img src=x onerror=alert(1)>$5 $6"
    (tmp_path / f"{name}.csv").write_text(f"text,labels\n<script>1</script>,{name}\n")
    task = load_table(tmp_path / f"{name}.csv")
    report = AlignReport(rows(method=[name], metric="NLL"))
    report.note = f"{name}, 1 item"
    for shown in (task._repr_html_(), report._repr_html_(), html_part("{{ x }}", x=name)):
        assert "<img" not in shown and "<script" not in shown and "&lt;img" in shown
        assert "mathjax_ignore" in shown.split(">")[0]


def test_html_is_made_in_one_place():
    package = Path(import_module("mlc_notebooks").__file__).parent
    for path in package.rglob("*.py"):
        if path.name not in ("markup.py", "_modidx.py"):
            source = path.read_text(encoding="utf-8")
            assert not re.search(r"to_html\(|Markup\(|jinja2|f\"<\w+>", source), path.name


def test_only_the_settings_about_formulas_are_put_back():
    "A notebook's backend turns on `interactive` when the first figure is made."
    before = mpl.rcParams["text.parse_math"]

    @plain_texts
    def plot():
        plt.ion()
        return plt.figure().subplots()

    try:
        plot()
        assert plt.isinteractive() and mpl.rcParams["text.parse_math"] == before
    finally:
        plt.ioff()
