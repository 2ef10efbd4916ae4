"""A real server that is asked in chats, beside the local engine."""

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from mlc_notebooks.alignment import ask_decisions
from mlc_notebooks.data import Prompt, list_prompts
from mlc_notebooks.models import (
    NotOffered,
    free_port,
    load_lm,
    start_server,
    token_starts,
    vllm_command,
)
from mlc_notebooks.probing import LabelBeginnings, probe_steps, read_place

LITTLE = 2e-3  # the server and this machine compute in float32, each in its own order


@pytest.fixture(scope="module")
def local_lm():
    return load_lm("smollm2-135m-emotions")


@pytest.fixture(scope="module")
def few(texts):
    return texts.sample(16, seed=1)


@pytest.fixture(scope="module")
def chat_lm(vllm_server):
    return load_lm(vllm_server.url, model=vllm_server.model, chat=True)


@pytest.mark.parametrize("fmt", ["json", "comma"])
def test_the_first_token_reading_lies_within_the_reported_bounds(chat_lm, local_lm, few, fmt):
    ask = dict(shots=2, fmt=fmt, progress=False)
    trace = probe_steps(chat_lm, few, **ask)
    exact = probe_steps(local_lm, few, reading="first_token", chat=True, **ask)
    one, other = (dict(list(found.steps.groupby("example"))) for found in (trace, exact))
    compared = 0
    for item in few.ids:
        written = one[item]["wrote"].tolist()
        if written != other[item]["wrote"].tolist() or written == [None]:
            flags = {*trace.items["flags"][item], *exact.items["flags"][item]}
            assert "near_tie" in flags or written == [None], (item, written)
            continue
        for row, twin in zip(one[item].index, other[item].index):
            low, high = trace.bounds[row].T
            assert (low - LITTLE <= exact.probs[twin]).all(), (item, low, exact.probs[twin])
            assert (exact.probs[twin] <= high + LITTLE).all(), (item, high, exact.probs[twin])
            compared += 1
    assert compared >= 12


def test_what_is_told_is_what_the_whole_vocabulary_says(chat_lm, local_lm, few):
    prompts = list_prompts(few.texts[:6], few.labels, (), few.label_noun)
    begins = LabelBeginnings(few.labels, "json")
    texts = local_lm.token_texts
    may_be = np.array([begins(text.encode()) & (text != "") for text in texts])
    alone = may_be & (may_be.sum(axis=1, keepdims=True) == 1)
    read = 0
    chats = [prompt.messages() for prompt in prompts]
    for prompt, answer in zip(prompts, chat_lm.answers(chats, 60)):
        place = answer.text.find('["') + 2
        starts = token_starts(answer)
        if place < 2 or place not in starts:
            continue
        written = answer.tokens[starts.index(place)].written.spelled
        if begins(written).sum() > 1:  # then the next token tells more
            continue
        ids = local_lm.encode_prompt(prompt, chat=True) + local_lm.encode_text(answer.text[:place])
        with torch.inference_mode():
            logits = local_lm.model(torch.tensor([ids])).logits[0, -1]
        probs = logits.softmax(-1).numpy()
        seen = read_place(answer, starts, place, begins)
        truth = probs @ alone
        assert (seen.found <= truth + LITTLE).all()
        assert (truth <= seen.found + seen.untold + LITTLE).all()
        assert (probs @ (may_be & ~alone) <= seen.shared + seen.untold + LITTLE).all()
        read += 1
    assert read >= 3


def test_answers_of_a_fixed_form_are_valid_and_say_that_the_rest_was_forbidden(vllm_server, few):
    lm = load_lm(vllm_server.url, model=vllm_server.model, chat=True, structured=True)
    assert lm.after_mask is True
    trace = probe_steps(lm, few, shots=0, progress=False)
    flags = {flag for flags in trace.items["flags"] for flag in flags}
    assert not flags & {"invalid", "preamble", "invented", "empty"}
    assert trace.settings["structured"] and trace.settings["after_mask"]
    with pytest.raises(NotOffered, match="fmt is 'comma'"):
        probe_steps(lm, few, shots=0, fmt="comma")


def test_a_server_of_llama_cpp_is_asked_in_chats_where_it_offers_nothing_else(llama_server, few):
    with pytest.raises(NotOffered, match="takes no schema"):
        load_lm(llama_server.url, model="any", chat=True, structured=True)
    lm = load_lm(llama_server.url, model="any", chat=True)
    trace = probe_steps(lm, few.sample(4, seed=0), shots=2, progress=False)
    assert trace.settings["likeliest"] == 20
    read = trace.steps["mass"] > 0
    assert read.mean() > 0.5
    assert (trace.bounds[read.to_numpy(), :, 0].sum(axis=1) > 0.1).all()  # it is hardly sure


@pytest.fixture(scope="module")
def tiny_qwen(local_lm, tmp_path_factory):
    "Random weights in the shape of Qwen 3, which vLLM's decision endpoint takes."
    size = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, head_dim=32)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=1024)
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=local_lm.vocabulary_size, **size, **heads)
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    folder = tmp_path_factory.mktemp("tiny-qwen")
    model.save_pretrained(folder)
    local_lm.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def decision_server(tiny_qwen, server_python, server_logs):
    port = free_port()
    options = ["--max-model-len", "1024", "--enforce-eager"]
    command = vllm_command(tiny_qwen, port, server_python("vllm"), "float32", options)
    log = tiny_qwen / "server.log"
    server_logs.append(log)
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with start_server(command, port, environment, log, progress=False) as server:
        yield server


def test_decisions_are_those_of_the_model(decision_server, tiny_qwen, few):
    chat_lm = load_lm(decision_server.url, model=decision_server.model, chat=True)
    some = few.sample(3, seed=0)
    decisions = ask_decisions(chat_lm, some, progress=False)

    lm = load_lm(tiny_qwen)
    answers = [lm.encode_text(word)[0] for word in ("yes", "no")]
    for item, text in zip(some.ids, some.texts):
        for name in some.labels:
            asked = f'Question: Is "{name}" one of the {some.label_noun} that fit this text?'
            turn = f"{text}\n\n{asked}\nyes\nno\nAnswer with yes or no only."
            ids = lm.encode_prompt(Prompt("", (), turn), chat=True)
            with torch.inference_mode():
                probs = lm.model(torch.tensor([ids])).logits[0, -1].softmax(-1)[answers].numpy()
            assert decisions.label_mass.loc[item, name] == pytest.approx(probs.sum(), rel=1e-2)
            assert decisions.probs.loc[item, name] == pytest.approx(
                probs[0] / probs.sum(), abs=1e-3
            )


def test_a_server_that_decides_nothing_is_refused_by_name(chat_lm, few):
    with pytest.raises(NotOffered, match="decides nothing here: .*status 501"):
        ask_decisions(chat_lm, few, progress=False)
