"""The kernels of attention against the definition, without the devices that they are for.

Splash runs in Pallas's interpreter. cuDNN cannot run, but what we ask of `jax.nn.dot_product_attention` can, by its
XLA implementation, and the call lowers for CUDA.
"""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_assist import sharding
from slm_assist.errors import UserError
from slm_assist.models import ModelConfig, Transformer
from slm_assist.models.attention import BACKENDS, attend, choose, cudnn, dispatch, splash

CASES = {  # heads, key heads, window, segments, prefix
    "window": (2, 2, 37, False, False),
    "packed, grouped": (4, 2, 0, True, False),
    "packed, window": (2, 1, 50, True, False),
    "packed, prefix, window, grouped": (4, 2, 37, True, True),
    "prefix": (2, 2, 0, False, True),
}


def arrays(heads, kv_heads, segments, prefix, *, rows=2, length=128, dim=16, dtype=jnp.float32):
    """(query, key, value, a gradient of the result), {segment_ids, prefix_mask} of random documents and padding."""
    rng = np.random.default_rng(heads + 2 * length)
    shapes = [(rows, length, n, dim) for n in (heads, kv_heads, kv_heads, heads)]
    documents = np.sort(rng.integers(1, 5, (rows, length)))
    documents[:, length - length // 9 :] = 0
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes], {
        "segment_ids": documents.astype(np.int32) if segments else None,
        "prefix_mask": rng.random((rows, length)) < 0.3 if prefix else None,
    }


def value_and_gradients(backend, values, rows, window):
    @jax.jit
    def run(query, key, value, out, rows):
        call = functools.partial(attend, window=window, backend=backend, **rows)
        result, pullback = jax.vjp(call, query, key, value)
        return result, pullback(out)

    return run(*values, rows)


