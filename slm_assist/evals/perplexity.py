"""Validation on always the same rows: log-perplexity, bits per byte, accuracy; by domain and by difficulty."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slm_assist.data.order import Order
from slm_assist.data.rows import Rows
from slm_assist.evals.token_metrics import TAKEN
from slm_assist.metrics import write_json

BUCKETS = ("easy", "medium", "hard")


class Perplexity:
    """Evaluates parameters on a fixed part of `rows`.

    Args:
      rows: the validation rows.
      limit: how many of them to use, spread over all; 0 for all.
      batch_rows: rows in a batch of `row_sums_of`; the last batch is filled up with masked rows.
      token_bytes: [V] UTF-8 bytes of each piece, for bits per byte.
      buckets: [number of rows used] index into `BUCKETS`, or None.
    """

    def __init__(self, rows: Rows, *, limit: int, batch_rows: int, token_bytes: np.ndarray):
        count = min(limit or len(rows), len(rows))
        self.row_ids = np.sort(Order(len(rows), seed=0).rows_at(np.arange(count)))
        self.buckets: np.ndarray | None = None
        self._rows = rows
        self._batch_rows = batch_rows
        batch = rows.get(self.row_ids)
        self._domain = batch["domain"]
        self._bytes = (token_bytes[batch["targets"]] * (batch["mask"] > 0)).sum(axis=1).astype(np.float64)

    @property
    def fingerprint(self) -> str:
        """Names vocabulary, rows and choice of rows: only runs with the same one can be compared."""
        return hashlib.blake2b(self._rows.fingerprint.encode() + self.row_ids.tobytes(), digest_size=16).hexdigest()

    def row_sums(self, row_sums_of: Callable[[Mapping[str, np.ndarray]], Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """`cross_entropy`, `correct`, `tokens`, metrics of somebody's own, and `bytes` of each row, [rows] float64.

        Args:
          row_sums_of: batch of `batch_rows` rows -> the result of `steps.eval_step`.
        """
        parts = []
        for start in range(0, len(self.row_ids), self._batch_rows):
            ids = self.row_ids[start : start + self._batch_rows]
            batch = self._rows.get(np.resize(ids, self._batch_rows))
            batch["mask"][len(ids) :] = 0
            parts.append((len(ids), row_sums_of(batch)))
        sums = {
            name: np.concatenate([np.asarray(part[name], np.float64)[:count] for count, part in parts])
            for name in parts[0][1]
        }
        return sums | {"bytes": self._bytes}

    def record(self, sums: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The figures of a validation line from the result of `row_sums`."""
        everything = np.ones(len(self.row_ids), bool)
        result = _figures(sums, everything) | {"standard_error": _standard_error(sums)}
        result["domains"] = {
            name: _figures(sums, self._domain == index)
            for index, name in enumerate(self._rows.domains)
            if sums["tokens"][self._domain == index].sum()
        }
        if self.buckets is not None:
            result["buckets"] = {name: _figures(sums, self.buckets == index) for index, name in enumerate(BUCKETS)}
        return result


def _figures(sums: Mapping[str, np.ndarray], chosen: np.ndarray) -> dict[str, float]:
    total = {name: value[chosen].sum() for name, value in sums.items()}
    tokens, nbytes = max(total["tokens"], 1), max(total["bytes"], 1)
    return {
        "log_perplexity": total["cross_entropy"] / tokens,
        "bits_per_byte": total["cross_entropy"] / np.log(2) / nbytes,
        "accuracy": total["correct"] / tokens,
        "tokens": int(total["tokens"]),
    } | {name: float(value / tokens) for name, value in total.items() if name not in TAKEN}


def _standard_error(sums: Mapping[str, np.ndarray]) -> float:
    """Of the overall log-perplexity, in nats a token, rows being the independent draws (a ratio estimate)."""
    tokens = sums["tokens"].sum()
    mean = sums["cross_entropy"].sum() / max(tokens, 1)
    return float(np.sqrt(((sums["cross_entropy"] - mean * sums["tokens"]) ** 2).sum()) / max(tokens, 1))


def thirds(sums: Mapping[str, np.ndarray]) -> np.ndarray:
    """Bucket of each row: 0 easy, 1 medium, 2 hard, by its mean loss; ties go by position."""
    loss = sums["cross_entropy"] / np.maximum(sums["tokens"], 1)
    ranks = np.empty(len(loss), np.int64)
    ranks[np.argsort(loss, kind="stable")] = np.arange(len(loss))
    return ranks * 3 // max(len(loss), 1)


def bucket_file(rows_dir: Path, name: str, identity: Mapping[str, Any]) -> Path:
    """Where the buckets cut by one model on one choice of rows are kept, beside the rows."""
    digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8).hexdigest()
    return rows_dir / "buckets" / f"{name}-{digest}.json"


def read_buckets(file: Path) -> np.ndarray | None:
    if not file.is_file():
        return None
    return np.asarray(json.loads(file.read_text(encoding="utf-8"))["bucket"], np.int64)


def write_buckets(file: Path, buckets: np.ndarray, row_ids: np.ndarray, identity: Mapping[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    write_json(
        file,
        {"cut_by": dict(identity), "names": BUCKETS, "row_ids": row_ids.tolist(), "bucket": buckets.tolist()},
    )
