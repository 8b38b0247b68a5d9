"""Predicted and measured, figure by figure: the bounds. `figures_tabular` has those of the students.

Every function returns a `Figure`: its checks (numbers beside numbers) and its data, from which `pictures` draws.
Sources, teachers and classes are exact; `repetitions` and `seed` say what was drawn.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from slm_assist.theory import bounds, checks, risk, simulate, sources, students, tabular, teachers
from slm_assist.theory.checks import Check
from slm_assist.theory.martingale import increments
from slm_assist.theory.simulate import Setting

WEIGHTS = (0.0, 0.3, 0.667, 1.0)


@dataclasses.dataclass(frozen=True)
class Figure:
    """One comparison.

    Attributes:
      name: of its picture, `theory-NAME.png`.
      title: what it is.
      predicts: what the theory says, in words.
      checks: predicted and measured numbers.
      data: what is drawn: numbers, lists and dictionaries of them.
      drawn: what was random: repetitions, seeds.
      note: why, where some check does not agree, or what a reader should not miss.
    """

    name: str
    title: str
    predicts: str
    checks: tuple[Check, ...]
    data: dict[str, Any]
    drawn: str
    note: str = ""
    seconds: float = 0.0

    @property
    def agrees(self) -> bool:
        return all(check.agrees for check in self.checks)

    def to_json(self) -> dict:
        return dataclasses.asdict(self) | {"agrees": self.agrees}


def timed(function: Callable[..., Figure]) -> Callable[..., Figure]:
    """The function, its figure's seconds filled in."""

    def run(**keys) -> Figure:
        began = time.perf_counter()
        return dataclasses.replace(function(**keys), seconds=round(time.perf_counter() - began, 2))

    run.__doc__, run.__name__ = function.__doc__, function.__name__
    return run


def setting(length: int = 16, mixed: bool = False) -> Setting:
    """The bounds' own: 8 symbols, easy and hard contexts, a teacher that is over-confident and a little wrong.

    Args:
      mixed: rows of two kinds, each easy or hard from end to end, instead of contexts of two kinds in one row.
    """
    if mixed:
        kinds = {
            name: sources.markov(sources.random_law(8, 8, sharpness=sharp, floor=0.01, seed=seed), length=length)
            for name, sharp, seed in (("easy", 3.0, 1), ("hard", 0.7, 2))
        }
        source = sources.mixture(kinds, (0.5, 0.5))
    else:
        source = sources.easy_and_hard(8, length=length, seed=1)
    contexts = len(source.law_CxV)
    other = 0.5 * teachers.tempered(source.law_CxV, 0.25) + 0.5 * sources.random_law(contexts, 8, sharpness=1.5, seed=5)
    teacher = teachers.towards(source, other, {"easy": 0.03, "hard": 0.12})
    return Setting(source, teacher, students.finite_class(source, teacher))


@timed
def bias() -> Figure:
    """|R - R^w| against 2 M w TV: nothing is random."""
    s = setting()
    ratios = {w: simulate.bias_ratios(s, w) for w in WEIGHTS if w}
    largest = max(float(r.max()) for r in ratios.values())
    floors = (1e-3, 1e-12)
    worst = [students.floored(_adversary(s), floor)[None] for floor in floors]
    against = [float(simulate.bias_ratios(s._replace(class_KxCxV=tables), 1.0).max()) for tables in worst]
    found = (
        checks.at_most("largest |R - R^w| / (2 M w TV), 64 models, 3 weights", 1.0, largest),
        checks.at_most("the same, half the bound (-log P is never below 0)", 0.5, largest),
        *(checks.at_most(f"the same for the worst model whose probabilities are at least {floor:g}", 0.5, ratio)
          for floor, ratio in zip(floors, against, strict=True)),
    )  # fmt: skip
    source = s.source
    data = {"largest_loss": s.largest_loss, "total_variation": s.total_variation, "gaps": {}, "limits": {}}
    for w in ratios:
        mixed = risk.mixed_risk(source, s.class_KxCxV, s.teacher_CxV, w)
        data["gaps"][str(w)] = np.abs(risk.risk(source, s.class_KxCxV) - mixed).tolist()
        data["limits"][str(w)] = float(bounds.bias(s.largest_loss, w, s.total_variation)["theorem"])
    return Figure("bias", "Bias of soft labels", "|R - R^w| <= 2 M w TV", found, data, "nothing: exact")


def _adversary(s: Setting) -> np.ndarray:
    """The model of largest bias: what the teacher has too often, in proportion, and else as little as it may."""
    over = np.clip(s.teacher_CxV - s.source.law_CxV, 0, None)
    return over / over.sum(axis=1, keepdims=True)


