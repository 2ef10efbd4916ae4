"""Record what the study `bias` reads: audits, and the scores of each remedy, text by text.

    python nbs/studies/record_bias.py                      # about half an hour
    python nbs/studies/record_bias.py --small              # a few texts of data in the package
    python nbs/studies/record_bias.py --people hs-brexit   # a set's annotators by group, no model

It can be stopped at any time and goes on where it was: what is under `runs/bias` is not asked again.
Texts stay there; what is written to `--out` holds ids, labels and numbers only. The last line is for
a set of the confirmation: run it when that has been opened, not before.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd
from bias_tables import (
    AS_IT_IS,
    GENDER,
    KEPT,
    NO_MODEL,
    PEOPLE_ASKED,
    data_tables,
    model_tables,
    studied_side,
    weighted_train,
    without_copies,
)
from record import RUNS, load_recorded

from mlc_notebooks.alignment import StudyRun, example_counts, own_demonstrations, study_texts
from mlc_notebooks.data import (
    AnnotatedTexts,
    demonstrations_for,
    draw_demonstrations,
    load_task,
    per_label_demonstrations,
    rename_labels,
    reorder_labels,
    safe_name,
    write_whole,
)
from mlc_notebooks.metrics import audit, empty_answers, list_effects, swap_changes, swapped_texts
from mlc_notebooks.models import LM
from mlc_notebooks.probing import Trace, probe_steps

HERE = Path(__file__).parent
WORDINGS = {  # other names of the labels, in their order
    "brighter-eng": "rage dread happiness grief astonishment".split(),
    "goemotions": "respect rage dread happiness hope grief astonishment".split(),
    "xed-en": "rage expectation revulsion dread happiness grief astonishment confidence".split(),
    "convabuse": (
        "against disabled people,against gay people,about intelligence,against a race,"
        "against women,sexual advances,against trans people,about many people,about one person,"
        "about the assistant,open,hidden"
    ).split(","),
}


@dataclass(frozen=True)
class Plan:
    "What is asked."

    texts: Mapping[str, int]  # of each data set, by model
    swapped: Mapping[str, int]  # texts that hold a term of one gender, by model
    tasks: tuple[str, ...]
    shots: int = 10


EMBEDDED = "smollm2-135m-emotions"
LARGER = "qwen2.5-coder-0.5b-tuned"
FULL = Plan({EMBEDDED: 200, LARGER: 100}, {EMBEDDED: 100, LARGER: 40}, tuple(WORDINGS))
SMALL = Plan({EMBEDDED: 8}, {EMBEDDED: 4}, ("brighter-eng", "convabuse"), shots=2)


def once(path: Path, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    "The table that a file holds; it is made and written where there is none."
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, make().to_parquet(index=False))
    return pd.read_parquet(path)


def tables_once(folder: Path, make: Callable[[], dict]) -> dict[str, pd.DataFrame]:
    "The tables that a folder holds, by name; they are made and written where it is not finished."
    if not (folder / "finished").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        for kind, table in make().items():
            write_whole(folder / f"{kind}.parquet", table.to_parquet(index=False))
        write_whole(folder / "finished", "")
    return {path.stem: pd.read_parquet(path) for path in sorted(folder.glob("*.parquet"))}


# ---- what a model is asked

ALWAYS_ASKED = (AS_IT_IS, "another draw", "balanced demonstrations", "renamed", "reversed")
MADE_AT_ONCE = ("about", "empty", "swaps")
Question = tuple[AnnotatedTexts, list]  # the task as it is asked, and the demonstrations


def of_people(task: AnnotatedTexts, shots: int) -> dict[str, Question]:
    "The questions that need annotators, and a third draw, which they are compared with."
    found = {"a third draw": (task, demonstrations_for(task, shots, seed=2))}
    weighted = draw_demonstrations(weighted_train(task), shots, exclude=task.texts)
    found["annotators weighted"] = (task, weighted)
    for number, person in enumerate(example_counts(task).index[:PEOPLE_ASKED]):
        found[f"annotator {number}"] = (task, own_demonstrations(task, person, shots))
    clean = draw_demonstrations(without_copies(task), shots, exclude=task.texts)
    return found | {"without copies": (task, clean)}


def questions(task: AnnotatedTexts, name: str, shots: int) -> dict[str, Question]:
    "All questions about a data set, by name."
    renamed = rename_labels(task, WORDINGS[name])
    backwards = reorder_labels(task, list(task.labels)[::-1])
    balanced = per_label_demonstrations(task.pool, shots, exclude=task.texts)
    found = {
        AS_IT_IS: (task, demonstrations_for(task, shots)),
        "another draw": (task, demonstrations_for(task, shots, seed=1)),
        "balanced demonstrations": (task, balanced),
        "renamed": (renamed, demonstrations_for(renamed, shots)),
        "reversed": (backwards, demonstrations_for(backwards, shots)),
    }
    return found | of_people(task, shots) if task.annotators else found


def swap_texts(name: str, most: int) -> AnnotatedTexts:
    "So many of the studied items that hold a term of one gender, drawn with seed 0."
    side = studied_side(name)
    held = list(dict.fromkeys(swapped_texts(side, GENDER)["id"]))
    order = np.random.default_rng(0).permutation(len(held))[:most]
    return side.at([held[place] for place in sorted(order)])


@dataclass(frozen=True)
class Cell:
    "A model on a data set."

    model: str
    name: str  # of the data set
    plan: Plan
    home: Path  # where its answers are kept

    @cached_property
    def task(self) -> AnnotatedTexts:
        "The texts that are asked about: those of the other studies, prompt 0."
        texts = self.plan.texts[self.model]
        return study_texts(StudyRun(self.model, self.name, texts=texts, shots=self.plan.shots))

    def folder(self, question: str) -> Path:
        "Where the answers to a question are kept."
        return self.home / safe_name(question)

    def is_finished(self) -> bool:
        "Whether all has been asked: the swapped texts come last."
        return (self.home / "swaps.parquet").is_file()

    def ask(self, lm: LM) -> None:
        "Ask what has not been asked."
        task, shots = self.task, self.plan.shots
        asking = {"tolerance": 0, "progress": False}
        for question, (asked, shown) in questions(task, self.name, shots).items():
            if not (self.folder(question) / "trace.json").is_file():
                print(f"{self.model}, {self.name}: {question}", flush=True)
                trace = probe_steps(lm, asked, shots, demonstrations=shown, **asking)
                trace.save(self.folder(question))

        options = {"shots": shots, "tolerance": 0}
        first = Trace.load(self.folder(AS_IT_IS))
        once(self.home / "empty.parquet", partial(empty_answers, lm, task, first, **options))
        held = swap_texts(self.name, self.plan.swapped[self.model])
        once(self.home / "about.parquet", partial(self.about, lm, len(task)))
        once(self.home / "swaps.parquet", partial(swap_changes, lm, held, groups=GENDER, **options))

    def about(self, lm: LM, n: int) -> pd.DataFrame:
        "One row: what was asked, and of which weights."
        weights = lm.fingerprint["weights"]
        about = {"n": n, "shots": self.plan.shots, "dtype": lm.dtype, "weights": weights}
        return pd.DataFrame([about])

    def tables(self) -> dict[str, pd.DataFrame]:
        "What is kept of the answers, by the name of the file."
        kept = {kind: pd.read_parquet(self.home / f"{kind}.parquet") for kind in MADE_AT_ONCE}
        found = model_tables(self.task, self.traces(), kept.pop("swaps"))
        found |= {"runs": kept["about"], "empty": kept["empty"]}
        named = {"model": self.model, "task": self.name}
        return {kind: table.assign(**named) for kind, table in found.items()}

    def traces(self) -> dict[str, Trace]:
        "The answers by question."
        people = [f"annotator {number}" for number in range(PEOPLE_ASKED)]
        names = [*ALWAYS_ASKED, "a third draw", "annotators weighted", *people, "without copies"]
        folders = {name: self.folder(name) for name in names}
        kept = {name: home for name, home in folders.items() if home.is_dir()}
        return {name: Trace.load(home) for name, home in kept.items()}


# ---- all of it


def write_tables(parts: Mapping[str, list[pd.DataFrame]], out: Path) -> None:
    "One file per kind of table: long ones as parquet, the others as csv."
    out.mkdir(parents=True, exist_ok=True)
    for kind, tables in parts.items():
        whole = pd.concat(tables, ignore_index=True)
        if kind in ("scores", "marginals"):
            short = {column: np.float32 for column in [*KEPT, "p", "q"] if column in whole}
            packed = whole.astype(short).to_parquet(index=False, compression="zstd")
            write_whole(out / f"{kind}.parquet", packed)
        else:
            write_whole(out / f"{kind}.csv", whole.to_csv(index=False, float_format="%.6g"))


def of_plan(plan: Plan, runs: Path) -> list[Cell]:
    "All models of a plan on all of its data sets."
    return [
        Cell(model, name, plan, runs / safe_name(model) / safe_name(name))
        for model in plan.texts
        for name in plan.tasks
    ]


def ask_all(cells: list[Cell], trained: Path) -> None:
    "Ask what has not been asked; a model stays loaded for all of its data sets."
    loaded, lm = None, None
    for cell in cells:
        if cell.is_finished():
            continue
        if loaded != cell.model:
            lm = None  # its memory is needed
            loaded, lm = cell.model, load_recorded(cell.model, trained)
        cell.ask(lm)


def gather(plan: Plan, runs: Path, out: Path) -> None:
    "Write the tables of the data sets, and of all that was asked of models."
    parts = {}
    found = [tables_once(runs / "data" / name, partial(data_tables, name)) for name in plan.tasks]
    found += [cell.tables() for cell in of_plan(plan, runs) if cell.is_finished()]
    for tables in found:
        for kind, table in tables.items():
            parts.setdefault(kind, []).append(table)
    write_tables(parts, out)


def record_people(name: str, out: Path) -> None:
    """The audit of a data set whose annotators belong to groups: the data alone, all splits.

    For a set of the confirmation, once that has been opened.
    """
    task = load_task(name)
    whole = {}
    for split, part in task.splits.items():
        frames = audit(part, annotator_groups=task.annotator_groups).frames
        effects = list_effects({kind: frame for kind, frame in frames.items() if kind != "shifts"})
        whole[split] = effects.assign(model=NO_MODEL, task=name, split=split)
    write_tables({f"people_{safe_name(name)}": list(whole.values())}, out)


def main():
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--small", action="store_true", help="a few texts")
    options.add_argument(
        "--people", metavar="SET", help="only the annotators of this set, by group"
    )
    known = [EMBEDDED, LARGER]
    options.add_argument("--models", nargs="+", choices=known, help="ask only these of the plan")
    options.add_argument("--runs", type=Path, default=RUNS, help="where runs are kept")
    options.add_argument("--out", type=Path, default=HERE / "recorded" / "bias")
    args = options.parse_args()
    if args.people:
        record_people(args.people, args.out)
        return
    plan = SMALL if args.small else FULL
    runs = args.runs / ("bias-small" if args.small else "bias")
    cells = of_plan(plan, runs)
    asked = [cell for cell in cells if not args.models or cell.model in args.models]
    ask_all(asked, args.runs / "series")
    gather(plan, runs, args.out)


if __name__ == "__main__":
    main()
