"""Properties that hold whatever the labels, texts, trees and batches: hypothesis looks for the ones that break them.

How to search longer than CI does is said in conftest.py.
"""
import json
import warnings
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from mlc_notebooks.data import AnnotatedTexts
from mlc_notebooks.engine import Node, PackedTree, PlainTree, common_prefix, packs
from mlc_notebooks.labels import FORMATS, LabelSet, list_is_over, parse_answer, surface_forms
from mlc_notebooks.models import AnswerTokens, Form
from mlc_notebooks.probing import FormTrie, Trace, probe_steps
from mlc_notebooks.prompts import binary_prompts, check_texts, fold_lines, list_prompts, unary_prompts


def examples(share: int):
    "The profile's number of examples, in percent: some examples cost more than others."
    return settings(max_examples=max(1, settings.default.max_examples * share // 100))


# What labels and texts are made of: marks of the formats and of the prompt, prefixes of each other, letters that change
# their length or their neighbours with case, characters of one to many tokens.
_MARKS = ['"', "'", "\\", ",", ".", ":", "{", "}", "[", "]", '{"label": [', '"]}', '", "', "\\u00e9", "\\ud83d", "{label}", "{text}",
          "{labels}", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "Input:", "and", "the", "none", "nothing", "label", "a", "b"]
_STEMS = ["joy", "joyful", "moral", "morality", "anger", "anger management", "the joy", "rock", "rock andesite", "salt and pepper",
          "悲しみ", "怒り", "غضب", "שמחה", "é", "e\u0301", "ß", "ss", "ı", "i", "İ", "ǆ", "Σ", "ς", "😀", "👩\u200d👧", "12", "1"]
# SmolLM2 has no tokens for some bytes: of six control characters, and of planes 4 to 11, where Unicode has no characters.
letters = st.characters(codec="utf-8", max_codepoint=0x3ffff, exclude_characters="\x04\x06\x13\x14\x16\x1d")
words = st.one_of(st.sampled_from(_MARKS + _STEMS), st.text(letters, min_size=1, max_size=6))
printable = st.one_of(st.sampled_from(_MARKS + _STEMS),
                      st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=6))
names = st.builds(lambda parts, glue: glue.join(parts).strip(), st.lists(printable, min_size=1, max_size=3), st.sampled_from(["", " "]))
texts = st.builds(lambda parts, glue: glue.join(parts), st.lists(words, min_size=1, max_size=8), st.sampled_from(["", " ", "\n"]))
nones = st.one_of(st.none(), st.sampled_from(["none", "nothing", "None of these"]), names)
formats = st.sampled_from(sorted(FORMATS))


@st.composite
def label_sets(draw, least=1, most=6, fmt=None, none=nones):
    "Sets that `LabelSet` and the format accept."
    try:
        labels = LabelSet(draw(st.lists(names, min_size=least, max_size=most, unique=True)), draw(none))
        if fmt:
            FORMATS[fmt].check(labels)
    except ValueError:
        assume(False)
    return labels


@st.composite
def written_lists(draw):
    "A format, labels that it accepts, and some of them in some order."
    fmt = draw(formats)
    labels = draw(label_sets(fmt=fmt))
    return fmt, labels, tuple(draw(st.lists(st.sampled_from(labels.names), min_size=not labels.is_multi, unique=True)))


@examples(300)
@given(written_lists(), st.booleans())
def test_what_is_rendered_is_read_back(written, newline):
    fmt, labels, chosen = written
    text = "\n" * newline + FORMATS[fmt].render(chosen, labels)
    parsed = parse_answer(text, labels, fmt, newline=newline)
    assert parsed.outcomes == (chosen or (labels.none,)) and not parsed.flags
    items = [FORMATS[fmt].item(outcome, labels.none) for outcome in parsed.outcomes]
    assert [text[entry.start:entry.end].strip() for entry in parsed.entries] == items
    assert parse_answer(text + "\nInput: " + text, labels, fmt, newline=newline) == parsed


@examples(100)
@given(label_sets())
def test_a_spelling_belongs_to_one_outcome(labels):
    spelled = [form for outcome in labels.outcomes for form in surface_forms(outcome)]
    assert len(set(spelled)) == len(spelled)
    for outcome in labels.outcomes:
        for form in surface_forms(outcome):
            assert parse_answer(f'{{"label": [{json.dumps(form)}]}}', labels).outcomes == (outcome,)


answers = st.one_of(texts, st.builds("".join, st.lists(st.one_of(st.sampled_from(
    ['\n', '{"label": [', '"', '", "', '"]}', ", ", " and", " the ", ".", "joy", "Joy", "anger", "none", "\\", "\\u", "d83d", "]", "}", " "]),
    st.text(max_size=2)), max_size=12)))


@examples(300)
@given(answers, formats, st.booleans(), st.booleans(), st.sampled_from(["none", "nothing", None]), answers)
@example('{"label": ["joy", "bliss"]}', "json", True, True, None, "")
@example('{"label": ["joy", "\\ud83d"]}', "json", True, True, "none", "")
def test_any_answer_is_read_and_nothing_is_lost_without_a_flag(text, fmt, finished, newline, none, more):
    labels = LabelSet(["joy", "anger", "the joy"], none)
    parsed = parse_answer(text, labels, fmt, finished, newline)
    known = {"preamble", "invalid", "empty", "truncated", "repeated", "invented", "none_mixed"}
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
        assert list_is_over(text + more, labels, FORMATS[fmt], newline)
        late, whole = parse_answer(text + more, labels, fmt, True, newline), parse_answer(text, labels, fmt, True, newline)
        assert late == whole


json_strings = st.one_of(st.sampled_from(["joy", "Anger", "none"]), texts)


@examples(200)
@given(st.lists(json_strings), st.booleans(), st.sampled_from([None, 0, 2, "\t"]))
def test_valid_json_is_read_as_json_reads_it(written, ascii_only, indent):
    labels = LabelSet(["joy", "anger"])
    parsed = parse_answer(json.dumps({"label": written}, ensure_ascii=ascii_only, indent=indent), labels)
    assert [entry.text for entry in parsed.entries] == written
    assert parsed.flags <= ({"repeated", "invented", "none_mixed"} if written else {"empty"})


SENTINEL = "\ue123"
chunks = st.one_of(words, st.sampled_from(["\r\n", "\x0b", "\x1c", "\x85", "\u2028", "\t", "\ue0000\ue001", "\ue0001\ue001", "assistant\n"]))
user_texts = st.builds("".join, st.lists(chunks, min_size=1, max_size=8)).filter(
    lambda text: text.strip() and "\0" not in text and SENTINEL not in text)


@st.composite
def questions(draw):
    "A function from a text to the prompts that ask about it: a list, unary or binary question with demonstrations."
    fmt = draw(formats)
    labels = draw(label_sets(least=2, fmt=fmt))
    shown = draw(st.lists(user_texts, max_size=2))
    label, pair = labels.names[0], labels.names[:2]
    return draw(st.sampled_from([
        lambda text: list_prompts([text], labels, [(one, (label,)) for one in shown], fmt=fmt),
        lambda text: unary_prompts(text, labels, [(one, label, "reasonable") for one in shown]),
        lambda text: binary_prompts(text, [pair], [(one, *pair, "a") for one in shown])]))


@examples(100)
@given(user_texts, questions())
def test_a_text_stands_in_the_prompt_once_and_changes_nothing_else(text, ask):
    folded = fold_lines(text)
    assert fold_lines(folded) == folded and len(folded.splitlines()) == 1 and folded.split() == text.split()
    for prompt, frame in zip(ask(text), ask(SENTINEL), strict=True):
        assert frame.plain().count(SENTINEL) == 1
        assert prompt.plain() == frame.plain().replace(SENTINEL, folded)
        assert prompt.messages() == [{**turn, "content": turn["content"].replace(SENTINEL, folded)} for turn in frame.messages()]


@examples(100)
@given(user_texts, questions())
def test_the_model_reads_the_prompt_as_text(base_lm, text, ask):
    "Its ids decode to the prompt, and special tokens are those of the chat's own turns."
    tokenizer, special = base_lm.tokenizer, set(base_lm.tokenizer.added_tokens_decoder)
    for prompt in ask(text)[:2]:
        ids = base_lm.encode_prompt(prompt)
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == prompt.plain() and not special & set(ids)
        ids, turns = base_lm.encode_prompt(prompt, chat=True), prompt.messages()
        written = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == written
        marks = [i for i in ids if i in special]
        opens, closes = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        assert marks == [opens, closes] * (len(turns) + 1) + [opens]  # a system turn before, the answer's behind


@examples(50)
@given(st.text(max_size=30), st.sampled_from(["\ud800", "\udfff", "\0", ""]), st.text(max_size=5))
def test_a_text_that_no_model_can_read_is_named(base_lm, before, broken, after):
    text = before + broken + after
    if text.strip() and not broken and "\0" not in text:
        check_texts(["mine"], [text])
        base_lm.encode_text(text)
    else:
        with pytest.raises(ValueError, match="item 'mine'"):
            check_texts(["mine"], [text])


spelled_sets = formats.flatmap(lambda fmt: st.tuples(st.just(fmt), label_sets(fmt=fmt)))


def decode(lm, ids):
    return lm.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@examples(40)
@given(spelled_sets, st.sampled_from(["\n", "", " "]))
def test_the_forms_are_the_spellings(base_lm, spelled, before):
    fmt, labels = FORMATS[spelled[0]], spelled[1]
    tokens = AnswerTokens(base_lm, labels, fmt, before)
    assert decode(base_lm, tokens.opening) == before + fmt.opening and decode(base_lm, tokens.separator) == fmt.separator
    for kind in ("first", "later"):
        forms, spaces = getattr(tokens, kind), getattr(fmt, f"{kind}_spaces")
        expected = [(position, space + (fmt.lead if outcome != labels.none else "") + fmt.escape(form))
                    for position, outcome in enumerate(labels.outcomes) for space in spaces for form in surface_forms(outcome)]
        assert sorted((form.outcome, decode(base_lm, form.ids)) for form in forms) == sorted(expected)
        assert all(decode(base_lm, form.ids[:form.lead]).strip() == (fmt.lead.strip() if form.lead else "") for form in forms)
        for one, other in permutations(forms, 2):  # what ends a label cannot begin the rest of another
            if other.ids[:len(one.ids)] == one.ids:
                assert other.ids[len(one.ids)] not in tokens.terminators


@examples(40)
@given(spelled_sets)
def test_collisions_are_the_pairs_with_a_common_first_token(base_lm, spelled):
    tokens = AnswerTokens(base_lm, spelled[1], spelled[0])
    first = lambda form: form.ids[:form.lead + 1]
    pairs = {frozenset(spelled[1].outcomes[form.outcome] for form in pair) for forms in (tokens.first, tokens.later)
             for pair in combinations(forms, 2) if first(pair[0]) == first(pair[1]) and pair[0].outcome != pair[1].outcome}
    found = set(map(frozenset, tokens.collisions()))
    assert found <= pairs and set().union(*found) == set().union(*pairs)


paths = st.lists(st.integers(0, 3), min_size=1, max_size=6).map(tuple)


@examples(100)
@given(st.lists(paths, min_size=1, max_size=12, unique=True), st.integers(0, 2), st.booleans())
def test_a_trie_holds_every_beginning_once(spellings, lead, leads_only):
    forms = [Form(outcome, ids, min(lead, len(ids) - 1)) for outcome, ids in enumerate(spellings)]
    trie, context = FormTrie(forms, leads_only), Node(None, [7, 8])
    grown = [tuple(node.path()[2:]) for node in trie.grow(context)]
    ends = lambda form: range(1, (form.lead if leads_only else len(form.ids)) + 1)
    assert sorted(grown) == sorted({form.ids[:end] for form in forms for end in ends(form)})
    assert all(path[:-1] in ((), *grown[:place]) for place, path in enumerate(grown))  # parents first
    assert trie.position == {(): -1, **{path: place for place, path in enumerate(grown)}}


architectures = st.sampled_from(["llama", "qwen2", "gemma3_text", "gpt2", "gpt_neox"])
runs = st.lists(st.integers(0, 49151), min_size=1, max_size=12)
new_nodes = st.lists(st.tuples(st.integers(0, 50), st.one_of(st.none(), st.integers(0, 12)), runs), min_size=1, max_size=8)
calls = st.lists(st.tuples(new_nodes, st.sampled_from(["go on", "mark", "rewind", "start again"])), min_size=1, max_size=5)


def grow(alive, new):
    "Nodes below those of `alive` and below each other; a parent may be cut short."
    for parent, at, ids in new:
        below = alive[parent % len(alive)]
        alive.append(Node(below, ids, None if at is None else min(at, len(below.ids))))
    return alive[len(alive) - len(new):]


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
@given(architectures, st.lists(st.integers(0, 49151), max_size=20), st.integers(1, 40), calls, st.sampled_from([(False, False)] * 3 + [(True, True)]))
def test_a_packed_tree_is_the_plain_one(tiny_lms, architecture, shared, tokens_per_pass, calls, states):
    lm, watch = tiny_lms[architecture], np.arange(0, 49152, 997)
    packed, plain, marks = PackedTree(lm, shared, tokens_per_pass), PlainTree(lm, shared), []
    alive = [packed.root]
    for new, then in calls:
        nodes = grow(alive, new)
        assert_same_reading(packed.compute(nodes, watch, *states), plain.compute(nodes, watch, *states))
        if then == "mark":
            marks.append((packed.mark(), len(alive)))
        elif then == "rewind" and marks:
            mark, known = marks.pop()
            packed.rewind(mark)
            del alive[known:]
        elif then == "start again":
            packed.rewind()
            del alive[1:], marks[:]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3_text", "gpt2", "gpt_neox"])
def test_every_architecture_is_packed(tiny_lms, architecture):
    "Otherwise the property above would be about a tree that nobody uses."
    assert packs(tiny_lms[architecture])


@examples(100)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=8), min_size=1, max_size=5))
def test_the_common_prefix_leaves_each_row_a_token(rows):
    shared = common_prefix(rows)
    agree = lambda length: all(len(row) > length for row in rows) and len({tuple(row[:length]) for row in rows}) == 1
    assert agree(shared) and not agree(shared + 1)


