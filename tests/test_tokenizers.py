"""Vocabularies: nothing is lost, the same text gives the same model, and differences are found."""

import json
import random
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import sentencepiece

from slm_assist.data.tokenizers import Vocabulary, compare, train_vocabulary
from slm_assist.data.vocabulary_training import _even_sample
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


def test_sentinels_stand_behind_the_pieces(vocabulary, tmp_path):
    assert vocabulary.sentinel_ids.tolist() == []
    some = vocabulary.with_sentinels(3)
    assert some.size == vocabulary.size + 3 == 515 and some.sentinel_ids.tolist() == [512, 513, 514]
    assert some.pieces() == [*vocabulary.pieces(), "<extra_id_0>", "<extra_id_1>", "<extra_id_2>"]
    np.testing.assert_array_equal(some.token_bytes, [*vocabulary.token_bytes, 0, 0, 0])
    text = "a <extra_id_0> <extra_id_2>"
    assert some.encode(text) == vocabulary.encode(text) == some.encode_array(text).tolist()
    assert some.decode([513, *some.encode(text), 512]) == text
    assert vocabulary.size == 512 and vocabulary.sentinel_ids.size == 0  # the one it was made of is as it was
    down = vocabulary.with_sentinels(3, descending=True)
    assert down.sentinel_ids.tolist() == [514, 513, 512] and down.pieces()[-1] == "<extra_id_0>"
    others = [vocabulary, some, down, vocabulary.with_sentinels(4)]
    assert len({v.fingerprint for v in others}) == 4
    assert some.with_sentinels(0).fingerprint == vocabulary.fingerprint
    assert "piece 512" in compare(some, down) and compare(vocabulary, some) == "one has 512 pieces and the other 515"
    for i, v in enumerate(others):
        v.save(tmp_path / str(i))
        loaded = Vocabulary.load(tmp_path / str(i))
        assert compare(loaded, v) is None and loaded.fingerprint == v.fingerprint
        np.testing.assert_array_equal(loaded.sentinel_ids, v.sentinel_ids)
    with pytest.raises(UserError, match="data.sentinels=-1"):
        vocabulary.with_sentinels(-1)


def test_what_was_saved_before_there_were_sentinels(vocabulary, tmp_path):
    """The fingerprint file of a vocabulary without sentinels, and its fingerprint, are what they always were."""
    vocabulary.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fingerprint.json", "tokenizer.model"]
    assert json.loads((tmp_path / "fingerprint.json").read_text()) == {"fingerprint": vocabulary.fingerprint}
    for damage in (
        "{}",
        "[1]",
        '"x"',
        "",
        '{"fingerprint": "x", "sentinels": "3"}',
        '{"fingerprint":"x","sentinels":-3}',
    ):
        (tmp_path / "fingerprint.json").write_text(damage)
        with pytest.raises(UserError, match="fingerprint.json: damaged; delete it"):
            Vocabulary.load(tmp_path)
    (tmp_path / "fingerprint.json").write_text(json.dumps({"fingerprint": vocabulary.fingerprint, "sentinels": 3}))
    with pytest.raises(UserError, match="not the vocabulary that was saved here"):
        Vocabulary.load(tmp_path)


