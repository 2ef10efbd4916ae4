"""The HTTP client and what of a server's answer is believed, without a real server."""

import copy
import json
import logging
import math
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mlc_notebooks.models import (
    JsonClient,
    Passing,
    Refused,
    ServerError,
    WrongAnswer,
    completion_request,
    likeliest_next,
    load_lm,
    read_choices,
    server_address,
)

KEY = "sk-nobody-must-read-this"


@contextmanager
def server(answer):
    "The address of a server; `answer` gets each handler."

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("content-length", 0)))
            answer(self)

        do_POST = do_GET

        def log_message(self, *of_no_interest):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}/v1"
    finally:
        running.shutdown()
        running.server_close()


def say(handler, status, content, **headers):
    handler.send_response(status)
    for name, value in {"content-length": len(content), **headers}.items():
        handler.send_header(name, str(value))
    handler.end_headers()
    handler.wfile.write(content)


def test_a_key_that_a_server_sends_back_is_shown_nowhere(monkeypatch, caplog):
    monkeypatch.setenv("MLC_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)

    def echo(handler):
        models = {"data": [{"id": handler.headers["authorization"]}, {"id": "b"}]}
        say(handler, 200, json.dumps(models).encode())

    with server(echo) as url, pytest.raises(ValueError, match=r"Bearer \[key\]") as error:
        load_lm(url)
    assert KEY not in str(error.value) + caplog.text


def test_redirections_are_not_followed():
    with server(lambda asked: say(asked, 307, b"", location="http://far.example/")) as url:
        with pytest.raises(ServerError, match="redirects to 'http://far.example/'"):
            JsonClient(url).ask("/v1/x")


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "caf\u00e9"])
def test_a_key_that_no_header_holds_is_not_shown(monkeypatch, key):
    monkeypatch.setenv("MLC_API_KEY", key)
    with pytest.raises(ValueError, match="MLC_API_KEY holds") as error:
        JsonClient("http://127.0.0.1:1/v1")
    assert key not in str(error.value)


def test_keys_of_others_and_plain_text(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    JsonClient("http://far.example/v1")  # the key is not for this host, so nothing is sent
    monkeypatch.setenv("MLC_API_KEY", KEY)
    with pytest.raises(ValueError, match="plain_key_host='far.example'"):
        JsonClient("http://far.example/v1")
    JsonClient("http://far.example/v1", plain_key_host="far.example")
    with pytest.raises(ValueError, match="user name"):
        server_address(f"http://me:{KEY}@far.example/v1")


def test_a_message_of_a_server_is_no_template():
    said = b'{"error": {"message": "{0.__class__} %s [red]{{x}} $y"}}'
    with server(lambda asked: say(asked, 400, said)) as url:
        with pytest.raises(Refused) as error:
            JsonClient(url).ask("/v1/x", {})
    assert "{0.__class__} %s [red]{{x}} $y" in str(error.value)


def test_a_server_that_says_nothing_is_given_up():
    silent = threading.Event()
    with server(lambda asked: silent.wait(5)) as url:
        with pytest.raises(Passing, match="ReadTimeout"):
            JsonClient(url, timeout=0.2).ask("/v1/x", patient=False)
        silent.set()


def test_options_of_a_server_are_refused_elsewhere():
    with pytest.raises(ValueError, match="likeliest: only for a server"):
        load_lm("smollm2-135m", likeliest=20)
    with pytest.raises(ValueError, match="leave both out"):
        load_lm("http://127.0.0.1:1/v1", dtype="bfloat16")


REQUEST = completion_request("m", [[1, 2], [3]], watch=[5])
CHOICE = {"tokens": ["token_id:7"], "top_logprobs": [{"token_id:7": -0.1, "token_id:5": -3.0}]}
ANSWER = {"model": "m", "choices": [{"index": i, "logprobs": CHOICE} for i in (0, 1)]}


@pytest.mark.parametrize(
    "entry",
    [
        {"token_id:7": -0.1},
        {"token_id:7": -0.1, "token_id:5": None},
        {"token_id:7": -0.1, "token_id:5": "-3"},
        {"token_id:7": -0.1, "token_id:5": 0.5},
        {"token_id:7": -3.0, "token_id:5": -0.1},
        {"token_id:7": -0.1, "token_id:5x": -3.0},
        {"token_id:7": -0.1, " joy": -3.0},
        [],
    ],
)
def test_what_is_no_log_probability_is_no_answer(entry):
    spoilt = copy.deepcopy(ANSWER)
    spoilt["choices"][1]["logprobs"]["top_logprobs"] = [entry]
    assert len(read_choices(ANSWER, REQUEST)) == 2
    with pytest.raises(WrongAnswer):
        read_choices(spoilt, REQUEST)


def test_bounds_hold_for_rounded_numbers():
    "Probabilities that add up to a little more than 1 leave no negative rest."
    (found,) = likeliest_next([{1: math.log(0.6), 2: math.log(0.4) + 1e-6}], [1, 9]).rest
    assert -12 < found < -11
