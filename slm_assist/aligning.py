"""A config's alignment of representations: the small LM's width and layers, lambda's schedule, the map's optimizer."""

import dataclasses

import jax
import ml_collections
import optax

from slm_assist import config_rules, optim
from slm_assist.assist import representations
from slm_assist.assist.helpers import Helper, open_model
from slm_assist.assist.representations import Align, Map
from slm_assist.assist.schedule import AssistSchedule, assist_schedule
from slm_assist.assist.stages import Stage
from slm_assist.models import ModelConfig
from slm_assist.run_dir import RunDir
from slm_assist.steps import Student

MAP = 0x6D6170  # keeps the draw of the map apart from others of the seed


def projects(config: ml_collections.ConfigDict) -> bool:
    """Whether a map from the student's width to the guide's is learnt."""
    return config.represent.map == "projection" and config_rules.aligned_steps(config) > 0


def guide_width(config: ml_collections.ConfigDict, run: RunDir) -> int:
    """Width of the small LM that is followed, 0 without one; a run that goes on knows it even if that is gone."""
    if not config.represent.helper:
        return 0
    for known in (run, RunDir(config.branch.run)) if config.branch.run else (run,):
        if known.config.is_file() and (fact := known.read(known.config)["facts"]["helpers"].get("guide")):
            return fact["width"]
    return open_model("guide", config.represent.helper, config.represent.helper_step).shape().d_model


def first_map(config: ml_collections.ConfigDict, student: Student, width: int) -> Map:
    """The map before the first update, to a guide of `width`."""
    key = jax.random.fold_in(jax.random.key(config.seed), MAP)
    return representations.init_map(key, student.model.config.d_model, width, optimizer(config, student))


def optimizer(config: ml_collections.ConfigDict, student: Student) -> optax.GradientTransformation:
    """Of the map: AdamW at the student's learning rate, without decay."""
    c = config.optimizer
    options = {"b1": c.b1, "b2": c.b2, "eps": c.eps, "clip_norm": 0.0}
    return optim.make_optimizer("adamw", student.learning_rate, axes=("embed", "act_embed"), **options)


def schedule(config: ml_collections.ConfigDict) -> AssistSchedule:
    """lambda for every update; `linear` falls from the first on, as LET's does."""
    kind, steps = config.represent.schedule, config_rules.aligned_steps(config)
    decay_steps = steps if kind == "linear" else 0
    made = assist_schedule(kind, weight=1.0, steps=steps, decay_steps=decay_steps, section="represent")
    return dataclasses.replace(made, weight=config.represent.weight)  # unlike a mixture's it may be above 1


def layers(config: ml_collections.ConfigDict, student: ModelConfig, guide: ModelConfig) -> tuple[int, int]:
    """`representations.layers` of this config."""
    return representations.layers(student, config.represent.student_layer, guide, config.represent.helper_layer)


def align(
    config: ml_collections.ConfigDict, student: Student, helpers: dict[str, Helper], stage: Stage
) -> Align | None:
    """How the step of a stage follows the guide; None where it does not."""
    if not stage.aligning:
        return None
    guide = helpers["guide"]
    twins = stage.soft_labels and guide.same(helpers["teacher"])
    return Align(
        guide.model,
        schedule(config),
        *layers(config, student.model.config, guide.model.config),
        config.represent.map,
        optimizer(config, student),
        role="teacher" if twins else "guide",
    )
