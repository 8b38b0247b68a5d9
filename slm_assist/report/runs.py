"""Reads run directories: config.json, metrics.jsonl and, once a run has ended, summary.json."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slm_assist.config import flatten
from slm_assist.errors import UserError
from slm_assist.report.stats import interpolate

REQUIRED_FACTS = ("vocabulary", "validation_rows", "objective", "parameters")
ROLES = ("teacher", "scorer", "reference", "guide", "parent")  # of the small LMs that help a run


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What the files of one run say.

    Attributes:
      path: the run directory, as it was given.
      config: nested settings; facts: measured once, at the start (fingerprints, sizes, hardware, versions).
      summary: totals written at the end, None while the run is unfinished.
      rows: `cross_entropy` and `tokens` of each validation row at the last validation, None where not kept.
      samples: texts by the finished model, as slm_assist/samples.py writes them, None where there are none.
      train, validation: records of metrics.jsonl in step order; step n means that n updates are done.
    """

    path: Path
    config: dict[str, Any]
    facts: dict[str, Any]
    summary: dict[str, Any] | None
    rows: dict[str, Any] | None
    samples: dict[str, Any] | None
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """`config.name`, or else the name of the run directory."""
        return self.config.get("name") or self.path.resolve().name

    @property
    def seed(self) -> int:
        """`config.seed`, or else that of a parent directory called seed-N, or else 0."""
        found = re.findall(r"seed-(\d+)", str(self.path.resolve().parent))
        return self.config.get("seed", int(found[-1]) if found else 0)

    @property
    def schedule(self) -> str:
        return self.config.get("assist", {}).get("schedule", "none")

    @property
    def helpers(self) -> dict[str, dict[str, Any]]:
        """The small LMs that helped, by role: `run`, `step`, `parameters`, `train_flops`; those of lists too."""
        own = {role: fact for role, fact in (self.facts.get("helpers") or {}).items() if role in ROLES}
        listed = {f"{role} of select.{name}": fact for name, made in self.lists.items()
                  for role, fact in (made.get("helpers") or {}).items()}  # fmt: skip
        return own | listed

    @property
    def lists(self) -> dict[str, dict[str, Any]]:
        """What made the lists of rows that the run read, by the config's name of the list."""
        lists = (self.facts.get("data") or {}).get("lists") or {}
        return {name: header.get("made") or {} for name, header in lists.items()}

    @property
    def scoring_flops(self) -> float | None:
        """FLOPs of scoring a corpus for the run's lists, before it began, each corpus once; None: not known."""
        made = {m.get("scores_fingerprint"): m.get("scoring_flops") for m in self.lists.values() if m.get("helpers")}
        return None if None in made.values() else sum(made.values())

    @property
    def assisted(self) -> bool:
        """Whether a small LM took part, in whichever role."""
        return self.schedule != "none" or bool(self.helpers)

    @property
    def selection(self) -> str:
        """What was chosen to learn from: `rows`, `tokens`, `rows and tokens`, or an empty string."""
        select = self.config.get("select") or {}
        parts = ["rows"] * (select.get("rows", "all") != "all") + ["tokens"] * (select.get("token_share", 1) < 1)
        return " and ".join(parts)

    @property
    def finished(self) -> bool:
        return self.summary is not None

    @property
    def final(self) -> dict[str, Any]:
        """The last validation record."""
        return self.validation[-1]

    @property
    def tokens(self) -> int | None:
        """Target tokens trained on so far."""
        return (self.summary or (self.train[-1] if self.train else {})).get("tokens")

    @property
    def switch_step(self) -> int | None:
        """The step at which soft labels end, None if they never did."""
        return self._end_of("assisted")

    @property
    def selection_stop(self) -> int | None:
        """The step at which the choice of rows or tokens ends, None if it never did."""
        return self._end_of("selecting")

    @property
    def alignment_stop(self) -> int | None:
        """The step at which the small LM's representations are left, None if they never were."""
        return self._end_of("aligned")

    @property
    def stages(self) -> list[dict[str, Any]]:
        """`name` and `stop` of each stage, those so far where the run is unfinished."""
        return (self.summary or {}).get("stages") or _stages(self.train)

    def _end_of(self, part: str) -> int | None:
        """Where a stage whose name has `part` is followed by one without: names are parts joined by `_`."""
        for before, after in zip(self.stages, self.stages[1:], strict=False):
            if part in before["name"].split("_") and part not in after["name"].split("_"):
                return before["stop"]
        return None

    def spent(self, axis: str, step: int) -> float | None:
        """Training `flops` or `seconds` (or `steps`) until `step`, linear between the training records."""
        if axis == "steps":
            return step
        steps, costs = ([0.0, *(record[key] for record in self.train)] for key in ("step", axis))
        return interpolate(step, steps, costs)

    def column(self, key: str) -> list[float]:
        """The values of the dotted `key` in the validation records.

        Raises:
          UserError: a record lacks it.
        """
        values = [flatten(record).get(key) for record in self.validation]
        if None in values:
            step = self.validation[values.index(None)].get("step")
            raise UserError(
                f"{self.path}/metrics.jsonl: the validation record of step {step} has no {key!r}; was it "
                "written by this version of slm_assist?"
            )
        return values


