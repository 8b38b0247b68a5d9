"""Batched generation with a cache of keys and values.

Prompts are padded in front to a few lengths, so that all rows of a batch write to the same slot of the cache and few
programs compile. All tokens of a prompt but its last go into the cache in chunks; the last one is the first that the
loop reads. The loop runs on the device and gives the host a burst of tokens at a time, to look for stop strings in.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from slm_assist import sharding
from slm_assist.data.tokenizers import Vocabulary
from slm_assist.decode.sampling import Sampling, sample
from slm_assist.decode.text import Text
from slm_assist.errors import UserError
from slm_assist.models import Transformer
from slm_assist.models.attention.reference import capped
from slm_assist.models.transformer import Params

BURST_SHOWN = 8  # tokens at a time where somebody waits for the text
NOTHING = -1  # in a burst: no token, the row had ended
LEAST_WIDTH = 16


class State(NamedTuple):
    """What the loop carries from token to token.

    Attributes:
      cache: keys and values.
      token_B: the last token of each row, not yet in the cache; `done_B`: whether the row has ended.
      pad_B: slots in front of the row; `row_B`: its number among the prompts; `seed`: these make its randomness.
      slot: where the next token goes in all rows; `count`: tokens made so far.
    """

    cache: Params
    token_B: jax.Array
    done_B: jax.Array
    pad_B: jax.Array
    row_B: jax.Array
    seed: jax.Array
    slot: jax.Array
    count: jax.Array


class Speed(NamedTuple):
    """Tokens of real rows and the seconds they took, compilation apart; all that a generator has done."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    compile_seconds: float = 0.0

    def plus(self, **more: float) -> "Speed":
        return self._replace(**{name: getattr(self, name) + value for name, value in more.items()})


def prefill(
    params: Params, cache: Params, tokens_BxT: jax.Array, start: jax.Array, pad_B: jax.Array, *, model: Transformer
) -> Params:
    """The cache with T more tokens, at the slots from `start`. Slots below `pad_B` are padding."""
    positions_BxT = jnp.maximum(start + jnp.arange(tokens_BxT.shape[1]) - pad_B[:, None], 0)
    where = {"start": start, "segment_ids": _segments(cache, pad_B), "positions": positions_BxT}
    return model.apply_cached(params, cache, tokens_BxT, **where)[1]


def decode(
    params: Params,
    state: State,
    limit: jax.Array,
    *,
    model: Transformer,
    sampling: Sampling,
    ends: tuple[int, ...],
    burst: int,
) -> tuple[State, jax.Array]:
    """Up to `limit` tokens of each row that is not done: (state, tokens [B, burst]).

    Returns:
      The tokens, `NOTHING` from where a row has ended; a row ends with one of `ends`, which is not among its tokens.
    """
    segment_ids_BxS = _segments(state.cache, state.pad_B)
    key_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(state.seed, impl="threefry2x32"), state.row_B)

    def goes_on(carry: tuple[State, jax.Array, jax.Array]) -> jax.Array:
        state, _, made = carry
        return (made < limit) & ~jnp.all(state.done_B)

    def one(carry: tuple[State, jax.Array, jax.Array]) -> tuple[State, jax.Array, jax.Array]:
        state, tokens_BxK, made = carry
        where = {"start": state.slot, "segment_ids": segment_ids_BxS}
        positions_Bx1 = (state.slot - state.pad_B)[:, None]
        hidden_Bx1xD, cache = model.apply_cached(
            params, state.cache, state.token_B[:, None], positions=positions_Bx1, **where
        )
        logits_BxV = logits_of(model, params, hidden_Bx1xD[:, 0])
        token_B = sample(logits_BxV, jax.vmap(jax.random.fold_in, (0, None))(key_B, state.count), sampling)
        done_B = state.done_B | jnp.isin(token_B, jnp.array(ends, jnp.int32))
        tokens_BxK = jax.lax.dynamic_update_slice(
            tokens_BxK, jnp.where(done_B, NOTHING, token_B)[:, None], (jnp.int32(0), made)
        )
        state = state._replace(
            cache=cache, token_B=token_B, done_B=done_B, slot=state.slot + 1, count=state.count + 1
        )
        return state, tokens_BxK, made + 1

    nothing_BxK = jnp.full((state.token_B.shape[0], burst), NOTHING, jnp.int32)
    state, tokens_BxK, _ = jax.lax.while_loop(goes_on, one, (state, nothing_BxK, jnp.int32(0)))
    return state, tokens_BxK


