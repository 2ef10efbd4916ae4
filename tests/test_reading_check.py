"""Does the model read? The estimators against slow twins, and levels on real models and tables.

`reading_tables/hotels.csv`: 40 requests of NLU++ (Casanueva et al., Findings of NAACL 2022), eight
of its intents, CC BY 4.0. `reading_tables/requests.csv`: 40 requests of CLINC150 (Larson et al.,
EMNLP 2019), eight of its intents, CC BY 3.0.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score, mutual_info_score

from mlc_notebooks.data import load_table, load_task
from mlc_notebooks.metrics import (
    Finding,
    evidence,
    example_f1,
    macro_auroc,
    reading_evidence,
)
from mlc_notebooks.metrics.verdict import _verdict, reading_check
from mlc_notebooks.probing import Trace, probe_steps
from mlc_notebooks.report.cli import _print_reading, mlc_align, mlc_probe

TABLES = Path(__file__).parent / "reading_tables"


def part_of(trace: Trace, places) -> Trace:
    "The trace of the texts at these places, in their order."
    ids = [trace.items.index[place] for place in places]
    rows = np.concatenate([np.flatnonzero(trace.steps["example"] == item) for item in ids])
    steps = trace.steps.iloc[rows].reset_index(drop=True)
    return replace(trace, items=trace.items.loc[ids], steps=steps, logprobs=trace.logprobs[rows])


def with_labels_of_others(task, seed: int):
    order = np.random.default_rng(seed).permutation(len(task))
    return replace(task, annotations=[task.annotations[place] for place in order])


def with_texts_of_others(trace: Trace, seed: int) -> Trace:
    texts = np.random.default_rng(seed).permutation(trace.items["text"])
    return replace(trace, items=trace.items.assign(text=texts))


@pytest.fixture(scope="module")
def emotions(tuned_lm):
    "Forty texts that the embedded model was tuned for, and its answers."
    task = load_task("goemotions").sample(40, seed=0)
    return task, probe_steps(tuned_lm, task, shots=0, progress=False)


@pytest.fixture(scope="module")
def hotels(tuned_lm):
    "Forty requests to hotels, foreign to the embedded model, and its answers."
    task = load_table(TABLES / "hotels.csv")
    return task, probe_steps(tuned_lm, task, shots=0, progress=False)


# ---- the estimators, by slow twins


def test_bits_are_the_mutual_information_of_drawn_outcomes():
    "Each text is drawn 16 times, as often with each outcome as its distribution says."
    rng = np.random.default_rng(0)
    counts = rng.multinomial(16, rng.dirichlet(np.ones(4)), size=30)
    text = np.repeat(np.arange(30), 16)
    outcome = np.concatenate([np.repeat(np.arange(4), row) for row in counts])
    bits = evidence._bits_by_text(counts / 16)[0]
    assert bits == pytest.approx(mutual_info_score(text, outcome) / np.log(2))


def test_swaps_of_answers_are_those_of_the_independence_criterion():
    "HSIC with its centring matrices, as its paper writes it, and the same swaps."
    task = load_task("goemotions").sample(25, seed=3)
    rng = np.random.default_rng(1)
    first = rng.dirichlet(np.ones(3), size=25)
    centre = np.eye(25) - 1 / 25
    alike = evidence._likeness(list(task.texts)).astype(float)

    def criterion(answers):
        return np.trace(alike @ centre @ answers @ answers.T @ centre)

    swaps = np.random.default_rng(0)
    swaps.permutation(25)
    answers = np.log(first + 1e-4)
    truth = criterion(answers)
    as_good = sum(criterion(swaps.permutation(answers)) >= truth for _ in range(199))
    assert evidence._words_share(list(task.texts), first, seed=0) == (1 + as_good) / 200


@pytest.mark.parametrize("n", [2, 15])
def test_gain_is_own_f1_less_that_of_all_other_pairs(n):
    rng = np.random.default_rng(n)
    found = rng.random((n, 3)) < 0.5
    gold = rng.random((n, 3)) < 0.3

    def f1(i, j):
        both_empty = not found[i].any() and not gold[j].any()
        return 1.0 if both_empty else f1_score(gold[j], found[i], zero_division=0)

    own = np.mean([f1(i, i) for i in range(n)])
    other = np.mean([f1(i, j) for i in range(n) for j in range(n) if i != j])
    gain, swapped = evidence._gain_over_swapped(found, gold)
    assert (gain.mean(), swapped) == pytest.approx((own - other, other))


def test_swaps_of_labels_are_judged_by_the_metrics_themselves():
    rng = np.random.default_rng(2)
    found, gold = (rng.random((2, 30, 4)) < 0.4).astype(int)
    gold[:, 3] = 0  # a label that no text has
    marginals = rng.random((30, 4)).round(1) + gold / 4
    swaps = np.random.default_rng(5)
    orders = [np.arange(30), *(swaps.permutation(30) for _ in range(199))]
    f1 = np.array([example_f1(found, gold[order]).mean() for order in orders])
    auroc = np.array([macro_auroc(gold[order], marginals) for order in orders])
    by_f1 = evidence._f1_share(found, gold, seed=5)
    by_auroc = evidence._auroc_share(gold, marginals, seed=5)
    assert by_f1 == (f1 >= f1[0] - 1e-9).mean()
    assert by_auroc == (auroc >= auroc[0] - 1e-9).mean()


def test_shares_of_swaps_are_even_where_nothing_is_read():
    "A test at 5 % finds something in about 5 % of runs in which there is nothing."
    texts = list(load_task("goemotions").sample(30, seed=1).texts)
    shares = []
    for seed in range(50):
        rng = np.random.default_rng(seed)
        found, gold = rng.random((2, 30, 3)) < 0.4
        first = rng.dirichlet(np.ones(4), size=30)
        of_f1 = evidence._f1_share(found, gold, seed)
        of_auroc = evidence._auroc_share(gold.astype(int), first[:, :3], seed)
        shares.append([evidence._words_share(texts, first, seed), of_f1, of_auroc])
    shares = np.array(shares)
    assert ((shares <= 0.05).mean(axis=0) < 0.15).all()
    assert (abs(shares.mean(axis=0) - 0.5) < 0.15).all()


# ---- levels on real runs


def test_a_model_that_reads_is_green(emotions):
    task, trace = emotions
    check = reading_check(trace, task)
    assert check.level == "green" and "reads the texts" in check.sentence
    found = check.evidence.set_index("quantity")
    assert found.loc[Finding.GAIN, "low"] > 0 and found.loc[Finding.AUROC, "low"] > 0.6
    assert found.loc[Finding.F1, "text_blind"] < 0.35


def test_the_labels_of_other_texts_are_never_green(emotions):
    task, trace = emotions
    checks = [
        reading_check(trace, with_labels_of_others(task, seed), seed=seed) for seed in range(8)
    ]
    levels = [check.level for check in checks]
    assert "green" not in levels and "red" in levels
    said = next(check.sentence for check in checks if check.level == "red")
    assert "does not read the texts for these labels" in said and "words baseline" in said


def test_answers_that_belong_to_other_texts_are_not_green_without_labels(emotions):
    _, trace = emotions
    levels = [reading_check(with_texts_of_others(trace, seed)).level for seed in range(8)]
    assert levels.count("amber") >= 7


def test_few_texts_are_amber_whatever_they_show(emotions, hotels):
    for task, trace in (emotions, hotels):
        check = reading_check(part_of(trace, range(10)), task)
        assert check.level == "amber" and check.sentence.startswith("Different texts: 10")
    one = reading_check(part_of(hotels[1], [0]), hotels[0])
    assert one.level == "amber" and one.sentence.startswith("Different texts: 1,")


def test_forty_requests_that_all_get_none_are_never_green(hotels):
    "The run that used to look like sharp steps: `none` everywhere, with a high probability."
    task, trace = hotels
    assert trace.predictions().to_numpy().sum() <= 2
    without = reading_check(trace)
    assert without.level in ("amber", "red") and "answers are `none`" in without.sentence
    check = reading_check(trace, task)
    assert check.level == "amber" and "its answers do not" in check.sentence
    assert check.evidence.set_index("quantity").loc[Finding.AUROC, "low"] > 0.5


def test_letters_without_meaning_are_red(tuned_lm, emotions):
    rng = np.random.default_rng(0)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    words = ["".join(rng.choice(letters, size)) for size in rng.integers(2, 9, 160)]
    texts = [" ".join(words[place : place + 8]) for place in range(0, 160, 8)]
    labels = emotions[0].labels
    trace = probe_steps(tuned_lm, texts, shots=0, labels=labels, progress=False)
    check = reading_check(trace)
    assert check.level == "red" and "hardly move from text to text" in check.sentence


def test_one_text_again_and_again_is_amber(hotels):
    _, trace = hotels
    same = replace(trace, items=trace.items.assign(text="a room"))
    assert reading_check(same).sentence.startswith("Different texts: 1,")


def test_a_single_label_task_is_judged_too(base_lm):
    "One request is one intent; the untuned model reads them where it is shown examples."
    task = load_table(TABLES / "requests.csv", none=None)
    trace = probe_steps(base_lm, task, shots=8, decoding="guided", progress=False)
    check = reading_check(trace, task)
    assert check.level == "green"
    assert Finding.ZEROS not in set(check.evidence["quantity"])
    assert reading_check(trace, with_labels_of_others(task, 0)).level != "green"


def test_labels_of_a_few_texts_do_not_decide(hotels):
    "Eight of forty are labelled: they are in the evidence, and the level is that without labels."
    task, trace = hotels
    nobody = task.annotations[0][:0]
    few = replace(task, annotations=[*task.annotations[:8], *[nobody] * 32])
    check = reading_check(trace, few)
    assert check.sentence == reading_check(trace).sentence
    assert check.evidence.set_index("quantity").loc[Finding.F1, "n"] == 8


def test_marginals_of_a_method_are_what_auroc_judges(emotions):
    task, trace = emotions
    perfect = task.majority().sample(frac=1, random_state=0)
    judged = reading_evidence(trace, task, perfect[list(trace.labels)]).set_index("quantity")
    assert judged.loc[Finding.AUROC, "value"] == 1
    reverse = reading_check(trace, task, (1 - perfect)[list(trace.labels)[::-1]])
    assert reverse.level == "amber" and "AUROC 0.00" in reverse.sentence


def test_labels_in_another_order_change_nothing(emotions):
    task, trace = emotions
    turned = replace(
        task,
        labels=type(task.labels)(list(task.labels)[::-1]),
        annotations=[votes[:, ::-1] for votes in task.annotations],
        splits={},
    )
    pd.testing.assert_frame_equal(
        reading_check(trace, turned).evidence, reading_check(trace, task).evidence
    )


# ---- every verdict

READS = {Finding.TEXTS: 40, Finding.SAME: 0.3, Finding.BITS: 1, Finding.WORDS: 0.005}
READS |= {Finding.MASS: 0.9, Finding.IRREGULAR: 0, Finding.AUROC: 0.9, Finding.AUROC_SWAPS: 0.005}
READS |= {Finding.GAIN: 0.3, Finding.F1_SWAPS: 0.005, Finding.CONSTANT: 0.1}
NO_SIGN = {Finding.F1_SWAPS: 0.4, Finding.AUROC_SWAPS: 0.4}


@pytest.mark.parametrize(
    "labels, change, verdict",
    [
        (True, {}, "reads"),
        (True, {Finding.TEXTS: 19}, "few"),
        (True, {Finding.AUROC: np.nan}, "one kind"),
        (True, {Finding.CONSTANT: -0.2}, "below constant"),
        (True, {Finding.IRREGULAR: 0.3}, "reads, irregular"),
        (True, {Finding.F1_SWAPS: 0.4}, "ranks only"),
        (True, {Finding.AUROC_SWAPS: 0.4}, "fits only"),
        (True, {Finding.AUROC: 0.55, Finding.GAIN: 0.01}, "little"),
        (True, NO_SIGN, "unclear"),
        (True, NO_SIGN | {Finding.GAIN: 0.01, Finding.AUROC: 0.62}, "no fit"),
        (True, NO_SIGN | {Finding.SAME: 0.95, Finding.BITS: 0.05}, "alike"),
        (True, NO_SIGN | {Finding.SAME: 0.95, Finding.IRREGULAR: 1}, "names nothing"),
        (False, {}, "follows words"),
        (False, {Finding.WORDS: 0.05}, "no pattern"),
        (False, {Finding.BITS: 0.05}, "no pattern"),
        (False, {Finding.SAME: 0.95}, "nearly alike"),
        (False, {Finding.SAME: 0.95, Finding.BITS: 0.05}, "alike"),
        (False, {Finding.SAME: 0.95, Finding.IRREGULAR: 1, Finding.WORDS: 0.4}, "names nothing"),
        (False, {Finding.IRREGULAR: 0.3}, "irregular"),
        (False, {Finding.MASS: 0.05}, "low mass"),
    ],
)
def test_each_verdict_follows_from_the_evidence(labels, change, verdict):
    value = pd.Series(READS | change)
    rows = pd.DataFrame({"value": value, "low": value, "high": value, "n": 40, "text_blind": 0.5})
    if not labels:
        rows = rows.drop([Finding.AUROC, Finding.GAIN])
    assert _verdict(rows) == verdict


# ---- the commands


def test_options_are_named_where_they_may_help(emotions, hotels, capsys):
    green = reading_check(emotions[1], emotions[0])
    _print_reading({"emotions": green})
    assert "--" not in capsys.readouterr().out
    _print_reading({"emotions": green, "hotels": reading_check(hotels[1], hotels[0])})
    said = capsys.readouterr().out
    assert said.index("GREEN, emotions: ") < said.index("AMBER, hotels: ") < said.index("--shots")


def test_commands_say_it_before_any_table(tmp_path, capsys):
    few = tmp_path / "few.csv"
    pd.read_csv(TABLES / "hotels.csv")[:6].to_csv(few, index=False)
    assert mlc_probe(["--file", str(few), "--out", str(tmp_path / "probe")]) == 0
    said = capsys.readouterr().out
    assert said.index("AMBER, few: Different texts: 6") < said.index("top probability")
    assert "--model" not in said  # more texts are needed, and no other model

    asked = ["--file", str(few), "--out", str(tmp_path / "align"), "--methods"]
    assert mlc_align([*asked, "unary_breakdown"]) == 0  # a method that needs no answer
    said = capsys.readouterr().out
    assert said.index("AMBER, few: Different texts: 6") < said.index("unary_breakdown")
