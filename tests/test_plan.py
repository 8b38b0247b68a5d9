"""`slm-assist plan`: memory beside XLA's own, time and FLOPs by hand, mistakes, and the paper's experiment files."""

import json

import pytest

from slm_assist import config as config_lib
from slm_assist import plan, plan_memory, plan_table, sharding
from slm_assist.errors import UserError

SMALL = {
    "steps": "100",
    "model.size": "gpu-35m",
    "model.num_layers": "2",
    "data.vocab_size": "2048",
    "data.seq_len": "128",
    "batch_rows": "32",
    "assist.schedule": "step",
    "assist.steps": "25",
    "assist.teacher": "no/such/run",
    "compute.attention": "xla",
}


def planned(devices="v5e:8", **keys):
    overrides = SMALL | {key.replace("__", "."): value for key, value in keys.items()}
    config, _ = config_lib.resolve("", overrides)
    return plan.plan(config, plan.parse_devices(devices), helper_size="laptop-large", compiling=False)


def test_memory_is_near_what_xla_says():
    options = {"compute.dtype": "float32", "loss.block_bytes": str(2**20), "compute.remat": "full"}
    config, _ = config_lib.resolve("", SMALL | options | {"mesh.fsdp": "2", "mesh.tensor": "2"})
    mesh, devices = (
        sharding.make_mesh(*(config.mesh[axis] for axis in sharding.MESH_AXES)),
        plan.Devices("v5e", 8, None),
    )
    helpers = plan.find_helpers(config, devices, mesh, "laptop-large")
    experiment = plan.on_paper(config, devices, mesh, helpers)
    assisted = experiment.plan()[0]
    ours, theirs = (f(experiment, assisted, helpers) for f in (plan_memory.estimated, plan_memory.compiled))
    assert (ours.how, theirs.how) == ("estimated", "compiled") and theirs.flops > 0
    assert ours.total == pytest.approx(theirs.total, rel=0.3)
    arguments = sum(ours.parts[name] for name in ("parameters", "optimizer", "batch", "helpers"))
    assert arguments == pytest.approx(theirs.parts["arguments"], rel=0.001)


def test_time_and_flops_by_hand():
    found = planned()
    stage, plain = found["stages"]["assisted"], found["stages"]["plain"]
    tokens, (width, ff, vocab) = 32 * 128, (512, 1408, 2048)
    layer = 2 * width * (8 * 64 * 2 + 4 * 64 * 2 + 3 * ff) + 4 * 128 * 8 * 64
    assert plain["flops"]["student"] == 3 * tokens * (2 * layer + 2 * width * vocab)
    assert stage["updates"] == 25 and plain["updates"] == 75
    helper = 4 * (2 * 128 * (128 * 4 + 3 * 384) + 4 * 128 * 128) + 2 * 128 * vocab
    assert stage["flops"]["teacher"] == tokens * helper
    state = sum(plain["memory"]["parts"][name] for name in ("parameters", "optimizer"))
    seconds = plain["flops"]["student"] / (8 * 197e12 * 0.5) + 2 * state / 0.819e12
    assert plain["seconds"] == pytest.approx(seconds, rel=1e-3)
    assert found["seconds"] == pytest.approx(25 * stage["seconds"] + 75 * plain["seconds"])
    assert found["added_flops"] == pytest.approx(0.25 * stage["flops"]["teacher"] / plain["flops"]["student"])
    assert max(map(len, plan_table.table(found).splitlines())) <= 130


def test_what_does_not_fit_says_so():
    found = planned("a100-40:8", batch_rows="65536", loss__block_bytes=str(2**39))
    assert not found["stages"]["plain"]["memory"]["fits"] and "DOES NOT FIT" in plan_table.table(found)


@pytest.mark.parametrize(
    ("devices", "keys", "message"),
    [
        ("v5x:8", {}, "'v5x' is not a known kind .did you mean v5p.*known are v4, v5e"),
        ("h100", {}, "give KIND:N with N devices, as h100:8"),
        ("h100:2x4", {}, "give KIND:N"),
        ("v5e:0", {}, "give KIND:N"),
        ("v5e:8", {"mesh__fsdp": "3"}, "mesh data -1 x fsdp 3 x tensor 1: 3 does not divide the 8 devices"),
        ("v5e:8", {"mesh__data": "4"}, "does not fit 8 devices"),
        ("v5p:3", {}, "no v5p slice of 3 chips is known, only of 4, 8, "),
        ("h100:8", {"compute__attention": "splash"}, "compute.attention=splash: h100 has no such kernel"),
        ("v5e:8", {"compute__attention": "cudnn"}, "compute.attention=cudnn: v5e has no such kernel"),
        ("h100:8", {"data__objective": "foo"}, "data.objective='foo'"),
        ("h100:8", {"assist__top_k": "300000"}, "assist.top_k=300000"),
        ("v5e:64", {}, "batch_rows=32 .* use a multiple of 64"),
        ("v5e:8", {"assist__schedule": "none", "assist__teacher": "", "model__size": "big"}, "model.size='big'"),
    ],
)
def test_mistakes(devices, keys, message):
    if keys.get("assist__schedule"):
        keys = keys | {"assist__steps": "0"}
    with pytest.raises(UserError, match=message) as error:
        planned(devices, **keys)
    assert "\n" not in str(error.value)


def test_a_helper_needs_a_size(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(f"OVERRIDES = {SMALL!r}\n")
    with pytest.raises(UserError, match="--teacher_size=paper-1.5b"):
        plan.run(str(file), {}, "v5e:8", compiling=False)
    file.write_text(f"OVERRIDES = {SMALL!r}\nTEACHER_SIZE = 'laptop-small'\n")
    said = []
    plan.run(str(file), {}, "v5p:2x2x2", compiling=False, json_file=str(tmp_path / "plan.json"), say=said.append)
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["devices"] == {"kind": "v5p", "count": 8, "shape": "2x2x2"} and "the small LM adds" in said[-1]
