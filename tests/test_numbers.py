"""Numbers that are none: hostile inputs to the metrics and to the methods of alignment.

Each is refused with one sentence that names the value or the argument, before any work, or gives
the value that is right. Formulas are compared with scikit-learn, scipy and numpy.
"""

import json
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, log_expit, logit
from sklearn.metrics import brier_score_loss, f1_score, log_loss

from mlc_notebooks.alignment import (
    Platt,
    ask_pairs,
    ask_questions,
    average_prompts,
    binary_breakdown,
    bradley_terry,
    compare_to_none,
    compare_to_none_calibrated,
    conformal_sets,
    content_free_prior,
    divide_prior,
    draw_prompt,
    fit_platt,
    fit_temperature,
    hard,
    log_odds,
    max_over_generations,
    mean_marginals,
    path_product,
    set_metrics,
    step_prior,
    unary_breakdown,
    written_probability,
    zero_shot,
    zero_shot_method,
)
from mlc_notebooks.data import AnnotatedTexts, LabelSet, list_prompts, load_task
from mlc_notebooks.metrics import (
    align_report,
    bootstrap,
    bootstrap_mean,
    bootstrap_means,
    bootstrap_median,
    bootstrap_sets,
    by_trace,
    calibration_error,
    compare_methods,
    constant_marginals,
    derangement,
    example_f1,
    first_and_final,
    first_step_quality,
    flip_demonstrations,
    item_metrics,
    label_order,
    label_ranking_precision,
    macro_auroc,
    macro_f1,
    mean_table,
    metric_table,
    micro_f1,
    next_label_shares,
    next_labels,
    noise_ceiling,
    order_accuracy,
    ordered_names,
    paired_difference,
    phenomenon_table,
    pooled_metrics,
    prediction_metrics,
    prior_marginals,
    probe_metrics,
    rank_histogram,
    sorted_profile,
    spikiness,
    step_profile,
    summarise,
    unrelated_words,
    vary_demonstration_labels,
    vary_label_order,
    vary_multi_share,
    vary_shots,
)
from mlc_notebooks.probing import Trace

NAN, INF = np.nan, np.inf
LABELS = LabelSet(["joy", "fear", "anger"])
IDS = [f"t{i}" for i in range(12)]


def made_task(labels=LABELS, seed=0, annotators=3, ids=IDS) -> AnnotatedTexts:
    rng = np.random.default_rng(seed)
    votes = [rng.integers(0, 2, (annotators, len(labels))).astype(np.uint8) for _ in ids]
    if not labels.is_multi:
        chosen = rng.integers(0, len(labels), (len(ids), annotators))
        votes = [np.eye(len(labels), dtype=np.uint8)[row] for row in chosen]
    return AnnotatedTexts("made", ids, [f"text {i}" for i in ids], labels, votes)


def made_trace(labels=LABELS, ids=IDS) -> Trace:
    "Two steps for each text: joy, fear."
    rng = np.random.default_rng(1)
    rows = [(item, step, name) for item in ids for step, name in [(1, "joy"), (2, "fear")]]
    steps = pd.DataFrame(rows, columns=["example", "step", "wrote"])
    steps = steps.assign(mass=0.9, go=0.5, stop=0.5, flags=[()] * len(rows))
    items = {"text": "x", "output": "", "outcomes": [("joy", "fear")] * len(ids)}
    items = pd.DataFrame(items | {"flags": [()] * len(ids)}, pd.Index(ids, name="id"))
    probs = rng.dirichlet(np.ones(len(labels.outcomes)), len(rows))
    return Trace(labels, items, steps, np.log(probs), {})


TASK, TRACE = made_task(), made_trace()
ONE_OF = made_task(LabelSet(["joy", "fear", "anger"], None))
TURNED = made_task(LabelSet(["anger", "joy", "fear"]))
OTHER = made_task(LabelSet(["joy", "fear", "rage"]))
NOBODY = replace(TASK, annotations=[np.zeros((0, 3), np.uint8)] * 12)
NO_TEXTS = replace(TRACE, items=TRACE.items[:0], steps=TRACE.steps[:0], logprobs=TRACE.logprobs[:0])
MIXED_UP = replace(TRACE, items=TRACE.items[::-1])
P = pd.DataFrame(np.random.default_rng(2).random((12, 3)), IDS, list(LABELS))
FIRST = pd.Series(range(12), IDS, dtype=float)
WINS = np.array([[[0, 0.7, 0.6], [0.3, 0, 0.5], [0.4, 0.5, 0]]])
ROWS = pd.DataFrame({"example": ["a", "a", "b"], "x": [1.0, 2.0, 3.0]})


def with_value(value, table=P, row=4, column=1):
    "The table with another value of item t4, label fear."
    changed = table.to_numpy(float, copy=True)
    changed[row, column] = value
    return pd.DataFrame(changed, table.index, table.columns)


def with_nan(trace):
    logprobs = trace.logprobs.copy()
    logprobs[5] = NAN
    return replace(trace, logprobs=logprobs)


BROKEN = with_nan(TRACE)
TWICE = pd.concat([P, P[:1]])
SETS = (P > 0.5).astype(int)


def mean_of(chosen):
    return float(chosen.mean())


# What is refused, and the words that must stand in the message

