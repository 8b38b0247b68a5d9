"""What is measured: every row of the matrix, in the order in which time is spent on them.

A row is an experiment file and what is set on top of it. In values, `{small}` stands for the directory of that seed's
small LM, `{list:top}` for a list of rows and `{entropy:small}` for a number; planning.py puts them in and sees to it
that what they name is there before. Nothing else tells one method from another: all rows have the same student, the
same learning rate, rows and updates as BASELINE of their seed, unless the row says so.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from tiers import Tier

ENDS = (0.4, 0.5, 0.6, 0.7, 0.8, 1.0)  # parts of the steps at which every method has a fully decayed model
FEW_ENDS = (0.7, 1.0)  # of rows that are only explored
STAGE_1 = 0.173  # of the steps, for soft labels, selection and representations alike: the paper's 36K of 208K
AUTO_CAP = 0.4
BASELINE = "baseline"
EPOCH_DECAYS = (0.03, 0.1, 0.3, 1.0)  # more epochs want more of it
TUNING_STEPS = 100
FOUND = ("let_salt", "unigram")  # the best at equal steps of what was explored, and the best of what costs no FLOPs
# Chosen on the validation part like those, but after their figures on the test part had been read: of soft labels that
# are softer the best that costs no FLOPs, the best with a small LM trained briefly, and the best at equal steps.
LATER = ("t4-unigram", "t4-quarter", "tau-2")
CLAIMED, CLAIMED_SEEDS = (BASELINE, "salt", *FOUND, *LATER), 8  # so that a difference of half a percent is found
# Explored with all of the seeds: what was ahead of SALT on the first at equal steps, and what costs a small LM of fewer
# steps only, or none, which is to be as good at equal steps and cheaper.
AHEAD = ("responsibility", "easy", "let_salt", "salt-quarter", "tau-2", "tau-4")
CHEAP = (
    *("salt-eighth", "let_salt-quarter", "let_salt-eighth", "t4-quarter", "t4-eighth", "t4-unigram"),
    *("t2-quarter", "t2-eighth", "t2-unigram"),
)
WINS = ("t4-unigram", "tau-2")  # at equal FLOPs: with all charged, with the small LM shared by ten
NOISES = (0.01, 0.05, 0.2, 0.5, 2.0, 4.0)  # of growth; the row `grow` has 1
SOFT = (
    ("quarter", "small LM trained for a quarter of the steps", "{quarter}", "salt"),
    ("eighth", "small LM trained for an eighth of the steps", "{eighth}", "salt"),
    ("unigram", "unigram teacher", "slm_assist.assist.ngram:unigram", "salt_unigram"),
)  # teachers that cost little, with soft labels that are softer
TEMPERATURES = (0.25, 0.5, 2.0, 4.0, 8.0, 16.0)  # of the teacher; the row `salt` has 1
FEW = 0.25  # of the rows that a run reads, where it reads them over and over
MAIN_SEEDS, TUNING_SEEDS, FRESH_SEEDS = 0, 200, 100  # where each set of seeds begins
STEP_KEYS = {"assist.schedule": "assist.steps", "represent.schedule": "represent.steps"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the matrix.

    Attributes:
      key: of its directories; title: for people.
      group: the table it stands in.
      file: of experiments/, without `.py`; overrides: on top of that.
      seeds: how many, from `first_seed` on; ends: parts of the steps with a fully decayed model.
      stage_1: updates with help, as a part of the steps.
      pair: the row it is compared with.
      test: whether it is measured on the test part (and nothing else is).
    """

    key: str
    title: str
    group: str
    file: str
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seeds: int = 3
    first_seed: int = MAIN_SEEDS
    ends: tuple[float, ...] = ENDS
    stage_1: float = STAGE_1
    pair: str = "baseline"
    ratio: int = 0  # tokens a parameter; 0: the tier's main one
    test: bool = False


