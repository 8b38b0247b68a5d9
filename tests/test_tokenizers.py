"""Vocabularies: nothing is lost, the same text gives the same model, and differences are found."""

import random

import numpy as np
import pytest
import sentencepiece

from slm_assist.data.tokenizers import Vocabulary, _even_sample, compare, train_vocabulary
from slm_assist.errors import UserError

STEMS = "the a of small large model helps train token def return self for in if None import as with"
WORDS = STEMS.split(" ")


def prose(n, seed=0, extra=""):
    rng = random.Random(seed)
    words = WORDS + [f"{a}{b}" for a in WORDS for b in WORDS]
    for _ in range(n):
        lines = [" " * 4 * rng.randrange(4) + " ".join(rng.choices(words, k=9)) for _ in range(12)]
        yield "\n".join(lines) + "\n\n\t" + extra


@pytest.fixture(scope="module")
def vocabulary():
    return train_vocabulary(prose(200, extra="naïve Grüße\n\n\n"), 512)


def unicode_text(rng, length):
    """Any characters but surrogates, which UTF-8 has not, and U+2581; controls and spaces come often."""
    common = "\0\t\n\r \u00a0\u200b\u200d\ufeff\u2028\u0301\u2585\u2047<>s/éあ🙂"
    out = []
    while len(out) < length:
        c = rng.choice(common) if rng.random() < 0.5 else chr(rng.randrange(0x110000))
        if not 0xD800 <= ord(c) < 0xE000 and c != "\u2581":
            out.append(c * rng.choice((1, 1, 1, 2, 7)))
    return "".join(out)


def test_round_trip_of_any_text(vocabulary):
    rng = random.Random(1)
    for length in [*range(40)] * 10 + [5000]:
        text = unicode_text(rng, length)
        assert vocabulary.decode(vocabulary.encode(text)) == text
        assert vocabulary.encode_array(text).tolist() == vocabulary.encode(text)


def test_round_trip_of_every_character(vocabulary):
    every = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    text = "".join(every)
    assert vocabulary.decode(vocabulary.encode(text)) == text.replace("\u2581", " ")
    for c in every[:0x3100]:
        assert vocabulary.decode(vocabulary.encode(c)) == c.replace("\u2581", " ")


@pytest.mark.parametrize("text", ["", " ", "  a", "a  ", "\n", "<s>", "</s>", "<unk>", "<0x0A>", "\ufeffx", "▅"])
def test_round_trip_of_text_that_looks_special(vocabulary, text):
    assert vocabulary.decode(vocabulary.encode(text)) == text
    assert not {vocabulary.bos_id, vocabulary.eos_id} & set(vocabulary.encode(text))


def test_runs_of_spaces_are_pieces(vocabulary):
    assert len(vocabulary.encode(" " * 8)) <= 2


def test_token_bytes_add_up_to_the_text(vocabulary):
    rng = random.Random(2)
    for text in [*prose(3, seed=9), unicode_text(rng, 300), "\u2581"]:
        decoded = vocabulary.decode(vocabulary.encode(text))
        assert vocabulary.token_bytes[vocabulary.encode(text)].sum() == len(decoded.encode())
    assert vocabulary.token_bytes.dtype == np.int32
    assert vocabulary.token_bytes.shape == (vocabulary.size,) == (512,)
    assert vocabulary.token_bytes[[vocabulary.bos_id, vocabulary.eos_id]].tolist() == [0, 0]


def test_training_is_reproducible():
    models = [train_vocabulary(prose(60), 400).model for _ in range(2)]
    assert models[0] == models[1]
    assert models[0] != train_vocabulary(prose(60, seed=1), 400).model


def test_sample_is_even_and_bounded():
    texts = [f"{i:05d}" + "x" * 95 for i in range(1000)]
    sample = _even_sample(texts, 20_000)
    at = np.array([int(text[:5]) for text in sample])
    assert 10_000 < sum(map(len, sample)) <= 20_000
    assert len(set(np.diff(at))) == 1 and at[-1] > 980
    assert _even_sample(texts, 10**9) == texts
    assert "".join(_even_sample(["ab" * 30_000], 10**9)) == "ab" * 30_000


def test_sizes_that_cannot_be_filled_say_what_would_do():
    with pytest.raises(UserError, match=r"vocab_size=50000.*use (\d+) or less") as caught:
        train_vocabulary(prose(20), 50_000)
    most = int(str(caught.value).split("use ")[1].split()[0])
    assert train_vocabulary(prose(20), most).size == most
    with pytest.raises(UserError, match="use at least 320"):
        train_vocabulary(prose(20), 300)
    with pytest.raises(UserError, match="no text"):
        train_vocabulary([], 512)


def test_a_script_with_more_characters_than_the_vocabulary():
    rng = random.Random(3)
    texts = ["".join(chr(0x4E00 + int(rng.paretovariate(0.5)) % 9000) for _ in range(2000)) for _ in range(20)]
    vocabulary = train_vocabulary(texts, 1024)
    assert all(vocabulary.decode(vocabulary.encode(text)) == text for text in texts)


def test_save_and_load(vocabulary, tmp_path):
    vocabulary.save(tmp_path / "tokenizer")
    for path in (tmp_path / "tokenizer", tmp_path / "tokenizer" / "tokenizer.model"):
        loaded = Vocabulary.load(path)
        assert loaded.model == vocabulary.model and loaded.fingerprint == vocabulary.fingerprint
        assert compare(loaded, vocabulary) is None
    train_vocabulary(prose(60), 400).save(tmp_path / "other")
    (tmp_path / "other" / "tokenizer.model").replace(tmp_path / "tokenizer" / "tokenizer.model")
    with pytest.raises(UserError, match="not the vocabulary that was saved here"):
        Vocabulary.load(tmp_path / "tokenizer")


def test_broken_model_files(vocabulary, tmp_path):
    file = tmp_path / "x.model"
    for content in (b"", b"text", vocabulary.model[:-100], b"\0" * 50, b"\x80\x04cos\nsystem\n."):
        file.write_bytes(content)
        with pytest.raises(UserError, match="x.model: not a SentencePiece model"):
            Vocabulary.load(file)
    with pytest.raises(UserError, match="No such file"):
        Vocabulary.load(tmp_path / "missing.model")


def test_compare_looks_at_pieces_not_sizes(vocabulary):
    other = train_vocabulary(prose(200, seed=5, extra="other words entirely "), 512)
    assert other.size == vocabulary.size and other.fingerprint != vocabulary.fingerprint
    difference = compare(vocabulary, other)
    first = next(i for i, (x, y) in enumerate(zip(vocabulary.pieces(), other.pieces(), strict=True)) if x != y)
    assert f"piece {first} is" in difference
    assert compare(vocabulary, vocabulary) is None
    smaller = train_vocabulary(prose(200, extra="naïve Grüße\n\n\n"), 500)
    assert compare(vocabulary, smaller) is not None


def test_a_model_of_another_kind(tmp_path):
    """A unigram model with padding, without BOS, that normalises: as T5's."""
    prefix = str(tmp_path / "unigram")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=prose(60), model_prefix=prefix, vocab_size=120, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    vocabulary = Vocabulary.load(prefix + ".model")
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id) == (None, 1, 0)
    assert vocabulary.decode(vocabulary.encode("a small model")) == "a small model"
