"""How run.py and its workers talk; standard library alone, as it is imported in every environment.

A worker is `python worker_X.py JSON`, with a `Task` as JSON. It answers {"ready": facts} on its standard output when
its step is compiled, then for each line N on its standard input runs N steps and answers what they took.
"""

import dataclasses
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Task:
    """What a worker does.

    Attributes:
      role: "plain", or how the teacher helps; each worker says which it knows.
      student, teacher: shapes, by the fields of slm_assist.models.ModelConfig.
      rows, seq_len: of the batch.
      dtype: "float32" or "bfloat16".
      device: "cpu" or "gpu".
      cores: what the worker may use.
      given: student and teacher as slm_assist's own benchmarks write them.
    """

    role: str
    student: Mapping[str, Any]
    teacher: Mapping[str, Any]
    rows: int
    seq_len: int
    dtype: str
    device: str
    cores: tuple[int, ...]
    given: tuple[str, str]

    @property
    def vocab_size(self) -> int:
        return self.student["vocab_size"]


# The optimizer of every system: AdamW after clipping to this global norm.
LEARNING_RATE, B1, B2, EPS, WEIGHT_DECAY, CLIP_NORM = 1e-4, 0.9, 0.95, 1e-8, 0.1, 1.0
SOFT_WEIGHT = 0.667


def begin() -> Task:
    """The task on the command line; call it before numerical packages are imported, which count the cores."""
    values = json.loads(sys.argv[1])
    task = Task(**values | {"cores": tuple(values["cores"]), "given": tuple(values["given"])})
    os.sched_setaffinity(0, task.cores)
    return task


def answer_to() -> Callable[[Mapping[str, Any]], None]:
    """Takes standard output for the answers; what libraries print goes to standard error."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(values: Mapping[str, Any]) -> None:
        out.write(json.dumps(values) + "\n")

    return answer


def requests(facts: Mapping[str, Any], status: Callable[[], Mapping[str, Any]]) -> Iterator[int]:
    """Yields how many steps to run; what happens until the next request is asked for is what is timed.

    Args:
      facts: of the worker: versions.
      status: what to say after each request beside times and memory, not timed.
    """
    answer = answer_to()
    answer({"ready": facts})
    for line in sys.stdin:
        count = int(line)
        wall, cpu = time.perf_counter(), time.process_time()
        yield count
        spent = {"wall": (time.perf_counter() - wall) / count, "cpu": (time.process_time() - cpu) / count}
        answer(spent | {"host_bytes": peak_bytes()} | status())


def peak_bytes() -> int:
    """The most memory this process has had resident.

    VmHWM, as ru_maxrss begins with what the parent had resident when it started this process.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