HELPER_KEYS = {
    "small": {},
    "tiny": {},
    "medium": {},
    "equal": {},
    "untrained": {"steps": 1, "optimizer.warmup_steps": 0, "optimizer.peak_learning_rate": 1e-12},
    "half": {"steps": 0.5},
    "quarter": {"steps": 0.25},
    "eighth": {"steps": 0.125},
    "more": {"steps": 2.0},
    "disjoint": {"data.source": "{other}", "data.vocabulary": "{small}"},
    "few": {"select.rows": "list", "select.list": "{list:few}", "select.fraction": 1.0},
}
"""Small LMs beside their shape, without one of their own that of `small`; `steps` as a part of the student's (or 1)."""

GRID, MAIN, GIFTS, CONTROLS, DATA, ADAPTIVE, SWEEPS, CONFIRM, EPOCHS, TUNED, BUCKETS = (
    "grid", "main", "gifts", "controls", "helper's data", "adaptive", "sweeps", "confirmation", "epochs", "tuned",
    "buckets",
)  # fmt: skip

LABELS = {"assist.teacher": "{small}"}
BOTH = {**LABELS, "represent.helper": "{small}"}
OFFLINE = {**LABELS, "select.list": "{list:top}"}


def rows(tier: Tier, tuning: bool = False) -> list[Row]:
    """The matrix of a tier, ranked; with fine-tuning where there is data for it."""
    main, low = tier.ratios[0], tier.ratios[-1]
    return [
        Row("cutter", "cuts the buckets", BUCKETS, "baseline", seeds=1, first_seed=TUNING_SEEDS + 50, ends=(1.0,)),
        *_main(5, main),
        *_gifts(3, main),
        *_controls(),
        *_main(5, low),
        *_own_best(tier, _main(5, main)),
        *_adaptive(),
        *_confirmation(tier),
        *(_tuned() if tuning else []),
        *_helpers_data(),
        *_sweeps(),
        *_growths(),
        *_epochs(),
        *_gifts(3, low),
        *_grid(tier),
    ]


def curve_at_once(row: Row) -> bool:
    """Whether a row's models of fewer steps are ranked with its last one, and not behind every other row."""
    return row.group in (MAIN, GIFTS) or row.test and row.key in (BASELINE, "salt")


def _grid(tier: Tier) -> list[Row]:
    """The same rates for BASELINE, SALT and what wins."""
    found, known = [], _known()
    for method in (BASELINE, "salt", *WINS):
        for peak, decay in tier.grid:
            keys = {"optimizer.peak_learning_rate": peak, "optimizer.weight_decay": decay}
            found.append(
                Row(f"grid-{method}-{peak:g}-{decay:g}", f"{method}, peak {peak:g}, weight decay {decay:g}", GRID,
                    known[method].file, {**known[method].overrides, **keys}, 1, TUNING_SEEDS, (1.0,), pair=method)
            )  # fmt: skip
    return found


def _main(seeds: int, ratio: int) -> list[Row]:
    return [
        Row("baseline", "BASELINE", MAIN, "baseline", {}, seeds, ratio=ratio),
        Row("salt", "SALT", MAIN, "salt", LABELS, seeds, ratio=ratio),
        Row("rkd", "RKD", MAIN, "rkd", LABELS, seeds, ratio=ratio, stage_1=1.0),
    ]


def _own_best(tier: Tier, known: Sequence[Row]) -> list[Row]:
    """Those of these rows whose best of the grid is another than BASELINE's, at their own."""
    found = []
    for row in known:
        if row.key in tier.own_best:
            peak, decay = tier.own_best[row.key]
            keys = {"optimizer.peak_learning_rate": peak, "optimizer.weight_decay": decay}
            title = f"{row.title}, its own best rates"
            keys = {**row.overrides, **keys}
            found.append(dataclasses.replace(row, key=f"{row.key}-own", title=title, overrides=keys, ends=(1.0,)))
    return found


def _gifts(seeds: int, ratio: int) -> list[Row]:
    grown = {"grow.helper": "{small}"}
    return [
        Row("grow", "growth", GIFTS, "grow", grown, seeds, ratio=ratio),
        Row("let", "LET", GIFTS, "let", {"represent.helper": "{small}"}, seeds, ratio=ratio),
        Row("grow_salt", "growth, then SALT", GIFTS, "grow_salt", LABELS | grown, seeds, ratio=ratio, pair="grow"),
        Row("salt_ds", "SALT_DS, online", GIFTS, "salt_ds", LABELS, seeds, ratio=ratio, pair="salt"),
        Row("salt_ds_offline", "SALT_DS, offline", GIFTS, "salt_ds_offline", OFFLINE, seeds, ratio=ratio, pair="salt"),
    ]


