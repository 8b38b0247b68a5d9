"""What soft labels cost here and in other trainers: same shapes, same machine, one run.

    python experiments/benchmarks/peers/run.py --out peers.json

makes a virtual environment for each peer (build/peers-venvs, 8 GB, as PyPI's PyTorch for Linux brings CUDA along;
pip's own settings apply, such as PIP_INDEX_URL), which takes 5 to 10 minutes once; then about 5 minutes on two cores.

Every system trains a student of the same shape on batches of the same shape with AdamW, without and with a teacher's
soft labels, each in its own process, all started before the first measurement:

    ours          slm_assist.steps (worker_ours.py); 1/3 next tokens, 2/3 soft labels
    tunix         Tunix's PeftTrainer and DistillationTrainer (worker_tunix.py); the same mixture
    trl           TRL's GKD loss in a PyTorch step (worker_trl.py); soft labels alone
    trl_chunked   the loss of TRL's DistillationTrainer, which cuts the logits into chunks; soft labels alone
    trl_liger     Liger's fused linear loss and its kernels in the models (GPU only); soft labels alone

In each of `--rounds` rounds every process runs `--steps` steps, plain and assisted one after the other; a ratio is
taken within a round, and its median and spread are given beside the exact one of FLOPs (slm_assist/flops.py). `cpu` is
the same of process time over all threads, which holds on a machine that has other work. Memory is the most that was
resident in the process, compilation and libraries included, and on a GPU also the most allocated on the device.
Workers are pinned to the first, or the first two, of the cores that this process may use.

The peers leave the last position of a row out of the loss (1 of 256); our rows are packed documents, and theirs not.
On a GPU (`--gpu`, bfloat16, larger models) nothing of this has been run yet; there the memory of all processes is
held at once.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from protocol import Task

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import common  # noqa: E402
import setting  # noqa: E402

from slm_assist import flops  # noqa: E402
from slm_assist.errors import UserError  # noqa: E402


class System(NamedTuple):
    """A trainer: its worker, its environment ("" for this one), and how the worker calls its two steps."""

    worker: str
    venv: str
    plain: str
    assisted: str


SYSTEMS = {
    "ours": System("worker_ours.py", "", "plain", "assisted"),
    "tunix": System("worker_tunix.py", "tunix", "plain", "assisted"),
    "trl": System("worker_trl.py", "trl", "plain", "gkd"),
    "trl_chunked": System("worker_trl.py", "trl", "plain", "chunked"),
    "trl_liger": System("worker_trl.py", "trl", "liger_plain", "liger"),
}
REQUIREMENTS = {
    "tunix": ("google-tunix==0.1.7", "jax==0.10.2", "flax==0.12.8", "optax==0.2.8"),
    "trl": ("trl==1.16.0", "torch==2.15.0", "transformers==5.23.0"),
}
GPU_REQUIREMENTS = {"tunix": ("jax[cuda13]==0.10.2",), "trl": ("liger-kernel==0.8.5",)}
PROCESSES = tuple[str, str, str]  # worker, environment and role: systems may share one


def make_venv(directory: Path, requirements: tuple[str, ...]) -> Path:
    """The interpreter of an environment that has the requirements; makes or changes it where needed.

    Raises:
      UserError: pip could not install them.
    """
    python, done = directory / "bin" / "python", directory / "requirements.txt"
    wanted = "\n".join(requirements) + "\n"
    if done.is_file() and done.read_text() == wanted:
        return python
    print(f"{directory}: installing {', '.join(requirements)}", file=sys.stderr)
    done.unlink(missing_ok=True)  # the file is there when all that it names is
    subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements]
    if subprocess.run(pip, stdout=sys.stderr).returncode:
        raise UserError(f"{directory}: pip could not install {', '.join(requirements)}: see its message above")
    done.write_text(wanted)
    return python


class Worker:
    """A process that runs one step of one system; see protocol.py."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], log: Path):
        self.name, self.log = name, log
        with open(log, "w") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            )

    def answer(self) -> dict[str, Any]:
        """Its next answer.

        Raises:
          UserError: it ended instead; with the last lines it wrote.
        """
        line = self.process.stdout.readline()
        if not line:
            last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
            raise UserError(
                f"{self.name}: the worker ended with {self.process.wait()} ({''.join(last)[:500]}); mend its "
                "environment under --venvs, or leave it out by --systems"
            )
        return json.loads(line)

    def run(self, steps: int) -> dict[str, Any]:
        """Runs steps; seconds of one, and memory so far."""
        with contextlib.suppress(BrokenPipeError):  # `answer` says why
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
        return self.answer()

    def stop(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def environment_of(system: System, cores: int) -> dict[str, str]:
    """Environment variables of a worker: this process's, but no cache of programs, and no paths for the peers."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("JAX_COMPILATION_CACHE_DIR", "PYTHONPATH")
    }
    if not system.venv:
        kept["PYTHONPATH"] = os.pathsep.join([str(common.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return kept | {
        "OMP_NUM_THREADS": str(cores),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }


@contextlib.contextmanager
def started(
    systems: dict[str, System], pythons: dict[str, str], task: Task, logs: Path
) -> Iterator[tuple[dict[PROCESSES, Worker], dict[str, Any]]]:
    """A worker for each process of the systems, ready one after the other, and the versions each system has."""
    workers: dict[PROCESSES, Worker] = {}
    versions: dict[str, Any] = {}
    try:
        for name, system in systems.items():
            for role in (system.plain, system.assisted):
                key = (system.worker, system.venv, role)
                if key not in workers:
                    order = json.dumps(dataclasses.asdict(dataclasses.replace(task, role=role)))
                    command = [pythons[system.venv], str(HERE / system.worker), order]
                    log = logs / f"{name}-{role}.log"
                    workers[key] = Worker(f"{name} {role}", command, environment_of(system, len(task.cores)), log)
                    versions[name] = workers[key].answer()["ready"]
        yield workers, versions
    finally:
        for worker in workers.values():
            worker.stop()


def measure(
    systems: dict[str, System], workers: dict[PROCESSES, Worker], options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """What each system's two steps took, in turn; see the module's text."""
    rounds: list[dict[PROCESSES, dict[str, Any]]] = []
    for number in range(options.rounds + options.warmup):
        rounds.append({key: worker.run(options.steps) for key, worker in workers.items()})
        print(f"round {number + 1} of {options.rounds + options.warmup}", file=sys.stderr)
    kept = rounds[options.warmup :]
    return {name: summary(system, kept) for name, system in systems.items()}


def summary(system: System, rounds: list[dict[PROCESSES, dict[str, Any]]]) -> dict[str, Any]:
    """Of a system: seconds of a step, their ratios within a round, and memory."""
    keys = {kind: (system.worker, system.venv, getattr(system, kind)) for kind in ("plain", "assisted")}
    found: dict[str, Any] = {}
    times = {
        clock: {kind: common.Times.of(turn[key][clock] for turn in rounds) for kind, key in keys.items()}
        for clock in ("wall", "cpu")
    }
    for clock, of in times.items():
        found[f"ratio_{clock}"] = common.ratio(of["assisted"], of["plain"])
        found[f"seconds_{clock}"] = of
    for place in ("host_bytes", "device_bytes"):
        most = {kind: rounds[-1][key][place] for kind, key in keys.items()}
        if None not in most.values():
            found[place] = most | {"ratio": most["assisted"] / most["plain"]}
    found["last_loss"] = {kind: rounds[-1][key]["loss"] for kind, key in keys.items()}
    return found


def make_task(options: argparse.Namespace) -> Task:
    """The shapes; the role and the cores are filled in later."""
    student, teacher = (setting.model_config(text, options.vocab) for text in (options.student, options.teacher))
    return Task(
        role="",
        student=student.to_json(),
        teacher=teacher.to_json(),
        rows=options.rows,
        seq_len=options.seq_len,
        dtype="bfloat16" if options.gpu else "float32",
        device="gpu" if options.gpu else "cpu",
        cores=(),
        given=(options.student, options.teacher),
    )


def flops_ratio(options: argparse.Namespace) -> float:
    """FLOPs of an assisted step by those of a plain one."""
    student, teacher = (setting.model_config(text, options.vocab) for text in (options.student, options.teacher))
    return flops.assisted(student, teacher, options.seq_len) / flops.plain(student, options.seq_len)


def parse() -> argparse.Namespace:
    """The options, with defaults for the device."""
    parser = common.parser(__doc__, rounds=9)
    parser.add_argument("--venvs", type=Path, default=common.ROOT / "build" / "peers-venvs", help="where they are made")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, help="default: ours tunix trl; with --gpu all")
    parser.add_argument("--gpu", action="store_true", help="run on the GPU, in bfloat16 with larger models")
    parser.add_argument("--student", help="default 4x256, with --gpu 12x1024")
    parser.add_argument("--teacher", help="default 2x192, with --gpu 8x512")
    parser.add_argument("--vocab", type=int, help="default 32768, with --gpu 65536")
    parser.add_argument("--rows", type=int, default=4, help="of a batch (default 4)")
    parser.add_argument("--seq_len", type=int, help="default 256, with --gpu 1024")
    parser.add_argument("--steps", type=int, help="in one measurement; default 1, with --gpu 10")
    parser.add_argument("--warmup", type=int, default=2, help="rounds that are not counted")
    parser.add_argument("--cores", type=int, nargs="+", help="default: 1 2; with --gpu all of them, once")
    options = parser.parse_args()
    everywhere = len(os.sched_getaffinity(0))
    if options.gpu:
        values = (list(SYSTEMS), "12x1024", "8x512", 65536, 1024, 10, [everywhere])
    else:
        values = (["ours", "tunix", "trl"], "4x256", "2x192", 32768, 256, 1, [1, 2][:everywhere])
    names = ("systems", "student", "teacher", "vocab", "seq_len", "steps", "cores")
    for name, value in zip(names, values, strict=True):
        if getattr(options, name) is None:
            setattr(options, name, value)
    if max(options.cores) > everywhere:
        parser.error(f"--cores {max(options.cores)}: this process may use {everywhere}")
    if "trl_liger" in options.systems and not options.gpu:
        parser.error("--systems trl_liger: Liger's kernels need --gpu")
    return options


def main() -> None:
    options = parse()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # this process only reads which device there is
    if not options.gpu:
        jax.config.update("jax_platforms", "cpu")
    systems, task = {name: SYSTEMS[name] for name in options.systems}, make_task(options)
    pythons = {"": sys.executable}
    for venv in sorted({system.venv for system in systems.values()} - {""}):
        wanted = REQUIREMENTS[venv] + (GPU_REQUIREMENTS[venv] if options.gpu else ())
        pythons[venv] = str(make_venv(options.venvs.absolute() / venv, wanted))
    measured: dict[str, Any] = {}
    versions: dict[str, Any] = {}
    available = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as logs:
        for count in options.cores:
            here = dataclasses.replace(task, cores=tuple(available[:count]))
            with started(systems, pythons, here, Path(logs)) as (workers, versions):
                measured[f"{count} cores" if count > 1 else "1 core"] = measure(systems, workers, options)
    shape = {name: value for name, value in dataclasses.asdict(task).items() if name not in ("role", "cores", "given")}
    result = {
        "flops_ratio": flops_ratio(options),
        "shape": shape,
        "steps_a_measurement": options.steps,
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        "versions": versions,
        "measured": measured,
    }
    common.finish(options, result)
    print(table(result), file=sys.stderr)


def table(result: dict[str, Any]) -> str:
    """The ratios, a line for each system and number of cores."""
    lines = [f"FLOPs: an assisted step is {result['flops_ratio']:.2f} plain ones"]
    for cores, systems in result["measured"].items():
        for name, of in systems.items():
            wall, cpu, seconds, host = of["ratio_wall"], of["ratio_cpu"], of["seconds_wall"], of["host_bytes"]
            lines.append(
                f"{cores:8} {name:12} {wall.median:.2f} ({wall.low:.2f} to {wall.high:.2f}; process time "
                f"{cpu.median:.2f})  {seconds['plain'].median:.2f} -> {seconds['assisted'].median:.2f} s  "
                f"{host['plain'] / 1e6:.0f} -> {host['assisted'] / 1e6:.0f} MB"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    common.run(main)
