"""The decoder against a float64 one written from the definitions, and its invariants."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_assist import sharding
from slm_assist.errors import UserError
from slm_assist.models import ModelConfig, Transformer, named, stack, unstack
from slm_assist.models.attention import attend, mask_for

B, T, V = 2, 80, 96
SMALL = ModelConfig(
    vocab_size=V, num_layers=4, d_model=32, d_ff=48, num_heads=4, num_kv_heads=2, head_dim=8,
    pattern=("global", "local"), window=9,
)  # fmt: skip
SHALLOW = dataclasses.replace(SMALL, num_layers=2, pattern=("global",), window=0)
VARIANTS = {
    "grouped, gated, tied, local": SMALL,
    "one KV head, plain, untied": dataclasses.replace(
        SMALL, num_kv_heads=1, gated_mlp=False, activation="relu", tie_embeddings=False, embed_scale=False,
        pattern=("global",), window=0, rope_theta=500.0,
    ),
    "as many KV heads, unrolled": dataclasses.replace(
        SMALL, num_kv_heads=4, activation="silu", scan_layers=False, head_dim=10
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    """Rows of several documents, some padding at the end, and a prefix in each document."""
    rng = np.random.default_rng(0)
    segment_ids = np.zeros((B, T), np.int32)
    positions = np.zeros((B, T), np.int32)
    prefix_mask = np.zeros((B, T), bool)
    for row, lengths in enumerate([[30, 1, 42], [66, 14]]):
        start = 0
        for segment, length in enumerate(lengths, 1):
            segment_ids[row, start : start + length] = segment
            positions[row, start : start + length] = np.arange(length)
            prefix_mask[row, start : start + length // 3] = True
            start += length
    tokens = rng.integers(0, V, (B, T)).astype(np.int32)
    return {"tokens": tokens, "segment_ids": segment_ids, "positions": positions, "prefix_mask": prefix_mask}


def sees(query, key, segment_ids, prefix_mask, window):
    """Whether one token of a row sees another: the definition, token by token."""
    if segment_ids[query] != segment_ids[key] or (window and abs(query - key) >= window):
        return False
    return key <= query or bool(prefix_mask[query] and prefix_mask[key])


def attention64(query, key, value, segment_ids, prefix_mask, window):
    """[T, N, H] from one row, in float64, a token and a head at a time."""
    out = np.zeros_like(query)
    group = query.shape[1] // key.shape[1]
    for t in range(len(query)):
        seen = [s for s in range(len(query)) if sees(t, s, segment_ids, prefix_mask, window)]
        for head in range(query.shape[1]):
            logits = key[seen, head // group] @ query[t, head] / math.sqrt(query.shape[2])
            weights = np.exp(logits - logits.max())
            out[t, head] = weights / weights.sum() @ value[seen, head // group]
    return out


def decoder64(params, config, tokens, segment_ids, positions, prefix_mask):
    """(hidden, [hidden after each layer]) of one row in float64, from the definitions."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    if config.scan_layers:
        params = unstack(params, config)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale

    def activation(x):
        gelu = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return {"gelu": gelu, "relu": np.maximum(x, 0), "silu": x / (1 + np.exp(-x))}[config.activation]

    def rotate(x):
        out, half = x.copy(), config.head_dim // 2
        for i in range(half):
            angle = positions * config.rope_theta ** (-i / half)
            turn = np.exp(1j * angle)[:, None] * (x[..., i] + 1j * x[..., i + half])
            out[..., i], out[..., i + half] = turn.real, turn.imag
        return out

    x = params["embedding"][tokens] * (math.sqrt(config.d_model) if config.embed_scale else 1)
    after = []
    for index in range(config.num_layers):
        layer = params[f"layer_{index}"]
        y = norm(x, layer["attention_norm"]["scale"])
        query, key, value = (np.einsum("td,dnh->tnh", y, layer["attention"][k]) for k in ("query", "key", "value"))
        window = config.window if config.pattern[index % len(config.pattern)] == "local" else 0
        mixed = attention64(rotate(query), rotate(key), value, segment_ids, prefix_mask, window)
        x = x + np.einsum("tnh,nhd->td", mixed, layer["attention"]["out"])
        y, mlp = norm(x, layer["mlp_norm"]["scale"]), layer["mlp"]
        up = y @ mlp["up"]
        wide = activation(y @ mlp["gate"]) * up if config.gated_mlp else activation(up)
        x = x + wide @ mlp["down"]
        after.append(x)
    return norm(x, params["final_norm"]["scale"]), after


@functools.cache
def init(config):
    """A model and parameters with norm scales that are not all 1."""
    model = Transformer(config)
    params = jax.jit(model.init)(jax.random.key(0))
    rng = np.random.default_rng(1)
    return model, jax.tree.map(lambda x: x * rng.uniform(0.5, 1.5, x.shape).astype(np.float32), params)