def close(a, b, tolerance=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


@pytest.fixture(params=["cudnn", "splash"])
def backend(request, monkeypatch):
    """A kernel that runs on a CPU, by the means it has for that, and that does run."""
    calls = []
    if request.param == "cudnn":
        monkeypatch.setattr(cudnn, "IMPLEMENTATION", "xla")
        # Float32, to see every difference.
        monkeypatch.setattr(cudnn, "DTYPES", (jnp.dtype("float32"),))
        run = cudnn.attend
    else:
        run = functools.partial(splash.attend, interpret=True)

    def counted(*args, **options):
        calls.append(options)
        return run(*args, **options)

    monkeypatch.setattr(dispatch.KERNELS[request.param], "attend", counted)
    yield request.param
    assert calls, "the kernel was not used"


@pytest.mark.parametrize("case", CASES)
def test_kernels_give_the_definition_and_its_gradient(case, backend):
    heads, kv_heads, window, segments, prefix = CASES[case]
    values, rows = arrays(heads, kv_heads, segments, prefix)
    expected = value_and_gradients("xla", values, rows, window)
    close(value_and_gradients(backend, values, rows, window), expected)


def test_splash_leaves_blocks_out(monkeypatch):
    """Several blocks a row, of which many are empty; the interpreter runs the same index maps."""
    monkeypatch.setattr(splash, "attend", functools.partial(splash.attend, interpret=True))
    values, rows = arrays(2, 1, True, True, rows=1, length=256)
    for prefix_mask in (None, rows["prefix_mask"]):
        given = rows | {"prefix_mask": prefix_mask}
        close(value_and_gradients("splash", values, given, 60), value_and_gradients("xla", values, given, 60))
    assert [splash._block_sizes(length).block_q for length in (384, 1024, 256)] == [128, 512, 256]


@pytest.mark.parametrize("backend, kv_heads", [("cudnn", 4), ("cudnn", 3), ("splash", 2)], indirect=["backend"])
def test_every_device_runs_its_rows_and_heads(backend, kv_heads, monkeypatch):
    heads = 12 if kv_heads == 3 else 4
    shapes, kernel = [], dispatch.KERNELS[backend]
    run = kernel.attend

    def noted(query, key, value, **rest):
        shapes.append((query.shape, key.shape))
        return run(query, key, value, **rest)

    monkeypatch.setattr(kernel, "attend", noted)
    values, rows = arrays(heads, kv_heads, True, backend == "splash", dim=8)
    expected = value_and_gradients("xla", values, rows, 0)
    with jax.set_mesh(sharding.make_mesh(data=1, fsdp=2, tensor=4)):
        close(value_and_gradients(backend, values, rows, 0), expected)
    own = 3 if kv_heads == 3 else 1  # the key heads that its query heads read
    assert set(shapes) == {((1, 128, heads // 4, 8), (1, 128, own, 8))}


@pytest.mark.parametrize("backend", ["splash"], indirect=True)
def test_a_model_runs_on_a_kernel(backend):
    config = ModelConfig(
        vocab_size=50, num_layers=1, d_model=16, d_ff=16, num_heads=2, num_kv_heads=1, head_dim=8,
        pattern=("local",), window=9,
    )  # fmt: skip
    plain, fast = Transformer(config), Transformer(config, attention=backend, remat="full")
    params = jax.jit(fast.init)(jax.random.key(0))
    assert fast.shapes() == plain.shapes()
    tokens = jax.random.randint(jax.random.key(1), (1, 128), 0, 50)
    segment_ids = jnp.arange(128)[None] // 50 + 1

    def gradient(model):
        def loss(params):
            return jnp.mean(jnp.tanh(model.apply(params, tokens, segment_ids=segment_ids)))

        return jax.jit(jax.value_and_grad(loss))(params)

    close(gradient(fast), gradient(plain), 1e-6)


def test_lengths_that_a_kernel_does_not_take_are_computed_by_xla():
    values, rows = arrays(2, 1, True, False, length=31)
    for backend in BACKENDS:
        close(value_and_gradients(backend, values, rows, 0), value_and_gradients("xla", values, rows, 0), 0)
    with pytest.raises(UserError, match="did you mean splash"):
        Transformer(ModelConfig(9, 1, 8, 8, 1, 1, 8), attention="splsh")


@pytest.fixture
def cuda(monkeypatch):
    """JAX's checks of an installed cuDNN, passed."""
    from jax._src.cudnn import fused_attention_stablehlo as lowering

    monkeypatch.setattr(lowering, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(lowering, "check_compute_capability", lambda capability: True)


def test_calls_of_cudnn_lower_for_cuda(cuda):
    def config_of(window, segments, prefix):
        values, rows = arrays(4, 2, segments, prefix, dtype=jnp.bfloat16)

        def total(query, key, value):
            return attend(query, key, value, window=window, backend="cudnn", **rows).astype(jnp.float32).sum()

        gradient = jax.jit(jax.grad(total, (0, 1, 2)))
        text = gradient.trace(*values[:3]).lower(lowering_platforms=("cuda",)).as_text().replace("\\22", '"')
        calls = set(re.findall(r"__cudnn\$(\w+)", text))
        masks = set(re.findall(r'"mask_type": "(\w+)"', text))
        windows = {int(x) for x in re.findall(r'"sliding_window_length": (\d+)', text)}
        return calls, masks, windows

    plain, biased = ({f"fmha{name}Softmax{way}" for way in ("", "Backward")} for name in ("", "ScaleBias"))
    # No mask in memory for one document; none but a bias for several; causal blocks left out but for a prefix.
    assert config_of(0, False, False) == (plain, {"CAUSAL"}, {0})
    assert config_of(37, False, False) == (plain, {"CAUSAL"}, {37})
    assert config_of(0, True, False) == (biased, {"CAUSAL"}, {0})
    assert config_of(37, True, False) == (biased, {"CAUSAL"}, {0})
    assert config_of(0, True, True) == (biased, {"NO_MASK"}, {0})


def device(platform, kind, capability=None, version=""):
    return types.SimpleNamespace(
        platform=platform,
        device_kind=kind,
        compute_capability=capability,
        client=types.SimpleNamespace(platform_version=version),
    )


CPU, TPU = device("cpu", "cpu"), device("tpu", "TPU v5 lite")
NVIDIA = {"H200": "9.0", "A100": "8.0", "V100": "7.0"}
H200, A100, V100 = (device("gpu", f"NVIDIA {kind}", capability) for kind, capability in NVIDIA.items())
MI300 = device("gpu", "AMD MI300X", "gfx942", "rocm 6.4")


@pytest.mark.parametrize(
    "where, head_dim, length, dtype, expected",
    [
        (CPU, 64, 1024, "float32", "xla"),
        (H200, 64, 1024, "bfloat16", "cudnn"),
        (H200, 256, 1024, "float16", "cudnn"),
        (H200, 64, 1024, "float32", "xla"),
        (H200, 64, 1023, "bfloat16", "xla"),
        (H200, 68, 1024, "bfloat16", "xla"),
        (H200, 264, 1024, "bfloat16", "xla"),
        (A100, 128, 1024, "bfloat16", "cudnn"),
        (A100, 256, 1024, "bfloat16", "xla"),
        (V100, 64, 1024, "float16", "xla"),
        (MI300, 64, 1024, "bfloat16", "xla"),
        (TPU, 64, 1024, "bfloat16", "splash"),
        (TPU, 64, 1024, "float32", "splash"),
        (TPU, 64, 1000, "bfloat16", "xla"),
        (TPU, 64, 1024, "float16", "xla"),
    ],
)
def test_auto_is_the_kernel_of_the_device_where_it_takes_the_rows(where, head_dim, length, dtype, expected, cuda):
    config = types.SimpleNamespace(head_dim=head_dim, attention_softcap=0.0)
    found = {name: outcome(name, where, config, length, dtype) for name in ("auto", *BACKENDS)}
    assert found["auto"] == expected and found["xla"] == "xla"
    for name in ("cudnn", "splash"):
        if expected == name:
            assert found[name] == name
        else:
            assert found[name].startswith(f"compute.attention={name}: it") and "\n" not in found[name]


def outcome(name, where, config, length, dtype):
    try:
        return choose(name, where, config, length, dtype)
    except UserError as error:
        return str(error)


def test_what_a_kernel_lacks_is_said():
    config = types.SimpleNamespace(head_dim=64, attention_softcap=0.0)
    assert "NVIDIA GPU, and the device is cpu" in outcome("cudnn", CPU, config, 1024, "float32")
    assert "bfloat16 and float16, not float32" in outcome("cudnn", H200, config, 1024, "float32")
    assert "multiple of 128 tokens, not 1000" in outcome("splash", TPU, config, 1000, "bfloat16")
    assert "did you mean cudnn" in outcome("cuddn", H200, config, 1024, "bfloat16")
    # As it is here: no cuDNN.
    message = outcome("cudnn", H200, config, 1024, "bfloat16")
    assert message == "compute.attention=cudnn: JAX says: cuDNN is not detected.; use compute.attention=auto"
    assert outcome("auto", H200, config, 1024, "bfloat16") == "xla"
