"""Rows: training sequences of fixed length, as records in one file that is mapped, not read.

A row holds T + 1 ids, so that it gives T targets. A record is a row with its document starts, its length
without padding, its domain, and a checksum that is compared every time the row is read: damage is found where
it matters, at no cost at the start, however large the corpus. The files hold plain numbers and nothing that
could run.
"""

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from slm_assist.data.objectives import causal
from slm_assist.data.tokenizers import Vocabulary
from slm_assist.errors import UserError


def row_dtype(seq_len: int, vocab_size: int, *, examples: bool = False) -> np.dtype:
    """The record of one row; `starts` are bits, `ids` take 16 bits where the vocabulary allows.

    Rows of `examples` have `learnt` too, bits that say which ids count as targets.
    """
    bits = ("u1", (-(-(seq_len + 1) // 8),))
    fields = [
        ("checksum", "<u4"),
        ("length", "<i4"),
        ("domain", "<i4"),
        ("starts", *bits),
        ("ids", "<u2" if vocab_size <= 1 << 16 else "<u4", (seq_len + 1,)),
    ]
    return np.dtype([*fields, ("learnt", *bits)] if examples else fields)


def checksums(records: np.ndarray) -> np.ndarray:
    """CRC-32 of each record behind its checksum."""
    raw = np.ascontiguousarray(records).view(np.uint8).reshape(len(records), -1)
    return np.array([zlib.crc32(row[4:]) for row in raw], np.uint32)


def pack(
    documents: list[np.ndarray], domains: list[int], vocabulary: Vocabulary, dtype: np.dtype
) -> tuple[np.ndarray, int]:
    """Documents' ids, one after another, chopped into rows: what a shard becomes.

    Each document gets BOS and EOS where the vocabulary has them. The last row is padded, and left out if it
    would hold a single id.

    Args:
      documents: ids of each document; domains: their domains' indices.
      dtype: from `row_dtype`.

    Returns:
      The records, and the number of targets in them (the sum of the mask).
    """
    head = [] if vocabulary.bos_id is None else [[vocabulary.bos_id]]
    tail = [] if vocabulary.eos_id is None else [[vocabulary.eos_id]]
    row_ids = dtype["ids"].shape[0]
    lengths = np.array([len(head) + len(ids) + len(tail) for ids in documents], np.int64)
    total = int(lengths.sum())
    n_rows = total // row_ids + (total % row_ids >= 2)
    kept = min(total, n_rows * row_ids)

    def rows_of(values, fill, kind):
        flat = np.full(n_rows * row_ids, fill, kind)
        flat[:kept] = values[:kept]
        return flat.reshape(n_rows, row_ids)

    starts = np.zeros(total, bool)
    starts[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
    ids = np.concatenate([part for ids in documents for part in (*head, ids, *tail)])
    records = np.zeros(n_rows, dtype)
    records["ids"] = rows_of(ids, vocabulary.pad_id, records["ids"].dtype)
    starts_NxR = rows_of(starts, False, bool)
    records["starts"] = np.packbits(starts_NxR, axis=1)
    records["length"] = np.minimum(kept - np.arange(n_rows) * row_ids, row_ids)
    records["domain"] = majority(rows_of(np.repeat(domains, lengths), -1, np.int64))
    records["checksum"] = checksums(records)
    mask = causal(records["ids"], starts_NxR, records["length"])["mask"]
    return records, int(mask.sum())


def majority(domain_NxR: np.ndarray) -> np.ndarray:
    """The commonest domain >= 0 of each row; of equals, the lowest."""
    present = np.unique(domain_NxR[domain_NxR >= 0])
    counts = np.stack([(domain_NxR == domain).sum(axis=1) for domain in present])
    return present[counts.argmax(axis=0)]


class Rows:
    """Prepared rows of one split.

    Attributes:
      seq_len: T.
      domains: names, indexed by the `domain` that `get` returns.
      tokens: number of targets in all rows, the sum of all masks.
      fingerprint: hex, over the vocabulary and the contents of all rows.
      vocabulary: the vocabulary of the ids.
      examples: whether they are made of prompts and answers, of which only some targets count.
    """

    def __init__(self, path: Path, meta: dict, seq_len: int, vocabulary: Vocabulary, *, examples: bool = False):
        """Maps the file `path`; `meta` is its entry in meta.json. UserError if its size is not as noted."""
        self.seq_len, self.vocabulary, self.examples, self._path = seq_len, vocabulary, examples, path
        self.domains: list[str] = list(meta["domains"])
        self.tokens: int = meta["tokens"]
        self.fingerprint: str = meta["fingerprint"]
        dtype = row_dtype(seq_len, vocabulary.size, examples=examples)
        size, written = path.stat().st_size if path.exists() else 0, meta["rows"] * dtype.itemsize
        if size != written:
            raise UserError(f"{path}: {size} bytes where {written} were written; delete {path.parent}")
        self._records = np.memmap(path, dtype, mode="r", shape=(meta["rows"],))
        self._domain: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._records)

    def get(
        self, row_ids: np.ndarray, objective: Callable[..., dict] = causal, keys: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Rows as arrays: those of the objective (see objectives.py), and domain, int32 [N].

        The mask of examples is 1 where the target also counts; their objective is `causal`.

        Args:
          row_ids: int64 [N].
          objective: what the rows ask of the model.
          keys: uint64 [N], what the objective draws from; `causal` needs none.

        Raises:
          UserError: a row is not what was written.
        """
        records = self._read(row_ids)
        starts = np.unpackbits(records["starts"], axis=1, count=self.seq_len + 1).view(bool)
        arrays = objective(records["ids"], starts, records["length"], keys)
        if self.examples:
            learnt = np.unpackbits(records["learnt"], axis=1, count=self.seq_len + 1)
            arrays["mask"] = arrays["mask"] * learnt[:, 1:]
        return arrays | {"domain": np.ascontiguousarray(records["domain"], dtype=np.int32)}

    def all_ids(self, at_once: int = 4096) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All tokens in the order of the rows, the ids of `at_once` rows at a time, one row behind the other.

        Yields:
          ids: int32 [n], without padding; starts: bool [n], True where a document or a row begins, so that what
            stands before is not the context of what follows.
        """
        for first in range(0, len(self), at_once):
            records = self._read(np.arange(first, min(first + at_once, len(self))))
            starts = np.unpackbits(records["starts"], axis=1, count=self.seq_len + 1).view(bool)
            starts[:, 0] = True
            text = np.arange(self.seq_len + 1) < records["length"][:, None]
            yield records["ids"][text].astype(np.int32), starts[text]

    def domain(self, row_ids: np.ndarray) -> np.ndarray:
        """int32 [N], indices into `domains`, without reading the rows (or noticing damage in them)."""
        return self._records["domain"][np.asarray(row_ids, np.int64)].astype(np.int32)

    def all_domains(self) -> np.ndarray:
        """int32 [rows], the domain of every row; read once, then kept. Not to be written to."""
        if self._domain is None:
            self._domain = self._records["domain"].astype(np.int32)
            self._domain.flags.writeable = False
        return self._domain

    def text(self, row_id: int) -> str:
        """The text of a row; documents follow each other without a mark."""
        record = self._read(np.array([row_id]))[0]
        return self.vocabulary.decode(record["ids"][: record["length"]])

    def _read(self, row_ids: np.ndarray) -> np.ndarray:
        row_ids = np.asarray(row_ids, np.int64)
        records = np.asarray(self._records[row_ids])
        damaged = row_ids[checksums(records) != records["checksum"]]
        if damaged.size:
            raise UserError(
                f"{self._path}: row {damaged[0]} is damaged on disk; delete {self._path.parent}, the same "
                "command makes it again"
            )
        return records