def _controls() -> list[Row]:
    def teacher(name: str) -> dict[str, Any]:
        return {"assist.teacher": f"slm_assist.assist.ngram:{name}"}

    return [
        Row("smoothing", "label smoothing of SALT's entropy", CONTROLS, "salt",
            teacher("uniform") | {"assist.weight": "{entropy:small}"}, pair="salt"),
        Row("uniform", "label smoothing by SALT's w", CONTROLS, "salt", teacher("uniform"), pair="salt"),
        Row("unigram", "SALT, unigram teacher", CONTROLS, "salt", teacher("unigram"), pair="salt"),
        Row("five_gram", "SALT, 5-gram teacher, counted on all training rows", CONTROLS, "salt", teacher("five_gram"),
            pair="salt"),
        Row("five_gram_other", "SALT, 5-gram teacher, counted on as much other text as the small LM has read", CONTROLS,
            "salt", {"assist.teacher": "teachers:five_gram_of_others"}, pair="salt"),
        Row("untrained", "SALT, untrained helper", CONTROLS, "salt", {"assist.teacher": "{untrained}"}, pair="salt"),
        Row("small_w", "w = 0.1 for the whole run", CONTROLS, "rkd", LABELS | {"assist.weight": 0.1}, stage_1=1.0,
            pair="salt"),
        Row("random", "SALT, random rows", CONTROLS, "salt_random", LABELS, pair="salt"),
        Row("same_share", "SALT, random rows, SALT_DS's share of each domain", CONTROLS, "salt_ds_offline",
            LABELS | {"select.list": "{list:share}"}, pair="salt_ds_offline"),
        Row("no_labels", "SALT_DS's rows without soft labels, online", CONTROLS, "select_only",
            {"select.scorer": "{small}"}, pair="salt_ds"),
        Row("no_labels_offline", "SALT_DS's rows without soft labels, offline", CONTROLS, "salt_ds_offline",
            {"assist.schedule": "none", "assist.teacher": "", "select.list": "{list:top}", "select.fraction": STAGE_1},
            pair="salt_ds_offline"),
        Row("unseen", "SALT_DS, offline, then unseen rows only", CONTROLS, "salt_ds_offline",
            OFFLINE | {"select.then": "unseen"}, pair="salt_ds_offline"),
        Row("miniplm", "MiniPLM", CONTROLS, "miniplm", {"select.scorer": "{small}", "select.reference": "{small}"}),
        Row("rho1", "RHO-1", CONTROLS, "rho1", {"select.reference": "{small}"}),
    ]  # fmt: skip


def _known() -> dict[str, Row]:
    return {row.key: row for row in (*_main(5, 0), *_gifts(5, 0), *_controls(), *_adaptive(), *_sweeps())}


def _confirmation(tier: Tier) -> list[Row]:
    """What is claimed, on seeds and documents that nothing was chosen by."""
    known = _known()
    fresh = {"group": CONFIRM, "first_seed": FRESH_SEEDS, "test": True}
    claimed = [dataclasses.replace(known[key], **fresh, seeds=CLAIMED_SEEDS, ends=ENDS) for key in CLAIMED]
    others = [*_own_best(tier, list(known.values())), *(known[key] for key in ("rkd", "grow", "salt_ds"))]
    control = dataclasses.replace(known["uniform"], **fresh, seeds=5, ends=(1.0,))  # of what is claimed of counts
    return claimed + [dataclasses.replace(row, **fresh, seeds=5) for row in others] + [control]


