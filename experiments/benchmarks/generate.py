"""Tokens a second of generation with a cache of keys and values, against what it must read, and against no cache.

    python experiments/benchmarks/generate.py [--out FILE.json]
    python experiments/benchmarks/generate.py --size 16x2048 --rows 1 8 64 --prompt 512 --new 512

For each number of rows, the loop that `slm_assist.decode.Generator` runs makes `--new` greedy tokens behind a cache
that has `--prompt`; without a cache a token costs a forward pass of all S = prompt + new tokens and one row of logits.

Expected FLOPs of a step: rows x F(S), by slm_assist/flops.py. Expected bytes: all parameters that a token meets, once
whatever the rows, and rows x S x 2 layers kv_heads head_dim of the cache; both in the compute dtype. The bound is the
larger of FLOPs over the fastest matmul and bytes over the fastest reading of a matrix, both measured in the same
process; `of_bound` is its share of the seconds of a step. One row reads parameters and little else, so on an H200
(4.8 TB/s) a billion parameters in bfloat16 allow about 2,000 tokens a second. The model is a fresh one.
"""

import functools

import common
import jax
import jax.numpy as jnp
import numpy as np
import setting as setting_lib

from slm_assist import experiment, flops, sharding
from slm_assist.decode import Sampling
from slm_assist.decode.loop import State, decode, logits_of
from slm_assist.models import Transformer
from slm_assist.models.transformer import Params

ON_ACCELERATORS = {"size": "16x2048", "prompt": 512, "new": 512}
ON_CPUS = {"size": "4x512", "prompt": 64, "new": 64}


def read_rate(rounds: int = 5, size: int = 6144) -> float:
    """Bytes/s of the fastest of two ways to read a matrix once, vector by matrix and sum, on one device."""
    vector, matrix = jnp.ones((1, size), jnp.float32), jnp.ones((size, size), jnp.float32)
    ways = {"product": lambda: multiply(vector, matrix), "sum": lambda: total(matrix)}
    multiply, total = jax.jit(jnp.dot), jax.jit(jnp.sum)
    return matrix.nbytes / min(seconds.low for seconds in common.interleave(ways, rounds, warmup=2).values())


def start(model: Transformer, cache: Params, rows: int, prompt: int) -> State:
    """As after a prompt; what is in the cache costs nothing."""
    numbers = np.arange(rows, dtype=np.int32)
    return State(
        cache=cache,
        token_B=numbers % model.config.vocab_size,
        done_B=np.zeros(rows, bool),
        pad_B=np.zeros(rows, np.int32),
        row_B=numbers,
        seed=np.uint32(0),
        slot=np.int32(prompt),
        count=np.int32(0),
    )


def measure(model: Transformer, rows: int, prompt: int, new: int, rounds: int, rates: tuple[float, float]) -> dict:
    """The figures for one number of rows; `rates` are FLOP/s and bytes/s."""
    config, slots = model.config, prompt + new
    params = jax.jit(lambda: jax.tree.map(lambda x: x.astype(model.dtype), model.init(jax.random.key(0))))()
    loop = functools.partial(decode, model=model, sampling=Sampling(), ends=(), burst=new)
    loop = jax.jit(loop, donate_argnums=1)

    def again(cache: Params) -> tuple[Params, jax.Array]:
        state, tokens_BxK = loop(params, start(model, cache, rows, prompt), np.int32(new))
        return state.cache, tokens_BxK

    @jax.jit
    def whole(params, tokens_BxT):
        hidden_BxD = model.apply(params, tokens_BxT)[:, -1]
        return jnp.argmax(logits_of(model, params, hidden_BxD), axis=-1)

    tokens_BxT = jnp.zeros((rows, slots), jnp.int32)
    calls = common.keep(model.init_cache(rows, slots), {"cached": again})
    times = common.interleave(calls | {"uncached": lambda: whole(params, tokens_BxT)}, rounds, warmup=2)
    step = common.Times.of(seconds / new for seconds in times["cached"].all)
    met = model.num_params() - (0 if config.tie_embeddings else config.vocab_size * config.d_model)
    keys = rows * slots * 2 * config.num_layers * config.num_kv_heads * config.head_dim
    work, moved = rows * flops.forward(config, slots), (met + keys) * jnp.dtype(model.dtype).itemsize
    bound = max(work / rates[0], moved / rates[1])
    return {
        "rows": rows,
        "tokens_per_second": rows / step.median,
        "uncached_tokens_per_second": rows / times["uncached"].median,
        "speedup": common.ratio(times["uncached"], step),
        "of_bound": bound / step.median,
        "bound": {
            "seconds": bound,
            "flops": work,
            "bytes": moved,
            "by": "bytes" if moved / rates[1] == bound else "flops",
        },
        "seconds": {"step": step, "uncached": times["uncached"]},
    }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--size", help=f"{setting_lib.SIZES}; default: of the device")
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--rows", type=common.positive, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=common.positive, help="tokens in the cache before the first new one")
    parser.add_argument("--new", type=common.positive, help="tokens to make")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    options = parser.parse_args()
    for name, value in (ON_CPUS if jax.default_backend() == "cpu" else ON_ACCELERATORS).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    dtype = experiment.compute_dtype(options.dtype, jax.devices()[0])
    model = Transformer(setting_lib.model_config(options.size, options.vocab), dtype=dtype)
    rates = common.peak_matmul(dtype), read_rate()
    with jax.set_mesh(sharding.make_mesh(data=1)):
        found = [measure(model, rows, options.prompt, options.new, options.rounds, rates) for rows in options.rows]
    result = {
        "settings": found,
        "model": model.config.to_json(),
        "parameters": model.num_params(),
        "dtype": str(jnp.dtype(dtype)),
        "prompt": options.prompt,
        "new": options.new,
        "matmul_flops_per_second": rates[0],
        "read_bytes_per_second": rates[1],
    }
    common.finish(options, result)


if __name__ == "__main__":
    common.run(main)
