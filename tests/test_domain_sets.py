"""Loaders of other domains, languages and single people: on small hand-made files, and on the real
files where MLC_DATA has them, against the counts that come with these."""

import gzip
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mlc_notebooks.data import (
    LIST_TEMPLATE,
    SOURCES,
    annotator_ids,
    answer_table,
    answers_of,
    described,
    list_prompts,
    load_task,
    text_key,
)

DATA = Path(__file__).parent / "data"
FOLDERS = {  # of each task
    "nhs-feedback": "nhs_feedback",
    "caves": "caves",
    "nlupp-banking": "nlupp",
    "nlupp-hotels": "nlupp",
    "tos-unfair-en": "tos_unfair",
    "tos-unfair-de": "tos_unfair",
    "xed-en": "xed",
    "xed-fi": "xed",
    "kote": "kote",
    "hs-brexit": "hs_brexit",
    "goemotions-raters": "goemotions_raters_part",
    "goemotions-raters-27": "goemotions_raters_part",
}
HASHED = ["nhs-feedback", "nlupp-banking", "tos-unfair-en", "xed-en", "hs-brexit"]


def small(name, **options):
    return load_task(name, folder=DATA / FOLDERS[name], **options)


def real(name, folder, **options):
    path = Path(os.environ.get("MLC_DATA", "/nowhere")) / folder
    if not path.is_dir():
        pytest.skip("MLC_DATA is not set to a folder with this data set")
    return load_task(name, folder=path, **options)


def sets(task) -> dict:
    "The labels of every text of every split."
    return {text: chosen for part in task.splits.values() for text, chosen in texts_of(part)}


def texts_of(part) -> list:
    return list(zip(part.texts, part.gold_sets())) if len(part) else []


def sizes(task) -> np.ndarray:
    "How many labels each item of every split has."
    parts = [part.majority().sum(axis=1) for part in task.splits.values() if len(part)]
    return np.concatenate(parts)


def label_counts(task) -> dict:
    "How many items of every split have each label."
    return sum(part.majority().sum() for part in task.splits.values() if len(part)).to_dict()


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_a_small_file(name):
    task = small(name)
    assert task.name == name and len(task) and len(task.pool)
    (source,) = [source for source in SOURCES.values() if source.folder == FOLDERS[name]]
    assert task.label_noun == source.label_noun
    ids = [item for part in task.splits.values() for item in part.ids]
    assert len(ids) == len(set(ids))
    assert (task.annotators is None) == task.aggregated


def test_nhs_feedback():
    task = small("nhs-feedback")
    said = sets(task)
    assert said["Question: What was good? Comment: Nothing."] == ()  # not assigned
    assert said["Question: What could we do better? Comment: Nothing."] == (
        "Positive experience & gratitude",
    )
    assert said["Question: FFT Why? Comment: NA"] == ()  # the word, not an empty cell
    assert said["Question: What was good? Comment: The garden."] == (
        "Positive experience & gratitude",
    )
    assert "Not assigned" not in task.labels and len(task.labels) == 5
    assert "Staff listening, understanding & involving patients" in task.labels.names
    assert "Nothing." in small("nhs-feedback", question=False).pool.texts


def test_caves():
    task = small("caves")
    assert task.ids == ("31t", "32t") and task.gold_sets() == [("pharma", "rushed"), ()]
    assert task.split("dev").texts == ("NA", "What is in it ?")
    assert task.texts[1] == 'I had my second dose , "easy" .'


def test_nlupp():
    banking = small("nlupp-banking")
    assert sets(banking)["Change my card and my payment"] == (
        "change",
        "card",
        "transfer_payment_deposit",
    )  # listed twice, counted once; in the ontology's order
    assert sets(banking)["My name is Ann"] == ()
    assert "room_service" not in banking.labels.names
    assert banking.labels.descriptions["how_long"].startswith("is the intent to ask how long")
    (prompt,) = list_prompts(["hm"], banking.labels, template=described(LIST_TEMPLATE))
    assert "\ncard: is the intent to talk about a card?\n" in prompt.instruction
    assert "how_long" in small("nlupp-hotels").labels.names


def test_the_folds_of_nlupp():
    task = small("nlupp-hotels", train_folds=[1])
    assert {item.split("-")[0] for item in task.pool.ids} == {"1"}
    assert {item.split("-")[0] for item in task.ids} == {"0"}
    with pytest.raises(ValueError, match="a fold is 2"):
        small("nlupp-hotels", train_folds=[2])


def test_tos_unfair():
    said = sets(small("tos-unfair-en"))
    assert said["All disputes go to arbitration in Freedonia."] == ("arbitration", "jurisdiction")
    assert said["The law of Freedonia applies."] == said["You may write to us."] == ()
    clearly = sets(small("tos-unfair-en", level=3))
    assert clearly["All disputes go to arbitration in Freedonia."] == (
        "arbitration",
        "jurisdiction",
    )
    assert clearly["We may change these terms without notice."] == ()
    about = sets(small("tos-unfair-en", level=1))
    assert about["The law of Freedonia applies."] == ("choice of law",)
    assert small("tos-unfair-de").labels == small("tos-unfair-en").labels


