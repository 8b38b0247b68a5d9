"""A grown student: its logits are the parent's, its clones part, and every weight of it learns."""

import contextlib
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_assist import sharding
from slm_assist.assist import weights
from slm_assist.errors import UserError
from slm_assist.models import ModelConfig, Transformer, stack, unstack

V, B, T = 40, 2, 14
OLD = ModelConfig(vocab_size=V, num_layers=2, d_model=8, d_ff=12, num_heads=4, num_kv_heads=2, head_dim=4)
MHA, MQA = {"num_kv_heads": 4}, {"num_kv_heads": 1}
LOCAL = {"pattern": ("global", "local"), "window": 4}
FLAT = {"scan_layers": False}
TWICE = {"d_model": 16, "d_ff": 24, "num_heads": 8, "num_kv_heads": 4}
ODD = {"d_model": 21, "d_ff": 17, "num_heads": 15, "num_kv_heads": 3, "num_layers": 5}
GROWN = {  # what the parent has, and what the student has beyond it
    "same": ({}, {}),
    "mlp x2, relu": ({"activation": "relu", "gated_mlp": False}, {"d_ff": 24}),
    "mlp x1.4, noise": ({"activation": "silu"}, {"d_ff": 17}),
    "heads x2 of a kv head": ({}, {"num_heads": 8}),
    "kv heads x2": ({}, {"num_heads": 8, "num_kv_heads": 4}),
    "grouped to one each": ({}, {"num_kv_heads": 4}),
    "grouped, x1.5": ({}, {"num_heads": 15, "num_kv_heads": 3}),
    "MHA x1.5": (MHA, {"num_heads": 6, "num_kv_heads": 6}),
    "MHA to groups of three": (MHA, {"num_heads": 12}),
    "MQA x1.5": (MQA, {"num_heads": 6}),
    "MQA to three kv heads": (MQA, {"num_heads": 9, "num_kv_heads": 3}),
    "stream x2": ({}, {"d_model": 16}),
    "stream x1.4, large epsilon": ({"norm_eps": 0.1}, {"d_model": 11}),
    "stream x2.5, without embed_scale": ({"embed_scale": False}, {"d_model": 20}),
    "stream x2.5, untied": ({"tie_embeddings": False}, {"d_model": 20}),
    "stream x2.5, untied of tied": ({}, {"d_model": 20, "tie_embeddings": False}),
    "stream x2.5, embed_scale lost": ({}, {"d_model": 20, "embed_scale": False}),
    "stream x1.4, embed_scale won": ({"embed_scale": False}, {"d_model": 11, "embed_scale": True}),
    "logit_scale and cap": ({"logit_scale": 0.5, "logit_softcap": 3.0}, {"d_model": 12, "logit_scale": 2.0}),
    "layers x2": ({}, {"num_layers": 4}),
    "layers x1.5, local": ({**LOCAL, "num_layers": 4}, {"num_layers": 6}),
    "all x2, scanned of unrolled": (FLAT, {**TWICE, "num_layers": 4, "scan_layers": True}),
    "all odd, unrolled of scanned": (LOCAL, {**ODD, "num_layers": 6, "scan_layers": False}),
    "all odd, untied, unrolled": ({**FLAT, "tie_embeddings": False}, ODD),
}  # fmt: skip


# The others are slow ones: these meet every kind of dimension, tied and untied, scanned and unrolled.
ALWAYS = (
    "stream x1.4, large epsilon", "stream x2.5, untied of tied", "layers x1.5, local", "all x2, scanned of unrolled",
    "all odd, untied, unrolled",
)  # fmt: skip


