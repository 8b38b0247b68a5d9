"""The parts of the text share no document, whatever the files; and held-out rows are documents, counted one by one."""

import dataclasses
import gzip
import json
import lzma
import shutil

import evidence_made
import jax
import numpy as np
import pytest

from slm_assist.data.tokenizers import train_vocabulary
from slm_assist.errors import UserError
from slm_assist.models import ModelConfig, Transformer

WORDS = ("salt", "water", "stone", "river", "light", "wind", "ash", "birch", "über", "→")


@pytest.fixture(scope="module")
def evidence():
    with evidence_made.scripts() as found:
        yield found


def records(domains=("Wiki", "Code", "Speeches"), documents=60):
    """Documents of one to three pieces that stand apart from each other; some have no name."""
    rng = np.random.default_rng(0)
    found = []
    for domain in domains:
        for i in range(documents):
            for piece in range(1 + i % 3):
                text = " ".join(rng.choice(WORDS, 5 + i % 40)) + f" {domain} {i}.{piece}"
                meta = {"pile_set_name": domain} | ({} if i % 20 == 3 else {"source": f"file {i}#{piece}"})
                found.append({"text": text, "meta": meta})
    return [found[i] for i in rng.permutation(len(found))]


def write(path, found):
    opened = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in found)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    found = records()
    write(folder / "a.jsonl.xz", found[:150])
    write(folder / "b.jsonl.gz", found[150:])
    return folder


@pytest.fixture(scope="module")
def split(evidence):
    return evidence.corpus.Split(
        held_out=0.2, train_share=0.5, other_share=0.3, most_bytes=500, domain_bytes=4000, unseen="Speeches"
    )


@pytest.fixture(scope="module")
def made(evidence, source, split, tmp_path_factory):
    out = tmp_path_factory.mktemp("parts") / "corpus"
    said = []
    note = evidence.corpus.make(f"{source}/*.xz,{source}/*.gz", out, split, said.append)
    assert len(said) == 1 and "2 files" in said[0]
    return out, note


def read(path):
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def stem(record):
    """The document a record is of; one without a name is a document of its own."""
    return record["meta"]["pile_set_name"], record["meta"].get("source", record["text"]).split("#")[0]


# The split


def test_no_document_is_in_two_parts(evidence, made):
    out, _ = made
    found = {part: read(out / f"{part}.jsonl.xz") for part in ("train", "other", "validation", "test")}
    assert all(len(part) > 5 for part in found.values())
    assert any(len({stem(record) for record in part}) < len(part) for part in found.values())  # some have pieces
    stems = {part: {stem(record) for record in of} for part, of in found.items()}
    for held in ("validation", "test"):
        for part in set(stems) - {held}:
            assert not stems[held] & stems[part]
    assert not {record["text"] for record in found["train"]} & {record["text"] for record in found["other"]}
    originals = {record["text"] for record in records()}
    assert {record["text"] for part in ("train", "other") for record in found[part]} <= originals
    assert all(any(text.startswith(record["text"]) for text in originals)
               for part in ("validation", "test") for record in found[part])  # fmt: skip


def test_the_unseen_domain_is_held_out_only(made):
    out, note = made
    for part, there in (("train", False), ("other", False), ("validation", True), ("test", True)):
        domains = {record["meta"]["pile_set_name"] for record in read(out / f"{part}.jsonl.xz")}
        assert domains == {"Wiki", "Code"} | ({"Speeches"} if there else set())
        assert note["parts"][part].keys() == domains


def test_what_is_noted_is_what_is_there(made):
    out, note = made
    for part, domains in note["parts"].items():
        found = read(out / f"{part}.jsonl.xz")
        for domain, counts in domains.items():
            own = [record for record in found if record["meta"]["pile_set_name"] == domain]
            assert counts == {"documents": len(set(map(stem, own))), "bytes": sum(len(r["text"].encode()) for r in own)}
    assert json.loads((out / "corpus.json").read_text()) == note
    assert [name for name, _ in note["files"]] == ["a.jsonl.xz", "b.jsonl.gz"]


def test_held_out_text_is_cut_to_its_most_bytes(evidence, source, split, tmp_path):
    tight = dataclasses.replace(split, most_bytes=40, domain_bytes=300)
    note = evidence.corpus.make(f"{source}/*", tmp_path / "c", tight, str)
    for part in ("validation", "test"):
        by_document, by_domain = {}, {}
        for record in read(tmp_path / "c" / f"{part}.jsonl.xz"):
            size = len(record["text"].encode())
            by_document[stem(record)] = by_document.get(stem(record), 0) + size
            by_domain[stem(record)[0]] = by_domain.get(stem(record)[0], 0) + size
        assert max(by_document.values()) <= 40 and max(by_domain.values()) <= 300
        assert max(by_document.values()) > 36 and max(by_domain.values()) > 290  # a character may be cut
    assert max(counts["bytes"] for counts in note["parts"]["train"].values()) > 300


