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
from slm_assist.decode.loop import NOTHING, State, decode, prefill
from slm_assist.decode.sampling import Sampling
from slm_assist.decode.text import Text
from slm_assist.errors import UserError
from slm_assist.models import Transformer
from slm_assist.models.transformer import Params

BURST_SHOWN = 8  # tokens at a time where somebody waits for the text
LEAST_WIDTH = 16


class Speed(NamedTuple):
    """Tokens of real rows and the seconds they took, compilation apart; all that a generator has done."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    compile_seconds: float = 0.0

    def describe(self) -> str:
        """One line for people."""

        def part(tokens: int, seconds: float, what: str) -> str:
            return f"{tokens:,} {what} tokens in {seconds:.2f} s ({tokens / max(seconds, 1e-9):,.0f} tok/s)"

        prefill = part(self.prefill_tokens, self.prefill_seconds, "prompt")
        decode = part(self.decode_tokens, self.decode_seconds, "new")
        return f"{prefill}, {decode}, compiling {self.compile_seconds:.1f} s"

    def plus(self, **more: float) -> "Speed":
        return self._replace(**{name: getattr(self, name) + value for name, value in more.items()})


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
                    f"prompt {number} is empty, and the vocabulary has neither BOS nor EOS to begin with: give text"
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
        step = max(1, min(chunk, width))
        first = int(pad_B.min()) // step * step  # nothing is in the chunks before
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
