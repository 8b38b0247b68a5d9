"""Log-probabilities of continuations after their contexts, in batches of a few shapes.

Requests are lists of ids of any length. Those that the model reads as the same tokens share a row: the one-token
answers to a question cost one forward pass. Rows are sorted by length, padded to one of a few lengths and scored in
batches of always the same number of rows, so that little is compiled; the logits are only computed where a
continuation has a token, tile by tile.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slm_assist import sharding
from slm_assist.assist import labels
from slm_assist.errors import UserError
from slm_assist.models import Transformer
from slm_assist.models.attention import choose
from slm_assist.models.transformer import Params

SHORTEST = 64  # rows are padded to 64, 128, 256, ... tokens
SLOTS = (8, 64)  # and scored at 8 or 64 tokens, or at all


class Scored(NamedTuple):
    """Of one continuation: log p in nats, and whether greedy decoding gives it (each token has rank 0)."""

    log_prob: float
    greedy: bool


class _Answer(NamedTuple):
    request: int
    first: int  # position whose next token is the first target
    targets: Sequence[int]


class _Row(NamedTuple):
    tokens: tuple[int, ...]
    answers: list[_Answer]

    @property
    def slots(self) -> int:
        return sum(len(answer.targets) for answer in self.answers)


class Continuations:
    """Scores continuations with one model.

    Args:
      model, params: as `pretrained.load` gives them.
      max_length: the longest input in tokens; contexts are cut from the left to fit.
      rows: in a batch, over all devices; rounded up to a multiple of the parts that the mesh splits a batch into.

    Attributes:
      shapes: (padded length, scored tokens) of all batches so far: as many programs were compiled.
    """

    def __init__(self, model: Transformer, params: Params, *, max_length: int, rows: int = 16):
        if max_length < 1 or rows < 1:
            raise UserError(f"max_length={max_length}, rows={rows}: both must be at least 1")
        self._mesh = mesh_of(params)
        shards = sharding.batch_shards(self._mesh)
        self.rows = -(-rows // shards) * shards
        self.max_length = max_length
        self.shapes: set[tuple[int, int]] = set()
        self._model, self._params = model, params

    def score(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], done: Callable[[int], Any] = lambda count: None
    ) -> list[Scored]:
        """The continuations' scores, in their order.

        Args:
          pairs: (context, continuation), ids; neither may be empty.
          done: called with the number of pairs that were scored since the last call.

        Raises:
          UserError: a continuation is longer than `max_length`.
        """
        log_prob, greedy = np.zeros(len(pairs)), np.ones(len(pairs), bool)

        def collect(batch: list[_Row], answer: tuple[jax.Array, jax.Array]) -> None:
            loss, rank = (np.asarray(x) for x in answer)
            for row, row_loss, row_rank in zip(batch, loss, rank, strict=False):  # the last batch is filled up
                at = 0
                for request, _, targets in row.answers:
                    part = slice(at, at := at + len(targets))
                    log_prob[request] = -row_loss[part].sum(dtype=np.float64)
                    greedy[request] = (row_rank[part] == 0).all()
                done(len(row.answers))

        waiting = None
        for batch in self._batches(pairs):
            dispatched = batch, self._dispatch(batch)
            if waiting:  # read one batch late, so that the device never waits
                collect(*waiting)
            waiting = dispatched
        if waiting:
            collect(*waiting)
        return [Scored(float(p), bool(g)) for p, g in zip(log_prob, greedy, strict=True)]

    def _batches(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[list[_Row]]:
        """Rows, the longest first: what is too large for memory fails at once."""
        rows = sorted(pack(pairs, self.max_length), key=lambda row: (-len(row.tokens), row.tokens))
        for start in range(0, len(rows), self.rows):
            yield rows[start : start + self.rows]

    def _dispatch(self, batch: list[_Row]) -> tuple[jax.Array, jax.Array]:
        length = padded_length(max(len(row.tokens) for row in batch), self.max_length)
        most = max(row.slots for row in batch)
        slots = next((count for count in SLOTS if most <= count < length), max(length, most))
        self.shapes.add((length, slots))
        tokens = np.zeros((self.rows, length), np.int32)
        position, target = np.zeros((2, self.rows, slots), np.int32)
        for index, row in enumerate(batch):
            tokens[index, : len(row.tokens)] = row.tokens
            at = 0
            for _, first, targets in row.answers:
                part = slice(at, at := at + len(targets))
                position[index, part] = np.arange(first, first + len(targets))
                target[index, part] = targets
        device = self._mesh.devices.flat[0]
        attention = choose("auto", device, self._model.config, length, self._model.dtype)
        model = dataclasses.replace(self._model, attention=attention)
        where = sharding.batch_sharding(self._mesh)
        arrays = [jax.device_put(x, where) for x in (tokens, position, target)]
        with jax.set_mesh(self._mesh):
            return _stats(self._params, *arrays, model=model)


def pack(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], max_length: int) -> list[_Row]:
    """The rows that `pairs` need: one for all that read the same tokens, cut from the left to `max_length`."""
    rows: dict[tuple[int, ...], _Row] = {}
    full: list[_Row] = []
    for request, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            raise ValueError("neither a context nor a continuation may be empty")
        if len(continuation) > max_length:
            raise UserError(
                f"max_length={max_length}: a continuation of {len(continuation)} tokens does not fit; use a larger one"
            )
        tokens = (*context, *continuation)[-(max_length + 1) : -1]
        row = rows.setdefault(tokens, _Row(tokens, []))
        if row.answers and row.slots + len(continuation) > max(len(tokens), SLOTS[0]):
            full.append(row)
            row = rows[tokens] = _Row(tokens, [])
        row.answers.append(_Answer(request, len(tokens) - len(continuation), continuation))
    return full + list(rows.values())


def padded_length(length: int, max_length: int) -> int:
    """The smallest of 64, 128, 256, ..., `max_length` that is at least `length`."""
    padded = SHORTEST
    while padded < length:
        padded *= 2
    return min(padded, max_length)


def mesh_of(params: Params) -> jax.sharding.Mesh:
    """The mesh that parameters lie on; of those on no mesh one with their device."""
    where = jax.tree.leaves(params)[0].sharding
    if isinstance(where, jax.sharding.NamedSharding):
        return where.mesh
    return sharding.make_mesh(data=1, devices=list(where.device_set))


@functools.partial(jax.jit, static_argnames="model")
def _stats(
    params: Params, tokens_BxT: jax.Array, position_BxS: jax.Array, target_BxS: jax.Array, *, model: Transformer
) -> tuple[jax.Array, jax.Array]:
    """-log p and rank of `target_BxS` after the tokens up to `position_BxS`, [B, S] each.

    Rows are padded on the right, where causal attention from the left does not see it.
    """
    hidden_BxTxD = model.apply(params, tokens_BxT)
    hidden_BxSxD = jnp.take_along_axis(hidden_BxTxD, position_BxS[..., None], axis=1)
    hidden_BxSxD = sharding.constrain(hidden_BxSxD, "batch", "length", "act_embed")
    return tuple(labels.stats_of(model, hidden_BxSxD, model.head(params), {"targets": target_BxS}))
