"""What soft labels cost, beside what their FLOPs cost.

    python experiments/benchmarks/assistance.py [--out FILE.json]
    python experiments/benchmarks/assistance.py --pair 4x256/2x192 4x512/2x256 --vocab 32768 131072 --rows 4

Two figures of each setting (a pair of sizes, a vocabulary, a batch), median and spread of the ratios within a round:

    overhead  (t_assisted - t_plain) / t_forward, by the helper's bare forward pass; aim: at most 1.10
    ratio     t_assisted / t_plain, beside the same ratio of FLOPs

and the utilisation of both steps, so that a slow plain step cannot flatter the assisted one. The steps are those of a
run, compiled alike, with donated state. `forward` is the helper's trunk, its head's matmul over all tokens at once and
each token's largest logit; `forward_tiled` is the same in the tiles of the loss, which is faster on CPUs.

Expected FLOPs a token, with forward passes F_s and F_t, head included (slm_assist/flops.py): plain 3 F_s, assisted
3 F_s + F_t, so overhead 1 where time follows FLOPs. Of them the loss has 6 V d_s, and 2 V d_t with soft labels: no
product is computed twice. Expected bytes: an assisted tile holds two models' logits where a plain one holds one, in
tiles half as long, so its passes over memory (float32 [tile, V]: read and written by max, sum of exponentials and
error) double for the teacher's share, and the teacher's weights are read once more a tile. Those passes have no FLOPs;
they are what overhead above 1 measures.

Without --pair and --vocab: on CPUs three small pairs at V = 32K, the first also at 128K and 256K (about four minutes
on two cores); on accelerators, or with --full, three pairs at each of V = 32K, 128K and 256K.
"""

import argparse
import functools
import itertools
from typing import NamedTuple

import common
import jax
import setting as setting_lib

from slm_assist import compiled as compiled_lib


class Case(NamedTuple):
    """One setting to measure; `pair` is STUDENT/TEACHER."""

    pair: str
    vocab: int
    rows: int
    seq_len: int
    remat: str = "none"


VOCABULARIES = (32768, 131072, 262144)
SMALL = (
    Case("4x256/2x192", 32768, 4, 256),
    Case("4x256/2x192", 131072, 2, 256),
    Case("4x256/2x192", 262144, 2, 256),
    Case("4x384/2x256", 32768, 2, 256),
    Case("4x512/2x256", 32768, 2, 256),
)
LARGE = tuple(
    Case(pair, vocab, rows, seq_len, remat)
    for pair, rows, seq_len, remat in (
        ("gpu-100m/gpu-35m", 32, 1024, "none"),
        ("16x2048/8x1024", 8, 2048, "none"),
        ("paper-2.8b/paper-1.5b", 4, 2048, "full"),
    )
    for vocab in VOCABULARIES
)


def measure(case: Case, rounds: int, matmul: float | None, **keys) -> dict:
    """The figures of one setting.

    Args:
      matmul: FLOP/s measured before; None: measured here, in this setting's dtype.
      keys: of the config.
    """
    student, teacher = setting_lib.split_pair(case.pair)
    made = setting_lib.build(
        student, teacher, case.vocab, case.rows, case.seq_len, **{"compute__remat": case.remat} | keys
    )
    programs, compile_seconds = setting_lib.compile_all(made, ("plain", "assisted", "forward", "forward_tiled"))
    batch, helpers = setting_lib.new_batch(made), setting_lib.new_helpers(made)
    matmul = matmul or common.peak_matmul(made.student.model.dtype)
    steps = {
        "plain": lambda state: programs["plain"](state, batch, {}),
        "assisted": lambda state: programs["assisted"](state, batch, helpers),
    }
    passes = {name: functools.partial(programs[name], helpers, batch) for name in ("forward", "forward_tiled")}
    times = common.interleave(common.keep(setting_lib.new_state(made), steps) | passes, rounds)
    counted = {name: compiled_lib.flops(program) * made.mesh.size for name, program in programs.items()}
    model = setting_lib.model_flops(made)
    extra = common.difference(times["assisted"], times["plain"])

    def used(name: str) -> dict[str, float | None]:
        return setting_lib.utilisation(made, model[name], times[name].median, matmul)

    return {
        "pair": case.pair,
        "overhead": {name: common.ratio(extra, times[name]) for name in ("forward", "forward_tiled")},
        "ratio": common.ratio(times["assisted"], times["plain"]),
        "flops_ratio": model["assisted"] / model["plain"],
        "compiled_flops_ratio": counted["assisted"] / counted["plain"],
        "flops_overhead": (counted["assisted"] - counted["plain"]) / counted["forward"],
        "utilisation": {name: used(name) for name in ("plain", "assisted")},
        "seconds": times,
        "tokens_per_second": {name: made.tokens / times[name].median for name in ("plain", "assisted")},
        "model_flops": model,
        "compiled_flops": {name: int(value) for name, value in counted.items()},
        "matmul_flops_per_second": matmul,
        "compile_seconds": compile_seconds,
        "setting": setting_lib.describe(made),
    }


def cases(options: argparse.Namespace) -> tuple[Case, ...]:
    """What the options ask for."""
    if not (options.pair or options.vocab):
        return LARGE if options.full or jax.default_backend() != "cpu" else SMALL
    pairs = options.pair or tuple(dict.fromkeys(case.pair for case in SMALL))
    return tuple(
        Case(pair, vocab, options.rows, options.seq_len, options.remat)
        for pair, vocab in itertools.product(pairs, options.vocab or VOCABULARIES)
    )


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--pair", nargs="+", metavar="STUDENT/TEACHER", help=f"sizes ({setting_lib.SIZES})")
    parser.add_argument("--vocab", nargs="+", type=int)
    parser.add_argument("--full", action="store_true", help="the settings of accelerators")
    parser.add_argument("--rows", type=int, default=4, help="with --pair or --vocab (default 4)")
    parser.add_argument("--seq_len", type=int, default=256, help="with --pair or --vocab (default 256)")
    parser.add_argument("--remat", default="none", help="with --pair or --vocab: none, dots or full")
    options = parser.parse_args()
    results: list[dict] = []
    for case in cases(options):
        known = results[0]["matmul_flops_per_second"] if results else None
        results.append(measure(case, options.rounds, known))
    common.finish(options, {"settings": results})


if __name__ == "__main__":
    common.run(main)