def slow(*cases, always=()):
    """Cases of a test, all but `always` marked as slow."""
    return [case if case in always else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def parameters(config, seed=0):
    """Random parameters that make logits of about 1, with norm scales that are not 1."""
    rng = np.random.default_rng(seed)
    model = Transformer(config)

    def draw(names, x):
        names = [name for name in names if name != "layers"]
        if len(names) == 1:
            return rng.uniform(0.5, 1.5, x.shape).astype(np.float32)
        inputs = 1 if names[0] == "vocab" else x.size // x.shape[0 if names[0] == "embed" else -1]
        return (rng.normal(size=x.shape) / math.sqrt(min(inputs, config.d_model))).astype(np.float32)

    return jax.tree.map(draw, model.logical_axes(), model.shapes(), is_leaf=sharding.is_names)


def rows():
    rng = np.random.default_rng(5)
    segment_ids = np.sort(rng.integers(0, 3, (B, T))).astype(np.int32)
    positions = np.stack([np.arange(T), np.arange(T) + 7]).astype(np.int32)
    return {"tokens": rng.integers(0, V, (B, T)).astype(np.int32), "segment_ids": segment_ids, "positions": positions}


def logits(params, config):
    model = Transformer(config)
    x = config.logit_scale * (model.apply(params, **rows()) @ model.head(params))
    return config.logit_softcap * jnp.tanh(x / config.logit_softcap) if config.logit_softcap else x


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def grow(params, old, new, depth="zero", noise=0.05):
    return weights.grow(params, old, new, depth=depth, noise=noise, key=jax.random.key(3))


@functools.cache
def parent(old):
    params = parameters(old)
    expected = np.asarray(jax.jit(logits, static_argnums=1)(params, old))
    assert np.std(expected) > 0.1 and np.ptp(expected, axis=(0, 1)).min() > 0.01, "logits say something"
    return params, expected


def difference(old, new, depth="zero", noise=0.05):
    """Largest difference between the logits of a parent and its student, as a part of the largest logit."""

    @jax.jit
    def student(params):
        grown = weights.grow(params, old, new, depth=depth, noise=noise, key=jax.random.key(3))
        return grown, logits(grown, new)

    params, expected = parent(old)
    grown, found = student(params)
    shapes = Transformer(new).shapes()
    assert jax.tree.structure(grown) == jax.tree.structure(shapes)
    jax.tree.map(lambda x, y: np.testing.assert_equal((x.shape, x.dtype), (y.shape, y.dtype)), grown, shapes)
    return float(np.abs(expected - found).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", slow(*GROWN, always=ALWAYS))
def test_logits_are_the_parents(name):
    parent, student = GROWN[name]
    old = dataclasses.replace(OLD, **parent)
    new = dataclasses.replace(old, **student)
    assert weights.check(old, new, depth="zero", noise=0.05) == ""
    # Noise compiles longest: with all dimensions at once, below, and here where a name says so.
    assert difference(old, new, noise=0.05 if "all" in name or "noise" in name else 0.0) <= 2e-5


@pytest.mark.parametrize("seed", slow(*range(6), always=(2,)))
def test_logits_are_the_parents_at_any_shape(seed):
    rng = np.random.default_rng(seed)

    def draw(*choices):
        return choices[rng.integers(len(choices))]

    kv_heads = draw(1, 2, 3)
    old = dataclasses.replace(
        OLD, num_layers=draw(1, 2, 3), d_model=int(rng.integers(4, 12)), d_ff=int(rng.integers(3, 20)),
        num_heads=kv_heads * draw(1, 2, 3), num_kv_heads=kv_heads, gated_mlp=draw(True, False),
        tie_embeddings=draw(True, False), embed_scale=draw(True, False), scan_layers=draw(True, False),
        logit_scale=draw(1.0, 0.3),
    )  # fmt: skip
    more = kv_heads + draw(0, 1, 2, 3)
    new = dataclasses.replace(
        old, num_layers=old.num_layers + draw(0, 1, 2), d_model=old.d_model + int(rng.integers(3 * old.d_model)),
        d_ff=old.d_ff + int(rng.integers(3 * old.d_ff)), num_heads=more * (old.num_heads // kv_heads + draw(0, 1, 2)),
        num_kv_heads=more, tie_embeddings=old.tie_embeddings and draw(True, False), embed_scale=draw(True, False),
        scan_layers=draw(True, False), logit_scale=draw(1.0, 0.7),
    )  # fmt: skip
    assert difference(old, new) <= 2e-5


@pytest.mark.slow
def test_bfloat16_parents_give_float32():
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), parameters(OLD))
    whole = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    new = dataclasses.replace(OLD, d_ff=17)
    grown = grow(params, OLD, new)
    jax.tree.map(np.testing.assert_array_equal, grown, grow(whole, OLD, new))
    assert {x.dtype for x in jax.tree.leaves(grown)} == {jnp.dtype("float32")}


def test_parameters_are_those_of_the_definitions():
    """Index by index in float64: 2 copies of 3 stream dimensions and 1 more, 2 kv heads to 3."""
    old = dataclasses.replace(
        OLD, num_layers=1, d_model=3, d_ff=3, num_heads=4, num_kv_heads=2, tie_embeddings=True, scan_layers=False
    )
    new = dataclasses.replace(old, d_model=7, d_ff=4, num_heads=6, num_kv_heads=3, embed_scale=False, logit_scale=4.0)
    given, found = parameters(old), grow(parameters(old), old, new, noise=0.0)
    stream = math.sqrt(7 / 6)  # so that the mean square over 7 is that of 3
    # kv heads 0, 1, 0: the query heads of 0 are 0 and 1, read by slots 0, 1, 4, 5; those of 1 are 2 and 3.
    query_of, kv_of, copies = [0, 1, 2, 3, 0, 1], [0, 1, 0], [2, 2, 1, 1, 2, 2]
    layer = {
        name: {k: np.asarray(v, np.float64) for k, v in given["layer_0"][name].items()} for name in ("attention", "mlp")
    }
    grown = found["layer_0"]
    for i in range(6):
        for n in range(6):
            expected = layer["attention"]["query"][i % 3, query_of[n]] / 2
            np.testing.assert_allclose(grown["attention"]["query"][i, n], expected, rtol=1e-6)
            expected = layer["attention"]["out"][query_of[n], :, i % 3] / copies[n] * stream
            np.testing.assert_allclose(grown["attention"]["out"][n, :, i], expected, rtol=1e-6)
        for name in ("key", "value"):
            for n in range(3):
                expected = layer["attention"][name][i % 3, kv_of[n]] / 2
                np.testing.assert_allclose(grown["attention"][name][i, n], expected, rtol=1e-6)
        for f in range(4):
            for name in ("gate", "up"):
                expected = layer["mlp"][name][i % 3, f % 3] / 2
                np.testing.assert_allclose(grown["mlp"][name][i, f], expected, rtol=1e-6)
            expected = layer["mlp"]["down"][f % 3, i % 3] / (2 if f % 3 == 0 else 1) * stream
            np.testing.assert_allclose(grown["mlp"]["down"][f, i], expected, rtol=1e-6)
        # The parent multiplies its embeddings by sqrt(3).
        expected = given["embedding"][:, i % 3].astype(np.float64) * math.sqrt(3) * stream
        np.testing.assert_allclose(found["embedding"][:, i], expected, rtol=1e-6)
    for i in range(7):
        for norm in ("attention_norm", "mlp_norm"):
            expected = given["layer_0"][norm]["scale"][i % 3] / stream
            np.testing.assert_allclose(grown[norm]["scale"][i], expected, rtol=1e-6)
        expected = given["final_norm"]["scale"][i % 3] / stream / (2 * math.sqrt(3) * stream) / 4
        np.testing.assert_allclose(found["final_norm"]["scale"][i], expected, rtol=1e-6)
    for silent in (found["embedding"][:, 6], grown["attention"]["out"][..., 6], grown["mlp"]["down"][:, 6]):
        np.testing.assert_array_equal(silent, 0)


@pytest.mark.slow
def test_new_dimensions_are_read_as_a_new_model_would():
    old = dataclasses.replace(OLD, d_model=64, num_layers=1, tie_embeddings=False)
    new = dataclasses.replace(old, d_model=120, d_ff=200, num_heads=16, num_kv_heads=8, num_layers=3)
    grown = grow(parameters(old), old, new, noise=0.0)
    layers = grown["groups"]["layer_0"]
    for name in ("query", "key", "value"):
        np.testing.assert_allclose(np.std(layers["attention"][name][:, 64:]), 120**-0.5, rtol=0.05)
    for name in ("gate", "up"):
        np.testing.assert_allclose(np.std(layers["mlp"][name][:, 64:]), 120**-0.5, rtol=0.05)
    np.testing.assert_allclose(np.std(grown["head"][64:]), 0.25 * 120**-0.5, rtol=0.05)
    assert np.unique(layers["mlp"]["up"][:, 64:]).size > 0.99 * 3 * 56 * 200, "each layer has numbers of its own"


def test_noise_is_of_the_size_asked_for_and_sums_to_zero():
    new = dataclasses.replace(OLD, d_model=28, d_ff=30, num_heads=18, num_kv_heads=3, num_layers=4)
    params = parameters(OLD)
    plain, noisy = grow(params, OLD, new, noise=0.0), grow(params, OLD, new, noise=0.02)
    dims = weights.dimensions(OLD, new, "zero")
    axes = Transformer(new).logical_axes()["groups"]["layer_0"]
    for kind, name in [("attention", "query"), ("attention", "out"), ("mlp", "gate"), ("mlp", "down")]:
        dim = dims[axes[kind][name][1]]
        before, after = (np.asarray(x["groups"]["layer_0"][kind][name], np.float64) for x in (plain, noisy))
        for group in range(4):
            noise = after[group] - before[group]
            lone = dim.fresh | (np.bincount(dim.source)[dim.source] == 1)
            assert not noise[lone].any() and noise[~lone].any()
            for source in np.unique(dim.source[~lone]):
                clones = noise[(dim.source == source) & ~dim.fresh]
                assert len(clones) > 1 and np.abs(clones.sum(0)).max() < 1e-6 < np.abs(clones).max()
            whole = before[group - group % 2]  # of a layer that writes, for the one after it that does not
            written = noise[~lone][..., :24] if axes[kind][name][-1] == "embed" else noise[~lone]
            np.testing.assert_allclose(written.std(), 0.02 * np.sqrt((whole**2).mean()), rtol=0.15)
    for name in ("embedding", "final_norm"):
        jax.tree.map(np.testing.assert_array_equal, plain[name], noisy[name])


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize(
    "depth, places",
    [("stack", [0, 1, 0, 1, 0]), ("interleave", [0, 0, 0, 1, 1]), ("zero", [0, 0, 0, 1, 1])],
)
def test_layers_are_placed(depth, places, scan):
    old = dataclasses.replace(OLD, **LOCAL, num_layers=4, scan_layers=not scan)
    new = dataclasses.replace(old, num_layers=10, scan_layers=scan)
    params = parameters(old)
    grown = grow(params, old, new, depth)
    grown = unstack(grown, new) if scan else grown
    params = params if scan else unstack(params, old)
    for group, source in enumerate(places):
        for position in range(2):
            layer = jax.tree.map(np.asarray, grown[f"layer_{2 * group + position}"])
            expected = jax.tree.map(np.array, params[f"layer_{2 * source + position}"])
            if depth == "zero" and group not in (0, 3):
                expected["attention"]["out"][:], expected["mlp"]["down"][:] = 0, 0
            jax.tree.map(np.testing.assert_array_equal, layer, expected)


@pytest.mark.parametrize("depth", slow("stack", "interleave", always=("stack",)))
def test_repeated_layers_change_the_logits(depth):
    deeper = dataclasses.replace(OLD, num_layers=4)
    assert f"grow.depth='{depth}'" in weights.check(OLD, deeper, depth=depth, noise=0.0)
    assert difference(OLD, deeper, depth, noise=0.0) > 1e-2
    wider = dataclasses.replace(OLD, **TWICE)
    assert weights.check(OLD, wider, depth=depth, noise=0.0) == ""
    assert difference(OLD, wider, depth, noise=0.0) <= 2e-5


@pytest.mark.parametrize("scan, ambient", [(True, False), pytest.param(False, True, marks=pytest.mark.slow)])
def test_eight_devices_are_one(scan, ambient):
    old = dataclasses.replace(
        OLD, vocab_size=256, d_model=64, d_ff=128, num_heads=8, num_kv_heads=4, num_layers=4, head_dim=8
    )
    new = dataclasses.replace(old, d_model=160, d_ff=192, num_heads=16, num_kv_heads=8, num_layers=8, scan_layers=scan)
    parent, model = Transformer(old), Transformer(new)
    params = parameters(old)
    mesh = sharding.make_mesh(2, 2, 2)

    def place(names, x):
        return jax.device_put(x, sharding.split(names, x, mesh))

    spread = jax.tree.map(place, parent.logical_axes(), params, is_leaf=sharding.is_names)
    assert spread["embedding"].addressable_shards[0].data.size * 8 == spread["embedding"].size
    layout = sharding.shardings(model.logical_axes(), model.shapes(), mesh)
    with jax.set_mesh(mesh) if ambient else contextlib.nullcontext():
        program = functools.partial(weights.grow, old=old, new=new)
        program = jax.jit(program, out_shardings=layout).lower(spread, key=jax.random.key(3)).compile()
        grown = program(spread, key=jax.random.key(3))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    alone = grow(params, old, dataclasses.replace(new, scan_layers=True), noise=0.01)
    jax.tree.map(close, grown, alone if scan else unstack(alone, new))
    jax.tree.map(
        lambda x, place: np.testing.assert_equal(x.sharding.is_equivalent_to(place, x.ndim), True), grown, layout
    )
    layer = grown["groups"]["layer_0"] if scan else grown["layer_7"]
    for x in (grown["embedding"], *layer["attention"].values(), *layer["mlp"].values()):
        assert {shard.data.size for shard in x.addressable_shards} == {x.size // 4}, "fsdp and tensor split it"
    whole = 4 * model.num_params()
    assert program.memory_analysis().temp_size_in_bytes < whole / 2, "no device ever holds a whole student"


REFUSED = {
    "grow.depth='zeros': choose one of .*did you mean zero": ({}, {}, {"depth": "zeros"}),
    "grow.noise=-0.1: .* use 0": ({}, {}, {"noise": -0.1}),
    "grow.noise=nan": ({}, {}, {"noise": math.nan}),
    "vocab_size=50 and grow.helper has 40.*data.vocabulary": ({}, {"vocab_size": 50}, {}),
    "head_dim=8 and grow.helper has 4.*set model.head_dim=4": ({}, {"head_dim": 8}, {}),
    "activation=relu and grow.helper has gelu.*activation=gelu": ({}, {"activation": "relu"}, {}),
    "gated_mlp=False": ({}, {"gated_mlp": False}, {}),
    "rope_theta=500.0": ({}, {"rope_theta": 500.0}, {}),
    "norm_eps=0.1": ({}, {"norm_eps": 0.1}, {}),
    "logit_softcap=3.0": ({}, {"logit_softcap": 3.0}, {}),
    "pattern=": ({}, LOCAL, {}),
    "window=5 and grow.helper has 4": (LOCAL, {"window": 5}, {}),
    "tie_embeddings=True and grow.helper has a head": ({"tie_embeddings": False}, {"tie_embeddings": True}, {}),
    "model.num_layers=1 is below grow.helper's 2": ({}, {"num_layers": 1}, {}),
    "model.d_model=7 is below grow.helper's 8": ({}, {"d_model": 7}, {}),
    "model.d_ff=11 ": ({}, {"d_ff": 11}, {}),
    "model.num_heads=2 ": ({}, {"num_heads": 2}, {}),
    "model.num_kv_heads=1 ": ({}, {"num_kv_heads": 1}, {}),
    "a kv head of grow.helper 3 of the 4 query heads .*model.num_heads=12 or more, or model.num_kv_heads=2": (
        {"num_heads": 8}, {"num_heads": 9, "num_kv_heads": 3}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_grown_is_one_line(message):
    parent, student, options = REFUSED[message]
    old = dataclasses.replace(OLD, **parent)
    new = dataclasses.replace(old, **student)
    options = {"depth": "zero", "noise": 0.01, **options}
    with pytest.raises(UserError, match=message) as error:
        weights.check(old, new, **options)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=message):
        weights.grow(parameters(old), old, new, **options, key=jax.random.key(0))


@pytest.mark.slow
def test_layouts_hold_the_same_numbers():
    new = dataclasses.replace(OLD, d_ff=17, num_layers=4)
    flat = dataclasses.replace(new, scan_layers=False)
    params = parameters(OLD)
    found = stack(grow(unstack(params, OLD), dataclasses.replace(OLD, scan_layers=False), flat), flat)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found, grow(params, OLD, new))
