"""Streams of rows: exact resume wherever they stop, a shard for each host, mistakes."""

import json
import random

import numpy as np
import pytest

from slm_assist.data import seqio_tasks
from slm_assist.data.loader import Prefetcher
from slm_assist.data.stream import Stream
from slm_assist.data.tokenizers import train_vocabulary
from slm_assist.errors import UserError

try:
    seqio, tfds, tf = seqio_tasks.modules("these tests")
except UserError as missing:
    pytest.skip(str(missing), allow_module_level=True)

SEQ_LEN, ROWS = 48, 4
RANDOM = np.random.default_rng(0)
# Byte ids; each document says which it is in its first three.
DOCUMENTS = [
    np.concatenate([[100 + n // 100, 100 + n // 10 % 10, 100 + n % 10], RANDOM.integers(3, 99, RANDOM.integers(2, 40))])
    for n in range(400)
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Tasks from TFExample files, from a Python generator, with inputs; and a Mixture."""
    directory = tmp_path_factory.mktemp("examples")
    for number in range(4):
        with tf.io.TFRecordWriter(str(directory / f"part-{number}")) as writer:
            for ids in DOCUMENTS[number::4]:
                feature = tf.train.Feature(int64_list=tf.train.Int64List(value=ids.tolist()))
                example = tf.train.Example(features=tf.train.Features(feature={"targets": feature}))
                writer.write(example.SerializeToString())
    files = seqio.TFExampleDataSource(
        dict.fromkeys(("train", "validation"), f"{directory}/part-*"),
        {"targets": tf.io.VarLenFeature(tf.int64)},
    )

    def generated(split, shuffle_files, seed=None):
        def rows():
            return ({"targets": ids} for ids in DOCUMENTS[:60])

        return tf.data.Dataset.from_generator(rows, output_signature={"targets": tf.TensorSpec([None], tf.int32)})

    def dense(dataset):
        return dataset.map(lambda x: {"targets": tf.cast(tf.sparse.to_dense(x["targets"]), tf.int32)})

    def halves(dataset):
        return dataset.map(lambda x: {"inputs": x["targets"][:3], "targets": x["targets"][3:]})

    feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=False)
    both = {"inputs": feature, "targets": feature}
    adds = {
        "st_files": (files, [dense], {"targets": feature}),
        "st_twice": (files, [dense], {"targets": feature}),
        "st_generated": (seqio.FunctionDataSource(generated, ["train"]), [], {"targets": feature}),
        "st_pairs": (files, [dense, halves], both),
        "st_bare": (files, [dense], {"targets": seqio.Feature(seqio.PassThroughVocabulary(50), add_eos=False)}),
    }
    for name, (source, steps, features) in adds.items():
        seqio.TaskRegistry.add(name, source=source, preprocessors=steps, output_features=features)
    seqio.MixtureRegistry.add("st_mixture", [("st_files", 0.7), ("st_generated", 0.3)])
    seqio.MixtureRegistry.add("st_saved_mixture", [("st_files", 0.7), ("st_twice", 0.3)])


def make(name, *, seed=3, **options):
    messages = []
    options = {"snapshot_every": 4, "say": messages.append, **options}
    stream = Stream(name, SEQ_LEN, ROWS, seed=seed, **options)
    stream.messages = messages
    return stream


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize(
    ("name", "shuffle", "saved"),
    [
        pytest.param("st_files", True, True, marks=pytest.mark.slow),
        pytest.param("seqio:st_files:train", False, True, marks=pytest.mark.slow),
        pytest.param("st_saved_mixture", True, True, marks=pytest.mark.slow),
        pytest.param("st_pairs", True, True, marks=pytest.mark.slow),
        ("st_generated", False, False),
        ("st_mixture", True, False),
    ],
)
def test_stopped_anywhere_it_goes_on_exactly(tasks, name, shuffle, saved):
    straight = make(name, shuffle=shuffle)
    wanted = [straight.batch_at(n) for n in range(14)]
    assert straight.has_prefix == ("prefix_mask" in wanted[0])
    stops = sorted(random.Random(name).sample(range(1, 14), 2))
    stream, n, said = make(name, shuffle=shuffle), 0, []
    for stop in [*stops, 14]:
        with Prefetcher(stream, n) as batches:  # which reads ahead of what is used
            while n < stop:
                assert_same(batches.batch_at(n), wanted[n])
                n += 1
            state = json.loads(json.dumps(stream.state_at(n)))
        # The snapshot at a multiple of 4 is taken when the next batch is drawn, which may not have happened yet.
        assert n == 4 or (state["iterator"] is not None) == (saved and n > 4)
        assert state["skip"] <= 4 or not saved
        said += stream.messages
        stream = make(name, shuffle=shuffle)
        stream.restore(state)
    said = " ".join(said + stream.messages)
    assert ("cannot be saved" in said) == ("batches again" in said) == (not saved)
    assert_same(stream.batch_at(14), straight.batch_at(14))


def test_a_state_is_known_behind_what_was_read_ahead(tasks):
    stream = make("st_files", snapshot_every=2)
    wanted = [stream.batch_at(n) for n in range(26)]
    assert len(stream._snapshots) < 14  # they do not pile up
    for n in (12, 25):
        other = make("st_files", snapshot_every=2)
        other.restore(stream.state_at(n))
        assert_same(other.batch_at(n), wanted[n])
    with pytest.raises(ValueError, match="batch 27"):
        stream.state_at(27)
    with pytest.raises(ValueError, match="batch 7"):
        stream.batch_at(7)


def documents_in(batches):
    """The numbers of the documents whose first three ids are in the targets."""
    found = []
    for batch in batches:
        first = (batch["positions"] == 0) & (batch["segment_ids"] > 0)
        for row, t in zip(*np.nonzero(first), strict=True):
            digits = batch["targets"][row, t : t + 3] - 100
            found.append(int(digits @ [100, 10, 1]))
    return found


def test_hosts_read_different_documents_and_all_of_them(tasks):
    halves = [make("st_files", process_index=i, process_count=2, shuffle=False) for i in range(2)]
    batches = [[half.batch_at(n) for n in range(84)] for half in halves]  # more than an epoch of 200 documents each
    first, second = (set(documents_in(some)) for some in batches)
    assert not first & second
    assert first | second == set(range(400))
    for index, some in enumerate(batches):
        ids = np.concatenate([batch["row_ids"] for batch in some])
        assert ids.dtype == np.int64 and (ids % 2 == index).all()
        assert len(set(ids.tolist())) == len(ids) == 84 * ROWS // 2
        assert some[0]["tokens"].shape == (ROWS // 2, SEQ_LEN)
    np.testing.assert_array_equal(
        halves[0].row_ids_at(7), np.concatenate([batches[0][7]["row_ids"], batches[1][7]["row_ids"]])
    )


def test_what_a_batch_holds(tasks):
    stream = make("st_files", shuffle=False)
    batch = stream.batch_at(0)
    assert batch["tokens"].shape == (ROWS, SEQ_LEN)
    assert batch["domain"].tolist() == [0] * ROWS and list(stream.domains) == [""]
    assert batch["row_ids"].tolist() == [0, 1, 2, 3]
    assert stream.vocabulary.size == seqio.ByteVocabulary().vocab_size
    for number in documents_in([batch]):
        ids = DOCUMENTS[number]
        row, t = next(
            (r, t)
            for r, t in zip(*np.nonzero(batch["positions"] == 0), strict=True)
            if batch["targets"][r, t : t + 3].tolist() == ids[:3].tolist()
        )
        np.testing.assert_array_equal(batch["targets"][row, t : t + len(ids)], ids)
        np.testing.assert_array_equal(batch["tokens"][row, t + 1 : t + len(ids)], ids[:-1])
        assert (batch["mask"][row, t : t + len(ids)] == 1).all()


def test_seeds_and_names(tasks):
    a, b, c = make("st_files"), make("st_files", seed=4), make("st_files")
    assert a.fingerprint == c.fingerprint != b.fingerprint
    first = a.batch_at(0)
    assert_same(first, c.batch_at(0))
    assert (first["tokens"] != b.batch_at(0)["tokens"]).any()
    assert make("seqio:st_files:train").validation_spec == "seqio:st_files:validation"
    with pytest.raises(UserError, match="data.validation"):
        _ = make("st_generated").validation_spec


def test_mistakes(tasks):
    state = make("st_files").state_at(0)
    for options, words in (
        ({"process_count": 2}, "hosts 1 -> 2"),
        ({"seed": 9}, "seed"),
        ({}, "another version|--fresh"),
    ):
        broken = state if options else state | {"format": 0}
        with pytest.raises(UserError, match=words) as error:
            make("st_files", **options).restore(broken)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot be split over 3 hosts"):
        make("st_files", process_count=3)
    with pytest.raises(UserError, match="did you mean st_files"):
        make("st_flies")
    with pytest.raises(UserError, match="no split 'test'.*train"):
        make("st_files", split="test")
    with pytest.raises(UserError, match="data.vocabulary"):
        make("st_bare")


def test_ids_beyond_the_vocabulary(tasks):
    small = seqio_tasks.vocabulary_of("x", seqio.TaskRegistry.get("st_files"))
    small.size = 60
    with pytest.raises(UserError, match=r"id \d+ in batch 0, but the vocabulary has 60 pieces"):
        make("st_bare", vocabulary=small).batch_at(0)


def test_a_damaged_snapshot_is_said_and_done_without(tasks):
    stream = make("st_files")
    wanted = [stream.batch_at(n) for n in range(7)]
    state = stream.state_at(6)
    state["iterator"] = dict.fromkeys(state["iterator"], "AAAA")
    other = make("st_files")
    other.restore(state)
    assert_same(other.batch_at(6), wanted[6])
    assert any("cannot be used" in message for message in other.messages)


def test_a_task_of_ours_streams_any_vocabulary(tmp_path, monkeypatch):
    lines = [json.dumps({"text": f"number {i} " * (i % 40 + 1), "meta": {"pile_set_name": "Code"}}) for i in range(300)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    monkeypatch.setenv("SLM_ASSIST_PILE", str(tmp_path))
    vocabulary = train_vocabulary([json.loads(line)["text"] for line in lines], 330)
    stream = make("seqio:slm_assist.pile", vocabulary=vocabulary)
    batch = stream.batch_at(0)
    assert stream.vocabulary.fingerprint == vocabulary.fingerprint
    starts = batch["positions"] == 0
    assert set(batch["tokens"][starts & (batch["segment_ids"] > 0)].tolist()) == {vocabulary.bos_id}
    assert vocabulary.eos_id in batch["targets"]
    text = vocabulary.decode(batch["targets"][0][batch["segment_ids"][0] == 1])
    assert "number" in text