@timed
def variance(*, repetitions: int = 200, seed: int = 0) -> Figure:
    """Var[loss^w] at a fixed context, and of a whole row."""
    s, rng, tokens = setting(), np.random.default_rng(seed), 500
    source, model = s.source, students.floored(s.source.law_CxV, 1e-3)
    weights = np.linspace(0, 1, 11)
    plain = risk.context_variance(source, risk.token_loss(model, s.teacher_CxV, 0.0))
    drawn = rng.multinomial(tokens, source.law_CxV, size=(len(weights), repetitions, len(plain)))
    ratio = np.empty((len(weights), repetitions))
    rows = []
    for i, w in enumerate(weights):
        loss = risk.token_loss(model, s.teacher_CxV, w)
        mean = (drawn[i] * loss).sum(-1, keepdims=True) / tokens
        sample = (drawn[i] * (loss - mean) ** 2).sum(-1) / (tokens - 1)
        ratio[i] = (sample / plain).mean(axis=-1)
        rows.append(float(increments(source, loss).mean_variance_T.sum()))
    found = []
    for i in (2, 5, 8):
        mean, interval = checks.mean_interval(ratio[i])
        found.append(checks.contains(f"variance at a context, w = {weights[i]:g}, share of that at w = 0",
                                     (1 - weights[i]) ** 2, mean, interval))  # fmt: skip
    whole, rows = rows[0], np.array(rows) / rows[0]
    sampled = simulate.increment_samples(s._replace(class_KxCxV=model[None]), 0, 1.0, 100 * repetitions, seed + 1)
    mean, interval = checks.mean_interval(sampled["row_gap"] ** 2 / whole)
    found.append(checks.contains("variance of a row's loss at w = 1, share of that at w = 0", rows[-1], mean, interval,
                                 note="not (1 - w)^2 = 0: what rows' contexts differ in stays"))  # fmt: skip
    data = {
        "row_measured": mean,
        "weights": weights.tolist(),
        "measured": ratio.mean(axis=1).tolist(),
        "row": rows.tolist(),
    }
    return Figure("variance", "Variance of the mixed loss", "at a fixed context Var[loss^w] = (1 - w)^2 Var[-log p]",
                  tuple(found), data, f"{repetitions} times {tokens} tokens of 8 contexts, seed {seed}")  # fmt: skip