def test_shares_are_about_those_asked_for(evidence):
    split, count = evidence.corpus.Split(held_out=0.1, train_share=0.3, other_share=0.2), 20_000
    parts = [evidence.corpus.part_of("Wiki", f"Wiki/{i}", f"Wiki/{i}#0", split) for i in range(count)]
    expected = {"validation": 0.1, "test": 0.1, "train": 0.8 * 0.3, "other": 0.8 * 0.2, "": 0.8 * 0.5}
    for part, share in expected.items():
        assert abs(parts.count(part) / count - share) < 5 * np.sqrt(share * (1 - share) / count), part


def test_the_same_files_give_the_same_parts_wherever_they_are(evidence, made, source, split, tmp_path):
    out, note = made
    shutil.copytree(source, tmp_path / "elsewhere")
    again = evidence.corpus.make(f"{tmp_path}/elsewhere/*", tmp_path / "corpus", split, str)
    assert again == note and len(set(note["digests"].values())) == 4
    for part in ("train", "other", "validation", "test"):
        assert read(tmp_path / "corpus" / f"{part}.jsonl.xz") == read(out / f"{part}.jsonl.xz")


def test_the_second_call_makes_nothing(evidence, made, source, split):
    out, note = made
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    said = []
    assert evidence.corpus.make(f"{source}/*", out, split, said.append) == note
    assert said == [] and {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_parts_of_something_else_are_refused(evidence, made, source, split, tmp_path):
    out, _ = made
    for globs, other in (
        (f"{source}/a*", split),
        (f"{source}/*", dataclasses.replace(split, train_share=0.4)),
        (f"{source}/*", dataclasses.replace(split, unseen="Code")),
    ):
        with pytest.raises(UserError, match="made of other files or otherwise; use another --out"):
            evidence.corpus.make(globs, out, other, str)
    with pytest.raises(UserError, match="no file matches"):
        evidence.corpus.make(f"{tmp_path}/nothing*", tmp_path / "n", split, str)


def test_a_domain_that_is_not_there(evidence, source, split, tmp_path):
    with pytest.raises(UserError, match="--unseen=Tales: no such domain; there are Code, Speeches, Wiki"):
        evidence.corpus.make(f"{source}/*", tmp_path / "c", dataclasses.replace(split, unseen="Tales"), str)


@pytest.mark.parametrize("line", [
    '{"text": "a"', '{"text": "a", "meta": {}}', '{"text": 3, "meta": {"pile_set_name": "a"}}', '["text"]',
    '{"text": "\\ud800", "meta": {"pile_set_name": "a"}}',
])  # fmt: skip
def test_a_broken_record_is_named_and_leaves_no_part(evidence, split, tmp_path, line):
    good = [json.dumps(record) for record in records(documents=4)]
    (tmp_path / "c.jsonl").write_text("\n".join([*good[:6], "", line, *good[6:]]))
    with pytest.raises(UserError, match=r"c\.jsonl, line 8: not a record of the Pile's form") as error:
        evidence.corpus.make(f"{tmp_path}/c.jsonl", tmp_path / "out", split, str)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").iterdir())


def test_killed_while_writing_it_begins_again(evidence, source, split, made, tmp_path, monkeypatch):
    count = []

    def stops(record):
        count.append(record)
        if len(count) == 100:
            raise KeyboardInterrupt
        return piece(record)

    piece = evidence.corpus._piece
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evidence.corpus, "_piece", stops)
        evidence.corpus.make(f"{source}/*", out, split, str)
    assert not list(out.glob("*.xz")) and not (out / "corpus.json").exists()
    assert evidence.corpus.make(f"{source}/*", out, split, str) == made[1]
    assert {path.name for path in out.iterdir()} == {path.name for path in made[0].iterdir()}


# Rows of held-out documents


@pytest.fixture(scope="module")
def vocabulary():
    return train_vocabulary((record["text"] for record in records()), 330)


def naive(found, vocabulary, seq_len):
    """Each row: its document, domain, targets, their bytes; one document after another, one piece after another."""
    rows = []
    for record in found:
        ids = [vocabulary.bos_id, *vocabulary.encode(record["text"]), vocabulary.eos_id]
        for start in range(0, len(ids), seq_len + 1):
            row = ids[start : start + seq_len + 1]
            if len(row) > 1:
                size = sum(int(vocabulary.token_bytes[i]) for i in row[1:])
                rows.append((stem(record), record["meta"]["pile_set_name"], row, size))
    return rows


