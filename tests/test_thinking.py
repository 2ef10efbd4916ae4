"""Answers of models that think, and tokenizers that mark the first word of a text."""

import copy
import json
import time

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteFallback, Fuse, Replace, Strip
from tokenizers.decoders import Sequence as Decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace, Punctuation
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mlc_notebooks.alignment import inclusion_bounds
from mlc_notebooks.data import (
    FLAGS,
    FORMATS,
    IRREGULAR_FLAGS,
    LabelSet,
    is_reasoning_token,
    list_is_over,
    list_prompts,
    load_task,
    opens_reasoning,
    parse_answer,
    surface_forms,
)
from mlc_notebooks.models import LM, AnswerTokens, encode_continuation
from mlc_notebooks.probing import probe_steps

LABELS = LabelSet(["joy", "anger", "fear"])
BOXES = LabelSet(["apple", "key"], none="nothing")
JOY, FEAR = '{"label": ["joy"]}', '{"label": ["fear"]}'
HARMONY = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{}"

# text, outcomes, flags
JSON_ANSWERS = [
    (f"<think>{JOY}</think>{FEAR}", ("fear",), "reasoning"),
    (f"\n<think>\nPerhaps {JOY}?\n</think>\n\n{FEAR}", ("fear",), "reasoning"),
    (f"{JOY}</think>\n{FEAR}", ("fear",), "reasoning"),
    (f"Perhaps {JOY}.</think>Here: {FEAR}", ("fear",), "reasoning preamble"),
    (f"<think>Perhaps {JOY}?", (), "reasoning truncated"),
    ("<think>", (), "reasoning truncated"),
    ("<think></think>", (), "reasoning invalid"),
    (f"<think>\n\n</think>\n\n{FEAR}", ("fear",), "reasoning"),
    (f"<think>{JOY}</think>I do not know.", (), "reasoning invalid"),
    (f"<think>a<think>{JOY}</think>{JOY}</think>{FEAR}", ("fear",), "reasoning"),
    (f"<think>{JOY}</think>Hm.<think>{JOY}</think>{FEAR}", ("fear",), "reasoning preamble"),
    (f"{FEAR}<think>or {JOY}?</think>", ("fear",), "reasoning"),
    (f"{FEAR}<think>or {JOY}?", ("fear",), "reasoning"),
    (f'<think>{{"label": ["joy</think>{FEAR}', ("fear",), "reasoning"),
    (f'<think>{JOY}</think>{{"label": ["fe', (), "reasoning truncated"),
    (f'<think>{JOY}</think>{{"label": []}}', (), "reasoning empty"),
    (f'<think>{JOY}</think>{{"label": [fear]}}', (), "reasoning invalid"),
    (f'<think>{JOY}</think>{{"label": ["fear", "bliss"]}}', ("fear",), "reasoning invented"),
    (f"<THINK>{JOY}</Think>{FEAR}", ("fear",), "reasoning"),
    (f"<thinking>{JOY}</thinking>{FEAR}", ("fear",), "reasoning"),
    (f"<thought>{JOY}</thought>{FEAR}", ("fear",), "reasoning"),
    (f"<reasoning>{JOY}</reasoning><answer>{FEAR}</answer>", ("fear",), "reasoning preamble"),
    (f"<seed:think>{JOY}</seed:think>{FEAR}", ("fear",), "reasoning"),
    (f"[THINK]{JOY}[/THINK]{FEAR}", ("fear",), "reasoning"),
    (f"◁think▷{JOY}◁/think▷{FEAR}", ("fear",), "reasoning"),
    (f"<|begin_of_thought|>{JOY}<|end_of_thought|>{FEAR}", ("fear",), "reasoning"),
    (f"<|START_THINKING|>{JOY}<|END_THINKING|>{FEAR}", ("fear",), "reasoning"),
    (f"<|channel>thought\n{JOY}<channel|>{FEAR}", ("fear",), "reasoning"),
    (f"<|open|>think<|sep|>{JOY}<|close|>think<|sep|>{FEAR}", ("fear",), "reasoning"),
    (HARMONY.format(JOY, FEAR), ("fear",), "reasoning"),
    (f"<|channel|>analysis<|message|>{JOY}", (), "reasoning truncated"),
    (f"<|channel|>final<|message|>{FEAR}", ("fear",), "reasoning"),
    (f"analysis{JOY}assistantfinal{FEAR}", ("fear",), "reasoning"),
    (f'I will answer as {{"label": [...]}}: {FEAR}', ("fear",), "preamble several_lists"),
    (f'As {{"label": ["a", "b", ...]}}: {FEAR}', ("fear",), "preamble several_lists"),
    (f"{JOY} No, wait: {FEAR}", ("fear",), "preamble several_lists"),
    (f"{JOY}\n{FEAR}\n{JOY}", ("joy",), "preamble several_lists"),
    (f'{FEAR} or {{"label": ["jo', ("fear",), "several_lists"),
    (f'{FEAR} or {{"label": []}}', (), "preamble several_lists empty"),
    (f'{{"label": ["joy" {FEAR}', ("fear",), "preamble several_lists"),
    (f'{{"label": ["joy {FEAR}', ("fear",), "preamble several_lists"),
    (f"```json\n{FEAR}\n```", ("fear",), "preamble"),
    (f"<think>{JOY}</think>\n```json\n{FEAR}\n```", ("fear",), "reasoning preamble"),
    (f"{FEAR}\nInput: next\n{JOY}", ("fear",), ""),
    (f"{FEAR}\nUser: next\nAssistant: {JOY}", ("fear",), ""),
    ("no list at all", (), "invalid"),
]


