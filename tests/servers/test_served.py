"""A real vLLM server behind a proxy that spoils answers: nothing is lost, no number is wrong."""

import logging

import numpy as np
import pytest
from faults import proxy_to

from mlc_notebooks.data import load_task
from mlc_notebooks.engine import SettingsChanged
from mlc_notebooks.models import PROBE_TEXTS, ModelChanged, Refused, WrongAnswer, load_lm
from mlc_notebooks.probing import probe_steps

KEY = "sk-nobody-must-read-this"
TOKENIZER = "smollm2-135m-emotions"
HOW = dict(shots=0, reading="first_token", collisions="warn", progress=False)


@pytest.fixture(scope="module")
def texts():
    return load_task("goemotions").sample(4, seed=0)


@pytest.fixture(scope="module")
def other_server(vllm_server, server_python, server_logs, tmp_path_factory):
    "vLLM with the base model, under the name of the tuned one."
    from mlc_notebooks.models import fetch_model, free_port, start_server, vllm_command

    port = free_port()
    options = ["--max-model-len", "2048", "--enforce-eager"]
    options += ["--served-model-name", vllm_server.model]
    folder = fetch_model("smollm2-135m")
    command = vllm_command(folder, port, server_python("vllm"), "float32", options)
    log = tmp_path_factory.mktemp("logs") / "other.log"
    server_logs.append(log)
    environment = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with start_server(command, port, environment, log, progress=False) as server:
        yield server


@pytest.fixture
def proxy(vllm_server):
    with proxy_to(vllm_server.url) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def unspoilt(vllm_server, texts):
    "The trace without faults, and the requests for completions that it took, in two batches."
    with proxy_to(vllm_server.url) as proxy:
        lm = load_lm(proxy.url, tokenizer=TOKENIZER)
        before = proxy.requests
        trace = probe_steps(lm, texts, **HOW, batch_size=2)
        return trace, proxy.requests - before


def test_what_passes_is_asked_again(proxy, texts, unspoilt):
    lm = load_lm(proxy.url, tokenizer=TOKENIZER, at_once=2)
    proxy.faults.extend(["broken", "close", "busy", "half", "slow", "close"])
    trace = probe_steps(lm, texts, **HOW)
    assert not proxy.faults
    assert lm.asking.client.trouble.count == 5
    assert trace.items.output.tolist() == unspoilt[0].items.output.tolist()
    np.testing.assert_allclose(trace.frame().prob, unspoilt[0].frame().prob, atol=1e-4)


def test_wrong_token_ids_are_no_numbers(proxy):
    lm = load_lm(proxy.url, tokenizer=TOKENIZER)
    proxy.faults.append("ids")
    before = proxy.requests
    with pytest.raises(WrongAnswer, match="token that was asked for"):
        lm.read_next([lm.encode_text("I am")], lm.encode_text(" happy sad"))
    assert proxy.requests == before + 1  # it is not asked again


def test_another_model_is_found_out_and_the_same_one_goes_on(
    proxy, vllm_server, other_server, texts, unspoilt, tmp_path
):
    lm = load_lm(proxy.url, tokenizer=TOKENIZER)
    rows, watch = [lm.encode_text("I won the game, so I am")], lm.encode_text(" happy sad")
    before = lm.read_next(rows, watch)
    proxy.upstream = other_server.url  # "started again", under the same name
    with pytest.raises(ModelChanged, match="another model than before"):
        for _ in PROBE_TEXTS:  # one of them goes with each request; some are predicted alike
            lm.read_next(rows, watch)
    with pytest.raises(ModelChanged):
        _ = lm.fingerprint
    proxy.upstream = vllm_server.url
    again = lm.read_next(rows, watch)
    np.testing.assert_allclose(again.logprobs, before.logprobs, atol=1e-4)

    # a run that breaks off in its second batch, and goes on
    trace, usual = unspoilt
    proxy.requests = 0
    proxy.refuse_after = int(0.8 * usual)
    with pytest.raises(Refused):
        probe_steps(lm, texts, **HOW, batch_size=2, folder=tmp_path)
    proxy.refuse_after = None
    proxy.upstream = other_server.url
    with pytest.raises(SettingsChanged, match="weights was"):
        other = load_lm(proxy.url, tokenizer=TOKENIZER)
        probe_steps(other, texts, **HOW, batch_size=2, folder=tmp_path)
    proxy.upstream = vllm_server.url
    same = load_lm(proxy.url, tokenizer=TOKENIZER)
    proxy.requests = 0
    resumed = probe_steps(same, texts, **HOW, batch_size=2, folder=tmp_path)
    assert proxy.requests < 0.8 * usual  # the first batch is not asked again
    np.testing.assert_allclose(resumed.frame().prob, trace.frame().prob, atol=1e-4)


def test_no_key_in_files_errors_or_logs(proxy, texts, unspoilt, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLC_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    lm = load_lm(proxy.url, tokenizer=TOKENIZER)
    proxy.requests = 0
    proxy.refuse_after = int(0.8 * unspoilt[1])
    with pytest.raises(Refused) as refused:
        probe_steps(lm, texts, **HOW, batch_size=2, folder=tmp_path / "run")
    proxy.refuse_after = None
    trace = probe_steps(lm, texts, **HOW, batch_size=2, folder=tmp_path / "run")
    trace.save(tmp_path / "trace")

    assert "no: Bearer [key]" in str(refused.value)
    shown = [repr(refused.value), repr(lm), repr(lm.asking), repr(vars(lm.asking.client))]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 3
    for text in [*shown, caplog.text, str(trace.settings)]:
        assert KEY not in text
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path


def test_true_values_lie_within_the_bounds_of_the_likeliest(vllm_server, texts):
    exact = load_lm(vllm_server.url, tokenizer=TOKENIZER)
    few = load_lm(vllm_server.url, tokenizer=TOKENIZER, likeliest=20)
    rows = [exact.encode_text(text)[:20] for text in texts.texts]
    watch = list(range(200, 320))
    whole, part = exact.read_next(rows, watch), few.read_next(rows, watch)
    told = np.isfinite(part.logprobs)
    np.testing.assert_allclose(part.logprobs[told], whole.logprobs[told], atol=1e-4)
    unseen = np.where(told, -np.inf, whole.logprobs)
    assert (unseen <= part.each[:, None]).all()
    assert (np.log(np.exp(unseen).sum(1)) <= part.rest).all()
    written = few.write_on(rows, watch, 3, ["]"])
    assert [one.ids for one in written] == [one.ids for one in exact.write_on(rows, watch, 3, "]")]
