"""Predicted and measured, figure by figure: what soft labels are worth to a student, by number of tokens and bucket."""

import numpy as np

from slm_assist.theory import checks, risk, sources, students, tabular, teachers
from slm_assist.theory.checks import Check
from slm_assist.theory.figures import Figure, timed
from slm_assist.theory.sources import Source

WEIGHT = 0.667  # the paper's


def problem(easy: float, hard: float) -> tuple[Source, np.ndarray]:
    """8 symbols after easy and hard contexts, and a teacher with the given chi2(q || d) in either."""
    source = sources.easy_and_hard(8, length=16, easy=2.5, floor=0.02, seed=1)
    other = sources.random_law(8, 8, sharpness=1.5, floor=0.02, seed=5)
    return source, teachers.towards(source, other, {"easy": easy, "hard": hard}, "chi_square")


def share(source: Source, bucket: str) -> np.ndarray:
    """Of each context among the tokens of one bucket, [C]."""
    inside = source.occupation_C * (source.bucket_C == source.buckets.index(bucket))
    return inside / inside.sum()


@timed
def best_weight(*, repetitions: int = 6000, seed: int = 0) -> Figure:
    """w* against the w that is best, measured over n, for the chi-square risk and for KL."""
    source, teacher = problem(easy=0.01, hard=0.1)
    sizes = [int(4**k) for k in range(1, 9)]
    data = {}
    for i, bucket in enumerate(source.buckets):
        of = share(source, bucket)
        data[bucket] = tabular.best_weights(source.law_CxV, teacher, of, sizes, repetitions, seed + i)
    points = [point for lines in data.values() for point in lines]
    large = [p for p in points if p["n_min_d"] >= 10]
    small = [p for p in points if p["n_min_d"] < 10]
    lines = (
        _share_inside("chi-square risk, w*", points, "chi_square", "predicted"),
        _share_inside("KL risk, w*, n min d >= 10", large, "kl", "predicted"),
        _apart("KL risk, w*, n min d >= 10", large, "predicted"),
        _apart("KL risk, w*, n min d < 10", small, "predicted"),
        _share_inside("KL risk, corrected, n min d >= 10", large, "kl", "refined"),
        _apart("KL risk, corrected, every n", points, "refined"),
        checks.at_most("KL at w* above the least KL, largest share, every n", 0.05,
                       max(p["kl_at_predicted"] / p["kl_at_best"] - 1 for p in points),
                       note="so w* is good advice where its value is not right"),
    )  # fmt: skip
    return Figure("best-weight", "The best weight of soft labels",
                  "w* = [(V-1)/n] / [(V-1)/n + chi2(q||d)], exact for the chi-square risk, for KL where n min d >> 1",
                  lines, data, f"{repetitions} draws of n tokens of each of 8 contexts, seeds from {seed}",
                  _constants(source, teacher))  # fmt: skip


def _constants(source: Source, teacher_CxV: np.ndarray) -> str:
    """What stands in the place of V - 1 for KL, by bucket."""
    ratio = (teacher_CxV / source.law_CxV).sum(axis=1) - 1
    found = " and ".join(f"{risk.mean_over(source, ratio, bucket):.2f} in {bucket}" for bucket in source.buckets)
    return (
        "For KL the closed form is a little low even as n grows: to leading order the best w is "
        f"(sum_v q_v/d_v - 1) / (n chi2), and that sum less 1 is not V - 1 = {source.vocab - 1} but {found} contexts. "
        "The corrected formula is an expansion about the student's mean, m = (1 - w) d + w q: KL(d || m) + (1-w)^2 / "
        "(2n) sum_v d_v^2 (1 - d_v) / m_v^2, least at its best w."
    )


def _share_inside(what: str, points: list[dict], measure: str, prediction: str) -> Check:
    """Of intervals of 95 %, 95 % should contain the truth."""
    inside = [p[measure]["interval"][0] <= p[prediction] <= p[measure]["interval"][1] for p in points]
    found, interval = checks.share_interval(sum(inside), len(inside))
    return checks.contains(f"{what}: share of the 95 % intervals that contain it", 0.95, found, interval,
                           note=f"{len(inside)} intervals")  # fmt: skip


