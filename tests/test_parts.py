"""A corpus prepared in parts has the bytes of one prepared at once, whoever merges, and damage is named."""

import functools
import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from slm_assist.data import parts, rows, shards
from slm_assist.data.rows import prepare
from slm_assist.data.sources import open_source
from slm_assist.data.tokenizers import train_vocabulary
from slm_assist.errors import UserError


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    rng = random.Random(0)
    stems = ("model", "token", "layer", "train", "step", "small", "large")
    words = [a + b for a in ("re", "un", "", "pre") for b in stems]
    file = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    with file.open("w") as out:
        for _ in range(700):
            text = " ".join(rng.choices(words, k=rng.randrange(60)))
            out.write(json.dumps({"text": text, "set": f"set {min(rng.randrange(6), 2)}"}) + "\n")
    return f"jsonl:{file}"


@pytest.fixture(scope="module")
def vocabulary(spec):
    return train_vocabulary((d.text for d in open_source(spec).documents()), 330)


OPTIONS = {"seq_len": 32, "vocab_size": 330, "validation_fraction": 0.1, "progress": False, "shard_documents": 16,
           "cores": 2}  # fmt: skip


def make(spec, cache_dir, **options):
    return prepare(open_source(spec, domain_field="set"), cache_dir=cache_dir, **(OPTIONS | options))


@pytest.fixture(scope="module")
def whole(spec, vocabulary, tmp_path_factory):
    """Prepared at once, with a vocabulary and without."""
    directory = tmp_path_factory.mktemp("whole")
    return {given: make(spec, directory, vocabulary=vocabulary if given else None) for given in (True, False)}


def contents(path):
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


def names(cache):
    return {path.name for path in cache.iterdir() if not path.is_symlink()}


def same(prepared, reference):
    assert prepared.path.name == reference.path.name
    assert contents(prepared.path) == contents(reference.path)
    assert prepared.train.fingerprint == reference.train.fingerprint


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("n", [1, 3, 50])  # 50: more parts than shards
def test_parts_make_the_same_bytes_in_any_order(spec, vocabulary, whole, tmp_path, n, given):
    given_vocabulary = vocabulary if given else None
    order = random.Random(n).sample(range(n), n)
    for i in order[:-1]:
        assert make(spec, tmp_path, vocabulary=given_vocabulary, part=(i, n)) is None
        assert names(tmp_path) == {f"{whole[given].path.name}.parts"}
    same(make(spec, tmp_path, vocabulary=given_vocabulary, part=(order[-1], n)), whole[given])
    assert names(tmp_path) == {whole[given].path.name}  # no part is left


def test_parts_are_made_once_and_only_of_their_own_shards(spec, vocabulary, tmp_path, monkeypatch):
    packed = []
    pack = shards._pack_shard
    monkeypatch.setattr(shards, "_pack_shard", lambda index, *rest: packed.append(index) or pack(index, *rest))
    make(spec, tmp_path, vocabulary=vocabulary, part=(1, 3))
    assert len(packed) > 10 and {index % 3 for index in packed} == {1}
    del packed[:]
    assert make(spec, tmp_path, vocabulary=vocabulary, part=(1, 3)) is None and not packed
    make(spec, tmp_path, vocabulary=vocabulary, part=(0, 3))
    make(spec, tmp_path, vocabulary=vocabulary, part=(2, 3))
    assert sorted(packed) == [i for i in range(max(packed) + 2) if i % 3 != 1][: len(packed)]
    assert make(spec, tmp_path, vocabulary=vocabulary, part=(2, 3)) is not None  # all is there


def test_parts_from_hosts_without_a_shared_disk_are_merged_by_a_plain_prepare(
    spec, vocabulary, whole, tmp_path, monkeypatch
):
    for i in range(3):
        make(spec, tmp_path / f"host{i}", vocabulary=vocabulary, part=(i, 3))
    collected = tmp_path / "host0" / f"{whole[True].path.name}.parts"
    for i in (1, 2):
        (place,) = (tmp_path / f"host{i}").glob("*.parts/*")
        place.rename(collected / place.name)
    monkeypatch.setattr(rows, "write_rows", None)  # merged, not made
    same(make(spec, tmp_path / "host0", vocabulary=vocabulary), whole[True])


