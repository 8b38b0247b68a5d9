"""Schedules by their definition; optimizers layer by layer, against optax, and on eight devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from slm_assist import compiled as compiled_lib
from slm_assist import optim, sharding
from slm_assist.errors import UserError
from slm_assist.models import ModelConfig, Transformer, unstack

# Wide enough that Adafactor factors the matrices: every side is 128.
CONFIG = ModelConfig(
    vocab_size=130, num_layers=3, d_model=128, d_ff=128, num_heads=4, num_kv_heads=4, head_dim=32
)  # fmt: skip
FLAT = dataclasses.replace(CONFIG, scan_layers=False)


@functools.cache
def parameters():
    return jax.jit(Transformer(CONFIG).init)(jax.random.key(0))


@functools.cache
def gradients(step):
    """Gradients whose size differs a hundredfold from layer to layer, so that shared statistics show."""
    rng = np.random.default_rng(step)

    def gradient(names, x):
        size = 10.0 ** rng.uniform(-3, -1, (len(x),) + (1,) * (x.ndim - 1)) if names[0] == "layers" else 0.01
        return (size * rng.normal(size=x.shape)).astype(np.float32)

    axes = Transformer(CONFIG).logical_axes()
    return jax.tree.map(gradient, axes, parameters(), is_leaf=sharding.is_names)


def three_updates(optimizer, params, grads_at, init=None):
    """Parameters and state after three updates, and the parameters' total change."""

    @jax.jit
    def update(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = (init or jax.jit(optimizer.init))(params)
    for step in range(3):
        params, state = update(params, state, grads_at(step))
    return params, state


def make(name, config, **options):
    axes = Transformer(config).logical_axes()
    schedule = optim.learning_rate("cosine", peak=0.03, steps=10, warmup_steps=2)
    return optim.make_optimizer(name, schedule, axes=axes, **{"weight_decay": 0.1, "muon_steps": 2, **options})


def assert_close(a, b, tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def largest_difference(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), a, b)))


def at(schedule, *steps):
    return [float(schedule(jnp.asarray(step, jnp.int32))) for step in steps]


def test_cosine():
    schedule = optim.learning_rate("cosine", peak=2.0, steps=110, warmup_steps=10, final_fraction=0.1)
    assert_close(at(schedule, 0, 4, 10), [2 / 11, 10 / 11, 2.0], 1e-6)
    expected = [2 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * x))) for x in (0.25, 0.5, 1.0, 1.0)]
    assert_close(at(schedule, 35, 60, 110, 500), expected, 1e-6)


def test_warmup_stable_decay():
    schedule = optim.learning_rate("wsd", peak=1.0, steps=100, warmup_steps=4, final_fraction=0.2, decay_fraction=0.4)
    assert_close(at(schedule, 0, 4, 30, 60), [0.2, 1, 1, 1], 1e-6)
    assert_close(at(schedule, 70, 80, 100), [0.8, 0.6, 0.2], 1e-6)


def test_constant():
    schedule = optim.learning_rate("constant", peak=0.5, steps=100, warmup_steps=1)
    assert_close(at(schedule, 0, 1, 99), [0.25, 0.5, 0.5], 1e-6)


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("cosin", {}, "did you mean cosine"),
        ("cosine", {"peak": 0}, "peak=0"),
        ("cosine", {"warmup_steps": 100}, "warmup_steps=100"),
        ("wsd", {"warmup_steps": 61, "decay_fraction": 0.4}, "last 40 decay"),
        ("cosine", {"final_fraction": 1.5}, "final_fraction=1.5"),
    ],
)
def test_a_bad_schedule_is_named(kind, changes, message):
    with pytest.raises(UserError, match=message):
        optim.learning_rate(kind, **{"peak": 1.0, "steps": 100, **changes})


def test_a_bad_optimizer_is_named():
    with pytest.raises(UserError, match="did you mean adamw"):
        make("adam", CONFIG)
    with pytest.raises(UserError, match="clip_norm=-1"):
        make("adamw", CONFIG, clip_norm=-1)
    with pytest.raises(UserError, match=r"muon_momentum=1\.0"):
        make("muon", CONFIG, muon_momentum=1.0)
    with pytest.raises(UserError, match="muon_steps=0"):
        make("muon", CONFIG, muon_steps=0)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_scanned_layers_are_updated_as_unrolled_ones(name):
    scanned, _ = three_updates(make(name, CONFIG), parameters(), gradients)
    flat, _ = three_updates(
        make(name, FLAT), unstack(parameters(), CONFIG), lambda step: unstack(gradients(step), CONFIG)
    )
    assert_close(unstack(scanned, CONFIG), flat, 2e-6)
    assert largest_difference(scanned, parameters()) > 0.01


def test_optax_adafactor_would_mix_the_layers():
    """The test above can fail: optax's statistics are those of the stack."""
    optimizer = optax.adafactor(0.03)
    scanned, _ = three_updates(optimizer, parameters(), gradients)
    flat, _ = three_updates(optimizer, unstack(parameters(), CONFIG), lambda step: unstack(gradients(step), CONFIG))
    assert largest_difference(unstack(scanned, CONFIG), flat) > 1e-3


