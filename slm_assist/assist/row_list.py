"""A list of rows to train on: chosen from scores, kept in one file with what made it, checked before it is used.

The file is an .npz without pickle: `row_ids`, int64, ascending; and `header`, a JSON string:
    format       of the file
    corpus       `Rows.fingerprint` of the rows that the ids name
    rows         how many rows that corpus has
    vocabulary   the fingerprint of its vocabulary
    chosen       how many rows are in the list
    fingerprint  of the ids, hex
    made         how: scores, checkpoints, options
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from slm_assist.assist import selection
from slm_assist.data.row_store import Rows
from slm_assist.errors import UserError, nearest, one_of

FORMAT = 1
_KEYS = {"corpus": str, "rows": int, "vocabulary": str, "fingerprint": str}


@dataclasses.dataclass(frozen=True)
class RowList:
    """Row ids and where they come from.

    Attributes:
      row_ids: int64 [n], ascending and distinct, at least one.
      header: as in the file.
      path: where it was read from, for messages.
    """

    row_ids: np.ndarray
    header: dict[str, Any]
    path: str = "row list"

    def __len__(self) -> int:
        return len(self.row_ids)

    def check(self, rows: Rows) -> None:
        """Raises `UserError` if the list was made for other rows or another vocabulary than those of `rows`."""
        for what, listed, given in (
            ("vocabulary", self.header["vocabulary"], rows.vocabulary.fingerprint),
            ("corpus", self.header["corpus"], rows.fingerprint),
        ):
            if listed != given:
                raise UserError(
                    f"{self.path}: this list of rows was made for another {what} ({listed[:12]}; these rows have "
                    f"{given[:12]}): score and select these rows, or use the data.* keys the list was made with"
                )
        if self.row_ids[-1] >= len(rows):
            raise UserError(
                f"{self.path}: names row {self.row_ids[-1]} where the corpus has {len(rows)} rows; make the list again"
            )


def make(row_ids: np.ndarray, *, corpus: str, rows: int, vocabulary: str, made: Mapping[str, Any]) -> RowList:
    """A list of `row_ids`, as `choose` returns them.

    Args:
      corpus, rows, vocabulary: of the header; the meta of a scores directory has them.
      made: JSON-able; what a person wants to know later: scores, checkpoint, options, seed.

    Raises:
      UserError: ids that are not ascending and distinct, out of range, or none.
    """
    row_ids = np.ascontiguousarray(row_ids, np.int64)
    header = {
        "format": FORMAT, "corpus": corpus, "rows": int(rows), "vocabulary": vocabulary,
        "chosen": len(row_ids), "fingerprint": _fingerprint(row_ids), "made": dict(made),
    }  # fmt: skip
    return _checked(RowList(row_ids, header))


def write(path: str | Path, chosen: RowList) -> Path:
    """Writes the file whole or not at all; returns its path.

    Raises:
      UserError: it cannot be written.
    """
    path = Path(path).expanduser()
    temporary = path.with_name(f".{path.name}.tmp")
    header = json.dumps(chosen.header, allow_nan=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            np.savez(file, row_ids=chosen.row_ids, header=np.array(header))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return path


def read(path: str | Path) -> RowList:
    """The list in a file that `write` made; nothing in it is executed.

    Raises:
      UserError: no such file; cut short, damaged or something else; an empty list.
    """
    path = Path(path).expanduser()
    again = "`slm-assist select` makes it again"
    if not path.is_file():
        raise UserError(f"{path}: there is no such list of rows; `slm-assist select` makes one")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            row_ids, header = arrays["row_ids"], json.loads(str(arrays["header"]))
        if row_ids.dtype != np.int64 or row_ids.ndim != 1 or not isinstance(header, dict):
            raise ValueError("not a list of rows")
    except Exception as error:  # numpy, zipfile and zlib each raise their own on a damaged file
        raise UserError(f"{path}: not a whole list of rows ({error}); {again}") from error
    if header.get("format") != FORMAT:
        raise UserError(f"{path}: format {header.get('format')!r} where this version reads {FORMAT}; {again}")
    if not all(type(header.get(key)) is kind for key, kind in _KEYS.items()):
        raise UserError(f"{path}: its header lacks one of {', '.join(_KEYS)}; {again}")
    if header["fingerprint"] != _fingerprint(row_ids):
        raise UserError(f"{path}: its rows are not those it was written with; {again}")
    return _checked(RowList(row_ids, header, str(path)))


def _checked(chosen: RowList) -> RowList:
    ids, rows = chosen.row_ids, chosen.header["rows"]
    if not len(ids):
        raise UserError(f"{chosen.path}: names no rows; choose some")
    if np.any(ids[1:] <= ids[:-1]):
        raise UserError(f"{chosen.path}: row ids must ascend and be distinct; make the list again")
    if ids[0] < 0 or ids[-1] >= rows:
        wrong = ids[0] if ids[0] < 0 else ids[-1]
        raise UserError(f"{chosen.path}: names row {wrong} of a corpus with {rows} rows; make the list again")
    return chosen


def _fingerprint(row_ids: np.ndarray) -> str:
    return hashlib.blake2b(row_ids.astype("<i8").tobytes(), digest_size=16).hexdigest()


# Choosing.

RULES = ("top", "band", "gumbel", "random")
Quotas = Mapping[str, float] | str | None


def choose(
    scores: np.ndarray,
    domains: np.ndarray | None = None,
    domain_names: Sequence[str] = (),
    *,
    rule: str = "top",
    rows: int = 0,
    ratio: float = 0.0,
    low: float = 0.0,
    high: float = 1.0,
    tau: float = 0.1,
    seed: int = 0,
    quotas: Quotas = None,
) -> np.ndarray:
    """The rows to train on; the same for the same arguments on every machine.

    Args:
      scores: float [N], one a row of the corpus.
      domains: int [N], indices into `domain_names`; only quotas ask for them.
      rule: "top": the highest scores, ties to the lower row id.
        "band": rows whose place among the ascending scores lies in [low N, high N).
        "gumbel": a sample without replacement, weighted by exp(score / tau).
        "random": any, whatever their scores.
      rows: how many; or `ratio`: which part of the N rows, rounded down. "band" needs neither: then it gives the
        whole band, else a random part of it.
      seed: of gumbel, random, and of a random part of a band.
      quotas: how many of the rows come from each domain; the rule then works inside each, the band's places too.
        "natural": as many as its part of the corpus; "even": the same number; {name: share}: in these
        proportions, for every domain that has rows. Rounded by largest remainders.

    Returns:
      int64, ascending.

    Raises:
      UserError: NaN scores, options that contradict each other or leave no rows, more rows than there are, quotas
        for other domains or above what a domain has.
    """
    one_of("rule", rule, RULES)
    scores = selection.checked(scores)
    count = _count(len(scores), rule, rows, ratio, quotas)
    if rule != "band" and (low, high) != (0, 1):
        raise UserError(f"low={low}, high={high} have no meaning with rule={rule}; choose rule=band")
    group, names = _groups(len(scores), domains, domain_names, quotas)
    members = selection.by_domain(group)
    allowed = np.full(len(scores), rule != "band")
    if rule == "band":
        for ids in members.values():
            allowed[ids[selection.band(scores[ids], low, high)]] = True
    have = {d: int(np.count_nonzero(allowed[ids])) for d, ids in members.items()}
    if not sum(have.values()):
        raise UserError(f"low={low}, high={high}: no row lies in this band of {len(scores)} rows; widen it")
    wanted = have
    if count:
        shares = _shares(quotas, {d: len(ids) for d, ids in members.items()}, names)
        wanted = _split(count, shares)
        _check_quotas(wanted, have, shares, names)
    if rule == "gumbel":
        scores = selection.perturbed(scores, tau, seed)
    elif rule != "top":
        scores = selection.uniform(len(scores), seed)
    return selection.per_domain(scores, group, wanted, allowed)


def parse_quotas(text: str) -> Quotas:
    """`quotas` from a command line: "", "natural", "even", or NAME=SHARE,NAME=SHARE.

    Raises:
      UserError: not of this form, or a name twice.
    """
    if text in ("", "natural", "even"):
        return text or None
    shares: dict[str, float] = {}
    for item in text.split(","):
        name, _, share = (part.strip() for part in item.rpartition("="))
        try:
            value = float(share)
        except ValueError:
            name = ""
        if not name or name in shares:
            raise UserError(f"quotas={text!r}: {item!r} is not one NAME=SHARE for each domain; or use natural, or even")
        shares[name] = value
    return shares


def _count(n: int, rule: str, rows: int, ratio: float, quotas: Quotas) -> int:
    """How many rows are wanted; 0 for all of a band."""
    if not n:
        raise UserError("there are no scores to choose from; score a corpus first")
    if rows and ratio:
        raise UserError(f"rows={rows} and ratio={ratio}: both say how many rows; give one of them")
    if not rows and not ratio:
        if rule == "band" and quotas in (None, "natural"):
            return 0
        raise UserError(f"rows=0 and ratio=0: how many of the {n} rows? Give one of them")
    if not 0 <= ratio <= 1:
        raise UserError(f"ratio={ratio}: it is a part of the rows, above 0 and at most 1")
    count = rows or math.floor(selection.exact(ratio) * n)
    if count < 1:
        given = f"rows={rows}" if rows else f"ratio={ratio}"
        raise UserError(f"{given}: keeps none of the {n} rows; raise it")
    if count > n:
        raise UserError(f"rows={rows}: there are only {n} rows to choose from; lower it")
    return count


def _groups(
    n: int, domains: np.ndarray | None, names: Sequence[str], quotas: Quotas
) -> tuple[np.ndarray, Sequence[str]]:
    """The group of each row, int [N], and the groups' names: domains where there are quotas, else one."""
    if quotas is None:
        return np.zeros(n, np.int8), ["all rows"]
    if domains is None or np.shape(domains) != (n,):
        raise UserError(f"quotas={quotas!r} need the domain of each of the {n} rows, and there are {np.shape(domains)}")
    domains = np.asarray(domains).astype(np.int64)
    if domains.min() < 0 or domains.max() >= len(names):
        raise UserError(f"domains from {domains.min()} to {domains.max()} do not fit {len(names)} domain names")
    return domains, names