def _stages(train: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Stages as far as the training records show them: a record of step n speaks of the update before n."""
    stages: list[dict[str, Any]] = []
    for record in train:
        if not stages or stages[-1]["name"] != record.get("stage", ""):
            stages.append({"name": record.get("stage", "")})
        stages[-1]["stop"] = record["step"]
    return stages


def read_run(run_dir: str | Path) -> Run:
    """Reads a run directory, of a run that has ended or not.

    Raises:
      UserError: not a run directory, a damaged file, or no validation record yet.
    """
    path = Path(run_dir)
    if not (path / "config.json").is_file():
        inside = sorted(str(file.parent) for file in path.glob("*/config.json"))
        cure = f"the runs in it are {', '.join(inside)}" if inside else "give the directory of a run"
        raise UserError(f"{path}: no config.json, so this is not a run directory; {cure}")
    written = _read_json(path / "config.json")
    config, facts = written.get("config"), written.get("facts")
    missing = [name for name in REQUIRED_FACTS if not isinstance(facts, dict) or name not in facts]
    if not isinstance(config, dict) or missing:
        raise UserError(f"{path}/config.json: lacks {'config' if not missing else f'facts.{missing[0]}'}; "
                        "it is not a run of this version of slm_assist")  # fmt: skip
    summary, rows, samples = (
        _read_json(path / name) if (path / name).is_file() else None
        for name in ("summary.json", "validation_rows.json", "samples.json")
    )
    records = read_metrics(path)
    by_step = {record["step"]: record for record in records if record.get("kind") == "validation"}
    if not by_step:
        raise UserError(
            f"{path}/metrics.jsonl: no validation record yet, so there is nothing to compare; let the run go "
            "on or leave it out"
        )
    train = [record for record in records if record.get("kind") == "train"]
    validation = [by_step[step] for step in sorted(by_step)]
    if rows and rows["step"] != validation[-1]["step"]:
        rows = None
    return Run(path, config, facts, summary, rows, samples, train, validation)


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; a last line that was not written to its end is left out.

    Raises:
      UserError: no such file, or a damaged line before the last.
    """
    path = Path(run_dir) / "metrics.jsonl"
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the directory of a run") from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif number < len(lines):
            raise UserError(f"{path}, line {number}: not a JSON object; the file is damaged, remove the line")
    return records


def load(run_dir: str | Path):
    """metrics.jsonl as a pandas.DataFrame: a row a line, dotted column names (`domains.numpy.accuracy`).

    Raises:
      UserError: no metrics.jsonl, a damaged line before the last, or pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise UserError("report.load needs pandas: pip install pandas") from error
    return pandas.DataFrame([flatten(record) for record in read_metrics(run_dir)])


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable JSON ({error}); the run directory is damaged") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; the run directory is damaged")
    return value