@st.composite
def tasks(draw, least=1, most=5, **options):
    "A format, and up to four texts to ask about with labels that the format accepts."
    fmt = draw(formats)
    labels, asked = draw(label_sets(least, most, fmt, **options)), draw(st.lists(user_texts, min_size=1, max_size=4))
    ids = [f"item {i}" for i in range(len(asked))]
    return fmt, AnnotatedTexts("made", ids, asked, labels, [np.zeros((0, len(labels)), np.uint8)] * len(asked))


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
            np.testing.assert_allclose(one.steps[column][mine], twin.steps[column][its], atol=1e-4, rtol=0)
        for column in ("step", "wrote", "flags", "prompt_tokens", "generated_tokens"):
            assert list(one.steps[column][mine]) == list(twin.steps[column][its])


ways = st.fixed_dictionaries({"reading": st.sampled_from(["exact", "first_token"]), "chat": st.booleans()})


def probe(lm, task, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "these share a first token")
        return probe_steps(lm, task, shots=0, collisions="warn", progress=False, **options)


@examples(12)
@given(architectures, tasks(), ways, st.integers(1, 3), st.randoms(use_true_random=False))
def test_guided_decoding_keeps_to_the_format_however_it_is_batched(tiny_lms, architecture, task, way, batch_size, random):
    fmt, task = task
    ask = dict(fmt=fmt, decoding="guided", **way)
    whole = probe(tiny_lms[architecture], task, **ask)
    for item, output, outcomes, flags in whole.items[["output", "outcomes", "flags"]].itertuples():
        parsed = parse_answer(output, task.labels, fmt, newline=not way["chat"])
        assert (parsed.outcomes, parsed.flags) == (outcomes, frozenset()) and set(flags) <= {"near_tie", "boundary_merged"}
        assert len(outcomes) == 1 or task.labels.is_multi
        steps = whole.steps[whole.steps["example"] == item]
        assert tuple(steps["wrote"]) == outcomes and list(steps["step"]) == list(range(1, len(outcomes) + 1))
    assert np.isfinite(whole.logprobs).all() and (whole.logprobs <= 1e-5).all()
    assert whole.steps[["mass", "go", "stop"]].ge(0).all(axis=None) and (whole.steps["go"] + whole.steps["stop"]).le(1 + 1e-4).all()
    assert way["reading"] == "first_token" or whole.steps["mass"].le(1 + 1e-4).all()
    order = random.sample(range(len(task)), len(task))
    assert_same_trace(probe(tiny_lms[architecture], task.select(order), batch_size=batch_size, **ask), whole)
    assert_same_trace(probe(tiny_lms[architecture], task, no_cache=True, **ask), whole)


@examples(8)
@given(architectures, tasks(), ways, st.integers(1, 3))
def test_free_decoding_agrees_with_its_twin(tiny_lms, architecture, task, way, batch_size):
    fmt, task = task
    trace = probe(tiny_lms[architecture], task, fmt=fmt, batch_size=batch_size, **way)
    assert_same_trace(trace, probe(tiny_lms[architecture], task, fmt=fmt, no_cache=True, **way))
    assert (trace.steps.groupby("example")["step"].min()[list(task.ids)] == 1).all() and np.isfinite(trace.logprobs).all()