INTERVALS = {
    "no items": (lambda: bootstrap(mean_of, 0), "n_items is 0: give a whole number"),
    "items 2.5": (lambda: bootstrap(mean_of, 2.5), "n_items is 2.5"),
    "no resamples": (lambda: bootstrap(mean_of, 3, 0), "resamples is 0"),
    "resamples nan": (lambda: bootstrap(mean_of, 3, NAN), "resamples is nan"),
    "resamples True": (lambda: bootstrap(mean_of, 3, True), "resamples is True"),
    "seed -1": (lambda: bootstrap(mean_of, 3, seed=-1), "seed is -1: give a whole number"),
    "seed text": (lambda: bootstrap(mean_of, 3, seed="7"), "seed is '7'"),
    "coverage 95": (lambda: bootstrap(mean_of, 3, coverage=95), "coverage is 95: give a number"),
    "coverage 0": (lambda: bootstrap(mean_of, 3, coverage=0), "coverage is 0"),
    "coverage 1": (lambda: bootstrap(mean_of, 3, coverage=1), "coverage is 1"),
    "coverage nan": (lambda: bootstrap_mean([1, 2], coverage=NAN), "coverage is nan"),
    "mean of nan": (lambda: bootstrap_mean([1, NAN]), "values holds nan at position 1"),
    "mean of inf": (lambda: bootstrap_mean([INF, 1]), "values holds inf at position 0"),
    "mean of a table": (lambda: bootstrap_mean([[1, 2]]), r"values has the shape \(1, 2\)"),
    "means with nan": (lambda: bootstrap_means({"a": [NAN]}), "values holds nan at position 0"),
    "median of nan": (lambda: bootstrap_median([1, NAN, 3]), "values holds nan at position 1"),
    "pairs: other items": (lambda: paired_difference(FIRST, FIRST[1:]), "'t0' is in one"),
    "pairs: an item twice": (
        lambda: paired_difference(FIRST, pd.concat([FIRST, FIRST[:1]])),
        "second has two values of item 't0'",
    ),
    "pairs: lists": (lambda: paired_difference([1], [2]), "first is a list: give a Series"),
    "pairs: nan": (lambda: paired_difference(FIRST, FIRST * NAN), "values holds nan"),
    "table: no column": (lambda: mean_table(ROWS, ["y"]), "a column of values is 'y': choose"),
    "table: no group": (lambda: mean_table(ROWS, ["x"], by=["z"]), "a column of by is 'z'"),
    "table: a string": (lambda: mean_table(ROWS, "x"), "values is 'x': give a list"),
    "table: by a string": (lambda: mean_table(ROWS, ["x"], by="x"), "by is 'x': give a list"),
    "table: no item column": (lambda: mean_table(ROWS, ["x"], item="id"), "item is 'id'"),
    "table: a row of nobody": (
        lambda: mean_table(ROWS.assign(example=["a", None, "b"]), ["x"]),
        "row 1 is empty in the column 'example'",
    ),
    "table: a row of no group": (
        lambda: mean_table(ROWS.assign(step=[1, 2, NAN]), ["x"], by=["step"]),
        "row 2 is empty in the column 'step'",
    ),
    "table: inf": (lambda: mean_table(ROWS.assign(x=[1, INF, 2]), ["x"]), "'x' holds an infinite"),
    "table: resamples": (lambda: mean_table(ROWS, ["x"], resamples=-1), "resamples is -1"),
}
TRACES = {
    f"{function.__name__}: {kind}": (lambda function=function, trace=trace: function(trace), words)
    for function in (
        step_profile,
        spikiness,
        sorted_profile,
        next_labels,
        next_label_shares,
        first_and_final,
        rank_histogram,
        label_order,
        summarise,
        phenomenon_table,
        hard,
        compare_to_none,
        compare_to_none_calibrated,
        max_over_generations,
        written_probability,
        path_product,
        step_prior,
        divide_prior,
    )
    for kind, trace, words in (
        ("no texts", NO_TEXTS, "the trace has no texts"),
        ("nan", BROKEN, "item 't2', step 2: the probabilities are NaN"),
        ("another order", MIXED_UP, "in their order"),
        ("None", None, "trace is NoneType"),
    )
}
PHENOMENON = {
    "most_steps 0": (lambda: spikiness(TRACE, 0), "most_steps is 0"),
    "most_steps nan": (lambda: next_label_shares(TRACE, NAN), "most_steps is nan"),
    "step 0": (lambda: sorted_profile(TRACE, 0), "step is 0"),
    "step 1.5": (lambda: sorted_profile(TRACE, 1.5), "step is 1.5"),
    "rank 0": (lambda: rank_histogram(TRACE, (1, 0)), "a rank is 0"),
    "rank text": (lambda: rank_histogram(TRACE, ["1"]), "a rank is '1'"),
    "positions 0": (lambda: order_accuracy(TRACE, TASK, 0), "positions is 0"),
    "steps -1": (lambda: summarise(TRACE, -1), "steps is -1"),
    "quality: resamples": (lambda: first_step_quality(TRACE, TASK, 0), "resamples is 0"),
    "quality: other labels": (lambda: first_step_quality(TRACE, OTHER), "'rage'"),
    "order: other labels": (lambda: order_accuracy(TRACE, OTHER), "'rage'"),
    "table: other labels": (lambda: phenomenon_table(TRACE, OTHER), "'rage'"),
    "order: other texts": (lambda: order_accuracy(TRACE, TASK.select([0])), "has no item 't1'"),
    "order: nobody asked": (lambda: order_accuracy(TRACE, NOBODY), "nobody annotated a text of"),
    "by_trace: none": (lambda: by_trace({}, label_order), "traces is an empty dict"),
    "by_trace: a list": (lambda: by_trace([TRACE], label_order), "give a dict"),
    "by_trace: no task": (
        lambda: by_trace({"a": TRACE, "b": TRACE}, order_accuracy, {"a": TASK}),
        "a trace with a task is 'b': choose one of a",
    ),
}
SETS_AND_RANKS = {
    "sets: shares": (lambda: bootstrap_sets(P, SETS), "found holds 0"),
    "sets: gold shares": (lambda: bootstrap_sets(SETS, P), "gold holds 0"),
    "sets: nan": (lambda: bootstrap_sets(with_value(NAN, SETS), SETS), "holds nan in row 4"),
    "sets: 2": (lambda: micro_f1(2 * SETS, SETS), "found holds 2.0"),
    "sets: two shapes": (lambda: macro_f1(SETS[:3], SETS), r"shape \(3, 3\) and gold \(12, 3\)"),
    "sets: one row": (lambda: example_f1([1, 0], [1, 0]), r"found has the shape \(2,\)"),
    "sets: words": (lambda: example_f1([["joy"]], [["joy"]]), "something else than numbers"),
    "sets: resamples": (lambda: bootstrap_sets(SETS, SETS, 0), "resamples is 0"),
    "predictions: marginals": (lambda: prediction_metrics(P, TASK), "predicted holds 0"),
    "predictions: an array": (
        lambda: prediction_metrics(SETS.to_numpy(), TASK),
        "predicted is ndarray and no table",
    ),
    "predictions: no label": (
        lambda: prediction_metrics(SETS[["joy", "fear"]], TASK),
        "no column 'anger'",
    ),
    "predictions: an id twice": (
        lambda: prediction_metrics(pd.concat([SETS, SETS[:1]]), TASK),
        "'t0' has two rows",
    ),
    "predictions: no rows": (lambda: prediction_metrics(SETS[:0], TASK), "predicted has no rows"),
    "predictions: threshold": (lambda: prediction_metrics(SETS, TASK, 1.5), "threshold is 1.5"),
    "predictions: threshold nan": (lambda: prediction_metrics(SETS, TASK, NAN), "is nan"),
    "probes: none": (lambda: probe_metrics({}), "predictions is empty"),
    "lrap: nan": (lambda: label_ranking_precision(with_value(NAN), SETS), "marginals holds nan"),
    "lrap: shares": (lambda: label_ranking_precision(P, P), "relevant holds 0"),
    "lrap: one row for all": (lambda: label_ranking_precision(P[:1], SETS), r"\(1, 3\) and"),
    "auroc: nan": (lambda: macro_auroc(SETS, with_value(NAN)), "marginals holds nan in row 4"),
    "auroc: shares": (lambda: macro_auroc(P, P), "gold holds 0"),
    "auroc: two shapes": (lambda: macro_auroc(SETS[:3], P), r"\(3, 3\) and marginals \(12, 3\)"),
}
ALIGNMENT = {
    "report: {}": (lambda: align_report({}, TASK), "marginals is an empty dict"),
    "report: None": (lambda: align_report(None, TASK), "marginals is NoneType: give a DataFrame"),
    "report: an array": (lambda: align_report(P.to_numpy(), TASK), "marginals is ndarray"),
    "report: a list": (lambda: align_report([P], TASK), "marginals is list"),
    "report: no table": (
        lambda: align_report({"a": P, "b": None}, TASK),
        "the table of 'b' is None",
    ),
    "report: an array in it": (
        lambda: align_report({"mine": P.to_numpy()}, TASK),
        "the table of 'mine' is ndarray",
    ),
    "report: no rows": (lambda: align_report(P[:0], TASK), "has no rows"),
    "report: constant": (lambda: align_report({"constant": P}, TASK), "'constant' is a row that"),
    "report: label prior": (lambda: align_report({"label prior": P}, TASK), "'label prior' is a"),
    "report: people": (
        lambda: align_report({"annotators, split-half": P}, TASK),
        "'annotators, split-half' is a row",
    ),
    "report: eps 0": (lambda: align_report(P, TASK, eps=0), "eps is 0: give a number above 0"),
    "report: eps .5": (lambda: align_report(P, TASK, eps=0.5), "eps is 0.5"),
    "report: eps nan": (lambda: align_report(P, TASK, eps=NAN), "eps is nan"),
    "report: eps -1": (lambda: align_report(P, TASK, eps=-1), "eps is -1"),
    "report: threshold nan": (lambda: align_report(P, TASK, threshold=NAN), "threshold is nan"),
    "report: threshold 0": (lambda: align_report(P, TASK, threshold=0), "threshold is 0"),
    "report: threshold 1": (lambda: align_report(P, TASK, threshold=1), "threshold is 1"),
    "report: threshold 50": (lambda: align_report(P, TASK, threshold=50), "threshold is 50"),
    "report: resamples 0": (lambda: align_report(P, TASK, resamples=0), "resamples is 0"),
    "report: p 1.7": (
        lambda: align_report(with_value(1.7), TASK),
        "item 't4', label 'fear': 1.7 is no probability",
    ),
    "report: p -.1": (lambda: align_report(with_value(-0.1), TASK), "-0.1 is no probability"),
    "report: p nan": (lambda: align_report(with_value(NAN), TASK), "nan is no probability"),
    "report: p inf": (lambda: align_report(with_value(INF), TASK), "inf is no probability"),
    "report: words": (
        lambda: align_report(P.astype(object).replace(P.iat[0, 0], "high"), TASK),
        "el",
    ),
    "report: an id twice": (lambda: align_report(TWICE, TASK), "'t0' has two rows"),
    "report: unknown id": (lambda: align_report(P.rename({"t3": "z"}), TASK), "has no item 'z'"),
    "report: no label": (lambda: align_report(P[["joy", "anger"]], TASK), "no column 'fear'"),
    "report: a label twice": (
        lambda: align_report(P[["joy", "fear", "anger", "joy"]], TASK),
        "2 columns 'joy'",
    ),
    "report: other items": (
        lambda: align_report({"a": P, "b": P[1:]}, TASK),
        "'b' and 'a' do not score the same items: 't0' is in one only",
    ),
    "report: nobody asked": (lambda: align_report(P, NOBODY), "'t0' has no annotations"),
    "report: sums": (lambda: align_report(P, ONE_OF), "item 't0': the marginals sum to"),
    "report: certain of all": (lambda: align_report(P * 0 + 1, ONE_OF), "sum to 3"),
    "compare: unknown": (
        lambda: compare_methods({"a": P}, TASK, "b"),
        "against is 'b': choose one",
    ),
    "compare: {}": (lambda: compare_methods({}, TASK, "a"), "marginals is an empty dict"),
    "compare: eps": (lambda: compare_methods({"a": P, "b": P}, TASK, "a", eps=0), "eps is 0"),
    "compare: seed": (lambda: compare_methods({"a": P, "b": P}, TASK, "a", seed=-3), "seed is -3"),
    "compare: other items": (
        lambda: compare_methods({"a": P, "b": P[1:]}, TASK, "a"),
        "item 't0' is in one of the two only",
    ),
    "table: eps": (lambda: metric_table(P, TASK, eps="tiny"), "eps is 'tiny'"),
    "items: p": (lambda: item_metrics(P + 1, P), "p holds 1"),
    "items: q nan": (lambda: item_metrics(P, with_value(NAN)), "q holds nan in row 4, column 1"),
    "items: two shapes": (lambda: item_metrics(P[:1], P), r"p has the shape \(1, 3\)"),
    "items: threshold": (lambda: item_metrics(P, P, threshold=2), "threshold is 2"),
    "ece: no bins": (lambda: calibration_error(P, P, 0), "bins is 0"),
    "ece: bins 2.5": (lambda: calibration_error(P, P, 2.5), "bins is 2.5"),
    "ece: p": (lambda: calibration_error(-P, P), "p holds -0"),
    "pooled: q": (lambda: pooled_metrics(P, 3 * P), "q holds"),
    "constant 10": (lambda: constant_marginals(TASK, 10), "value is 10"),
    "constant nan": (lambda: constant_marginals(TASK, NAN), "value is nan"),
    "prior: no split": (lambda: prior_marginals(TASK), "made has no train split"),
    "prior: nobody asked": (
        lambda: prior_marginals(replace(TASK, splits={"train": NOBODY})),
        "nobody annotated the train split of made",
    ),
    "ceiling: no seeds": (lambda: noise_ceiling(TASK, 0), "seeds is 0"),
    "ceiling: eps": (lambda: noise_ceiling(TASK, eps=1), "eps is 1"),
    "ceiling: resamples": (lambda: noise_ceiling(TASK, resamples=0), "resamples is 0"),
}
L = logit(P)
CALIBRATION = {
    "log-odds of 1.7": (
        lambda: log_odds(with_value(1.7)),
        "item 't4', label 'fear': 1.7 is no probability",
    ),
    "log-odds of log-odds": (lambda: log_odds(L), "is no probability"),
    "log-odds of nan": (lambda: log_odds(with_value(NAN)), "nan is no probability"),
    "log-odds of an array": (lambda: log_odds(P.to_numpy()), "ndarray and no table"),
    "log-odds: eps 0": (lambda: log_odds(P, 0), "eps is 0"),
    "log-odds: eps .7": (lambda: log_odds(P, 0.7), "eps is 0.7"),
    "platt: no rows": (lambda: fit_platt(L[:0], TASK), "has no rows"),
    "platt: no column": (lambda: fit_platt(L[["joy", "fear"]], TASK), "no column 'anger'"),
    "platt: an id twice": (lambda: fit_platt(pd.concat([L, L]), TASK), "'t0' has two rows"),
    "platt: nan": (
        lambda: fit_platt(with_value(NAN, L), TASK),
        "'t4', label 'fear': nan is no log",
    ),
    "platt: inf": (lambda: fit_platt(with_value(INF, L), TASK), "inf is no log-odds"),
    "platt: unknown item": (lambda: fit_platt(L.rename({"t0": "z"}), TASK), "has no item 'z'"),
    "platt: nobody asked": (lambda: fit_platt(L, NOBODY), "'t0' has no annotations"),
    "platt: ridge 0": (lambda: fit_platt(L, TASK, ridge=0), "ridge is 0"),
    "platt: ridge -1": (lambda: fit_platt(L, TASK, ridge=-1), "ridge is -1"),
    "platt: ridge nan": (lambda: fit_temperature(L, TASK, ridge=NAN), "ridge is nan"),
    "temperature: no rows": (lambda: fit_temperature(L[:0], TASK), "has no rows"),
    "temperature: one class": (
        lambda: fit_temperature(L, replace(TASK, annotations=[np.zeros((2, 3), np.uint8)] * 12)),
        "no temperature to fit",
    ),
    "map: slope nan": (lambda: Platt(("joy",), np.array([NAN]), np.zeros(1)), r"slope is \[nan\]"),
    "map: too few": (lambda: Platt(("joy", "fear"), np.ones(1), np.zeros(2)), r"slope is \[1.\]"),
    "map: other table": (
        lambda: Platt(("rage",), np.ones(1), np.zeros(1))(L),
        "no column 'rage'",
    ),
    "map: of nan": (lambda: fit_platt(L, TASK)(with_value(NAN, L)), "nan is no log-odds"),
    "prior: shape": (lambda: divide_prior(TRACE, np.ones((1, 3))), r"prior has the shape \(1, 3\)"),
    "prior: one row": (lambda: divide_prior(TRACE, np.ones(4)), r"prior has the shape \(4,\)"),
    "prior: no rows": (lambda: divide_prior(TRACE, np.ones((0, 4))), r"the shape \(0, 4\)"),
    "prior: 0": (
        lambda: divide_prior(TRACE, np.eye(4)),
        "prior holds 0.0 at step 1, outcome 'fear'",
    ),
    "prior: nan": (lambda: divide_prior(TRACE, np.full((1, 4), NAN)), "prior holds nan at step 1"),
    "prior: -1": (lambda: divide_prior(TRACE, -np.ones((1, 4))), "prior holds -1.0"),
    "coverage 0": (lambda: conformal_sets(P, TASK, P, 0), "coverage is 0"),
    "coverage 1": (lambda: conformal_sets(P, TASK, P, 1), "coverage is 1"),
    "coverage 90": (lambda: conformal_sets(P, TASK, P, 90), "coverage is 90"),
    "coverage nan": (lambda: conformal_sets(P, TASK, P, NAN), "coverage is nan"),
    "conformal: no rows": (lambda: conformal_sets(P[:0], TASK, P), "has no rows"),
    "conformal: too few": (
        lambda: conformal_sets(P, TASK, P, 0.95),
        "12 calibration items are too few for 95% coverage: give at least 19",
    ),
    "conformal: .999": (lambda: conformal_sets(P, TASK, P, 0.999), "99.9% coverage: .* 999"),
    "conformal: p nan": (lambda: conformal_sets(P, TASK, with_value(NAN)), "nan is no probability"),
    "conformal: no label": (lambda: conformal_sets(P, TASK, P[["joy"]]), "no column 'fear'"),
    "conformal: threshold": (lambda: conformal_sets(P, TASK, P, threshold=NAN), "threshold is nan"),
    "set metrics: marginals": (lambda: set_metrics(P, TASK), "sets holds 0"),
    "set metrics: threshold": (lambda: set_metrics(SETS, TASK, 0), "threshold is 0"),
    "mean: no tables": (lambda: mean_marginals([]), "there are no tables"),
    "mean: other items": (lambda: mean_marginals([P, P[1:]]), "table 1 has other items"),
    "mean: other labels": (lambda: mean_marginals([P, P[["joy", "fear"]]]), "no column 'anger'"),
    "mean: an id twice": (lambda: mean_marginals([P, TWICE]), "table 1: item 't0' has two rows"),
    "needs": (lambda: zero_shot_method("text"), "needs is 'text': choose one of trace, model"),
    "hard: eps": (lambda: hard(TRACE, eps=0.5), "eps is 0.5"),
    "prompt: seed": (lambda: draw_prompt(TASK, -1), "seed is -1"),
    "derangement: seed": (lambda: derangement(LABELS, -1), "seed is -1"),
    "derangement: seed 1.5": (lambda: derangement(LABELS, 1.5), "seed is 1.5"),
    "order: unknown": (lambda: ordered_names(LABELS, "sorted", 0), "order is 'sorted': choose"),
    "order: seed": (lambda: ordered_names(LABELS, "random", -1), "seed is -1"),
    "flip: no swap": (
        lambda: flip_demonstrations([("x", ("joy",))], LABELS, {"fear": "joy"}),
        "a label of the demonstrations is 'joy': choose one of fear",
    ),
}