def logits_of(model: Transformer, params: Params, hidden_NxD: jax.Array) -> jax.Array:
    """softcap(logit_scale * hidden @ head), float32 [N, V]."""
    head_DxV = model.head(params).astype(hidden_NxD.dtype)
    product_NxV = jnp.dot(hidden_NxD, head_DxV, preferred_element_type=jnp.float32)
    return capped(model.config.logit_scale * product_NxV, model.config.logit_softcap)


def _segments(cache: Params, pad_B: jax.Array) -> jax.Array:
    """int32 [B, S]: 0 for the padding in front, 1 for text, before it is written too."""
    slots = jax.tree.leaves(cache)[0].shape[-2]
    return (jnp.arange(slots) >= pad_B[:, None]).astype(jnp.int32)


class Generator:
    """A model that continues texts. What it compiles it keeps, so make one and use it often.

    Attributes:
      speed: what has been done so far, and in how many seconds.
    """

    def __init__(
        self,
        model: Transformer,
        params: Params,
        vocabulary: Vocabulary,
        *,
        mesh: Mesh | None = None,
        max_rows: int = 16,
        stop_ids: Sequence[int] = (),
        prefill_tokens: int = 1024,
        burst: int = 32,
    ):
        """
        Args:
          model, params, vocabulary: as of `pretrained.load`.
          mesh: rows are split over its batch axes; by default that of the parameters, or else their device.
          max_rows: prompts that are continued at a time.
          stop_ids: ids beside the vocabulary's EOS that end a row.
          prefill_tokens: of all rows together, that go through the model at a time while prompts are read: the
            logits of attention are [rows, heads, chunk, slots], and rows * chunk is this number.
          burst: most tokens of a row that are made before the host looks at them.
        """
        self.model = dataclasses.replace(model, remat="none", attention="xla")
        self.vocabulary = vocabulary
        self.mesh = mesh or _mesh_of(params)
        self.params = _placed(self.model, params, self.mesh)
        self.speed = Speed()
        self._max_rows, self._prefill_tokens, self._burst = max(1, max_rows), prefill_tokens, burst
        eos = () if vocabulary.eos_id is None else (vocabulary.eos_id,)
        self._ends = tuple(sorted({*eos, *map(int, stop_ids)}))
        self._programs: dict[tuple, Callable] = {}

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 - immutable
        stop: Sequence[str] = (),
        seed: int = 0,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[str]:
        """The texts that follow `prompts`, each cut before the first of the strings `stop`.

        A prompt begins with BOS where the vocabulary has it, as documents do in training. Arguments and errors as of
        `generate_ids`.
        """
        begin = [] if self.vocabulary.bos_id is None else [self.vocabulary.bos_id]
        ids = [begin + self.vocabulary.encode(prompt) for prompt in prompts]
        return [row.text for row in self._rows(ids, max_tokens, sampling, stop, seed, on_text)]

    def generate_ids(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 - immutable
        stop: Sequence[str] = (),
        seed: int = 0,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[list[int]]:
        """The ids that follow `prompts`, without EOS.

        What a row is given depends on its prompt, `seed` and its number, not on the rows beside it.

        Args:
          prompts: ids; an empty prompt begins with BOS, or else with EOS.
          max_tokens: most new tokens of a row.
          stop: a row ends with the token that completes one of these strings; it is among the ids.
          on_text: called with a prompt's number and the next piece of its text. The pieces of a row make up what
            `generate` returns.

        Raises:
          UserError: an argument means nothing, or a prompt does not fit the model.
        """
        return [row.ids for row in self._rows(prompts, max_tokens, sampling, stop, seed, on_text)]

    def _rows(self, prompts, max_tokens, sampling, stop, seed, on_text) -> list[Text]:
        sampling.check()
        if max_tokens < 1:
            raise UserError(f"max_tokens={max_tokens}: use at least 1")
        prompts = [self._checked(number, prompt, max_tokens) for number, prompt in enumerate(prompts)]
        emits = [on_text and functools.partial(on_text, number) for number in range(len(prompts))]
        stop = [stop] if isinstance(stop, str) else stop
        rows = [Text(self.vocabulary, prompt, stop, emit) for prompt, emit in zip(prompts, emits, strict=True)]
        order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))  # what needs most memory first
        for first in range(0, len(order), self._max_rows):
            numbers = order[first : first + self._max_rows]
            size = self._batch_size(min(len(prompts), self._max_rows))
            state = self._begin([prompts[number] for number in numbers], numbers, size, max_tokens, seed)
            self._loop(state, [rows[number] for number in numbers], max_tokens, sampling, bool(on_text))
        return rows

    def _checked(self, number: int, prompt: Sequence[int], max_tokens: int) -> list[int]:
        prompt, config = [int(i) for i in prompt], self.model.config
        if not prompt:
            begin = self.vocabulary.eos_id if self.vocabulary.bos_id is None else self.vocabulary.bos_id
            if begin is None:
                raise UserError(
                    f"prompt {number} is empty, and the vocabulary has neither BOS nor EOS to begin with: give some text"
                )
            prompt = [begin]
        if wrong := [i for i in prompt if not 0 <= i < config.vocab_size]:
            raise UserError(f"prompt {number} has the id {wrong[0]}; the model's are 0 to {config.vocab_size - 1}")
        if config.max_positions and len(prompt) + max_tokens > config.max_positions:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens, and with max_tokens={max_tokens} that is more than the "
                f"{config.max_positions} learned positions of the model: shorten it or lower max_tokens"
            )
        return prompt

    def _batch_size(self, count: int) -> int:
        """Rows of a batch: a power of two for each shard, so that few sizes compile, and no more than are allowed."""
        shards = _shards(self.mesh)
        return shards * min(_power_of_two(-(-count // shards)), -(-self._max_rows // shards))

    def _begin(self, prompts: list[list[int]], numbers: list[int], size: int, max_tokens: int, seed: int) -> State:
        """Reads the prompts but for their last tokens."""
        chunk = _power_of_two(max(LEAST_WIDTH, self._prefill_tokens // size))
        width = padded(max(len(prompt) for prompt in prompts) - 1)
        width = width if width <= chunk else -(-width // chunk) * chunk
        tokens_BxT, pad_B = np.zeros((size, width), np.int32), np.full(size, width, np.int32)
        for row, prompt in enumerate(prompts):
            pad_B[row] = width - (len(prompt) - 1)
            tokens_BxT[row, pad_B[row] :] = prompt[:-1]

        def filled(values: list[int]) -> jax.Array:
            return self._put(np.array(values + [0] * (size - len(values)), np.int32))

        cache, pad = self._new_cache(size, width + padded(max_tokens)), self._put(pad_B)
        state = State(
            cache=cache,
            token_B=filled([prompt[-1] for prompt in prompts]),
            done_B=self._put(np.arange(size) >= len(prompts)),
            pad_B=pad,
            row_B=filled(numbers),
            seed=self._put(np.uint32(seed % 2**32)),
            slot=self._put(np.int32(width)),
            count=self._put(np.int32(0)),
        )
        step = min(chunk, width)
        first = pad_B.min() // step * step if width else 0  # nothing is in the chunks before
        for start in range(first, width, step):
            part = self._put(tokens_BxT[:, start : start + step])
            arguments = (self.params, cache, part, self._put(np.int32(start)), pad)
            run = self._program("prefill", prefill, arguments, out=self._cache_layout(cache))
            began = time.perf_counter()
            cache = jax.block_until_ready(run(*arguments))
            self.speed = self.speed.plus(prefill_seconds=time.perf_counter() - began)
        self.speed = self.speed.plus(prefill_tokens=sum(map(len, prompts)) - len(prompts))
        return state._replace(cache=cache)

    def _loop(self, state: State, rows: list[Text], max_tokens: int, sampling: Sampling, shown: bool) -> None:
        """Makes tokens until each row has ended."""
        out = (jax.tree.map(lambda x: x.sharding, state), self._layout((state.token_B.shape[0], self._burst)))
        made, open_rows = 0, set(range(len(rows)))
        while made < max_tokens and open_rows:
            limit = min(max_tokens - made, self._burst, BURST_SHOWN if shown else self._burst)
            arguments = (self.params, state, self._put(np.int32(limit)))
            how = {"sampling": sampling, "ends": self._ends, "burst": self._burst}
            run = self._program("decode", decode, arguments, out=out, **how)
            began = time.perf_counter()
            state, tokens_BxK = run(*arguments)
            tokens_BxK = jax.device_get(tokens_BxK)[:, :limit]
            self.speed = self.speed.plus(decode_seconds=time.perf_counter() - began)
            made += limit
            stopped = False
            for number in sorted(open_rows):
                row, ids = rows[number], tokens_BxK[number]
                ids = ids[ids != NOTHING].tolist()
                row.add(ids)
                self.speed = self.speed.plus(decode_tokens=len(ids))
                stopped |= row.stopped
                if row.stopped or len(ids) < limit or made == max_tokens:
                    row.finish()
                    open_rows.discard(number)
            if stopped and open_rows:
                closed = [number not in open_rows for number in range(state.done_B.shape[0])]
                state = state._replace(done_B=self._put(np.array(closed)))

    def _program(self, name: str, function: Callable, arguments: tuple, *, out: Any, **static: Any) -> Callable:
        """`function` compiled for arguments of these shapes; its second argument's memory is given to the result."""
        key = (name, *static.values(), *(x.shape for x in jax.tree.leaves(arguments[1:])))
        if key not in self._programs:
            began = time.perf_counter()
            jitted = jax.jit(
                functools.partial(function, model=self.model, **static), out_shardings=out, donate_argnums=1
            )
            with jax.set_mesh(self.mesh):
                self._programs[key] = jitted.lower(*arguments).compile()
            self.speed = self.speed.plus(compile_seconds=time.perf_counter() - began)
        return self._programs[key]

    def _new_cache(self, rows: int, slots: int) -> Params:
        shapes = jax.eval_shape(lambda: self.model.init_cache(rows, slots))
        layout = self._cache_layout(shapes)
        return jax.tree.map(lambda x, at: jnp.zeros(x.shape, x.dtype, device=at), shapes, layout)

    def _cache_layout(self, cache: Params) -> Any:
        names = ("layers", "batch", "kv_heads", "length", "head_dim")
        return jax.tree.map(lambda x: sharding.sharding(names[-x.ndim :], x, self.mesh), cache)

    def _layout(self, shape: tuple[int, ...]) -> NamedSharding:
        """Of an array whose first dimension are rows."""
        names = ("batch", "length")[: len(shape)]
        return NamedSharding(self.mesh, sharding.spec(names, shape, self.mesh))

    def _put(self, x: np.ndarray) -> jax.Array:
        return jax.device_put(x, self._layout(np.shape(x)))


def padded(length: int) -> int:
    """`length` rounded up to one of four lengths in each octave, so that few programs compile; 0 stays 0."""
    step = max(LEAST_WIDTH, _power_of_two(length) // 8)
    return -(-length // step) * step


def _power_of_two(count: int) -> int:
    """The least one that is not below `count`."""
    return 1 << max(0, count - 1).bit_length()


def _shards(mesh: Mesh) -> int:
    """How many parts the rows are split into."""
    return int(np.prod([mesh.shape.get(name, 1) for name in sharding.BATCH_AXES]))


def _mesh_of(params: Params) -> Mesh:
    """The mesh that the parameters lie on, or one of their own device."""
    leaf = jax.tree.leaves(params)[0]
    if isinstance(leaf, jax.Array):
        if isinstance(leaf.sharding, NamedSharding):
            return leaf.sharding.mesh
        return sharding.make_mesh(data=1, devices=list(leaf.devices())[:1])
    return sharding.make_mesh(data=1)


def _placed(model: Transformer, params: Params, mesh: Mesh) -> Params:
    """Parameters on the mesh, laid out as the student's of a run unless they are on it already."""

    def is_there(x: Any) -> bool:
        return isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding) and x.sharding.mesh == mesh

    if all(map(is_there, jax.tree.leaves(params))):
        return params
    return jax.device_put(params, sharding.shardings(model.logical_axes(), params, mesh))
