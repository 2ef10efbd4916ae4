"""The page about a run: one file, texts as they stand, nothing from elsewhere, for everybody."""

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib.resources import files

import numpy as np
import pandas as pd
import pytest

from mlc_notebooks.data import AnnotatedTexts, LabelSet
from mlc_notebooks.metrics import ReadingCheck
from mlc_notebooks.probing import Trace
from mlc_notebooks.report import (
    plot_intermediate_last,
    text_csv,
    text_rows,
    text_table,
    write_report,
)

TEXTS = [
    "I paid $5 and $6, $$ and $\\foo$",
    "</script><script>alert(1)</script>",
    "<b>bold</b> <img src=x onerror=alert(1)> &amp; <!-- {{ 7 * 7 }}",
    "שלום עולם, مرحبا بالعالم",
    "これは悲しい。\nとても。",
    "so happy 😀👩‍👩‍👧 \u202eright to left",
    "'\"`; a, b\t= 1",
]
LABELS = ["</script>", "<b>", "$$", "悲しみ", "فرح", "joy 😀"]


def make_trace(texts=TEXTS, labels=LABELS, task="my <texts>$$") -> Trace:
    "Made-up answers: text i writes label i, and every other text one more label."
    names = LabelSet(labels)
    ids = [f"id {i} <i>" for i in range(len(texts))]
    written = [[labels[i % len(labels)], labels[(i + 1) % len(labels)]] for i in range(len(texts))]
    written = [names if i % 2 else names[:1] for i, names in enumerate(written)]
    steps = pd.DataFrame(
        [(ids[i], t + 1, name) for i, names in enumerate(written) for t, name in enumerate(names)],
        columns=["example", "step", "wrote"],
    )
    steps = steps.assign(mass=0.9, go=-1.0, stop=-0.5, prompt_tokens=9, generated_tokens=3)
    steps["flags"] = [()] * len(steps)
    items = pd.DataFrame({"text": texts}, pd.Index(ids, name="id"))
    items["output"] = [json.dumps(names) for names in written]
    items["outcomes"] = [tuple(names) for names in written]
    items["flags"] = [()] * len(texts)
    random = np.random.default_rng(0)
    logprobs = np.log(random.dirichlet(np.ones(len(names.outcomes)), len(steps)))
    made = dict(model="m", task=task, shots=0, decoding="free", reading="exact", seconds=1.0)
    made |= dict(aggregated=False, prompt=texts[0], versions={"python": "3"})
    return Trace(names, items, steps, logprobs, made)


def gold_of(trace: Trace) -> AnnotatedTexts:
    "Two annotators: both chose the first label, one the second; the last text has none."
    votes = np.zeros((2, len(trace.labels)), np.uint8)
    votes[:, 0] = 1
    votes[0, 1] = 1
    annotations = [votes] * (len(trace) - 1) + [votes[:0]]
    return AnnotatedTexts(
        "t", list(trace.items.index), trace.items["text"], trace.labels, annotations
    )