def _apart(what: str, points: list[dict], prediction: str) -> Check:
    """The ratio that is furthest from 1, of those measured to 5 %."""
    sharp = [p for p in points if p["kl"]["interval"][1] - p["kl"]["interval"][0] < 0.1 * p["kl"]["best"]]
    point = max(sharp, key=lambda p: abs(np.log(p["kl"]["best"] / p[prediction])))
    ratio, interval = point["kl"]["best"] / point[prediction], [x / point[prediction] for x in point["kl"]["interval"]]
    return checks.near(f"{what}: best w / predicted, the furthest of {len(sharp)}", 1.0, ratio, interval,
                       tolerance=0.05, note=f"n = {point['n']}, n min d = {point['n_min_d']:.2g}")  # fmt: skip


@timed
def floor(*, repetitions: int = 400, seed: int = 0) -> Figure:
    """Students trained on soft labels for ever, against those with w = 0 and with w = w*."""
    source, teacher = problem(easy=0.01, hard=0.1)
    d, sizes, weights = source.law_CxV, [int(n) for n in 10 ** np.arange(2, 6.5, 0.5)], (0.0, 0.25, WEIGHT, 1.0)
    lines, data = [], {"sizes": sizes}
    for i, bucket in enumerate(source.buckets):
        of = share(source, bucket)
        chi2 = float(risk.chi_square(teacher, d) @ of)
        curves = tabular.risk_curves(d, teacher, of, sizes, weights, repetitions, seed + i)
        data[bucket] = {str(w): [mean for mean, _ in curves[w]] for w in weights}
        data[bucket]["w*"] = _at_best_weight(d, teacher, of, sizes, repetitions, seed + 10 + i)
        data[bucket]["floors"] = {str(w): float(tabular.floor(d, teacher, w) @ of) for w in weights[1:]}
        for w in weights[1:]:
            mean, interval = curves[w][-1]
            expected = float(tabular.refined_risk(d, teacher, sizes[-1], w) @ of)
            if w < 1:
                lines.append(checks.contains(f"{bucket}, w = {w:g}: KL at n = {sizes[-1]:,}, floor KL(d || (1-w)d+wq) "
                                             "and what is left of the noise", expected, mean, interval))  # fmt: skip
            lines.append(checks.near(f"{bucket}, w = {w:g}: (w^2 / 2) chi2, to second order", w * w / 2 * chi2, mean,
                                     interval, tolerance=0.1))  # fmt: skip
    lines.append(_second_order_limit())
    return Figure("floor", "Soft labels to the end", "KL falls to KL(d || (1 - w) d + w q), about (w^2 / 2) "
                  "chi2(q || d), and no further; with w = w* it has no floor", tuple(lines), data,
                  f"{repetitions} draws of n tokens of each context, seeds from {seed}", _largest_step(source, teacher)
                  )  # fmt: skip


def _largest_step(source: Source, teacher_CxV: np.ndarray) -> str:
    step = float(np.abs(teacher_CxV / source.law_CxV - 1).max())
    return (f"The forms with chi2 need |q - d| / d to be small; here it is up to {step:.1f}, and chi2 / 2 is too high. "
            "KL(d || (1 - w) d + w q), and the corrected formula, do not need it.")  # fmt: skip


def _second_order_limit() -> Check:
    """chi2 / 2 is what the floor tends to as the teacher comes close: exact, with a chi2 of 1e-5."""
    source, near = problem(easy=1e-5, hard=1e-5)
    exact = float(risk.mean_over(source, tabular.floor(source.law_CxV, near, WEIGHT)))
    return checks.near("a teacher with chi2 = 1e-5, exact: floor / ((w^2 / 2) chi2)", 1.0,
                       exact / (WEIGHT**2 / 2 * 1e-5), tolerance=0.02)  # fmt: skip


def _at_best_weight(d, q, of, sizes, repetitions: int, seed: int) -> list[float]:
    chi2, rng, out = float(risk.chi_square(q, d) @ of), np.random.default_rng(seed), []
    for n in sizes:
        w = tabular.best_weight(n, d.shape[-1], chi2)
        out.append(float(tabular.measured_risk(d, q, tabular.draws(d, n, repetitions, rng), w, of).mean()))
    return out


