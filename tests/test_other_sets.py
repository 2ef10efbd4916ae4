"""The loaders of sets with many labels and of single-label sets, on small hand-made files and on
the real ones where MLC_DATA has them; and the items that studies calibrate and confirm on."""

import gzip
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mlc_notebooks.data import (
    CONFIRMATION_ONLY,
    EARLIER_DRAWS,
    SOURCES,
    LabelSet,
    list_prompts,
    load_task,
    study_side,
    study_split,
    text_key,
    unannotated,
    used_before,
)

DATA = Path(__file__).parent / "data"
REAL = Path(os.environ.get("MLC_DATA", "/nowhere"))
SPLITS = ("train", "dev", "test")
OPTIONS = {"cooking-stackexchange": {"test": 3}}
NAMES = [
    "banking77",
    "cantemist",
    "chaosnli",
    "clinc150",
    "cooking-stackexchange",
    "mmlu-pro",
    "queerreclaimlex",
    "reuters21578",
    "trec",
]


def small(name, **options):
    base = name if name in SOURCES else name.split("-")[0]
    given = {**OPTIONS.get(name, {}), **options}
    return load_task(name, folder=DATA / SOURCES[base].folder, **given)


def real(name, **options):
    base = name if name in SOURCES else name.split("-")[0]
    folder = REAL / SOURCES[base].folder
    if not any(path.suffix != ".md" for path in folder.glob("*")):
        pytest.skip("MLC_DATA is not set to a folder with this data set")
    return load_task(name, folder=folder, **options)


def sizes(task):
    return {split: len(part) for split, part in task.splits.items()}


def gold_sizes(task):
    "How many labels the texts of all splits have."
    return np.array([len(gold) for part in task.splits.values() for gold in part.gold_sets()])


# ---------------------------------------------------------------- small files


def test_cooking():
    task = small("cooking-stackexchange")
    assert task.ids == ("104", "105", "106") and sizes(task) == {"train": 3, "test": 3}
    assert task.gold_sets()[2] == ("bread", "equipment", "flour")
    assert task.aggregated and len(task.labels) == 7
    assert task.pool.texts[1] == 'Is there a difference between "plain" and strong flour for rolls?'
    with pytest.raises(ValueError, match="test is 3000: give a whole number"):
        load_task("cooking-stackexchange", folder=DATA / "cooking_stackexchange")


def test_reuters():
    task = small("reuters21578")
    assert task.labels.names == ("Crude Oil", "Earnings", "grain", "Shipping")
    assert task.gold_sets() == [("Crude Oil", "Shipping"), ("Earnings",)]
    assert task.texts[1] == "TOY MAKER NET UP"  # a document without a text
    assert task.pool.texts[1] == "A shipping line named a second harbour."  # and without a title
    assert task.texts[0].startswith("TANKER ARRIVES LATE\nA tanker")


def test_cantemist():
    task = small("cantemist")
    assert sizes(task) == {"train": 2, "dev": 2, "test": 1}
    assert task.labels.names == ("8000/6", "8010/3", "8140/3", "8970/3/H")
    assert task.gold_sets() == [("8000/6", "8010/3")]  # the second one is in no other split
    assert task.split("dev").gold_sets() == [("8000/6", "8970/3/H"), ()]


def test_banking77():
    task = small("banking77")
    assert task.labels.names == ("card delivery", "top up by card", "lost card?")
    assert not task.labels.is_multi and task.ids == ("test-0",)
    assert task.pool.gold_sets() == [("card delivery",), ("lost card?",), ("top up by card",)]
    assert task.pool.texts[2] == "Can I, perhaps, add money with a card?"


def test_clinc150():
    task = small("clinc150")
    assert task.labels.names == ("alarm", "book flight", "weather")
    assert task.ids == ("test-0",) and sizes(task) == {"train": 3, "dev": 1, "test": 1}
    assert task.sampling == {"left out": {"out of scope": 2}}
    every = small("clinc150", out_of_scope=True)
    assert every.labels.names[-1] == "out of scope" and not every.labels.is_multi
    assert every.ids == ("test-0", "oos_test-0", "oos_test-1")
    assert every.gold_sets()[1:] == [("out of scope",)] * 2
    assert every.sampling == {"left out": {"out of scope": 0}}
    assert "samples" not in str(SOURCES["clinc150"].folder)


