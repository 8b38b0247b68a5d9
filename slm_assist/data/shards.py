"""Documents to shards to rows: the one way in which every preparation, on one host or many, makes its bytes.

Documents are taken in order and split into train and validation; a fixed span of documents of one split is a
shard, which is tokenized and packed by itself. Shards are numbered as they are closed. (Threads, since
SentencePiece works outside the interpreter's lock: they need no start-up and no `if __name__ == "__main__"`
in the caller's script.)
"""

import contextlib
import hashlib
import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from slm_assist.data import examples
from slm_assist.data.documents import Document, OnBytes, Source
from slm_assist.data.pretokenised import check_ids, without_marks
from slm_assist.data.row_store import pack, row_dtype
from slm_assist.data.tokenizers import Vocabulary
from slm_assist.errors import UserError

FORMAT = 1
SPLITS = ("train", "validation")
SHARD_CHARACTERS = 1_000_000  # a shard of long documents is closed earlier: even work, bounded memory
_CHARACTERS_OF_AN_ID = 4  # about, for that limit


class Corpus:
    """The documents of one or two sources, each with its split.

    Args:
      validation: a source that is all for validation; then all of `source` is for training.
      fraction: of the documents that are for validation, by a hash of their content, where no source decides.
    """

    def __init__(self, source: Source, validation: Source | None, fraction: float, progress: bool):
        self._source, self._validation, self._progress = source, validation, progress
        self._threshold = int(fraction * 2**64)

    def _split(self, document: Document) -> str:
        if self._validation:
            return "train"
        if document.split:
            return document.split
        if document.prompt is not None:  # a prompt with several answers stays on one side
            content = document.prompt.text.encode()
        elif document.ids is None:
            content = document.text.encode()
        else:
            content = np.ascontiguousarray(document.ids, "<i8").tobytes()
        digest = hashlib.blake2b(content, digest_size=8).digest()
        return "validation" if int.from_bytes(digest, "big") < self._threshold else "train"

    def bar(self, label: str) -> tqdm:
        """A progress bar over the bytes of all files."""
        total = self._source.total_bytes + (self._validation.total_bytes if self._validation else 0)
        return tqdm(total=total or None, desc=label, unit="B", unit_scale=True, disable=not self._progress)

    def documents(self, on_bytes: OnBytes, vocabulary: Vocabulary | None = None) -> Iterator[Document]:
        """All documents with their split; ids are checked against `vocabulary`, which they need."""
        for document in _checked(self._source, on_bytes, vocabulary):
            yield document._replace(split=self._split(document))
        for document in _checked(self._validation, on_bytes, vocabulary) if self._validation else ():
            yield document._replace(split="validation")

    def training_texts(self) -> Iterator[str]:
        """What a vocabulary is learnt from."""
        with self.bar("vocabulary") as bar:
            for document in self.documents(bar.update):
                if document.split == "train":
                    yield (document.prompt.text if document.prompt else "") + document.text


def _checked(source: Source, on_bytes: OnBytes, vocabulary: Vocabulary | None) -> Iterator[Document]:
    for number, document in enumerate(source.documents(on_bytes)):
        if document.ids is not None:
            if vocabulary is None:
                raise UserError(f"source {source.spec}: it holds ids, not text; set data.vocabulary")
            check_ids(document.ids, vocabulary, f"{source.spec}, document {number}")
        yield document


class Shard:
    """Documents on their way into rows; `bytes_read` is how far the files were read when it was closed."""

    def __init__(self, split: str):
        self.split = split
        self.documents: list[str | np.ndarray | Document] = []  # examples stay documents
        self.domains: list[int] = []
        self.characters = 0
        self.bytes_read = 0

    def add(self, document: Document, domain: int) -> None:
        content = document.text if document.ids is None else document.ids
        self.documents.append(document if document.prompt else content)
        self.domains.append(domain)
        self.characters += len(content) * (1 if document.ids is None else _CHARACTERS_OF_AN_ID)
        self.characters += len(document.prompt.text) if document.prompt else 0


def cut(
    corpus: Corpus, vocabulary: Vocabulary, shard_documents: int, domains: dict[str, dict[str, int]]
) -> Iterator[Shard]:
    """The corpus in shards; fills `domains[split]` with the index of each domain, numbered as they come."""
    bytes_read = 0

    def count(n: int) -> None:
        nonlocal bytes_read
        bytes_read += n

    filling = {split: Shard(split) for split in SPLITS}
    for document in corpus.documents(count, vocabulary):
        split = document.split
        shard, names = filling[split], domains[split]
        shard.add(document, names.setdefault(document.domain, len(names)))
        if len(shard.documents) >= shard_documents or shard.characters >= SHARD_CHARACTERS:
            shard.bytes_read, filling[split] = bytes_read, Shard(split)
            yield shard
    for shard in filling.values():
        shard.bytes_read = bytes_read
        if shard.documents:
            yield shard


class Packed(NamedTuple):
    """What a shard became: its number among all shards, its rows, and counts of what is in them."""

    index: int
    split: str
    records: np.ndarray
    counts: dict[str, int]
    bytes_read: int

    @property
    def data(self) -> memoryview:
        """The bytes of the rows; there may be none."""
        return memoryview(self.records.view(np.uint8))


