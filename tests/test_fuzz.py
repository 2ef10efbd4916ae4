"""Properties that hold whatever the labels, texts, trees and batches: hypothesis looks for the ones that break them.

How to search longer than CI does is said in conftest.py.
"""
import json

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from mlc_notebooks.labels import FORMATS, LabelSet, list_is_over, parse_answer, surface_forms


def examples(share: int):
    "The profile's number of examples, in percent: some examples cost more than others."
    return settings(max_examples=max(1, settings.default.max_examples * share // 100))


# What labels and texts are made of: marks of the formats and of the prompt, prefixes of each other, letters that change
# their length or their neighbours with case, characters of one to many tokens.
_MARKS = ['"', "'", "\\", ",", ".", ":", "{", "}", "[", "]", '{"label": [', '"]}', '", "', "\\u00e9", "\\ud83d", "{label}", "{text}",
          "{labels}", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "Input:", "and", "the", "none", "nothing", "label", "a", "b"]
_STEMS = ["joy", "joyful", "moral", "morality", "anger", "anger management", "the joy", "rock", "rock andesite", "salt and pepper",
          "悲しみ", "怒り", "غضب", "שמחה", "é", "e\u0301", "ß", "ss", "ı", "i", "İ", "ǆ", "Σ", "ς", "😀", "👩\u200d👧", "12", "1"]
words = st.one_of(st.sampled_from(_MARKS + _STEMS), st.text(st.characters(codec="utf-8"), min_size=1, max_size=6))
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
