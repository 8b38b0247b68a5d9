"""What a source gives: documents in a fixed order, and a fingerprint that says which."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slm_assist.data.paths import is_remote
from slm_assist.errors import UserError

OnBytes = Callable[[int], Any]


class Prompt(NamedTuple):
    """What stands before an answer; of the characters `cut`, from and up to, the last ones may be left out."""

    text: str
    cut: tuple[int, int] = (0, 0)


class Document(NamedTuple):
    """A text, the domain it is counted under, and its split where the source decides that (else None).

    A pre-tokenised document has `ids`, integers [n] of the vocabulary in use, and an empty text. An example to
    fine-tune on has a prompt, and its text is the answer.
    """

    text: str
    domain: str
    split: str | None = None
    ids: np.ndarray | None = None
    prompt: Prompt | None = None


class Part(NamedTuple):
    """A file of a source (or what stands for one) and how to read it.

    `digest` and `options` make the fingerprint, together with `domain`, which documents without a domain of
    their own get, and `split`. `size` is in bytes, what `read` reports to its second argument in the end.
    """

    path: Path
    size: int
    digest: str
    domain: str
    read: Callable[[Path, OnBytes], Iterator[Document]]
    split: str | None = None
    options: str = ""


class Source:
    """A corpus: the same documents in the same order as long as the fingerprint is the same.

    Attributes:
      spec: as the user wrote it.
      fingerprint: hex, over the contents of all files and what is made of them. (Of remote files, over their
        paths, sizes and times of change: reading a bucket twice would cost too much.)
      total_bytes: size of all files (compressed, where they are), the total that `on_bytes` counts up to.
      splits: whether the source itself says which documents are for validation.
      pretokenised: whether its documents are ids instead of text, which needs their vocabulary.
      examples: whether its documents are prompts and answers.
    """

    def __init__(
        self,
        spec: str,
        parts: list[Part],
        note: str = "",
        *,
        pretokenised: bool = False,
        splits: bool = False,
        examples: bool = False,
    ):
        self.spec = spec
        self.pretokenised, self.examples = pretokenised, examples
        self.splits = splits or any(part.split for part in parts)
        self.total_bytes = sum(part.size for part in parts)
        self._parts, self._note = parts, note
        digest = hashlib.blake2b(digest_size=16)
        for part in parts:
            digest.update(f"{part.digest} {part.domain} {part.split} {part.options}\n".encode())
        self.fingerprint = digest.hexdigest()

    def documents(self, on_bytes: OnBytes = lambda n: None) -> Iterator[Document]:
        """All documents, in a fixed order; `on_bytes` is called with how many more bytes have been read.

        Raises:
          UserError: a file cannot be read as what it should be; names the file and the line or byte.
        """
        for part in self._parts:
            # Each remote file system has exceptions of its own.
            broken = Exception if is_remote(part.path) else OSError
            documents = part.read(part.path, on_bytes)
            while True:
                try:
                    document = next(documents, None)
                except UserError:
                    raise
                except broken as error:
                    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                    raise UserError(f"{part.path}: cannot be read ({reason.splitlines()[0]})") from error
                if document is None:
                    break
                yield document._replace(domain=document.domain or part.domain, split=part.split or document.split)

    def describe(self) -> str:
        """One line: the spec, files, size, what was left out, fingerprint."""
        files = f"{len(self._parts)} file{'s' * (len(self._parts) != 1)}"
        note = f", {self._note}" if self._note else ""
        return f"{self.spec} ({files}, {self.total_bytes / 1e6:.1f} MB{note}; fingerprint {self.fingerprint})"
