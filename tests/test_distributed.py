"""Two processes of four devices are one run: its result, its stop, its checkpoints, and its mistakes in one line."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny

from slm_assist import cli, distributed, feed, sharding
from slm_assist.checkpoint import whole_steps
from slm_assist.errors import UserError
from slm_assist.run_dir import RunDir

SALT_DS = {
    "steps": 10, "batch_rows": 16, "assist__schedule": "auto", "assist__steps": 6, "select__rows": "online",
    "select__scorer_step": -1, "select__pool_factor": 2, "select__sample": 0, "checkpoint__every": 4,
    "checkpoint__keep": "2,4,6,8", "mesh__data": -1, "mesh__fsdp": 2, "mesh__tensor": 2, "validation__rows": 16,
}  # fmt: skip

# Trains as the command line does, slowly; process 1 may send itself SIGTERM at an update; says which rows were read.
WORKER = """
import json, os, signal, sys, threading, time
from slm_assist import cli
from slm_assist.data.loader import Prefetcher
from slm_assist.data.row_store import Rows
process, stop_at, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
batch_at, get, read = Prefetcher.batch_at, Rows.get, []

def slowly(self, n):
    time.sleep(0.2)
    if n == stop_at and process == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return batch_at(self, n)

def noted(self, row_ids, *more):
    if threading.current_thread().name.startswith("batches"):
        read.append(row_ids.tolist())
    return get(self, row_ids, *more)

Prefetcher.batch_at, Rows.get = slowly, noted
status = cli.main(sys.argv[4:])
with open(out, "w") as file:
    json.dump(read, file)
sys.exit(status)
"""


def start_both(tmp: Path, name: str, stop_at: int = -1, other: dict | None = None, **keys) -> list[subprocess.Popen]:
    """`name` trained by two processes of four devices each; `other`: keys that process 1 has instead."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "XLA_FLAGS": flags(4)}
    started = []
    for process in range(2):
        overrides = tiny.overrides(tmp, **(keys | (other if process and other else {})))
        words = [f"--coordinator=localhost:{port}", "--processes=2", f"--process={process}", f"--run_dir={tmp / name}"]
        words += [f"--{key}={value}" for key, value in overrides.items()]
        command = [sys.executable, "-c", WORKER, str(process), str(stop_at), str(tmp / f"{name}-{process}.json")]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen([*command, "train", *words], env=environment, **pipes))
    return started


def finish(started: list[subprocess.Popen]) -> tuple[list[int], list[str]]:
    try:
        said = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], said


def flags(devices: int) -> str:
    kept = [word for word in os.environ["XLA_FLAGS"].split() if "device_count" not in word]
    return " ".join([*kept, f"--xla_force_host_platform_device_count={devices}"])


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    tiny.run(directory, "small_lm", steps=4, model__d_model=16, checkpoint__every=0, validation__every=0)
    return directory


@pytest.fixture(scope="module")
def keys(tmp):
    return SALT_DS | {"assist__teacher": str(tmp / "small_lm")}


@pytest.fixture(scope="module")
def one(tmp, keys):
    """The run by one process of eight devices."""
    return tiny.run(tmp, "one", **keys)


@pytest.fixture(scope="module")
def two(tmp, keys):
    """The run by two processes, of which one is told to stop; and what they said, and a copy of what they left."""
    told = finish(start_both(tmp, "two", stop_at=2, **keys))
    stopped = shutil.copytree(tmp / "two", tmp / "stopped")
    shutil.copy(tmp / "two-0.json", tmp / "two-0-first.json"), shutil.copy(tmp / "two-1.json", tmp / "two-1-first.json")
    return told, RunDir(stopped), finish(start_both(tmp, "two", **keys)), RunDir(tmp / "two")


def close(a: RunDir, b: RunDir, rel: float = 2e-4) -> None:
    """Equal in what was chosen, and to rounding in what was computed."""
    ours, theirs = tiny.records(a), tiny.records(b)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for x, y in zip(ours, theirs, strict=True):
        assert x.get("rows") == y.get("rows") and x.get("domains", {}).keys() == y.get("domains", {}).keys()
        for name in {"loss", "cross_entropy", "grad_norm", "score_mean", "log_perplexity"} & x.keys():
            assert x[name] == pytest.approx(y[name], rel=rel), (x["step"], name)
    for x, y in zip(final(a), final(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-5)


def final(run: RunDir) -> list[np.ndarray]:
    """Every array of the last checkpoint, whatever devices wrote it."""
    last, leaves = run.checkpoints / str(max(whole_steps(run.checkpoints))), []
    with ocp.PyTreeCheckpointer() as reader:
        for item in ("params", "optimizer", "assist"):
            place = (last / item).absolute()
            plain = jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(place).item_metadata.tree
            )
            leaves += jax.tree.leaves(reader.restore(place, restore_args=plain))
    return leaves


def test_a_signal_to_one_stops_both_at_one_step_and_the_command_goes_on(two, one):
    (status, said), stopped, (status_then, said_then), run = two
    assert status == [143, 143], said
    steps = {
        line.split("saved at step ")[1].split(";")[0] for out in said for line in out.splitlines() if "saved at" in line
    }
    assert len(steps) == 1
    step = int(steps.pop())
    assert 2 < step < 10 and (stopped.checkpoints / str(step)).is_dir()
    assert status_then == [0, 0], said_then
    assert f"going on from step {step}" in said_then[0] and "going on" not in said_then[1]
    train = [line for line in tiny.records(run) if line["kind"] == "train"]
    assert [line["step"] for line in train] == list(range(1, 11))
    assert [line["step"] for line in train if "assisted" in line["stage"]] == list(range(1, 7))  # as `auto` agreed on


