"""What was selected: from runs, from lists of rows and from scores of a corpus, in numbers.

Rows of two selections are compared with what chance would give. If both chose blindly, from candidates that are
all equally likely, the expected number of rows in common is

    |A| |B| |candidates of both| / (|candidates of A| |candidates of B|)

A run's metrics tell which rows it kept, not which it refused. Candidates come from the corpus in the order of the
seed: those of two runs with the same order are taken to be the first so many of it; else candidates are taken to
be a blind draw from the corpus. A list chose from all rows.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slm_assist.assist import row_list, score_store
from slm_assist.assist import sample as sample_lib
from slm_assist.assist.sample import Sample
from slm_assist.data.tokenizers import Vocabulary
from slm_assist.errors import UserError
from slm_assist.report.compare import Comparison
from slm_assist.report.runs import Run

SAMPLE = "selection_sample.npz"
TIED = 0.1  # share of rows with one score that is worth a note
POINTS = 400  # of a curve; longer runs are averaged down to this


@dataclasses.dataclass(frozen=True, eq=False)
class Picked:
    """A set of rows.

    Attributes:
      row_ids: int64, ascending, distinct.
      candidates: how many distinct rows it was chosen from; corpus_rows: rows in the corpus.
      order: what the order of the candidates comes from; None: every row was a candidate.
    """

    name: str
    row_ids: np.ndarray
    candidates: int
    corpus_rows: int
    order: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """What one run, list of rows or directory of scores says of its choice; what it lacks is None or empty.

    Attributes:
      name: of the method, or of the file; score: the name of the score.
      means: `steps`, `candidates` and `kept`: mean scores by step, thinned.
      domains: {name: (candidates, kept)}, numbers of rows.
      scores, domain: of each row that was scored, and the index into domain_names; `whole`: of the whole corpus.
      sample, vocabulary: for the eye.
    """

    name: str
    kind: str  # of the method, or "list" or "scores"
    score: str = ""
    picked: Picked | None = None
    means: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    domains: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    scores: np.ndarray | None = None
    domain: np.ndarray | None = None
    domain_names: Sequence[str] = ()
    whole: bool = False
    sample: Sample | None = None
    vocabulary: Vocabulary | None = None

    @property
    def kept_share(self) -> float | None:
        candidates, kept = np.sum(list(self.domains.values()), axis=0) if self.domains else (0, 0)
        return float(kept / candidates) if candidates else None


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Rows that two selections have in common, and what chance would give (`by_chance`: a number of rows)."""

    names: tuple[str, str]
    rows: tuple[int, int]
    common: int
    by_chance: float

    def share_of_smaller(self, common: float) -> float:
        return common / min(self.rows)

    def jaccard(self, common: float) -> float:
        return common / (sum(self.rows) - common)


@dataclasses.dataclass(frozen=True)
class Selection:
    """Everything the section "What was selected" shows; false if there is nothing."""

    choices: tuple[Choice, ...] = ()
    overlaps: tuple[Overlap, ...] = ()
    correlations: tuple[tuple[str, str, float], ...] = ()  # Spearman's, over all rows of the corpus
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.choices)

    def to_json(self) -> dict[str, Any]:
        """The figures, without the rows."""
        return {
            "choices": {
                c.name: {"kind": c.kind, "score": c.score, "kept_share": c.kept_share, "domains": c.domains,
                         "rows": None if c.picked is None else len(c.picked.row_ids),
                         "candidates": None if c.picked is None else c.picked.candidates, "means": c.means}
                for c in self.choices
            },
            "overlaps": [
                dataclasses.asdict(o) | {
                    "share_of_smaller": o.share_of_smaller(o.common), "jaccard": o.jaccard(o.common),
                    "share_of_smaller_by_chance": o.share_of_smaller(o.by_chance),
                    "jaccard_by_chance": o.jaccard(o.by_chance),
                }
                for o in self.overlaps
            ],
            "rank_correlations": [list(c) for c in self.correlations],
        }  # fmt: skip