COUNTS = ("rows", "documents", "ids", "tokens", "bytes")
EXAMPLE_COUNTS = (*COUNTS, *examples.COUNTS)


def _pack_shard(index: int, shard: Shard, vocabulary: Vocabulary, dtype: np.dtype, learn: str | None = None) -> Packed:
    if learn is not None:
        records, counts = examples.pack(shard.documents, shard.domains, vocabulary, dtype, learn)
        counts |= {"rows": len(records), "ids": int(records["length"].sum())}
        return Packed(index, shard.split, records, {name: counts[name] for name in EXAMPLE_COUNTS}, shard.bytes_read)
    ids, size = [], 0
    for content in shard.documents:
        if isinstance(content, str):
            ids.append(vocabulary.encode_array(content))
            size += len(content.encode())
        else:
            ids.append(without_marks(content, vocabulary))
            size += int(vocabulary.token_bytes[ids[-1]].sum())
    records, tokens = pack(ids, shard.domains, vocabulary, dtype)
    counts = (len(records), len(shard.documents), int(records["length"].sum()), tokens, size)
    return Packed(index, shard.split, records, dict(zip(COUNTS, counts, strict=True)), shard.bytes_read)


class Packer:
    """All rows of a corpus, or those of the shards whose number is `part[0]` modulo `part[1]`, in order.

    Of examples `learn` says which targets count (see examples.py); None: the documents are none.

    After iterating, `shards` is the number of all shards, and `domains[split]` has every domain's index.
    """

    def __init__(self, corpus: Corpus, vocabulary: Vocabulary, seq_len: int, *, cores: int, shard_documents: int,
                 part: tuple[int, int] = (0, 1), learn: str | None = None):  # fmt: skip
        self.shards = 0
        self.domains: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
        self._corpus, self._vocabulary, self._cores = corpus, vocabulary, cores
        self._dtype = row_dtype(seq_len, vocabulary.size, examples=learn is not None)
        self._shard_documents, self._part, self._learn = shard_documents, part, learn

    def __iter__(self) -> Iterator[Packed]:
        pending: deque[Future[Packed]] = deque()
        mine, parts = self._part
        label = "rows" if parts == 1 else f"rows, part {mine}/{parts}"
        with contextlib.ExitStack() as stack:
            pool = ThreadPoolExecutor(self._cores, thread_name_prefix="rows")
            stack.callback(pool.shutdown, cancel_futures=True)
            bar = stack.enter_context(self._corpus.bar(label))

            def done(at_most: int) -> Iterator[Packed]:
                while len(pending) > at_most:
                    packed = pending.popleft().result()
                    yield packed
                    bar.update(packed.bytes_read - bar.n)

            for shard in cut(self._corpus, self._vocabulary, self._shard_documents, self.domains):
                if self.shards % parts == mine:
                    job = (self.shards, shard, self._vocabulary, self._dtype, self._learn)
                    pending.append(pool.submit(_pack_shard, *job))
                self.shards += 1
                yield from done(at_most=2 * self._cores)
            yield from done(at_most=0)


class SplitWriter:
    """The file of one split: the rows of its shards are appended in order."""

    def __init__(self, path: Path, vocabulary: Vocabulary, seq_len: int):
        self.file = path.open("wb")
        seed = f"{FORMAT} {vocabulary.fingerprint} {seq_len}"
        self._digest = hashlib.blake2b(seed.encode(), digest_size=16)
        self._counts = dict.fromkeys(COUNTS, 0)

    def append(self, data: memoryview | bytes, counts: dict[str, int]) -> None:
        """Adds a shard's records, as bytes, and what is in them."""
        self.file.write(data)
        self._digest.update(data)
        for name, value in counts.items():
            self._counts[name] = self._counts.get(name, 0) + value

    def finish(self, domains: list[str]) -> dict[str, Any]:
        """Closes the file; returns its entry for meta.json."""
        self.file.close()
        self._digest.update(json.dumps(domains).encode())
        return self._counts | {"domains": domains, "fingerprint": self._digest.hexdigest()}


@contextlib.contextmanager
def writers(directory: Path, vocabulary: Vocabulary, seq_len: int) -> Iterator[dict[str, SplitWriter]]:
    """The files of both splits in `directory`, closed at the end whatever happens."""
    with contextlib.ExitStack() as stack:
        files = {split: SplitWriter(directory / f"{split}.rows", vocabulary, seq_len) for split in SPLITS}
        for writer in files.values():
            stack.enter_context(writer.file)
        yield files


def write_rows(packer: Packer, directory: Path, vocabulary: Vocabulary, seq_len: int) -> dict[str, dict[str, Any]]:
    """Writes both splits' files; returns their entries for meta.json."""
    with writers(directory, vocabulary, seq_len) as files:
        for packed in packer:
            files[packed.split].append(packed.data, packed.counts)
        return {split: writer.finish(list(packer.domains[split])) for split, writer in files.items()}
