"""Properties that hold whatever the labels, texts, trees and batches.

Hypothesis looks for the ones that break them.

How to search longer than CI does is said in conftest.py.
"""

import json
import unicodedata
import warnings
from itertools import combinations, groupby, permutations

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from mlc_notebooks.alignment import OutputTree, inclusion_bounds
from mlc_notebooks.data import (
    FLAGS,
    FORMATS,
    AnnotatedTexts,
    LabelSet,
    binary_prompts,
    check_texts,
    fold_lines,
    list_is_over,
    list_prompts,
    parse_answer,
    spoken,
    surface_forms,
    unary_prompts,
)
from mlc_notebooks.engine import (
    Node,
    PackedTree,
    PlainTree,
    TokenRows,
    common_prefix,
    packs,
    prompt_tree,
)
from mlc_notebooks.models import LM, AnswerTokens, Form
from mlc_notebooks.probing import FormTrie, StepReader, Trace, ask_for_lists, probe_steps


def examples(share: int):
    "The profile's number of examples, in percent: some examples cost more than others."
    return settings(max_examples=max(1, settings.default.max_examples * share // 100))


# What labels and texts are made of: marks of the formats and of the prompt, prefixes of each
# other, letters that change their length or their neighbours with case, characters of one to many
# tokens.
_MARKS = [
    '"',
    "'",
    "\\",
    ",",
    ".",
    ":",
    "{",
    "}",
    "[",
    "]",
    '{"label": [',
    '"]}',
    '", "',
    "\\u00e9",
    "\\ud83d",
    "{label}",
    "{text}",
    "{labels}",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<think>",
    "</think>",
    "Input:",
    "and",
    "the",
    "none",
    "nothing",
    "label",
    "a",
    "b",
]
_STEMS = [
    "joy",
    "joyful",
    "moral",
    "morality",
    "anger",
    "anger management",
    "the joy",
    "rock",
    "rock andesite",
    "salt and pepper",
    "悲しみ",
    "怒り",
    "غضب",
    "שמחה",
    "é",
    "e\u0301",
    "ß",
    "ss",
    "ı",
    "i",
    "İ",
    "ǆ",
    "Σ",
    "ς",
    "😀",
    "👩\u200d👧",
    "12",
    "1",
]
# SmolLM2 has no tokens for some bytes: of six control characters, and of planes 4 to 11, where
# Unicode has no characters.
letters = st.characters(
    codec="utf-8", max_codepoint=0x3FFFF, exclude_characters="\x04\x06\x13\x14\x16\x1d"
)
words = st.one_of(st.sampled_from(_MARKS + _STEMS), st.text(letters, min_size=1, max_size=6))
printable = st.one_of(
    st.sampled_from(_MARKS + _STEMS),
    st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=6),
)
names = st.builds(
    lambda parts, glue: glue.join(parts).strip(),
    st.lists(printable, min_size=1, max_size=3),
    st.sampled_from(["", " "]),
)
texts = st.builds(
    lambda parts, glue: glue.join(parts),
    st.lists(words, min_size=1, max_size=8),
    st.sampled_from(["", " ", "\n"]),
)
nones = st.one_of(st.none(), st.sampled_from(["none", "nothing", "None of these"]), names)
formats = st.sampled_from(sorted(FORMATS))


@st.composite
def label_sets(draw, least=1, most=6, fmt=None, none=nones):
    "Sets that `LabelSet` and the format accept."
    try:
        labels = LabelSet(
            draw(st.lists(names, min_size=least, max_size=most, unique=True)), draw(none)
        )
        if fmt:
            FORMATS[fmt].check(labels)
    except ValueError:
        assume(False)
    if fmt == "polysyndeton":  # refused where the tokenizer is known: rock and, rock and|esite
        pairs = permutations([outcome.casefold() for outcome in labels.outcomes], 2)
        assume(not any(long.startswith(f"{short} and") for short, long in pairs))
    return labels


@st.composite
def written_lists(draw):
    "A format, labels that it accepts, and some of them in some order."
    fmt = draw(formats)
    labels = draw(label_sets(fmt=fmt))
    return (
        fmt,
        labels,
        tuple(
            draw(st.lists(st.sampled_from(labels.names), min_size=not labels.is_multi, unique=True))
        ),
    )


@examples(300)
@given(written_lists(), st.booleans())
def test_what_is_rendered_is_read_back(written, newline):
    fmt, labels, chosen = written
    text = "\n" * newline + FORMATS[fmt].render(chosen, labels)
    parsed = parse_answer(text, labels, fmt, newline=newline)
    assert parsed.outcomes == (chosen or (labels.none,)) and not parsed.flags
    items = [FORMATS[fmt].item(outcome, labels.none) for outcome in parsed.outcomes]
    assert [text[entry.start : entry.end].strip() for entry in parsed.entries] == items
    assert parse_answer(text + "\nInput: " + text, labels, fmt, newline=newline) == parsed


@examples(100)
@given(label_sets())
def test_a_spelling_belongs_to_one_outcome(labels):
    spelled = [form for outcome in labels.outcomes for form in surface_forms(outcome)]
    assert len(set(spelled)) == len(spelled)
    for outcome in labels.outcomes:
        for form in surface_forms(outcome):
            for stored in (
                form,
                unicodedata.normalize("NFC", form),
                unicodedata.normalize("NFD", form),
            ):  # some tokenizers do the second
                assert parse_answer(f'{{"label": [{json.dumps(stored)}]}}', labels).outcomes == (
                    outcome,
                )


answers = st.one_of(
    texts,
    st.builds(
        "".join,
        st.lists(
            st.one_of(
                st.sampled_from(
                    [
                        "\n",
                        '{"label": [',
                        '"',
                        '", "',
                        '"]}',
                        ", ",
                        " and",
                        " the ",
                        ".",
                        "joy",
                        "Joy",
                        "anger",
                        "none",
                        "\\",
                        "\\u",
                        "d83d",
                        "...",
                        "<think>",
                        "</think>",
                        "```\n",
                        "]",
                        "}",
                        " ",
                    ]
                ),
                st.text(max_size=2),
            ),
            max_size=12,
        ),
    ),
)


@examples(300)
@given(
    answers,
    formats,
    st.booleans(),
    st.booleans(),
    st.sampled_from(["none", "nothing", None]),
    answers,
)
@example('{"label": ["joy", "bliss"]}', "json", True, True, None, "")
@example('{"label": ["joy", "\\ud83d"]}', "json", True, True, "none", "")
def test_any_answer_is_read_and_nothing_is_lost_without_a_flag(
    text, fmt, finished, newline, none, more
):
    labels = LabelSet(["joy", "anger", "the joy"], none)
    parsed = parse_answer(text, labels, fmt, finished, newline)
    known = {flag.name for flag in FLAGS.values() if flag.level != "prompt"} - {"forced"}
    assert parsed.flags <= known and (parsed.entries or parsed.flags)
    seen, at = [], 0
    for entry in parsed.entries:
        assert at <= entry.start <= entry.end <= len(text)
        assert (entry.outcome is None) == ("invented" in entry.flags)
        assert (entry.outcome in seen and entry.outcome is not None) == ("repeated" in entry.flags)
        entry.text.encode()  # can be saved
        assert entry.flags <= parsed.flags
        seen, at = [*seen, entry.outcome], entry.end
    assert ("none_mixed" in parsed.flags) == (none is not None and none in seen and len(seen) > 1)
    if list_is_over(text, labels, FORMATS[fmt], newline):
        thought = "reasoning" in parse_answer(text + more, labels, fmt, True, newline).flags
        assert thought or list_is_over(text + more, labels, FORMATS[fmt], newline)
        late, whole = (
            parse_answer(text + more, labels, fmt, True, newline),
            parse_answer(text, labels, fmt, True, newline),
        )
        assert late == whole or {"several_lists", "reasoning"} & late.flags


json_strings = st.one_of(st.sampled_from(["joy", "Anger", "none"]), texts)


@examples(200)
@given(st.lists(json_strings), st.booleans(), st.sampled_from([None, 0, 2, "\t"]))
def test_valid_json_is_read_as_json_reads_it(written, ascii_only, indent):
    assume(not spoken("".join(written)).reasoned)  # such a mark is text in labels of the task only
    labels = LabelSet(["joy", "anger"])
    parsed = parse_answer(
        json.dumps({"label": written}, ensure_ascii=ascii_only, indent=indent), labels
    )
    assert [entry.text for entry in parsed.entries] == written
    assert parsed.flags <= ({"repeated", "invented", "none_mixed"} if written else {"empty"})


@pytest.fixture(scope="module")
def lm(tiny_lms):
    "Where only the tokenizer matters."
    return tiny_lms["llama"]


SENTINEL = "\ue123"
chunks = st.one_of(
    words,
    st.sampled_from(
        [
            "\r\n",
            "\x0b",
            "\x1c",
            "\x85",
            "\u2028",
            "\t",
            "\ue0000\ue001",
            "\ue0001\ue001",
            "assistant\n",
        ]
    ),
)
user_texts = st.builds("".join, st.lists(chunks, min_size=1, max_size=8)).filter(
    lambda text: text.strip() and "\0" not in text and SENTINEL not in text
)


@st.composite
def questions(draw):
    "A function from a text to the prompts that ask about it, with demonstrations."
    fmt = draw(formats)
    labels = draw(label_sets(least=2, fmt=fmt))
    shown = draw(st.lists(user_texts, max_size=2))
    label, pair = labels.names[0], labels.names[:2]
    return draw(
        st.sampled_from(
            [
                lambda text: list_prompts(
                    [text], labels, [(one, (label,)) for one in shown], fmt=fmt
                ),
                lambda text: unary_prompts(
                    text, labels, [(one, label, "reasonable") for one in shown]
                ),
                lambda text: binary_prompts(text, [pair], [(one, *pair, "a") for one in shown]),
            ]
        )
    )


@examples(100)
@given(user_texts, questions())
def test_a_text_stands_in_the_prompt_once_and_changes_nothing_else(text, ask):
    folded = fold_lines(text)
    assert (
        fold_lines(folded) == folded
        and len(folded.splitlines()) == 1
        and folded.split() == text.split()
    )
    for prompt, frame in zip(ask(text), ask(SENTINEL), strict=True):
        assert frame.plain().count(SENTINEL) == 1
        assert prompt.plain() == frame.plain().replace(SENTINEL, folded)
        assert prompt.messages() == [
            {**turn, "content": turn["content"].replace(SENTINEL, folded)}
            for turn in frame.messages()
        ]


@examples(100)
@given(user_texts, questions())
def test_the_model_reads_the_prompt_as_text(lm, text, ask):
    "Its ids decode to the prompt, and special tokens are those of the chat's own turns."
    tokenizer, special = lm.tokenizer, set(lm.tokenizer.added_tokens_decoder)
    for prompt in ask(text)[:2]:
        ids = lm.encode_prompt(prompt)
        assert tokenizer.decode(
            ids, clean_up_tokenization_spaces=False
        ) == prompt.plain() and not special & set(ids)
        ids, turns = lm.encode_prompt(prompt, chat=True), prompt.messages()
        written = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == written
        marks = [i for i in ids if i in special]
        opens, closes = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        assert marks == [opens, closes] * (len(turns) + 1) + [
            opens
        ]  # a system turn before, the answer's behind


@examples(50)
@given(st.text(max_size=30), st.sampled_from(["\ud800", "\udfff", "\0", ""]), st.text(max_size=5))
def test_a_text_that_no_model_can_read_is_named(lm, before, broken, after):
    text = before + broken + after
    if text.strip() and not broken and "\0" not in text:
        check_texts(["mine"], [text])
        lm.encode_text(text)
    else:
        with pytest.raises(ValueError, match="item 'mine'"):
            check_texts(["mine"], [text])


spelled_sets = formats.flatmap(lambda fmt: st.tuples(st.just(fmt), label_sets(fmt=fmt)))


def decode(lm, ids):
    return lm.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@examples(40)
@given(spelled_sets, st.sampled_from(["\n", "", " "]))
def test_the_forms_are_the_spellings(lm, spelled, before):
    fmt, labels = FORMATS[spelled[0]], spelled[1]
    tokens = AnswerTokens(lm, labels, fmt, before)
    assert (
        decode(lm, tokens.opening) == before + fmt.opening
        and decode(lm, tokens.separator) == fmt.separator
    )
    for kind in ("first", "later"):
        forms, spaces = getattr(tokens, kind), getattr(fmt, f"{kind}_spaces")
        expected = [
            (position, space + (fmt.lead if outcome != labels.none else "") + fmt.escape(form))
            for position, outcome in enumerate(labels.outcomes)
            for space in spaces
            for form in surface_forms(outcome)
        ]
        assert sorted((form.outcome, decode(lm, form.ids)) for form in forms) == sorted(expected)
        assert all(
            decode(lm, form.ids[: form.lead]).strip() == (fmt.lead.strip() if form.lead else "")
            for form in forms
        )
        for one, other in permutations(
            forms, 2
        ):  # what ends a label cannot begin the rest of another
            if other.ids[: len(one.ids)] == one.ids:
                assert other.ids[len(one.ids)] not in tokens.terminators


@examples(40)
@given(spelled_sets)
def test_collisions_are_the_pairs_with_a_common_first_token(lm, spelled):
    tokens = AnswerTokens(lm, spelled[1], spelled[0])

    def first(form):
        return form.ids[: form.lead + 1]

    pairs = {
        frozenset(spelled[1].outcomes[form.outcome] for form in pair)
        for forms in (tokens.first, tokens.later)
        for pair in combinations(forms, 2)
        if first(pair[0]) == first(pair[1]) and pair[0].outcome != pair[1].outcome
    }
    found = set(map(frozenset, tokens.collisions()))
    assert found <= pairs and set().union(*found) == set().union(*pairs)


paths = st.lists(st.integers(0, 3), min_size=1, max_size=6).map(tuple)


@examples(100)
@given(st.lists(paths, min_size=1, max_size=12, unique=True), st.integers(0, 2), st.booleans())
def test_a_trie_holds_every_beginning_once(spellings, lead, leads_only):
    forms = [Form(outcome, ids, min(lead, len(ids) - 1)) for outcome, ids in enumerate(spellings)]
    trie, context = FormTrie(forms, leads_only), Node(None, [7, 8])
    grown = [tuple(node.path()[2:]) for node in trie.grow(context)]

    def ends(form):
        return range(1, (form.lead if leads_only else len(form.ids)) + 1)

    assert sorted(grown) == sorted({form.ids[:end] for form in forms for end in ends(form)})
    assert all(
        path[:-1] in ((), *grown[:place]) for place, path in enumerate(grown)
    )  # parents first
    assert trie.position == {(): -1, **{path: place for place, path in enumerate(grown)}}


architectures = st.sampled_from(["llama", "qwen2", "gemma3_text", "gpt2", "gpt_neox"])
runs = st.lists(st.integers(0, 49151), min_size=1, max_size=12)
trunks = st.integers(0, 80).map(
    lambda length: np.random.default_rng(length).integers(0, 49152, length).tolist()
)  # attended to in 32s
new_nodes = st.lists(
    st.tuples(st.integers(0, 50), st.one_of(st.none(), st.integers(0, 12)), runs),
    min_size=1,
    max_size=8,
)
calls = st.lists(
    st.tuples(new_nodes, st.sampled_from(["go on", "forget", "start again"])),
    min_size=1,
    max_size=5,
)


def grow(alive, new):
    "Nodes below those of `alive` and below each other; a parent may be cut short."
    for parent, at, ids in new:
        below = alive[parent % len(alive)]
        alive.append(Node(below, ids, None if at is None else min(at, len(below.ids))))
    return alive[len(alive) - len(new) :]


def assert_same_reading(one, twin):
    "Trap 9."
    np.testing.assert_allclose(one.logprobs, twin.logprobs, atol=1e-3, rtol=0)
    np.testing.assert_allclose(np.exp(one.logprobs), np.exp(twin.logprobs), atol=1e-4, rtol=0)
    np.testing.assert_allclose(one.margin, twin.margin, atol=1e-3, rtol=0)
    assert (one.best == twin.best)[twin.margin > 1e-3].all()
    for states, others in ((one.hidden, twin.hidden), (one.attention, twin.attention)):
        assert (states is None) == (others is None)
        for mine, its in zip(*([], []) if states is None else (states, others), strict=True):
            np.testing.assert_allclose(mine, its, atol=1e-4, rtol=1e-3)


@examples(100)
@given(
    architectures,
    trunks,
    st.integers(1, 40),
    calls,
    st.sampled_from([(False, False)] * 3 + [(True, True)]),
)
def test_a_packed_tree_is_the_plain_one(
    tiny_lms, architecture, shared, tokens_per_pass, calls, states
):
    lm, watch = tiny_lms[architecture], np.arange(0, 49152, 997)
    packed, plain = PackedTree(lm, shared, tokens_per_pass), PlainTree(lm, shared)
    alive = [packed.root]
    for new, then in calls:
        nodes = grow(alive, new)
        assert_same_reading(
            packed.compute(nodes, watch, *states), plain.compute(nodes, watch, *states)
        )
        if then == "forget":  # every second of those that nothing grows on
            over = [node for node in alive[1:] if all(other.parent is not node for other in alive)][
                ::2
            ]
            packed.forget(over)
            alive = [node for node in alive if node not in over]
        elif then == "start again":
            packed.rewind()
            del alive[1:]
        assert packed.slots.end - len(packed.slots.free) == len(shared) + sum(
            len(node.ids) for node in alive[1:]
        )


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3_text", "gpt2", "gpt_neox"])
def test_every_architecture_is_packed(tiny_lms, architecture):
    "Otherwise the property above would be about a tree that nobody uses."
    assert packs(tiny_lms[architecture])


@examples(100)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=8), min_size=1, max_size=5))
def test_the_common_prefix_leaves_each_row_a_token(rows):
    shared = common_prefix(rows)

    def agree(length):
        return (
            all(len(row) > length for row in rows)
            and len({tuple(row[:length]) for row in rows}) == 1
        )

    assert agree(shared) and not agree(shared + 1)
    kept = TokenRows(iter(rows))
    assert (
        kept.shared == rows[0][:shared]
        and list(kept) == rows
        and kept.lengths() == list(map(len, rows))
    )