def win_of(value):
    wins = WINS.copy()
    wins[0, 1, 2] = value
    return wins


BRADLEY_TERRY = {
    "nan": (lambda: bradley_terry(win_of(NAN)), "item 0 has a win of nan, of outcome 1 over 2"),
    "inf": (lambda: bradley_terry(win_of(INF)), "item 0 has a win of inf"),
    "negative": (lambda: bradley_terry(win_of(-0.1)), "item 0 has a win of -0.1"),
    "one item": (lambda: bradley_terry(WINS[0]), r"wins has the shape \(3, 3\): give \(n, K, K\)"),
    "not square": (lambda: bradley_terry(WINS[:, :2]), r"wins has the shape \(1, 2, 3\)"),
    "a list of shares": (lambda: bradley_terry([0.3, 0.7]), r"wins has the shape \(2,\)"),
    "ridge nan": (lambda: bradley_terry(WINS, NAN), "ridge is nan"),
    "ridge inf": (lambda: bradley_terry(WINS, INF), "ridge is inf"),
    "ridge -1": (lambda: bradley_terry(WINS, -1), "ridge is -1: give a number of at least 0"),
    "ridge None": (lambda: bradley_terry(WINS, None), "ridge is None"),
    "0 rounds": (lambda: bradley_terry(WINS, most_rounds=0), "most_rounds is 0"),
    "rounds 2.5": (lambda: bradley_terry(WINS, most_rounds=2.5), "most_rounds is 2.5"),
    "tolerance 0": (lambda: bradley_terry(WINS, tolerance=0), "tolerance is 0"),
    "tolerance nan": (lambda: bradley_terry(WINS, tolerance=NAN), "tolerance is nan"),
}
TABLES = {
    "intervals": INTERVALS,
    "traces": TRACES,
    "phenomenon": PHENOMENON,
    "sets and ranks": SETS_AND_RANKS,
    "alignment": ALIGNMENT,
    "calibration": CALIBRATION,
    "bradley-terry": BRADLEY_TERRY,
}
REFUSED = [
    pytest.param(call, words, id=f"{kind}: {name}")
    for kind, table in TABLES.items()
    for name, (call, words) in table.items()
]


