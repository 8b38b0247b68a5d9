"""Examples to fine-tune on: prompt and answer as one segment of a row, and which of its targets count.

An example is BOS, the prompt's ids, the answer's ids, EOS (the two where the vocabulary has them). Examples stand
whole in rows: within a shard the longest comes first, each in the first row that has room, so that the same shard
gives the same rows anywhere. What is longer than a row is shortened where its prompt says so, else left out; so is
an example without a target that counts. Both are counted.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from slm_assist.data.documents import Document, Prompt
from slm_assist.data.row_store import checksums, majority
from slm_assist.data.tokenizers import Vocabulary
from slm_assist.errors import UserError

FORMAT = 1
COUNTS = ("too_long", "shortened", "without_target")  # beside those of all rows


def left_out(counts: Mapping[str, int]) -> str:
    """What `COUNTS` say, in words with cures; empty if there is nothing to say."""
    said = {
        "too_long": "{:,} longer than a row left out (raise data.seq_len, or set data.shorten)",
        "shortened": "{:,} with a shortened prompt (data.seq_len)",
        "without_target": "{:,} without a target that counts left out (data.learn)",
    }
    return "; ".join(words.format(counts[name]) for name, words in said.items() if counts.get(name))


def describe(splits: Mapping[str, Mapping[str, Any]], seq_len: int) -> str:
    """One line on the examples of both splits, from their entries in meta.json."""
    total = {
        name: sum(split.get(name, 0) for split in splits.values()) for name in ("rows", "documents", "ids", *COUNTS)
    }
    filled = total["ids"] / max(total["rows"] * (seq_len + 1), 1)
    said = [f"{total['documents']:,} whole, {filled:.0%} of the rows filled", left_out(total)]
    return "; ".join(filter(None, said))


def learnt_pattern(learn: str) -> re.Pattern | None:
    """`data.learn` where it is a regular expression; None for "answer" and "all".

    Raises:
      UserError: it is not one.
    """
    if learn in ("answer", "all"):
        return None
    try:
        return re.compile(learn)
    except re.error as error:
        raise UserError(
            f"data.learn={learn!r}: neither answer nor all nor a regular expression ({error}); mend it"
        ) from error


class Example(NamedTuple):
    """An example's ids [n], bool [n] which of them count as targets, and whether its prompt has been shortened."""

    ids: np.ndarray
    learnt: np.ndarray
    shortened: bool


def encode(document: Document, vocabulary: Vocabulary, learn: str, room: int) -> Example | None:
    """A prompt and its answer as ids; None if they are more than `room` and cannot be shortened.

    Prompt and answer are tokenized apart, so that the prompt's ids are those that an answer is generated from.

    Args:
      document: its text is the answer.
      learn: "answer": the answer and EOS count; "all": the prompt too; else a regular expression: of the answer the
        ids that a match touches, and EOS where a match reaches the end.
      room: ids.
    """
    answer, learnt = _answer(document.text, vocabulary, learn)
    head = [] if vocabulary.bos_id is None else [vocabulary.bos_id]
    tail = [] if vocabulary.eos_id is None else [vocabulary.eos_id]
    prompt, shortened = _prompt(document.prompt, vocabulary, room - len(head) - len(answer) - len(tail))
    if prompt is None:
        return None
    counts = np.concatenate([np.full(len(head) + len(prompt), learn == "all"), learnt[: len(answer) + len(tail)]])
    counts[0] = False  # nothing comes before it
    return Example(np.concatenate([head, prompt, answer, tail]).astype(np.int32), counts, shortened)


def _answer(text: str, vocabulary: Vocabulary, learn: str) -> tuple[np.ndarray, np.ndarray]:
    """The ids [n] of an answer, and bool [n + 1] which of them and of the end count."""
    pattern = learnt_pattern(learn)
    if pattern is None:
        ids = vocabulary.encode_array(text)
        return ids, np.ones(len(ids) + 1, bool)
    ids, spans = vocabulary.encode_with_spans(text)
    learnt = np.zeros(len(ids) + 1, bool)
    for match in pattern.finditer(text):
        start, stop = match.span()
        if start < stop:
            # An id without characters is part of what comes next.
            learnt[:-1] |= (spans[:, 0] < stop) & (np.maximum(spans[:, 1], spans[:, 0] + 1) > start)
            learnt[-1] |= stop == len(text)
    return ids, learnt


