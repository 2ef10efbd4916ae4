"""A corpus on a cluster of Ray: two machines in one, workers and a machine killed, a driver killed.

    make test-servers, or: PYTHON -m pytest tests/servers/test_ray.py    (where ray is installed)

The cluster is Ray's own test cluster: two nodes with processes of their own on this machine. The
large runs ask a small random model, whose numbers mean nothing; what is compared is their bits.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mlc_notebooks.alignment import LabelClassifier, probe_dataset
from mlc_notebooks.data import LabelSet, load_task

ray = pytest.importorskip("ray")
Cluster = pytest.importorskip("ray.cluster_utils").Cluster

LABELS = LabelSet(["good", "bad", "odd"], "else")
ROWS = 5000
HEAD = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 200 * 2**20}
SECOND = {"num_cpus": 2, "object_store_memory": 100 * 2**20}


def asking(model, **more):
    return dict(lm=str(model), decoding="guided", block_size=100, progress=False, **more)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    "5,000 rows in three files; 30 of them cannot be answered."
    folder = tmp_path_factory.mktemp("corpus")
    texts = [f"This is text {i}{'!' * (i * 7 % 11)}" for i in range(ROWS)]
    texts[10::200] = [""] * 25
    texts[20::1000] = ["too long " * 300] * 5
    rows = pd.DataFrame({"key": [f"t{i:04}" for i in range(ROWS)], "text": texts})
    rows[:2000].to_parquet(folder / "a.parquet", row_group_size=300)
    rows[2000:3000].to_csv(folder / "b.csv", index=False)
    rows[3000:].to_json(folder / "c.jsonl", orient="records", lines=True)
    return folder


@pytest.fixture(scope="module")
def whole(corpus, tiny_folder, tmp_path_factory):
    "The run that nothing happens to, in one process without Ray."
    out = tmp_path_factory.mktemp("whole")
    return probe_dataset(corpus, LABELS, out=out, id="key", **asking(tiny_folder))


@pytest.fixture()
def cluster():
    made = Cluster(initialize_head=True, head_node_args=HEAD)
    yield made
    ray.shutdown()
    made.shutdown()


def lines(out):
    "What is noted of each finished block; half a line may stand at the end."
    path = Path(out, "blocks.jsonl")
    whole_lines = path.read_text().split("\n")[1:] if path.exists() else []
    found = []
    for line in whole_lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def wait_for(blocks, out, seconds=240):
    "Until so many blocks are finished."
    end = time.time() + seconds
    while len(lines(out)) < blocks:
        assert time.time() < end, f"only {len(lines(out))} blocks after {seconds} seconds"
        time.sleep(0.1)


def files_of(out):
    "The hash of each file of results, by its name."
    files = sorted(Path(out, "rows").iterdir())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def hashes(run):
    return files_of(run.out)


def pid_of(line):
    return int(line["worker"].rpartition(":")[2])


def is_alive(pid):
    "Whether a process runs; one that has ended but was not waited for does not."
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_every_row_has_an_answer_or_an_error(whole):
    rows = whole.frame()
    assert rows["id"].tolist() == [f"t{i:04}" for i in range(ROWS)]
    assert whole.errors == rows["error"].notna().sum() == 30
    assert (rows["error"].isna() == rows["p_good"].notna()).all()
    assert set(rows["error"].dropna().str[:12]) == {"the text of ", "ValueError: "}
    assert rows.loc[rows["error"].isna(), "labels"].map(len).min() > 0


def test_a_worker_and_a_machine_are_killed(cluster, corpus, whole, tiny_folder, tmp_path):
    "One actor, then one node, while 5,000 texts are computed: the same bytes as without faults."
    second = cluster.add_node(**SECOND)
    happened = {}

    def break_things():
        wait_for(4, tmp_path)
        happened["killed"] = pid_of(lines(tmp_path)[0])
        os.kill(happened["killed"], signal.SIGKILL)
        wait_for(len(lines(tmp_path)) + 8, tmp_path)
        cluster.remove_node(second, allow_graceful=False)
        happened["finished"] = len(lines(tmp_path))

    breaking = threading.Thread(target=break_things)
    breaking.start()
    address = cluster.address
    run = probe_dataset(
        corpus, LABELS, out=tmp_path, ray=address, workers=3, id="key", **asking(tiny_folder)
    )
    breaking.join()
    assert not is_alive(happened["killed"]) and happened["finished"] < 50
    assert len({pid_of(line) for line in lines(tmp_path)}) > 3  # others came in their place
    assert hashes(run) == hashes(whole)
    assert (run.rows, run.errors, run.computed) == (ROWS, 30, ROWS)
    of_worker = {}
    for line in lines(tmp_path):
        of_worker.setdefault(pid_of(line), []).append(line["megabytes"])
    longest = max(of_worker.values(), key=len)
    print(f"\n{len(longest)} blocks of one actor: {slope_of(longest):.3f} MB per block")
    assert len(longest) > 12 and slope_of(longest) < 0.5


def slope_of(taken):
    "Megabytes per block, after the first blocks of a worker."
    later = np.array(taken[5:])
    return np.polyfit(np.arange(len(later)), later, 1)[0]


def test_memory_of_a_worker_is_flat(whole):
    "The one worker of the run in this process, which answered all 50 blocks."
    taken = [line["megabytes"] for line in lines(whole.out)]
    print(f"\n{taken[0]:.0f} MB first, {taken[-1]:.0f} MB last, {slope_of(taken):.3f} MB per block")
    assert len(taken) == 50 and slope_of(taken) < 0.25  # 2.5 kB per text


DRIVER = """
import sys
from mlc_notebooks.alignment import probe_dataset
from mlc_notebooks.data import LabelSet
source, model, out = sys.argv[1:]
labels = LabelSet(["good", "bad", "odd"], "else")
options = dict(lm=model, decoding="guided", block_size=100, progress=False)
print(repr(probe_dataset(source, labels, out=out, id="key", ray="local", cpus=0.5, **options)))
"""


def test_a_driver_that_is_killed_goes_on(corpus, whole, tiny_folder, tmp_path):
    "2,000 of the rows, whose blocks are the first 20 of all."
    source = str(corpus / "a.parquet")
    command = [sys.executable, "-c", DRIVER, source, str(tiny_folder), str(tmp_path)]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(5, tmp_path)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = lines(tmp_path)
    workers = {pid_of(line) for line in before}
    assert 5 <= len(before) < 20
    Path(tmp_path, "rows", "0000000.parquet.part").write_bytes(b"half")
    with Path(tmp_path, "blocks.jsonl").open("ab") as torn:
        torn.write(b'\n{"block": 19, "sha')
    damaged = Path(tmp_path, "rows", f"{before[0]['block']:07}.parquet")
    damaged.write_bytes(damaged.read_bytes()[:-1])

    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{2000 - 100 * (len(before) - 1):,} computed in this call" in again.stdout
    assert "damaged or gone" in again.stderr
    found = files_of(tmp_path)
    assert len(found) == 20 and found.items() <= hashes(whole).items()
    assert not any(is_alive(pid) for pid in workers)  # they ended with their driver


def test_the_embedded_model_and_a_classifier_give_the_same_bits(tmp_path):
    task = load_task("brighter-eng").sample(24, seed=0)
    pd.DataFrame({"text": task.texts}).to_parquet(tmp_path / "texts.parquet")
    model = "smollm2-135m-emotions"
    known = task.pool.select(range(24))
    fitted = LabelClassifier(model, labels=list(task.labels), shots=2, coverage=0.5)
    fitted.fit(known.texts, known.distribution())
    runs = {}
    for where in (None, "local"):
        for name, asked in {
            "probe": {"labels": task.labels, "keep_steps": True},
            "classify": {"classifier": fitted},
        }.items():
            out = tmp_path / f"{name}-{where}"
            room = {"ray": where, "block_size": 8, "progress": False}
            source = tmp_path / "texts.parquet"
            runs[name, where] = probe_dataset(source, lm=model, out=out, **room, **asked)
    for name in ("probe", "classify"):
        assert runs[name, None].errors == 0
        assert hashes(runs[name, None]) == hashes(runs[name, "local"])
    assert "abstain" in runs["classify", "local"].frame()


def test_what_would_hang_or_fail_is_refused(cluster, corpus, tiny_folder, tmp_path):
    options = asking(tiny_folder) | {"ray": cluster.address, "out": tmp_path / "run"}
    with pytest.raises(ValueError, match="2 workers of 1 CPUs each: the cluster has room for 1"):
        probe_dataset(corpus, LABELS, workers=2, **options)
    with pytest.raises(ValueError, match="room for 0"):
        probe_dataset(corpus, LABELS, gpus=1, **options)
    options["out"] = tmp_path / "wrong"
    with pytest.raises(ValueError, match="cannot begin.*FileNotFoundError.*nowhere/model"):
        probe_dataset(corpus, LABELS, **options | {"lm": "nowhere/model/"})
    with pytest.raises(ConnectionError, match="no Ray cluster at 127.0.0.1:1 "):
        ray.shutdown()
        probe_dataset(corpus, LABELS, **options | {"ray": "127.0.0.1:1", "out": tmp_path / "gone"})


def test_a_dataset_of_ray_is_a_source(cluster, tiny_folder, tmp_path):
    ray.init(address=cluster.address, log_to_driver=False)
    source = ray.data.from_items([{"key": i, "text": f"This is text {i}"} for i in range(30)])
    run = probe_dataset(
        source, LABELS, out=tmp_path, id="key", ray=cluster.address, **asking(tiny_folder)
    )
    assert sorted(run.frame()["id"], key=int) == [str(i) for i in range(30)]
    assert run.errors == 0
