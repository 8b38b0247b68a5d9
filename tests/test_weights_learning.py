"""A grown student's clones part, and every weight of it learns."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from test_weights import ODD, OLD, V, grow, parameters, slow

from slm_assist import sharding
from slm_assist.losses import blocked
from slm_assist.models import Transformer


@functools.cache
def training(config):
    """AdamW, and its jitted update on the next-token loss of random rows in which every token occurs."""
    model, optimizer = Transformer(config), optax.adamw(3e-3)
    tokens = np.stack([np.random.default_rng(seed).permutation(V) for seed in range(6)]).astype(np.int32)

    def loss(params):
        hidden = model.apply(params, tokens[:, :-1])
        options = {"softcap": config.logit_softcap, "logit_scale": config.logit_scale, "tied": config.tie_embeddings}
        mask = np.ones((6, V - 1), bool)
        return blocked.cross_entropy(hidden, model.head(params), tokens[:, 1:], mask, **options).mean

    def step(params, state):
        gradient = jax.grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, gradient

    return optimizer, jax.jit(step)


def train(params, config, steps=3):
    """[(parameters after an update, the gradient it took), ...]."""
    optimizer, step = training(config)
    trail, state = [], optimizer.init(params)
    for _ in range(steps):
        params, state, gradient = step(params, state)
        trail.append((params, gradient))
    return trail


def parting(config, trail, name, length):
    """How much the first and second clones differ in the last gradient of each tensor that produces the dimension
    `name`, as a part of its rms."""
    names_of, apart = Transformer(config).logical_axes(), {}
    paths = jax.tree_util.tree_leaves_with_path(names_of, is_leaf=sharding.is_names)
    for (path, names), x in zip(paths, jax.tree.leaves(trail[-1][1]), strict=True):
        inner = [n for n in names if n != "layers"]
        if name in (inner[1:] or inner):
            x = np.moveaxis(np.asarray(x), names.index(name), 0)
            first, second = x[:length], x[length : 2 * length]
            assert first.any(), "it learns"
            apart[jax.tree_util.keystr(path)] = float(np.sqrt(((first - second) ** 2).mean() / (first**2).mean()))
    return apart


@pytest.mark.parametrize("untied", slow(False, True, always=(False,)))
def test_clones_part(untied):
    old = dataclasses.replace(OLD, num_heads=2, num_kv_heads=1, num_layers=1)
    new = dataclasses.replace(
        old, d_model=16, d_ff=24, num_heads=4, num_kv_heads=2, num_layers=2, tie_embeddings=not untied
    )
    trails = {noise: train(grow(parameters(old), old, new, noise=noise), new) for noise in (0.0, 0.05)}
    for name, length in {"mlp": 12, "heads": 2, "kv_heads": 1, "embed": 8}.items():
        equal, apart = (parting(new, trails[noise], name, length) for noise in (0.0, 0.05))
        assert apart and max(equal.values()) < 1e-6, equal
        # The last layer's `down` and the final norm wait, beside a tied head, for the embedding's clones to part.
        assert min(apart.values()) > 1e-4, apart
    for noise, trail in trails.items():
        layer = trail[-1][0]["groups"]["layer_0"]
        pairs = {
            "mlp": np.split(layer["mlp"]["up"], 2, axis=-1),
            "heads": np.split(layer["attention"]["query"], 2, axis=-2),
            "embed": np.split(trail[-1][0]["embedding"], 2, axis=-1),
        }
        for name, (first, second) in pairs.items():
            assert (np.abs(first - second).max() > 1e-4) == (noise > 0), name


@pytest.mark.slow
def test_clones_of_added_layers_part_too():
    """Nothing but the noise of their zero outputs tells these clones apart."""
    new = dataclasses.replace(OLD, d_ff=24, num_heads=8, num_kv_heads=4, num_layers=4, scan_layers=False)
    for noise in (0.0, 0.05):
        trail = train(grow(parameters(OLD), OLD, new, noise=noise), new)
        for name, length in {"mlp": 12, "heads": 4, "kv_heads": 2}.items():
            apart = {k: v for k, v in parting(new, trail, name, length).items() if "layer_1" in k or "layer_3" in k}
            assert apart and all((value > 1e-2) == (noise > 0) for value in apart.values()), (noise, apart)


@pytest.mark.parametrize("untied", slow(False, True, always=(True,)))
def test_every_weight_learns_within_two_steps(untied):
    new = dataclasses.replace(OLD, **ODD, tie_embeddings=not untied)
    gradients = [gradient for _, gradient in train(grow(parameters(OLD), OLD, new, noise=0.0), new, 2)]
    first, both = (
        jax.tree.map(lambda *xs: np.any([np.asarray(x) != 0 for x in xs], axis=0).mean(), *gradients[:n])
        for n in (1, 2)
    )
    assert min(jax.tree.leaves(first)) < 1, "some wait for others to move"
    assert {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(both) if v < 1} == {}
