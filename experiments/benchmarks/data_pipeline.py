"""How fast text becomes rows and rows become batches.

    python experiments/benchmarks/data_pipeline.py [--source python:] [--cores 2] [--out result.json]

Prints one JSON object. Preparation is timed cold, into a temporary directory; MB are 10^6 bytes of text
(decompressed), tokens are targets. The loader is timed on one core, in shuffled order, every row's checksum
compared, with the file in the page cache.
"""

import argparse
import json
import os
import platform
import tempfile
import time

import numpy as np

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


def loader_tokens_per_second(rows, batch_rows: int, repeats: int = 5) -> float:
    """Median over `repeats` of T * batch_rows * batches / seconds."""
    loader = Loader(rows, Order(len(rows), seed=0), batch_rows)
    batches = max(1, min(200_000, len(rows)) // batch_rows // repeats)
    speeds = []
    for repeat in range(repeats):
        start = time.perf_counter()
        for n in range(repeat * batches, (repeat + 1) * batches):
            loader.batch_at(n)
        speeds.append(batches * batch_rows * rows.seq_len / (time.perf_counter() - start))
    return float(np.median(speeds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="python:")
    parser.add_argument("--text_field", default="text")
    parser.add_argument("--domain_field", default="")
    parser.add_argument("--vocabulary", help="a SentencePiece model; default: one is learnt")
    parser.add_argument("--vocab_size", type=int, default=2048)
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--batch_rows", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--cores", type=int, default=0, help="0: all")
    parser.add_argument("--out", help="also write the result to this file")
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
            "loader_tokens_per_second": {
                f"batch_rows={n}": loader_tokens_per_second(prepared.train, n) for n in args.batch_rows
            },
            "cores": args.cores or os.cpu_count(),
            "load_average": os.getloadavg()[0],
            "machine": f"{platform.machine()}, {platform.platform()}, Python {platform.python_version()}",
        }
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        with open(args.out, "w") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
