"""A corpus prepared by many processes or hosts: parts, and the merge that gives what one process gives.

Process i of n reads all documents (a shard's limits depend on those before it; reading costs little beside
tokenizing) and packs the shards whose number is i modulo n. Its part is a directory beside the final one,
which appears when it is whole:

    KEY.parts/00002-of-00008/
      part.json        shards in it, how many there are in all, domains, the vocabulary's fingerprint
      tokenizer/       the vocabulary
      shards.bin       their rows, one shard after another

KEY is that of the whole preparation. Where hosts share no disk, collect the directories under KEY.parts of
one cache; the next `prepare` there merges them. Where no vocabulary is given, each process learns the same
one from the same text.
"""

import json
import logging
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slm_assist.data import cache_dir
from slm_assist.data.shards import EXAMPLE_COUNTS, SPLITS, Packer, writers
from slm_assist.data.tokenizers import Vocabulary
from slm_assist.errors import UserError

FORMAT = 1
_log = logging.getLogger(__name__)


def parse(text: str) -> tuple[int, int]:
    """`i/n`, as `--part` has it, to (i, n).

    Raises:
      UserError: it is not that, or i is not in [0, n).
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise UserError(f"--part={text}: write i/n with i from 0 to n-1, as 0/4, 1/4, 2/4 and 3/4 on four hosts")
    return int(match[1]), int(match[2])


def directory_of(parts: Path, part: tuple[int, int]) -> Path:
    """Where a part stands once it is whole."""
    return parts / f"{part[0]:05d}-of-{part[1]:05d}"


def write(parts: Path, part: tuple[int, int], make: Callable[[], tuple[Packer, Vocabulary]], seq_len: int) -> None:
    """Makes one part, unless it is there; `make` gives a Packer for it and the vocabulary.

    Raises:
      OSError: it cannot be written. Nothing is left.
    """
    place = directory_of(parts, part)
    if (place / "part.json").exists():
        _log.warning("part %d/%d is there already: %s", *part, place)
        return
    parts.parent.mkdir(parents=True, exist_ok=True)
    with cache_dir.scratch(parts.parent) as scratch:
        packer, vocabulary = make()
        vocabulary.save(scratch / "tokenizer")
        shards = []
        with (scratch / "shards.bin").open("wb") as file:
            for packed in packer:
                data = packed.data
                file.write(data)
                counts = list(packed.counts.values())  # in the order of EXAMPLE_COUNTS, which begins with COUNTS
                shards.append([packed.index, packed.split, data.nbytes, zlib.crc32(data), *counts])
        entry = {
            "format": FORMAT,
            "part": list(part),
            "seq_len": seq_len,
            "vocabulary": vocabulary.fingerprint,
            "domains": {split: list(packer.domains[split]) for split in SPLITS},
            "all_shards": packer.shards,
            "shards": shards,
        }
        (scratch / "part.json").write_text(json.dumps(entry) + "\n")
        cache_dir.sync(scratch)
        parts.mkdir(exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)  # without part.json: not one of ours, or damaged
        cache_dir.install(scratch, place)


def complete(parts: Path) -> list[Path] | None:
    """The directories of a whole set of parts, in order, or None where some are missing."""
    found: dict[int, list[Path]] = {}
    for file in sorted(parts.glob("*-of-*/part.json")):
        i, n = (int(number) for number in file.parent.name.split("-of-"))
        found.setdefault(n, []).append(file.parent)
    return next((places for n, places in found.items() if len(places) == n), None)


def merge(places: list[Path], directory: Path, seq_len: int) -> tuple[Vocabulary, dict[str, dict[str, Any]]]:
    """Writes the files of both splits into `directory`; returns the vocabulary and the entries for meta.json.

    Raises:
      UserError: a part is damaged, or of another vocabulary than the first; names it.
    """
    entries = [_read(place) for place in places]
    first = entries[0]
    for place, entry in zip(places, entries, strict=True):
        for name in ("vocabulary", "domains", "all_shards"):
            if entry[name] != first[name]:
                raise UserError(
                    f"{place}: another {name.replace('_', ' ')} than in {places[0].name} (other versions of the "
                    "software, or of the files?); delete it and prepare it again, with data.vocabulary set"
                )
    vocabulary = Vocabulary.load(places[0] / "tokenizer")
    files = [(place / "shards.bin").open("rb") for place in places]
    try:
        with writers(directory, vocabulary, seq_len) as out:
            queues = [iter(entry["shards"]) for entry in entries]
            for number in range(first["all_shards"]):
                of = number % len(places)
                index, split, size, checksum, *counts = next(queues[of], (-1, "", 0, 0))
                data = files[of].read(size)
                if index != number or len(data) != size or zlib.crc32(data) != checksum:
                    raise UserError(f"{places[of]}: shard {number} is damaged; delete it and prepare it again")
                out[split].append(data, dict(zip(EXAMPLE_COUNTS, counts, strict=False)))  # text has the first few
            return vocabulary, {split: out[split].finish(first["domains"][split]) for split in SPLITS}
    finally:
        for file in files:
            file.close()


def _read(place: Path) -> dict[str, Any]:
    try:
        entry = json.loads((place / "part.json").read_text())
        if entry["format"] != FORMAT:
            raise UserError(f"{place}: of format {entry['format']}, this version reads {FORMAT}; delete it")
        if directory_of(place.parent, tuple(entry["part"])) != place:
            raise UserError(f"{place}: it holds part {entry['part']}; give it its name back")
        entry["shards"], entry["domains"], entry["all_shards"], entry["vocabulary"]  # all are there
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{place / 'part.json'}: missing or damaged; delete {place} and prepare it again") from error
    return entry
