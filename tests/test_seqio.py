"""tfds and seqio as sources, this package's Tasks, and seqio's packed batches as ours."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from slm_assist.data import rows as rows_lib
from slm_assist.data import seqio_tasks
from slm_assist.data.sources import open_source
from slm_assist.data.tokenizers import train_vocabulary
from slm_assist.errors import UserError
from slm_assist.losses import blocked
from slm_assist.models import ModelConfig, Transformer

zstandard = pytest.importorskip("zstandard")
try:
    seqio, tfds, tf = seqio_tasks.modules("these tests")
except UserError as missing:
    pytest.skip(str(missing), allow_module_level=True)

TEXTS = [f"Story {i}: " + "once upon a time. " * (i % 5) + "é" * (i % 3) for i in range(40)]


def test_the_core_leaves_tensorflow_alone():
    code = (
        "import sys, slm_assist.train, slm_assist.cli, slm_assist.data.seqio_source, slm_assist.data.stream\n"
        "print([m for m in ('tensorflow', 'seqio', 'tensorflow_datasets', 'tensorflow_text') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def memory(records):
    """A source's dataset_fn over a list of records of one form."""

    def dataset_fn(split, shuffle_files, seed=None):
        spec = {}
        for name, value in records[0].items():
            is_text = isinstance(value, bytes | str)
            spec[name] = tf.TensorSpec([] if is_text else [None], tf.string if is_text else tf.int32)
        return tf.data.Dataset.from_generator(lambda: iter(records), output_signature=spec)

    return dataset_fn