def test_a_plain_prepare_does_not_wait_for_parts(spec, vocabulary, whole, tmp_path):
    make(spec, tmp_path, vocabulary=vocabulary, part=(0, 2))
    same(make(spec, tmp_path, vocabulary=vocabulary), whole[True])
    assert names(tmp_path) == {whole[True].path.name}
    same(make(spec, tmp_path, vocabulary=vocabulary, part=(1, 2)), whole[True])


def test_many_at_once(spec, vocabulary, whole, tmp_path):
    code = (
        "import sys; from slm_assist.data.rows import prepare; from slm_assist.data.sources import open_source;"
        "from slm_assist.data.tokenizers import Vocabulary; import json;"
        "prepare(open_source(sys.argv[1], domain_field='set'), vocabulary=Vocabulary.load(sys.argv[2]),"
        " cache_dir=sys.argv[3], part=(int(sys.argv[4]), 4), **json.loads(sys.argv[5]))"
    )
    vocabulary.save(tmp_path / "vocabulary")
    arguments = [sys.executable, "-c", code, spec, str(tmp_path / "vocabulary"), str(tmp_path / "c")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}

    def run(i):
        return subprocess.run([*arguments, str(i), json.dumps(OPTIONS)], check=True, env=environment)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))
    same(make(spec, tmp_path / "c", vocabulary=vocabulary), whole[True])
    assert names(tmp_path / "c") == {whole[True].path.name}


@pytest.mark.parametrize("damage", ["flipped", "cut", "part.json", "another vocabulary", "renamed"])
def test_a_damaged_part_is_named_and_nothing_is_made(spec, vocabulary, tmp_path, damage):
    for i in range(2):
        make(spec, tmp_path / str(i), vocabulary=vocabulary, part=(i, 2))
    first, second = (next((tmp_path / str(i)).glob("*.parts/*")) for i in range(2))
    place = first.with_name(second.name)
    second.rename(place)
    data = (place / "shards.bin").read_bytes()
    if damage == "flipped":
        (place / "shards.bin").write_bytes(data[:500] + bytes([data[500] ^ 1]) + data[501:])
    elif damage == "cut":
        (place / "shards.bin").write_bytes(data[:-1])
    elif damage == "part.json":
        (place / "part.json").write_text((place / "part.json").read_text()[:-20])
    elif damage == "renamed":
        first.rename(first.with_name("aside"))
        place.rename(first)
        first.with_name("aside").rename(place)
    else:
        entry = json.loads((place / "part.json").read_text())
        (place / "part.json").write_text(json.dumps(entry | {"vocabulary": "0"}))
    expected = place.name if damage != "renamed" else first.name
    with pytest.raises(UserError, match=expected) as caught:
        make(spec, tmp_path / "0", vocabulary=vocabulary)
    assert "\n" not in str(caught.value)
    assert names(tmp_path / "0") == {place.parent.name}


def test_a_part_that_fails_leaves_nothing(spec, vocabulary, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(Path(spec.split(":")[1]).read_bytes() + b"[]\n")
    with pytest.raises(UserError, match="bad.jsonl, line 701"):
        make(f"jsonl:{bad}", tmp_path / "c", vocabulary=vocabulary, part=(0, 2))
    assert names(tmp_path / "c") == set()


def test_how_a_part_is_written():
    assert parts.parse("0/1") == (0, 1) and parts.parse("11/12") == (11, 12)
    for bad in ("1/1", "x", "1", "-1/2", "0/0", "1/2/3", ""):
        with pytest.raises(UserError, match="--part="):
            parts.parse(bad)


def test_beam_makes_the_same_bytes(spec, vocabulary, whole, tmp_path):
    pytest.importorskip("apache_beam")
    from slm_assist.data import beam

    source = open_source(spec, domain_field="set")
    make = functools.partial(prepare, source, vocabulary=vocabulary, cache_dir=tmp_path, **OPTIONS)
    beam.prepare(make, 3, ["--runner=FnApiRunner"])
    assert names(tmp_path) == {whole[True].path.name}
    same(make(), whole[True])


def test_beam_missing(monkeypatch):
    from slm_assist.data import beam

    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match="pip install apache-beam"):
        beam.prepare(print, 2)
