"""Documents that are ids already: nanoGPT's and llm.c's `.bin`, and Megatron's `.bin` with `.idx`.

Such files do not say which vocabulary their ids are of, so the user does (`data.vocabulary`); an id that the
vocabulary does not have is an error that names it.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from slm_assist.data.documents import Document, OnBytes
from slm_assist.data.paths import on_this_machine, size_of
from slm_assist.data.tokenizers import Vocabulary
from slm_assist.errors import UserError

LONGEST = 1 << 20  # ids without a mark in a nanoGPT file before it is cut
_BLOCK = 1 << 20  # ids read at a time
_HEADER_BYTES = 1024  # 256 int32
_HEADERS = {20240520: np.dtype("<u2"), 20240801: np.dtype("<u4")}
_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats


def check_ids(ids: np.ndarray, vocabulary: Vocabulary, where: str, first: int = 0) -> None:
    """Raises `UserError` where an id is no piece of the vocabulary (its sentinels are none).

    Args:
      ids: integers [n].
      where: the file, for the error.
      first: the position of ids[0] there.
    """
    size = vocabulary.size - len(getattr(vocabulary, "sentinel_ids", ()))
    if ids.size and not (int(ids.min()) >= 0 and int(ids.max()) < size):
        at = int(np.flatnonzero((ids < 0) | (ids >= size))[0])
        raise UserError(
            f"{where}: id {ids[at]} at position {first + at}, but data.vocabulary has {size} pieces; give the "
            "vocabulary that the ids were made with"
        )


def without_marks(ids: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """`ids` without a BOS in front and an EOS behind, which rows add themselves."""
    if ids.size and ids[0] == vocabulary.bos_id:
        ids = ids[1:]
    if ids.size and ids[-1] == vocabulary.eos_id:
        ids = ids[:-1]
    return ids


def read_nanogpt(path: Path, on_bytes: OnBytes, vocabulary: Vocabulary) -> Iterator[Document]:
    """A stream of ids, cut into documents behind each EOS and before each BOS of the vocabulary.

    Two forms, known by the first 1024 bytes: llm.c's and modded-nanogpt's, a header of 256 int32 (a magic
    number, 20240520 for uint16 or 20240801 for uint32, the version 1, the number of ids) and then the ids; and
    nanoGPT's, uint16 ids alone. Where one id is both BOS and EOS, as in GPT-2, a document ends with it, which
    for files that put it in front only moves it to the neighbour (rows have both marks anyway). Documents
    without content are skipped; `LONGEST` ids without a mark are a document.

    Raises:
      UserError: the file is cut short, or has an id that is not in the vocabulary; names the position.
    """
    size = size_of(path)
    with path.open("rb") as file:
        head = file.read(_HEADER_BYTES)
        dtype, start = _nanogpt_form(path, head, size)
        on_bytes(start)
        rest, first, data = np.empty(0, dtype), 0, head[start:]
        while True:
            read = file.read(_BLOCK * dtype.itemsize)
            data += read
            block = np.frombuffer(data, dtype, len(data) // dtype.itemsize)
            check_ids(block, vocabulary, str(path), first)
            first += len(block)
            documents, rest = _split_at_marks(np.concatenate([rest, block]), vocabulary, last=not read)
            for ids in documents:
                yield Document("", "", ids=ids)
            on_bytes(block.nbytes)
            data = data[block.nbytes :]
            if not read:
                return


def _nanogpt_form(path: Path, head: bytes, size: int) -> tuple[np.dtype, int]:
    """The ids' type and where they start."""
    words = np.frombuffer(head, "<i4") if len(head) == _HEADER_BYTES else [0]
    dtype = _HEADERS.get(int(words[0]))
    if dtype is None:
        if size % 2:
            raise UserError(f"{path}: {size} bytes are no whole number of uint16 ids; get the file again")
        return np.dtype("<u2"), 0
    if words[1] != 1:
        raise UserError(f"{path}: version {words[1]} of its format, only 1 can be read; make the file again")
    if size != _HEADER_BYTES + int(words[2]) * dtype.itemsize:
        raise UserError(f"{path}: its header says {words[2]} ids, its size is {size} bytes; get the file again")
    return dtype, _HEADER_BYTES


