"""Both real servers start, tell their model, answer a request, and leave nothing running."""

import json
import os
import urllib.request

import pytest

from mlc_notebooks.models import free_port, start_server, vllm_command


def ask(server, **body):
    "The first choice of a completion."
    body = {"model": server.model, "max_tokens": 1, "temperature": 0, **body}
    request = urllib.request.Request(
        f"{server.url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["choices"][0]


def is_running(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def test_vllm_tells_tokens_by_name(vllm_server, model_folder):
    assert vllm_server.model == str(model_folder)
    named = {"logprobs": 1, "logprob_token_ids": [7042, 2245], "return_tokens_as_token_ids": True}
    choice = ask(vllm_server, prompt=[504, 2827, 282, 4649, 314], **named)
    (told,) = choice["logprobs"]["top_logprobs"]
    assert {"token_id:7042", "token_id:2245"} <= set(told)


def test_llama_answers(llama_server):
    assert is_running(llama_server.process_id)
    assert ask(llama_server, prompt="The capital of France is")["text"] == " Paris"


def test_a_server_that_cannot_load_says_why(server_python, tmp_path):
    port = free_port()
    command = vllm_command(tmp_path, port, server_python("vllm"))
    with pytest.raises(RuntimeError, match="before it was ready"):
        with start_server(command, port, log=tmp_path / "log", progress=False):
            pass
