"""Tabular and neural students, the figures, the script that runs them all, and the notebook."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from slm_assist.errors import UserError
from slm_assist.theory import figures, figures_tabular, neural, pictures, risk, sources, tabular, teachers

ROOT = Path(__file__).parent.parent


def problem(chi2=0.02):
    d = sources.random_law(2, 3, sharpness=0.7, floor=0.1, seed=1)
    source = sources.Source(d, np.zeros((2, 3), int), np.array([1.0, 0.0]), 1, np.zeros(2, int))
    q = teachers.towards(source, sources.random_law(2, 3, floor=0.1, seed=2), chi2, "chi_square")
    return d, q, np.array([0.4, 0.6])


def expected_risk(d, q, n, w, measure):
    """E of a student's risk in one context, over every count of n tokens; independent of `tabular`. w may be [W]."""
    total, w = 0.0, np.asarray(w)[..., None]
    for a in range(n + 1):
        for b in range(n + 1 - a):
            counts = np.array([a, b, n - a - b])
            ways = math.factorial(n) / np.prod([float(math.factorial(c)) for c in counts])
            p = (1 - w) * counts / n + w * q
            loss = ((p - d) ** 2 / d).sum(-1) / 2 if measure == "chi_square" else (d * np.log(d / p)).sum(-1)
            total += ways * np.prod(d**counts) * loss
    return total


@pytest.mark.parametrize("w", [0.0, 0.3, 1.0])
def test_the_closed_form_is_the_expected_chi_square_risk(w):
    d, q, _ = problem()
    for n in (1, 7, 20):
        chi2 = float(risk.chi_square(q[0], d[0]))
        assert tabular.predicted_risk(n, 3, chi2, w) == pytest.approx(expected_risk(d[0], q[0], n, w, "chi_square"))


def test_the_best_weight_of_the_expected_risks():
    d, q, _ = problem()
    chi2, grid, n = float(risk.chi_square(q[0], d[0])), np.linspace(0.01, 1, 100), 40
    risks = {m: expected_risk(d[0], q[0], n, grid, m) for m in tabular.MEASURES}
    assert tabular.best_weight(n, 3, chi2) == pytest.approx(grid[np.argmin(risks["chi_square"])], abs=0.01)
    refined = tabular.refined_best_weight(d, q, n, np.array([1.0, 0.0]))
    assert refined == pytest.approx(grid[np.argmin(risks["kl"])], abs=0.01)
    at = int(np.argmin(risks["kl"]))
    assert tabular.refined_risk(d, q, n, grid[at])[0] == pytest.approx(risks["kl"][at], rel=0.02)


def test_limits_of_the_closed_forms():
    d, q, share = problem()
    assert tabular.best_weight(5, 4, 0.0) == 1.0  # a perfect teacher
    assert tabular.best_weight(1e9, 4, 0.1) * 1e9 == pytest.approx(3 / 0.1, rel=1e-6)
    assert tabular.predicted_risk(10, 4, 0.1, 0.0) == 0.15
    assert tabular.crossover(4, 0.0, 0.5) == math.inf
    n = tabular.crossover(4, 0.1, 0.5)
    assert tabular.predicted_risk(n, 4, 0.1, 0.0) == pytest.approx(tabular.predicted_risk(n, 4, 0.1, 0.5))
    np.testing.assert_allclose(tabular.floor(d, q, 0.0), 0, atol=1e-15)
    np.testing.assert_allclose(tabular.floor(d, q, 1.0), (d * np.log(d / q)).sum(axis=1))
    np.testing.assert_allclose(tabular.floor(d, d, 0.7), 0, atol=1e-15)
    near = (1 - 1e-3) * d + 1e-3 * q
    assert tabular.floor(d, near, 1.0) @ share == pytest.approx(risk.chi_square(near, d) @ share / 2, rel=1e-2)


def test_what_is_measured_is_what_is_expected():
    d, q, share = problem()
    e = tabular.draws(d, 12, 20_000, np.random.default_rng(0))
    np.testing.assert_allclose(e.sum(axis=-1), 1)
    for measure, w in (("chi_square", 0.0), ("chi_square", 0.6), ("kl", 0.6)):
        expected = sum(s * expected_risk(d[c], q[c], 12, w, measure) for c, s in enumerate(share))
        assert tabular.measured_risk(d, q, e, w, share, measure).mean() == pytest.approx(expected, rel=0.03)
    assert np.isinf(tabular.measured_risk(d, q, e, 0.0, share)).any()  # n min d is small: some counts are 0
    only = tabular.measured_risk(d, q, e, 0.0, np.array([0.0, 1.0]), "chi_square")
    np.testing.assert_allclose(only, risk.chi_square(e[:, 1], d[1]) / 2)


