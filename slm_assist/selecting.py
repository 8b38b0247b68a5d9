"""From scores to a list of rows to train on, with what it takes to know later how the list came to be."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from slm_assist.assist import row_list, score_store, selection
from slm_assist.assist.row_list import Quotas, RowList
from slm_assist.assist.score_store import Scores
from slm_assist.errors import UserError

Say = Callable[[str], None]


def select(
    scores_dir: str | Path,
    out: str | Path,
    *,
    rule: str = "top",
    rows: int = 0,
    ratio: float = 0.0,
    low: float = 0.0,
    high: float = 1.0,
    tau: float = 0.1,
    seed: int = 0,
    quotas: Quotas = None,
    say: Say = print,
) -> RowList:
    """Chooses rows by their scores, writes the list and says what is in it.

    Args:
      scores_dir: what `slm-assist score` wrote, complete.
      out: the file of the list.
      rule, rows, ratio, low, high, tau, seed, quotas: as `row_list.choose` explains.

    Raises:
      UserError: scores that are not complete, damaged or NaN; options that do not fit them. Nothing is written.
    """
    found = score_store.open_scores(scores_dir)
    try:
        selection.checked(found.score)
    except UserError as error:
        raise UserError(f"{found.path}: {error}") from None
    options = {"rule": rule, "rows": rows, "ratio": ratio, "low": low, "high": high, "tau": tau, "seed": seed}
    row_ids = row_list.choose(found.score, found.domain, found.meta["domains"], quotas=quotas, **options)
    kept_tokens = found.columns["tokens"][row_ids].sum(dtype=np.float64)
    made = {
        "scores": str(found.path.resolve()),
        "scores_fingerprint": found.fingerprint,
        "score": found.meta["score"],
        "helpers": found.meta["helpers"],
        "scoring_flops": found.meta.get("flops"),
        "options": options | {"quotas": quotas},
        "kept": {"tokens": int(kept_tokens), "domains": by_domain(found, row_ids)},
    }
    chosen = row_list.make(
        row_ids,
        corpus=found.meta["corpus"],
        rows=found.meta["rows"],
        vocabulary=found.meta["vocabulary"],
        made=made,
    )
    path = row_list.write(out, chosen)
    for line in describe(found, row_ids, ties=rule == "top"):
        say(line)
    return RowList(chosen.row_ids, chosen.header, str(path))


def by_domain(found: Scores, row_ids: np.ndarray) -> dict[str, tuple[int, int]]:
    """(rows, kept rows) of each domain."""
    names = found.meta["domains"]
    there, kept = (np.bincount(d, minlength=len(names)) for d in (found.domain, found.domain[row_ids]))
    return {name: (int(there[i]), int(kept[i])) for i, name in enumerate(names)}


def describe(found: Scores, row_ids: np.ndarray, *, ties: bool = False) -> list[str]:
    """What a choice keeps: rows, tokens, scores, and the share of each domain.

    Args:
      ties: whether to say how many rows that are left out have the lowest score that is kept.
    """
    tokens, score = found.columns["tokens"], found.score
    kept, everything = tokens[row_ids].sum(dtype=np.float64), tokens.sum(dtype=np.float64)
    lines = [
        f"kept {len(row_ids):,} of {len(score):,} rows ({len(row_ids) / len(score):.1%}) and {kept:,.0f} of "
        f"{everything:,.0f} tokens ({kept / max(everything, 1):.1%})",
        f"mean {found.meta['score']['name']} of the kept rows {score[row_ids].mean(dtype=np.float64):.4f}, of all "
        f"{score.mean(dtype=np.float64):.4f}; lowest kept {score[row_ids].min():.4f}",
    ]
    bar = score[row_ids].min()
    equal, kept_equal = int((score == bar).sum()), int((score[row_ids] == bar).sum())
    if ties and equal > kept_equal:
        lines.append(
            f"{equal:,} rows have this lowest score, and {kept_equal:,} of them are kept, by row id: the score does "
            "not tell them apart; keep fewer rows, or use another score"
        )
    counts = by_domain(found, row_ids)
    width = max(len(name) for name in counts)
    if len(counts) > 1:
        lines.append(f"{'domain':<{width}}  {'rows':>10}  {'kept':>10}  kept of it  of all kept")
        lines += [
            f"{name:<{width}}  {there:>10,}  {stay:>10,}  {stay / max(there, 1):>10.1%}  {stay / len(row_ids):>11.1%}"
            for name, (there, stay) in sorted(counts.items(), key=lambda item: -item[1][0])
        ]
    return lines
