"""Log-perplexity, bits per byte, accuracy, domains, buckets, and the standard error."""

import json

import numpy as np
import pytest
import tiny

from slm_assist.data import rows as rows_lib
from slm_assist.data.sources import open_source
from slm_assist.evals import perplexity
from slm_assist.evals.perplexity import Perplexity, thirds


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    directory = tmp_path_factory.mktemp("evals")
    source = open_source(tiny.corpus(directory / "corpus"), domain_field="meta.pile_set_name")
    return rows_lib.prepare(
        source, vocab_size=384, seq_len=32, validation_fraction=0.2, cache_dir=directory / "cache", cores=1,
        progress=False,
    )  # fmt: skip


def fake_sums(batch):
    """Each token costs as many nats as its target id over 100; even targets are right."""
    mask = batch["mask"]
    return {
        "cross_entropy": (batch["targets"] / 100 * mask).sum(1),
        "correct": ((batch["targets"] % 2 == 0) * mask).sum(1),
        "tokens": mask.sum(1),
    }


@pytest.mark.parametrize("batch_rows", [1, 7, 64])
def test_figures_against_all_tokens_at_once(prepared, batch_rows):
    evaluation = Perplexity(
        prepared.validation, limit=0, batch_rows=batch_rows, token_bytes=prepared.vocabulary.token_bytes
    )
    record = evaluation.record(evaluation.row_sums(fake_sums))
    batch = prepared.validation.get(np.arange(len(prepared.validation)))
    targets = batch["targets"][batch["mask"] > 0]
    nats = targets / 100
    nbytes = sum(
        len(prepared.vocabulary.decode([int(t)]).encode()) for t in targets if prepared.vocabulary.token_bytes[t]
    )
    assert record["tokens"] == len(targets)
    assert record["log_perplexity"] == pytest.approx(nats.mean())
    assert record["accuracy"] == pytest.approx((targets % 2 == 0).mean())
    assert record["bits_per_byte"] == pytest.approx(nats.sum() / np.log(2) / nbytes, rel=0.02)
    tokens = sum(domain["tokens"] for domain in record["domains"].values())
    assert tokens == record["tokens"] and set(record["domains"]) == {"email", "json"}
    mean = sum(d["log_perplexity"] * d["tokens"] for d in record["domains"].values()) / tokens
    assert mean == pytest.approx(record["log_perplexity"])


def test_a_part_of_the_rows_is_always_the_same_part(prepared):
    def make(limit):
        return Perplexity(prepared.validation, limit=limit, batch_rows=4, token_bytes=prepared.vocabulary.token_bytes)

    assert len(make(5).row_ids) == 5 and len(set(make(5).row_ids)) == 5
    np.testing.assert_array_equal(make(5).row_ids, make(5).row_ids)
    assert make(5).fingerprint == make(5).fingerprint != make(6).fingerprint
    assert make(10**6).fingerprint == make(0).fingerprint


def test_standard_error_is_that_of_resampled_rows():
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 50, 400).astype(float)
    sums = {"tokens": tokens, "cross_entropy": tokens * (3 + 0.5 * rng.standard_normal(400))}
    draws = rng.integers(0, 400, (4000, 400))
    resampled = sums["cross_entropy"][draws].sum(1) / tokens[draws].sum(1)
    assert perplexity._standard_error(sums) == pytest.approx(resampled.std(), rel=0.05)


def test_thirds_are_equal_and_ordered():
    loss = np.array([3.0, 1.0, 2.0, 9.0, 5.0, 1.0, 7.0])
    buckets = thirds({"cross_entropy": loss * 2, "tokens": np.full(7, 2.0)})
    assert np.bincount(buckets).tolist() == [3, 2, 2]
    assert loss[buckets == 0].max() <= loss[buckets == 1].min() <= loss[buckets == 2].min()


def test_buckets_are_kept_beside_the_rows(tmp_path):
    identity = {"run": "x", "rows": "y"}
    file = perplexity.bucket_file(tmp_path, "x", identity)
    assert perplexity.read_buckets(file) is None
    perplexity.write_buckets(file, np.array([0, 2, 1]), np.array([4, 5, 6]), identity)
    np.testing.assert_array_equal(perplexity.read_buckets(file), [0, 2, 1])
    assert json.loads(file.read_text())["row_ids"] == [4, 5, 6]
    assert perplexity.bucket_file(tmp_path, "x", identity | {"rows": "z"}) != file
