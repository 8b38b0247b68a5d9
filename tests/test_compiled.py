"""FLOPs, collectives and memory of compiled functions, against counts by hand."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from slm_assist import compiled, sharding
from slm_assist.compiled import Collective
from slm_assist.flops import forward
from slm_assist.models import ModelConfig, Transformer


def build(fn, *shapes, dtype=jnp.float32):
    return jax.jit(fn).lower(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)).compile()


def layers(x, weights):
    """One matmul a layer."""
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


def nested(x, weights):
    """Three matmuls a layer."""
    repeat = lambda x, w: (jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=3)[0], None)  # noqa: E731
    return jax.lax.scan(repeat, x, weights)[0]


def branches(x, weights):
    """Either one matmul or two."""
    return jax.lax.cond(x[0, 0] > 0, lambda: layers(x, weights[:1]), lambda: layers(x, weights[:2]))


MATMUL = 2 * 24 * 16 * 16


@pytest.mark.parametrize(
    "fn, shapes, expected",
    [
        (jnp.matmul, [(3, 5), (5, 7)], 2 * 3 * 5 * 7),
        (lambda x, y: jnp.einsum("bnd,bmd->bnm", x, y), [(4, 3, 5), (4, 6, 5)], 2 * 4 * 3 * 6 * 5),
        (layers, [(24, 16), (5, 16, 16)], 5 * MATMUL),
        (nested, [(24, 16), (5, 16, 16)], 15 * MATMUL),
        (branches, [(24, 16), (2, 16, 16)], 2 * MATMUL),
        # Forward-mode: x' w and x w' beside x w. Reverse-mode: the two matmuls of the gradient.
        (lambda x, w, *dot: jax.jvp(layers, (x, w), dot)[1], [(24, 16), (5, 16, 16)] * 2, 15 * MATMUL),
        (jax.grad(lambda x, w: layers(x, w).sum(), (0, 1)), [(24, 16), (5, 16, 16)], 15 * MATMUL),
        (jax.grad(lambda x, w: nested(x, w).sum(), (0, 1)), [(24, 16), (5, 16, 16)], 45 * MATMUL),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_flops(fn, shapes, expected, dtype):
    assert compiled.flops(build(fn, *shapes, dtype=dtype)) == expected


def test_flops_of_a_convolution():
    """Width 6, kernel 3, a zero on each side: 4 outputs see 3 inputs, 2 see 2."""
    fn = lambda x, w: jax.lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))  # noqa: E731
    assert compiled.flops(build(fn, (2, 6, 5), (3, 5, 7))) == 2 * (2 * 5 * 7) * (4 * 3 + 2 * 2)


def test_flops_of_a_model():
    """The formula of `flops.forward`, with attention over the whole row."""
    sizes = {"num_layers": 3, "d_model": 16, "d_ff": 24, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    model = Transformer(ModelConfig(vocab_size=40, **sizes))
    fn = lambda params, tokens: model.apply(params, tokens) @ model.head(params)  # noqa: E731
    lowered = jax.jit(fn).lower(model.shapes(), jax.ShapeDtypeStruct((2, 12), jnp.int32))
    assert compiled.flops(lowered.compile()) == 2 * 12 * forward(model.config, 12)


def test_collectives_and_memory():
    """In a scan of 3: a gathered [16, 8], a scattered [4, 8], a sum; after it, one more sum and a shift."""

    def shard(x_3xNx16, w_4x8):
        def step(total, x_Nx16):
            w_16x8 = jax.lax.all_gather(w_4x8 + total, "fsdp", tiled=True)
            y = jax.lax.psum_scatter(x_Nx16 @ w_16x8, "fsdp", tiled=True)
            return total + jax.lax.psum(jnp.tanh(y), "data").sum(), None

        total = jax.lax.scan(step, 0.0, x_3xNx16)[0]
        return jax.lax.psum(total, ("data", "fsdp"))[None], jax.lax.ppermute(w_4x8, "fsdp", [(0, 1), (1, 0)])

    mesh = sharding.make_mesh(2, 4, 1)
    fn = jax.shard_map(shard, mesh=mesh, in_specs=(P(None, ("data", "fsdp")), P("fsdp")), out_specs=(P(), P("fsdp")),
                       check_vma=False)  # fmt: skip
    step = build(fn, (3, 8 * 16, 16), (16, 8))
    assert compiled.flops(step) == 3 * 2 * 16 * 16 * 8
    found = compiled.collectives(step)
    assert sorted(found) == [
        Collective("all-gather", 16 * 8 * 4, 3),
        Collective("all-reduce", 4, 1),
        Collective("all-reduce", 4 * 8 * 4, 3),
        Collective("collective-permute", 4 * 8 * 4, 1),
        Collective("reduce-scatter", 4 * 8 * 4, 3),
    ]
    assert compiled.traffic(found) == 3 * 4 * (128 + 32 + 32) + 4 + 128
    memory = compiled.memory(step)
    assert memory.arguments == 4 * (3 * 16 * 16 + 4 * 8) and memory.outputs >= 4 * (1 + 4 * 8)
    assert memory.temporaries > 0 == memory.aliased


GPU = """HloModule jit_step, is_scheduled=true