def _shares(quotas: Quotas, sizes: Mapping[int, int], names: Sequence[str]) -> dict[int, Fraction]:
    """The part of the wanted rows that comes from each group, in any unit; `sizes` are the groups' rows."""
    if quotas is None or quotas == "natural":
        return {d: Fraction(size) for d, size in sizes.items()}
    if quotas == "even":
        return dict.fromkeys(sizes, Fraction(1))
    if isinstance(quotas, str):
        raise UserError(f"quotas={quotas!r}: give natural, even, or a share for each domain")
    for name, share in quotas.items():
        if name not in names:
            raise UserError(f"quotas: there is no domain {name!r}{nearest(name, names)}; there are {', '.join(names)}")
        if not 0 <= share < math.inf:
            raise UserError(f"quotas: {name}={share}: a share must be finite and at least 0")
    for d, size in sizes.items():
        if names[d] not in quotas:
            raise UserError(f"quotas: the {size} rows of domain {names[d]!r} have none; give a share, 0 for no rows")
    shares = {d: selection.exact(quotas[name]) for d, name in enumerate(names) if name in quotas}
    if not any(shares.values()):
        raise UserError("quotas: every share is 0; give one domain more")
    return shares


def _split(count: int, shares: Mapping[int, Fraction]) -> dict[int, int]:
    """`count` in proportion to `shares`, by largest remainders; of equal ones, the lower group's."""
    total = sum(shares.values())
    parts = {d: count * share / total for d, share in shares.items()}
    whole = {d: math.floor(part) for d, part in parts.items()}
    by_remainder = sorted(parts, key=lambda d: (whole[d] - parts[d], d))
    for d in by_remainder[: count - sum(whole.values())]:
        whole[d] += 1
    return whole


def _check_quotas(
    wanted: Mapping[int, int], have: Mapping[int, int], shares: Mapping[int, Fraction], names: Sequence[str]
) -> None:
    for d, quota in wanted.items():
        if quota > have.get(d, 0):
            if len(names) == 1:
                raise UserError(f"rows: {quota} are wanted and there are {have.get(d, 0)} to choose from; lower it")
            total = sum(shares.values())
            most = min(math.floor(have.get(d, 0) * total / share) for d, share in shares.items() if share)
            raise UserError(
                f"{names[d]}: its quota is {quota} rows and it has {have.get(d, 0)} to choose from; ask for at most "
                f"{most} rows in all, or change the quotas"
            )