def make_task(fmt, labels, asked):
    ids = [f"item {i}" for i in range(len(asked))]
    return fmt, AnnotatedTexts(
        "made", ids, asked, labels, [np.zeros((0, len(labels)), np.uint8)] * len(asked)
    )


def tasks(least=1, most=5, most_texts=4, **options):
    "A format, and some texts to ask about with labels that the format accepts."
    return formats.flatmap(
        lambda fmt: st.builds(
            make_task,
            st.just(fmt),
            label_sets(least, most, fmt, **options),
            st.lists(user_texts, min_size=1, max_size=most_texts),
        )
    )


def assert_same_trace(one: Trace, twin: Trace):
    "Trap 9, item by item: near ties are flagged and may be written otherwise."
    for item in twin.items.index:
        if "near_tie" in one.items["flags"][item] or "near_tie" in twin.items["flags"][item]:
            continue
        assert one.items.loc[item].equals(twin.items.loc[item])
        mine, its = ((trace.steps["example"] == item).to_numpy() for trace in (one, twin))
        np.testing.assert_allclose(one.logprobs[mine], twin.logprobs[its], atol=1e-3, rtol=0)
        np.testing.assert_allclose(one.probs[mine], twin.probs[its], atol=1e-4, rtol=0)
        for column in ("mass", "go", "stop"):
            np.testing.assert_allclose(
                one.steps[column][mine], twin.steps[column][its], atol=1e-4, rtol=0
            )
        for column in ("step", "wrote", "flags", "prompt_tokens", "generated_tokens"):
            assert list(one.steps[column][mine]) == list(twin.steps[column][its])