def test_the_words_for_clauses_are_those_of_the_file():
    "The column `unfair` was made of the same tags; the loader reads the tags alone."
    for language in ("en", "de"):
        rows = pd.read_csv(DATA / f"tos_unfair/{language}.csv", keep_default_na=False)
        said = sets(small(f"tos-unfair-{language}"))
        for text, cell in zip(rows["text"], rows["unfair"]):
            assert said[text] == tuple(sorted(filter(None, cell.split("; "))))


def test_xed():
    said = sets(small("xed-en"))
    assert said["NA"] == ("anticipation",)
    assert said['"Look, a "gift" for me!'] == ("joy", "surprise")
    assert said["I trust you with the keys."] == ("joy", "trust")
    assert sets(small("xed-fi"))["Tulet taas myöhässä."] == ("anger",)


def test_kote():
    task = small("kote")
    assert len(task.labels) == 43 and task.labels.none == "없음"
    assert task.gold_sets()[1] == ("의심/불신", "당황/난처", "놀람")  # 없음 beside them is dropped
    assert task.gold_sets()[2] == ()
    assert sorted(task.pool.ids) == ["v1", "v4", "v5", "v6"]
    assert task.split("dev").ids == ("v2", "v3")


def test_kote_with_its_train_file(tmp_path):
    shutil.copytree(DATA / "kote", tmp_path / "kote")
    train = "n1\t산책\t42\nn2\t비\t24\n".encode()
    (tmp_path / "kote" / "train.tsv.gz").write_bytes(gzip.compress(train))
    task = load_task("kote", folder=tmp_path / "kote")
    assert task.pool.ids == ("n1", "n2") and len(task.split("dev")) == 6


def test_hs_brexit():
    task = small("hs-brexit")
    rows = pd.read_csv(DATA / "hs_brexit/annotations.csv", dtype=str, keep_default_na=False)
    names = {"aggressive": "aggressive", "hate_speech": "hate speech", "offensive": "offensive"}
    said = pd.concat([answer_table(part) for part in task.splits.values()])
    for row in rows.to_dict("records"):
        answer = said.loc[(row["item"], row["annotator"])]
        assert {names[c]: int(row[c] == "1") for c in names} == answer.to_dict()
    assert task.annotator_groups == {
        f"Ann{n}": "target" if n < 4 else "control" for n in range(1, 7)
    }
    assert task.sample(1).annotator_groups == task.pool.annotator_groups == task.annotator_groups


def test_raters_of_goemotions():
    task = small("goemotions-raters")
    assert list(task.splits) == ["train", "dev", "test", "other"]
    assert task.annotators == (("7", "3"), ("12",)) and task.ids == ("c4", "c6")
    assert task.distribution().loc["c4"][["optimism", "sadness"]].tolist() == [0.5, 1.0]
    pool = task.pool
    assert pool.at(["c2"]).annotators == (("7",),)  # an unclear rating is none
    assert dict(zip(pool.ids, pool.gold_sets()))["c2"] == ("anger",)  # neutral is dropped
    assert answers_of(task, "12").pool.gold_sets() == [()]
    fine = small("goemotions-raters-27")
    assert len(fine.labels) == 27 and fine.distribution().loc["c4", "caring"] == 0.5


def test_raw_goemotions_says_who():
    task = load_task("goemotions", folder=DATA / "goemotions", raw=True)
    assert task.annotators is not None and annotator_ids(task)


def test_other_loaders_say_who():
    relations = load_task("crowdtruth", folder=DATA / "crowdtruth_relations")
    assert annotator_ids(relations) == ["w1", "w2", "w3"]
    assert load_task("brighter-swe", folder=DATA / "brighter").annotators is None
    abuse = load_task("convabuse", folder=DATA / "convabuse")
    assert all(
        len(people) == len(rows) for people, rows in zip(abuse.annotators, abuse.annotations)
    )


@pytest.mark.parametrize("name", HASHED)
def test_no_text_is_in_two_splits(name):
    task = small(name)
    keys = [set(map(text_key, part.texts)) for part in task.splits.values()]
    assert sum(map(len, keys)) == len(set().union(*keys))


def test_a_comment_that_is_repeated_stays_in_one_split():
    "Also where it answers another question: the same words would be known."
    task = small("nhs-feedback", question=False)
    holding = [name for name, part in task.splits.items() if "Nothing." in part.texts]
    assert len(holding) == 1


@pytest.mark.parametrize("name", ["nlupp-taxis", "tos-unfair-fr", "xed-sv", "kote-en", "tos"])
def test_variants_that_nobody_declared(name):
    with pytest.raises(ValueError, match=f"unknown task '{name}'"):
        load_task(name)


