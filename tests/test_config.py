"""Keys, types, who set what, and contradictions."""

from pathlib import Path

import pytest

from slm_assist import config as config_lib
from slm_assist import config_rules
from slm_assist.errors import UserError


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"assit.weight": "1"}, "unknown config key 'assit.weight' .did you mean assist.weight"),
        ({"weight": "1"}, "did you mean assist.weight"),
        ({"steps": "many"}, "steps='many': the value must be int"),
        ({"steps": "1.5"}, "must be int"),
        ({"steps": True}, "must be int"),
        ({"log.progress": "maybe"}, "must be bool"),
        ({"checkpoint.keep": "1,x"}, "a list of ints"),
        ({"assist.weight": "1.5"}, "assist.weight=1.5: must lie between 0 and 1"),
        ({"assist.temperature": "0"}, "above 0"),
        ({"assist.schedule": "salt"}, "choose one of auto, constant, linear, none, ratio, step"),
        ({"optimizer.name": "adam"}, "did you mean adamw"),
        ({"assist.teacher": "runs/x"}, "assist.schedule=none: set assist.schedule=step"),
        ({"optimizer.warmup_steps": "1000"}, "leaves nothing of steps=1000"),
        ({"checkpoint.keep": "2000"}, "beyond steps=1000"),
        ({"batch_rows": "15", "microbatches": "2"}, "not divisible by microbatches"),
        ({"steps": "0"}, "steps=0: must be a finite number of at least 1"),
        ({"loss.z_loss": "inf"}, "loss.z_loss=inf"),
        ({"optimizer.peak_learning_rate": "nan"}, "optimizer.peak_learning_rate=nan"),
        ({"validation.rows": "-3"}, "validation.rows=-3"),
        ({"checkpoint.keep": "-3"}, "checkpoint.keep=-3"),
        ({"optimizer.b1": "2"}, "optimizer.b1=2.0: must be below 1"),
        ({"seed": "99999999999"}, "seed=99999999999: must be below"),
        ({"assist.schedule": "step", "assist.teacher": "x", "assist.decay_steps": "2"}, "set assist.schedule=linear"),
        ({"assist.schedule": "linear", "assist.teacher": "x", "assist.decay_steps": "200"}, "longer than stage 1"),
    ],
)
def test_mistakes_name_the_key_and_the_cure(keys, message):
    with pytest.raises(UserError, match=message) as error:
        config_lib.resolve("", keys)
    assert "\n" not in str(error.value)


def test_layers_and_origins(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("OVERRIDES = {'steps': 70, 'assist.weight': 0.5}\n")
    config, origins = config_lib.resolve(str(file), {"steps": "80", "checkpoint.keep": "10,20"})
    assert (config.steps, config.assist.weight, config.checkpoint.keep) == (80, 0.5, (10, 20))
    assert origins["steps"] == "command line" and origins["assist.weight"] == str(file)
    assert origins["seed"] == "default"
    shown = config_lib.describe(config, origins)
    assert all(f"{key} = " in shown for key in config_rules.flatten(config_lib.get_config()))


def test_experiment_files_that_are_not(tmp_path):
    with pytest.raises(UserError, match="no such experiment file"):
        config_lib.resolve(str(tmp_path / "absent.py"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match="dict OVERRIDES"):
        config_lib.resolve(str(tmp_path / "empty.py"))
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(UserError, match="ZeroDivisionError"):
        config_lib.resolve(str(tmp_path / "broken.py"))


def test_every_key_has_its_default_and_a_comment():
    source = Path(config_lib.__file__).read_text(encoding="utf-8")
    lines = {line.split(" = ")[0].strip(): line for line in source.splitlines() if line.startswith("    c.")}
    for key in config_rules.flatten(config_lib.get_config()):
        assert "  # " in lines[f"c.{key}"], key


def test_n_kd():
    def steps(**keys):
        overrides = {"assist.teacher": "x", "steps": 208000} | {k.replace("__", "."): v for k, v in keys.items()}
        return config_rules.assisted_steps(config_lib.resolve("", overrides)[0])

    assert steps(assist__schedule="step") == pytest.approx(36000, abs=20)
    assert steps(assist__schedule="step", assist__steps=36000) == 36000
    assert steps(assist__schedule="constant") == 208000


def test_what_may_change_on_resume():
    old = config_lib.to_dict(config_lib.get_config())
    new = config_lib.to_dict(config_lib.resolve("", {"mesh.data": 2, "log.progress": False, "seed": 1})[0])
    assert config_lib.changed_keys(old, new) == ["seed: 0 -> 1"]
