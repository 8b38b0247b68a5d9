"""What choosing rows on the device costs, beside a bare forward pass of the scorer over the candidates.

    python experiments/benchmarks/online_filter.py [--out FILE.json]
    python experiments/benchmarks/online_filter.py --pair 4x256/2x192 --vocab 32768 --rows 2 --pool_factor 5

    overhead  (t_choosing - t_plain) / t_forward, where a choosing step scores `pool_factor` batches of candidates
              by SALT's score, keeps one batch and is then the plain step, and forward is the scorer's trunk, its
              head's matmul and each token's largest logit over the same pool, in parts as the filter has them.
              `forward_tiled`: with the logits in the tiles of the loss, which is faster on CPUs.

Expected FLOPs: pool tokens x F, the scorer's forward pass with its head (slm_assist/flops.py), so overhead 1; ranks,
logsumexp and the choice among a few rows have none. Expected bytes: a part of the pool at a time has the memory of a
forward pass without gradient; nothing of the pool's logits is kept, and two arrays [rows, T] of loss and rank.
"""

import functools

import common
import jax
import setting as setting_lib

from slm_assist import compiled as compiled_lib
from slm_assist import flops, steps
from slm_assist.assist import labels, online, scores


def chooser(setting: setting_lib.Setting, pool_factor: int) -> online.Filter:
    """SALT's score of the helper, the best rows."""
    return online.Filter(
        score=scores.make("salt", k=10, masked="zero", statistic="median"),
        models={"scorer": setting.teacher},
        keep=setting.rows,
        parts=pool_factor,
        block_bytes=setting.student.block_bytes,
    )


def choosing_step(setting: setting_lib.Setting, pool_factor: int):
    """`steps.choosing_step`, then the plain one."""
    return functools.partial(
        steps.choosing_step, chooser=chooser(setting, pool_factor), then=setting_lib.plain(setting)
    )


def pool_pass(one_batch, pool_factor: int):
    """A pass over a pool in `pool_factor` parts, of which `one_batch` takes one."""

    def whole(helpers, pool):
        rows = {name: pool[name] for name in labels.ARRAYS}
        parts = jax.tree.map(lambda x: x.reshape(-1, pool_factor, *x.shape[1:]).swapaxes(0, 1), rows)
        return jax.lax.map(lambda part: one_batch({"teacher": helpers["scorer"]}, part), parts)

    return whole


def compile_all(setting: setting_lib.Setting, pool_factor: int) -> dict[str, jax.stages.Compiled]:
    """Plain and choosing step, and the passes over the pool."""
    rows = setting.rows * pool_factor
    pool, helpers = setting.batch(rows), {"scorer": setting.helpers()["teacher"]}
    passes = {"forward": setting_lib.forward(setting), "forward_tiled": setting_lib.forward_tiled(setting)}
    made, _ = setting_lib.compile_all(setting, ("plain",))
    domain = jax.ShapeDtypeStruct((rows,), "int32", sharding=pool["mask"].sharding)
    made["choosing"] = setting_lib.compile_step(
        setting, choosing_step(setting, pool_factor), pool | {"domain": domain}, helpers
    )
    for name, one_batch in passes.items():
        made[name] = setting_lib.compile_pass(setting, pool_pass(one_batch, pool_factor), pool, helpers)
    return made


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--pair", help=f"STUDENT/SCORER, each {setting_lib.SIZES}; default: of the device")
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--rows", type=int, help="of a batch, which are kept")
    parser.add_argument("--seq_len", type=int)
    parser.add_argument("--pool_factor", type=int, default=5, help="batches of candidates for each (default 5)")
    options = parser.parse_args()
    small = jax.default_backend() == "cpu"
    student, scorer = setting_lib.split_pair(options.pair or ("4x256/2x192" if small else "gpu-100m/gpu-35m"))
    rows, seq_len = options.rows or (2 if small else 32), options.seq_len or (256 if small else 1024)
    made = setting_lib.build(student, scorer, options.vocab, rows, seq_len)

    programs = compile_all(made, options.pool_factor)
    helpers = {"scorer": setting_lib.new_helpers(made)["teacher"]}
    batch, pool = setting_lib.new_batch(made), setting_lib.new_batch(made, rows * options.pool_factor)
    domain = jax.device_put(jax.numpy.zeros(rows * options.pool_factor, "int32"), pool["mask"].sharding)
    stepping = {
        "plain": lambda state: programs["plain"](state, batch, {}),
        "choosing": lambda state: programs["choosing"](state, pool | {"domain": domain}, helpers),
    }
    passes = {name: functools.partial(programs[name], helpers, pool) for name in ("forward", "forward_tiled")}
    times = common.interleave(common.keep(setting_lib.new_state(made), stepping) | passes, options.rounds)
    extra = common.difference(times["choosing"], times["plain"])
    counted = {name: int(compiled_lib.flops(program)) * made.mesh.size for name, program in programs.items()}
    tokens = made.tokens * options.pool_factor
    result = {
        "overhead": {name: common.ratio(extra, times[name]) for name in passes},
        "flops_overhead": (counted["choosing"] - counted["plain"]) / counted["forward"],
        "ratio": common.ratio(times["choosing"], times["plain"]),
        "flops_ratio": counted["choosing"] / counted["plain"],
        "candidate_tokens_per_second": tokens / extra.median,
        "seconds": times,
        "forward_flops": int(flops.forward(made.teacher.config, seq_len) * tokens),
        "compiled_flops": counted,
        "temporary_bytes": {name: compiled_lib.memory(program).temporaries for name, program in programs.items()},
        "pool_factor": options.pool_factor,
        "setting": setting_lib.describe(made),
    }
    common.finish(options, result)


if __name__ == "__main__":
    common.run(main)