def test_two_processes_are_one(two, one):
    close(two[3], one)
    facts = [json.loads(run.config.read_text())["facts"] for run in (two[3], one)]
    assert facts[0] == facts[1]


def test_each_process_reads_only_its_rows(two, tmp):
    first, second = (json.loads((tmp / f"two-{process}-first.json").read_text()) for process in range(2))
    for ours, theirs in zip(first, second, strict=False):
        assert not set(ours) & set(theirs) and len(ours) == len(theirs) in (8, 16)
    train = [line for line in tiny.records(two[3]) if line.get("rows")]
    for line, ours, theirs in zip(train, first, second, strict=False):
        assert set(line["rows"]) <= set(ours) | set(theirs)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{}, {"mesh__data": 2, "mesh__fsdp": 1, "mesh__tensor": 1}])
def test_its_checkpoint_goes_on_in_one_process_on_eight_devices_and_on_two(tmp, keys, two, one, mesh):
    shutil.copytree(two[1].path, tmp / f"on-{len(mesh)}")
    close(tiny.run(tmp, f"on-{len(mesh)}", **(keys | mesh)), one, rel=1e-3)


@pytest.mark.slow
def test_a_mistake_in_one_ends_both_with_its_line(tmp, keys):
    began = time.monotonic()
    status, said = finish(start_both(tmp, "differ", other={"seed": 1}, **keys))
    assert status == [2, 2], said
    assert all("process 1 has another config than process 0: seed 1 not 0" in out for out in said)
    assert time.monotonic() - began < 60 and not (tmp / "differ").exists()


# Process 1 fails where it no longer listens, while process 0 asks it at which step to stop.
CROSSED = """
import sys, time
from slm_assist import distributed
process = int(sys.argv[1])
distributed.start(sys.argv[2], 2, process)
try:
    with distributed.together() as group:
        if process == 0:
            group.caught.append(15)
            for n in range(1000):
                assert not group.stopping(n)
                time.sleep(0.05)
        group._left.set(), group._watcher.join(), time.sleep(1)
        raise KeyboardInterrupt(15)
except KeyboardInterrupt as interrupt:
    print("ended by", interrupt, flush=True)
distributed.leave(1)
"""


@pytest.mark.slow
def test_a_signal_that_crosses_a_failure_ends_both(tmp):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
    words = [[sys.executable, "-c", CROSSED, str(process), place] for process in range(2)]
    began = time.monotonic()
    status, said = finish([subprocess.Popen(command, **pipes) for command in words])
    assert status == [1, 1] and all("ended by 15" in out for out in said), said
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--coordinator=localhost:1", "--processes=2"], "--process=?: give all three"),
        (["--processes=2", "--process=0"], "--coordinator=?"),
        (["--coordinator=localhost", "--processes=2", "--process=0"], "HOST:PORT"),
        (["--coordinator=localhost:1", "--processes=2", "--process=2"], "count the processes from 0"),
        (["--coordinator=localhost:1", "--processes=x"], "'x' is not a number"),
    ],
)
def test_incomplete_flags_take_one_line(words, message, tmp_path, capsys):
    assert cli.main(["train", f"--run_dir={tmp_path / 'run'}", *words]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and message in said[0] and not (tmp_path / "run").exists()


def test_a_coordinator_that_is_not_there_takes_one_line():
    code = "from slm_assist import distributed; distributed.start('localhost:1', 2, 1, seconds=1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})  # fmt: skip
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "did not meet at --coordinator=localhost:1 within 1 s" in done.stderr


def test_alone_nothing_is_joined(monkeypatch):
    distributed.start()
    assert (distributed.index(), distributed.count()) == (0, 1) and not jax.distributed.is_initialized()
    group = distributed.Group()
    assert group.agreed("x", 3, max) == 3 and group.first("x", lambda: 4) == 4 and group.stopping(1) == 0
    group.caught.append(15)
    assert group.stopping(2) == 15


def test_another_directory_of_the_same_name_is_found_out(tmp_path):
    run = RunDir(tmp_path)
    word = run.sign()
    run.check_signed(word)
    with pytest.raises(UserError, match="not the directory that process 0 calls so"):
        run.check_signed("another", seconds=0.1)


def test_rows_of_a_process_need_not_be_neighbours(monkeypatch):
    """As on TPUs, where the mesh follows the wires: here every second device is process 1's."""

    class Device:
        def __init__(self, process):
            self.process_index = process

    class Where:
        def devices_indices_map(self, shape):
            return {Device(i % 2): (slice(2 * i, 2 * i + 2),) for i in range(4)}

    parts = feed.readers(Where(), 8)
    np.testing.assert_array_equal(parts, [[0, 1, 4, 5], [2, 3, 6, 7]])
    mesh = sharding.make_mesh(2, 1, 4)
    np.testing.assert_array_equal(feed.readers(sharding.batch_sharding(mesh), 8), [np.arange(8)])