@timed
def crossover(*, repetitions: int = 2000, seed: int = 0) -> Figure:
    """The n beyond which BASELINE is ahead of a fixed w, in easy and in hard contexts."""
    source, teacher = problem(easy=0.001, hard=0.01)
    d, lines, found = source.law_CxV, [], {}
    for i, bucket in enumerate(source.buckets):
        of = share(source, bucket)
        chi2 = float(risk.chi_square(teacher, d) @ of)
        for j, w in enumerate((0.2, WEIGHT)):
            formula = tabular.crossover(8, chi2, w)
            for measure, words in (("chi_square", "chi-square risk"), ("kl", "KL")):
                mean, interval = tabular.measured_crossover(d, teacher, of, w, formula, repetitions, seed + 10 * i + j,
                                                            measure)  # fmt: skip
                name = f"{bucket}, w = {w:g}: n at which BASELINE overtakes, {words}"
                if measure == "chi_square":
                    lines.append(checks.contains(name, formula, mean, interval))
                else:
                    lines.append(checks.near(name, formula, mean, interval, tolerance=0.1))
                    better = refined_crossover(d, teacher, of, w)
                    lines.append(checks.near(f"{name}, corrected", better, mean, interval, tolerance=0.02))
                found[bucket, w, measure] = mean, interval
    ratio = found["easy", WEIGHT, "kl"][0] / found["hard", WEIGHT, "kl"][0]
    lines.append(checks.near("easy / hard, KL: the ratio of chi2", 10.0, ratio, tolerance=0.1))
    data = {"|".join(map(str, key)): value for key, value in found.items()}
    data["chi2"] = {b: float(risk.chi_square(teacher, d) @ share(source, b)) for b in source.buckets}
    data["predicted"] = {b: tabular.crossover(8, chi2, WEIGHT) for b, chi2 in data["chi2"].items()}
    data["measured"] = {b: found[b, WEIGHT, "kl"][0] for b in source.buckets}
    data |= _crossing_curves(d, teacher, source, repetitions // 4, seed + 50)
    return Figure("crossover", "Where BASELINE overtakes, by bucket", "at n = (V-1)(2-w) / (w chi2): soft labels help "
                  "for longer where the teacher is close to the data", tuple(lines), data,
                  f"{repetitions} draws of n tokens of each context, seeds from {seed}",
                  _largest_step(source, teacher))  # fmt: skip


def refined_crossover(d_CxV: np.ndarray, q_CxV: np.ndarray, share_C: np.ndarray, weight: float) -> float:
    """n at which formula (**) of `tabular` is the same for w = 0 and for `weight`: both are a + b / n."""
    a = [tabular.floor(d_CxV, q_CxV, w) @ share_C for w in (0.0, weight)]
    b = [tabular.refined_risk(d_CxV, q_CxV, 1.0, w) @ share_C - at for w, at in zip((0.0, weight), a, strict=True)]
    return float((b[0] - b[1]) / (a[1] - a[0]))


def _crossing_curves(d, q, source: Source, repetitions: int, seed: int) -> dict:
    sizes = [int(n) for n in np.geomspace(300, 60_000, 12)]
    curves = {b: tabular.risk_curves(d, q, share(source, b), sizes, (0.0, WEIGHT), repetitions, seed)
              for b in source.buckets}  # fmt: skip
    return {"sizes": sizes, "curves": {b: {str(w): [mean for mean, _ in line] for w, line in found.items()}
                                       for b, found in curves.items()}}  # fmt: skip


@timed
def excess(*, repetitions: int = 20, seed: int = 0) -> Figure:
    """The excess KL of a tabular student on rows of the source goes as 1/n: what the bound's root is not about."""
    source, teacher = problem(easy=0.01, hard=0.1)
    contexts, vocab = source.law_CxV.shape
    chi2 = float(risk.mean_over(source, risk.chi_square(teacher, source.law_CxV)))
    rows, kl = [int(2**k) for k in range(8, 15)], {"w = 0": [], "w*": []}
    rng = np.random.default_rng(seed)
    for n in rows:
        counts = np.stack([source.counts(source.sample(n, rng)).sum(axis=0) for _ in range(repetitions)])
        for name, w in (("w = 0", 0.0), ("w*", tabular.best_weight(n * source.length / contexts, vocab, chi2))):
            student = students.tabular(counts, teacher, w)
            kl[name].append(risk.mean_over(source, risk.kl(source.law_CxV, student)))
    tokens = [n * source.length for n in rows]
    late = slice(-4, None)  # where n min d >> 1 in every context
    slopes = {name: checks.mean_interval([checks.slope(tokens[late], [at[r] for at in found[late]])
                                          for r in range(repetitions)]) for name, found in kl.items()}  # fmt: skip
    mean, interval = checks.mean_interval(kl["w = 0"][-1] * tokens[-1])
    limit = contexts * (vocab - 1) / 2
    lines = (
        checks.contains("slope of excess KL in N T, w = 0", -1.0, *slopes["w = 0"]),
        checks.contains("slope of excess KL in N T, w*", -1.0, *slopes["w*"]),
        checks.contains(f"excess KL times N T at {tokens[-1]:,} tokens, w = 0: C (V - 1) / 2", limit, mean, interval),
    )  # fmt: skip
    data = {"tokens": tokens, "limit": [limit / n for n in tokens]} | {
        name: [float(at.mean()) for at in found] for name, found in kl.items()
    }
    return Figure("excess", "The excess risk itself", "a tabular student's excess KL goes as 1 / (N T), faster than "
                  "the 1 / sqrt(N T) of the deviation that the bounds bound", lines, data,
                  f"{repetitions} samples of each size, seed {seed}")  # fmt: skip


@timed
def network(*, steps: int = 2400, seeds: int = 5, seed: int = 0) -> Figure:
    """A small network trained by the package's loss: BASELINE, SALT (w = 0 after a fifth) and RKD (w to the end)."""
    from slm_assist.theory import neural

    source, teacher = problem(easy=0.02, hard=0.2)
    early = WEIGHT * (np.arange(steps) < steps // 5)
    schedules = {"BASELINE": np.zeros(steps), "SALT": early, "RKD": np.full(steps, WEIGHT)}
    trained = neural.train(source, teacher, schedules, seeds=range(seed, seed + seeds), rows=4, width=16,
                           learning_rate=3e-3, evaluations=60)  # fmt: skip
    lines, data, crossing = [], {"steps": trained["RKD"].step_E.tolist(), "switch": steps // 5}, {}
    for bucket in source.buckets:
        kl = {name: risk.mean_over(source, run.excess_SxExC, bucket) for name, run in trained.items()}
        level = float(risk.mean_over(source, tabular.floor(source.law_CxV, teacher, WEIGHT), bucket))
        mean, interval = checks.mean_interval(kl["RKD"][:, -1])
        lines.append(checks.near(f"{bucket}: RKD's last KL: floor + (1 - w)^2 BASELINE's",
                                 level + (1 - WEIGHT) ** 2 * kl["BASELINE"][:, -1].mean(), mean, interval,
                                 tolerance=0.1))  # fmt: skip
        mean, interval = checks.mean_interval(kl["SALT"][:, -1])
        lines.append(checks.at_most(f"{bucket}: SALT's last KL, below that floor", level, mean, interval))
        behind = kl["BASELINE"].mean(axis=0) > kl["RKD"].mean(axis=0)
        crossing[bucket] = data["steps"][np.flatnonzero(behind).max() if behind.any() else 0]
        data[bucket] = {name: values.mean(axis=0).tolist() for name, values in kl.items()} | {"floor": level}
    lines.append(checks.at_least("the last evaluation at which BASELINE is behind RKD: easy / hard", 1.0,
                                 crossing["easy"] / crossing["hard"],
                                 note=f"{crossing['easy']} and {crossing['hard']} of {steps} updates"))  # fmt: skip
    return Figure("network", "A small network", "RKD ends at the floor KL(d || (1 - w) d + w q), SALT below it, and "
                  "BASELINE overtakes in hard contexts first", tuple(lines), data,
                  f"{steps} updates of 64 tokens, seeds {seed} to {seed + seeds - 1}",
                  "In hard contexts this teacher is passed long before a fifth of the run: there soft labels only "
                  "delay, and SALT catches up later. Its stage is right for the easy contexts.")  # fmt: skip
