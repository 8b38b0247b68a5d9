"""What a small LM thinks of a row: the (loss, rank) of its tokens -> one number.

Pure functions of arrays, traceable, the rows independent of each other. A token counts where the mask is not 0,
whatever the other arrays hold elsewhere; a row without tokens scores 0. A NaN loss at a token that counts makes
the row's score NaN, so that a broken model is seen and not ranked.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp

from slm_assist import plugins
from slm_assist.errors import UserError, nearest, one_of
from slm_assist.losses import TokenStats

MASKED = ("zero", "drop")
STATISTICS = ("median", "mean", "upper_quartile", "lower_quartile")
ROLES = ("scorer", "reference", "learner")
_QUARTERS = {"lower_quartile": 1, "median": 2, "upper_quartile": 3}


def salt(
    token_loss: jax.Array,
    token_rank: jax.Array,
    mask: jax.Array,
    *,
    k: int = 10,
    masked: str = "zero",
    statistic: str = "median",
) -> jax.Array:
    """SALT_DS (arXiv 2410.18779): median over t of 1[x_t in top-k of P(.|x_<t)] * -log P(x_t|x_<t).

    High where the tokens are among the likely ones and yet cost something: challenging, but learnable.

    Args:
      token_loss: nats, float [B, T]; token_rank: int [B, T]; both as in `TokenStats`.
      mask: bool or float [B, T].
      k: a token is a member of the top k where its rank is below k.
      masked: tokens outside the top k count as 0 ("zero"), or are left out ("drop"; 0 if none is left).
      statistic: "median" (of an even count, the mean of the middle two), "mean", "upper_quartile" or
        "lower_quartile" (between two tokens, interpolated linearly: numpy's default).

    Returns:
      float32 [B], nats.

    Raises:
      UserError: an option out of range.
    """
    _check_salt(k, masked, statistic, None)
    counted, member = mask != 0, token_rank < k
    loss = token_loss.astype(jnp.float32)
    broken = jnp.any(counted & jnp.isnan(loss), axis=1)
    values = jnp.where(member, loss, 0.0)
    counted = counted & member if masked == "drop" else counted
    score = _mean(values, counted) if statistic == "mean" else _quantile(values, counted, _QUARTERS[statistic])
    return jnp.where(broken, jnp.nan, score)


def perplexity(token_loss: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean loss of each row, float32 [B], nats a token: what perplexity bands are cut by (arXiv 2405.20541)."""
    return _mean(token_loss.astype(jnp.float32), mask != 0)


def difference(reference_loss: jax.Array, token_loss: jax.Array, mask: jax.Array) -> jax.Array:
    """MiniPLM (arXiv 2410.17215): mean of loss under a small reference minus loss under a larger model.

    Args:
      reference_loss: [B, T], of the smaller model; token_loss: [B, T], of the larger one; mask: [B, T].

    Returns:
      float32 [B], nats a token.
    """
    return _mean(excess(reference_loss, token_loss), mask != 0)


def excess(token_loss: jax.Array, reference_loss: jax.Array) -> jax.Array:
    """RHO-1 (arXiv 2404.07965): each token's loss minus its loss under the reference, float32 [B, T]."""
    return token_loss.astype(jnp.float32) - reference_loss.astype(jnp.float32)


def learnability(learner_loss: jax.Array, reference_loss: jax.Array, mask: jax.Array) -> jax.Array:
    """JEST (arXiv 2406.17711): mean of the learner's loss minus the reference's, float32 [B], nats a token."""
    return _mean(excess(learner_loss, reference_loss), mask != 0)


def _mean(values_BxT: jax.Array, counted_BxT: jax.Array) -> jax.Array:
    """Mean of the counted entries of each row; 0 without any."""
    count = jnp.sum(counted_BxT, axis=1)
    total = jnp.sum(jnp.where(counted_BxT, values_BxT, 0.0), axis=1)
    return jnp.where(count > 0, total / jnp.maximum(count, 1), 0.0)


def _quantile(values_BxT: jax.Array, counted_BxT: jax.Array, quarters: int) -> jax.Array:
    """The quantile quarters/4 of the counted entries of each row; 0 without any.

    Its place in the sorted row is quarters (count - 1) / 4, kept as an integer: exact for any length.
    """
    count = jnp.sum(counted_BxT, axis=1, dtype=jnp.int32)
    place, rest = jnp.divmod(quarters * jnp.maximum(count - 1, 0), 4)
    ordered = jnp.sort(jnp.where(counted_BxT, values_BxT, jnp.inf), axis=1)
    low, high = (jnp.take_along_axis(ordered, at[:, None], axis=1)[:, 0] for at in (place, place + (rest > 0)))
    between = jnp.where(rest > 0, (low * (4 - rest) + high * rest) / 4, low)
    return jnp.where(count > 0, between, 0.0)


@dataclasses.dataclass(frozen=True)
class Score:
    """A row's score from the token statistics of one or two models.

    Attributes:
      name: as in the config.
      roles: whose statistics it reads: "scorer", "reference" or "learner" (the model being trained).
      fn: (stats, mask) -> [B].
    """

    name: str
    roles: tuple[str, ...]
    fn: Callable[[Mapping[str, TokenStats], jax.Array], jax.Array]

    @property
    def main(self) -> str:
        """The role whose tokens a person looks at."""
        return "scorer" if "scorer" in self.roles else self.roles[0]

    def __call__(self, stats: Mapping[str, TokenStats], mask: jax.Array) -> jax.Array:
        """float32 [B], from the statistics [B, T] of each of `roles` and the mask [B, T]; traceable."""
        score = jnp.asarray(plugins.call("select.score", self.name, self.fn, stats, mask))
        if score.shape != mask.shape[:1]:
            wanted = f"return one number a row, shape {mask.shape[:1]}"
            raise UserError(f"select.score={self.name!r}: gave shape {score.shape}; {wanted}")
        return score.astype(jnp.float32)


def make(name: str, *, k: int, masked: str, statistic: str, vocab_size: int | None = None) -> Score:
    """The score that a config names.

    Args:
      name: one of `NAMES`, or "package.module:function" with fn(stats, mask) -> [B], whose roles are `fn.roles`
        if it has them, else ("scorer",).
      k, masked, statistic: of `salt`.
      vocab_size: k must not be larger; None: not checked.

    Raises:
      UserError: names the key of `select.*` that is wrong.
    """
    _check_salt(k, masked, statistic, vocab_size)
    if plugins.is_plugin(name):
        return _plugin(name)
    if name not in NAMES:
        choices = f"{', '.join(sorted(NAMES))} or package.module:function"
        raise UserError(f"select.score={name!r}: choose one of {choices}{nearest(name, NAMES)}")
    roles, fn = NAMES[name]
    return Score(name, roles, partial(fn, k=k, masked=masked, statistic=statistic) if name == "salt" else fn)


def _check_salt(k: int, masked: str, statistic: str, vocab_size: int | None) -> None:
    if k < 1:
        raise UserError(f"select.k={k}: a top-k needs at least 1 token")
    if vocab_size is not None and k > vocab_size:
        raise UserError(f"select.k={k}: the vocabulary has only {vocab_size} tokens; lower it")
    one_of("select.masked", masked, MASKED)
    one_of("select.statistic", statistic, STATISTICS)


def _plugin(name: str) -> Score:
    fn = plugins.load("select.score", name)
    plugins.check_parameters("select.score", name, fn, "stats", "mask")
    roles = getattr(fn, "roles", ("scorer",))
    if not isinstance(roles, tuple | list) or not roles or not all(role in ROLES for role in roles):
        raise UserError(f"select.score={name!r}: its roles are {roles!r}; make them a tuple of {', '.join(ROLES)}")
    return Score(name, tuple(roles), fn)


# Each score's roles and how it reads their statistics.
NAMES: dict[str, tuple[tuple[str, ...], Callable]] = {
    "salt": (("scorer",), lambda s, mask, **o: salt(s["scorer"].loss, s["scorer"].rank, mask, **o)),
    "perplexity": (("scorer",), lambda s, mask: perplexity(s["scorer"].loss, mask)),
    "difference": (
        ("scorer", "reference"),
        lambda s, mask: difference(s["reference"].loss, s["scorer"].loss, mask),
    ),
    "excess": (
        ("scorer", "reference"),
        lambda s, mask: learnability(s["scorer"].loss, s["reference"].loss, mask),
    ),
    "learnability": (
        ("learner", "reference"),
        lambda s, mask: learnability(s["learner"].loss, s["reference"].loss, mask),
    ),
}