def close(a, b, tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_pass_is_that_of_the_definitions(name, rows):
    config = VARIANTS[name]
    model, params = init(config)
    taps = tuple(range(config.num_layers))
    hidden, tapped = jax.jit(functools.partial(model.apply, taps=taps))(params, **rows)
    for row in range(B):
        expected, after = decoder64(params, config, *(rows[k][row] for k in rows))
        close(hidden[row], expected, 3e-5)
        close([tapped[i][row] for i in taps], after, 3e-5)


@pytest.mark.parametrize(
    "heads, kv_heads, length, window, prefix",
    [(4, 4, 1, 0, True), (4, 2, 70, 5, True), (4, 2, 150, 80, False), (6, 1, 150, 0, True)],
)
def test_attention_and_its_gradient(heads, kv_heads, length, window, prefix):
    rng = np.random.default_rng(length)
    shapes = [(2, length, n, 8) for n in (heads, kv_heads, kv_heads, heads)]
    query, key, value, out = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    segment_ids = np.sort(rng.integers(0, 3, (2, length)))
    prefix_mask = (rng.random((2, length)) < 0.3) & prefix
    rows = {"segment_ids": segment_ids, "prefix_mask": prefix_mask if prefix else None, "window": window}
    mask = np.array([
        [[sees(t, s, segment_ids[b], prefix_mask[b], window) for s in range(length)] for t in range(length)]
        for b in range(2)
    ])  # fmt: skip
    np.testing.assert_array_equal(mask_for(length, **rows), mask)

    def plain(query, key, value):
        key, value = (jnp.repeat(x, heads // kv_heads, axis=2) for x in (key, value))
        logits = jnp.einsum("btnh,bsnh->bnts", query, key) / math.sqrt(8)
        weights = jax.nn.softmax(jnp.where(mask[:, None], logits, -jnp.inf))
        return jnp.einsum("bnts,bsnh->btnh", weights, value)

    def ours(query, key, value):
        return attend(query, key, value, **rows)

    def value_and_gradients(function):
        result, pullback = jax.vjp(function, query, key, value)
        return result, pullback(out)

    close(jax.jit(lambda: value_and_gradients(ours))(), jax.jit(lambda: value_and_gradients(plain))(), 2e-5)


def test_packed_documents_are_the_same_documents_alone(rows):
    model, params = init(SMALL)
    apply = jax.jit(model.apply)
    packed = apply(params, **{k: v for k, v in rows.items() if k != "prefix_mask"})
    for row, segment in [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2)]:
        (where,) = np.nonzero(rows["segment_ids"][row] == segment)
        alone = np.zeros((1, T), np.int32)
        alone[0, : len(where)] = rows["tokens"][row, where]  # what follows it is not seen: no ids, all causal
        close(packed[row, where], apply(params, alone)[0, : len(where)], 2e-5)


def test_padding_is_finite_and_reaches_nothing(rows):
    model, params = init(SMALL)
    real = rows["segment_ids"] > 0

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params, tokens, segment_ids):
        hidden = model.apply(params, tokens, segment_ids=segment_ids)
        return jnp.sum(jnp.where(segment_ids[..., None] > 0, hidden, 0) ** 3), hidden

    (value, hidden), grads = loss(params, rows["tokens"], rows["segment_ids"])
    (changed, _), changed_grads = loss(params, np.where(real, rows["tokens"], 5), rows["segment_ids"])
    assert np.isfinite(hidden).all() and value == changed and value != 0
    jax.tree.map(np.testing.assert_array_equal, grads, changed_grads)
    (value, hidden), grads = loss(params, rows["tokens"], np.zeros((B, T), np.int32))
    assert np.isfinite(hidden).all() and value == 0 and not any(x.any() for x in jax.tree.leaves(grads))


def test_a_token_sees_no_later_one():
    model, params = init(SMALL)
    tokens = jax.random.randint(jax.random.key(2), (1, T), 0, V)
    before, after = (jax.jit(model.apply)(params, x) for x in (tokens, tokens.at[:, 50].add(1) % V))
    np.testing.assert_array_equal(before[:, :50], after[:, :50])
    assert (np.abs(before - after).max(-1) > 0)[0, 50:].any()


def value_and_gradient(model, params, rows):
    rows = {name: value[:, :32] for name, value in rows.items()}

    def loss(params):
        return jnp.mean(jnp.tanh(model.apply(params, **rows) @ model.head(params)))

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("remat, scan", [("full", True), ("dots", True), ("full", False)])
def test_remat_changes_nothing_but_memory(remat, scan, rows):
    config = dataclasses.replace(SHALLOW, scan_layers=scan)
    model, params = init(config)
    again = Transformer(config, remat=remat)
    close(value_and_gradient(again, params, rows), value_and_gradient(model, params, rows), 1e-6)
    jaxprs = [str(jax.make_jaxpr(lambda p, m=m: m.apply(p, **rows))(params)) for m in (model, again)]
    assert ["remat" in jaxpr or "checkpoint" in jaxpr for jaxpr in jaxprs] == [False, True]


def test_scan_is_unrolled(rows):
    model, params = init(SMALL)
    flat = Transformer(dataclasses.replace(SMALL, scan_layers=False))
    value, grads = value_and_gradient(model, params, rows)
    flat_value, flat_grads = value_and_gradient(flat, unstack(params, SMALL), rows)
    close((value, unstack(grads, SMALL)), (flat_value, flat_grads), 1e-6)
    back = stack(unstack(params, SMALL), SMALL)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_the_scan_keeps_one_of_each_tap(rows):
    model, params = init(SMALL)

    def scan_outputs(taps):
        jaxpr = jax.make_jaxpr(lambda p: model.apply(p, rows["tokens"], taps=taps))(params).jaxpr
        (scan,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")
        return [var.aval.shape for var in scan.outvars]

    stream = (B, T, SMALL.d_model)
    assert scan_outputs(()) == [stream]
    for taps in [(1,), (1, 3), (0, 1)]:
        assert sorted(scan_outputs(taps), key=len) == [(), *[stream] * (1 + len(taps))]


def test_bfloat16_computes_attention_in_float32(rows):
    model, params = init(SHALLOW)
    half = Transformer(SHALLOW, dtype=jnp.bfloat16)
    exact = jax.jit(model.apply)(params, **rows)
    for given in (params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)):
        hidden = jax.jit(half.apply)(given, **rows)
        assert hidden.dtype == jnp.bfloat16
        error = np.asarray(hidden, np.float32) - exact
        assert np.sqrt((error**2).mean() / (np.asarray(exact) ** 2).mean()) < 0.03
    x = jnp.ones((1, 4, 2, 8), jnp.bfloat16)
    jaxpr = str(jax.make_jaxpr(attend)(x, x, x))
    assert "preferred_element_type=float32" in jaxpr and "exp" in jaxpr
    assert not [line for line in jaxpr.splitlines() if " exp " in line and "f32" not in line]
    assert {x.dtype for x in jax.tree.leaves(half.shapes())} == {jnp.dtype("float32")}


@pytest.mark.parametrize("size, count", [("paper-1.5b", 1.49), ("paper-2.8b", 2.82), ("paper-8.6b", 8.46)])
def test_parameter_counts_of_the_paper(size, count):
    model = Transformer(named(size, 262144))
    # To the two digits that the paper's shapes are quoted with, cut off or rounded.
    assert count <= model.num_params() / 1e9 < count + 0.01


@pytest.mark.parametrize("pair", [("laptop-small", "laptop-large"), ("gpu-9m", "gpu-25m"), ("gpu-35m", "gpu-100m")])
def test_pairs_differ_threefold_in_cost(pair):
    vocab_size, length = {"laptop-large": (2048, 256), "gpu-25m": (16384, 512), "gpu-100m": (32768, 1024)}[pair[1]]

    def cost(size):
        config = named(size, vocab_size)
        assert config.tie_embeddings, "so that the parameters are the weights a token meets"
        return 2 * Transformer(config).num_params() + 4 * length * config.num_layers * config.d_model

    assert 0.3 < cost(pair[0]) / cost(pair[1]) < 0.4


@pytest.mark.parametrize(
    "changes",
    [{}, {"d_model": 512, "tie_embeddings": False}, {"d_model": 512, "embed_scale": False}],
)
def test_first_loss_is_that_of_a_uniform_guess(changes):
    config = dataclasses.replace(SHALLOW, vocab_size=2048, **changes)
    model = Transformer(config)
    params = jax.jit(model.init)(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (4, 65), 0, 2048)
    logits = jax.jit(model.apply)(params, tokens[:, :-1]) @ model.head(params)
    loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1).mean()
    assert abs(float(loss) - math.log(2048)) < 0.1


