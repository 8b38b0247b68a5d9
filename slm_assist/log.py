"""What a run says of itself while it trains: metrics.jsonl, TensorBoard, a progress bar, and its clock."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from tqdm import tqdm

from slm_assist import distributed, flops, plugins
from slm_assist.assist.auto import Auto
from slm_assist.assist.helpers import Helper
from slm_assist.assist.online import ROWS
from slm_assist.assist.stages import PLAIN, Stage
from slm_assist.checkpoint import whole_steps
from slm_assist.errors import UserError
from slm_assist.experiment import Experiment, Say
from slm_assist.feed import Batch
from slm_assist.metrics import Metrics, MetricsFile, NoFile, TensorBoard, all_finite, means
from slm_assist.run_dir import RunDir


class Clock:
    """Seconds by phase; each `lap` gives the time since the last one to a phase."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.began = self._last = time.perf_counter()

    def restore(self, seconds: dict[str, float]) -> None:
        """Adds the phases of the process that saved the checkpoint."""
        for phase, before in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + before

    def lap(self, phase: str) -> float:
        now = time.perf_counter()
        passed, self._last = now - self._last, now
        self.seconds[phase] = self.seconds.get(phase, 0.0) + passed
        return passed

    @property
    def training(self) -> float:
        return self.seconds.get("stage1", 0.0) + self.seconds.get("stage2", 0.0)


def _is_done(metrics: Metrics) -> bool:
    """Whether the devices have finished the update; asks, and waits for nothing."""
    return all(leaf.is_ready() for leaf in jax.tree.leaves(metrics))


class Profile:
    """A trace of the updates `span` = (first, last), as metrics.jsonl counts them, for TensorBoard's profiler.

    Use as a context manager; several processes write a directory each. A run that goes on inside the span traces what
    is left of it.
    """

    def __init__(self, span: tuple[int, ...], directory: Path, say: Say):
        self._first, self._last = span or (0, 0)
        self._place = directory if distributed.count() == 1 else directory / f"process-{distributed.index()}"
        self._say, self._running = say, False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_) -> None:
        if self._running:
            self._stop()

    def update(self, step: int) -> contextlib.AbstractContextManager:
        """To be around the update that leads to `step`."""
        if not self._first <= step <= self._last:
            return contextlib.nullcontext()
        if not self._running:
            jax.profiler.start_trace(str(self._place))
            self._running = True
        return jax.profiler.StepTraceAnnotation("update", step_num=step)

    def after(self, step: int, wait: Callable[[], None]) -> None:
        """Ends the trace behind its last update, once `wait` has waited for the devices."""
        if self._running and step == self._last:
            wait()
            self._stop()
            self._say(f"traced updates up to {step}: {self._place}; look at it with TensorBoard or xprof")

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._running = False