def look(comparison: Comparison, *, lists: Sequence[str | Path] = (), scores: Sequence[str | Path] = ()) -> Selection:
    """Collects what the runs of a comparison (of each method the first), lists of rows and scores say.

    Args:
      lists: files that `slm-assist select` wrote; scores: directories that `slm-assist score` wrote.

    Raises:
      UserError: a damaged sample, list or directory of scores; a list or scores of another corpus than the runs'.
    """
    runs = [(m.name, m.kind, m.runs[0]) for m in comparison.methods if m.runs[0].selection]
    corpora = {m.runs[0].facts.get("train_rows"): m.runs[0] for m in comparison.methods}
    opened = [score_store.open_scores(path) for path in scores]
    for table in opened:
        _same_corpus(table.path, table.meta["corpus"], corpora)
    by_run = [_from_run(*run, opened) for run in runs]
    by_list = [_from_list(Path(path), corpora, opened) for path in lists]
    choices = [*by_run, *by_list, *map(_from_scores, opened)]
    choices = _distinct([c for c in choices if c.picked is not None or c.sample is not None or c.scores is not None])
    picked = [c.picked for c in choices if c.picked is not None and len(c.picked.row_ids)]
    notes = [f"{c.name} has no tokenizer beside its sample of rows, so they are not shown as text." for c in choices
             if c.sample is not None and c.vocabulary is None]  # fmt: skip
    notes += [note for choice in choices if (note := _ties(choice))]
    if len({run.facts.get("train_rows") for _, _, run in runs}) > 1:
        notes.append("The runs' training rows differ, so the rows they chose are not compared.")
        picked = [p for p in picked if p.order is None]
    return Selection(
        tuple(choices),
        overlaps(picked),
        tuple(_correlations([c for c in choices if c.whole])),
        tuple(notes),
    )


def _ties(choice: Choice) -> str:
    """A warning where a score cannot tell rows apart: of equal scores, the row that comes first is taken."""
    if choice.scores is None or not len(choice.scores):
        return ""
    bad = int(np.isnan(choice.scores).sum())
    if bad:
        return f"{choice.name}: {bad:,} of {len(choice.scores):,} rows have no number (NaN); `select` refuses them."
    values, counts = np.unique(choice.scores, return_counts=True)
    most = int(counts.argmax())
    share = counts[most] / len(choice.scores)
    if share < TIED:
        return ""
    why = ""
    if choice.score == "salt" and values[most] == 0:
        why = " (half of their tokens are outside the top k: a later scorer or a larger select.k tells them apart)"
    return f"{choice.name}: {100 * share:.0f} % of the rows have the same score, {values[most]:g}{why}."


def _distinct(choices: list[Choice]) -> list[Choice]:
    """Names told apart by a number."""
    seen: dict[str, int] = {}
    result = []
    for choice in choices:
        seen[choice.name] = seen.get(choice.name, 0) + 1
        name = choice.name if seen[choice.name] == 1 else f"{choice.name} ({seen[choice.name]})"
        picked = choice.picked and dataclasses.replace(choice.picked, name=name)
        result.append(dataclasses.replace(choice, name=name, picked=picked))
    return result


def _from_run(name: str, kind: str, run: Run, opened: Sequence[score_store.Scores]) -> Choice:
    select = run.config.get("select") or {}
    records = [record for record in run.train if record.get("rows") is not None]
    chosen = Path(select.get("list") or "")
    if select.get("rows") == "list" and not records and chosen.is_file():
        return dataclasses.replace(_from_list(chosen, {run.facts.get("train_rows"): run}, opened), name=name, kind=kind)
    domains: dict[str, tuple[int, int]] = {}
    for record in records:
        for domain, (candidates, kept) in (record.get("domains") or {}).items():
            before = domains.get(domain, (0, 0))
            domains[domain] = (before[0] + candidates, before[1] + kept)
    file = run.path / SAMPLE
    sample = sample_lib.read(file) if file.is_file() else None
    tokenizer = run.path / "tokenizer"
    has_scores = sample is not None and select.get("rule") != "random"
    return Choice(
        name, kind, score="" if select.get("rule") == "random" else select.get("score", "salt"),
        picked=_picked(name, run, records) if records else None, means=_means(records), domains=domains,
        scores=sample.score if has_scores else None, domain=sample.domain if has_scores else None,
        domain_names=sample.domains if has_scores else (), sample=sample if has_scores else None,
        vocabulary=Vocabulary.load(tokenizer) if has_scores and tokenizer.is_dir() else None,
    )  # fmt: skip


def _picked(name: str, run: Run, records: list[dict[str, Any]]) -> Picked:
    rows = np.unique(np.concatenate([np.asarray(record["rows"], np.int64) for record in records]))
    corpus_rows = run.facts.get("train_rows_count") or (int(rows.max()) + 1 if len(rows) else 0)
    candidates = int(sum(record.get("candidates") or len(record["rows"]) for record in records))
    data = run.config.get("data") or {}
    seed = data.get("order_seed", -1)
    order = (run.facts.get("train_rows"), run.seed if seed < 0 else seed, data.get("domain_weights", ""))
    return Picked(name, rows, max(len(rows), min(candidates, corpus_rows)), corpus_rows, order)