@pytest.mark.parametrize("call, words", REFUSED)
def test_it_is_refused_by_name(call, words):
    with pytest.raises(ValueError, match=words) as refused:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a softmax of NaN
            call()
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


@pytest.fixture(scope="module")
def real():
    "Texts with a train split."
    return load_task("brighter-eng").sample(4, seed=0, kind="main")


QUESTIONS = list_prompts(["x"], LABELS)
WITH_A_MODEL = {
    "shots -1": (lambda lm, task: zero_shot(lm, task, ["hard"], shots=-1), "shots is -1"),
    "shots 1.5": (lambda lm, task: zero_shot(lm, task, ["hard"], shots=1.5), "shots is 1.5"),
    "seed -1": (lambda lm, task: zero_shot(lm, task, ["hard"], shots=0, seed=-1), "seed is -1"),
    "a string": (lambda lm, task: zero_shot(lm, task, "hard"), "methods is 'hard': give a list"),
    "no methods": (lambda lm, task: zero_shot(lm, task, []), r"methods is \[\]: give a list"),
    "a number": (lambda lm, task: zero_shot(lm, task, 3), "methods is 3: give a list"),
    "twice": (lambda lm, task: zero_shot(lm, task, ["hard", "hard"]), "'hard' twice"),
    "a near name": (
        lambda lm, task: zero_shot(lm, task, ["unary_breakdwon"]),
        r"unknown method 'unary_breakdwon' \(did you mean 'unary_breakdown'\?\): choose from",
    ),
    "no name": (lambda lm, task: zero_shot(lm, task, [None]), "unknown method None"),
    "another trace": (lambda lm, task: zero_shot(lm, task, ["hard"], trace=TRACE), "is in one of"),
    "other labels": (
        lambda lm, task: zero_shot(lm, replace(TASK, labels=OTHER.labels), ["hard"], trace=TRACE),
        "the trace has the outcomes .*'anger'.*'rage'",
    ),
    "unary: shots": (lambda lm, task: unary_breakdown(lm, task, -2), "shots is -2"),
    "unary: seed": (lambda lm, task: unary_breakdown(lm, task, 0, "a"), "seed is 'a'"),
    "pairs: shots": (lambda lm, task: ask_pairs(lm, task, -2), "shots is -2"),
    "pairs: seed": (lambda lm, task: ask_pairs(lm, task, 0, -1), "seed is -1"),
    "binary: shots": (lambda lm, task: binary_breakdown(lm, task, True), "shots is True"),
    "questions: none": (lambda lm, task: ask_questions(lm, [], ("a", "b")), "no texts to ask"),
    "questions: an empty one": (
        lambda lm, task: ask_questions(lm, [QUESTIONS, []], ("a", "b")),
        "position 1 has no questions",
    ),
    "answers: a string": (lambda lm, task: ask_questions(lm, [QUESTIONS], "ab"), "answers is 'ab'"),
    "answers: one": (lambda lm, task: ask_questions(lm, [QUESTIONS], ["a"]), r"answers is \['a'\]"),
    "answers: empty": (lambda lm, task: ask_questions(lm, [QUESTIONS], ["a", ""]), "none of them"),
    "average: no seeds": (lambda lm, task: average_prompts(lm, task, seeds=()), "at least one"),
    "average: seeds 3": (lambda lm, task: average_prompts(lm, task, seeds=3), "seeds is 3"),
    "average: seed -1": (lambda lm, task: average_prompts(lm, task, seeds=[-1]), "a seed is -1"),
    "average: a seed twice": (
        lambda lm, task: average_prompts(lm, task, seeds=[1, 1]),
        "each seed",
    ),
    "average: method": (lambda lm, task: average_prompts(lm, task, "hrad"), "did you mean 'hard'"),
    "average: a trace": (
        lambda lm, task: average_prompts(lm, task, trace=TRACE),
        "a trace is of one prompt: leave trace out",
    ),
    "average: shots": (lambda lm, task: average_prompts(lm, task, shots=-1), "shots is -1"),
    "content-free: a string": (
        lambda lm, task: content_free_prior(lm, task, 0, texts="N/A"),
        "texts is 'N/A': give a list",
    ),
    "content-free: none": (lambda lm, task: content_free_prior(lm, task, 0, texts=[]), "texts is"),
    "content-free: shots": (lambda lm, task: content_free_prior(lm, task, -1), "shots is -1"),
    "words: seed": (lambda lm, task: unrelated_words(lm, task.labels, -1), "seed is -1"),
    "shares 20": (
        lambda lm, task: vary_multi_share(lm, task, shares=(0, 20)),
        "a value of shares is 20",
    ),
    "shares nan": (lambda lm, task: vary_multi_share(lm, task, shares=[NAN]), "of shares is nan"),
    "shots twice": (lambda lm, task: vary_shots(lm, task, shots=(2, 2)), "give each value once"),
    "shots nan": (lambda lm, task: vary_shots(lm, task, shots=(0, NAN)), "a value of shots is nan"),
    "seeds text": (lambda lm, task: vary_shots(lm, task, seeds=["a"]), "a value of seeds is 'a'"),
    "seeds inf": (lambda lm, task: vary_label_order(lm, task, seeds=[INF]), "of seeds is inf"),
    "orders": (
        lambda lm, task: vary_label_order(lm, task, orders=["revers"]),
        "a value of orders is 'revers': choose one of alphabetical, random, reverse",
    ),
    "kinds": (
        lambda lm, task: vary_demonstration_labels(lm, task, kinds=["wrong"]),
        "a value of kinds is 'wrong': choose one of gold, flipped, unrelated",
    ),
    "kinds: empty": (
        lambda lm, task: vary_demonstration_labels(lm, task, kinds=[]),
        r"kinds is \[\]: give a list",
    ),
}


