"""The report's tables of gifts: which, from whom, when, and what each cost."""

import json
from pathlib import Path

import pytest
from test_report import BASE, fabricate

from slm_assist import report
from slm_assist.report import tables
from slm_assist.report.gifts import Gift, gifts, update_seconds
from slm_assist.report.runs import read_run

SMALL = {"run": "runs/small", "step": 200, "parameters": 500, "train_flops": 600.0}


def gifted(tmp_path, finished=True):
    """200 updates with soft labels, the first 100 of them with chosen rows and representations, in a grown student."""
    parent = SMALL | {"step": 100, "train_flops": 300.0}
    helpers = {"teacher": SMALL, "guide": SMALL, "parent": parent, "scorer": SMALL}
    config = {"assist": {"schedule": "step"}}
    path = Path(fabricate(tmp_path / "all", BASE, config=config, finished=finished, facts={"helpers": helpers}))
    names = {100: "assisted_aligned_selecting", 200: "assisted", 300: "plain"}
    took = {100: 0.3, 200: 0.2, 300: 0.1}
    lines, seconds = [], 0.0
    for step in range(1, 301):
        stop = next(stop for stop in names if step <= stop)
        seconds += took[stop] * (10 if step % 50 == 0 else 1)  # an update now and then waits for something
        lines.append({"kind": "train", "step": step, "stage": names[stop], "loss": 9.0, "tokens": 400 * step,
                      "flops": 10.0 * step, "seconds": seconds})  # fmt: skip
    old = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    lines += [line for line in old if line["kind"] == "validation"]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        summary = json.loads((path / "summary.json").read_text())
        starts = dict(zip(names, (0, 100, 200), strict=True))
        summary["stages"] = [{"name": name, "start": starts[stop], "stop": stop} for stop, name in names.items()]
        summary["flops"] = {"student": 3000.0, "teacher": 400.0, "scorer": 500.0, "guide": 100.0}
        (path / "summary.json").write_text(json.dumps(summary))
    return str(path)


def test_each_gift_has_its_giver_its_time_and_its_cost(tmp_path):
    found = {gift.name: gift for gift in gifts(read_run(gifted(tmp_path)))}
    assert list(found) == ["labels", "data", "representations", "weights"]
    assert {name: (gift.stop, gift.flops) for name, gift in found.items()} == {
        "labels": (200, 400.0), "data": (100, 500.0), "representations": (100, 100.0), "weights": (0, 0.0),
    }  # fmt: skip
    assert found["data"].share == pytest.approx(500 / 4000)
    assert found["labels"].givers == "small at step 200" and found["weights"].givers == "small at step 100"
    assert (found["labels"].training_flops, found["weights"].training_flops) == (600.0, 300.0)


def test_an_unfinished_run_has_no_totals_yet(tmp_path):
    found = {gift.name: gift for gift in gifts(read_run(gifted(tmp_path, finished=False)))}
    assert found["labels"].stop == 200 and found["labels"].flops is None and found["labels"].share is None


def test_what_a_function_cost_nobody_knows_and_two_steps_of_a_run_are_one_training():
    early, late, function = SMALL | {"step": 20, "train_flops": 60.0}, SMALL, {"run": "my_lab:five", "step": -1}
    assert Gift("data", (early, late), 9, 1.0, 0.1).training_flops == 600.0
    by_function = Gift("labels", (function | {"train_flops": 0.0},), 9, 0.0, 0.0)
    assert by_function.training_flops is None and by_function.givers == "my_lab:five"


def test_updates_by_stage_are_medians(tmp_path):
    seconds = update_seconds(read_run(gifted(tmp_path)))
    assert seconds == pytest.approx({"assisted_aligned_selecting": 0.3, "assisted": 0.2, "plain": 0.1})


def test_the_page_has_both_tables(tmp_path):
    runs = [gifted(tmp_path), fabricate(tmp_path / "baseline"), fabricate(tmp_path / "small", {100: 3.2, 200: 2.6})]
    comparison = report.compare(runs)
    table = tables.gift_table(comparison)
    assert [row[:4] for row in table.rows] == [
        ("all", "labels", "small at step 200", "updates 1 to 200"),
        ("all", "data", "small at step 200", "updates 1 to 100"),
        ("all", "representations", "small at step 200", "updates 1 to 100"),
        ("all", "weights", "small at step 100", "before the first update"),
    ]
    assert [row[4:] for row in table.rows][:2] == [("400", "10.0 %", "600"), ("500", "12.5 %", "600")]
    by_stage = {row[1]: row[2:] for row in tables.update_table(comparison).rows if row[0] == "all"}
    assert by_stage["assisted + aligned + selecting"] == ("0.3", "3.00")
    page = report.write(comparison, tmp_path / "out").read_text(encoding="utf-8")
    assert "The gifts: which, when, and what each cost" in page and "What an update took, by stage" in page
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["methods"]["all"]["gifts"]["representations"]["updates"] == 100
    assert results["methods"]["baseline"]["gifts"] == {}
    (method,) = (m for m in comparison.methods if m.name == "all")
    assert method.kind == "other" and method.helper["flops"].mean == 600, "one small LM, trained once"


def test_no_gifts_no_table(tmp_path):
    comparison = report.compare([fabricate(tmp_path / "baseline")])
    assert tables.gift_table(comparison) is None and tables.update_table(comparison) is None
