"""Model FLOPs utilisation of the step without help.

    python experiments/benchmarks/plain_step.py [--out FILE.json]
    python experiments/benchmarks/plain_step.py --size 16x2048 --rows 8 --seq_len 2048 --remat dots --attention cudnn

Model FLOPs over seconds, as a share of the device's dense bfloat16 peak by its data sheet (`of_peak`; an H200's is
989 TFLOP/s) and of the fastest square matmul measured in the same process (`of_matmul`). Aim on one H200: at least
0.55 of the first. On an accelerator the model has one billion parameters (16 layers x 2048, V = 32768) in bfloat16,
8 rows of 2048 tokens; on CPUs it is small, and only `of_matmul` says something.

Expected FLOPs a token: 3 F = 6 N' + 12 layers T heads head_dim, N' the parameters without the embedding's look-up
(slm_assist/flops.py); at the default, 6 x 0.94e9 + 0.8e9 = 6.4e9, so 16384 tokens take 105 TFLOP: 0.107 s at the peak,
0.19 s at the aim. `compiled_flops` counts what XLA really multiplies, recomputation included.
Expected bytes: parameters, gradient and two moments in float32, 16 N = 15 GB, of which a step reads and writes each
once or twice (28 N = 26 GB: 6 ms at 4.8 TB/s); activations without remat about 80 KB a token and layer: 21 GB.
"""

import common
import jax
import setting as setting_lib

from slm_assist import compiled as compiled_lib

ON_ACCELERATORS = {"size": "16x2048", "rows": 8, "seq_len": 2048}
ON_CPUS = {"size": "4x512", "rows": 2, "seq_len": 256}


def main() -> None:
    parser = common.parser(__doc__, rounds=7)
    parser.add_argument("--size", help=f"{setting_lib.SIZES}; default: of the device")
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--seq_len", type=int)
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--remat", default="none", help="none, dots or full")
    parser.add_argument("--attention", default="auto", help="auto, xla, cudnn or splash")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--block_bytes", type=int, default=0, help="loss.block_bytes; 0: the default")
    options = parser.parse_args()
    for name, value in (ON_CPUS if jax.default_backend() == "cpu" else ON_ACCELERATORS).items():
        if getattr(options, name) is None:
            setattr(options, name, value)

    made = setting_lib.build(
        options.size,
        None,
        options.vocab,
        options.rows,
        options.seq_len,
        microbatches=options.microbatches,
        compute__remat=options.remat,
        compute__attention=options.attention,
        compute__dtype=options.dtype,
        optimizer__name=options.optimizer,
        loss__block_bytes=options.block_bytes,
    )
    programs, compile_seconds = setting_lib.compile_all(made, ("plain",))
    step, batch = programs["plain"], setting_lib.new_batch(made)
    before = common.peak_matmul(made.student.model.dtype)
    calls = common.keep(setting_lib.new_state(made), {"plain": lambda state: step(state, batch, {})})
    times = common.interleave(calls, options.rounds, warmup=2)["plain"]
    matmul = max(before, common.peak_matmul(made.student.model.dtype))
    model, counted = setting_lib.model_flops(made)["plain"], compiled_lib.flops(step) * made.mesh.size
    result = {
        "utilisation": setting_lib.utilisation(made, model, times.median, matmul),
        "utilisation_by_compiled_flops": setting_lib.utilisation(made, counted, times.median, matmul),
        "tokens_per_second": made.tokens / times.median,
        "seconds": times,
        "model_flops": model,
        "compiled_flops": int(counted),
        "matmul_flops_per_second": matmul,
        "memory": compiled_lib.memory(step)._asdict(),
        "compile_seconds": compile_seconds,
        "optimizer": options.optimizer,
        "setting": setting_lib.describe(made),
    }
    common.finish(options, result)


if __name__ == "__main__":
    common.run(main)