@pytest.mark.parametrize("text, outcomes, flags", JSON_ANSWERS)
def test_the_last_whole_list_after_any_reasoning_counts(text, outcomes, flags):
    parsed = parse_answer(text, LABELS)
    assert (parsed.outcomes, parsed.flags) == (outcomes, set(flags.split()))
    for entry in parsed.entries:
        assert text[entry.start : entry.end] == entry.text


LINES = [
    ("\n<think>\njoy, anger\n</think>\n\nfear, anger\n", "comma", ("fear", "anger"), "reasoning"),
    ("<think>joy</think>fear", "comma", ("fear",), "reasoning"),
    ("\n<think>\njoy\n", "comma", (), "reasoning truncated"),
    ("joy\n</think>\n \n fear", "comma", ("fear",), "reasoning"),
    ("\n<think>joy</think>\n\n", "comma", (), "reasoning invalid"),
    ("Hm.\n<think>joy</think>\nfear", "comma", ("fear",), "reasoning preamble"),
    ("\n```\nfear, joy\n```", "comma", ("fear", "joy"), "preamble"),
    ("\nfear\nInput: hm\njoy", "comma", ("fear",), ""),
    ("\n<think>the key. Or?</think>the apple.", "polysyndeton", ("apple",), "reasoning"),
    ("[THINK]the key[/THINK]\nnothing.", "polysyndeton", ("nothing",), "reasoning"),
    ("\nthe key and the apple.", "polysyndeton", ("key", "apple"), ""),
]


@pytest.mark.parametrize("text, fmt, outcomes, flags", LINES)
def test_one_line_lists_after_reasoning(text, fmt, outcomes, flags):
    parsed = parse_answer(text, BOXES if fmt == "polysyndeton" else LABELS, fmt)
    assert (parsed.outcomes, parsed.flags) == (outcomes, set(flags.split()))


def test_a_mark_in_a_label_is_no_mark():
    tags = LabelSet(["<think>", "</think>", "joy"])
    for fmt in ("json", "comma"):
        written = FORMATS[fmt].render(["</think>", "joy", "<think>"], tags)
        parsed = parse_answer("\n" + written, tags, fmt)
        assert (parsed.outcomes, parsed.flags) == (("</think>", "joy", "<think>"), set())


def test_reasoning_that_the_prompt_opens():
    assert opens_reasoning("<|im_start|>assistant\n<think>\n")
    assert not opens_reasoning("<think>\n\n</think>\n\n") and not opens_reasoning("")
    assert parse_answer(JOY, LABELS, thinking=True).flags == {"reasoning", "truncated"}
    parsed = parse_answer(f"{JOY}</think>{FEAR}", LABELS, thinking=True)
    assert (parsed.outcomes, parsed.flags) == (("fear",), {"reasoning"})
    assert not list_is_over(JOY, LABELS, FORMATS["json"], thinking=True)


