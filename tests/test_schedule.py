"""w(step), n_KD and stages."""

import jax
import numpy as np
import pytest

from slm_assist.assist.schedule import assist_schedule, stages
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


@pytest.mark.parametrize("kind", ["none", "constant", "step", "linear"])
def test_traces_under_jit(kind):
    schedule = assist_schedule(kind, weight=0.7, steps=3)
    for step in range(5):
        traced = jax.jit(schedule.weight_at)(step)
        assert traced.dtype == np.float32 and float(traced) == float(schedule.weight_at(step))


def test_stages():
    def spans(schedule, steps):
        return [(stage.name, stage.start, stage.stop) for stage in stages(schedule, steps)]

    assert spans(assist_schedule("none"), 9) == [("plain", 0, 9)]
    assert spans(assist_schedule("constant"), 9) == [("assisted", 0, 9)]
    assert spans(assist_schedule("step", steps=4), 9) == [("assisted", 0, 4), ("plain", 4, 9)]
    assert spans(assist_schedule("step", steps=9), 9) == [("assisted", 0, 9)]


def test_mistakes():
    with pytest.raises(UserError, match="did you mean step"):
        assist_schedule("stp", steps=1)
    with pytest.raises(ValueError, match="between 0 and 1"):
        assist_schedule("step", weight=1.5, steps=1)
    with pytest.raises(ValueError, match="decay_steps"):
        assist_schedule("linear", steps=3, decay_steps=4)