ways = st.fixed_dictionaries(
    {"reading": st.sampled_from(["exact", "first_token"]), "chat": st.booleans()}
)


def probe(lm, task, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "these share a first token")
        how = dict(shots=0, collisions="warn", tolerance=0, progress=False)
        return probe_steps(lm, task, **{**how, **options})


@examples(12)
@given(
    architectures,
    tasks(most=4, most_texts=3),  # what it costs grows with texts x labels ** 2
    ways,
    st.integers(1, 2),
    st.randoms(use_true_random=False),
)
def test_guided_decoding_keeps_to_the_format_however_it_is_batched(
    tiny_lms, architecture, task, way, batch_size, random
):
    fmt, task = task
    ask = dict(fmt=fmt, decoding="guided", **way)
    whole = probe(tiny_lms[architecture], task, **ask)
    for item, output, outcomes, flags in whole.items[["output", "outcomes", "flags"]].itertuples():
        parsed = parse_answer(output, task.labels, fmt, newline=not way["chat"])
        assert (parsed.outcomes, parsed.flags) == (outcomes, frozenset()) and set(flags) <= {
            "near_tie",
            "boundary_merged",
        }
        assert len(outcomes) == 1 or task.labels.is_multi
        steps = whole.steps[whole.steps["example"] == item]
        assert tuple(steps["wrote"]) == outcomes and list(steps["step"]) == list(
            range(1, len(outcomes) + 1)
        )
    assert np.isfinite(whole.logprobs).all() and (whole.logprobs <= 1e-5).all()
    assert (
        whole.steps[["mass", "go", "stop"]].ge(0).all(axis=None)
        and (whole.steps["go"] + whole.steps["stop"]).le(1 + 1e-4).all()
    )
    assert way["reading"] == "first_token" or whole.steps["mass"].le(1 + 1e-4).all()
    order = random.sample(range(len(task)), len(task))
    assert_same_trace(
        probe(tiny_lms[architecture], task.select(order), batch_size=batch_size, **ask), whole
    )
    assert_same_trace(probe(tiny_lms[architecture], task, no_cache=True, **ask), whole)


