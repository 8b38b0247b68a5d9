"""Rules for w by token or by step that were tried; the one that won is in the package, the others are only here.

The guide is the best weight of a tabular student, w* = variance / (variance + bias): what the student does not know yet
against what the teacher gets wrong. Neither is seen directly. The label is a draw from the data, so the two models'
losses on it compare the teacher with the student; their entropies do so without the label.
"""

import jax
import jax.numpy as jnp

from slm_assist.losses import TokenInfo

HALF_LIFE = 300  # updates until `hyperbolic` is 1/2


def win(info: TokenInfo, w: jax.Array) -> jax.Array:
    """w where the teacher gives the label more probability than the student does, else 0."""
    return jnp.where(info.teacher_loss < info.loss, w, 0.0)


def responsibility(info: TokenInfo, w: jax.Array) -> jax.Array:
    """q(y) / (q(y) + p(y)): the posterior, by one label, that the teacher rather than the student made it.

    Of equal models 1/2; scaled so that w = 1/2 leaves it as it is, and at most 1.
    """
    return jnp.minimum(2 * w * jax.nn.sigmoid(info.loss - info.teacher_loss), 1.0)


def entropy_gap(info: TokenInfo, w: jax.Array) -> jax.Array:
    """w times how much surer the teacher is, without the label: 0 where it is not, 1 from one nat on."""
    return w * jnp.clip(info.entropy - info.teacher_entropy, 0.0, 1.0)


def easy(info: TokenInfo, w: jax.Array) -> jax.Array:
    """Odds w / (1 - w) times 2 nats over the teacher's entropy: soft labels stay longer where the teacher is sure.

    In w* a context's bias is the teacher's chi-square distance, which is small where the next token is easy to guess.
    """
    odds = w / jnp.maximum(1 - w, 1e-3) * 2.0 / jnp.maximum(info.teacher_entropy, 0.05)
    return odds / (1 + odds)


def hyperbolic(step: jax.Array) -> jax.Array:
    """n0 / (n0 + n), the closed form of w* over updates with n0 = `HALF_LIFE`."""
    return HALF_LIFE / (HALF_LIFE + step)