@pytest.mark.parametrize("name", WITH_A_MODEL)
def test_it_is_refused_before_the_model_runs(tuned_lm, real, name, monkeypatch):
    for at in (tuned_lm.model, type(tuned_lm.model)):
        monkeypatch.setattr(at, "forward", lambda *_, **__: pytest.fail("model time was spent"))
    call, words = WITH_A_MODEL[name]
    with pytest.raises(ValueError, match=words):
        call(tuned_lm, real)


def test_the_tables_are_long():
    assert len(REFUSED) + len(WITH_A_MODEL) > 250


def test_answers_about_other_texts_or_in_one_order(tuned_lm, real):
    few = real.select([0, 1])
    answers = ask_pairs(tuned_lm, few, shots=0, both_orders=False, progress=False)
    with pytest.raises(ValueError, match="other texts or labels than brighter-eng"):
        binary_breakdown(tuned_lm, real.select([0, 2]), answers=answers)
    with pytest.raises(ValueError, match="one order only"):
        binary_breakdown(tuned_lm, few, both_orders=True, answers=answers)
    assert len(binary_breakdown(tuned_lm, few, answers=answers)) == 2


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"labels": ["joy"]}', "not json"])
def test_a_damaged_map_is_named(tmp_path, content):
    (tmp_path / "platt.json").write_text(content)
    with pytest.raises(ValueError, match=r"platt.json holds no Platt map"):
        Platt.load(tmp_path / "platt.json")
    values = {"labels": ["joy"], "slope": [NAN], "intercept": [0]}
    (tmp_path / "platt.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"slope is \[nan\]"):
        Platt.load(tmp_path / "platt.json")


def test_what_does_not_converge_raises():
    "No strengths, or strengths that are not the minimum, never come back."
    always = np.array([[[0, 1.0], [0, 0]]])
    with pytest.raises(ArithmeticError, match="position 0: some outcomes always win; give a ridge"):
        bradley_terry(always, ridge=0)
    with pytest.raises(
        ArithmeticError, match="no convergence for 1 of 2 items, the first at pos.* 1"
    ):
        bradley_terry(np.concatenate([np.ones((1, 2, 2)), always]), ridge=1e-6, most_rounds=2)
    with np.errstate(over="ignore", invalid="ignore"):
        with pytest.raises(ArithmeticError, match="wins of up to 1e\\+200 are too large"):
            bradley_terry(1e200 * WINS / 0.7)


# What is right


def test_the_order_of_rows_and_labels_changes_nothing():
    turned = P.iloc[::-1][["anger", "joy", "fear"]]
    same = align_report(P, TASK, resamples=20).query("method != 'annotators, split-half'")
    other = align_report(turned, TASK, resamples=20).query("method != 'annotators, split-half'")
    np.testing.assert_allclose(same["value"], other["value"])  # halves are drawn item by item
    of_turned = first_step_quality(TRACE, TURNED, 20)
    back = AnnotatedTexts(
        "back", IDS, TASK.texts, LABELS, [votes[:, [1, 2, 0]] for votes in TURNED.annotations]
    )
    pd.testing.assert_frame_equal(of_turned, first_step_quality(TRACE, back, 20))
    pd.testing.assert_frame_equal(order_accuracy(TRACE, TURNED), order_accuracy(TRACE, back))
    sets = conformal_sets(P, TASK, turned, 0.8)
    pd.testing.assert_frame_equal(sets.loc[IDS], conformal_sets(P, TASK, P, 0.8))


def test_columns_beside_the_labels_are_left_out():
    more = P.assign(none=NAN, seconds=7.0)
    pd.testing.assert_frame_equal(metric_table(more, TASK), metric_table(P, TASK))


def test_a_single_label_task_takes_rows_that_sum_to_one():
    shares = P.div(P.sum(axis=1), axis=0)
    value = metric_table(shares, ONE_OF, resamples=2).set_index("metric")["value"]
    q = ONE_OF.distribution().to_numpy()
    assert value["NLL"] == pytest.approx(-(q * np.log(shares.to_numpy())).sum(axis=1).mean())


def test_nll_and_brier_are_scikit_learns():
    "For annotators who agree, q is 0 or 1, and both are defined there."
    one = replace(TASK, annotations=[votes[:1] for votes in TASK.annotations])
    value = metric_table(P, one, resamples=2).set_index("metric")["value"]
    q = one.distribution()
    nll = [log_loss(q[name], P[name], labels=[0, 1]) for name in LABELS]
    brier = [brier_score_loss(q[name], P[name]) for name in LABELS]
    assert value["NLL"] == pytest.approx(sum(nll))
    assert value["NLL per label"] == pytest.approx(np.mean(nll))
    assert value["Brier"] == pytest.approx(np.mean(brier))


def test_certain_answers_and_empty_values():
    "p of 0 and 1 have log-odds and an NLL that eps decides; no values have no mean."
    certain = pd.DataFrame([[0.0, 1.0, 1.0]], ["t0"], list(LABELS))
    assert np.isfinite(log_odds(certain)).all(axis=None)
    assert log_odds(certain, eps=0.1).iloc[0, 0] == pytest.approx(np.log(0.1 / 0.9))
    np.testing.assert_allclose(log_odds(certain.astype(int)), log_odds(certain))
    wrong = item_metrics(np.ones((1, 1)), np.zeros((1, 1)), eps=1e-3)
    assert wrong["NLL"][0] == pytest.approx(-np.log(1e-3))
    assert np.isnan(bootstrap_mean([])).all() and np.isnan(bootstrap_median([])).all()
    assert bootstrap_means({"none": []})["n"].tolist() == [0]
    assert bradley_terry(np.zeros((0, 3, 3))).shape == (0, 3)
    assert bradley_terry(np.zeros((1, 3, 3))).tolist() == [[0, 0, 0]]  # nothing was asked


def test_macro_f1_says_what_it_does_with_labels_that_nobody_has():
    "As scikit-learn (zero_division=0): perfect answers have 2/3 where one of 3 labels is absent."
    gold = TASK.majority().to_numpy().copy()
    gold[:, 2] = 0
    task = replace(TASK, annotations=[row[None] for row in gold])
    perfect = pd.DataFrame(gold, IDS, list(LABELS)).astype(float)
    found = prediction_metrics(perfect, task)["value"]
    assert found["macro-F1"] == pytest.approx(2 / 3)
    assert found["macro-F1"] == f1_score(gold, gold, average="macro", zero_division=0)
    note = align_report(perfect, task, resamples=2).note
    assert note.endswith(" Macro-F1 counts 0 for the 1 of 3 labels in no majority set.")
    full = replace(TASK, annotations=[np.ones((1, 3), np.uint8), *TASK.annotations[1:]])
    assert "Macro-F1" not in align_report(P, full, resamples=2).note


def test_items_that_nobody_annotated_are_left_out_and_counted():
    nobody = np.zeros((0, 3), np.uint8)
    partly = replace(TASK, annotations=[nobody, *TASK.annotations[1:]])
    report = align_report({"mine": P, "other": 1 - P}, partly, resamples=20)
    whole = TASK.select(range(1, len(TASK)))
    same = align_report({"mine": P[1:], "other": 1 - P[1:]}, whole, resamples=20)
    pd.testing.assert_frame_equal(pd.DataFrame(report), pd.DataFrame(same))
    assert report.note == f"{same.note} 1 item that nobody annotated is left out."
    both = {"mine": P, "other": 1 - P}
    kept = {name: table[1:] for name, table in both.items()}
    options = dict(against="mine", resamples=20)
    compared = compare_methods(both, partly, **options)
    pd.testing.assert_frame_equal(compared, compare_methods(kept, whole, **options))


@pytest.mark.parametrize("ridge", [1e-3, 1.0])
def test_platt_is_the_minimum_of_its_loss(ridge):
    "Weighted cross-entropy of the shares and a ridge on the slope, by scipy."
    task = made_task(ids=[f"s{i}" for i in range(40)], annotators=5)
    scores = pd.DataFrame(np.random.default_rng(3).normal(size=(40, 3)), task.ids, list(LABELS))
    q = task.distribution().to_numpy()

    def loss(x, q, slope, intercept=0.0):
        z = slope * x + intercept
        return -(q * log_expit(z) + (1 - q) * log_expit(-z)).sum() + ridge / 2 * slope**2

    platt = fit_platt(scores, task, ridge=ridge)
    for column in range(3):
        x = scores.to_numpy()[:, column]
        best = minimize(lambda w, x=x, c=column: loss(x, q[:, c], *w), [0, 0], tol=1e-12).x
        found = [platt.slope[column], platt.intercept[column]]
        np.testing.assert_allclose(found, best, atol=1e-4)
    best = minimize_scalar(lambda w: loss(scores.to_numpy(), q, w)).x
    assert fit_temperature(scores, task, ridge).slope == pytest.approx([best] * 3, abs=1e-4)


def test_a_label_in_one_class_is_said_to_be_constant():
    votes = [np.array([[0, 1, row % 2]], np.uint8) for row in range(12)]
    task = replace(TASK, annotations=votes)
    with pytest.warns(
        UserWarning, match="nobody chose joy, fear in all 12 calibration items"
    ) as said:
        platt = fit_platt(L, task)
    assert said[0].filename == __file__
    calibrated = platt(L)
    np.testing.assert_allclose(calibrated["joy"], 1 / 14)  # one yes and one no added
    np.testing.assert_allclose(calibrated["fear"], 13 / 14)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_platt(L, TASK)


def test_a_prior_of_zero_stays_zero():
    "A label without probability in any text, which could not be divided by."
    with np.errstate(divide="ignore"):
        logprobs = np.log(TRACE.probs * [1, 1, 0, 1])
        divided = divide_prior(replace(TRACE, logprobs=logprobs))
    assert (divided.probs[:, 2] == 0).all() and np.isfinite(divided.probs).all()
    np.testing.assert_allclose(divided.probs.sum(axis=1), 1)


@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.9])
def test_conformal_sets_are_those_of_a_quantile(coverage):
    "Of n scores the one of rank ceil((n + 1) coverage): numpy's inverted cdf."
    gold = TASK.majority().to_numpy(bool)
    scores = 1 - np.where(gold, P, 1).min(axis=1)
    level = np.ceil(13 * coverage) / 12
    limit = np.quantile(scores, level, method="inverted_cdf")
    sets = conformal_sets(P, TASK, P, coverage)
    np.testing.assert_array_equal(sets, P >= 1 - limit)


def test_a_steps_index_of_its_own_changes_nothing():
    "Rows of steps are counted, not looked up by their index."
    moved = replace(TRACE, steps=TRACE.steps.set_index(TRACE.steps.index + 100))
    pd.testing.assert_frame_equal(next_labels(moved), next_labels(TRACE))
    pd.testing.assert_frame_equal(max_over_generations(moved), max_over_generations(TRACE))
    pd.testing.assert_frame_equal(path_product(moved), path_product(TRACE))


def test_log_odds_and_their_map_come_back():
    identity = Platt(tuple(LABELS), np.ones(3), np.zeros(3))
    np.testing.assert_allclose(identity(log_odds(P)), P, atol=1e-9)
    np.testing.assert_allclose(identity(L[["fear", "anger", "joy"]]), expit(L))
