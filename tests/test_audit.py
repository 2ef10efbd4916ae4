"""The audit of data sets: a planted bias is found with its size, and where none is, none is."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import hypergeom
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import cohen_kappa_score, matthews_corrcoef, roc_auc_score

from mlc_notebooks.alignment import (
    average_wordings,
    compare_by_group,
    text_groups,
    weight_annotators,
)
from mlc_notebooks.data import (
    AnnotatedTexts,
    LabelSet,
    load_table,
    load_task,
    rename_labels,
    reorder_labels,
)
from mlc_notebooks.metrics import (
    agreement_by_label,
    annotator_agreement,
    annotator_leanings,
    audit,
    balanced_orders,
    co_occurrence,
    corrected_p,
    deduplicate,
    empty_answers,
    krippendorff_alpha,
    label_priors,
    label_wording,
    leakage,
    length_by_label,
    longer_with,
    order_effects,
    position_effects,
    prior_shifts,
    read_marginals,
    share_difference,
    sign_flip_p,
    stratified_p,
    swap_changes,
    swap_terms,
    swapped_texts,
    term_label_shares,
    term_map,
    text_twins,
)
from mlc_notebooks.models import load_lm
from mlc_notebooks.probing import probe_steps
from mlc_notebooks.report import mlc_audit, plot_audit

LABELS = LabelSet(["late", "broken", "rude"])
WORDS = "order parcel box door shop paper desk lamp chair phone clock glass".split()
PEOPLE = ("anna", "bert", "carl")


def texts_of(n: int, rng: np.random.Generator, size: int = 9) -> list[str]:
    "Sentences of random words."
    return [" ".join(rng.choice(WORDS, size)) + f" {rng.integers(10**9)}" for _ in range(n)]


def make_task(n: int = 200, seed: int = 0, texts=None, sets=None, people=1, **more):
    "A task in which nothing goes with anything, but for what is given."
    rng = np.random.default_rng(seed)
    if texts is None:
        texts = texts_of(n, rng)
    if sets is None:
        sets = rng.random((n, len(LABELS))) < 0.4
    votes = np.repeat(sets[:, None], people, axis=1)
    flipped = rng.random(votes.shape) < (0.15 if people > 1 else 0)
    ids = [f"{seed}-{i}" for i in range(n)]
    votes = (votes ^ flipped).astype(np.uint8)
    if people > 1:
        more["annotators"] = [PEOPLE[:people]] * n
    return AnnotatedTexts("made", ids, texts, LABELS, votes, **more)


def with_splits(train, test):
    return replace(test, splits={"train": train, "test": test})


# ---- statistics against slow twins


def test_holm_is_its_definition():
    p = np.random.default_rng(0).uniform(0, 0.2, 12)
    ranked = sorted(p)
    assert np.isnan(corrected_p([*p, np.nan])[-1])
    for value, found in zip(p, corrected_p([*p, np.nan])):
        rank = ranked.index(value)
        slow = max(min(1, (len(p) - k) * ranked[k]) for k in range(rank + 1))
        assert found == pytest.approx(slow)


def test_the_difference_of_shares_is_newcombes_and_turns_round():
    assert np.round(share_difference(56, 70, 48, 80)[:3], 4).tolist() == [0.2, 0.0524, 0.3339]
    assert np.round(share_difference(9, 10, 3, 10)[:3], 4).tolist() == [0.6, 0.1705, 0.8090]
    value, low, high, p = share_difference(3, 10, 9, 10)
    assert (value, p) == pytest.approx((-0.6, share_difference(9, 10, 3, 10)[3]))
    assert (low, high) == pytest.approx((-0.8090, -0.1705), abs=1e-4)


def test_flipped_signs_count_all_signs():
    changes = np.random.default_rng(1).normal(0.5, 1, (8, 1))
    signs = np.array(np.meshgrid(*[[-1, 1]] * 8)).reshape(8, -1)
    exact = (np.abs(signs.T @ changes) >= np.abs(changes.sum()) - 1e-9).mean()
    assert sign_flip_p(changes, 20_000)[0] == pytest.approx(exact, abs=0.01)


def test_phi_and_lift_are_those_of_a_plain_count():
    task = make_task()
    sets = task.majority()
    for row in co_occurrence(task, resamples=20).itertuples():
        first, second = sets[row.label], sets[row.other]
        assert row.value == pytest.approx(matthews_corrcoef(first, second))
        assert row.both == ((first == 1) & (second == 1)).sum()
        assert row.lift == pytest.approx(row.both / (first.sum() * second.sum() / len(task)))
        assert row.low <= row.value <= row.high and row.lift_low <= row.lift <= row.lift_high


def slow_alpha(answers: list[list[int]]) -> float:
    "Krippendorff's alpha from its coincidence matrix."
    coincidence = np.zeros((2, 2))
    for values in answers:
        for i, first in enumerate(values):
            for j, second in enumerate(values):
                if i != j:
                    coincidence[first, second] += 1 / (len(values) - 1)
    n_of = coincidence.sum(axis=1)
    n = n_of.sum()
    observed = coincidence[0, 1] / n
    expected = n_of[0] * n_of[1] / (n * (n - 1))
    return 1 - observed / expected


def test_alpha_is_that_of_the_coincidence_matrix():
    rng = np.random.default_rng(0)
    answers = [rng.integers(0, 2, size).tolist() for size in rng.integers(1, 6, 60)]
    several = [values for values in answers if len(values) > 1]
    found = krippendorff_alpha([sum(v) for v in answers], [len(v) for v in answers])
    assert found == pytest.approx(slow_alpha(several))


def test_kappa_is_cohens():
    task = make_task(people=2)
    one_label = replace(
        task, labels=LabelSet(["late"]), annotations=[v[:, :1] for v in task.annotations]
    )
    first, second = np.array([votes[:, 0] for votes in one_label.annotations]).T
    found = annotator_agreement(one_label, resamples=20).set_index("who")
    assert found.loc["anna", "value"] == pytest.approx(cohen_kappa_score(first, second))


def test_the_stratified_p_counts_every_way_to_draw():
    strata = np.array([[3, 1, 1], [3, 2, 1], [4, 2, 2], [5, 3, 2]])
    ways = {0: 1.0}
    for asked, yes, own in strata:
        after = {}
        answers = [1] * yes + [0] * (asked - yes)
        draws = [sum(drawn) for drawn in combinations(answers, own)]
        for total, share in ways.items():
            for drawn in draws:
                after[total + drawn] = after.get(total + drawn, 0) + share / len(draws)
        ways = after
    for total in ways:
        at_most = sum(share for other, share in ways.items() if other <= total)
        at_least = sum(share for other, share in ways.items() if other >= total)
        assert stratified_p(total, strata) == pytest.approx(min(1, 2 * min(at_most, at_least)))
    many = np.array([[3, 1, 1]] * 700)  # the sum of 700 coins: a binomial
    expected = 2 * hypergeom.pmf(1, 3, 1, 1)
    assert stratified_p(233, many) > 0.9 and expected == pytest.approx(2 / 3)


def test_length_is_an_auroc():
    rng = np.random.default_rng(3)
    has = rng.integers(0, 2, 80)
    length = rng.integers(1, 9, 80) + has
    value, low, high, _ = longer_with(length, has)
    assert value == pytest.approx(roc_auc_score(has, length))
    values = []
    for _ in range(2000):
        chosen = rng.integers(0, 80, 80)
        inside, outside = length[chosen][has[chosen] == 1], length[chosen][has[chosen] == 0]
        apart = inside[:, None] - outside[None, :]
        values.append((apart > 0).mean() + (apart == 0).mean() / 2)
    assert (low, high) == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=0.02)


# ---- planted


def test_a_term_that_goes_with_a_label_is_found():
    rng = np.random.default_rng(0)
    texts = texts_of(200, rng)
    speakers = ["woman" if i % 4 == 0 else "driver" for i in range(200)]
    texts = [f"{text} said the {speaker}" for text, speaker in zip(texts, speakers)]
    task = make_task(texts=texts)
    sets = task.majority().to_numpy().copy()
    sets[::4, 2] = rng.random(50) < 0.9
    task = make_task(texts=texts, sets=sets.astype(bool))
    table = term_label_shares(task)
    assert table["side"].unique().tolist() == ["female"]
    by_label = table.set_index("label")
    assert by_label.loc["rude", "p_holm"] < 1e-6 and by_label.loc["rude", "value"] > 0.3
    assert (by_label.drop("rude")["p_holm"] > 0.05).all()
    findings = audit(task, near=False).findings()
    assert findings["what"].str.startswith("rude: share where female terms stand").all()
    assert len(findings) == 1


def test_labels_that_go_together_shift_or_stand_by_name_are_found():
    train = make_task(seed=1)
    sets = train.majority().to_numpy().astype(bool)
    sets[:, 1] = sets[:, 0]
    sets[:, 2] = True
    texts = [f"it was late {i}" if has else f"it was well {i}" for i, has in enumerate(sets[:, 0])]
    task = with_splits(train, make_task(texts=texts, sets=sets, seed=2))
    found = audit(task, near=False).findings()
    assert set(found["part"]) == {"shifts", "pairs", "wording"}
    shifted = prior_shifts(task).set_index("label")
    assert shifted.loc["rude", "value"] == pytest.approx(1 - label_priors(task)["value"][2])
    wording = label_wording(task).set_index("label")
    assert wording.loc["late", ["share", "elsewhere"]].tolist() == [1, 0]


def test_an_annotator_who_always_says_yes_is_found():
    task = make_task(people=3)
    votes = np.array(task.annotations)
    votes[:, 2] = 1
    task = replace(task, annotations=votes)
    leanings = annotator_leanings(task)
    carl = leanings[leanings["who"] == "carl"]
    assert (carl["value"] > 0.3).all() and (carl["p_holm"] < 1e-6).all()
    assert annotator_agreement(task).set_index("who")["value"].idxmin() == "carl"
    grouped = annotator_leanings(task, {"carl": "new", "anna": "old", "bert": "old"})
    assert grouped["who"].unique().tolist() == ["new", "old"]
    agreement = agreement_by_label(task)
    assert (agreement["value"] < agreement_by_label(make_task(people=3))["value"]).all()
    with pytest.raises(ValueError, match="does not say who answered"):
        annotator_leanings(replace(task, annotators=None))


def test_copies_across_splits_are_found_and_leave():
    train = make_task(100, seed=1)
    test = make_task(60, seed=2)
    texts = list(test.texts)
    texts[0] = train.texts[7].upper()  # exact but for capitals
    texts[1] = train.texts[8] + "!"  # near
    texts[2] = texts[3]
    task = with_splits(train, replace(test, texts=texts))
    twins = text_twins(task, threshold=0.85)
    found = twins[(twins["split"] == "test")].set_index("id")
    assert found.loc["2-0", ["twin_split", "twin", "kind"]].tolist() == ["train", "1-7", "exact"]
    assert found.loc["2-1", ["twin_split", "twin", "kind"]].tolist() == ["train", "1-8", "near"]
    assert found.loc["2-2", ["twin_split", "twin"]].tolist() == ["test", "2-3"]
    leaks = leakage(task, twins).set_index(["split", "in_split", "kind"])
    assert leaks.loc[("test", "train", "exact"), "texts"] == 1
    assert leaks.loc[("test", "test", "exact"), "texts"] == 2

    clean = deduplicate(task, threshold=0.85)
    assert len(text_twins(clean, threshold=0.85)) == 0
    assert set(train.ids) - set(clean.pool.ids) == {"1-7", "1-8"}
    assert set(task.ids) - set(clean.ids) == {"2-3"}
    assert len(deduplicate(task, near=False).pool) == 99
    alone = deduplicate(replace(test, texts=texts), near=False)
    assert set(test.ids) - set(alone.ids) == {"2-3"}


def test_twins_are_those_of_a_table_of_all_cosines():
    task = load_task("brighter-eng").select(range(300))
    task = replace(task, splits={})
    twins = text_twins(task, threshold=0.4)
    keys = [" ".join(text.split()).casefold() for text in task.texts]
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5)).fit_transform(keys)
    cosines = (vectors @ vectors.T).toarray()
    np.fill_diagonal(cosines, -1)
    expected = {task.ids[i] for i in np.flatnonzero(cosines.max(axis=1) >= 0.4)}
    assert set(twins["id"]) == expected and len(expected) > 5
    assert twins["cosine"].to_numpy() == pytest.approx(
        [min(cosines[task.ids.index(item)].max(), 1) for item in twins["id"]], abs=1e-5
    )


def test_long_texts_with_a_label_are_found():
    rng = np.random.default_rng(5)
    sets = rng.random((120, 3)) < 0.4
    texts = [" ".join(rng.choice(WORDS, 6 + 8 * has[1])) for has in sets]
    table = length_by_label(make_task(120, texts=texts, sets=sets)).set_index("label")
    assert table.loc["broken", "value"] == 1 and table.loc["broken", "p_holm"] < 1e-6
    assert (table.drop("broken")["p_holm"] > 0.01).all()


@pytest.mark.parametrize("seed", range(4))
def test_where_nothing_is_nothing_is_found(seed):
    texts = texts_of(150, np.random.default_rng(seed))
    texts = [
        f"{text} she said" if i % 3 == 0 else f"{text} he said" for i, text in enumerate(texts)
    ]
    test = make_task(150, 10 + seed, texts=texts, people=3)
    found = audit(with_splits(make_task(300, 20 + seed), test))
    assert len(found.findings()) == 0
    assert found.effects()["p"].notna().sum() > 20
    assert "answers beyond chance: 0 " in repr(found)


# ---- swaps


def test_swaps_are_whole_words_and_keep_capitals():
    swaps = term_map(["man", "Muslim people"], ["woman", "Hindu people"])
    assert swap_terms("Man, a MAN; mankind", swaps) == "Woman, a WOMAN; mankind"
    assert swap_terms("muslim people", swaps) == "Hindu people"
    assert swap_terms("a human", swaps) is None
    there = swap_terms("The boy and his brother", term_map(["boy", "brother"], ["girl", "sister"]))
    assert there == "The girl and his sister"
    both = term_map(["a", "b"], ["b", "a"])
    assert swap_terms("a b", both) == "b a"  # never swapped back


def test_a_swap_and_its_reverse_give_the_text_back():
    task = load_task("brighter-eng")
    groups = {"gender": {"male": "man men boy boys", "female": "woman women girl girls"}}
    swapped = swapped_texts(task, groups)
    assert len(swapped) > 50
    swaps = {"male": term_map(["man", "men", "boy", "boys"], ["woman", "women", "girl", "girls"])}
    swaps["female"] = {new: old for old, new in swaps["male"].items()}
    text_of = dict(zip(task.ids, task.texts))
    both = 0
    for row in swapped.itertuples():
        text = text_of[row.id]
        if swap_terms(text, swaps[row.new]) is None:  # holds terms of one side only
            assert swap_terms(row.text, swaps[row.new]) == text
            both += 1
    assert both > 30


# ---- with a model


@pytest.fixture(scope="module")
def lm():
    return load_lm("smollm2-135m-emotions")


@pytest.fixture(scope="module")
def few():
    return load_task("brighter-eng").sample(4, seed=3)


def test_changes_are_those_of_two_runs(lm, few):
    groups = {"articles": {"one": ["the"], "other": ["a"]}}
    changes = swap_changes(lm, few, groups=groups)
    swaps = swapped_texts(few, groups)
    ids = swaps[swaps["old"] == "one"]["id"].tolist()
    before = read_marginals(probe_steps(lm, few.at(ids), 0, progress=False))
    new = replace(few.at(ids), texts=swaps[swaps["old"] == "one"]["text"].tolist())
    after = read_marginals(probe_steps(lm, new, 0, progress=False))
    slow = (after - before).mean()
    rows = changes[changes["old"] == "one"].set_index("label")
    assert rows["value"].to_numpy() == pytest.approx(slow[rows.index].to_numpy(), abs=3e-4)
    assert (rows["n"] == len(ids)).all() and rows["size"].max() > 0


def test_a_swap_that_changes_nothing_changes_nothing(lm, few):
    changes = swap_changes(lm, few, groups={"same": {"one": ["the"], "other": ["the"]}})
    assert changes["size"].max() < 3e-4 and (changes["p_holm"] == 1).all()


def test_places_are_slopes_over_prompts(lm, few):
    effects = position_effects(lm, few).set_index(["quantity", "label"])
    orders = balanced_orders(few.labels)
    assert orders[1] == orders[0][::-1] and len(balanced_orders(few.labels, 3)) == 6
    rows = []
    for order in orders:
        marginals = read_marginals(probe_steps(lm, reorder_labels(few, order), 0, progress=False))
        for label in order:
            place = 1 - order.index(label) / (len(order) - 1)
            rows += [(item, label, place, p) for item, p in marginals[label].items()]
    tidy = pd.DataFrame(rows, columns=["item", "label", "place", "p"])
    middle = orders[0][2]
    assert ("probability", middle) not in effects.index  # its place never changes
    for label, part in tidy[tidy["label"] != middle].groupby("label"):
        slopes = [np.polyfit(own["place"], own["p"], 1)[0] for _, own in part.groupby("item")]
        assert effects.loc[("probability", label), "value"] == pytest.approx(np.mean(slopes))


def test_an_answerer_who_goes_by_the_place_is_found():
    orders = balanced_orders(LABELS, pairs=2)
    rng = np.random.default_rng(0)
    tables = {"by place": [], "by nothing": []}
    for order in orders:
        noise = pd.DataFrame(rng.normal(0.5, 0.05, (20, 3)), columns=list(LABELS))
        tables["by nothing"].append(noise)
        tables["by place"].append(noise.assign(**{order[0]: noise[order[0]] + 0.3}))
    found = order_effects(tables["by place"], orders).set_index("label")
    assert found.loc["all labels", "p"] < 0.001 and found.loc["all labels", "value"] > 0.2
    assert (corrected_p(order_effects(tables["by nothing"], orders)["p"]) > 0.05).all()


def test_labels_near_the_middle_do_not_decide_the_effect_of_place():
    "By hand: the places of four labels in two orders change by 1, 1/3, -1/3 and -1."
    orders = [list("abcd"), list("dcba")]
    first = pd.DataFrame([[0.5, 0.6, 0.5, 0.5]] * 3, columns=list("abcd"))
    second = pd.DataFrame([[0.5, 0.5, 0.6, 0.5]] * 3, columns=list("abcd"))
    found = order_effects([first, second], orders).set_index("label")["value"]
    assert found["b"] == pytest.approx(0.3) and found["a"] == 0
    assert found["all labels"] == pytest.approx(2 * (0.1 / 3) / (2 + 2 / 9))


def test_empty_texts_are_read_at_step_one(lm, few):
    table = empty_answers(lm, few, texts=["N/A"])
    empty = AnnotatedTexts("e", ["x"], ["N/A"], few.labels, np.zeros((1, 0, 5)), False, "emotions")
    trace = probe_steps(lm, empty, 0, decoding="guided", progress=False)
    assert table["value"].to_numpy() == pytest.approx(trace.probs[0], abs=1e-5)
    assert table["gold"].iloc[:-1].to_numpy() == pytest.approx(few.majority().mean().to_numpy())


def test_the_whole_audit_with_a_model(lm, few):
    found = audit(few, lm, near=False)
    assert {"empty", "tokens", "places", "length_in_model", "swaps"} <= set(found.frames)
    text = repr(found)
    assert all(part in text for part in found.summary().index)
    assert not any(text_of in text for text_of in few.texts)
    assert "<table" in found._repr_html_()


# ---- what is done about it, shown and asked from the command line


def test_weighted_answers_are_a_plain_mean():
    task = make_task(20, people=3)
    train = make_task(10, seed=4, people=2)
    weights = {"anna": 2, "bert": 0.5, "carl": 0}
    weighted = weight_annotators(with_splits(train, task), weights)
    for votes, shares in zip(task.annotations, weighted.distribution().to_numpy()):
        assert shares == pytest.approx((2 * votes[0] + 0.5 * votes[1]) / 2.5)
    assert weighted.pool.distribution().shape == (10, 3)
    equal = weight_annotators(task, dict.fromkeys(PEOPLE, 1)).distribution()
    pd.testing.assert_frame_equal(equal, task.distribution())
    nobody = weight_annotators(task, {"anna": 0, "bert": 0, "carl": 0})
    assert nobody.distribution().isna().all(axis=None)
    with pytest.raises(ValueError, match="the weight of 'bert' is -1"):
        weight_annotators(task, {"anna": 1, "bert": -1, "carl": 1})


def test_groups_of_texts_and_their_differences():
    task = make_task(40, people=3)
    groups = text_groups(task)
    assert sorted(groups["agreed"] + groups["divided"]) == sorted(task.ids)
    assert sorted(groups["short"] + groups.get("long", [])) == sorted(task.ids)
    q = task.distribution()
    tables = {"as it is": q * 0 + 0.5, "told": q.clip(0.01, 0.99)}
    table = compare_by_group(tables, task, {"some": groups["agreed"]})
    row = table.set_index("metric").loc["L1"]
    slow = ((tables["told"] - q).abs() - (0.5 - q).abs()).sum(axis=1)[groups["agreed"]]
    assert row["difference"] == pytest.approx(slow.mean()) and row["high"] < 0


def test_renamed_labels_keep_their_columns(lm, few):
    names = ["rage", "dread", "happiness", "grief", "astonishment"]
    found = average_wordings(lm, few, [names], shots=0)
    own = read_marginals(probe_steps(lm, few, 0, progress=False))
    other = read_marginals(probe_steps(lm, rename_labels(few, names), 0, progress=False))
    assert found.to_numpy() == pytest.approx((own.to_numpy() + other.to_numpy()) / 2, abs=3e-4)
    assert list(found.columns) == list(few.labels)


def test_the_figure_takes_names_as_they_are():
    labels = LabelSet(["$x^2$", r"$\foo$", "a_b"])
    task = replace(make_task(60), labels=labels, name=r"$\frac{$")
    figure = plot_audit(audit(task, near=False))
    figure.canvas.draw()
    texts = [label.get_text() for axes in figure.axes for label in axes.get_yticklabels()]
    assert any(r"$\foo$" in text for text in texts)


def test_the_command(tmp_path, capsys):
    frame = pd.DataFrame({"text": make_task(40).texts, "labels": ["late", "rude"] * 20})
    frame.to_csv(tmp_path / "mine.csv", index=False)
    out = tmp_path / "out"
    assert mlc_audit([f"--file={tmp_path}/mine.csv", f"--out={out}"]) == 0
    assert "Audit of mine" in capsys.readouterr().out
    assert "Audit of mine" in (out / "summary.txt").read_text()
    assert {"pairs.csv", "findings.csv", "audit.png"} <= {path.name for path in out.iterdir()}
    for argv in ([], ["--file=a.csv", "--task=goemotions"]):
        assert mlc_audit(argv) == 2
        assert "one of the two" in capsys.readouterr().err


def test_too_few_texts_for_an_interval_are_said_in_words():
    found = audit(load_table(Path(__file__).parent / "data" / "my.csv"))
    assert found.effects()["low"].isna().any()
    assert "nan" not in repr(found) and "too few texts for an interval" in repr(found)


def test_a_table_without_any_interval_gets_its_tables(tmp_path, capsys):
    rows = "a,joy,x\na,anger,y\nb,joy,x\nb,joy,y\nc,none,x\nc,joy,y\n"
    (tmp_path / "few.csv").write_text(f"text,labels,annotator\n{rows}")
    out = tmp_path / "out"
    assert mlc_audit(["--file", str(tmp_path / "few.csv"), "--out", str(out)]) == 0
    assert (out / "findings.csv").is_file() and not (out / "audit.png").exists()
    assert "nan" not in capsys.readouterr().out