def _means(records: list[dict[str, Any]]) -> dict[str, list[float]]:
    points = [(r["step"], r["score_mean"], r["score_kept_mean"]) for r in records if "score_kept_mean" in r]
    if not points:
        return {}
    chunks = np.array_split(np.asarray(points, np.float64), min(POINTS, len(points)))
    columns = np.stack([chunk.mean(axis=0) for chunk in chunks]).T
    return {name: column.tolist() for name, column in zip(("steps", "candidates", "kept"), columns, strict=True)}


def _from_list(path: Path, corpora: dict[Any, Run], opened: Sequence[score_store.Scores]) -> Choice:
    chosen = row_list.read(path)
    corpus, corpus_rows = chosen.header["corpus"], chosen.header["rows"]
    _same_corpus(path, corpus, corpora)
    tables = [table for table in opened if table.meta["corpus"] == corpus]
    said = (chosen.header.get("made") or {}).get("kept", {}).get("domains", {})
    domains = {name: (int(rows), int(kept)) for name, (rows, kept) in said.items() if rows}
    if tables:
        domains = kept_by_domain(tables[0].domain, chosen.row_ids, tables[0].meta["domains"])
    picked = Picked(path.stem, chosen.row_ids, corpus_rows, corpus_rows)
    return Choice(path.stem, "list", picked=picked, domains=domains)


def kept_by_domain(domain_N: np.ndarray, kept: np.ndarray, names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """{name: (rows, kept rows)} of the domains that have rows.

    Args:
      domain_N: of each row, an index into `names`; kept: int, indices of the rows that were kept.
    """
    rows, chosen = (np.bincount(ids, minlength=len(names)).tolist() for ids in (domain_N, domain_N[kept]))
    return {name: (n, k) for name, n, k in zip(names, rows, chosen, strict=True) if n}


def _from_scores(table: score_store.Scores) -> Choice:
    file = table.path / score_store.SAMPLE
    sample = sample_lib.read(file) if file.is_file() else None
    tokenizers = [Path(helper["run"]) / "tokenizer" for helper in table.meta["helpers"].values()]
    there = [path for path in tokenizers if path.is_dir()] if sample else []
    return Choice(
        table.path.name, "scores", score=table.meta["score"]["name"], scores=table.score, domain=table.domain,
        domain_names=table.meta["domains"], whole=True, sample=sample,
        vocabulary=Vocabulary.load(there[0]) if there else None,
    )  # fmt: skip


def _same_corpus(path: Path, corpus: str, corpora: dict[Any, Run]) -> None:
    if corpora and corpus not in corpora:
        known, run = next(iter(corpora.items()))
        raise UserError(
            f"{path}: made for another corpus ({corpus[:12]}) than the training rows of {run.path} "
            f"({str(known)[:12]}); leave it out, or report it with runs on its corpus"
        )


def overlaps(picked: Sequence[Picked]) -> tuple[Overlap, ...]:
    """`overlap` of every pair."""
    return tuple(overlap(a, b) for a, b in itertools.combinations(picked, 2))


def overlap(a: Picked, b: Picked) -> Overlap:
    """Rows in common of two non-empty selections from one corpus, and how many chance would give."""
    common = np.intersect1d(a.row_ids, b.row_ids, assume_unique=True).size
    if a.order is not None and a.order == b.order:
        both = min(a.candidates, b.candidates)  # the first so many of one order
    else:
        both = a.candidates * b.candidates / a.corpus_rows
    rows = (len(a.row_ids), len(b.row_ids))
    by_chance = rows[0] * rows[1] * both / (a.candidates * b.candidates)
    return Overlap((a.name, b.name), rows, int(common), float(by_chance))


def _correlations(choices: Sequence[Choice]):
    for a, b in itertools.combinations(choices, 2):
        if len(a.scores) == len(b.scores):
            yield a.name, b.name, rank_correlation(a.scores, b.scores)


def rank_correlation(a_N: np.ndarray, b_N: np.ndarray) -> float:
    """Spearman's: of the ranks, ties sharing their mean; rows without a score in both are left out; 0 if constant."""
    known = ~(np.isnan(a_N) | np.isnan(b_N))
    ranks = [_mean_ranks(x[known]) for x in (a_N, b_N)]
    apart = [rank - rank.mean() if len(rank) else rank for rank in ranks]
    scale = np.sqrt((apart[0] ** 2).sum() * (apart[1] ** 2).sum())
    return float((apart[0] * apart[1]).sum() / scale) if scale else 0.0


def _mean_ranks(x: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]