def test_a_row_is_of_one_document_and_its_bytes_are_counted(evidence, made, vocabulary):
    out, _ = made
    rows = evidence.documents.make_rows(str(out), "validation", vocabulary, 16)
    expected = naive(read(out / "validation.jsonl.xz"), vocabulary, 16)
    assert len(rows.tokens) == len(expected) > 64
    names = {}
    for i, (name, domain, ids, size) in enumerate(expected):
        count = int(rows.tokens[i])
        assert rows.domains[rows.domain[i]] == domain and rows.bytes[i] == size and count == len(ids) - 1
        np.testing.assert_array_equal(rows.arrays["tokens"][i, :count], ids[:-1])
        np.testing.assert_array_equal(rows.arrays["targets"][i, :count], ids[1:])
        assert rows.arrays["mask"][i].sum() == count and set(rows.arrays["segment_ids"][i, :count]) == {1}
        assert names.setdefault(rows.documents[rows.document[i]], name) == name
    assert len(names) == len({name for name, *_ in expected}) == rows.document.max() + 1
    facts = json.loads(json.dumps(rows.facts()))
    assert facts.keys() == {"documents", "domains", "document", "domain", "bytes", "tokens"}
    assert facts["bytes"] == [size for *_, size in expected]


def test_all_bytes_of_a_document_count_where_it_is_one_row(evidence, made, vocabulary):
    out, note = made
    rows = evidence.documents.make_rows(str(out), "test", vocabulary, 1024)
    found = read(out / "test.jsonl.xz")
    assert len(rows.bytes) == len(found)
    np.testing.assert_array_equal(rows.bytes, [len(record["text"].encode()) for record in found])
    assert rows.bytes.sum() == sum(counts["bytes"] for counts in note["parts"]["test"].values())


def test_sums_of_rows_are_those_of_a_dense_model_in_float64(evidence, made, vocabulary):
    out, _ = made
    rows = evidence.documents.make_rows(str(out), "validation", vocabulary, 16)
    model = Transformer(ModelConfig(vocabulary.size, 1, 16, 32, 2, 1, 8, tie_embeddings=False))
    rng, shapes = np.random.default_rng(0), jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda x: rng.normal(scale=0.6, size=x.shape).astype(np.float32), shapes)
    sums = evidence.documents.row_sums(model, params, rows)
    arrays = rows.arrays
    hidden = jax.jit(model.apply)(params, arrays["tokens"], segment_ids=arrays["segment_ids"],
                                  positions=arrays["positions"])  # fmt: skip
    hidden = np.asarray(getattr(hidden, "hidden", hidden), np.float64)
    logits = model.config.logit_scale * hidden @ np.asarray(model.head(params), np.float64)
    highest = logits.max(axis=-1, keepdims=True)
    nats = np.log(np.exp(logits - highest).sum(axis=-1)) + highest[..., 0]
    nats -= np.take_along_axis(logits, arrays["targets"][..., None], axis=-1)[..., 0]
    mask = arrays["mask"] > 0
    assert len(rows.tokens) % evidence.documents.AT_ONCE != 0 and len(rows.tokens) > evidence.documents.AT_ONCE
    np.testing.assert_allclose(sums["cross_entropy"], (nats * mask).sum(axis=1), rtol=2e-5)
    right = (logits.argmax(axis=-1) == arrays["targets"]) & mask
    np.testing.assert_array_equal(sums["correct"], right.sum(axis=1))
    np.testing.assert_array_equal(sums["tokens"], rows.tokens)
    assert sums["correct"].sum() > 0 and nats[mask].std() > 0.5

    q = np.exp(logits - highest)
    q /= q.sum(axis=-1, keepdims=True)
    mixed = 0.6 * q + 0.4 * np.eye(vocabulary.size)[arrays["targets"]]
    entropy = -(mixed * np.log(mixed)).sum(axis=-1) * mask
    chosen = np.linspace(0, len(mask) - 1, evidence.documents.ENTROPY_ROWS).astype(int)
    expected = entropy[chosen].sum() / mask[chosen].sum()
    assert evidence.documents._mixture_entropy(model, params, rows, 0.6) == pytest.approx(expected, rel=1e-5)


def test_other_rows_than_those_kept_are_refused(evidence, made, vocabulary, tmp_path):
    out, _ = made
    shutil.copytree(out, tmp_path / "corpus")
    rows = evidence.documents.make_rows(str(out), "validation", vocabulary, 16)
    evidence.documents._keep_facts(tmp_path, "validation", rows, vocabulary)
    evidence.documents._keep_facts(tmp_path, "validation", rows, vocabulary)
    longer = evidence.documents.make_rows(str(out), "validation", vocabulary, 32)
    with pytest.raises(UserError, match="rows-validation.json: made with another vocabulary"):
        evidence.documents._keep_facts(tmp_path, "validation", longer, vocabulary)


def test_smoothing_has_the_entropy_that_was_asked_for(evidence):
    for weight in (0.01, 0.3, 0.9):
        p = np.full(50, weight / 50)
        p[7] += 1 - weight
        assert evidence.documents.smoothed_entropy(weight, 50) == pytest.approx(-(p * np.log(p)).sum())
    assert evidence.documents.smoothed_entropy(0.0, 50) == 0