STREAMED = [
    f"\n<think>Perhaps {JOY}?</think>\n{FEAR}",
    f"Well. [THINK]{JOY}[/THINK]{FEAR}",
    HARMONY.format(JOY, FEAR),
    f'I will answer as {{"label": [...]}}: {FEAR}',
    f"<think></think>```json\n{FEAR}\n```",
    f"{FEAR}, or perhaps {JOY}",
    f"{FEAR}\n<think>Or {JOY}?</think>{JOY}",
]


@pytest.mark.parametrize("text", STREAMED)
def test_decoding_ends_at_the_first_list_outside_of_reasoning(text):
    ends = (end for end in range(len(text)) if list_is_over(text[:end], LABELS, FORMATS["json"]))
    end = next(ends)
    assert text[end - 1] == "]" and text[:end].endswith(FEAR[:-1])
    assert parse_answer(text[:end], LABELS).outcomes == ("fear",)


def test_the_new_flags_are_in_the_table():
    assert {"reasoning", "several_lists"} <= set(FLAGS)
    assert not {"reasoning", "several_lists", "preamble"} & IRREGULAR_FLAGS


LONG = 2_000_000
ENDLESS = {
    "letters": "a" * LONG,
    "an open string": '{"label": ["' + "a" * LONG,
    "escapes": '{"label": ["' + "\\" * LONG,
    "entries": '{"label": [' + '"joy", ' * (LONG // 7),
    "empty lists": '{"label": []} ' * (LONG // 14),
    "lists": (JOY + " ") * (LONG // 19),
    "openings": '{"label": [' * (LONG // 11),
    "openings in strings": '{"label": ["' * (LONG // 12),
    "braces": "{" * LONG,
    "braces and spaces": '{ "label" ' * (LONG // 10),
    "spaces": '{"label":' + " " * LONG,
    "spaces in a list": '{"label": ["joy"' + " " * LONG,
    "line breaks": "\n" * LONG,
    "marks that open": "<think>" * (LONG // 7),
    "marks that close": "</think>" * (LONG // 8),
    "thoughts": "<think>a</think>" * (LONG // 16),
    "beginnings of marks": "<think" * (LONG // 6),
    "prefixes of marks": "<" + "a" * LONG,
    "harmony": "<|channel|>" * (LONG // 11),
    "commas": "\n" + "joy," * (LONG // 4),
    "ands": "\nthe key" + " and the key" * (LONG // 12),
    "fences": "```\n" * (LONG // 4),
    "next examples": JOY + "\nInput:" * (LONG // 7),
}


@pytest.mark.parametrize("text", ENDLESS.values(), ids=ENDLESS.keys())
def test_two_million_characters_are_read_at_once(text):
    "Anything quadratic takes hours here; what is linear takes a second on a busy machine."
    began = time.process_time()
    for fmt in FORMATS:
        parse_answer(text, LABELS, fmt)
        list_is_over(text, LABELS, FORMATS[fmt])
    assert time.process_time() - began < 30


def written_by(write, tokenizer, answer, chat=False, **options):
    "The trace of a model that writes `answer`, and the ids of prompt and answer."
    lm = LM("scripted", None, tokenizer)
    (prompt,) = list_prompts(["Hm."], LABELS)
    ids = lm.encode_prompt(prompt, chat)
    script = tokenizer(answer, add_special_tokens=False).input_ids
    lm = write(len(ids), [*script, tokenizer.eos_token_id])
    how = dict(labels=LABELS, shots=0, chat=chat, tolerance=0, progress=False)
    trace = probe_steps(lm, ["Hm."], **how, **options)
    return lm, ids, script, trace


def check_steps(lm, prompt, script, answer, trace, next_logprobs):
    "The step of `fear` is read where the list that counts begins, by plain passes."
    assert list(trace.steps["wrote"]) == ["fear"] and not trace.steps["flags"].iloc[0]
    begin = answer.rindex("fear")
    at = next(n for n in range(len(script), -1, -1) if len(as_text(lm, script[:n])) == begin)
    assert trace.steps["generated_tokens"].iloc[0] == at
    tokens = AnswerTokens(lm, LABELS, before="")
    context = prompt + script[:at]
    for column, outcome in enumerate(LABELS.outcomes):
        spelled = []
        for form in tokens.first:
            if LABELS.outcomes[form.outcome] == outcome:
                ids = list(form.ids)
                logprob = sum(next_logprobs(lm, context + ids[:i])[ids[i]] for i in range(len(ids)))
                ended = next_logprobs(lm, context + ids)[tokens.terminators]
                spelled.append(logprob + np.logaddexp.reduce(ended))
        assert abs(trace.logprobs[0][column] - np.logaddexp.reduce(spelled)) < 1e-3


def as_text(lm, ids):
    return lm.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_free_decoding_of_a_model_that_thinks(scripted, tokenizer, next_logprobs):
    answer = f"\n<think>{JOY}</think>{FEAR}"
    lm, prompt, script, trace = written_by(scripted, tokenizer, answer)
    assert trace.items["outcomes"].iloc[0] == ("fear",)
    assert set(trace.items["flags"].iloc[0]) - {"near_tie"} == {"reasoning"}
    assert trace.items["output"].iloc[0] == answer.removesuffix("}")
    check_steps(lm, prompt, script, answer, trace, next_logprobs)


def test_thoughts_that_find_no_end(scripted, tokenizer):
    answer = "\n<think>" + f"{JOY}? No. " * 20
    *_, trace = written_by(scripted, tokenizer, answer)
    flags = set(trace.items["flags"].iloc[0]) - {"near_tie"}
    assert flags == {"reasoning", "truncated", "forced"}
    assert trace.items["outcomes"].iloc[0] == () and list(trace.steps["wrote"]) == [None]


def test_a_chat_template_that_opens_the_reasoning(write_as_told, tokenizer, next_logprobs):
    thinker = copy.deepcopy(tokenizer)
    turn = "{% if add_generation_prompt %}"
    assert turn in thinker.chat_template
    head, tail = thinker.chat_template.split(turn)
    thinker.chat_template = head + turn + tail.replace("assistant\n", "assistant\n<think>\n")
    if "<think>" not in thinker.chat_template:
        thinker.chat_template = head + turn + tail.replace("assistant\\n", "assistant\\n<think>\\n")
    write = write_as_told(thinker)
    answer = f"{JOY}?</think>{FEAR}"
    lm, prompt, script, trace = written_by(write, thinker, answer, chat=True)
    assert lm.decode(prompt).endswith("assistant\n<think>\n")
    assert trace.items["outcomes"].iloc[0] == ("fear",)
    assert set(trace.items["flags"].iloc[0]) - {"near_tie"} == {"reasoning"}
    check_steps(lm, prompt, script, answer, trace, next_logprobs)


def test_marks_that_are_special_tokens_are_kept(write_as_told, tokenizer, next_logprobs):
    marked = copy.deepcopy(tokenizer)
    marked.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]})
    assert is_reasoning_token("[THINK]") and not is_reasoning_token("<|im_end|>")
    answer = f"[THINK]{JOY}[/THINK]{FEAR}"
    lm, prompt, script, trace = written_by(write_as_told(marked), marked, answer, chat=True)
    assert len(script) < len(tokenizer(answer).input_ids)  # each mark is one token
    assert trace.items["output"].iloc[0] == answer.removesuffix("}")
    assert trace.items["outcomes"].iloc[0] == ("fear",)
    check_steps(lm, prompt, script, answer, trace, next_logprobs)


def sentencepiece_like(scheme: str) -> PreTrainedTokenizerFast:
    "A small BPE with bytes to fall back on, as Llama 2 has it; `scheme` says where a ▁ is put."
    task = load_task("goemotions").sample(200)
    lines = [*task.texts, *(FORMATS["json"].render(gold, task.labels) for gold in task.gold_sets())]
    lines += [f"Input: {text}" for text in task.texts]
    learner = Tokenizer(BPE())
    learner.pre_tokenizer = PreTokenizers([Metaspace(), Punctuation("contiguous")])
    learner.train_from_iterator(lines, BpeTrainer(vocab_size=700, show_progress=False))
    parts = json.loads(learner.to_str())["model"]
    pieces = ["</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, *parts["vocab"]]))}
    merges = [tuple(pair) for pair in parts["merges"]]
    made = Tokenizer(BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    made.pre_tokenizer = Metaspace(prepend_scheme=scheme)
    made.decoder = Decoders([Replace("▁", " "), ByteFallback(), Fuse(), Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module", params=["first", "always", "never"])
def small_lm(request):
    "A Llama with random weights and such a tokenizer."
    tokenizer = sentencepiece_like(request.param)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LM(request.param, LlamaForCausalLM(config).eval(), tokenizer)


def joint(lm, text):
    "Ids of a whole text, as the tokenizer gives them."
    return lm.tokenizer(text, split_special_tokens=True).input_ids


ON_A_LINE = [(name, labels) for name, labels in (("json", LABELS), ("comma", LABELS))]


@pytest.mark.parametrize("fmt, labels", [*ON_A_LINE, ("polysyndeton", BOXES)])
def test_an_answer_goes_on_where_the_prompt_ends(small_lm, fmt, labels):
    lm = small_lm
    assert encode_continuation(lm, "") == []
    tokens = AnswerTokens(lm, labels, fmt)
    (prompt,) = list_prompts(["I like it."], labels, fmt=fmt)
    ids = lm.encode_prompt(prompt)
    whole = prompt.plain() + tokens.before + tokens.fmt.opening
    assert ids + tokens.opening == joint(lm, whole)
    for form in tokens.first:  # the text that the model reads is the text that was meant
        read = lm.decode(ids + tokens.opening + list(form.ids)).removeprefix(whole)
        spelling = surface_forms(labels.outcomes[form.outcome])
        assert read.strip().removeprefix("the ") in spelling
    first, second = [
        next(form for form in forms if form.outcome == i)
        for i, forms in enumerate((tokens.first, tokens.later))
    ]
    pieces = [*tokens.opening, *first.ids, *tokens.separator, *second.ids, *tokens.closing]
    rendered = tokens.fmt.render(labels.names[:2], labels)
    written = lm.decode(ids + pieces).removeprefix(prompt.plain())
    assert (tokens.before + rendered).startswith(written)
    assert ids + pieces == joint(lm, prompt.plain() + written)
    if tokens.bare is not None:
        assert lm.decode(ids + [tokens.bare]) == prompt.plain() + '"'


@pytest.mark.parametrize(
    "fmt, decoding", [("json", "guided"), ("json", "free"), ("comma", "guided")]
)
def test_the_reading_is_that_of_the_joint_text(small_lm, fmt, decoding, next_logprobs):
    lm = small_lm
    options = dict(labels=LABELS, shots=0, fmt=fmt, decoding=decoding, tolerance=0, progress=False)
    trace = probe_steps(lm, ["I like it."], **options)
    assert "boundary_merged" not in trace.items["flags"].iloc[0]
    tokens = AnswerTokens(lm, LABELS, fmt)
    (prompt,) = list_prompts(["I like it."], LABELS, fmt=fmt)
    context = prompt.plain() + tokens.before + tokens.fmt.opening
    if decoding == "free":  # the random model lists nothing: its step is read at the opening
        assert list(trace.steps["wrote"]) == [None]
    head = joint(lm, context)
    for column, outcome in enumerate(LABELS.outcomes):
        spelled = set()
        for space in tokens.fmt.first_spaces:
            for spelling in surface_forms(outcome):
                ids = joint(lm, context + space + spelling)
                assert ids[: len(head)] == head
                spelled.add(tuple(ids))
        values = []
        for ids in map(list, spelled):
            logprob = sum(next_logprobs(lm, ids[:i])[ids[i]] for i in range(len(head), len(ids)))
            values.append(logprob + np.logaddexp.reduce(next_logprobs(lm, ids)[tokens.terminators]))
        assert abs(trace.logprobs[0][column] - np.logaddexp.reduce(values)) < 1e-3


def test_the_output_tree_and_plain_passes_agree(small_lm):
    options = dict(labels=LABELS, shots=0, decoding="guided", tolerance=0, progress=False)
    trace = probe_steps(small_lm, ["I like it."], **options)
    twin = probe_steps(small_lm, ["I like it."], no_cache=True, **options)
    np.testing.assert_allclose(trace.logprobs, twin.logprobs, atol=1e-3)
    task = load_task("goemotions").sample(1)
    bounds = inclusion_bounds(small_lm, task, shots=0, progress=False)
    assert bounds.low.le(bounds.high + 1e-9).all(axis=None)


def test_other_tokenizers_spell_as_before(tiny_lms):
    lm = tiny_lms["llama"]  # SmolLM2's
    for text in ("\n", "joy", " joy", '\n{"label": ["', '"', ', "', "", "é", "\n\n"):
        assert encode_continuation(lm, text) == lm.encode_text(text)
    tokens = AnswerTokens(lm, LABELS)
    assert lm.decode(tokens.opening) == '\n{"label": ["'
    assert tokens.opening == lm.tokenizer('\n{"label": ["').input_ids