def train_json(kind, special=("<unk>", "<s>", "</s>", "<pad>"), size=600):
    """The bytes of a small tokenizer.json: byte-level, metaspace with bytes, unigram or word pieces."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, pre_tokenizers, trainers

    options = {"vocab_size": size, "special_tokens": list(special), "show_progress": False}
    if kind == "byte-level":
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
    elif kind == "metaspace":
        tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        trainer = trainers.BpeTrainer(**options)
    elif kind == "unigram":
        tokenizer = tokenizers.Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **options | {"vocab_size": 200})
    else:
        tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(**options)
    tokenizer.train_from_iterator(prose(60, extra="naïve Grüße </s>"), trainer)
    contents = json.loads(tokenizer.to_str())
    if kind == "metaspace":  # the bytes are ordinary pieces, as in Llama's
        core = contents["model"]["vocab"]
        core.update({f"<0x{b:02X}>": len(core) + b for b in range(256)})
    return json.dumps(contents).encode()


@pytest.fixture(scope="module")
def byte_level():
    return Vocabulary(train_json("byte-level", ["<|endoftext|>"]), "tokenizer.json")


def test_byte_level_gives_any_text_back(byte_level):
    rng = random.Random(4)
    for length in [*range(30)] * 3 + [2000]:
        text = unicode_text(rng, length)
        ids = byte_level.encode(text)
        assert byte_level.decode(ids) == text and byte_level.encode_array(text).tolist() == ids
        assert byte_level.token_bytes[ids].sum() == len(text.encode())
    assert byte_level.token_bytes.shape == (byte_level.size,) == (600,)
    assert (byte_level.bos_id, byte_level.eos_id, byte_level.pad_id) == (None, 0, 0)


def test_bytes_of_pieces_and_text_of_the_other_kinds():
    vocabulary = Vocabulary(train_json("metaspace"), "tokenizer.json")
    text = "the large model\n  helps 🙂 é"
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text and vocabulary.token_bytes[ids].sum() == len(text.encode())
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id, vocabulary.unk_id) == (1, 2, 3, 0)
    assert vocabulary.token_bytes[:4].tolist() == [0, 0, 0, 0]
    assert vocabulary.token_bytes[vocabulary.pieces().index("<0x0A>")] == 1
    unigram = Vocabulary(train_json("unigram"), "tokenizer.json")
    ids = unigram.encode("the large model")
    assert unigram.decode(ids) == "the large model" and unigram.token_bytes[ids].sum() == len(" the large model")
    words = Vocabulary(train_json("wordpiece", ["<unk>", "[CLS]", "[SEP]"]), "tokenizer.json")
    assert words.decode(words.encode("the large model")) == "the large model"
    assert (words.bos_id, words.eos_id) == (None, None)  # [CLS] and [SEP] do not frame a document
    assert words.token_bytes[words.pieces().index("large")] == 5


@pytest.mark.parametrize("kind", ["byte-level", "metaspace", "unigram"])
def test_a_text_that_spells_a_special_token(kind):
    vocabulary = Vocabulary(train_json(kind), "tokenizer.json")
    for text in ("a</s>b", "</s>", "<s> struck </s><pad>"):
        for ids in (vocabulary.encode(text), vocabulary.encode_array(text).tolist()):
            assert not {vocabulary.bos_id, vocabulary.eos_id, 3} & set(ids)
    if kind != "unigram":
        assert vocabulary.decode(vocabulary.encode("a</s>b")) == "a</s>b"


def test_names_of_bos_and_eos():
    for special, expected in (
        (["<bos>", "<eos>"], (0, 1)),
        (["<|begin_of_text|>", "<|end_of_text|>"], (0, 1)),
        (["<|endoftext|>", "<s>", "</s>"], (1, 2)),
        (["<|endoftext|>"], (None, 0)),
        (["[CLS]", "[SEP]"], (None, None)),
    ):
        vocabulary = Vocabulary(train_json("byte-level", special), "tokenizer.json")
        assert (vocabulary.bos_id, vocabulary.eos_id) == expected
    plain = json.loads(train_json("byte-level", ["<s>"]))
    plain["added_tokens"][0]["special"] = False  # a piece that is called <s> and frames nothing
    assert Vocabulary(json.dumps(plain).encode()).bos_id is None


def test_truncation_padding_and_dropout_do_not_reach_the_ids():
    contents = json.loads(train_json("byte-level"))
    clean = Vocabulary(json.dumps(contents).encode())
    contents["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    contents["padding"] = {
        "strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 3, "pad_type_id": 0, "pad_token": "<pad>",
    }  # fmt: skip
    contents["model"]["dropout"] = 0.5
    told = Vocabulary(json.dumps(contents).encode())
    text = next(prose(1))
    assert told.encode(text) == clean.encode(text) == told.encode_array(text).tolist()
    assert told.fingerprint == clean.fingerprint


def test_a_tokenizer_json_in_threads(byte_level):
    texts = list(prose(40, seed=3))
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(byte_level.encode_array, texts))
    assert [ids.tolist() for ids in together] == [byte_level.encode(text) for text in texts]


def test_save_and_load_of_a_tokenizer_json(byte_level, vocabulary, tmp_path):
    byte_level.with_sentinels(5).save(tmp_path / "t")
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == ["fingerprint.json", "tokenizer.json"]
    loaded = Vocabulary.load(tmp_path / "t")
    assert loaded.model == byte_level.model and compare(loaded, byte_level.with_sentinels(5)) is None
    assert Vocabulary.load(tmp_path / "t" / "tokenizer.json").fingerprint == byte_level.fingerprint
    # The same contents, written otherwise, are the same vocabulary.
    contents = json.loads(byte_level.model)
    contents["model"]["merges"] = [" ".join(pair) for pair in contents["model"]["merges"]]
    other = dict(reversed(contents.items()))
    (tmp_path / "other.json").write_text(json.dumps(other, indent=2))
    assert Vocabulary.load(tmp_path / "other.json").fingerprint == byte_level.fingerprint
    contents["model"]["merges"].pop()
    assert Vocabulary(json.dumps(contents).encode()).fingerprint != byte_level.fingerprint
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(contents))
    with pytest.raises(UserError, match="not the vocabulary that was saved here"):
        Vocabulary.load(tmp_path / "t")
    assert "piece 0 is" in compare(byte_level, vocabulary)


def test_broken_tokenizer_json(byte_level, tmp_path, monkeypatch):
    file = tmp_path / "tokenizer.json"
    empty = json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}).encode()
    for content in (
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"model": 3}',
        b"\xff",
        byte_level.model[:-100],
        vocabulary_bytes(),
        empty,
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match="tokenizer.json: not a tokenizer.json of") as caught:
            Vocabulary.load(file)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="No such file.*give a SentencePiece model or a tokenizer.json"):
        Vocabulary.load(tmp_path / "missing.json")
    with pytest.raises(UserError, match="tokenizer.model: No such file"):
        (tmp_path / "nothing").mkdir()
        Vocabulary.load(tmp_path / "nothing")
    file.write_bytes(byte_level.model)
    assert Vocabulary.load(tmp_path).size == 600  # a directory without a fingerprint
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="needs tokenizers: pip install tokenizers"):
        Vocabulary.load(file)


def vocabulary_bytes():
    return train_vocabulary(prose(60), 400).model


def test_ids_with_gaps_and_ids_of_the_bytes():
    contents = json.loads(train_json("byte-level", ["<s>"]))
    contents["added_tokens"].append(contents["added_tokens"][0] | {"id": 700, "content": "<late>"})
    contents["model"]["vocab"]["<late>"] = 700
    vocabulary = Vocabulary(json.dumps(contents).encode())
    assert vocabulary.size == 701 and vocabulary.pieces()[650] == "" and vocabulary.token_bytes[650] == 0
    assert vocabulary.with_sentinels(1).sentinel_ids.tolist() == [701]
    from slm_assist.data.hugging_face import byte_tokenizer

    of_bytes = Vocabulary(byte_tokenizer(), "bytes")
    text = unicode_text(random.Random(5), 400)
    assert of_bytes.encode(text) == [b + 3 for b in text.encode()] and of_bytes.decode(of_bytes.encode(text)) == text
    assert (of_bytes.size, of_bytes.eos_id, of_bytes.bos_id, of_bytes.pad_id, of_bytes.unk_id) == (
        259,
        1,
        None,
        0,
        None,
    )
