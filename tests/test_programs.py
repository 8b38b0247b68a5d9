"""Compiled steps of a run: all before the first update, from a cache the next time, and no hidden transfers."""

import contextlib
import warnings
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
import tiny

from slm_assist import compiled as compiled_lib
from slm_assist import config as config_lib
from slm_assist import programs
from slm_assist.errors import UserError
from slm_assist.train import train

SMALL = {
    "optimizer__name": "muon", "optimizer__muon_steps": 3, "model__d_model": 16, "steps": 6,
    "checkpoint__keep_fraction": 0.34,
}  # fmt: skip


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    """A directory with a small LM, trained by Muon, and a copy of its run as a kill after 4 updates leaves it."""
    directory = tmp_path_factory.mktemp("programs")
    tiny.run(directory, "small_lm", killed=(4,), **SMALL)
    return directory


def salt_ds(tmp, **more):
    """8 updates on 2 devices, of which 4 choose their rows and have a teacher, whose parameters are split."""
    keys = {
        "assist__schedule": "step", "assist__steps": 4, "assist__teacher": str(tmp / "small_lm"), "steps": 8,
        "select__rows": "online", "select__pool_factor": 3, "select__k": 40, "select__statistic": "mean",
        "mesh__tensor": 2, "mesh__helpers": "fsdp", "select__sample": 20,
    }  # fmt: skip
    return config_lib.resolve("", tiny.overrides(tmp, **(keys | more)))[0]


def test_muon_resumes_bit_for_bit(tmp):
    again = tiny.run(tmp, "small_lm-4", **SMALL)
    tiny.assert_same_run(tiny.RunDir(tmp / "small_lm"), again)


@contextlib.contextmanager
def compilations():
    """A list that grows with every program that XLA is asked for.

    But for `slice`: Orbax cuts arrays that several devices hold when it saves them first, so that each writes a part.
    """
    found: list[str] = []

    def listener(event: str, seconds: float, fun_name: str = "", **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and fun_name != "jit(slice)":
            found.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


def test_nothing_is_compiled_or_moved_unasked_once_a_run_has_begun(tmp):
    """Through the first sample, a switch of stages, validation and checkpoints."""
    compile_all, programs_of_run, messages = programs.compile_all, {}, []

    def begin(experiment, state, *others):
        programs_of_run.update(compile_all(experiment, state, *others))
        with jax.transfer_guard("disallow"), pytest.raises(Exception, match="Disallowed host-to-device"):
            jnp.int32(3) + 1  # the guard can tell
        found.clear()
        jax.config.update("jax_transfer_guard", "disallow")
        return programs_of_run

    with compilations() as found, mock.patch.object(programs, "compile_all", begin), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*donated.*")
        try:
            run = train(salt_ds(tmp), str(tmp / "salt_ds"), say=messages.append)
        finally:
            jax.config.update("jax_transfer_guard", "allow")
        assert run.selection_sample.is_file() and not found
        jax.jit(lambda x: x + 12345)(1)
        assert found  # the count can tell
    stages = [line["stage"] for line in tiny.records(run) if line["kind"] == "train"]
    assert stages == ["assisted_selecting"] * 4 + ["plain"] * 4
    assert list(programs_of_run) == ["eval", "assisted_selecting", "plain", "sample"]
    for name in ("assisted_selecting", "plain"):  # the state's memory is used again
        memory = compiled_lib.memory(programs_of_run[name])
        assert memory.aliased > 0.99 * (memory.outputs - 10_000)
    assert any("MB split over 2 devices" in line for line in messages)
    assert any("compiling took eval " in line and "; plain " in line for line in messages)


def test_compilation_cache(tmp_path):
    config, mesh = config_lib.get_config(), programs.sharding.make_mesh(1, 1, 1)

    def built():
        jax.clear_caches()
        return programs.build(config, mesh, lambda x: jnp.sin(x) * 54321, jax.ShapeDtypeStruct((3,), jnp.float32))

    environment = jax.config.jax_compilation_cache_dir
    with programs.compilation_cache(str(tmp_path / "other")):
        assert jax.config.jax_compilation_cache_dir == environment  # which goes first
    before = {name: getattr(jax.config, name) for name in programs.KEEP_ALL}
    programs._set_cache({"jax_compilation_cache_dir": None})
    try:
        with programs.compilation_cache(""):
            assert not built().cached and not built().cached
        with programs.compilation_cache(str(tmp_path / "cache")):
            first, second = built(), built()
        assert not first.cached and second.cached and "from the cache" in second.costs()
        assert jax.config.jax_compilation_cache_dir is None
        assert jnp.array_equal(first.call(jnp.ones(3)), second.call(jnp.ones(3)))
        (tmp_path / "file").write_text("")
        with (
            pytest.raises(UserError, match=r"compute\.cache_dir=.*file.*leave it empty"),
            programs.compilation_cache(str(tmp_path / "file")),
        ):
            pass
    finally:
        programs._set_cache(before)