def test_kernels_start_with_the_variance_of_their_inputs():
    config = dataclasses.replace(SHALLOW, d_model=256, d_ff=512, num_heads=8, head_dim=16)
    layer = jax.jit(Transformer(config).init)(jax.random.key(0))["groups"]["layer_0"]
    fan_ins = {"query": 256, "key": 256, "value": 256, "out": 8 * 16, "gate": 256, "up": 256, "down": 512}
    residual = 1 / math.sqrt(2 * config.num_layers)
    for name, kernel in {**layer["attention"], **layer["mlp"]}.items():
        expected = fan_ins[name] ** -0.5 * (residual if name in ("out", "down") else 1)
        np.testing.assert_allclose(np.std(kernel), expected, rtol=0.03)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_names_its_dimensions(name):
    model = Transformer(VARIANTS[name])
    shapes, axes = model.shapes(), model.logical_axes()
    jax.tree.map(lambda x, names: np.testing.assert_equal(len(names), len(x.shape)), shapes, axes)
    names = {n for names in jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple)) for n in names}
    assert names <= set(sharding.RULES) and ("layers" in names) == VARIANTS[name].scan_layers
    assert ("head" in shapes) != VARIANTS[name].tie_embeddings
    assert model.num_params() == sum(x.size for x in jax.tree.leaves(jax.jit(model.init)(jax.random.key(3))))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 2, 4)])