def test_mmlu_pro():
    task = small("mmlu-pro")
    assert task.labels.names == tuple("ABCDEFGHIJ") and sum(sizes(task).values()) == 12
    text = task.texts[task.ids.index("100")]
    assert text.splitlines() == [
        "How many legs has a chair of the usual kind?",
        *("A. two", "B. three", "C. four", "D. six"),
    ]
    assert task.gold_sets()[task.ids.index("100")] == ("C",)  # the letters E to J are never right
    four = small("mmlu-pro", options=4)
    assert four.labels.names == tuple("ABCD") and sum(sizes(four).values()) == 7
    with pytest.raises(ValueError, match="options is 7: choose one of 3, 4, 10"):
        small("mmlu-pro", options=7)


def test_the_published_files_of_mmlu_pro(tmp_path):
    "Without the sample: two parquet files, of which the smaller is for demonstrations."
    rows = pd.read_json(DATA / "mmlu_pro/sample.jsonl", lines=True)
    (tmp_path / "data").mkdir()
    rows[:4].to_parquet(tmp_path / "data/validation-00000-of-00001.parquet")
    rows[4:].to_parquet(tmp_path / "data/test-00000-of-00001.parquet")
    task = load_task("mmlu-pro", folder=tmp_path)
    assert sizes(task) == {"train": 4, "test": 8} and task.ids[0] == "104"
    assert task.texts[0].endswith("\nD. a coin") and task.gold_sets()[0] == ("A",)


def test_chaosnli():
    task = small("chaosnli")
    assert task.labels.names == ("entailment", "neutral", "contradiction")
    assert not task.aggregated and {v.shape for v in task.annotations} == {(100, 3)}
    assert {v.sum() for v in task.annotations} == {100}  # one label per vote
    assert task.distribution().loc["s2"].tolist() == [0.2, 0.75, 0.05]
    assert task.gold_sets() == [("neutral",), ("contradiction",)]
    assert (
        task.texts[0]
        == "Premise: Two men carry a long ladder.\nHypothesis: They will paint a house."
    )
    assert task.ids == ("s2", "s4")  # they share a premise, so they share a split
    named = small("chaosnli-mnli")
    assert named.ids == ("m1", "m2") and small("chaosnli-snli").ids == task.ids


def test_trec():
    task = small("trec")
    assert len(task.labels) == 6 and task.gold_sets() == [("location",), ("number",)]
    assert task.pool.texts[0] == "What does a café in Malmö sell ?"  # Latin-1
    fine = small("trec-fine")
    assert len(fine.labels) == 50 and fine.gold_sets() == [
        ("location: other",),
        ("number: distance",),
    ]
    assert fine.pool.gold_sets()[2] == ("abbreviation: expansion",)


def harms(**options):
    task = small("queerreclaimlex", **options)
    parts = [part.distribution() for part in task.splits.values()]
    return task, pd.concat(parts)


def test_queerreclaimlex():
    task, q = harms()
    assert task.labels.names == ("ingroup harm", "outgroup harm") and task.labels.is_multi
    assert task.ids == ("14-gay", "14-queer") and task.pool.ids == ("1-gay", "1-queer")
    assert q.loc["1-queer"].tolist() == [0, 1]  # 0 and .5 in the group: nobody is sure
    assert q.loc["14-gay"].tolist() == [0, 0.5]
    # the text stands there twice. The first annotator said .5 and 0, then 1 and 1. The second
    # gave one valid row: 1 and 0
    assert q.loc["14-queer"].tolist() == [0.5, 0.5]
    _, unsure = harms(threshold=0.5)
    assert unsure.loc["1-queer"].tolist() == [0.5, 1] and unsure.loc["14-gay"].tolist() == [0, 1]
    with pytest.raises(ValueError, match="threshold is 2"):
        small("queerreclaimlex", threshold=2)


