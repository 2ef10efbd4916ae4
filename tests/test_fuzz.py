"""Properties that hold whatever the labels, texts, trees and batches: hypothesis looks for the ones that break them.

How to search longer than CI does is said in conftest.py.
"""
import json

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from mlc_notebooks.labels import FORMATS, LabelSet, list_is_over, parse_answer, surface_forms
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