@examples(8)
@given(architectures, tasks(), ways, st.integers(1, 3))
def test_free_decoding_agrees_with_its_twin(tiny_lms, architecture, task, way, batch_size):
    fmt, task = task
    trace = probe(tiny_lms[architecture], task, fmt=fmt, batch_size=batch_size, **way)
    assert_same_trace(trace, probe(tiny_lms[architecture], task, fmt=fmt, no_cache=True, **way))
    assert (
        trace.steps.groupby("example")["step"].min()[list(task.ids)] == 1
    ).all() and np.isfinite(trace.logprobs).all()


@st.composite
def written_answers(draw):
    "A format, labels, and an answer with repeats, inventions and what else a model may write."
    fmt = draw(formats)
    labels = draw(label_sets(least=2, most=4, fmt=fmt))
    entries = st.one_of(
        st.sampled_from(labels.outcomes),
        st.sampled_from(labels.outcomes),
        words.filter(lambda word: word.strip()),
    )
    items = [
        FORMATS[fmt].item(entry, labels.none)
        for entry in draw(st.lists(entries, min_size=1, max_size=4))
    ]
    opening = draw(st.sampled_from(["", "", "", "Well: ", " ", "\n"]))
    end = draw(
        st.sampled_from(
            [
                FORMATS[fmt].closing,
                FORMATS[fmt].closing + "\nInput: a",
                "",
                ".",
                ", ",
                "<|im_start|>",
            ]
        )
    )
    return (
        fmt,
        labels,
        opening
        + "\n"
        + FORMATS[fmt].opening
        + (FORMATS[fmt].separator + FORMATS[fmt].later_spaces[0]).join(items)
        + end,
    )


