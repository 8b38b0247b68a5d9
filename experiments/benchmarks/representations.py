"""What following a small LM's representations costs (LET), beside what its FLOPs cost.

    python experiments/benchmarks/representations.py [--out FILE.json]
    python experiments/benchmarks/representations.py --pair gpu-100m/gpu-35m --vocab 32768 --rows 32 --seq_len 1024

Median and spread of the ratios within a round, for one pair of sizes:

    ratio     t_aligned / t_plain, beside the same ratio of FLOPs
    overhead  (t_aligned - t_plain) / t_trunk, by the guide's forward pass without its head

Expected FLOPs a token: plain 3 F_s, aligned 3 F_s + F_t - 2 V d_t, as the guide's head is not needed; the map between
the widths is the first dimensions here (a projection adds 6 d_s d_t). Expected bytes: the two hidden states [B, T, d]
are read once and a gradient [B, T, d] is written, beside which nothing of the vocabulary's size exists. The steps are
those of a run, compiled alike, with donated state.
"""

import functools

import common
import setting as setting_lib

from slm_assist import compiled as compiled_lib
from slm_assist import flops, steps
from slm_assist.assist.representations import Align
from slm_assist.assist.schedule import assist_schedule

LAMBDA = 0.1


def measure(pair: str, vocab: int, rows: int, seq_len: int, rounds: int) -> dict:
    """The figures of one setting; `pair` is STUDENT/GUIDE."""
    made = setting_lib.build(*setting_lib.split_pair(pair), vocab, rows, seq_len)
    layer = (made.student.model.config.num_layers - 1) // 3
    align = Align(made.teacher, assist_schedule("constant", weight=LAMBDA), layer, map="truncate")
    step = functools.partial(steps.plain_step, student=made.student, align=align)
    programs, _ = setting_lib.compile_all(made, ("plain", "trunk"))
    programs["aligned"] = setting_lib.compile_step(made, step, helpers={"guide": made.helpers()["teacher"]})
    batch, helpers = setting_lib.new_batch(made), setting_lib.new_helpers(made)
    updates = {
        "plain": lambda state: programs["plain"](state, batch, {}),
        "aligned": lambda state: programs["aligned"](state, batch, {"guide": helpers["teacher"]}),
    }
    passes = {"trunk": functools.partial(programs["trunk"], helpers, batch)}
    times = common.interleave(common.keep(setting_lib.new_state(made), updates) | passes, rounds)
    student, guide = made.student.model.config, made.teacher.config
    plain = flops.plain(student, seq_len)
    counted = {name: compiled_lib.flops(program) for name, program in programs.items()}
    return {
        "pair": pair,
        "ratio": common.ratio(times["aligned"], times["plain"]),
        "flops_ratio": 1 + flops.layers(guide, seq_len, guide.num_layers) / plain,
        "compiled_flops_ratio": counted["aligned"] / counted["plain"],
        "overhead": common.ratio(common.difference(times["aligned"], times["plain"]), times["trunk"]),
        "seconds": times,
        "setting": setting_lib.describe(made),
    }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--pair", default="laptop-large/laptop-small", metavar="STUDENT/GUIDE", help=setting_lib.SIZES)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seq_len", type=int, default=256)
    options = parser.parse_args()
    found = measure(options.pair, options.vocab, options.rows, options.seq_len, options.rounds)
    common.finish(options, {"settings": [found]})


if __name__ == "__main__":
    common.run(main)