@pytest.mark.parametrize("measure", tabular.MEASURES)
def test_the_measured_best_weight_is_the_least_of_a_grid(measure):
    d, q, share = problem()
    e = tabular.draws(d, 30, 200, np.random.default_rng(0))
    best = tabular.measured_best_weight(d, q, e, share, measure)
    grid = np.linspace(0.005, 1, 200)
    means = [tabular.measured_risk(d, q, e, w, share, measure).mean() for w in grid]
    assert best == pytest.approx(grid[int(np.argmin(means))], abs=0.005)
    assert tabular.measured_best_weight(d, d, e, share, measure) == pytest.approx(1.0, abs=1e-6)


def test_the_crossover_is_found_and_not_found():
    d, q, share = problem()
    chi2 = float(risk.chi_square(q, d) @ share)
    at = tabular.crossover(3, chi2, 0.5)
    found, interval = tabular.measured_crossover(d, q, share, 0.5, at, 3000, 0, "chi_square")
    assert interval[0] <= at <= interval[1] and interval[1] - interval[0] < 0.2 * at
    assert found == pytest.approx(at, rel=0.1)
    with pytest.raises(UserError, match="crossover: none between"):
        tabular.measured_crossover(d, q, share, 0.5, 20 * at, 500, 0, "chi_square")
    with pytest.raises(UserError, match="its KL is infinite"):
        tabular.measured_crossover(d, q, share, 0.5, 5, 500, 0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: tabular.best_weight(0, 3, 0.1), "n=0"),
        (lambda: tabular.crossover(3, 0.1, 0.0), "weight=0 is BASELINE"),
        (lambda: tabular.predicted_risk(5, 3, 0.1, -0.1), "weight=-0.1"),
        (lambda: tabular.measured_risk(*problem()[:2], np.ones((1, 2, 3)) / 3, 0.1, np.ones(2), "tv"), "measure='tv'"),
        (lambda: pictures.picture(figures.Figure("biaz", "", "", (), {}, "")), "figure='biaz'.*did you mean bias"),
    ],
)
def test_what_is_wrong_is_named(call, message):
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


# The network.


def test_a_network_learns_the_mixture_of_data_and_teacher():
    source = sources.easy_and_hard(4, length=8, easy=1.5, floor=0.05, seed=1)
    teacher = teachers.towards(source, sources.random_law(4, 4, floor=0.05, seed=5), 0.1)
    steps = 200
    weights = {"plain": np.zeros(steps), "teacher": np.ones(steps), "early": (np.arange(steps) < 100) * 1.0}
    found = neural.train(source, teacher, weights, seeds=[0, 1], rows=16, width=8, learning_rate=0.03, evaluations=4)
    assert found["plain"].step_E.tolist() == [50, 100, 150, 200]
    level = float(risk.mean_over(source, tabular.floor(source.law_CxV, teacher, 1.0)))
    last = {name: risk.mean_over(source, run.excess_SxExC)[:, -1] for name, run in found.items()}
    assert (last["plain"] < level / 3).all() and (last["early"] < level / 2).all()
    np.testing.assert_allclose(last["teacher"], level, rtol=0.25)
    np.testing.assert_array_equal(found["early"].excess_SxExC[:, :2], found["teacher"].excess_SxExC[:, :2])
    assert (found["plain"].excess_SxExC[0] != found["plain"].excess_SxExC[1]).any()
    with pytest.raises(UserError, match="one length, a multiple of 3"):
        neural.train(source, teacher, weights, seeds=[0], evaluations=3)


# The figures.


def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments" / "evidence"))
    import theory

    return theory


