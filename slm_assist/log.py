"""What a run says of itself while it trains: metrics.jsonl, TensorBoard, a progress bar, and its clock."""

import time
from typing import Any

from tqdm import tqdm

from slm_assist import flops
from slm_assist.assist.helpers import Helper
from slm_assist.checkpoint import whole_steps
from slm_assist.errors import UserError
from slm_assist.experiment import Experiment
from slm_assist.metrics import MetricsFile, Pairs, TensorBoard, all_finite, means
from slm_assist.run_dir import RunDir


class Clock:
    """Seconds by phase; each `lap` gives the time since the last one to a phase."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def restore(self, seconds: dict[str, float]) -> None:
        """Takes over the phases of the process that saved the checkpoint."""
        self.seconds = dict(seconds)

    def lap(self, phase: str) -> float:
        now = time.perf_counter()
        passed, self._last = now - self._last, now
        self.seconds[phase] = self.seconds.get(phase, 0.0) + passed
        return passed

    @property
    def training(self) -> float:
        return self.seconds.get("stage1", 0.0) + self.seconds.get("stage2", 0.0)


PHASES = {"assisted": "stage1", "plain": "stage2"}


class Log:
    """Turns device metrics into records, one step late, so that the device never waits for them.

    Args:
      meta: what the checkpoint that the run starts from knew, from `meta()`.
      first: the step it starts from.
    """

    def __init__(
        self,
        experiment: Experiment,
        run: RunDir,
        helpers: dict[str, Helper],
        meta: dict[str, Any],
        first: int,
        clock: Clock,
    ):
        config = experiment.config
        self._experiment, self._run, self._clock = experiment, run, clock
        self._pending: tuple[int, str, Pairs] | None = None
        self._tokens, self._student_flops, self._teacher_flops = meta["tokens"], meta["flops"], meta["teacher_flops"]
        batch_tokens = config.batch_rows * config.data.seq_len
        self._batch_tokens = batch_tokens
        self._step_flops = batch_tokens * flops.plain(experiment.student.model.config, config.data.seq_len)
        self._helper_flops = sum(
            batch_tokens * flops.forward(helper.model.config, config.data.seq_len) for helper in helpers.values()
        )
        peak = flops.peak(experiment.mesh.devices.flat[0])
        self._peak = peak and peak * experiment.mesh.size
        self._file = MetricsFile(run.metrics, meta["offset"])
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

    def step(self, step: int, stage: str, pairs: Pairs) -> None:
        """Takes the metrics of the update that led to `step`, and writes those of the one before it."""
        previous, self._pending = self._pending, (step, stage, pairs)
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

    def _write(self, step: int, stage: str, pairs: Pairs) -> None:
        values = means(pairs)
        seconds = self._clock.lap(PHASES[stage])
        if not all_finite(values):
            bad = ", ".join(f"{name} is {value}" for name, value in values.items() if not all_finite({name: value}))
            last = max(whole_steps(self._run.checkpoints), default=None)
            kept = "no checkpoint was written yet" if last is None else f"checkpoint {last} is kept"
            raise UserError(
                f"step {step}: {bad}; {kept}: start over with --fresh and a lower optimizer.peak_learning_rate or with "
                "optimizer.clip_norm, or look at the data of this step"
            )
        tokens = values.pop("tokens")
        spent = self._step_flops + (self._helper_flops if stage == "assisted" else 0)
        self._tokens += tokens
        self._student_flops += self._step_flops
        self._teacher_flops += spent - self._step_flops
        record = {"kind": "train", "step": step, "stage": stage} | values
        record |= {
            "tokens": self._tokens,
            "flops": self._student_flops + self._teacher_flops,
            "seconds": self._clock.training,
            "tokens_per_second": self._batch_tokens / seconds,
        }
        if self._peak:
            record["model_flops_utilisation"] = spent / seconds / self._peak
        self._file.write(record)
        self._tensorboard.write(record)
        self._show(record, spent / seconds)

    def _show(self, record: dict[str, Any], rate: float) -> None:
        speed = f"MFU {100 * rate / self._peak:.1f}%" if self._peak else f"{rate / 1e9:.0f} GFLOP/s"
        self._bar.set_postfix_str(
            f"{record['stage']}, loss {record['loss']:.3f}, {record['tokens_per_second']:,.0f} tok/s, {speed}",
            refresh=False,
        )
        self._bar.update(record["step"] - self._bar.n)

    def validation(self, step: int, figures: dict[str, Any]) -> None:
        """Writes a validation line; call `flush` before evaluating."""
        seconds = self._clock.lap("validation")
        record = {"kind": "validation", "step": step} | figures
        record |= {
            "train_flops": self._student_flops + self._teacher_flops,
            "train_seconds": self._clock.training,
            "validation_seconds": seconds,
        }
        self._file.write(record)
        self._tensorboard.write(record)
        if not self._bar.disable:
            tqdm.write(
                f"step {step}: validation log-perplexity {figures['log_perplexity']:.4f}, "
                f"{figures['bits_per_byte']:.4f} bits per byte, accuracy {figures['accuracy']:.4f}"
            )

    def meta(self) -> dict[str, Any]:
        """What a checkpoint keeps so that the next process goes on with the same lines and totals."""
        return {
            "offset": self._file.sync(),
            "tokens": self._tokens,
            "flops": self._student_flops,
            "teacher_flops": self._teacher_flops,
            "seconds": self._clock.seconds,
        }

    def summary(self) -> dict[str, Any]:
        """summary.json: what the run cost, by part."""
        device = self._experiment.mesh.devices.flat[0]
        memory = device.memory_stats() if device.platform != "cpu" else None
        return {
            "steps": self._experiment.config.steps,
            "tokens": self._tokens,
            "flops": {"student": self._student_flops, "teacher": self._teacher_flops},
            "seconds": self._clock.seconds,
            "peak_bytes": memory.get("peak_bytes_in_use") if memory else None,
            "stages": [
                {"name": stage.name, "start": stage.start, "stop": stage.stop} for stage in self._experiment.stages
            ],
        }
