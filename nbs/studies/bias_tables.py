"""Tables of the study `bias`: the audit of a data set, and what is made of a model's answers.

`record_bias.py` asks the models and writes these tables to files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache

import pandas as pd

from mlc_notebooks.alignment import (
    fit_words,
    max_over_generations,
    max_over_generations_calibrated,
    text_groups,
    weight_annotators,
)
from mlc_notebooks.data import AnnotatedTexts, load_task, study_split
from mlc_notebooks.metrics import (
    TERM_GROUPS,
    annotator_agreement,
    audit,
    deduplicate,
    item_metrics,
    length_in_model,
    list_effects,
    order_effects,
    text_twins,
)
from mlc_notebooks.probing import Trace

AS_IT_IS = "as it is"
NO_MODEL = "the data"
WORDS = "words (TF-IDF)"
GENDER = {"gender": TERM_GROUPS["gender"]}
PEOPLE_ASKED = 3  # annotators in context
GROUPS = (
    "short",
    "long",
    "agreed",
    "divided",
    "male terms",
    "female terms",
    "copy in train",
)
KEPT = ["NLL", "L1", "example-F1"]


# ---- the data


@cache
def loaded(name: str) -> AnnotatedTexts:
    "A data set, read once."
    return load_task(name)


@cache
def studied_side(name: str) -> AnnotatedTexts:
    "The items of a data set that any idea may be tried on."
    return study_split(loaded(name)).calibration


def with_train(task: AnnotatedTexts) -> AnnotatedTexts:
    "The task with two splits only: its train split, and its own texts."
    return replace(task, splits={"train": task.pool, "test": replace(task, splits={})})


def data_frames(name: str) -> dict[str, pd.DataFrame]:
    "The audit of a train split: its labels, people and copies; other splits by their counts."
    task = loaded(name)
    if name == "convabuse":  # the rest of it is for confirmation
        found = audit(replace(task.pool, splits=dict(with_train(studied_side(name)).splits)))
        return {part: frame for part, frame in found.frames.items() if part != "shifts"}
    return audit(replace(task.pool, splits=dict(task.splits))).frames


def weighted_train(task: AnnotatedTexts) -> AnnotatedTexts:
    "The train split with annotators weighted by their agreement with the others."
    kappas = annotator_agreement(task.pool, resamples=1).set_index("who")["value"].clip(lower=0)
    everybody = {person for people in task.pool.annotators for person in people}
    weights = {person: float(kappas.get(person, kappas.median())) for person in everybody}
    return weight_annotators(task.pool, weights)


def without_copies(task: AnnotatedTexts) -> AnnotatedTexts:
    "The train split without texts that have a copy, or a near copy, in it or among the task's."
    return deduplicate(with_train(task)).pool


def counts_of(name: str) -> pd.DataFrame:
    "What the remedies change in a train split: rows of what and value."
    task = studied_side(name)
    found = {"train texts": len(task.pool), "train texts without copies": len(without_copies(task))}
    if task.annotators:
        changed = task.pool.majority().ne(weighted_train(task).majority()).any(axis=1)
        found["majority sets that weights change"] = int(changed.sum())
    return pd.DataFrame({"what": list(found), "value": list(found.values())})


# ---- answers


def mean_of(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    "The mean of tables of the same texts and labels."
    return sum(table.loc[tables[0].index, tables[0].columns] for table in tables) / len(tables)


def largest_of(traces: Mapping[str, Trace], labels: list[str]) -> dict[str, pd.DataFrame]:
    "Max-over-generations (n, L) of each question, under the labels' own names."
    tables = {name: max_over_generations(trace) for name, trace in traces.items()}
    tables["renamed"] = tables["renamed"].set_axis(labels, axis=1)
    return {name: table[labels] for name, table in tables.items()}


def remedies(own: Mapping[str, pd.DataFrame], first: Trace) -> dict[str, pd.DataFrame]:
    "Marginals (n, L) by remedy; draws of demonstrations stand among them, to compare with."
    drawn = [own[AS_IT_IS], own["another draw"]]
    found = {
        AS_IT_IS: drawn[0],
        "another draw": drawn[1],
        "two draws averaged": mean_of(drawn),
        "batch calibration": max_over_generations_calibrated(first),
        "balanced demonstrations": own["balanced demonstrations"],
        "labels renamed and averaged": mean_of([drawn[0], own["renamed"]]),
        "listed both ways and averaged": mean_of([drawn[0], own["reversed"]]),
    }
    if "a third draw" in own:
        asked = [own[f"annotator {number}"] for number in range(PEOPLE_ASKED)]
        found["three draws averaged"] = mean_of([*drawn, own["a third draw"]])
        found["annotators weighted"] = own["annotators weighted"]
        found["annotators in context"] = mean_of(asked)
        found["demonstrations without copies"] = own["without copies"]
    return found


def with_groups(scores: pd.DataFrame, groups: Mapping[str, list[str]]) -> pd.DataFrame:
    "Scores with a column for each group, whether the text belongs to it."
    for name in GROUPS:
        scores[name] = scores["id"].isin(groups.get(name, ()))
    return scores


def scores_of(
    tables: Mapping[str, pd.DataFrame], task: AnnotatedTexts, groups: Mapping[str, list[str]]
) -> pd.DataFrame:
    "NLL, L1 and example-F1 of each text and remedy, and the groups of the text."
    parts = []
    for remedy, table in tables.items():
        p = table.loc[list(task.ids), list(task.labels)].to_numpy()
        scores = item_metrics(p, task.distribution().to_numpy(), task.labels.is_multi)[KEPT]
        scores.insert(0, "id", list(task.ids))
        parts.append(scores.assign(remedy=remedy))
    return with_groups(pd.concat(parts, ignore_index=True), groups)


def word_scores(name: str) -> pd.DataFrame:
    "The same of words, with the train split as it is and without copies; all studied items."
    task = studied_side(name)
    tables = {
        AS_IT_IS: fit_words(task.pool).predict(task),
        "without copies": fit_words(without_copies(task)).predict(task),
    }
    twins = text_twins(with_train(task)).query("split == 'test' and twin_split == 'train'")
    groups = text_groups(task, GENDER) | {"copy in train": twins["id"].tolist()}
    return scores_of(tables, task, groups).assign(model=WORDS, task=name)


def data_tables(name: str) -> dict[str, pd.DataFrame]:
    "What is kept of a data set without a model, by the name of the file."
    print(f"{name}: the data", flush=True)
    frames = data_frames(name)
    tables = {
        "effects": list_effects(frames),
        "leaks": frames["leaks"],
        "priors": frames["priors"],
        "counts": counts_of(name),
    }
    if "agreement" in frames:
        tables["agreement"] = frames["agreement"]
    tables = {kind: table.assign(model=NO_MODEL, task=name) for kind, table in tables.items()}
    return tables | {"scores": word_scores(name)}


def place_effects(traces: Mapping[str, Trace], labels: list[str]) -> pd.DataFrame:
    "What it is worth to be listed first: of the probabilities, and of the labels written."
    pair = [traces[AS_IT_IS], traces["reversed"]]
    orders = [labels, labels[::-1]]
    found = {
        "probability": [max_over_generations(trace)[labels] for trace in pair],
        "written": [trace.predictions()[labels] for trace in pair],
    }
    parts = []
    for quantity, tables in found.items():
        parts.append(order_effects(tables, orders).assign(quantity=quantity))
    return pd.concat(parts, ignore_index=True)


def long_marginals(own: Mapping[str, pd.DataFrame], task: AnnotatedTexts) -> pd.DataFrame:
    "What was answered to each question: one row per text and label, with the annotators' share q."
    parts = []
    for question, table in own.items():
        long = table.rename_axis("id").reset_index().melt("id", var_name="label", value_name="p")
        parts.append(long.assign(question=question))
    shares = task.distribution().rename_axis("id").reset_index()
    shares = shares.melt("id", var_name="label", value_name="q")
    return pd.concat(parts, ignore_index=True).merge(shares, on=["id", "label"], how="left")


def model_tables(
    task: AnnotatedTexts,
    traces: Mapping[str, Trace],  # by question
    swaps: pd.DataFrame,
) -> dict[str, pd.DataFrame]:
    "What is kept of a model's answers about a data set, by the name of the file."
    labels = list(task.labels)
    own = largest_of(traces, labels)
    frames = {
        "swaps": swaps,
        "places": place_effects(traces, labels),
        "length_in_model": length_in_model(traces[AS_IT_IS]),
    }
    scores = scores_of(remedies(own, traces[AS_IT_IS]), task, text_groups(task, GENDER))
    return {
        "effects": list_effects(frames),
        "scores": scores,
        "marginals": long_marginals(own, task),
    }
