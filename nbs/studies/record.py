"""Record what the studies read: every run of the plan that is not recorded yet.

    python nbs/studies/record.py                  # exploration: hours on two cores
    python nbs/studies/record.py --domains        # more data sets, fewer texts
    python nbs/studies/record.py --confirm        # confirmation sets, once the method is named
    python nbs/studies/record.py --small          # a few texts, to see that all of it works

It can be stopped at any time and goes on where it was. A model "NAME-tuned" is NAME after
`train_series` (alignment.series), "NAME-tuned-rlSEED" is that one after `fit_rl`; they are trained
first if they have not been. PROTOCOL.md says why these models, sets and prompts.
"""

import argparse
from pathlib import Path

from mlc_notebooks.alignment import (
    SERIES,
    StudyRun,
    fit_rl,
    gather_records,
    is_recorded,
    record_run,
    train_series,
)
from mlc_notebooks.data import load_task
from mlc_notebooks.models import LM, load_lm

HERE = Path(__file__).parent
RUNS = HERE.parent.parent / "runs"

EMBEDDED = "smollm2-135m-emotions"
TUNED = [f"{name}-tuned" for name in SERIES]
SMALLEST, *LARGER = SERIES
REINFORCED = [f"{SMALLEST}-tuned-rl{seed}" for seed in (0, 1, 2)]
REINFORCED_ON = "brighter-eng"
EXPLORATION = [
    "brighter-eng",
    "goemotions",
    "convabuse",
    "crowdtruth",
    "brighter-ron",
    "xed-en",
    "nlupp-banking",
    "caves",
    "xed-fi",
]
DOMAINS = [
    "tos-unfair-en",
    "kote",
    "reuters21578",
    "cooking-stackexchange",
    "chaosnli-snli",
    "chaosnli-mnli",
    "mmlu-pro",
    "banking77",
    "clinc150",
]
PRIMARY = [
    "brighter-afr",
    "brighter-swe",
    "brighter-ron",
    "convabuse",
    "nlupp-hotels",
    "nhs-feedback",
]
SECONDARY = ["hs-brexit", "brighter-arq", "goemotions-raters"]


def looks_at(prompt: int) -> int:
    "At how many prefixes the output tree of a text is read: fewer for prompts after the first."
    return 8 if prompt == 0 else 4


def exploration() -> list[StudyRun]:
    "Prompt by prompt, so that every model has been seen on every set before the second prompt."
    plan = []
    for prompt in (0, 1, 2):
        for model in (EMBEDDED, SMALLEST, *TUNED):
            for task in EXPLORATION:
                plan.append(StudyRun(model, task, prompt, looks=looks_at(prompt)))
        if prompt == 0:
            for model in REINFORCED:
                plan += [StudyRun(model, task, 0) for task in EXPLORATION]
            for model in LARGER:
                plan += [StudyRun(model, task, 0, texts=100) for task in EXPLORATION]
    return plan


def domains() -> list[StudyRun]:
    "Further data sets, for what goes with the effect."
    models = (EMBEDDED, *TUNED)
    return [StudyRun(model, task, 0, texts=100) for model in models for task in DOMAINS]


def confirmation() -> list[StudyRun]:
    "The sets that nobody has looked at, for the models tuned alike and the embedded one."
    return [
        StudyRun(model, task, prompt, "confirmation", looks=looks_at(prompt))
        for prompt in (0, 1, 2)
        for model in (EMBEDDED, *TUNED)
        for task in PRIMARY + (SECONDARY if prompt == 0 else [])
    ]


def small() -> list[StudyRun]:
    "A few texts of data that come with the package, asked of the embedded model."
    few = {"texts": 6, "shots": 2, "looks": 3}
    return [
        StudyRun(EMBEDDED, task, prompt, **few)
        for task in ("brighter-eng", "convabuse")
        for prompt in (0, 1)
    ]


def load_tuned(base: str, trained: Path) -> LM:
    "A model of the series after tuning, which is done first if it has not been."
    if not (trained / base / "mix.json").is_file():  # what a training writes last
        train_series(base, trained / base)
    return load_lm(str(trained / base), dtype="bfloat16")


def load_reinforced(model: str, trained: Path) -> LM:
    "A tuned model after reinforcement with the seed that its name ends with."
    base, seed = model.split("-tuned-rl")
    start = load_tuned(base, trained)
    return fit_rl(
        load_task(REINFORCED_ON, "train"), start, trained / model, steps=60, seed=int(seed)
    ).lm


def load_recorded(model: str, trained: Path) -> LM:
    "A model by its name in the records."
    if model in REINFORCED:
        return load_reinforced(model, trained)
    if model in TUNED:
        return load_tuned(model.removesuffix("-tuned"), trained)
    return load_lm(model, dtype="bfloat16")


def record(plan: list[StudyRun], folder: Path, trained: Path) -> None:
    "All runs of the plan that are not recorded; a model stays loaded while runs in a row ask for it."
    left = [run for run in plan if not is_recorded(run, folder)]
    loaded, lm = None, None  # a name and its model
    for number, run in enumerate(left, start=1):
        if loaded != run.model:
            lm = None  # its memory is needed
            loaded, lm = run.model, load_recorded(run.model, trained)
        print(f"{number} of {len(left)}: {run.model}, {run.key}", flush=True)
        record_run(run, lm, folder)


def main():
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    which = options.add_mutually_exclusive_group()
    which.add_argument("--small", action="store_true", help="a few texts")
    which.add_argument("--domains", action="store_true", help="more data sets, fewer texts")
    which.add_argument("--confirm", action="store_true", help="the confirmation sets")
    known = [EMBEDDED, *SERIES, *TUNED, *REINFORCED]
    options.add_argument("--models", nargs="+", choices=known, help="only these of the plan")
    options.add_argument("--runs", type=Path, default=RUNS, help="where runs are kept")
    options.add_argument("--out", type=Path, help="gather the records of all runs here")
    args = options.parse_args()
    if args.small:
        plan = small()
    elif args.domains:
        plan = domains()
    elif args.confirm:
        plan = confirmation()
    else:
        plan = exploration()
    plan = [run for run in plan if not args.models or run.model in args.models]
    record(plan, args.runs / "studies", args.runs / "series")
    if args.out:
        gather_records(args.runs / "studies", args.out)


if __name__ == "__main__":
    main()