@torch.inference_mode()
def next_probs(lm, ids):
    return lm.model(torch.tensor([ids])).logits[0, -1].double().softmax(-1).numpy()


def stop_masses(lm, ids, tokens):
    "Masses of going on and of stopping after ids, by plain passes."
    after = next_probs(lm, ids)
    go, stop = after[tokens.go].sum(), after[tokens.stop].sum()
    if tokens.bare is not None:
        behind = next_probs(lm, [*ids, tokens.bare])
        go, stop = (
            go + after[tokens.bare] * behind[tokens.bare_go].sum(),
            stop + after[tokens.bare] * behind[tokens.bare_stop].sum(),
        )
    return go, stop


@examples(30)
@given(written_answers())
def test_free_decoding_finds_the_steps_of_any_answer(scripted, lm, written):
    fmt, labels, answer = written
    prompt = lm.encode_prompt(list_prompts(["Hm."], labels, fmt=fmt)[0])
    tokens, script = (
        AnswerTokens(lm, labels, fmt),
        [*lm.encode_text(answer), lm.tokenizer.eos_token_id],
    )
    lm = scripted(len(prompt), script)
    trace = probe_steps(lm, ["Hm."], labels=labels, shots=0, fmt=fmt, progress=False)
    output, outcomes, flags = trace.items.iloc[0][["output", "outcomes", "flags"]]

    def is_over(count):
        return list_is_over(lm.decode(script[:count]), labels, FORMATS[fmt])

    count = min(next(filter(is_over, range(len(script))), len(script) - 1), tokens.longest_answer)
    fed = count - is_over(count)  # the model does not read the token that ends the list
    parsed = parse_answer(output, labels, fmt, finished=count < tokens.longest_answer)
    assert output == lm.decode(script[:count]) and outcomes == parsed.outcomes
    assert set(flags) - {"near_tie", "boundary_merged"} == parsed.flags | (
        {"forced"} if not parsed.entries else set()
    )
    assert list(trace.steps["wrote"]) == (
        [entry.outcome or entry.text for entry in parsed.entries] or [None]
    )
    for entry, step in zip(parsed.entries, trace.steps.itertuples()):
        ends = {lm.decode(script[:end]): end for end in range(count, -1, -1)}
        begin, end = ends.get(output[: entry.start]), ends.get(output[: entry.end])
        assert set(step.flags) == entry.flags | ({"misaligned"} if begin is None else set())
        assert begin is None or step.generated_tokens == begin
        expected = (
            stop_masses(lm, prompt + script[:end], tokens)
            if end is not None and end <= fed
            else (np.nan, np.nan)
        )
        if output[: entry.end][-1:].isascii():  # else see the test below
            np.testing.assert_allclose([step.go, step.stop], expected, atol=1e-4)