def test_adafactor_is_that_of_optax_on_matrices():
    """A kernel of heads is the matrix it multiplies as; narrow matrices and scales are not factored."""
    axes = {
        "up": ("embed", "mlp"), "down": ("mlp", "embed"), "narrow": ("embed", "kv_heads", "head_dim"),
        "query": ("embed", "heads", "head_dim"), "out": ("heads", "head_dim", "embed"), "scale": ("embed",),
    }  # fmt: skip
    shapes = {
        "up": (128, 200), "down": (200, 128), "narrow": (128, 2, 8), "query": (128, 5, 32), "out": (5, 32, 128),
        "scale": (128,),
    }  # fmt: skip
    flat = {"narrow": (128, 16), "query": (128, 160), "out": (160, 128)}

    def draw(seed, scale):
        rng = np.random.default_rng(seed)
        return {k: (scale * rng.normal(size=shape)).astype(np.float32) for k, shape in shapes.items()}

    def flatten(tree):
        return {k: jnp.reshape(x, flat.get(k, x.shape)) for k, x in tree.items()}

    def scales(step):
        return [3.0, 0.001, 1.0][step]

    ours = optax.chain(optim.scale_by_adafactor(axes), optax.scale_by_learning_rate(0.1))
    params, state = three_updates(ours, draw(0, 0.1), lambda step: draw(step + 1, scales(step)))
    expected, _ = three_updates(
        optax.adafactor(0.1), flatten(draw(0, 0.1)), lambda step: flatten(draw(step + 1, scales(step)))
    )
    assert_close(flatten(params), expected, 2e-6)
    sizes = {k: (state[0].row[k].shape, state[0].column[k].shape) for k in shapes}
    assert sizes["query"] == ((128, 1, 1), (1, 5, 32)) and sizes["out"] == ((1, 1, 128), (5, 32, 1))
    assert sizes["narrow"][0] == (128, 2, 8) and sizes["scale"][0] == (128,)


def test_decay_acts_on_matrices_only():
    """Scanned norm scales have two dimensions and are left alone; the names tell."""
    zero = jax.tree.map(jnp.zeros_like, parameters())
    schedule = optim.learning_rate("constant", peak=0.5, steps=10)
    for name in optim.OPTIMIZERS:
        axes = Transformer(CONFIG).logical_axes()
        optimizer = optim.make_optimizer(name, schedule, axes=axes, weight_decay=0.1)
        updates = jax.jit(lambda p, o=optimizer: o.update(zero, o.init(p), p)[0])(parameters())
        layer, start = updates["groups"]["layer_0"], parameters()["groups"]["layer_0"]
        assert not layer["mlp_norm"]["scale"].any() and not updates["final_norm"]["scale"].any()
        assert_close(layer["attention"]["query"], -0.05 * start["attention"]["query"], 1e-7)
        assert_close(updates["embedding"], -0.05 * parameters()["embedding"], 1e-7)


def test_adamw_is_the_definition():
    rng, b1, b2, eps = np.random.default_rng(0), 0.9, 0.95, 1e-8
    params = {"kernel": rng.normal(size=(4, 3)), "scale": rng.normal(size=4)}
    grads = [{k: 5 * rng.normal(size=x.shape) for k, x in params.items()} for _ in range(3)]
    optimizer = optim.make_optimizer(
        "adamw", lambda step: 0.1 / (1 + step), axes={"kernel": ("embed", "mlp"), "scale": ("embed",)},
        weight_decay=0.2, b1=b1, b2=b2, eps=eps, clip_norm=1.0,
    )  # fmt: skip
    got, state = three_updates(
        optimizer, jax.tree.map(jnp.float32, params), lambda step: jax.tree.map(jnp.float32, grads[step])
    )
    m = v = {"kernel": 0.0, "scale": 0.0}
    for step, grad in enumerate(grads):
        norm = np.sqrt(sum((g**2).sum() for g in grad.values()))
        assert norm > 1
        for k, g in grad.items():
            g = g / norm
            m, v = {**m, k: b1 * m[k] + (1 - b1) * g}, {**v, k: b2 * v[k] + (1 - b2) * g**2}
            direction = m[k] / (1 - b1 ** (step + 1)) / (np.sqrt(v[k] / (1 - b2 ** (step + 1))) + eps)
            decay = 0.2 * params[k] if k == "kernel" else 0
            params[k] = params[k] - 0.1 / (1 + step) * (direction + decay)
    assert_close(got, params, 1e-5)
    counts = [x for x in jax.tree.leaves(state) if x.ndim == 0]
    assert counts and all(x.dtype == jnp.int32 and x == 3 for x in counts)