def _tuned() -> list[Row]:
    """GSM8K after pre-training: the loss of its solutions, all fine-tuned in one way."""
    keys = {
        "data.source": "{tuning:train}", "data.validation": "{tuning:test}", "data.vocabulary": "{small}",
        "data.domain_field": "", "data.seq_len": 512, "microbatches": 1, "validation.rows": 0,
        "optimizer.peak_learning_rate": 2e-3, "optimizer.weight_decay": 0.0, "steps": TUNING_STEPS,
    }  # fmt: skip
    return [
        Row(f"tuned-{key}", f"{title}, fine-tuned", TUNED, "sft/gsm8k", keys | {"init.model": f"{{run:{key}}}"}, 3,
            pair="tuned-baseline")
        for key, title in ((BASELINE, "BASELINE"), ("salt", "SALT"), ("rkd", "RKD"), ("grow", "growth"))
    ]  # fmt: skip


def _epochs() -> list[Row]:
    few = {"select.rows": "list", "select.list": "{list:few}", "select.fraction": 1.0}

    def row(method: str, decay: float, overrides: Mapping[str, Any], pair: str = BASELINE) -> Row:
        title = f"{'BASELINE' if method == BASELINE else 'SALT'}, weight decay {decay:g}"
        keys = few | overrides | {"optimizer.weight_decay": decay}
        return Row(f"epochs-{method}-{decay:g}", title, EPOCHS, method, keys, 2, ends=(1.0,), pair=pair)

    salt = {"assist.teacher": "{few}"}
    return [one for decay in EPOCH_DECAYS
            for one in (row(BASELINE, decay, {}), row("salt", decay, salt, f"epochs-baseline-{decay:g}"))]  # fmt: skip


def _helpers_data() -> list[Row]:
    return [
        Row("salt_disjoint", "SALT, helper of other rows", DATA, "salt", {"assist.teacher": "{disjoint}"}),
        Row("salt_more", "SALT, helper of twice the rows", DATA, "salt", {"assist.teacher": "{more}"}),
    ]


def _adaptive() -> list[Row]:
    def row(key: str, title: str, overrides: Mapping[str, Any], stage_1: float, file: str = "salt") -> Row:
        labels, seeds = {} if file == "grow" else LABELS, 3 if key in AHEAD + CHEAP else 1
        return Row(key, title, ADAPTIVE, file, labels | overrides, seeds, ends=FEW_ENDS, stage_1=stage_1, pair="salt")

    def rule(name: str, w: float = 0.667) -> dict[str, Any]:
        return {"assist.token_weight": f"candidates:{name}", "assist.weight": w}

    def soft(key: str, words: str, overrides: Mapping[str, Any], stage_1: float = STAGE_1, file: str = "salt",
             temperature: float = 4.0) -> Row:  # fmt: skip
        keys = {"assist.temperature": temperature} | overrides
        found = row(f"t{temperature:g}-{key}", f"SALT, temperature {temperature:g}, {words}", keys, stage_1, file)
        return dataclasses.replace(found, ends=(1.0,))

    return [
        row("salt-40", "SALT, n_KD 40 %", {}, AUTO_CAP),
        row("win", "w where the teacher is the better, 40 %", rule("win"), AUTO_CAP),
        row("win-all", "w where the teacher is the better, whole run", rule("win"), 1.0, "rkd"),
        row("responsibility", "w by responsibility, 40 %", rule("responsibility", 0.5), AUTO_CAP),
        row("responsibility-all", "w by responsibility, whole run", rule("responsibility", 0.5), 1.0, "rkd"),
        row("entropy_gap", "w by the gap of entropies, 40 %", rule("entropy_gap", 0.9), AUTO_CAP),
        row("hyperbolic", "w = n0 / (n0 + n), 60 %", {"assist.schedule": "candidates:hyperbolic"}, 0.6),
        row("easy", "w = n0 / (n0 + n), longer where the teacher is sure, 60 %",
            rule("easy") | {"assist.schedule": "candidates:hyperbolic"}, 0.6),
        row("let_salt", "LET with SALT", BOTH, STAGE_1, "let_salt"),
        row("grow-win", "growth, then w where the teacher is the better, 40 %",
            rule("win") | {"grow.helper": "{small}"}, AUTO_CAP, "grow_salt"),
        row("salt-quarter", "SALT, small LM trained for a quarter of the steps", {"assist.teacher": "{quarter}"},
            STAGE_1),
        row("let_salt-quarter", "LET with SALT, small LM trained for a quarter of the steps",
            {"assist.teacher": "{quarter}", "represent.helper": "{quarter}"}, STAGE_1, "let_salt"),
        row("salt-eighth", "SALT, small LM trained for an eighth of the steps", {"assist.teacher": "{eighth}"},
            STAGE_1),
        row("let_salt-eighth", "LET with SALT, small LM trained for an eighth of the steps",
            {"assist.teacher": "{eighth}", "represent.helper": "{eighth}"}, STAGE_1, "let_salt"),
        row("grow-half", "growth, small LM trained for half of the steps", {"grow.helper": "{half}"}, 0.0, "grow"),
        row("grow-quarter", "growth, small LM trained for a quarter of the steps", {"grow.helper": "{quarter}"}, 0.0,
            "grow"),
        row("grow_salt-quarter", "growth, then SALT, small LM trained for a quarter of the steps",
            {"grow.helper": "{quarter}", "assist.teacher": "{quarter}"}, STAGE_1, "grow_salt"),
        row("grow-other", "growth, then SALT with a helper of other rows",
            {"grow.helper": "{small}", "assist.teacher": "{disjoint}"}, STAGE_1, "grow_salt"),
        *(soft(key, words, {"assist.teacher": teacher}, file=file, temperature=t) for key, words, teacher, file in SOFT
          for t in (4.0, 2.0)),
        soft("10", "n_KD 10 %", {}, 0.1),
        soft("30", "n_KD 30 %", {}, 0.3),
        soft("0.9", "w 0.9", {"assist.weight": 0.9}),
        soft("let", "LET", BOTH, file="let_salt"),
    ]  # fmt: skip


