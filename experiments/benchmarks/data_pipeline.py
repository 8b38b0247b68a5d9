"""How fast text becomes rows and rows become batches.

    python experiments/benchmarks/data_pipeline.py [--source python:] [--cores 2] [--out result.json]

Prints one JSON object, the figures in tokens/s and MB/s. Preparation is timed cold, into a temporary directory; MB
are 10^6 bytes of text (decompressed), tokens are targets. The loader is timed on one core, in shuffled order, every
row's checksum compared, with the file in the page cache.

Expected FLOPs: none. Expected bytes: the loader reads 4 (T + 1) bytes a row and writes five arrays of 4 T; preparation
reads the text once, and writes 4 bytes a token.
"""

import functools
import itertools
import os
import tempfile
import time
from collections.abc import Iterator

import common

from slm_assist.data.loader import Loader
from slm_assist.data.order import Order
from slm_assist.data.rows import prepare
from slm_assist.data.sources import open_source
from slm_assist.data.tokenizers import Vocabulary, train_vocabulary


def timed(function, *args, **kwargs):
    """The result of a call and the seconds it took."""
    start = time.perf_counter()
    result = function(*args, **kwargs)
    return result, time.perf_counter() - start


def loader_tokens_per_second(rows, batch_rows: list[int], repeats: int) -> dict[str, common.Times]:
    """T * batch_rows * batches / seconds of each batch size, in turn."""
    calls = {}
    batches = {n: max(1, min(200_000, len(rows)) // n // repeats) for n in batch_rows}
    for n in batch_rows:
        calls[n] = functools.partial(read, Loader(rows, Order(len(rows), seed=0), n), itertools.count(), batches[n])
    times = common.interleave(calls, repeats, warmup=0)
    return {
        f"batch_rows={n}": common.Times.of(batches[n] * n * rows.seq_len / seconds for seconds in times[n].all)
        for n in batch_rows
    }


def read(loader: Loader, places: Iterator[int], batches: int) -> None:
    """The next `batches` batches."""
    for n in itertools.islice(places, batches):
        loader.batch_at(n)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--source", default="python:")
    parser.add_argument("--text_field", default="text")
    parser.add_argument("--domain_field", default="")
    parser.add_argument("--vocabulary", help="a SentencePiece model; default: one is learnt")
    parser.add_argument("--vocab_size", type=int, default=2048)
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--batch_rows", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--cores", type=int, default=0, help="0: all")
    args = parser.parse_args()

    fields = {"text_field": args.text_field, "domain_field": args.domain_field}
    source, open_seconds = timed(open_source, args.source, **fields)
    texts, read_seconds = timed(lambda: [d.text for d in source.documents()])
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    if args.vocabulary:
        vocabulary, train_seconds = Vocabulary.load(args.vocabulary), None
    else:
        vocabulary, train_seconds = timed(train_vocabulary, texts, args.vocab_size)
    del texts
    with tempfile.TemporaryDirectory() as cache:
        options = {"vocabulary": vocabulary, "seq_len": args.seq_len, "cache_dir": cache, "cores": args.cores}
        prepared, prepare_seconds = timed(prepare, source, **options)
        _, open_again_seconds = timed(prepare, source, **options)
        tokens = prepared.train.tokens + prepared.validation.tokens
        speeds = loader_tokens_per_second(prepared.train, args.batch_rows, args.rounds)
        result = {
            "source": source.describe(),
            "megabytes_of_text": megabytes,
            "rows": len(prepared.train) + len(prepared.validation),
            "tokens": tokens,
            "seq_len": args.seq_len,
            "vocabulary_pieces": vocabulary.size,
            "seconds": {
                "open_source": open_seconds,
                "read": read_seconds,
                "train_vocabulary": train_seconds,
                "prepare": prepare_seconds,
                "prepare_again": open_again_seconds,
            },
            "read_megabytes_per_second": megabytes / read_seconds,
            "prepare_megabytes_per_second": megabytes / prepare_seconds,
            "prepare_tokens_per_second": tokens / prepare_seconds,
            "loader_tokens_per_second": {name: speed.median for name, speed in speeds.items()},
            "loader_tokens_per_second_range": {name: [speed.low, speed.high] for name, speed in speeds.items()},
            "cores": args.cores or os.cpu_count(),
        }
    common.finish(args, result)


if __name__ == "__main__":
    common.run(main)