def orthogonalised(matrix, steps):
    """Newton-Schulz by its definition (Jordan et al. 2024), in float64."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def test_muon_is_the_definition_layer_by_layer_and_adamw_elsewhere():
    rng, momentum, b1, b2, eps, rate = np.random.default_rng(0), 0.9, 0.8, 0.95, 1e-8, 0.1
    axes = {
        "query": ("layers", "embed", "heads", "head_dim"), "out": ("layers", "heads", "head_dim", "embed"),
        "up": ("embed", "mlp"), "embedding": ("vocab", "embed"), "scale": ("layers", "embed"),
    }  # fmt: skip
    shapes = {"query": (3, 12, 2, 4), "out": (3, 2, 4, 12), "up": (12, 20), "embedding": (9, 12), "scale": (3, 12)}
    matrices = {"query": (3, 12, 8), "out": (3, 8, 12), "up": (1, 12, 20)}
    params = {k: rng.normal(size=shape) for k, shape in shapes.items()}
    layer_size = {3: np.array([1.0, 1e-3, 30.0])}
    grads = [
        {
            k: rng.normal(size=s) * layer_size.get(s[0], np.ones(1)).reshape(-1, *[1] * (len(s) - 1))
            for k, s in shapes.items()
        }
        for _ in range(3)
    ]
    optimizer = optim.make_optimizer(
        "muon", lambda step: rate, axes=axes, weight_decay=0.2, b1=b1, b2=b2, eps=eps, clip_norm=0,
        muon_momentum=momentum, muon_steps=4,
    )  # fmt: skip
    got, _ = three_updates(
        optimizer, jax.tree.map(jnp.float32, params), lambda step: jax.tree.map(jnp.float32, grads[step])
    )
    m, v = dict.fromkeys(shapes, 0.0), dict.fromkeys(shapes, 0.0)
    for t, grad in enumerate(grads, start=1):
        for k, g in grad.items():
            if k in matrices:
                m[k] = momentum * m[k] + (1 - momentum) * g
                ahead = momentum * m[k] / (1 - momentum ** (t + 1)) + (1 - momentum) * g / (1 - momentum**t)
                layers = [orthogonalised(x, 4) for x in ahead.reshape(matrices[k])]
                direction = 0.2 * np.sqrt(max(matrices[k][1:])) * np.stack(layers).reshape(shapes[k])
                assert all(0.1 < np.sqrt(np.mean(x**2)) < 0.25 for x in direction.reshape(matrices[k]))
            else:
                m[k], v[k] = b1 * m[k] + (1 - b1) * g, b2 * v[k] + (1 - b2) * g**2
                direction = m[k] / (1 - b1**t) / (np.sqrt(v[k] / (1 - b2**t)) + eps)
            params[k] = params[k] - rate * (direction + (0 if k == "scale" else 0.2 * params[k]))
    assert_close(got, params, 2e-5)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_eight_devices_are_one(name):
    axes, optimizer = Transformer(CONFIG).logical_axes(), make(name, CONFIG)
    one, one_state = three_updates(optimizer, parameters(), gradients)
    mesh = sharding.make_mesh(2, 2, 2)
    layout = sharding.shardings(axes, parameters(), mesh)
    states = optim.state_shardings(optimizer, parameters(), axes, mesh)
    spread = jax.device_put(parameters(), layout)
    with jax.set_mesh(mesh):
        eight, eight_state = three_updates(
            optimizer,
            spread,
            lambda step: jax.device_put(gradients(step), layout),
            init=jax.jit(optimizer.init, out_shardings=states),
        )
    assert_close(eight, one, 2e-6)
    assert_close(eight_state, one_state, 1e-6)
    places = zip(jax.tree.leaves(eight_state), jax.tree.leaves(states), strict=True)
    assert all(x.sharding.is_equivalent_to(place, x.ndim) for x, place in places)
    scale = eight_state[1]
    moments = {"adafactor": "row", "adamw": "mu"}.get(name)
    moments = getattr(scale, moments) if moments else scale.inner_states["muon"].inner_state.mu
    query = moments["groups"]["layer_0"]["attention"]["query"]
    assert query.addressable_shards[0].data.size == query.size // (2 if name == "adafactor" else 4)


def test_muon_deals_the_layers_out():
    """Each device orthogonalises its share of the layers, and of what it needs for that nothing is gathered."""
    model = Transformer(
        ModelConfig(vocab_size=16, num_layers=8, d_model=16, d_ff=32, num_heads=2, num_kv_heads=2, head_dim=8)
    )
    axes, shapes = model.logical_axes(), model.shapes()
    optimizer = optim.make_optimizer("muon", lambda step: 0.1, axes=axes, muon_steps=1)

    def compiled(*sizes):
        mesh = sharding.make_mesh(*sizes)
        places = sharding.shardings(axes, shapes, mesh), optim.state_shardings(optimizer, shapes, axes, mesh)
        given = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            (shapes, jax.eval_shape(optimizer.init, shapes)),
            places,
        )
        with jax.set_mesh(mesh):
            return jax.jit(optimizer.update, out_shardings=places).lower(*given, given[0]).compile()

    one, eight = compiled(1, 1, 1), compiled(2, 2, 2)
    assert compiled_lib.flops(eight) == compiled_lib.flops(one) / 8
    largest = max(x.size for x in jax.tree.leaves(shapes)) * 4
    assert all(c.bytes <= largest // 4 for c in compiled_lib.collectives(eight) if c.kind != "all-reduce")