@timed
def martingale(*, rows: int = 20_000, weight: float = 0.3, seed: int = 0) -> Figure:
    """Histograms of the increments of a row's mean loss, against their exact law."""
    s = setting()
    found = simulate.increment_samples(s, 2, weight, rows, seed)
    values, exact = found["values"], found["exact"]
    positions = values.shape[1]
    square = values**2
    z_mean = values.mean(axis=0) / (values.std(axis=0, ddof=1) / rows**0.5)
    z_variance = (square.mean(axis=0) - exact.mean_variance_T) / (square.std(axis=0, ddof=1) / rows**0.5)
    limit, row_variance = checks.largest_z(positions), values.sum(axis=1) ** 2
    mean, interval = checks.mean_interval(row_variance)
    gone = checks.at_most("a row's loss minus R^w, less the sum of its increments, the largest", 1e-12,
                          float(np.abs(found["row_gap"] + values.sum(axis=1)).max()))  # fmt: skip
    lines = (
        checks.at_most("mean of the increments: largest |z| of 17 positions", limit, float(np.abs(z_mean).max())),
        checks.at_most("E[xi_t^2] against the exact: largest |z| of 17", limit, float(np.abs(z_variance).max())),
        checks.contains(
            "variance of a row's loss: sum of E[xi_t^2]",
            exact.mean_variance_T.sum(),
            mean,
            interval,
            note=f"the sum of V_t, the worst pasts', is {exact.largest_variance_T.sum():.4f}",
        ),
        checks.at_most("largest |xi_t| seen / C", 1.0, float((np.abs(values).max(axis=0) / exact.largest_T).max())),
        gone,
    )
    shown = {}
    for t in (0, 1, positions // 2, positions - 1):
        x, mass = exact.law(s.source, t)
        counts, edges = np.histogram(values[:, t], bins=40)
        shown[str(t)] = {"counts": counts.tolist(), "edges": edges.tolist(), "sd": float(values[:, t].std()),
                         "exact_counts": (np.histogram(x, edges, weights=mass)[0] * rows).tolist(),
                         "exact_sd": float(exact.mean_variance_T[t] ** 0.5)}  # fmt: skip
    data = {"shown": shown, "mean_variance": exact.mean_variance_T.tolist(), "measured": square.mean(axis=0).tolist(),
            "largest_variance": exact.largest_variance_T.tolist()}  # fmt: skip
    words = "increments have mean 0, are uncorrelated, at most C, with the variance that the law gives"
    return Figure("increments", "Martingale increments of a row's loss", words, lines, data,
                  f"{rows} rows of 16 tokens, w = {weight:g}, seed {seed}")  # fmt: skip


def _held(kind: str, found: Sequence, form: str) -> dict[str, list]:
    """Of each (w, N): in how many repetitions the bound held, the bound, the truth, and the bound's factor over it."""
    out: dict[str, list] = {"held": [], "bound": [], "truth": [], "factor": [], "terms": []}
    for r in found:
        if kind == "excess":
            truth, terms = r.excess, r.excess_bound[form]
            out["held"].append(int((truth <= terms["total"]).sum()))
            ratio = truth / terms["total"]
        else:
            truth, terms, ratio = r.gap, r.class_bound[form], r.class_ratio[form]
            out["held"].append(int((r.class_excess[form] <= 0).sum()))
        out["terms"].append({name: float(np.mean(value)) for name, value in terms.items()})
        out["bound"].append(out["terms"][-1]["total"])
        out["truth"].append(float(np.quantile(truth, 0.95)))
        out["factor"].append(1 / max(float(np.quantile(ratio, 0.95)), 1e-12))
    return out


@timed
def coverage(*, repetitions: int = 200, seed: int = 0, rows: Sequence[int] = (64, 512, 4096)) -> Figure:
    """Both bounds on samples: how often they hold, how far above the truth they are, and of what they are made."""
    s = setting()
    found = simulate.repeat(s, WEIGHTS, rows, repetitions, seed)
    names = {("excess", "covering"): "excess risk, Theorem 6", ("excess", "finite"): "excess risk, Corollary 5",
             ("class", "martingale"): "finite class, martingale",
             ("class", "rows"): "finite class, whole rows"}  # fmt: skip
    lines, lists = [], []
    for (kind, form), words in names.items():
        of = _held(kind, found, form)
        share, interval = checks.share_interval(min(of["held"]), repetitions)
        lines.append(checks.at_least(f"{words}: coverage, the lowest of {len(found)} (w, N)", 1 - s.delta, share,
                                     interval))  # fmt: skip
        lists.append(of | {"kind": kind, "form": form, "words": words, "weight": [r.weight for r in found],
                           "rows": [r.rows for r in found]})  # fmt: skip
    lines += _tightness(lists) + [_without_bias(s, found, max(rows), repetitions)]
    alone, more = _one_member(s, repetitions, seed + 1)
    data = {"bounds": lists, "largest_loss": s.largest_loss, "total_variation": s.total_variation, "delta": s.delta,
            "members": len(s.class_KxCxV), "log_vocab": float(np.log(s.source.vocab)), "alone": alone}  # fmt: skip
    return Figure("coverage", "Both risk bounds", "they hold with probability 1 - delta = 0.95, or more",
                  tuple(lines + more), data,
                  f"{repetitions} samples of up to {max(rows)} rows of 16 tokens, seed {seed}")  # fmt: skip


def _one_member(s: Setting, repetitions: int, seed: int) -> tuple[dict, list[Check]]:
    """The inequalities themselves, at N = 64 and w = 0.3, where they can be seen to fail: a class of one, no bias."""
    deltas, repetitions = (0.5, 0.2, 0.05), 10 * repetitions
    fails = simulate.single(s, 2, 0.3, 64, deltas, repetitions, seed)
    words = {"martingale": "Freedman", "rows": "Bernstein", "empirical": "empirical Bernstein (Theorem 4)"}
    lines = []
    for form, by_delta in fails.items():
        share, interval = checks.share_interval(by_delta[0.5], repetitions)
        lines.append(checks.at_most(f"one model, {words[form]}: share of samples beyond it, delta = 0.5", 0.5, share,
                                    interval, note=f"{by_delta[0.05] / repetitions:.2%} at delta = 0.05"))  # fmt: skip
    data = {words[form]: {str(d): n / repetitions for d, n in by_delta.items()} for form, by_delta in fails.items()}
    return data, lines


def _tightness(lists: Sequence[dict]) -> list[Check]:
    """By what factor each bound could be less and still hold in 95 % of the samples: at w = 0, and with a bias."""
    lines = []
    for item in lists:
        for weight in (0.0, 0.667):
            at = [i for i, w in enumerate(item["weight"]) if w == weight]
            factor, last = [item["factor"][i] for i in at], item["terms"][at[-1]]
            part = max(last.keys() - {"total"}, key=last.get)
            lines.append(checks.at_least(
                f"{item['words']}, w = {weight:g}: bound / 95 % quantile of the truth, least over N", 1.0, min(factor),
                note=f"{max(factor):,.3g} at most; at N = {item['rows'][at[-1]]} {part.replace('_', ' of ')} is "
                f"{last[part] / last['total']:.0%} of it"))  # fmt: skip
    return lines


def _without_bias(s: Setting, found: Sequence, rows: int, repetitions: int) -> Check:
    """A control: is the bias term needed? The law says of each member whether R - R^w is more than the rest."""
    r = next(r for r in found if r.rows == rows and r.weight == 1.0)
    loss = risk.token_loss(s.class_KxCxV, s.teacher_CxV, 1.0)
    terms = bounds.finite_class(increments(s.source, loss), rows=rows, **s.common(1.0))
    beyond = risk.risk(s.source, s.class_KxCxV) - risk.expected(s.source, loss) - (terms["total"] - terms["bias"])
    share, interval = checks.share_interval(int((r.class_unbiased["martingale"] <= 0).sum()), repetitions)
    return checks.at_most(f"control: finite class without its bias term, w = 1, N = {rows}: coverage", 1 - s.delta,
                          share, interval,
                          note=f"by the law some member's R - R^w is above the rest by {beyond.max():.3f}")  # fmt: skip


@timed
def rate(*, repetitions: int = 200, seed: int = 0) -> Figure:
    """sup |R_N - R| against N and T, where influence decays and where it does not; the bound with w at w*."""
    lengths, rows = (4, 8, 16, 32, 64, 128), (16, 64, 256, 1024)
    sizes = {
        "in N, T = 16": [(n, 16, False) for n in rows],
        "in T, N = 64": [(64, t, False) for t in lengths],
        "in T, N = 64, rows of two kinds": [(64, t, True) for t in lengths],
    }
    curves = {name: [(n * t, simulate.deviations(setting(t, mixed), 0.0, n, repetitions, seed + i))
                     for i, (n, t, mixed) in enumerate(points)] for name, points in sizes.items()}  # fmt: skip
    lines, data = [], {}
    for name, points in curves.items():
        x = [tokens for tokens, _ in points]
        slopes = [checks.slope(x, [p["sup"][r] for _, p in points]) for r in range(repetitions)]
        exact = checks.slope(x, [p["exact_sd"] for _, p in points])
        mean, interval = checks.mean_interval(slopes)
        decays, width = "kinds" not in name, checks.slope(x, [p["width"] for _, p in points])
        lines.append(checks.near(f"slope of sup |R_N - R| {name}", -0.5 if decays else exact, mean, interval,
                                 tolerance=0.1, note=f"exact: sqrt(Var(L) / N) {exact:.3f}, "
                                 f"the bound's width {width:.3f}"))  # fmt: skip
        data[name] = {"tokens": x, "sup": [float(p["sup"].mean()) for _, p in points],
                      "sd": [p["exact_sd"] for _, p in points], "width": [p["width"] for _, p in points]}  # fmt: skip
    schedules = _bound_with_decaying_weight()
    tail = slice(-3, None)
    for name, predicted in (("w*", -0.5), ("w = 0.667", 0.0)):
        slope = checks.slope(schedules["tokens"][tail], schedules[name][tail])
        lines.append(Check(f"slope of the whole bound in N T, {name}, last 2 decades, exact", predicted, slope, None,
                           abs(slope - predicted) < 0.05, "within 0.05"))  # fmt: skip
    return Figure("rate", "The rate in N and T", "sup |R_N - R| and the bound go as 1 / sqrt(N T) where influence "
                  "decays and w goes as w*", tuple(lines), data | {"whole bound": schedules},
                  f"{repetitions} samples of each size, seeds from {seed}")  # fmt: skip


def _bound_with_decaying_weight() -> dict[str, list]:
    """The finite class's bound at growing N, T = 16, with w at w* for the tokens of each context, and with w fixed."""
    s = setting()
    contexts, vocab = s.source.law_CxV.shape
    chi2 = float(risk.mean_over(s.source, risk.chi_square(s.teacher_CxV, s.source.law_CxV)))
    out: dict[str, list] = {"tokens": [], "w*": [], "w = 0.667": []}
    for n in 10.0 ** np.arange(2, 9):
        out["tokens"].append(float(16 * n))
        best = tabular.best_weight(16 * n / contexts, vocab, chi2)
        for name, w in (("w*", best), ("w = 0.667", 0.667)):
            steps = increments(s.source, risk.token_loss(s.class_KxCxV, s.teacher_CxV, w))
            out[name].append(float(bounds.finite_class(steps, rows=int(n), **s.common(w))["total"].max()))
    return out