@pytest.mark.parametrize(
    "name, texts, labels, mean, several",
    [
        ("nhs-feedback", 6208, 44, None, None),
        ("caves", 9921, 11, None, 1974),
        ("nlupp-banking", 2071, 48, 2.252, 1438),
        ("nlupp-hotels", 1009, 40, 1.517, 574),
        ("tos-unfair-en", 17383, 9, None, 120),
        ("tos-unfair-de", 3194, 9, None, 113),
        ("tos-unfair-it", 3328, 9, None, 120),
        ("tos-unfair-pl", 3374, 9, None, 116),
        ("xed-en", 17528, 8, 1.279, None),
        ("xed-fi", 14449, 8, 1.307, None),
    ],
)
def test_the_real_files(name, texts, labels, mean, several):
    base = next(base for base in FOLDERS if base.rsplit("-", 1)[0] in name or base == name)
    task = real(name, FOLDERS[base])
    counted = sizes(task)
    assert (len(counted), len(task.labels)) == (texts, labels)
    assert mean is None or counted.mean() == pytest.approx(mean, abs=0.001)
    assert several is None or (counted >= 2).sum() == several
    keys = [set(map(text_key, part.texts)) for part in task.splits.values()]
    if name != "caves":  # whose official splits share a text
        assert sum(map(len, keys)) == len(set().union(*keys))


def test_the_real_labels_of_comments():
    "The means of the file count *Not assigned* too: 348 comments, two of them with an aspect."
    task = real("nhs-feedback", "nhs_feedback")
    counted = sizes(task)
    assert (counted == 0).sum() == 346 and (counted >= 2).sum() == 1705 - 2
    assert counted.sum() == pytest.approx(1.386 * 6208 - 348, abs=4)
    counts = label_counts(task)
    assert counts["Positive experience & gratitude"] == 1779
    assert counts["Staff manner & personal attributes"] == 1418
    assert counts["Timeliness of care"] == 1104 and counts["Safeguarding concerns?"] == 4


def test_the_real_labels_of_tweets_and_terms():
    counts = label_counts(real("caves", "caves"))
    assert (counts["side-effect"], counts["religious"], counts["pharma"]) == (3804, 64, 1271)
    terms = real("tos-unfair-en", "tos_unfair")
    assert (sizes(terms) > 0).sum() == 1374
    assert label_counts(terms) == {
        "limitation of liability": 498,
        "unilateral termination": 285,
        "unilateral change": 224,
        "contract by using": 119,
        "content removal": 105,
        "jurisdiction": 95,
        "choice of law": 82,
        "arbitration": 64,
        "privacy included": 36,
    }


def test_the_real_labels_of_requests():
    banking = real("nlupp-banking", "nlupp")
    counted = sizes(banking)
    assert [(counted == n).sum() for n in (0, 1)] == [88, 545] and counted.max() == 6
    assert len(banking.labels.descriptions) == 48
    low = real("nlupp-banking", "nlupp", train_folds=[0])
    assert 100 <= len(low.pool) <= 109 and len(low.pool) + len(low) == 2071


def test_the_real_labels_of_subtitles():
    counts = label_counts(real("xed-en", "xed"))
    assert (counts["anger"], counts["trust"], counts["disgust"]) == (3828, 2699, 2317)
    counted = sizes(real("xed-fi", "xed"))
    assert (counted >= 2).mean() == pytest.approx(0.234, abs=0.001) and counted.max() == 6


def test_the_real_kote():
    task = real("kote", "kote")
    assert [len(task.split(name)) for name in ("test", "train", "dev")][0] == 5000
    assert len(task.pool) + len(task.split("dev")) == 5000
    assert task.majority()["안타까움/실망"].sum() == 2185
    assert task.majority().sum(axis=1).sum() + 725 == pytest.approx(7.930 * 5000, abs=3)
    assert task.gold_sets().count(()) == 12


def test_the_real_annotators_of_brexit():
    task = real("hs-brexit", "hs_brexit")
    said = pd.concat([answer_table(part) for part in task.splits.values()])
    assert len(said) == 4704 and said.groupby("id").size().eq(6).all()
    assert said.sum().to_dict() == {"aggressive": 468, "hate speech": 605, "offensive": 1021}
    chosen = said.sum(axis=1)
    assert [(chosen == 0).sum(), (chosen == 1).sum(), (chosen >= 2).sum()] == [3513, 555, 636]
    assert chosen.groupby("id").max().gt(0).sum() == 405


def test_the_real_raters_of_goemotions():
    task = real("goemotions-raters-27", "goemotions_raters_part")
    parts = {name: answer_table(part) for name, part in task.splits.items()}
    said = pd.concat(parts.values())
    assert len(said) == 10429 - 172  # without those marked unclear
    assert len({person for _, person in said.index}) <= 79
    assert sum(map(len, task.splits.values())) <= 9743
    assert said.groupby("id").size().max() == 3


@pytest.mark.parametrize("language, people", [("afr", 0), ("arq", 9), ("swe", 0)])
def test_the_real_languages_of_brighter(language, people):
    task = real(f"brighter-{language}", "brighter")
    assert not task.aggregated and min(map(len, task.splits.values())) > 90
    assert people == 0 or len(annotator_ids(task.pool)) == people
    assert (task.annotators is None) == (people == 0)


def test_small_files_are_small_and_whole():
    for folder in sorted(set(FOLDERS.values())):
        assert sum(path.stat().st_size for path in (DATA / folder).iterdir()) < 8000
    assert json.loads((DATA / "nlupp/ontology.json").read_text())["intents"]
