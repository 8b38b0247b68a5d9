"""Our vocabularies in seqio and seqio's here: the same ids both ways, in Python and as graph operations."""

import sys

import numpy as np
import pytest
import sentencepiece

from slm_assist.data.seqio_vocabulary import from_seqio, seqio_vocabulary
from slm_assist.data.tokenizers import Vocabulary, compare, train_vocabulary
from slm_assist.errors import UserError

try:
    import seqio
except Exception as error:  # protobuf has an exception of its own for code that is newer than itself
    pytest.skip(f"seqio cannot be imported: {error}", allow_module_level=True)
tf = pytest.importorskip("tensorflow")

TEXTS = [f"the {a} model helps the {b} one, naïve\n" for a in ("small", "large") for b in ("old", "new", "other")] * 40


@pytest.fixture(scope="module")
def ours():
    return train_vocabulary(TEXTS, 340)


def of_t5(path, **options):
    """A unigram model with padding 0, EOS 1 and unknown 2, without BOS, as T5's; in seqio."""
    if not (path / "t5.model").exists():
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_prefix=str(path / "t5"), vocab_size=30, model_type="unigram",
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
        )  # fmt: skip
    return seqio.SentencePieceVocabulary(str(path / "t5.model"), **options)


def test_ours_in_seqio(ours):
    wrapped = seqio_vocabulary(ours.with_sentinels(7))
    assert isinstance(wrapped, seqio.Vocabulary)
    assert (wrapped.bos_id, wrapped.eos_id, wrapped.unk_id, wrapped.pad_id) == (1, 2, 0, 0)
    assert (wrapped.vocab_size, wrapped._base_vocab_size, wrapped.extra_ids) == (347, 340, 7)
    for text in ("", "the small model", "é🙂\n", TEXTS[0] * 9):
        ids = ours.encode(text)
        assert wrapped.encode(text) == ids and wrapped.decode(ids) == text
        assert wrapped.decode([*ids, 2, 0, 0]) == text  # up to EOS; padding vanishes
        in_graph = wrapped.encode_tf(tf.constant(text))
        assert in_graph.dtype == tf.int32 and in_graph.numpy().tolist() == ids
        assert wrapped.decode_tf(tf.constant([*ids, 2, 0, 0], tf.int32)).numpy().decode() == text
    rows = tf.constant([[*ours.encode("a b"), 2, 0], [*ours.encode("b a"), 2, 0]], tf.int32)
    assert wrapped.decode_tf(rows).numpy().tolist() == [b"a b", b"b a"]
    assert wrapped == seqio_vocabulary(ours.with_sentinels(7)) != seqio_vocabulary(ours)
    assert from_seqio(wrapped).fingerprint == ours.with_sentinels(7).fingerprint


def test_a_task_with_our_vocabulary(ours):
    feature = seqio.Feature(seqio_vocabulary(ours), add_eos=True, dtype=tf.int32)
    texts = ["the small model", "é large", "new"]

    def dataset(split, shuffle_files, seed=None):
        return tf.data.Dataset.from_tensor_slices({"targets": texts})

    seqio.TaskRegistry.add(
        "slm_assist_test_our_vocabulary",
        source=seqio.FunctionDataSource(dataset, splits=["train"]),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={"targets": feature},
    )
    try:
        task = seqio.get_mixture_or_task("slm_assist_test_our_vocabulary")
        examples = list(task.get_dataset(split="train", shuffle=False).as_numpy_iterator())
        assert [e["targets"].tolist() for e in examples] == [[*ours.encode(text), ours.eos_id] for text in texts]
    finally:
        seqio.TaskRegistry.remove("slm_assist_test_our_vocabulary")


@pytest.mark.parametrize("reverse", [True, False])
def test_t5s_vocabulary_keeps_its_ids(tmp_path, reverse):
    theirs = of_t5(tmp_path, extra_ids=5, reverse_extra_ids=reverse)
    here = from_seqio(theirs)
    assert here.size == theirs.vocab_size == 35
    text = "the large model helps"
    assert here.encode(text) == theirs.encode(text) and here.decode(here.encode(text)) == theirs.decode(
        theirs.encode(text)
    )
    named = [theirs.tokenizer.piece_to_id(f"\u2581<extra_id_{i}>") for i in range(5)]
    assert here.sentinel_ids.tolist() == named == ([34, 33, 32, 31, 30] if reverse else [30, 31, 32, 33, 34])
    assert here.pieces()[:30] == [theirs.tokenizer.id_to_piece(i) for i in range(30)]
    assert (here.bos_id, here.eos_id, here.unk_id, here.pad_id) == (None, 1, 2, 0)
    here.save(tmp_path / "saved")
    assert compare(Vocabulary.load(tmp_path / "saved"), here) is None
    assert from_seqio(of_t5(tmp_path)).sentinel_ids.size == 0


def test_bytes(tmp_path):
    theirs = seqio.ByteVocabulary(extra_ids=3)
    here = from_seqio(theirs)
    text = "naïve 🙂\n\0</s><extra_id_0>"
    assert here.encode(text) == theirs.encode(text) and here.decode(theirs.encode(text)) == text
    assert here.size == theirs.vocab_size and (here.eos_id, here.bos_id) == (1, None)
    assert here.sentinel_ids.tolist() == [261, 260, 259]
    np.testing.assert_array_equal(here.token_bytes, [0] * 3 + [1] * 256 + [0] * 3)


def test_what_has_no_counterpart(ours, tmp_path, monkeypatch, caplog):
    with pytest.raises(UserError, match="class PassThroughVocabulary has no counterpart"):
        from_seqio(seqio.PassThroughVocabulary(10))
    with pytest.raises(UserError, match="missing.model: the SentencePiece model of a seqio vocabulary cannot be read"):
        from_seqio(seqio.SentencePieceVocabulary(str(tmp_path / "missing.model")))
    from sentencepiece import sentencepiece_model_pb2

    changed = of_t5(tmp_path, normalizer_spec_overrides=sentencepiece_model_pb2.NormalizerSpec(add_dummy_prefix=False))
    with pytest.raises(UserError, match="normalizer_spec_overrides"):
        from_seqio(changed)
    seqio_vocabulary(ours)
    assert not caplog.text
    ordinary = type(ours)(ours.model)
    ordinary.token_bytes = np.ones(ours.size, np.int32)
    seqio_vocabulary(ordinary)
    assert "id 0 of this vocabulary is the token '<unk>', which seqio takes for padding" in caplog.text
    monkeypatch.setitem(sys.modules, "seqio", None)
    with pytest.raises(UserError, match="pip install seqio"):
        from_seqio(seqio.ByteVocabulary())