def check_section(page: str, results: dict, directory: Path) -> None:
    """The page has every check, the directory every picture."""
    checks = [check for figure in results["figures"] for check in figure["checks"]]
    assert len(re.findall(r"^\| .* \| (?:yes|\*\*no\*\*) \|$", page, re.M)) == len(checks)
    for words, bound in (("bounds", True), ("agree", False)):
        kind = [check for check in checks if check["rule"].startswith("at ") == bound]
        count = f"{sum(check['agrees'] for check in kind)} of {len(kind)} {words}"
        assert count in page, count
    for check in checks:
        assert math.isfinite(check["predicted"]) and math.isfinite(check["measured"]), check
    for figure in results["figures"]:
        data = (directory / f"theory-{figure['name']}.png").read_bytes()
        assert data[:4] == b"\x89PNG" and len(data) < 100_000
        assert figure["checks"] and figure["predicts"] and figure["drawn"]
        assert figure["agrees"] == all(check["agrees"] for check in figure["checks"])


def test_figures_of_the_theorems(monkeypatch, tmp_path):
    """No draw makes a theorem disagree; the second-order forms do not agree far from the data, and it is said."""
    theory = script(monkeypatch)
    found = [figures.bias(), figures.coverage(repetitions=80, rows=(16, 64), seed=5),
             figures_tabular.floor(repetitions=20, seed=5)]  # fmt: skip
    for figure in found:
        (tmp_path / f"theory-{figure.name}.png").write_bytes(pictures.picture(figure))
    figure_dicts = [json.loads(json.dumps(theory._finite(figure), allow_nan=False)) for figure in found]
    results = {"command": "c", "commit": "", "seconds": 1.0, "cores": 1, "versions": {}, "seed": 5}
    results["figures"] = figure_dicts
    page = theory.markdown(results)
    check_section(page, results, tmp_path)
    assert [figure.agrees for figure in found] == [True, True, False]
    assert "remainder" in page and "**no**" in page.partition("### Soft labels to the end")[2]


def test_every_figure_has_numbers_and_a_picture(monkeypatch, tmp_path, capsys):
    theory = script(monkeypatch)
    assert theory.main(["--out", str(tmp_path), "--repetitions", "80", "--seed", "3"]) == 0
    results = json.loads((tmp_path / "theory.json").read_text())
    names = [figure["name"] for figure in results["figures"]]
    assert len(names) == len(set(names)) == 10
    page = capsys.readouterr().out
    assert page == theory.markdown(results) + "\n"
    check_section(page, results, tmp_path)
    assert "--out" in results["command"] and results["seed"] == 3


def test_a_seed_decides_the_numbers():
    first, again, other = (figures.variance(repetitions=20, seed=seed) for seed in (1, 1, 2))
    assert first.checks == again.checks and first.checks != other.checks


def test_the_scripts_mistakes_are_one_line(monkeypatch, tmp_path, capsys):
    theory = script(monkeypatch)
    assert theory.main(["--out", str(tmp_path / "new"), "--repetitions", "5"]) == 2
    assert re.fullmatch(r"theory: error: --repetitions=5 .*at least 80.*\n", capsys.readouterr().err)
    assert not (tmp_path / "new").exists()


def test_numbers_are_written_for_reading(monkeypatch):
    number = script(monkeypatch).number
    assert [number(x) for x in (None, 0.0, 0.123456, 12345.6, 1e-12)] == [
        "infinite",
        "0",
        "0.1235",
        "12,346",
        "1.00e-12",
    ]


STUB = """
import sys, types
ipython = types.ModuleType("IPython")
ipython.version_info = (9, 0)
ipython.display = types.ModuleType("IPython.display")
sys.modules["IPython"], sys.modules["IPython.display"] = ipython, ipython.display
ipython.display.Image = lambda data: data
ipython.display.display = lambda data: print("picture of", len(data), data[1:4])
"""


def test_the_notebook_runs(tmp_path):
    cells = json.loads((ROOT / "colabs" / "theory.ipynb").read_text(encoding="utf-8"))["cells"]
    cells = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    program = "\n".join("".join(cell["source"]) for cell in cells)
    for name, value in {"REPETITIONS": 20, "UPDATES": 60}.items():
        program, found = re.subn(rf"(?m)^{name} = \d+", f"{name} = {value}", program)
        assert found == 1, name
    (tmp_path / "notebook.py").write_text(STUB + program, encoding="utf-8")
    done = subprocess.run([sys.executable, "notebook.py"], cwd=tmp_path, timeout=300, text=True, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("b'PNG'") == 10 and done.stdout.count("agrees ") > 40
