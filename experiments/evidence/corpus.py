"""The text of the measurement, split so that nothing tried on one part says anything about another.

Four parts: train, other (for helpers that have read other text than their students), validation (choices are made on
it) and test (opened once). A document that is held out is so with all its pieces (`meta.source` before `#`), by a
stable hash; one domain is never trained on. Each part is a file `PART.jsonl.xz`, in the form that
`data.source=jsonl:` reads; corpus.json says what is in them.
"""

import contextlib
import dataclasses
import hashlib
import json
import lzma
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from slm_assist.data import compressed
from slm_assist.data.paths import find
from slm_assist.errors import UserError
from slm_assist.metrics import write_json

TRAIN, OTHER, VALIDATION, TEST = "train", "other", "validation", "test"
PARTS = (TRAIN, OTHER, VALIDATION, TEST)
DOMAIN_FIELD = "meta.pile_set_name"


@dataclasses.dataclass(frozen=True)
class Split:
    """How a corpus is split; corpus.json repeats it.

    Attributes:
      unseen: the domain that is never trained on.
      held_out: share of the documents for validation, and as much again for the test.
      train_share: share of the documents left that is kept to train on; other_share: for part `other`.
      most_bytes: of a document in validation and test, its beginning; of a domain there, `domain_bytes`.
    """

    unseen: str = "Speeches"
    held_out: float = 0.08
    train_share: float = 0.08
    other_share: float = 0.06
    most_bytes: int = 4_000
    domain_bytes: int = 60_000


def make(globs: str, out: Path, split: Split, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Writes the parts into `out` unless they are there already, made of the same files in the same way.

    Args:
      globs: of the files, JSON lines in the Pile's form, perhaps compressed; commas between them.

    Returns:
      What corpus.json says.

    Raises:
      UserError: no files, or `out` holds the parts of something else.
    """
    files = find(f"jsonl:{globs}", globs)
    made = {"files": [[path.name, path.stat().st_size] for path in files], "split": dataclasses.asdict(split)}
    note = out / "corpus.json"
    if note.is_file():
        found = json.loads(note.read_text(encoding="utf-8"))
        if {key: found.get(key) for key in made} != json.loads(json.dumps(made)):
            raise UserError(f"{note}: these parts were made of other files or otherwise; use another --out")
        return found
    say(f"splitting {len(files)} files into {', '.join(PARTS)}")
    out.mkdir(parents=True, exist_ok=True)
    counts = _write(files, out, split)
    if split.unseen not in counts[TEST]:
        raise UserError(f"--unseen={split.unseen}: no such domain; there are {', '.join(sorted(counts[TRAIN]))}")
    result = made | {"parts": counts, "digests": {part: _digest(part_file(out, part)) for part in PARTS}}
    write_json(note, result)
    return result


def part_file(out: Path, part: str) -> Path:
    return out / f"{part}.jsonl.xz"


def documents(out: Path, part: str) -> Iterator[tuple[str, str, str]]:
    """(domain, name, text) of each document of a part, in its order; the pieces of one have one name."""
    with lzma.open(part_file(out, part), "rt", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            yield record["meta"]["pile_set_name"], _stem(record), record["text"]


def part_of(domain: str, name: str, piece: str, split: Split) -> str:
    """Where a piece of a document goes; an empty string for one that is left out."""
    place = _uniform("part", name)
    if domain == split.unseen:
        return VALIDATION if place < 0.5 else TEST
    if place < 2 * split.held_out:
        return VALIDATION if place < split.held_out else TEST
    place = _uniform("train", piece)
    if place < split.train_share:
        return TRAIN
    return OTHER if place < split.train_share + split.other_share else ""


def _write(files: list[Path], out: Path, split: Split) -> dict[str, dict[str, dict[str, int]]]:
    """Writes the parts; documents and bytes of each domain in each."""
    bytes_of: dict[str, Counter] = defaultdict(Counter)
    documents_of: dict[str, dict[str, set]] = defaultdict(lambda: defaultdict(set))
    used: Counter = Counter()  # bytes of each held-out document so far
    partial = {part: part_file(out, part).with_suffix(".partial") for part in PARTS}
    with contextlib.ExitStack() as stack:
        for path in partial.values():
            stack.callback(path.unlink, missing_ok=True)  # of files that cannot be read nothing stays
        writers = {
            part: stack.enter_context(lzma.open(path, "wt", encoding="utf-8", preset=1))
            for part, path in partial.items()
        }
        for record in _records(files):
            domain, name, text = record["meta"]["pile_set_name"], _stem(record), record["text"]
            part = part_of(domain, name, _piece(record), split)
            if part in (VALIDATION, TEST):
                left = min(split.most_bytes - used[name], split.domain_bytes - bytes_of[part][domain])
                text = text.encode()[: max(left, 0)].decode(errors="ignore")
            if not part or not text:
                continue
            size = len(text.encode())
            used[name] += size
            bytes_of[part][domain] += size
            documents_of[part][domain].add(name)
            writers[part].write(json.dumps(record | {"text": text}, ensure_ascii=False) + "\n")
        for part, path in partial.items():
            writers[part].close()
            path.rename(part_file(out, part))
    return {
        part: {
            domain: {"documents": len(documents_of[part][domain]), "bytes": bytes_of[part][domain]}
            for domain in sorted(bytes_of[part])
        }
        for part in PARTS
    }


def _records(files: list[Path]) -> Iterator[Mapping[str, Any]]:
    for path in files:
        for number, line in compressed.lines(path, lambda _: None):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                record["text"].encode(), record["meta"]["pile_set_name"].encode()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{path}, line {number}: not a record of the Pile's form, with text and "
                                f"meta.pile_set_name ({error!r})") from error  # fmt: skip
            yield record


def _piece(record: Mapping[str, Any]) -> str:
    """The name of a record; one without a name goes by its text."""
    meta = record["meta"]
    name = meta.get("source") or hashlib.blake2b(record["text"].encode(), digest_size=8).hexdigest()
    return f"{meta['pile_set_name']}/{name}"


def _stem(record: Mapping[str, Any]) -> str:
    """What a record was cut from."""
    return _piece(record).partition("#")[0]


def _uniform(what: str, name: str) -> float:
    """In [0, 1), the same for a name for ever."""
    return int.from_bytes(hashlib.blake2b(f"{what} {name}".encode(), digest_size=8).digest(), "big") / 2**64


def _digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