def _prompt(prompt: Prompt, vocabulary: Vocabulary, room: int) -> tuple[np.ndarray | None, bool]:
    """The ids of a prompt, at most `room`, and whether it had to be shortened; None if it cannot be."""
    ids = vocabulary.encode_array(prompt.text)
    if len(ids) <= room:
        return ids, False
    start, stop = prompt.cut
    before, body, after = prompt.text[:start], prompt.text[start:stop], prompt.text[stop:]
    while body and len(ids) > room:
        _, spans = vocabulary.encode_with_spans(before + body + after)
        firsts = np.unique(spans[:, 0])
        firsts = firsts[(firsts > start) & (firsts < start + len(body))]
        excess = len(ids) - room
        body = body[: firsts[-excess] - start].rstrip() if excess <= len(firsts) else ""
        ids = vocabulary.encode_array(before + body + after)
    return (ids, True) if body else (None, False)


def pack(
    documents: list[Document], domains: list[int], vocabulary: Vocabulary, dtype: np.dtype, learn: str
) -> tuple[np.ndarray, dict[str, int]]:
    """Examples to rows: what a shard becomes.

    Args:
      documents: with prompts; domains: their domains' indices.
      dtype: from `row_store.row_dtype`, with `examples`; learn: as for `encode`.

    Returns:
      The records, and counts: documents (those in the rows), tokens (targets that count), bytes (of their text), and
      `COUNTS`.
    """
    row_ids = dtype["ids"].shape[0]
    found = [encode(document, vocabulary, learn, row_ids) for document in documents]
    counts = {"too_long": sum(example is None for example in found)}
    used = [i for i, example in enumerate(found) if example is not None and example.learnt.any()]
    counts["without_target"] = len(found) - counts["too_long"] - len(used)
    counts["shortened"] = sum(found[i].shortened for i in used)
    lengths = np.array([len(found[i].ids) for i in used], np.int64)
    places = _first_fit(lengths, row_ids)
    n_rows = int(places[:, 0].max(initial=-1)) + 1
    ids = np.full((n_rows, row_ids), vocabulary.pad_id, np.int64)
    starts, learnt = np.zeros((2, n_rows, row_ids), bool)
    domain = np.full((n_rows, row_ids), -1, np.int64)
    for i, length, (row, at) in zip(used, lengths, places, strict=True):
        here = row, slice(at, at + length)
        ids[here], learnt[here], domain[here] = found[i].ids, found[i].learnt, domains[i]
        starts[row, at] = True
    records = np.zeros(n_rows, dtype)
    records["ids"], records["length"] = ids, np.bincount(places[:, 0], lengths, n_rows)
    records["starts"], records["learnt"] = np.packbits(starts, axis=1), np.packbits(learnt, axis=1)
    if n_rows:
        records["domain"] = majority(domain)
        records["checksum"] = checksums(records)
    counts |= {"documents": len(used), "tokens": int(learnt.sum())}
    counts["bytes"] = sum(len((documents[i].prompt.text + documents[i].text).encode()) for i in used)
    return records, counts


def _first_fit(lengths: np.ndarray, room: int) -> np.ndarray:
    """int64 [n, 2]: the row of each example and where it begins there; the longest first, of equals the first."""
    places = np.zeros((len(lengths), 2), np.int64)
    taken = np.zeros(len(lengths), np.int64)  # of as many rows as there can be
    for i in np.argsort(-lengths, kind="stable"):
        row = int(np.argmax(taken + lengths[i] <= room))
        places[i] = row, taken[row]
        taken[row] += lengths[i]
    return places