def _growths() -> list[Row]:
    """How far clones are pushed apart at the start: as clones they would learn no more than the small LM can."""
    return [
        Row(f"grow-noise-{noise:g}", f"growth, noise {noise:g}", SWEEPS, "grow",
            {"grow.helper": "{small}", "grow.noise": noise}, 1, ends=FEW_ENDS, pair="grow")
        for noise in NOISES
    ]  # fmt: skip


def _sweeps() -> list[Row]:
    def row(key: str, title: str, overrides: Mapping[str, Any], file: str = "salt", stage_1: float = STAGE_1) -> Row:
        keys = (OFFLINE if file == "salt_ds_offline" else LABELS) | overrides
        pair = "salt_ds" if file == "salt_ds" else "salt"
        seeds = 3 if key in AHEAD else 1
        return Row(key, title, SWEEPS, file, keys, seeds, ends=FEW_ENDS, stage_1=stage_1, pair=pair)

    sizes = [row(f"size-{name}", f"helper: {name}", {"assist.teacher": f"{{{name}}}"})
             for name in ("tiny", "medium", "equal", "half")]  # fmt: skip
    temperatures = [row(f"tau-{t:g}", f"SALT, temperature {t:g}", {"assist.temperature": t}) for t in TEMPERATURES]
    weights = [row(f"w-{w:g}", f"w {w:g}", {"assist.weight": w}) for w in (0.2, 0.4, 0.9)]
    lengths = [row(f"n_kd-{part:g}", f"n_KD {part:.0%}", {}, stage_1=part) for part in (0.05, 0.1, 0.3, 0.6)]
    ways = [row(f"schedule-{kind}", f"w ends: {kind}", {"assist.schedule": kind}) for kind in ("linear", "ratio")]
    looks = {"validation.every": 40, "validation.rows": 256}
    auto = row("schedule-auto", "w ends: auto", {"assist.schedule": "auto"} | looks, stage_1=AUTO_CAP)
    ks = [row(f"k-{k}", f"SALT_DS, k {k}", {"select.k": k}, "salt_ds") for k in (1, 3, 50)]
    late = row("scorer-last", "SALT_DS, scored by the last checkpoint", {"select.scorer_step": -1}, "salt_ds")
    tops = [row(f"top_k-{k}", f"soft labels of the {k} likeliest", {"assist.top_k": k}) for k in (1, 5, 50)]
    return [*lengths, auto, *sizes, *weights, *temperatures, *ways, *ks, late, *tops]
