"""The losses as formulas over whole logits arrays [B, T, V]: the definition that `blocked` is held to.

Student logits z, teacher logits u, target y, mask m, weight w (SALT, arXiv 2410.18779):

    p = softmax(z)      q = softmax(u / temperature)
    loss of a token = (1 - w) * (-log p_y) + w * CE(q, p) + z_loss * logsumexp(z)^2
    CE(q, p) = -sum_v q_v log p_v = KL(q || p) + entropy(q)

The temperature divides the teacher's logits only (0.25 sharpens, 4 softens) and no temperature^2 is applied.
With `top_k` q is restricted to the teacher's k likeliest tokens, ties going to the lower index, and renormalised.
Values at masked positions, and targets there, have no influence whatever they are. A target outside
the vocabulary at an unmasked position makes the loss NaN.
"""

import jax
import jax.numpy as jnp

from slm_assist.losses.common import Loss, TokenInfo, Weight, check_top_k, collect
from slm_assist.losses.distribution import without_negative_zeros


def cross_entropy(
    logits_BxTxV: jax.Array,
    target_BxT: jax.Array,
    mask_BxT: jax.Array,
    *,
    z_loss: float = 0.0,
    per_token: bool = False,
) -> Loss:
    """-log p(target) + z_loss * logsumexp^2, in float32 whatever the logits' dtype.

    Args:
      logits_BxTxV: float.
      target_BxT: int, already shifted: the token that follows position t.
      mask_BxT: bool or float; 0 leaves a token out.
      per_token: return [B, T] terms instead of sums.
    """
    z, y = _unmasked(mask_BxT, logits_BxTxV, target_BxT)
    cross_entropy = -_at(jax.nn.log_softmax(z), y)
    parts = {"cross_entropy": cross_entropy, "correct": rank(z, y) == 0}
    return collect(cross_entropy + z_loss * jax.nn.logsumexp(z, -1) ** 2, parts, mask_BxT, per_token)


def distillation(
    student_logits_BxTxV: jax.Array,
    teacher_logits_BxTxV: jax.Array,
    target_BxT: jax.Array,
    mask_BxT: jax.Array,
    *,
    weight: Weight,
    temperature: float = 1.0,
    top_k: int = 0,
    z_loss: float = 0.0,
    per_token: bool = False,
) -> Loss:
    """(1 - w) * cross-entropy with the targets + w * cross-entropy with the teacher's tempered distribution.

    Args:
      weight: w, a scalar, an array that broadcasts to [B, T], or a function of `TokenInfo`. Neither it nor
        the teacher gets a gradient.
      temperature: divides the teacher's logits.
      top_k: q has only the k members of `jax.lax.top_k(teacher_logits, k)`; 0: all. `distillation_kl` is then that
        from the truncated q: not 0 for identical models, but the -log of what p gives to those tokens or more.
      Others: as in `cross_entropy`.

    Raises:
      UserError: `top_k` is larger than the vocabulary.
    """
    z, u, y = _unmasked(mask_BxT, student_logits_BxTxV, teacher_logits_BxTxV, target_BxT)
    u = jax.lax.stop_gradient(u)
    listened = _top(u, check_top_k(top_k, u.shape[-1]))
    log_p, log_q = jax.nn.log_softmax(z), jax.nn.log_softmax(jnp.where(listened, u / temperature, -jnp.inf))
    q = jnp.exp(log_q)
    w = weight(jax.lax.stop_gradient(_info(z, u, y))) if callable(weight) else weight
    (w,) = _unmasked(mask_BxT, jnp.broadcast_to(jax.lax.stop_gradient(w), y.shape))

    cross_entropy = -_at(log_p, y)
    total = (1 - w) * cross_entropy - w * _mean(q, log_p) + z_loss * jax.nn.logsumexp(z, -1) ** 2
    parts = {
        "cross_entropy": cross_entropy,
        "correct": rank(z, y) == 0,
        "distillation_kl": _mean(q, log_q - log_p),
        "teacher_cross_entropy": -_at(jax.nn.log_softmax(u), y),
        "teacher_correct": rank(u, y) == 0,
    } | ({"token_weight": w} if callable(weight) else {})
    return collect(total, parts, mask_BxT, per_token)


def rank(logits_BxTxV: jax.Array, target_BxT: jax.Array) -> jax.Array:
    """#{v != y: z_v > z_y} + #{v < y: z_v = z_y}, int32 [B, T]; V where z_y is NaN, so never "correct"."""
    z, y, z_y = logits_BxTxV, target_BxT[..., None], _at(logits_BxTxV, target_BxT)[..., None]
    behind = (z < z_y) | ((z == z_y) & (jnp.arange(z.shape[-1]) >= y))
    return jnp.sum(~behind, axis=-1, dtype=jnp.int32)


def _top(u: jax.Array, k: int) -> jax.Array:
    """Whether each entry is among the k largest, equal ones by rising index, bool [B, T, V]; k = 0 for all."""
    if k == 0:
        return jnp.ones(u.shape, bool)
    ids = jax.lax.top_k(without_negative_zeros(u), k)[1]
    return jnp.put_along_axis(jnp.zeros(u.shape, bool), ids, True, axis=-1, inplace=False)


def _info(z: jax.Array, u: jax.Array, y: jax.Array) -> TokenInfo:
    def describe(x):
        log_p = jax.nn.log_softmax(x)
        p = jnp.exp(log_p)
        return -_at(log_p, y), -_mean(p, log_p), jnp.max(p, -1), rank(x, y)

    return TokenInfo(*describe(z), *describe(u))


def _unmasked(mask: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
    """The arrays with 0 at masked positions, floats as float32."""
    keep = [(mask != 0).reshape(mask.shape + (1,) * (x.ndim - mask.ndim)) for x in arrays]
    arrays = [x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in arrays]
    return [jnp.where(m, x, 0) for m, x in zip(keep, arrays, strict=True)]


def _at(x: jax.Array, y: jax.Array) -> jax.Array:
    """x[..., y], NaN where y is outside the vocabulary."""
    inside = (y >= 0) & (y < x.shape[-1])
    return jnp.where(inside, jnp.take_along_axis(x, jnp.where(inside, y, 0)[..., None], -1)[..., 0], jnp.nan)


def _mean(q: jax.Array, x: jax.Array) -> jax.Array:
    """<q, x>, where 0 * infinity counts as 0."""
    return jnp.sum(jnp.where(q > 0, q * x, 0), axis=-1)