%body (p: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %p = (s32[], bf16[8,64]{1,0}) parameter(0)
  %x = bf16[8,64]{1,0} get-tuple-element(%p), index=1
  %gemm = (f32[8,32]{1,0}, s8[4194304]{0}) custom-call(%x, %x), custom_call_target="__cublas$gemm", metadata={op_name="a{b}(" id=1}, backend_config={"operation_queue_id":"0","gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  %ags = (bf16[8,64]{1,0}, bf16[16,64]{1,0}) all-gather-start(%x), dimensions={0}
  %agd = bf16[16,64]{1,0} all-gather-done(%ags)
  %rs = ((f32[8,32]{1,0}), f32[4,32]{1,0}) async-start(%x), calls=%wrapped
  %rsd = f32[4,32]{1,0} async-done(%rs), calls=%wrapped
  ROOT %t = (s32[], /*index=1*/bf16[8,64]{1,0}) tuple(%x, %x)
}

%wrapped (a: f32[8,32]) -> f32[4,32] {
  %a = f32[8,32]{1,0} parameter(0)
  ROOT %r = f32[4,32]{1,0} reduce-scatter(%a), dimensions={0}, to_apply=%add
}

%condition (p.1: (s32[], bf16[8,64])) -> pred[] {
  %p.1 = (s32[], bf16[8,64]{1,0}) parameter(0)
  %limit = s32[] constant(7)
  %i = s32[] get-tuple-element(%p.1), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (q: bf16[2,64,4,16]) -> bf16[2,64,4,16] {
  %q = bf16[2,64,4,16]{3,2,1,0} parameter(0)
  %init = (s32[], bf16[8,64]{1,0}) tuple(%q, %q)
  %loop = (s32[], bf16[8,64]{1,0}) while(%init), condition=%condition, body=%body
  %kernel = bf16[8]{0:T(8)(2,1)} custom-call(%q), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"flops":"1000","transcendentals":"5"}}}
  %onednn = f32[5,6]{1,0} custom-call(%q, %q), custom_call_target="__onednn$matmul", backend_config={"onednn_matmul_config":{"transpose_a":false}}
  ROOT %fmha = (bf16[2,4,64,16]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config":{"fmha_scale":1,"intermediate_tensor_shape":{"element_type":"BF16","dimensions":["2","4","64","64"],"tuple_shapes":[]}}}
}
"""  # noqa: E501


def test_library_calls_and_asynchronous_pairs():
    """GPUs' form of matmuls and attention, and a loop whose trip count is only in its condition."""
    module = types.SimpleNamespace(as_text=lambda: GPU)
    attention, declared, onednn = 2 * 2 * 2 * 4 * 64 * 64 * 16, 1000, 2 * 5 * 6 * 16
    assert compiled.flops(module) == 7 * 2 * 8 * 32 * 64 + attention + declared + onednn
    expected = [Collective("all-gather", 16 * 64 * 2, 7), Collective("reduce-scatter", 4 * 32 * 4, 7)]
    assert compiled.collectives(module) == expected
    backward = types.SimpleNamespace(as_text=lambda: GPU.replace("fmhaSoftmax", "fmhaSoftmaxBackward"))
    assert compiled.flops(backward) - compiled.flops(module) == 1.5 * attention


def test_flops_for_a_tpu_are_the_same(monkeypatch):
    """TPUs turn batched matmuls into convolutions with padding and holes."""
    pytest.importorskip("libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # no TPU is asked for
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    except Exception as error:  # of many kinds, where libtpu is there but cannot start
        pytest.skip(f"libtpu: {error}")
    mesh = topologies.make_mesh(topology, (4,), ("x",))
    one = jax.sharding.NamedSharding(mesh, P())
    x, y, w = (jax.ShapeDtypeStruct(s, np.float32, sharding=one) for s in ((4, 64, 128), (4, 32, 128), (5, 128, 128)))
    fn = lambda x, y, w: jnp.einsum("bnd,bmd->bnm", nested(x.reshape(-1, 128), w).reshape(x.shape), y)  # noqa: E731
    expected = 15 * 2 * 256 * 128 * 128 + 2 * 4 * 64 * 32 * 128
    assert compiled.flops(jax.jit(fn).lower(x, y, w).compile()) == expected
