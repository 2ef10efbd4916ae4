"""Models that are reached through a chat only: what their reported tokens tell, and what not."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlc_notebooks.alignment import unary_breakdown
from mlc_notebooks.data import LabelSet, load_task
from mlc_notebooks.models import (
    ChatAnswer,
    ModelChanged,
    NotOffered,
    ReportedToken,
    ServerError,
    Told,
    WrongAnswer,
    load_lm,
    token_starts,
)
from mlc_notebooks.probing import LabelBeginnings, ReportedReader, Trace, probe_steps, read_place

DATA = Path(__file__).parent / "chat_answers"
EMOTIONS = LabelSet(["joy", "sadness", "surprise"])
KANJI = LabelSet(["愛", "愁", "joy"])  # 愛 and 愁 begin with the byte e6


def reported(*pieces, others=()):
    "Tokens that spell these pieces (None: not told); `others` are told beside the last one."
    tokens = [ReportedToken(Told(piece, np.log(0.9)), ()) for piece in pieces]
    tokens[-1] = ReportedToken(
        tokens[-1].written, tuple(Told(piece, np.log(prob)) for piece, prob in others)
    )
    return tuple(tokens)


def answer_of(*pieces, text=None, **facts):
    "An answer of tokens that spell these pieces."
    joined = b"".join(piece or b"" for piece in pieces)
    return ChatAnswer(joined.decode() if text is None else text, reported(*pieces), **facts)


def test_a_label_is_found_by_counting_and_not_by_its_text():
    thought = [
        b"joy",
        b" or joy?",
        b"</think>",
        b'Not "joy',
        b'": {"label": ["',
        b"joy",
        b'"]',
        b"}",
    ]
    said = b"".join(thought[3:]).decode()
    for text in (None, said):  # with the thoughts in the text, and taken out by the server
        answer = answer_of(*thought, b"<|im_end|>", text=text, reasoned=text is not None)
        output, outcomes, flags, (row,) = ReportedReader(EMOTIONS).read(answer)
        assert outcomes == ("joy",)
        assert flags == {"reasoning", "preamble"}
        assert row["generated_tokens"] == 5


def test_a_token_that_begins_before_its_label_is_compared_with_what_begins_alike():
    tokens = reported(b'{"label":', others=())
    first = ReportedToken(
        Told(b' ["joy', np.log(0.5)),
        (Told(b' ["sad', np.log(0.2)), Told(b' ["', np.log(0.1)), Told(b" [surprise", np.log(0.1))),
    )
    answer = ChatAnswer('{"label": ["joy"]}', (*tokens, first, *reported(b'"]}')))
    seen = read_place(answer, token_starts(answer), 12, LabelBeginnings(EMOTIONS, "json"))
    np.testing.assert_allclose(seen.found, [0.5, 0.2, 0, 0])
    np.testing.assert_allclose(seen.shared, [0.1] * 4)
    assert seen.untold == pytest.approx(0.1, abs=2e-5)


def test_parts_of_characters_are_told_apart_by_their_bytes():
    love, sorrow = "愛".encode(), "愁".encode()
    assert love[:1] == sorrow[:1]
    first = ReportedToken(Told(love[:1], np.log(0.8)), (Told(b"j", np.log(0.1)),))
    second = ReportedToken(Told(love[1:], np.log(0.75)), (Told(sorrow[1:], np.log(0.25)),))
    head, tail = reported(b'{"label": ["'), reported(b'"]')
    answer = ChatAnswer('{"label": ["愛"]', (*head, first, second, *tail))
    *_, (row,) = ReportedReader(KANJI).read(answer)
    np.testing.assert_allclose(np.exp(row["values"]), [0.6, 0.2, 0.1, 0], rtol=1e-5)

    # Bytes that are not told: the label's place is known, what stands there is not.
    answer = ChatAnswer(answer.text, (*head, *reported(None, None), *tail))
    *_, (row,) = ReportedReader(KANJI).read(answer)
    assert row["wrote"] == "愛" and row["flags"] == ("unseen",)
    assert row["bounds"].tolist() == [[0, 1]] * 4


PIECES = [b"j", b"joy", b"s", b"sa", b"sad", b"sur", b"surprise", b"n", b"none", b'joy"', b"x", b""]


@given(st.integers(0, 2**32 - 1), st.integers(1, len(PIECES)))
def test_the_true_shares_lie_within_the_bounds_however_few_tokens_are_told(seed, count):
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(len(PIECES), 0.3))
    order = np.argsort(-probs)
    told = [Told(PIECES[i] or None, float(np.log(probs[i]))) for i in order[:count]]
    written = told[0]
    if written.spelled is None:
        return
    answer = ChatAnswer(written.spelled.decode(), (ReportedToken(written, tuple(told[1:])),))
    begins = LabelBeginnings(EMOTIONS, "json")
    seen = read_place(answer, token_starts(answer), 0, begins)

    truth = np.zeros(4)  # each token goes to one of the outcomes that it may be, or to none
    for piece, prob in zip(PIECES, probs):
        may_be = np.flatnonzero(begins(piece)) if piece != b"x" else []
        if len(may_be) == 1 or (len(may_be) and rng.random() < 0.8):
            truth[rng.choice(may_be)] += prob
    if truth.sum() > 0:
        low, high = seen.ends().T
        share = truth / truth.sum()
        assert (low <= share + 1e-9).all() and (share <= high + 1e-9).all()


def test_flags_of_answers_that_a_server_cut_refused_or_sampled():
    reader = ReportedReader(EMOTIONS)
    cut = answer_of(b'{"label": ["', b"joy", b'", "', b"sa", finished=False)
    assert reader.read(cut)[2] == {"truncated"}
    talks_on = answer_of(b'{"label": ["', b"joy", b'"]}', b"\nOr:", b' {"label": ["', b'sadness"]}')
    assert reader.read(talks_on)[:2] == ('{"label": ["joy"]}', ("joy",))
    (first, *rest) = reported(b'{"label": ["', b"joy", b'"]}')
    sampled = ReportedToken(first.written, (Told(b"I", np.log(0.95)),))
    answer = ChatAnswer('{"label": ["joy"]}', (sampled, *rest))
    assert reader.read(answer)[2] == {"not_greedy"}
    tied = ReportedToken(first.written, (Told(b"I", first.written.logprob),))
    assert reader.read(ChatAnswer(answer.text, (tied, *rest)))[2] == {"near_tie"}


@pytest.fixture
def replay():
    "A server on this machine that gives the recorded answer to each recorded request."
    exchange = json.loads((DATA / "exchange.json").read_text(encoding="utf-8"))
    state = {"asked": [], "change": lambda answer: answer}

    class Replay(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            state["asked"].append(asked)
            found = [answer for request, answer in exchange if request == asked]
            content = state["change"](found[0]) if found else {"error": "never asked"}
            content = json.dumps(content).encode()
            self.send_response(200 if found else 400)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Replay)
    Thread(target=server.serve_forever, daemon=True).start()
    state["url"] = f"http://127.0.0.1:{server.server_port}/v1"
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture
def chat_lm(replay):
    return load_lm(replay["url"], model="emotions", chat=True, likeliest=10)


@pytest.fixture(scope="module")
def four():
    return load_task("goemotions").sample(4, seed=0)


def test_a_trace_says_that_steps_were_reported_and_keeps_both_ends(chat_lm, four, tmp_path):
    trace = probe_steps(chat_lm, four, shots=4, progress=False)
    made = {name: trace.settings[name] for name in ("reading", "likeliest", "chat", "structured")}
    assert made == {"reading": "reported", "likeliest": 10, "chat": True, "structured": False}
    low, high = trace.bounds[..., 0], trace.bounds[..., 1]
    assert (low <= trace.probs + 1e-6).all() and (trace.probs <= high + 1e-6).all()
    assert "bounded" in repr(trace)
    again = Trace.load(trace.save(tmp_path))
    np.testing.assert_array_equal(again.bounds, trace.bounds)
    np.testing.assert_array_equal(again.logprobs, trace.logprobs)


def test_a_run_goes_on_from_its_folder_and_asks_nothing_twice(replay, chat_lm, four, tmp_path):
    ask = dict(shots=4, progress=False, folder=tmp_path, batch_size=2)
    broken = four.texts[3]

    def breaks_at_the_last(answer):
        last = replay["asked"][-1]["messages"][-1]["content"]
        return {"choices": "no"} if broken in last else answer

    replay["change"] = breaks_at_the_last
    with pytest.raises(WrongAnswer, match=four.ids[3]):
        probe_steps(chat_lm, four, **ask)
    replay["change"] = lambda answer: answer
    replay["asked"].clear()
    trace = probe_steps(chat_lm, four, **ask)
    assert len(replay["asked"]) == 2  # the second batch
    whole = probe_steps(chat_lm, four, shots=4, progress=False)
    np.testing.assert_array_equal(trace.logprobs, whole.logprobs)


def test_what_a_chat_cannot_do_is_refused_by_name_before_anything_is_asked(replay, chat_lm, four):
    replay["asked"].clear()
    for asked in (
        dict(reading="exact"),
        dict(reading="first_token"),
        dict(decoding="guided"),
        dict(hidden=True),
        dict(attention=True),
        dict(no_cache=True),
        dict(long_text="truncate"),
    ):
        with pytest.raises(NotOffered, match="emotions"):
            probe_steps(chat_lm, four, shots=0, **asked)
    with pytest.raises(NotOffered):
        unary_breakdown(chat_lm, four, shots=0)
    assert replay["asked"] == []


def test_a_server_whose_answers_cannot_be_used_is_refused(replay, four):
    def loading(change, error, match):
        replay["change"] = change
        with pytest.raises(error, match=match):
            load_lm(replay["url"], model="emotions", chat=True, likeliest=10)

    def without_logprobs(answer):
        choice = answer["choices"][0]
        return {**answer, "choices": [{**choice, "logprobs": None}]}

    loading(without_logprobs, NotOffered, "without log-probabilities")
    loading(lambda answer: {"choices": []}, NotOffered, "no answer")

    replay["change"] = lambda answer: answer
    lm = load_lm(replay["url"], model="emotions", chat=True, likeliest=10)
    replay["change"] = lambda answer: {**answer, "model": "another"}
    with pytest.raises(ModelChanged, match="'another'"):
        probe_steps(lm, four, shots=4, progress=False)
    with pytest.raises(ServerError, match="never asked"):
        load_lm(replay["url"], model="unknown", chat=True)
