"use strict";
// The page works without this file: it has all texts, bars and tables. This adds a chooser, charts,
// and search, filter and order of the rows. Texts are only ever set as textContent.

// What a search compares: without differences of case, of width and of composed letters.
function folded(text) {
  return text.normalize("NFKC").toLowerCase();
}

// Whether a row {text, labels, kinds} fits what is asked {words, label, kind}; "" asks for nothing.
function fits(row, asked) {
  const words = folded(asked.words).split(/\s+/).filter(Boolean);
  return (
    words.every((word) => row.text.includes(word)) &&
    (asked.label === "" || row.labels.has(asked.label)) &&
    (asked.kind === "" || row.kinds.includes(asked.kind))
  );
}

// The rows, those with the largest value first; a row without a value comes last.
function ordered(rows, value) {
  const of = (row) => value(row) ?? -Infinity;
  return [...rows].sort((a, b) => of(b) - of(a) || a.position - b.position);
}

// What a row's `tbody` says, for `fits` and `ordered`.
function readRow(body, position) {
  const texts = (selector) => [...body.querySelectorAll(selector)].map((one) => one.textContent);
  const probs = new Map();
  for (const bar of body.querySelectorAll(".bars li")) {
    probs.set(bar.children[0].textContent, Number(bar.children[2].textContent));
  }
  return {
    body,
    position,
    probs,
    said: body.querySelector(".said").textContent,
    text: folded(texts(".said, .id, .labels li, .output").join(" ")),
    labels: new Set(texts(".labels .name")),
    kinds: body.dataset.kinds.split(" "),
    distance: body.dataset.distance === "" ? null : Number(body.dataset.distance),
    steps: body.querySelectorAll(".steps thead th").length - 1,
  };
}

// The values of a chart, from the table of steps of a text.
function chartValues(table) {
  const steps = [...table.tHead.rows[0].cells].slice(1);
  const titles = steps.map((cell) => [...cell.children].map((line) => line.textContent).join("\n"));
  const values = [];
  for (const row of table.tBodies[0].rows) {
    const [label, ...cells] = row.cells;
    cells.forEach((cell, i) => {
      values.push({
        step: titles[i],
        label: label.textContent,
        prob: Number(cell.textContent),
        written: cell.classList.contains("written"),
      });
    });
  }
  return values;
}

// Draw the steps of a row into an element, as many panels side by side as there is room for.
async function draw(row, place) {
  const spec = JSON.parse(document.getElementById("chart").textContent);
  const room = place.clientWidth - 130; // beside the names of the labels
  const columns = Math.max(1, Math.min(row.steps, 4, Math.floor(room / 180)));
  const width = Math.max(100, Math.min(260, Math.floor(room / columns) - 25));
  spec.data.values = chartValues(row.body.querySelector(".steps"));
  spec.columns = columns;
  spec.spec.width = width;
  spec.config.header.labelLimit = width + 15;
  place.setAttribute("role", "img");
  place.setAttribute("aria-label", `Label probabilities step by step for: ${row.said}`);
  const options = { ast: true, renderer: "svg", actions: false, tooltip: false };
  await vegaEmbed(place, spec, options);
}

// The steps of a text that was opened are drawn above their table.
function chartWhenOpened(row) {
  const details = row.body.querySelector("details");
  details.addEventListener("toggle", () => {
    if (details.open) draw(row, details.querySelector(".chart"));
  });
  row.body.querySelector("tr.text").addEventListener("click", (event) => {
    const selecting = String(getSelection()) !== "";
    if (!selecting && !event.target.closest("a, button, input, select")) {
      details.open = !details.open;
    }
  });
}

function option(text, value) {
  const made = document.createElement("option");
  made.textContent = text;
  made.value = value;
  return made;
}

// Search, filter and order of one table of texts.
function control(table, controls, rows) {
  const [words, label, kind, order] = controls.querySelectorAll("input, select");
  const count = controls.querySelector("output");
  for (const name of new Set(rows.flatMap((row) => [...row.labels]))) {
    label.append(option(name, name));
  }
  for (const name of rows.length ? rows[0].probs.keys() : []) {
    order.append(option(`probability of ${name}`, `p ${name}`));
  }
  const values = {
    distance: (row) => row.distance,
    place: (row) => -row.body.dataset.place,
    steps: (row) => row.steps,
  };
  let sortedBy = "distance"; // the order in which the rows come
  const apply = () => {
    const asked = { words: words.value, label: label.value, kind: kind.value };
    let shown = 0;
    for (const row of rows) {
      row.body.hidden = !fits(row, asked);
      shown += row.body.hidden ? 0 : 1;
    }
    if (order.value !== sortedBy) {
      sortedBy = order.value;
      const value = values[sortedBy] ?? ((row) => row.probs.get(sortedBy.slice(2)));
      table.append(...ordered(rows, value).map((row) => row.body));
    }
    count.textContent = `${shown} of ${rows.length} texts`;
  };
  controls.addEventListener("input", apply);
  controls.addEventListener("submit", (event) => event.preventDefault());
  apply();
}

// The picture at the top of the page, and the chooser of its text.
function choose(tables) {
  const picture = document.getElementById("picture");
  const chooser = picture.querySelector("select");
  const rows = tables.flatMap((one) => one.rows);
  tables.forEach((one, i) => {
    const group = document.createElement("optgroup");
    group.label = one.name;
    const first = tables.slice(0, i).reduce((sum, before) => sum + before.rows.length, 0);
    one.rows.forEach((row, j) => group.append(option(row.said.slice(0, 80), first + j)));
    chooser.append(group);
  });
  const show = () => {
    const row = rows[chooser.value];
    const said = picture.querySelector("blockquote");
    said.textContent = row.said;
    picture.querySelector(".sets").textContent = row.body.dataset.sets;
    return draw(row, picture.querySelector(".chart"));
  };
  const step = (by) => {
    chooser.value = (Number(chooser.value) + by + rows.length) % rows.length;
    show();
  };
  const [before, after] = picture.querySelectorAll("button");
  before.addEventListener("click", () => step(-1));
  after.addEventListener("click", () => step(1));
  chooser.addEventListener("input", show);
  const first = rows.findIndex((row) => "first" in row.body.dataset);
  chooser.value = Math.max(0, first);
  let width = 0;
  new ResizeObserver(() => {
    const now = picture.clientWidth;
    if (Math.abs(now - width) < 20) return;
    width = now;
    show();
  }).observe(picture);
}

function start() {
  document.documentElement.classList.add("scripted");
  const tables = [...document.querySelectorAll("table.texts")].map((table) => {
    const rows = [...table.tBodies].map(readRow);
    rows.forEach(chartWhenOpened);
    control(table, document.getElementById(table.dataset.controls), rows);
    return { name: table.dataset.name, rows };
  });
  if (tables.some((one) => one.rows.length)) choose(tables);
}

if (typeof document !== "undefined") start();
if (typeof module !== "undefined") module.exports = { folded, fits, ordered };
