"""The other models a run needs: which, from where, in which stage, and what they cost."""

from typing import NamedTuple

import ml_collections

from slm_assist import aligning, flops
from slm_assist.assist import representations, scores, weights
from slm_assist.assist.helpers import KEYS, Helper
from slm_assist.assist.own_teacher import is_own
from slm_assist.assist.scores import Score
from slm_assist.assist.stages import Stage
from slm_assist.errors import UserError
from slm_assist.models import ModelConfig


class Wanted(NamedTuple):
    """A role that a config needs filled."""

    directory: str
    step: int


def score_of(config: ml_collections.ConfigDict, vocab_size: int | None = None) -> Score | None:
    """What rows are scored by on the device; None where none are."""
    select = config.select
    if select.rows != "online" or select.rule == "random":
        return None
    return scores.make(
        select.score, k=select.k, masked=select.masked, statistic=select.statistic, vocab_size=vocab_size
    )


def wanted(config: ml_collections.ConfigDict) -> dict[str, Wanted]:
    """The roles that training with this config needs.

    Raises:
      UserError: a role without a run.
    """
    score = score_of(config)
    roles = set(score.roles if score else ()) - {"learner"}
    if config.select.token_share < 1:
        roles.add("reference")
    result = scoring(config, roles)
    if config.assist.schedule != "none":
        result = {"teacher": Wanted(config.assist.teacher, config.assist.teacher_step), **result}
    if config.represent.helper:
        result["guide"] = Wanted(config.represent.helper, config.represent.helper_step)
    if config.grow.helper:
        result["parent"] = Wanted(config.grow.helper, config.grow.helper_step)
    return result


def scoring(config: ml_collections.ConfigDict, roles: set[str]) -> dict[str, Wanted]:
    """The runs of `scorer` and `reference`, as far as they are among `roles`; each falls back on the one before it."""
    select = config.select
    teacher = config.assist.teacher
    own = f"; assist.teacher={teacher} is a function, which scores no rows" if is_own("teacher", teacher) else ""
    runs = {"scorer": select.scorer or ("" if own else teacher)}
    runs["reference"] = select.reference or runs["scorer"]
    result = {}
    for role in ("scorer", "reference"):
        if role in roles:
            if not runs[role]:
                raise UserError(
                    f"select.score={select.score} with select.token_share={select.token_share} needs {KEYS[role]}, the "
                    f"run directory of a trained small LM{own}"
                )
            result[role] = Wanted(runs[role], select[f"{role}_step"])
    return result


def in_stage(role: str, stage: Stage) -> bool:
    """Whether a helper takes part in a stage; a parent only gives what a run begins with."""
    gifts = {"teacher": stage.soft_labels, "guide": stage.aligning, "parent": False}
    return gifts.get(role, stage.selecting)


def needed(config: ml_collections.ConfigDict, plan: tuple[Stage, ...], step: int) -> set[str]:
    """The roles that take part in the update `step` -> `step + 1` or in a later one."""
    left = [stage for stage in plan if stage.stop > step]
    return {role for role in wanted(config) if any(in_stage(role, stage) for stage in left)}


def step_flops(
    config: ml_collections.ConfigDict,
    student: ModelConfig,
    helpers: dict[str, Helper],
    stage: Stage,
    shares_teacher: bool,
) -> dict[str, float]:
    """FLOPs of one update in a stage: `student`, `teacher` (soft labels), `scorer` (all that chooses data), `guide`.

    With `shares_teacher`, the scorer's forward pass is the teacher's too.
    """
    length = config.data.seq_len
    tokens = config.batch_rows * length
    models = {role: helper.model.config for role, helper in helpers.items()} | {"learner": student}
    cost = {"student": tokens * flops.plain(student, length), "teacher": 0.0, "scorer": 0.0, "guide": 0.0}
    score = score_of(config) if stage.selecting else None
    if stage.soft_labels and models["teacher"] is not None:  # what a function costs is not known
        teacher = models["teacher"]
        cost["teacher"] = tokens * (flops.head(teacher) if shares_teacher else flops.forward(teacher, length))
    if stage.aligning:
        cost["guide"] = tokens * _guide_flops(config, student, helpers, stage)
    for role in score.roles if score else ():
        cost["scorer"] += config.select.pool_factor * tokens * flops.forward(models[role], length)
    if stage.selecting and config.select.token_share < 1:
        cost["scorer"] += tokens * (flops.forward(models["reference"], length) + flops.head(student))
    return cost


def shares_soft_labels(config: ml_collections.ConfigDict, helpers: dict[str, Helper], stage: Stage) -> bool:
    """Whether the teacher's forward pass gives the guide's representations too: one checkpoint, last hidden states."""
    final = config.represent.helper_layer == representations.FINAL
    return final and stage.soft_labels and helpers["guide"].same(helpers["teacher"])


def _guide_flops(
    config: ml_collections.ConfigDict, student: ModelConfig, helpers: dict[str, Helper], stage: Stage
) -> float:
    """Of the guide's layers that are needed, and of the map."""
    guide, layer = helpers["guide"].model.config, config.represent.helper_layer
    cost = flops.projection(student, guide) if config.represent.map == "projection" else 0.0
    if shares_soft_labels(config, helpers, stage):
        return cost
    # A scan over layers runs to its end.
    count = guide.num_layers if guide.scan_layers or layer == representations.FINAL else layer + 1
    return cost + flops.layers(guide, config.data.seq_len, count)


def check_fits(config: ml_collections.ConfigDict, helper: Helper, student: ModelConfig) -> None:
    """Raises `UserError` where the student's shape does not go with a helper's."""
    if (longest := helper.model.config.max_positions) and config.data.seq_len > longest:
        raise UserError(
            f"data.seq_len={config.data.seq_len}: {KEYS[helper.role]}={helper.run} has {longest} learnt positions; use "
            f"data.seq_len={longest} or less"
        )
    if helper.role == "guide":
        aligning.layers(config, student, helper.model.config)
    if helper.role == "parent":
        weights.check(helper.model.config, student, depth=config.grow.depth, noise=config.grow.noise)