def test_annotators_workbooks_of_queerreclaimlex(tmp_path):
    "Where there are workbooks of the annotators, the answers are read there, joined by text."
    shutil.copytree(DATA / "queerreclaimlex", tmp_path / "set")
    (tmp_path / "set/Annotations").mkdir()
    first, second = "I am gay and I like trains.", "My gay aunt, a baker, sings."
    sheets = {
        "Annotator1": [[(first, 0, 1)], [(second, 1, 1), ("of no template", 1, 1)]],
        "Annotator2": [[(first, 0, 0.5)], [(second, "?", 1)]],
    }
    for name, (slurs, terms) in sheets.items():
        with pd.ExcelWriter(tmp_path / f"set/Annotations/{name}.xlsx") as file:
            for sheet, rows in {"slurs": slurs, "identity terms": terms}.items():
                table = pd.DataFrame(rows, columns=["POST", "HARMFUL_IF_IN", "HARMFUL_IF_OUT"])
                table.to_excel(file, sheet_name=sheet, index=False)
    task = load_task("queerreclaimlex", folder=tmp_path / "set")
    assert task.distribution().loc["14-gay"].tolist() == [1, 1]  # "?" is no answer
    assert task.pool.distribution().loc["1-gay"].tolist() == [0, 0.5]
    assert sum(sizes(task).values()) == 2