def test_the_stop_decision_behind_a_letter_of_two_tokens(scripted, lm):
    labels = LabelSet(["Ä", "B"])
    prompt = lm.encode_prompt(list_prompts(["Hm."], labels)[0])
    script = lm.encode_text('\n{"label": ["Ä", "B"]}')
    trace = probe_steps(
        scripted(len(prompt), script), ["Hm."], labels=labels, shots=0, progress=False
    )
    assert trace.items["outcomes"].iloc[0] == ("Ä", "B")
    end = next(end for end in range(len(script)) if lm.decode(script[:end]).endswith("Ä"))
    expected = stop_masses(
        scripted(len(prompt), script), prompt + script[:end], AnswerTokens(lm, labels)
    )
    np.testing.assert_allclose(trace.steps[["go", "stop"]].iloc[0], expected, atol=1e-4)


def guided_contexts(tokens, start):
    "The ids before each label step of the guided tree, by the labels written (usual spellings)."
    contexts, count = {(): [*start, *tokens.opening]}, len(tokens.labels)
    for written in [
        order for size in range(1, count) for order in permutations(range(count), size)
    ]:
        forms = tokens.later if len(written) > 1 else tokens.first
        usual = next(form.ids for form in forms if form.outcome == written[-1])
        contexts[written] = [*contexts[written[:-1]], *usual, *tokens.separator]
    return contexts


