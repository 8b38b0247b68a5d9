"""When `auto` ends stage 1: the rule against a plain reading of it, and that only the metrics decide."""

import json

import numpy as np
import pytest

from slm_assist.assist.auto import Auto
from slm_assist.errors import UserError

OPTIONS = {"cap": 60, "margin": 0.01, "window": 8, "patience": 3}


def course(seed, steps=70, every=5):
    """Accuracies {step: (student, teacher)} that approach each other, and validations {step: nats}."""
    rng = np.random.default_rng(seed)
    end = rng.uniform(20, 120)
    student = 0.5 * np.minimum(1, np.arange(steps + 1) / end) + 0.03 * rng.standard_normal(steps + 1)
    teacher = 0.5 + 0.03 * rng.standard_normal(steps + 1)
    nats = {n: float(4 - 0.02 * n + rng.uniform(0, 0.4)) for n in range(every, steps + 1, every)}
    return {n: (float(student[n]), float(teacher[n])) for n in range(1, steps + 1)}, nats


def expected(accuracies, nats, cap, margin, window, patience):
    """The step of the decision and the word for its reason; weights of the mean written out."""
    for n in range(cap + 1):
        for last in range(1, n - 1):  # metrics up to step n - 2; the first that suffice give the reason
            ages = np.arange(last)[::-1]
            weights = (1 - 1 / window) ** ages
            student, teacher = (
                np.average([accuracies[step][i] for step in range(1, last + 1)], weights=weights) for i in (0, 1)
            )
            if last >= window and student >= teacher - margin:
                return n, "accuracy"
            values = [nats[step] for step in sorted(nats) if step <= last]
            if patience and values and len(values) - 1 - int(np.argmin(values)) >= patience:
                return n, "cross-entropy"
    return cap, "cap"


def run(auto, accuracies, nats, *, start=0, stop_at=None, eager=None):
    """As the loop: validation n, then the decision at n, then the update to n + 1, whose metrics come one step late.

    `eager(n)` says where everything is read at once, as before a save. Returns the decision, or the rule's state
    at `stop_at` as a checkpoint there would have it.
    """
    read = start
    for n in range(start, 1000):
        if n in nats and n > start:
            auto.observe_validation(n, nats[n])
        known = n if (n == stop_at or (eager and eager(n))) else n - 1
        for step in range(read + 1, known + 1):
            auto.observe(step, *accuracies[step])
        read = max(read, known)
        if n == stop_at:
            return json.loads(json.dumps(auto.state(), allow_nan=False))
        if decision := auto.decide(n):
            return decision
    raise AssertionError("no decision")


@pytest.mark.parametrize("seed", range(12))
def test_decides_by_the_rule(seed):
    options = OPTIONS | {"patience": seed % 4}
    step, word = expected(*course(seed), **options)
    decision = run(Auto(**options), *course(seed))
    assert decision.step == step and word in decision.reason


def test_every_reason_occurs():
    reasons = {expected(*course(seed), **(OPTIONS | {"patience": seed % 4}))[1] for seed in range(12)}
    assert reasons == {"accuracy", "cross-entropy", "cap"}


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("margin", [0.01, -1.0])  # with -1 validations decide, or the cap
def test_killed_and_resumed_decides_alike(seed, margin):
    """Whatever was read early, saved, killed and read again."""
    rng, options = np.random.default_rng(seed), OPTIONS | {"margin": margin}
    straight = run(Auto(**options), *course(seed))
    for _ in range(15):
        early = set(rng.integers(0, 70, rng.integers(0, 30)).tolist())
        at, state = 0, None
        while True:
            stop = at + int(rng.integers(1, 25))
            if stop >= straight.step:
                break
            auto = Auto.restore(options, state)
            state = run(auto, *course(seed), start=at, stop_at=stop, eager=early.__contains__)
            at = stop
        auto = Auto.restore(options, state)
        assert run(auto, *course(seed), start=at, eager=early.__contains__) == straight


def test_only_metrics_two_steps_old_count():
    auto = Auto(cap=10, margin=0.0, window=1, patience=0)
    for step in range(1, 9):
        auto.observe(step, 0.1 if step < 4 else 0.9, 0.5)
    assert [auto.decide(n) for n in range(6)] == [None] * 6
    assert auto.decide(6).step == 6 and "at step 4" in auto.decide(6).reason
    with pytest.raises(ValueError, match="step 4"):
        auto.observe(4, 0.1, 0.5)


def test_a_reason_once_there_stays():
    """Asked seldom, it names the first step that sufficed; the cap does not take its place."""
    auto = Auto(cap=10, margin=0.0, window=1, patience=0)
    for step, accuracy in enumerate((0.1, 0.6, 0.7, 0.1), start=1):
        auto.observe(step, accuracy, 0.5)
    assert "at step 2" in auto.decide(12).reason


def test_no_decision_before_the_window_is_full():
    auto = Auto(cap=100, margin=0.01, window=20, patience=0)
    for step in range(1, 50):
        auto.observe(step, 0.5, 0.5)
    assert min(n for n in range(50) if auto.decide(n)) == 22


def test_a_gap_above_the_margin_never_suffices():
    auto = Auto(cap=300, margin=0.015, window=20, patience=0)
    for step in range(1, 200):
        auto.observe(step, 0.48, 0.5)
    assert not any(auto.decide(n) for n in range(200))


def test_validations():
    def end(values, patience=2):
        auto = Auto(cap=100, patience=patience)
        for i, value in enumerate(values, start=1):
            auto.observe_validation(10 * i, value)
        return next((n for n in range(100) if auto.decide(n)), None)

    assert end([3.0, 2.0, 2.5, 1.5, 1.6, 1.5, 1.7]) == 62  # equal is not better
    assert end([3.0, 2.0, 2.5, 1.5, 1.6, 1.4, 1.5]) is None
    assert end([3.0, float("nan"), float("inf")]) == 32
    assert end([float("nan"), float("nan")]) == 22
    assert end([3.0, 4.0, 5.0, 6.0], patience=0) is None


def test_state_is_json():
    auto = Auto(**OPTIONS)
    auto.observe(1, 1 / 3, 2 / 3)
    auto.observe_validation(1, float("nan"))
    auto.decide(2)
    auto.observe(2, 0.1, 0.2)
    state = auto.state()
    text = json.dumps(state, allow_nan=False)
    auto.observe_validation(2, 3.0)
    assert json.dumps(state) == text  # a checkpoint may be written later
    assert json.dumps(Auto.restore(OPTIONS, json.loads(text)).state()) == text
    assert Auto.restore(OPTIONS, None).state() == Auto(**OPTIONS).state()


@pytest.mark.parametrize("key, value", [("window", 0), ("patience", -1), ("cap", -1), ("margin", float("nan"))])
def test_mistakes_are_named(key, value):
    with pytest.raises(UserError, match=f"assist.{'steps' if key == 'cap' else key}="):
        Auto(**(OPTIONS | {key: value}))
    with pytest.raises(ValueError, match="finite"):
        Auto(**OPTIONS).observe(1, float("nan"), 0.5)