class Log:
    """Turns device metrics into records, one step late, so that the device never waits for them.

    Args:
      meta: what the checkpoint that the run starts from knew, from `meta()`, or `NEW`.
      first: the step it starts from.
      auto: is told what the schedule `auto` decides by.
    """

    NEW: ClassVar[dict[str, Any]] = {
        "offset": 0, "tokens": 0.0, "flops": {"student": 0.0, "teacher": 0.0, "scorer": 0.0, "guide": 0.0},
        "seconds": {}, "auto": None, "input_wait": 0.0,
    }  # fmt: skip

    def __init__(
        self,
        experiment: Experiment,
        run: RunDir,
        helpers: dict[str, Helper],
        meta: dict[str, Any],
        first: int,
        clock: Clock,
        auto: Auto | None = None,
    ):
        config = experiment.config
        self._experiment, self._run, self._helpers, self._clock, self._auto = experiment, run, helpers, clock, auto
        self._pending: tuple[int, Stage, Metrics, Batch] | None = None
        self._tokens, self._flops = meta["tokens"], self.NEW["flops"] | meta["flops"]
        self._said_ties = False
        self._input_wait, self._to_first_step = meta["input_wait"], None
        self._batch_tokens = config.batch_rows * config.data.seq_len
        peak = flops.peak(experiment.mesh.devices.flat[0])
        self._peak = peak and peak * experiment.mesh.size
        self._file = MetricsFile(run.metrics, meta["offset"]) if distributed.index() == 0 else NoFile()
        self._tensorboard = TensorBoard(run.tensorboard, first, config.log.tensorboard)
        self._bar = tqdm(
            total=config.steps,
            initial=first,
            desc=config.name or run.path.name,
            unit="step",
            disable=not config.log.progress,
            dynamic_ncols=True,
            mininterval=0.5,
        )

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()
        self._file.close()
        self._tensorboard.close()

    def step(self, step: int, stage: Stage, metrics: Metrics, batch: Batch) -> None:
        """Takes the metrics of the update by `batch` that led to `step`, and writes those of the one before it.

        Where the devices had finished that one already, they may have stood idle while the loop waited for the batch.
        """
        idle = batch.waited if self._pending is None or _is_done(self._pending[2]) else 0.0
        batch = batch._replace(arrays={}, waited=idle)
        previous, self._pending = self._pending, (step, stage, metrics, batch)
        if previous is not None:
            self._write(*previous)

    def flush(self) -> None:
        """Writes what is pending; waits for the device.

        Raises:
          UserError: the loss or the gradient is not finite; nothing that came of it is saved.
        """
        previous, self._pending = self._pending, None
        if previous is not None:
            self._write(*previous)

    def _write(self, step: int, stage: Stage, metrics: Metrics, batch: Batch) -> None:
        rows = metrics.pop(ROWS, None)
        values = means(metrics)
        seconds = self._clock.lap("stage2" if stage.name == PLAIN else "stage1")
        self._input_wait += batch.waited
        self._to_first_step = self._to_first_step or time.perf_counter() - self._clock.began
        chosen = {} if rows is None else self._chosen(step, rows, batch.row_ids)
        self._refuse_nan(step, values)
        if self._auto and stage.soft_labels:
            self._auto.observe(step, values["accuracy"], values["teacher_accuracy"])
        self._tokens += values.pop("tokens")
        cost = self._experiment.step_flops(self._helpers, stage)
        self._flops = {name: total + cost[name] for name, total in self._flops.items()}
        record = {"kind": "train", "step": step, "stage": stage.name} | values
        record |= {
            "tokens": self._tokens,
            "flops": sum(self._flops.values()),
            "seconds": self._clock.training,
            "tokens_per_second": self._batch_tokens / seconds,
            "input_wait_seconds": batch.waited,
        }
        if self._peak:
            record["model_flops_utilisation"] = sum(cost.values()) / seconds / self._peak
        if batch.dropped is not None:
            record["dropped_tokens"] = int(jax.device_get(batch.dropped))
        if chosen:
            self._warn_of_ties(step, values)
        record |= chosen
        self._file.write(record)
        self._tensorboard.write(record)
        self._show(record, sum(cost.values()) / seconds)

    def _chosen(self, step: int, rows: dict[str, Any], row_ids: np.ndarray) -> dict[str, Any]:
        """Ids of the kept rows, and how many candidates and kept rows each domain had."""
        rows = jax.device_get(rows)
        index = rows["index"]
        if len(np.unique(index)) < len(index) or index[0] < 0 or index[-1] >= len(row_ids):  # it is sorted
            raise UserError(
                f"step {step}: select.rule={self._experiment.config.select.rule!r} gave {index.tolist()[:16]}; return "
                f"distinct indices from 0 to {len(row_ids) - 1}"
            )
        counts = zip(self._experiment.domains, rows["candidates"].tolist(), rows["kept"].tolist(), strict=True)
        return {
            "rows": row_ids[rows["index"]][rows["valid"] > 0].tolist(),
            "domains": {name: [candidates, kept] for name, candidates, kept in counts if candidates},
        }

    def _warn_of_ties(self, step: int, values: dict[str, float]) -> None:
        """Says once if so many candidates score 0 that their place in the pool chooses, not the score."""
        select = self._experiment.config.select
        if not self._said_ties and values.get("score_zero", 0.0) > 1 - 1 / select.pool_factor:
            self._said_ties = True
            self._say(
                f"step {step}: {values['score_zero']:.0%} of the candidates score exactly 0, so their order in the "
                "pool chooses among them: use a later select.scorer_step, a larger select.k, or select.masked=drop"
            )

    def _refuse_nan(self, step: int, values: dict[str, float]) -> None:
        if all_finite(values):
            return
        bad = ", ".join(f"{name} is {value}" for name, value in values.items() if not all_finite({name: value}))
        last = max(whole_steps(self._run.checkpoints), default=None)
        kept = "no checkpoint was written yet" if last is None else f"checkpoint {last} is kept"
        cure = "a lower optimizer.peak_learning_rate or with optimizer.clip_norm"
        if not all_finite({"score": values.get("score_mean", 0.0)}):
            cure = "another select.scorer_step or select.score"
        own = plugins.in_use(self._experiment.config)
        cure += f"; is it what {' and '.join(own)} gives?" if own else ""
        raise UserError(f"step {step}: {bad}; {kept}: start over with --fresh and {cure}, or look at this step's data")

    def _show(self, record: dict[str, Any], rate: float) -> None:
        speed = f"MFU {100 * rate / self._peak:.1f}%" if self._peak else f"{rate / 1e9:.0f} GFLOP/s"
        self._bar.set_postfix_str(
            f"{record['stage']}, loss {record['loss']:.3f}, {record['tokens_per_second']:,.0f} tok/s, {speed}",
            refresh=False,
        )
        self._bar.update(record["step"] - self._bar.n)

    def _say(self, line: str) -> None:
        if distributed.index() == 0:
            tqdm.write(line)

    def validation(self, step: int, figures: dict[str, Any]) -> None:
        """Writes a validation line; call `flush` before evaluating."""
        seconds = self._clock.lap("validation")
        record = {"kind": "validation", "step": step} | figures
        record |= {
            "train_flops": sum(self._flops.values()),
            "train_seconds": self._clock.training,
            "validation_seconds": seconds,
        }
        self._file.write(record)
        self._tensorboard.write(record)
        if self._auto:
            self._auto.observe_validation(step, figures["log_perplexity"])
        if not self._bar.disable:
            tqdm.write(
                f"step {step}: validation log-perplexity {figures['log_perplexity']:.4f}, "
                f"{figures['bits_per_byte']:.4f} bits per byte, accuracy {figures['accuracy']:.4f}"
            )

    def switch(self, step: int, reason: str) -> None:
        """Writes that `auto` has ended stage 1, and why."""
        self.flush()
        self._auto = None
        self._file.write({"kind": "switch", "step": step, "reason": reason})
        self._say(f"step {step}: stage 1 ends, {reason}")

    def meta(self) -> dict[str, Any]:
        """What a checkpoint keeps so that the next process goes on with the same lines and totals."""
        return {
            "offset": self._file.sync(),
            "tokens": self._tokens,
            "flops": self._flops,
            "seconds": self._clock.seconds,
            "auto": self._auto and self._auto.state(),
            "input_wait": self._input_wait,
        }

    def summary(self, plan: tuple[Stage, ...]) -> dict[str, Any]:
        """summary.json: what the run cost, by part."""
        device = self._experiment.mesh.devices.flat[0]
        memory = device.memory_stats() if device.platform != "cpu" else None
        return {
            "steps": self._experiment.config.steps,
            "tokens": self._tokens,
            "flops": self._flops,
            "seconds": self._clock.seconds,
            "compile_seconds": self._clock.seconds["compile"],
            "start_to_first_step_seconds": self._to_first_step,
            "input_wait_share": self._input_wait / max(self._clock.training, 1e-9),
            "peak_bytes": memory.get("peak_bytes_in_use") if memory else None,
            "stages": [{"name": stage.name, "start": stage.start, "stop": stage.stop} for stage in plan],
        }