@torch.inference_mode()
def plain_logprobs(lm, rows, watch):
    "Log-probabilities (watched,) after each row of ids, by plain passes over rows of one length."
    found = {}
    for _length, same in groupby(sorted(set(map(tuple, rows)), key=len), key=len):
        same = list(same)
        for i in range(0, len(same), 64):
            logits = lm.model(torch.tensor(same[i : i + 64]), logits_to_keep=1).logits[:, -1]
            found |= zip(
                same[i : i + 64],
                (logits[:, watch] - logits.logsumexp(-1, keepdim=True)).double().numpy(),
            )
    return found


def branches_by_hand(lm, start, tokens):
    "What may follow each prefix, from plain passes (the guided tree)."
    contexts, none = guided_contexts(tokens, start), len(tokens.labels)

    def forms(written):
        return tokens.later if written else tokens.first

    bare = [] if tokens.bare is None else [tokens.bare]
    rows = [
        (*ids, *form.ids[:end])
        for written, ids in contexts.items()
        for form in forms(written)
        for end in range(len(form.ids) + 1)
    ]
    rows += [
        (*ids, *form.ids, *bare) for written, ids in contexts.items() for form in forms(written)
    ]
    watch = StepReader(tokens, "exact").watch
    column, seen = (
        {token: i for i, token in enumerate(watch.tolist())},
        plain_logprobs(lm, rows, watch),
    )

    def at(row, ids):
        return seen[tuple(row)][[column[i] for i in ids]]

    def mass(row, ids):
        return np.exp(at(row, ids)).sum()

    branches = {}
    for written, ids in contexts.items():
        exact, go = np.zeros(none + 1), np.zeros(none)
        for form in forms(written):
            spelled = sum(
                at([*ids, *form.ids[:end]], [form.ids[end]])[0] for end in range(len(form.ids))
            )
            exact[form.outcome] += np.exp(spelled) * mass([*ids, *form.ids], tokens.terminators)
        for label in range(none if len(written) + 1 < none else 0):
            end = [*ids, *next(form.ids for form in forms(written) if form.outcome == label)]
            quote = mass(end, bare)
            on = mass(end, tokens.go) + (quote * mass(end + bare, tokens.bare_go) if bare else 0)
            off = mass(end, tokens.stop) + (
                quote * mass(end + bare, tokens.bare_stop) if bare else 0
            )
            go[label] = on / (on + off)
        exact[[*written, none] if written else []] = 0
        branches[written] = exact / exact.sum(), go
    return branches