def add_task(name, records, vocabulary, *preprocessors, splits=("train",), features=("targets",), add_eos=False):
    if name in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove(name)
    feature = seqio.Feature(vocabulary, add_eos=add_eos, dtype=tf.int32)
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(memory(records), splits=splits),
        preprocessors=list(preprocessors),
        output_features=dict.fromkeys(features, feature),
    )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A folder with one set that tfds has prepared."""
    directory = tmp_path_factory.mktemp("tfds")
    features = tfds.features.FeaturesDict(
        {"text": tfds.features.Text(), "about": {"kind": tfds.features.ClassLabel(names=["fable", "news"])}}
    )

    version = directory / "tiny_texts" / "1.0.0"
    version.mkdir(parents=True)
    infos = []
    for split, shards in {"train": [TEXTS[:25], TEXTS[25:]], "validation": [TEXTS[:5]]}.items():
        first = 0
        for number, texts in enumerate(shards):
            name = f"tiny_texts-{split}.tfrecord-{number:05}-of-{len(shards):05}"
            with tf.io.TFRecordWriter(str(version / name)) as writer:
                for i, text in enumerate(texts, first):
                    example = features.encode_example({"text": text, "about": {"kind": i % 2}})
                    writer.write(features.serialize_example(example))
            first += len(texts)
        infos.append(tfds.core.SplitInfo(name=split, shard_lengths=[len(x) for x in shards], num_bytes=1000))
    tfds.folder_dataset.write_metadata(
        data_dir=version,
        features=features,
        split_infos=infos,
        filename_template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    )
    return directory


@pytest.fixture
def tfds_dir(data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    return data_dir


def test_tfds_documents(tfds_dir):
    source = open_source("tfds:tiny_texts:train", domain_field="about.kind")
    documents = list(source.documents())
    assert [d.text for d in documents] == TEXTS
    assert {d.text: d.domain for d in documents} == {text: ["fable", "news"][i % 2] for i, text in enumerate(TEXTS)}
    assert not source.splits and not source.pretokenised
    assert list(source.documents()) == documents
    again = open_source("tfds:tiny_texts:1.0.0:train", domain_field="about.kind")
    assert list(again.documents()) == documents
    assert again.fingerprint == source.fingerprint
    seen = []
    list(source.documents(seen.append))
    assert sum(seen) == sum(len(text.encode()) for text in TEXTS)


def test_tfds_splits(tfds_dir):
    whole = open_source("tfds:tiny_texts")
    assert whole.splits
    by_split = [d.split for d in whole.documents()]
    assert (by_split.count("train"), by_split.count("validation")) == (40, 5)
    part = open_source("tfds:tiny_texts:train[:25%]")
    assert len(list(part.documents())) == 10
    prints = {whole.fingerprint, part.fingerprint, open_source("tfds:tiny_texts:train").fingerprint}
    assert len(prints) == 3
    assert "tiny_texts" in whole.describe() and "45 examples" in whole.describe()


@pytest.mark.parametrize(
    ("spec", "fields", "words"),
    [
        ("tfds:c4/en:train", {}, ["c4/en", "not prepared", "tfds build c4/en", "TFDS_DATA_DIR"]),
        ("tfds:c5/en:train", {}, ["no set 'c5'", "did you mean c4"]),
        ("tfds:huggingface:roneneldan__TinyStories:train", {}, ["not prepared", "download_and_prepare"]),
        ("tfds:tiny_texts:trian", {}, ["no split 'trian'", "did you mean train"]),
        ("tfds:tiny_texts:train", {"text_field": "texts"}, ["'texts'", "did you mean text", "data.text_field"]),
        ("tfds:tiny_texts:train", {"domain_field": "about.sort"}, ["about.sort", "kind", "data.domain_field"]),
        ("tfds:", {}, ["tfds:NAME:SPLIT"]),
    ],
)
def test_tfds_mistakes(tfds_dir, spec, fields, words):
    with pytest.raises(UserError) as error:
        open_source(spec, **fields)
    message = one_line(error)
    assert all(word in message for word in words), message


# --------------------------------------------------------------------------------------------------------- seqio


def test_a_task_that_keeps_its_text():
    records = [{"targets": text} for text in TEXTS]
    splits = ("train", "validation")
    add_task("sq_text", records, seqio.ByteVocabulary(), seqio.preprocessors.tokenize, splits=splits)
    source = open_source("seqio:sq_text:train")
    assert [d.text for d in source.documents()] == TEXTS
    assert {d.domain for d in source.documents()} == {"sq_text"}
    assert not source.pretokenised
    assert source.vocabulary.size == seqio.ByteVocabulary().vocab_size
    both = open_source("seqio:sq_text")
    assert [d.split for d in both.documents()] == ["train"] * 40 + ["validation"] * 40
    before = source.fingerprint
    assert open_source("seqio:sq_text:train").fingerprint == before
    add_task("sq_text", records[::-1], seqio.ByteVocabulary(), seqio.preprocessors.tokenize, splits=splits)
    assert open_source("seqio:sq_text:train").fingerprint != before


def test_a_task_of_ids(tmp_path):
    ids = [np.arange(3, 10 + i, dtype=np.int32) for i in range(40)]
    add_task("sq_ids", [{"targets": x} for x in ids], seqio.ByteVocabulary())
    source = open_source("seqio:sq_ids:train")
    assert source.pretokenised
    for document, wanted in zip(source.documents(), ids, strict=True):
        np.testing.assert_array_equal(document.ids, wanted)
    prepared = rows_lib.prepare(
        source, vocabulary=source.vocabulary, seq_len=16, validation_fraction=0.3, cache_dir=tmp_path, progress=False
    )
    assert prepared.vocabulary.fingerprint == source.vocabulary.fingerprint
    marks = sum(mark is not None for mark in (source.vocabulary.bos_id, source.vocabulary.eos_id))
    written = sum(prepared.meta["splits"][s]["ids"] for s in ("train", "validation"))
    assert written == sum(map(len, ids)) + marks * len(ids)


def test_ids_without_a_vocabulary_need_one():
    add_task("sq_bare", [{"targets": np.arange(5, dtype=np.int32)}], seqio.PassThroughVocabulary(10))
    with pytest.raises(UserError) as error:
        open_source("seqio:sq_bare:train")
    assert "data.vocabulary" in one_line(error)


def test_inputs_come_before_targets():
    records = [{"inputs": np.array([5, 6], np.int32), "targets": np.array([7, 8, 9], np.int32)}]
    add_task("sq_pairs", records, seqio.ByteVocabulary(), features=("inputs", "targets"))
    (document,) = open_source("seqio:sq_pairs:train").documents()
    assert document.ids.tolist() == [5, 6, 7, 8, 9]


def test_a_mixture_gives_each_task_once_under_its_name():
    for name, texts in (("sq_a", TEXTS[:4]), ("sq_b", TEXTS[4:6])):
        add_task(name, [{"targets": t} for t in texts], seqio.ByteVocabulary(), seqio.preprocessors.tokenize)
    if "sq_mix" not in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.add("sq_mix", [("sq_a", 0.9), ("sq_b", 0.1)])
    source = open_source("seqio:sq_mix:train")
    assert [(d.text, d.domain) for d in source.documents()] == [
        *((text, "sq_a") for text in TEXTS[:4]),
        *((text, "sq_b") for text in TEXTS[4:6]),
    ]
    assert "rates not applied" in source.describe()


def test_a_module_is_imported_for_its_tasks(tmp_path, monkeypatch):
    (tmp_path / "sq_their_tasks.py").write_text(
        "import seqio, tensorflow as tf\n"
        "def read(split, shuffle_files, seed=None):\n"
        "    return tf.data.Dataset.from_tensor_slices({'targets': ['one', 'two']})\n"
        "seqio.TaskRegistry.add('sq_theirs', source=seqio.FunctionDataSource(read, splits=['train']),\n"
        "    preprocessors=[seqio.preprocessors.tokenize],\n"
        "    output_features={'targets': seqio.Feature(seqio.ByteVocabulary(), add_eos=False)})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    source = open_source("seqio:sq_their_tasks/sq_theirs:train")
    assert [d.text for d in source.documents()] == ["one", "two"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("seqio:sq_tezt", ["'sq_tezt'", "did you mean sq_text", "package.module/"]),
        ("seqio:sq_text:vaildation", ["no split 'vaildation'", "did you mean validation"]),
        ("seqio:no_such_module/sq_text", ["no module 'no_such_module'", "PYTHONPATH"]),
        ("seqio:slm_assist.c4:train", ["c4/en", "not prepared", "tfds build c4/en"]),
        ("seqio:slm_assist.pile:train", ["SLM_ASSIST_PILE"]),
    ],
)
def test_seqio_mistakes(spec, words, monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.delenv("SLM_ASSIST_PILE", raising=False)
    splits = ("train", "validation")
    add_task("sq_text", [{"targets": "x"}], seqio.ByteVocabulary(), seqio.preprocessors.tokenize, splits=splits)
    if seqio_tasks.PILE in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove(seqio_tasks.PILE)
    with pytest.raises(UserError) as error:
        open_source(spec)
    message = one_line(error)
    assert all(word in message for word in words), message


def test_a_failing_task_names_itself():
    def broken(dataset):
        def check(x):
            with tf.control_dependencies([tf.debugging.assert_less(tf.strings.length(x["targets"]), 3, "too long")]):
                return {"targets": tf.identity(x["targets"])}

        return dataset.map(check)

    steps = (broken, seqio.preprocessors.tokenize)
    add_task("sq_broken", [{"targets": "abcdef"}], seqio.ByteVocabulary(), *steps)
    with pytest.raises(UserError) as error:
        list(open_source("seqio:sq_broken:train").documents())
    assert "sq_broken" in one_line(error)


# ------------------------------------------------------------------------------------------------ our own Tasks


def write_pile(directory, documents, files=2):
    directory.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        lines = [json.dumps({"text": t, "meta": {"pile_set_name": d}}) for t, d in documents[number::files]]
        data = zstandard.ZstdCompressor().compress("\n".join(lines).encode())
        (directory / f"train-{number}.jsonl.zst").write_bytes(data)
    return directory


def test_the_pile_task(tmp_path, monkeypatch):
    documents = [(f"{i} " + "word " * (i % 300), ["Books", "Code"][i % 2]) for i in range(700)]
    monkeypatch.setenv("SLM_ASSIST_PILE", str(write_pile(tmp_path / "pile", documents)))
    source = open_source("seqio:slm_assist.pile:train", domain_field="domain")
    found = [(d.text, d.domain) for d in source.documents()]
    assert sorted(found) == sorted(documents)
    task = seqio.TaskRegistry.get("slm_assist.pile")
    pieces = task.get_dataset({"targets": 64}, split="train", shuffle=False).as_numpy_iterator()
    pieces = [piece["targets"] for piece in pieces]
    assert max(map(len, pieces)) == 64
    vocabulary = seqio.ByteVocabulary()
    ids = [i for text, _ in found for i in [*vocabulary.encode(text), vocabulary.eos_id]]
    assert sorted(np.concatenate(pieces).tolist()) == sorted(ids)


def test_a_pile_file_is_read_alike_in_any_order(tmp_path):
    documents = [(f"text {i}", "Books") for i in range(600)]
    path = bytes(write_pile(tmp_path, documents, files=1) / "train-0.jsonl.zst")
    reader = seqio_tasks._PileReader()
    in_order = [reader(path, index) for index in range(4)]
    assert [len(texts) for texts, _ in in_order] == [256, 256, 88, 0]
    for index in (2, 0, 1, 3, 1):
        np.testing.assert_array_equal(reader(path, index)[0], in_order[index][0])
    assert in_order[1][0][0] == b"text 256"


# ------------------------------------------------------------------------------------------------------- batches

LM = [{"targets": [3, 9, 1]}, {"targets": [4, 1]}]
PAIRS = [
    {"inputs": [7, 8, 5, 1], "targets": [3, 9, 1]},
    {"inputs": [8, 4, 9, 3, 1], "targets": [4, 1]},
    {"inputs": [2], "targets": [6, 6, 2, 1]},
]


def converted(records, lengths, converter):
    spec = {name: tf.TensorSpec([None], tf.int32) for name in records[0]}
    dataset = tf.data.Dataset.from_generator(lambda: iter(records), output_signature=spec)
    rows = list(converter(dataset, task_feature_lengths=lengths).as_numpy_iterator())
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def test_a_packed_batch_as_ours():
    batch = seqio_tasks.ours(converted(LM, {"targets": 6}, seqio.LMFeatureConverter(pack=True, bos_id=2)))
    assert {name: value[0].tolist() for name, value in batch.items()} == {
        "tokens": [2, 3, 9, 2, 4, 2],
        "targets": [3, 9, 1, 4, 1, 0],
        "segment_ids": [1, 1, 1, 2, 2, 0],
        "positions": [0, 1, 2, 0, 1, 0],
        "mask": [1, 1, 1, 1, 1, 0],
    }
    assert {value.dtype.name for value in batch.values()} == {"int32", "float32"}
    lengths = {"inputs": 7, "targets": 8}
    pairs = seqio_tasks.ours(converted(PAIRS[:2], lengths, seqio.PrefixLMFeatureConverter(pack=True)))
    assert pairs["prefix_mask"][0].astype(int).tolist() == [1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0]
    assert pairs["mask"][0].tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 0]
    with pytest.raises(UserError, match="decoder_target_tokens.*LMFeatureConverter"):
        seqio_tasks.ours({"encoder_input_tokens": np.zeros((1, 2))})


def per_token_loss(batch, model, params):
    arrays = {name: batch[name] for name in ("segment_ids", "positions", "prefix_mask") if name in batch}

    @jax.jit
    def loss(tokens, targets, arrays):
        return blocked.token_stats(model.apply(params, tokens, **arrays), model.head(params), targets).loss

    return np.asarray(loss(batch["tokens"], batch["targets"], arrays))


@pytest.mark.parametrize("prefix", [False, True])
def test_packed_documents_have_the_loss_they_have_alone(prefix):
    config = ModelConfig(
        vocab_size=12, num_layers=2, d_model=32, d_ff=64, num_heads=2, num_kv_heads=1, head_dim=16, scan_layers=False
    )
    model = Transformer(config)
    params = model.init(jax.random.key(0))
    if prefix:
        records, lengths, converter = PAIRS, {"inputs": 12, "targets": 12}, seqio.PrefixLMFeatureConverter
    else:
        records = [{"targets": pair["inputs"] + pair["targets"]} for pair in PAIRS]
        lengths, converter = {"targets": 24}, seqio.LMFeatureConverter
    packed = seqio_tasks.ours(converted(records, lengths, converter(pack=True)))
    assert packed["tokens"].shape == (1, 24) and packed["segment_ids"].max() == 3
    losses = per_token_loss(packed, model, params)
    for number, record in enumerate(records, 1):
        ids = np.array([record["inputs"] + record["targets"] if prefix else record["targets"]])
        inputs = len(record["inputs"]) if prefix else 0
        alone = {"tokens": np.concatenate([[[0]], ids[:, :-1]], axis=1), "targets": ids}
        if prefix:
            alone["prefix_mask"] = np.arange(ids.shape[1])[None] <= inputs
        wanted = per_token_loss(alone, model, params)[0, inputs:]
        counted = (packed["segment_ids"] == number) & (packed["mask"] > 0)
        assert counted.sum() == ids.shape[1] - inputs
        np.testing.assert_allclose(losses[counted], wanted, atol=1e-5)
    for number in range(1, 4):  # padded rows of one document each
        alone = seqio_tasks.ours(converted(records[number - 1 : number], lengths, converter(pack=False)))
        counted = (packed["segment_ids"] == number) & (packed["mask"] > 0)
        loss = per_token_loss(alone, model, params)[alone["mask"] > 0]
        np.testing.assert_allclose(loss, losses[counted], atol=1e-5)


def test_what_a_prefix_shows_carries_no_loss():
    lengths = {"inputs": 12, "targets": 12}
    converter = seqio.PrefixLMFeatureConverter(pack=True, loss_on_targets_only=False)
    raw = converted(PAIRS, lengths, converter)
    assert raw["decoder_loss_weights"].sum() == 19  # seqio would count the inputs too
    batch = seqio_tasks.ours(raw)
    assert batch["mask"].sum() == sum(len(pair["targets"]) for pair in PAIRS)
    # No target that counts stands among the tokens that its position may see.
    for t in np.flatnonzero(batch["mask"][0])[:-1]:
        same = batch["segment_ids"][0, t] == batch["segment_ids"][0, t + 1]
        assert not (same and batch["prefix_mask"][0, t] and batch["prefix_mask"][0, t + 1])


def test_a_task_with_another_vocabulary_is_refused():
    other = train_vocabulary(TEXTS * 20, 330)
    add_task("sq_text2", [{"targets": "x"}], seqio.ByteVocabulary(), seqio.preprocessors.tokenize)
    with pytest.raises(UserError) as error:
        open_source("seqio:sq_text2:train", vocabulary=other)
    assert "vocabulary" in one_line(error)
