"""Lines of plain, gzip, xz and zstd files, with broken streams noticed."""

import contextlib
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from slm_assist.errors import UserError

_BLOCK = 1 << 18


def _zstd(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Decompressed blocks of all frames. (`stream_reader` takes a file cut short for a whole one.)"""
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"{path}: reading .zst needs zstandard: pip install zstandard") from error
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = decompressor.decompressobj()
    started = False
    try:
        while block := file.read(_BLOCK):
            while block:
                started = True
                yield frame.decompress(block)
                block = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame, started = decompressor.decompressobj(), False
    except zstandard.ZstdError as error:
        raise UserError(f"{path}: broken zstd stream ({error}); get the file again") from error
    if started:
        raise EOFError("it ends before its end mark")


def _plain(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(_BLOCK):
        yield block


def _blocks(path: Path, on_bytes: Callable[[int], Any]) -> Iterator[bytes]:
    """Decompressed blocks of a file, by its name's ending."""
    kind = {".gz": "gzip", ".xz": "xz", ".zst": "zstd"}.get(path.suffix, "plain")
    with path.open("rb") as file, contextlib.ExitStack() as stack:
        if kind == "zstd":
            blocks = _zstd(file, path)
        elif kind == "plain":
            blocks = _plain(file)
        else:
            blocks = _plain(stack.enter_context({"gzip": gzip.open, "xz": lzma.open}[kind](file)))
        reported = 0
        try:
            for block in blocks:
                yield block
                on_bytes(file.tell() - reported)
                reported = file.tell()
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
            raise UserError(f"{path}: broken {kind} stream ({error}); get the file again") from error


def lines(path: Path, on_bytes: Callable[[int], Any] = lambda n: None) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that may be compressed, with their numbers from 1, without line ends.

    Raises:
      UserError: the stream is damaged or cut short, or zstandard is missing. Names the file.
    """
    number, parts = 0, []
    for block in _blocks(path, on_bytes):
        *ended, rest = block.split(b"\n")
        for line in ended:
            number += 1
            yield number, b"".join(parts) + line
            parts = []
        parts.append(rest)
    if last := b"".join(parts):
        yield number + 1, last