@pytest.mark.parametrize("name", NAMES)
def test_gzipped_files_give_the_same(name, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(DATA / SOURCES[name].folder, folder)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        with gzip.open(f"{path}.gz", "wb") as file:
            file.write(path.read_bytes())
        path.unlink()
    packed = load_task(name, folder=folder, **OPTIONS.get(name, {}))
    task = small(name)
    assert packed.ids == task.ids and packed.texts == task.texts
    assert packed.gold_sets() == task.gold_sets() and sizes(packed) == sizes(task)


NOUNS = {
    "banking77": "exactly one of the following intents per input: card delivery, ",
    "cantemist": "one, or multiple the following ICD-O codes per input: 8000/6, ",
    "chaosnli": "exactly one of the following relations per input: entailment, ",
    "clinc150": "exactly one of the following intents per input: alarm, ",
    "cooking-stackexchange": "one, or multiple the following tags per input: bread, ",
    "mmlu-pro": "exactly one of the following answer options per input: A, B, ",
    "queerreclaimlex": "one, or multiple the following kinds of harm per input: ingroup harm ",
    "reuters21578": "one, or multiple the following topics per input: Crude Oil, ",
    "trec": "exactly one of the following kinds of answers per input: abbreviation, ",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fmt", ["json", "comma"])
def test_prompts_read_naturally(name, fmt):
    task = small(name)
    (prompt,) = list_prompts(task.texts[:1], task.labels, label_noun=task.label_noun, fmt=fmt)
    assert NOUNS[name] in prompt.instruction
    assert "\n" not in prompt.item and prompt.item.startswith("Input: ")


# ---------------------------------------------------------------- the counts of the real files


@pytest.mark.parametrize(
    "name, options, counts, labels",
    [
        ("banking77", {}, {"train": 10003, "test": 3080}, 77),
        ("cantemist", {}, {"train": 501, "dev": 500, "test": 300}, 850),
        ("clinc150", {}, {"train": 15000, "dev": 3000, "test": 4500}, 150),
        ("clinc150", {"out_of_scope": True}, {"train": 15100, "dev": 3100, "test": 5500}, 151),
        ("cooking-stackexchange", {}, {"train": 12404, "test": 3000}, 736),
        ("reuters21578", {}, {"train": 3000, "test": 3019}, 90),
    ],
)
def test_the_real_files_have_the_published_splits(name, options, counts, labels):
    task = real(name, **options)
    assert sizes(task) == counts and len(task.labels) == labels
    if not task.labels.is_multi:
        assert set(gold_sizes(task)) == {1}


@pytest.mark.parametrize(
    "name, number, mean, several, most",
    [
        ("cooking-stackexchange", 15404, 2.307, 11626, 5),
        ("cantemist", 1301, None, None, 22),
        ("reuters21578", 6019, None, None, None),
    ],
)
def test_labels_per_text_of_the_real_files(name, number, mean, several, most):
    counts = gold_sizes(real(name))
    assert len(counts) == number
    assert mean is None or counts.mean() == pytest.approx(mean, abs=5e-4)
    assert several is None or (counts > 1).sum() == several
    assert most is None or counts.max() == most


def test_shares_of_the_real_files_by_split():
    reuters = real("reuters21578")
    means = [
        majority.sum(axis=1).mean() for majority in (reuters.pool.majority(), reuters.majority())
    ]
    assert means == pytest.approx([1.224, 1.240], abs=5e-4)
    assert reuters.majority()[["Earnings and Earnings Forecasts", "Crude Oil"]].sum().tolist() == [
        1087,
        189,
    ]
    codes = real("cantemist")
    means = [codes.split(split).majority().sum(axis=1).mean() for split in ("train", "test")]
    assert means == pytest.approx([5.501, 5.330], abs=5e-4)
    assert sum(not gold for gold in codes.split("dev").gold_sets()) == 1


def test_the_real_questions_of_mmlu_pro():
    task = real("mmlu-pro")
    texts = [text for part in task.splits.values() for text in part.texts]
    assert len(texts) == 1400 and len(task.labels) == 10
    ten = real("mmlu-pro", options=10)
    assert sum(sizes(ten).values()) == 1136
    assert sum(sizes(real("mmlu-pro", options=4)).values()) == 85
    questions = {
        split: {text.split("\nA. ")[0] for text in part.texts}
        for split, part in task.splits.items()
    }
    assert not questions["train"] & questions["test"]


@pytest.mark.parametrize("name, number, bits", [("snli", 1514, 0.798), ("mnli", 1599, 1.072)])
def test_the_real_votes_of_chaosnli(name, number, bits):
    task = real(f"chaosnli-{name}")
    q = pd.concat([part.distribution() for part in task.splits.values()])
    assert len(q) == number and (q.sum(axis=1).round(9) == 1).all()
    logs = np.log2(q.where(q > 0, 1))
    assert -(q * logs).sum(axis=1).mean() == pytest.approx(bits, abs=5e-4)
    premises = [{text.split("\n")[0] for text in part.texts} for part in task.splits.values()]
    assert not premises[0] & premises[1] and not premises[0] & premises[2]


def test_the_published_majority_of_queerreclaimlex():
    "Ours is the published one except where both annotators are uncertain."
    task = real("queerreclaimlex")
    rows = pd.read_csv(REAL / "queerreclaimlex/QueerReclaimLex.csv", dtype={"template_idx": str})
    rows.index = rows["template_idx"] + "-" + rows["term"]
    rows = rows[~rows.index.duplicated(keep=False)]
    both = (rows["HARMFUL_OUT_1"] == 0.5) & (rows["HARMFUL_OUT_2"] == 0.5)
    ours = pd.concat([part.majority() for part in task.splits.values()])["outgroup harm"]
    known = rows.index[~both.to_numpy()]
    assert (ours.loc[known] == rows.loc[known, "HARMFUL_OUT_gold"]).all()


# ---------------------------------------------------------------- study splits


def keys(task):
    return {text_key(text) for text in task.texts}


def test_no_text_is_on_both_sides_or_in_the_train_split():
    task = load_task("goemotions")  # it repeats texts, within and across splits
    split = study_split(task)
    assert not keys(split.calibration) & keys(split.confirmation)
    assert keys(split.calibration) | keys(split.confirmation) == keys(task) - keys(task.pool)
    for side in (split.calibration, split.confirmation):
        assert len(keys(side)) == len(side)
    assert len(keys(task) & keys(task.pool)) > 0  # the trap is there


def test_the_side_of_an_item_never_changes():
    "Not with sizes, seeds, splits, samples or label sets."
    whole = study_split(load_task("goemotions"))
    calibration = keys(whole.calibration)
    for seed in (0, 1):
        for size in (50, 200):
            drawn = study_split(load_task("goemotions-27"), size, size, seed)
            assert (len(drawn.calibration), len(drawn.confirmation)) == (size, size)
            assert keys(drawn.calibration) <= calibration
            assert not keys(drawn.confirmation) & calibration
    sampled = study_split(load_task("goemotions").sample(400, seed=3, kind="main"))
    assert keys(sampled.calibration) <= calibration
    assert {study_side(text) for text in whole.confirmation.texts} == {"confirmation"}
    one, other = (study_split(load_task("goemotions"), 50, 0, seed) for seed in (0, 1))
    assert set(one.calibration.ids) != set(other.calibration.ids)
    assert len(one.confirmation) == 0


def test_a_recorded_side():
    "Sides are for good: a change of the hash would mix what studies kept apart."
    found = [study_side(text) for text in ("hm", "oh", "a chair", "the sun is out", "joy", "no")]
    assert found == ["confirmation"] * 3 + ["calibration"] + ["confirmation"] * 2


def test_draws_of_earlier_studies():
    "Every item that an earlier study drew is a calibration item; also what is not in the list."
    task = load_task("convabuse")
    confirmation = set()
    for split in ("test", "dev"):
        confirmation |= keys(study_split(task.split(split)).confirmation)
    drawn = [("test", n, 0, "main") for n in (30, 60, 120, 200, 300)]
    drawn += [("test", n, 0, "random") for n in (40, 50, 64, 100, 120, 200)]
    drawn += [("dev", 40, 0, "main"), ("dev", 60, 0, "main"), ("test", 120, 11, "main")]
    for split, n, seed, kind in drawn:
        assert not keys(task.split(split).sample(n, seed, kind)) & confirmation
    for split in ("test", "dev"):
        part = study_split(task.split(split))
        used = {text_key(text) for text in used_before(task)}
        assert keys(part.calibration) == keys(task.split(split)) & used - keys(task.pool)


def test_what_was_drawn_of_convabuse_is_what_it_was():
    "The draws of today are those of the earlier studies: the same ids."
    task = load_task("convabuse")
    assert len({text_key(text) for text in used_before(task)}) == 511
    assert task.sample(200, 0, "main").ids[:3] == ("2943", "3243", "1344")


def test_draws_of_earlier_studies_in_romanian():
    task = real("brighter-ron")
    drawn = task.sample(200, 0, "main")
    left = task.select([i for i, text in enumerate(task.texts) if text not in set(drawn.texts)])
    confirmation = keys(study_split(task).confirmation)
    others = (drawn, left.sample(60, 0, "main"), task.sample(160, 11, "main"))
    for used in (*others, task.split("dev")):
        assert not keys(used) & confirmation
    assert len(confirmation) > 500 and len(study_split(task.split("dev")).confirmation) == 0


@pytest.mark.parametrize("name", ["brighter-afr", "brighter-arq", "brighter-swe"])
def test_confirmation_only(name):
    task = real(name)
    assert name in CONFIRMATION_ONLY and name not in EARLIER_DRAWS
    split = study_split(task, confirmation=200)
    assert len(split.calibration) == 0 and len(split.confirmation) == 200
    with pytest.raises(ValueError, match=f"{name} is for confirmation only"):
        study_split(task, calibration=10)


def test_what_a_task_cannot_give_is_refused():
    task = unannotated([f"text {i}" for i in range(30)], LabelSet(["joy"]), name="mine")
    split = study_split(task)
    found = len(split.confirmation)
    with pytest.raises(ValueError, match=f"mine has {found} confirmation items .*is {found + 1}"):
        study_split(task, confirmation=found + 1)
    with pytest.raises(ValueError, match="calibration is -1"):
        study_split(task, calibration=-1)
    with pytest.raises(ValueError, match="seed is 0.5"):
        study_split(task, seed=0.5)
    with pytest.raises(ValueError, match="load it by its full name, such as 'nlupp-hotels'"):
        study_split(replace(task, name="nlupp"))