def every_output(branches):
    "Probability of each output (labels in order) of a guided tree with these branches."
    outputs, reached = {(): branches[()][0][-1]}, {(): 1.0}
    for written, (following, go) in branches.items():
        for label in np.flatnonzero(following[:-1]):
            p = reached[written] * following[label]
            longer = (*written, int(label))
            outputs[longer] = p * (1 - go[label])
            reached[longer] = p * go[label]
    return outputs


@examples(6)
@given(
    architectures,
    # 3 labels: 10 beginnings of an answer, among them every kind that 4 labels and 41 have
    tasks(2, 3, 2, none=st.sampled_from(["none", "nothing"])),
    st.booleans(),
    st.integers(1, 9),
)
@example(
    "llama", make_task("comma", LabelSet(["joy", "fear"]), ["Hm."]), True, 1
)  # the answer opens with nothing
def test_the_guided_tree_is_a_distribution_and_the_one_made_by_hand(
    tiny_lms, architecture, task, chat, looks
):
    lm, (fmt, task) = tiny_lms[architecture], task
    ask = dict(shots=0, fmt=fmt, chat=chat)
    asked, count = ask_for_lists(lm, task, **ask), len(task.labels)
    trees = OutputTree(
        asked,
        prompt_tree(lm, asked.rows.shared),
        StepReader(asked.answer_tokens, "exact"),
        range(len(task)),
    )
    exact = inclusion_bounds(lm, task, tolerance=0, most_looks=None, progress=False, **ask)
    part = inclusion_bounds(lm, task, tolerance=0, most_looks=looks, progress=False, **ask)
    for text, item in enumerate(task.ids):
        by_hand = branches_by_hand(lm, asked.rows[text], asked.answer_tokens)
        mine = {
            written: (seen.following, seen.go)
            for written in by_hand
            for seen in trees.expand([(text, written)])
        }
        outputs, expected = every_output(mine), every_output(by_hand)
        assert abs(sum(outputs.values()) - 1) < 1e-4 and abs(sum(expected.values()) - 1) < 1e-9
        assert outputs.keys() == expected.keys()
        np.testing.assert_allclose(
            list(outputs.values()), list(expected.values()), atol=1e-4, rtol=0
        )
        marginals = [
            sum(p for output, p in expected.items() if label in output) for label in range(count)
        ]
        for bounds in (exact.low, exact.high, exact.estimate):
            np.testing.assert_allclose(bounds.loc[item], marginals, atol=1e-4, rtol=0)
        assert (part.low.loc[item] <= np.add(marginals, 1e-4)).all() and (
            part.high.loc[item] >= np.subtract(marginals, 1e-4)
        ).all()
        assert (
            part.low.loc[item].le(part.estimate.loc[item] + 1e-9).all()
            and part.estimate.loc[item].le(part.high.loc[item] + 1e-9).all()
        )
        assert part.looks[item] <= looks and 0 <= part.missing[item] <= 1


@examples(20)
@given(tasks(), st.integers(0, 40), st.booleans())
@example(make_task("json", LabelSet(["joy"]), ["word " * 60 + "\n " * 60]), 20, False)
@example(make_task("json", LabelSet(["joy"]), ["word " * 60 + "\U00036084" * 9]), 13, False)
def test_a_truncated_prompt_leaves_room_for_the_answer(lm, task, shortage, chat):
    "Or says that there is none."
    fmt, task = task
    whole = ask_for_lists(lm, task, shots=0, fmt=fmt, chat=chat)
    short = LM("short", lm.model, lm.tokenizer)
    short.__dict__["context_length"] = (
        max(map(len, whole.rows)) + whole.answer_tokens.longest_answer - shortage
    )
    try:
        cut = ask_for_lists(short, task, shots=0, fmt=fmt, chat=chat, long_text="truncate")
    except ValueError as error:
        assert "lower shots" in str(error)
    else:
        assert max(map(len, cut.rows)) + cut.answer_tokens.longest_answer <= short.context_length
        for row, other, flags in zip(whole.rows, cut.rows, cut.flags, strict=True):
            assert (row == other) == ("text_truncated" not in flags)
