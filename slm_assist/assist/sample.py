"""Some rows with what a small LM says of each of their tokens: what a person looks at to judge a score.

`selection_sample.npz`, in the directory of a run that selects rows or of scores, holds plain arrays only.
"""

import json
import os
import secrets
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slm_assist.data.row_store import Rows
from slm_assist.errors import UserError


class Sample(NamedTuple):
    """N rows of T tokens.

    Attributes:
      row_ids: int64 [N]. domain: int32 [N], indices into `domains`. score: float32 [N].
      domains: the names of all domains.
      targets: int32 [N, T]. mask: float32 [N, T], 0 where a target does not count.
      loss: float32 [N, T], nats. rank: int32 [N, T], how many tokens the model held for likelier. Both are of the
        role "scorer", or of the first role where there is none.
      header: `score` (its name), `k`, `roles` ({role: {"run", "step"}}), `kept_share` (the part of the rows that is
        selected; None where that is not known yet).
    """

    row_ids: np.ndarray
    domain: np.ndarray
    domains: list[str]
    targets: np.ndarray
    mask: np.ndarray
    loss: np.ndarray
    rank: np.ndarray
    score: np.ndarray
    header: dict[str, Any]


_ROWS = {"row_ids": np.int64, "domain": np.int32, "score": np.float32}  # [N]
_TOKENS = {"targets": np.int32, "mask": np.float32, "loss": np.float32, "rank": np.int32}  # [N, T]
_HEADER = ("score", "k", "roles", "kept_share")


def make(
    rows: Rows,
    row_ids: np.ndarray,
    score: np.ndarray,
    stats_of: Callable[[Mapping[str, np.ndarray]], tuple[Any, Any]],
    *,
    batch_rows: int,
    header: Mapping[str, Any],
) -> Sample:
    """Reads rows and asks for their tokens' loss and rank.

    Args:
      row_ids: int64 [N]. score: [N], theirs.
      stats_of: batch of `batch_rows` rows (what `Rows.get` gives) -> loss, rank, [batch_rows, T] each.
    """
    row_ids, found = np.asarray(row_ids, np.int64), []
    for start in range(0, len(row_ids), batch_rows):
        ids = row_ids[start : start + batch_rows]
        batch = rows.get(np.resize(ids, batch_rows))
        batch["loss"], batch["rank"] = (np.asarray(x) for x in stats_of(batch))
        found.append({name: batch[name][: len(ids)] for name in ("domain", *_TOKENS)})
    arrays = {name: np.concatenate([part[name] for part in found]) for name in ("domain", *_TOKENS)}
    return Sample(row_ids=row_ids, score=np.asarray(score), domains=list(rows.domains), header=dict(header), **arrays)


def spread(score: np.ndarray, count: int) -> np.ndarray:
    """Up to `count` rows to look at: a third each of the highest, the middle and the lowest scores; ascending.

    Rows whose score is NaN are left out; of equal scores, the lower index counts as the lower.
    """
    order = np.argsort(score, kind="stable")
    order = order[: np.count_nonzero(~np.isnan(score))]  # NaN sorts last
    if len(order) <= count:
        return np.sort(order).astype(np.int64)
    each = count // 3
    middle = (len(order) - (count - 2 * each)) // 2
    chosen = (order[:each], order[middle : middle + count - 2 * each], order[len(order) - each :])
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def write(path: str | Path, sample: Sample) -> None:
    """Writes the file whole or not at all."""
    path = Path(path)
    arrays = {name: np.asarray(getattr(sample, name), kind) for name, kind in (_ROWS | _TOKENS).items()}
    arrays["domains"] = np.asarray(sample.domains, np.str_)
    arrays["header"] = np.asarray(json.dumps(dict(sample.header), allow_nan=False))
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: str | Path) -> Sample:
    """The sample in a file.

    Raises:
      UserError: there is no such file, or it is damaged or something else.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in (*_ROWS, *_TOKENS, "domains", "header")}
        header = json.loads(str(arrays.pop("header")))
        _check(arrays, header)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a run that selects rows, or `slm-assist score`, writes it") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a sample of rows, or damaged ({error}); delete it") from None
    return Sample(**arrays | {"domains": [str(name) for name in arrays["domains"]]}, header=header)


def _check(arrays: Mapping[str, np.ndarray], header: Any) -> None:
    shape = arrays["targets"].shape
    for name, kind in (_ROWS | _TOKENS).items():
        expected = shape if name in _TOKENS else shape[:1]
        if arrays[name].dtype != kind or arrays[name].shape != expected or len(shape) != 2:
            raise ValueError(f"{name} is {arrays[name].dtype} {arrays[name].shape}")
    if not isinstance(header, dict) or (lacking := [name for name in _HEADER if name not in header]):
        raise ValueError(f"the header has no {lacking[0] if isinstance(header, dict) else 'entries'}")
    domain = arrays["domain"]
    if domain.size and not 0 <= domain.min() <= domain.max() < len(arrays["domains"]):
        raise ValueError(f"there is no domain {domain.max()}")