class Page(HTMLParser):
    "The elements of a page: (tag, attributes, text inside), in the order in which they begin."

    VOID = {"meta", "img", "br", "input", "link"}

    def __init__(self, html):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append([tag, dict(attrs), ""])
        if tag not in self.VOID:
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self.open[-1][0] == tag, f"</{tag}> closes <{self.open[-1][0]}>"
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def all(self, tag, **attributes):
        attributes = {name.rstrip("_"): value for name, value in attributes.items()}
        found = [one for one in self.elements if one[0] == tag]
        return [one for one in found if attributes.items() <= one[1].items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    trace = make_trace()
    out = tmp_path_factory.mktemp("report")
    evidence = pd.DataFrame({"what": ["<b>$$"], "value": [1.0]})
    checks = {"t": ReadingCheck("red", "It does <not> read $$.", evidence)}
    write_report({"t": trace}, out, {"t": gold_of(trace)}, panels=2, checks=checks)
    return out


@pytest.fixture(scope="module")
def html(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html):
    page = Page(html)
    assert page.open == []  # every element is closed
    return page


def test_the_page_loads_nothing(page, folder):
    addresses = [
        attributes[name]
        for _, attributes, _ in page.elements
        for name in ("src", "href", "action", "srcset", "poster", "data")
        if name in attributes
    ]
    assert len(addresses) > 5 and all(one.startswith(("#", "data:")) for one in addresses)
    assert not page.all("link") and not page.all("iframe") and not page.all("base")
    assert not any(
        name.startswith("on") for _, attributes, _ in page.elements for name in attributes
    )
    assert "url(" not in page.all("style")[0][2] and "@import" not in page.all("style")[0][2]
    assert (folder / "report.html").stat().st_size < 3_000_000


def test_only_the_scripts_that_the_policy_names_run(page):
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    scripts = page.all("script")
    run = [text for _, attributes, text in scripts if attributes.get("type") is None]
    assert len(run) == 2 and len(scripts) == 3
    for text in run:
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy[1]["content"]
    assert policy[1]["content"].startswith("default-src 'none'")
    assert "unsafe-eval" not in policy[1]["content"] and "http" not in policy[1]["content"]
    assert page.elements.index(policy) < page.elements.index(scripts[0])


def test_the_data_of_the_chart_are_json_without_texts(page):
    (chart,) = page.all("script", type="application/json")
    spec = json.loads(chart[2])
    assert spec["data"] == {"name": "steps"} and spec["facet"]["field"] == "step"
    assert not any(label in chart[2] for label in LABELS)


def test_texts_and_labels_stand_there_as_they_are(page):
    said = [text for _, attributes, text in page.elements if attributes.get("class") == "said"]
    assert sorted(said) == sorted(TEXTS)
    names = [text for _, attributes, text in page.all("span", class_="name")]
    assert set(names) == set(LABELS)
    assert not page.all("b", onerror="alert(1)") and len(page.all("img", src="x")) == 0
    for tag in ("i", "b"):  # marks of bars only
        assert all(one[2] == "" and "style" in one[1] for one in page.all(tag))
    for kind in ("said", "name"):
        assert all(
            one[1].get("dir") == "auto" for one in page.elements if one[1].get("class") == kind
        )


def test_one_row_per_text_the_greatest_disagreement_first(page):
    bodies = [one for one in page.all("tbody") if "data-kinds" in one[1]]
    table = text_table(make_trace(), gold_of(make_trace()))
    assert [one[1]["data-distance"] for one in bodies][:-1] == [
        f"{value:.2f}" for value in table["disagreement"][:-1]
    ]
    assert bodies[-1][1]["data-distance"] == "" and "not annotated" in bodies[-1][2]
    assert table["disagreement"][:-1].is_monotonic_decreasing
    first = table.iloc[0]
    by_hand = sum(
        abs(first[f"p_{name}"] - share) for name, share in zip(LABELS, [1, 0.5, 0, 0, 0, 0])
    )
    assert first["disagreement"] == pytest.approx(by_hand)
    assert first["gold"] == (LABELS[0], LABELS[1])


def test_the_download_is_the_table(page, folder):
    (link,) = [one for one in page.all("a") if "download" in one[1]]
    kind, content = link[1]["href"].split(",", 1)
    assert kind == "data:text/csv;charset=utf-8;base64"
    csv = base64.b64decode(content).decode()
    assert csv == (folder / "t/texts.csv").read_bytes().decode()
    read = pd.read_csv(io.StringIO(csv), keep_default_na=False)
    assert sorted(read["text"]) == sorted(TEXTS) and f"p_{LABELS[0]}" in read


def test_for_small_screens_keyboards_and_those_who_do_not_see(page):
    assert page.all("meta", name="viewport")[0][1]["content"].startswith("width=device-width")
    assert page.all("html")[0][1]["lang"] == "en"
    alts = [one[1]["alt"] for one in page.all("img")]
    panels = [alt for alt in alts if alt.startswith("Label prob")]
    assert len(alts) == 4 and len(set(alts)) == 3  # the first panel stands at the top too
    assert len(set(panels)) == 2 and all(len(alt) > 60 for alt in alts)
    levels = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:]))
    labelled = "".join(text for _, _, text in page.all("label"))
    assert all(word in labelled for word in ("Search", "Label", "Kind", "Sort by", "Text"))
    labels = str([one[:2] for one in page.elements]).count("'label'")
    assert labels == len(page.all("input")) + len(page.all("select"))
    assert all(one[1].get("type") == "button" for one in page.all("button"))
    assert len(page.all("details")) == len(page.all("summary"))


