"""A small neural student on a source whose law is known: trained on samples by the package's loss, judged exactly."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from slm_assist.errors import UserError
from slm_assist.losses import dense
from slm_assist.theory.sources import Source


class Trained(NamedTuple):
    """Learning curves: `step_E`, updates done, and the exact `excess_SxExC`, KL(d || P) by seed, time and context."""

    step_E: np.ndarray
    excess_SxExC: np.ndarray


def train(
    source: Source,
    teacher_CxV: np.ndarray,
    weights: Mapping[str, np.ndarray],
    *,
    seeds: Sequence[int],
    rows: int = 8,
    width: int = 32,
    learning_rate: float = 1e-2,
    evaluations: int = 40,
) -> dict[str, Trained]:
    """Trains a network (embedding of the context, one hidden layer) by Adam, cosine to 0, once by each schedule of w.

    Every update is on `rows` fresh rows of the source; students of one seed begin alike and see the same rows. The loss
    is `losses.dense.distillation`.

    Args:
      weights: w of each update by the method's name, [steps] each, of one length that `evaluations` divides.

    Raises:
      UserError: schedules of different lengths, or a length that `evaluations` does not divide.
    """
    schedules = [np.asarray(w, np.float32) for w in weights.values()]
    steps = len(schedules[0])
    if {len(w) for w in schedules} != {steps} or steps % evaluations:
        lengths = sorted({len(w) for w in schedules})
        raise UserError(f"weights of {lengths} steps: one length, a multiple of {evaluations}")
    drawn = [source.sample(steps * rows, seed) for seed in seeds]
    batches = [np.stack([getattr(d, name) for d in drawn]).reshape(len(seeds), evaluations, -1, rows * source.length)
               for name in ("context_NxT", "token_NxT")]  # fmt: skip
    run = _program(source, teacher_CxV, steps, width, learning_rate)
    over_all = jax.vmap(jax.vmap(run, in_axes=(None, 0, 0, 0)), in_axes=(0, None, None, None))
    pieces = jnp.stack(schedules).reshape(len(schedules), evaluations, -1)
    excess = np.asarray(jax.jit(over_all)(pieces, jnp.asarray(seeds), *batches), np.float64)
    at = (np.arange(evaluations) + 1) * (steps // evaluations)
    return {name: Trained(at, excess[i]) for i, name in enumerate(weights)}


def _program(source: Source, teacher_CxV, steps: int, width: int, learning_rate: float):
    """(weights [E, S], seed, contexts and tokens [E, S, B]) -> excess [E, C]."""
    contexts, vocab = source.law_CxV.shape
    log_d, log_q = jnp.log(source.law_CxV), jnp.log(teacher_CxV)
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def logits(params, context):
        hidden = jax.nn.gelu(params["embed"][context] @ params["in"] + params["bias"])
        return hidden @ params["out"]

    def update(carry, given):
        params, state = carry
        weight, context, token = given

        def loss(params):
            z, u, mask = logits(params, context)[None], log_q[context][None], jnp.ones((1, token.size))
            return dense.distillation(z, u, token[None], mask, weight=weight).mean

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    def evaluate(carry, given):
        carry, _ = jax.lax.scan(update, carry, given)
        log_p = jax.nn.log_softmax(logits(carry[0], jnp.arange(contexts)))
        return carry, (jnp.exp(log_d) * (log_d - log_p)).sum(axis=-1)

    def run(weights, seed, context, token):
        keys = jax.random.split(jax.random.key(seed), 3)
        shapes = {"embed": (contexts, width), "in": (width, width), "out": (width, vocab)}
        params = {name: jax.random.normal(k, shape) / width**0.5
                  for k, (name, shape) in zip(keys, shapes.items(), strict=True)}  # fmt: skip
        params["bias"] = jnp.zeros(width)
        return jax.lax.scan(evaluate, (params, optimizer.init(params)), (weights, context, token))[1]

    return run
