"""w(step), n_KD and stages."""

import jax
import numpy as np
import pytest

from slm_assist.assist.schedule import assist_schedule
from slm_assist.assist.stages import stage_at, stages
from slm_assist.errors import UserError


def weights(schedule, steps):
    return np.array([float(schedule.weight_at(step)) for step in range(steps)])


def test_none_constant_step():
    np.testing.assert_array_equal(weights(assist_schedule("none"), 4), 0)
    np.testing.assert_allclose(weights(assist_schedule("constant", weight=0.5), 4), 0.5)
    np.testing.assert_allclose(weights(assist_schedule("step", weight=0.5, steps=2), 4), [0.5, 0.5, 0, 0])


def test_linear_goes_to_zero_over_its_last_part():
    schedule = assist_schedule("linear", weight=0.8, steps=6, decay_steps=4)
    np.testing.assert_allclose(weights(schedule, 8), [0.8, 0.8, 0.8, 0.6, 0.4, 0.2, 0, 0], rtol=1e-6)
    assert assist_schedule("linear", weight=0.8, steps=6).decay_steps == 3


def test_ratio_of_soft_to_hard_goes_to_zero():
    schedule = assist_schedule("ratio", weight=0.8, steps=6, decay_steps=4)  # w / (1 - w): 4, 4, 4, 3, 2, 1, 0, 0
    np.testing.assert_allclose(weights(schedule, 8), [0.8, 0.8, 0.8, 3 / 4, 2 / 3, 1 / 2, 0, 0], rtol=1e-6)
    schedule = assist_schedule("ratio", weight=0.3, steps=10)
    assert schedule.decay_steps == 5
    w = weights(schedule, 12)
    np.testing.assert_allclose((w / (1 - w))[5:], np.maximum(0, 3 / 7 * (1 - np.arange(7) / 5)), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(weights(assist_schedule("ratio", weight=0.0, steps=3), 4), 0)


def test_auto_is_undecided_and_constant():
    schedule = assist_schedule("auto", weight=0.6, steps=3)
    assert schedule.stage1_steps is None and schedule.cap == 3
    np.testing.assert_allclose(weights(schedule, 6), 0.6, rtol=1e-6)


class Own:
    def cosine(step):
        return 0.5 * (1 + jax.numpy.cos(step * np.pi / 4))

    def rows(step):
        return jax.numpy.ones(3) * step

    def branches(step):
        return 0.5 if step > 3 else 0.1

    def beyond(step):
        return jax.numpy.float32(step)


def test_a_schedule_of_somebodys_own():
    schedule = assist_schedule(f"{__name__}:Own.cosine", steps=3)
    np.testing.assert_allclose(weights(schedule, 5), [1, 0.5 + 0.5**1.5, 0.5, 0, 0], atol=1e-6)
    assert schedule.stage1_steps == 3
    for name, said in (
        ("Own.rows", "scalar"),
        ("Own.branches", "TracerBool"),
        ("Own.beyond", "from 0 to 1"),
        ("Own.cosin", "cosine"),
    ):
        with pytest.raises(UserError, match=f"assist.schedule=.*{said}"):
            assist_schedule(f"{__name__}:{name}", steps=3)


@pytest.mark.parametrize("kind", ["none", "constant", "step", "linear", "ratio", "auto", f"{__name__}:Own.cosine"])
def test_traces_under_jit(kind):
    schedule = assist_schedule(kind, weight=0.7, steps=3)
    for step in range(5):
        traced = jax.jit(schedule.weight_at)(step)
        assert traced.dtype == np.float32 and float(traced) == float(schedule.weight_at(step))


def test_stages():
    def spans(steps, **first):
        return [(stage.name, stage.start, stage.stop) for stage in stages(steps, **first)]

    assert spans(10, assisted=4) == [("assisted", 0, 4), ("plain", 4, 10)]
    assert spans(10, assisted=10) == [("assisted", 0, 10)]
    assert spans(10, assisted=0) == [("plain", 0, 10)]
    assert spans(10, assisted=4, selecting=4) == [("assisted_selecting", 0, 4), ("plain", 4, 10)]
    assert spans(10, assisted=4, selecting=10) == [("assisted_selecting", 0, 4), ("selecting", 4, 10)]
    assert spans(10, assisted=6, selecting=4) == [
        ("assisted_selecting", 0, 4), ("assisted", 4, 6), ("plain", 6, 10),
    ]  # fmt: skip
    assert [stage_at(stages(10, assisted=4), step).name for step in (0, 3, 4, 9)] == ["assisted"] * 2 + ["plain"] * 2


def test_mistakes():
    with pytest.raises(UserError, match="did you mean step"):
        assist_schedule("stp", steps=1)
    with pytest.raises(ValueError, match="between 0 and 1"):
        assist_schedule("step", weight=1.5, steps=1)
    with pytest.raises(UserError, match="assist.weight=1.0"):
        assist_schedule("ratio", weight=1.0, steps=4)
    with pytest.raises(ValueError, match="decay_steps"):
        assist_schedule("linear", steps=3, decay_steps=4)