def test_contents_lead_to_places_that_are_there(page):
    ids = [one[1]["id"] for one in page.elements if "id" in one[1]]
    assert len(ids) == len(set(ids))
    links = [one[1]["href"][1:] for one in page.all("a") if one[1]["href"].startswith("#")]
    assert len(links) >= 5 and set(links) <= set(ids)


def test_dark_and_printed(html):
    style = html.split("<style>")[1].split("</style>")[0]
    assert "prefers-color-scheme: dark" in style and "@media print" in style


def test_the_first_screen_says_how_it_went(html):
    start = html.index("<main>")
    assert html.index("✗ red", start) < html.index("It does &lt;not&gt; read $$.", start)
    assert (
        html.index("It does", start) < html.index("At step 1", start) < html.index('id="picture"')
    )
    assert html.index('id="picture"') < html.index(">Evidence<")


def test_a_run_without_gold_labels_is_checked_all_the_same(tmp_path):
    trace = make_trace()
    page = write_report({"t": trace}, tmp_path, panels=0).read_text(encoding="utf-8")
    read = Page(page)
    assert "! amber" in page and "too few to tell" in page
    assert "least sure" in page and not read.all("td", **{"data-head": "Gold"})
    assert len(read.all("img")) == 1
    assert text_table(trace)["doubt"].is_monotonic_decreasing


def test_many_texts_and_many_labels_are_cut_and_the_page_says_so(tmp_path):
    trace = make_trace(TEXTS * 300, task="many")
    page = write_report({"t": trace}, tmp_path, panels=0)
    html = page.read_text(encoding="utf-8")
    assert "the first 1,000 of 2,100 texts; all are in t/texts.csv" in html
    assert html.count("<tbody data-kinds") == 1000 and page.stat().st_size < 8_000_000
    assert len(pd.read_csv(tmp_path / "t/texts.csv")) == 2100

    wide = make_trace(["a" * 5000], [f"label {i}" for i in range(200)])
    (row,) = text_rows(wide, text_table(wide))
    assert len(row["bars"]) == 16 and row["left_out"] == 184
    assert wide.items["outcomes"].iloc[0][0] in [bar["label"] for bar in row["bars"]]
    assert row["text"].endswith("(3000 more characters)")
    assert row["steps"]["left_out"] == 201 - 16


def test_labels_in_the_csv_of_one_text_without_annotators():
    table = text_table(make_trace(), gold_of(make_trace()))
    last = pd.read_csv(io.StringIO(text_csv(table)), keep_default_na=False).iloc[-1]
    assert last["gold"] == "" and last["disagreement"] == "" and last["doubt"] != ""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node, which runs the page's script")
def test_search_filter_and_order():
    script = files("mlc_notebooks.report") / "page.js"
    rows = [
        dict(text="straße ﬁne", labels=["joy"], kinds=["differs"], position=0, d=1),
        dict(text="i won", labels=["<b>"], kinds=["none"], position=1, d=None),
        dict(text="i lost", labels=["joy", "<b>"], kinds=["differs", "several"], position=2, d=3),
    ]
    program = f"""
    const {{ folded, fits, ordered }} = require({json.dumps(str(script))});
    const rows = {json.dumps(rows)}.map((row) => ({{ ...row, labels: new Set(row.labels) }}));
    for (const row of rows) row.text = folded(row.text);
    const asked = (words, label, kind) => rows.map((row) => fits(row, {{ words, label, kind }}));
    console.log(JSON.stringify([
      asked("", "", ""), asked("I  WON", "", ""), asked("fine", "", ""), asked("", "<b>", ""),
      asked("i", "joy", "several"), asked("$(.*", "", ""),
      ordered(rows, (row) => row.d).map((row) => row.position),
      ordered(rows, () => 1).map((row) => row.position),
    ]));"""
    done = subprocess.run(["node", "-e", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [
        [True, True, True],
        [False, True, False],
        [True, False, False],
        [False, True, True],
        [False, False, True],
        [False, False, False],
        [2, 0, 1],
        [0, 1, 2],
    ]


def test_few_texts_are_dots_and_many_are_violins():
    def drawn(texts):
        profile = pd.DataFrame({"example": range(texts), "step": 1, "last": True})
        profile["top"] = np.linspace(0.2, 0.9, texts)
        collections = plot_intermediate_last(profile).collections
        return sum(len(one.get_offsets()) for one in collections if len(one.get_offsets()) > 1)

    assert [drawn(2), drawn(19), drawn(20)] == [2, 19, 0]