def _split_at_marks(ids: np.ndarray, vocabulary: Vocabulary, last: bool) -> tuple[list[np.ndarray], np.ndarray]:
    """Whole documents in `ids`, and what may go on in the next block (nothing if this is the `last`)."""
    bos, eos = vocabulary.bos_id, vocabulary.eos_id
    ends = np.flatnonzero(ids == eos) + 1 if eos is not None else np.empty(0, np.int64)
    starts = np.flatnonzero(ids == bos) if bos is not None and bos != eos else np.empty(0, np.int64)
    outer = np.array([0, len(ids)] if last else [0])
    bounds = np.unique(np.concatenate([outer, ends, starts]))
    pieces = [ids[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    rest = ids[:0] if last else ids[bounds[-1] :]
    while len(rest) > LONGEST:
        pieces, rest = [*pieces, rest[:LONGEST]], rest[LONGEST:]
    documents = [part for piece in pieces for part in _at_most(piece) if len(without_marks(part, vocabulary))]
    return documents, rest


def _at_most(ids: np.ndarray) -> list[np.ndarray]:
    return [ids[i : i + LONGEST] for i in range(0, len(ids), LONGEST)]


def read_megatron(path: Path, on_bytes: OnBytes, vocabulary: Vocabulary) -> Iterator[Document]:
    """Documents of `path` (.bin) as its index beside it (.idx) says; empty ones are skipped.

    Raises:
      UserError: index and data do not belong together or are cut short, or an id is not in the vocabulary.
    """
    with on_this_machine(path) as data, on_this_machine(path.with_suffix(".idx")) as index_file:
        dtype, lengths, pointers, documents = _read_index(path.with_suffix(".idx"), index_file.read_bytes())
        content = np.memmap(data, np.uint8, mode="r")
        ends = pointers + lengths * dtype.itemsize
        if ends.size and (pointers.min() < 0 or lengths.min() < 0 or ends.max() > len(content)):
            raise UserError(f"{path}: {len(content)} bytes, but its index asks for {ends.max()}; get both files again")
        total, reported = len(content) + index_file.stat().st_size, 0
        for number, (begin, end) in enumerate(zip(documents, documents[1:], strict=False)):
            pieces = [content[pointers[i] : ends[i]].view(dtype) for i in range(begin, end) if lengths[i]]
            if pieces:
                ids = np.concatenate(pieces)
                check_ids(ids, vocabulary, f"{path}, document {number}")
                yield Document("", "", ids=ids)
            read = total * (number + 1) // (len(documents) - 1)
            on_bytes(read - reported)
            reported = read


def _read_index(path: Path, raw: bytes) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """The ids' type; lengths [S] and byte offsets [S] of sequences; first sequence of each document, and S."""
    if not raw.startswith(_MEGATRON_MAGIC):
        raise UserError(f"{path}: not a Megatron index (MMIDIDX); give the prefix of a .bin and its .idx")
    try:
        version, code, sequences, documents = struct.unpack_from("<QBQQ", raw, len(_MEGATRON_MAGIC))
        at = len(_MEGATRON_MAGIC) + struct.calcsize("<QBQQ")
        lengths = np.frombuffer(raw, "<i4", sequences, at).astype(np.int64)
        pointers = np.frombuffer(raw, "<i8", sequences, at + 4 * sequences)
        bounds = np.frombuffer(raw, "<i8", documents, at + 12 * sequences)
    except (struct.error, ValueError) as error:
        raise UserError(f"{path}: cut short; get the file again") from error
    if version != 1 or code not in _MEGATRON_DTYPES:
        raise UserError(f"{path}: version {version} with ids of type {code}; only version 1 with integers can be read")
    if documents < 2 or bounds[0] != 0 or bounds[-1] != sequences or (np.diff(bounds) < 0).any():
        raise UserError(f"{path}: its documents do not cover its {sequences} sequences; make the index again")
    return np.dtype(_MEGATRON_DTYPES[code]), lengths, pointers, bounds