def test_eight_devices_are_one(sizes, capfd):
    model, params = Transformer(SHALLOW), jax.jit(Transformer(SHALLOW).init)(jax.random.key(0))
    rng = np.random.default_rng(3)
    rows = {
        "tokens": rng.integers(0, V, (8, 32)).astype(np.int32),
        "segment_ids": np.sort(rng.integers(0, 4, (8, 32))).astype(np.int32),
    }
    one = value_and_gradient(model, params, rows)
    mesh = sharding.make_mesh(*sizes)
    layout = sharding.shardings(model.logical_axes(), model.shapes(), mesh)
    with jax.set_mesh(mesh):
        spread = jax.jit(model.init, out_shardings=layout)(jax.random.key(0))
        placed = jax.device_put(rows, sharding.batch_sharding(mesh))
        eight = value_and_gradient(model, spread, placed)
    jax.tree.map(np.testing.assert_array_equal, spread, params)
    close(eight, one, 2e-6)
    up = spread["groups"]["layer_0"]["mlp"]["up"]
    assert up.size == up.addressable_shards[0].data.size * sizes[1] * sizes[2]
    assert "rematerialization" not in capfd.readouterr().err, "XLA replicates an array to move it"


def test_constraints_are_there_under_a_mesh():
    model = Transformer(dataclasses.replace(SHALLOW, scan_layers=False))
    params, tokens = model.shapes(), jnp.zeros((8, 16), jnp.int32)

    def count():
        return str(jax.make_jaxpr(lambda p: model.apply(p, tokens))(params)).count("sharding_constraint")

    assert count() == 0
    with jax.set_mesh(sharding.make_mesh(data=2, fsdp=2, tensor=2)):
        # The table and its rows; in a layer query, key, value, mixed, gate, up and the stream twice.
        assert count() == 2 + 2 * 8


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_kv_heads": 3}, "num_kv_heads=3"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"activation": "gelu2"}, "did you mean gelu"),
        ({"pattern": ("global", "locl")}, "did you mean local"),
        ({"num_layers": 3}, "num_layers=3"),
        ({"window": 0}, "window=0"),
        ({"pattern": ("global",)}, "window=9"),
        ({"d_model": 0}, "d_model=0"),
        ({"d_model": 32.0}, "d_model=32.0"),
        ({"norm_eps": -1.0}, "norm_eps"),
        ({"tie_embeddings": 1}, "tie_embeddings"),
        ({"d_modl": 3}, "did you mean d_model"),
    ],
)
def test_a_bad_config_names_the_field(changes, message):
    with pytest.raises(UserError, match=message):
        ModelConfig.from_json({**SMALL.to_json(), **changes})


def test_config_survives_json():
    assert ModelConfig.from_json(SMALL.to_json()) == SMALL
    with pytest.raises(UserError, match="head_dim is missing"):
        ModelConfig.from_json({k: v for k, v in SMALL.to_json().items() if k != "head_dim"})
    with pytest.raises(UserError, match="did you mean paper-1.5b"):
        named("paper-1.5", 100)
    assert named("laptop-small", 100, num_layers=2).num_layers == 2


def test_bad_arguments_are_named():
    model, params = init(SMALL)
    tokens = jnp.zeros((B, T), jnp.int32)
    cases = {
        "tokens are int32": lambda: model.apply(params, tokens[0]),
        "tokens are float32": lambda: model.apply(params, tokens.astype(jnp.float32)),
        "segment_ids": lambda: model.apply(params, tokens, segment_ids=tokens[:, 1:]),
        "the layers are 0 to 3": lambda: model.apply(params, tokens, taps=(4,)),
        "remat='all'": lambda: Transformer(SMALL, remat="all"),
    }
    for message, call in cases.items():
        with pytest.raises(UserError, match=message):
            call()
    hidden = jax.jit(model.apply)(params, tokens.at[0, 5].set(V))
    assert np.isnan(hidden[0, 5:]).all() and np.isfinite(hidden[1]).all(), "a token that does not exist"
