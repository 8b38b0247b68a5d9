"""Tokenizers in Hugging Face folders: what is written, AutoTokenizer reads alike; what is there, is read."""

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from test_tokenizers import train_json, unicode_text

from slm_assist.data.hugging_face import byte_tokenizer
from slm_assist.data.tokenizers import Vocabulary, compare, train_vocabulary
from slm_assist.errors import UserError
from slm_assist.models.hf import sentencepiece_json
from slm_assist.models.hf.qwen_class import _SPLIT
from slm_assist.models.hf.tokenizer_files import read, stop_ids, write

SOURCES = [p.read_text() for p in sorted((Path(__file__).parents[1] / "slm_assist" / "data").glob("*.py"))]
FAMILIES = ("gpt_neox", "llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2")


def sentencepiece_model(**options):
    out = io.BytesIO()
    lines = [line for text in SOURCES for line in text.split("\n")] + ["naïve Grüße é"] * 50
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=out, minloglevel=2, **options)
    return Vocabulary(out.getvalue())


@pytest.fixture(scope="module")
def bpe():
    return train_vocabulary([*SOURCES, "naïve Grüße é"], 1200)


@pytest.fixture(scope="module")
def kinds(bpe):
    identity = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    unigram = {"vocab_size": 600, "model_type": "unigram"}
    byte_level = train_json("byte-level", ["<|endoftext|>"])
    chance = json.loads(byte_level)
    chance["model"]["dropout"] = 0.5
    chance["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    return {
        "bpe": bpe,
        "bpe and sentinels": bpe.with_sentinels(5, descending=True),
        "as Llama's": sentencepiece_model(vocab_size=800, model_type="bpe", **identity),
        "as T5's": sentencepiece_model(pad_id=0, eos_id=1, unk_id=2, bos_id=-1, **unigram),
        "unigram with bytes": sentencepiece_model(normalization_rule_name="nfkc", byte_fallback=True, **unigram),
        "characters": sentencepiece_model(vocab_size=120, model_type="char", hard_vocab_limit=False),
        "user's pieces": sentencepiece_model(
            vocab_size=800, model_type="bpe", add_dummy_prefix=False, user_defined_symbols=["<x>", "foo"], **identity
        ),
        "byte-level": Vocabulary(byte_level),
        "byte-level with BOS": Vocabulary(train_json("byte-level")),
        "truncation and dropout": Vocabulary(json.dumps(chance).encode()),
        "bytes": Vocabulary(byte_tokenizer(), "bytes").with_sentinels(2),
        "metaspace": Vocabulary(train_json("metaspace")).with_sentinels(3),
    }


NAMES = (
    "bpe", "bpe and sentinels", "as Llama's", "as T5's", "unigram with bytes", "characters", "user's pieces",
    "byte-level", "byte-level with BOS", "truncation and dropout", "bytes", "metaspace",
)  # fmt: skip


def agree(vocabulary, tokenizer, texts):
    """The same ids for the texts and the same texts for the ids; returns how many were compared."""
    special = {tokenizer.decode([i]) for i in tokenizer.all_special_ids} | set(tokenizer.get_added_vocab())
    special -= {"foo", "<x>"}
    texts = [text for text in texts if not any(name in text for name in special)]
    for text in texts:
        ids = vocabulary.encode(text)
        assert tokenizer(text, add_special_tokens=False).input_ids == ids, text
        head = [] if vocabulary.bos_id is None else [vocabulary.bos_id]
        assert tokenizer(text).input_ids == head + ids
        if vocabulary.unk_id not in ids:
            assert tokenizer.decode(ids) == vocabulary.decode(ids)
            assert tokenizer.decode(head + ids, skip_special_tokens=True) == vocabulary.decode(ids)
    return len(texts)


def texts_for(name):
    """Sources and any characters; marks that join what NFKC replaces are known to differ (rare_differences)."""
    rng = random.Random(7)
    any_text = [unicode_text(rng, rng.randrange(30)) for _ in range(150)]
    if name in ("as T5's", "unigram with bytes", "characters"):
        rng = random.Random(8)
        letters = "".join(chr(i) for i in range(0x20, 0x250)) + "あ漢①ﬁ½é\u3000\n\t🙂"
        any_text = ["".join(rng.choices(letters, k=rng.randrange(30))) for _ in range(150)]
    parts = [text[i : i + rng.randrange(200)] for text in SOURCES[:6] for i in range(0, len(text), 400)]
    return [*any_text, *parts, " foo<x>  foo", SOURCES[0]]


@pytest.mark.parametrize("name", NAMES)
def test_auto_tokenizer_gives_the_ids_and_read_the_vocabulary(kinds, name, tmp_path):
    transformers = pytest.importorskip("transformers")
    vocabulary = kinds[name]
    write(vocabulary, tmp_path, model_max_length=77)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == vocabulary.size and tokenizer.model_max_length == 77
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (vocabulary.bos_id, vocabulary.eos_id)
    assert tokenizer.pad_token_id == (vocabulary.pad_id if name in PADDED else None)
    sentinels = [f"<extra_id_{i}>" for i in range(len(vocabulary.sentinel_ids))]
    assert tokenizer.convert_tokens_to_ids(sentinels) == vocabulary.sentinel_ids.tolist()
    assert agree(vocabulary, tokenizer, texts_for(name)) > 150
    again = read(tmp_path, vocabulary.size)
    assert again.fingerprint == vocabulary.fingerprint and compare(again, vocabulary) is None
    np.testing.assert_array_equal(again.sentinel_ids, vocabulary.sentinel_ids)


PADDED = ("as T5's", "byte-level with BOS", "bytes", "metaspace")


def test_a_tokenizer_json_stays_as_it_is(kinds, tmp_path):
    write(kinds["byte-level with BOS"], tmp_path)  # gets a BOS
    write(kinds["byte-level"], tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == kinds["byte-level"].model
    assert read(tmp_path, 600).fingerprint == kinds["byte-level"].fingerprint
    write(kinds["bpe"], tmp_path)  # another one in the same folder leaves nothing of the first
    assert read(tmp_path, 1200).fingerprint == kinds["bpe"].fingerprint


@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_the_family_of_the_model(kinds, family, tmp_path):
    """For some families AutoTokenizer has classes of its own, which would ignore parts of the file."""
    transformers = pytest.importorskip("transformers")
    for name in ("bpe and sentinels", "byte-level"):
        folder = tmp_path / name.replace(" ", "-")
        write(kinds[name], folder, model_type=family)
        (folder / "config.json").write_text(json.dumps({"model_type": family}))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert len(tokenizer) == kinds[name].size
        assert agree(kinds[name], tokenizer, texts_for(name)[:200:4]) > 30
        assert list(folder.glob("*.py")) == ([folder / "plain_tokenizer.py"] if family == "qwen2" else [])
    if family == "qwen2":
        trusting = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        assert agree(kinds[name], trusting, texts_for(name)[:200:4]) > 30


def test_qwens_own_tokenizer_needs_no_code(tmp_path):
    transformers = pytest.importorskip("transformers")
    contents = json.loads(train_json("byte-level", ["<|endoftext|>"]))
    split = {"type": "Split", "pattern": {"Regex": _SPLIT}, "behavior": "Isolated", "invert": False}
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    contents |= {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, letters]},
    }
    vocabulary = Vocabulary(json.dumps(contents).encode())
    write(vocabulary, tmp_path, model_type="qwen2")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    assert not list(tmp_path.glob("*.py"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer).__name__ != "PlainTokenizer" and len(tokenizer) == vocabulary.size
    assert agree(vocabulary, tokenizer, texts_for("qwen2")[:200:4]) > 30


def test_a_difference_is_an_error(bpe, kinds, tmp_path, monkeypatch):
    """Pieces of the user's and a prefixed space: tokenizers cannot do it. Nor merges in a wrong order."""
    options = {"vocab_size": 800, "model_type": "bpe", "user_defined_symbols": ["<x>"]}
    with pytest.raises(UserError, match="exported tokenizer would differ: '.*<x>") as caught:
        write(sentencepiece_model(**options), tmp_path / "user")
    assert "\n" not in str(caught.value) and not (tmp_path / "user").exists()
    with pytest.raises(UserError, match="model of words"):
        write(sentencepiece_model(vocab_size=300, model_type="word"), tmp_path)
    right = sentencepiece_json.convert

    def wrong(model, name):
        contents = right(model, name)
        contents["model"]["merges"].reverse()
        return contents

    monkeypatch.setattr(sentencepiece_json, "convert", wrong)
    with pytest.raises(UserError, match="would differ"):
        write(bpe, tmp_path)


def test_what_is_known_to_differ_is_said(bpe, kinds, caplog, tmp_path):
    write(bpe, tmp_path)
    assert not caplog.records
    write(kinds["as T5's"], tmp_path)
    assert "combining mark and where two ways" in caplog.text


def test_parsing_agrees_with_sentencepiece(kinds):
    for name in ("bpe", "as T5's", "user's pieces"):
        vocabulary = kinds[name]
        processor = sentencepiece.SentencePieceProcessor(model_proto=vocabulary.model)
        pieces = sentencepiece_json.parse(vocabulary.model).pieces
        assert [p.text for p in pieces] == vocabulary.pieces()
        assert [p.score for p in pieces] == [processor.get_score(i) for i in range(len(pieces))]
        assert [p.kind == 3 for p in pieces] == [processor.is_control(i) for i in range(len(pieces))]
        assert [p.kind == 6 for p in pieces] == [processor.is_byte(i) for i in range(len(pieces))]


def folder_of(path, **files):
    path.mkdir(exist_ok=True)
    for name, contents in files.items():
        contents = contents if isinstance(contents, bytes) else json.dumps(contents).encode()
        (path / name.replace("__", ".")).write_bytes(contents)
    return path


def test_reading_a_folder_of_somebody_else(bpe, tmp_path):
    own = Vocabulary(train_json("byte-level"))
    both = folder_of(tmp_path / "both", tokenizer__json=own.model, tokenizer__model=bpe.model)
    assert read(both, 640).fingerprint == own.fingerprint
    model = folder_of(tmp_path / "model", tokenizer__model=bpe.model)
    assert read(model, 1200).fingerprint == bpe.fingerprint
    for folder, ids in ((both, 600), (model, 1200)):
        with pytest.raises(UserError, match=f"{ids} ids and the model's embedding {ids - 1} rows"):
            read(folder, ids - 1)
    tiktoken = folder_of(tmp_path / "tiktoken", tokenizer__model=b"IQ== 0\nIg== 1\n")
    with pytest.raises(UserError, match="not a SentencePiece model.*AutoTokenizer.from_pretrained"):
        read(tiktoken, 10)
    with pytest.raises(UserError, match="has no tokenizer.json or tokenizer.model.*save_pretrained"):
        read(folder_of(tmp_path / "empty"), 10)
    with pytest.raises(UserError, match="only vocab.json and merges.txt"):
        read(folder_of(tmp_path / "pairs", vocab__json={}, merges__txt=b""), 10)


def test_special_tokens_without_embedding_are_left_out(tmp_path):
    contents = json.loads(train_json("byte-level"))
    image = contents["added_tokens"][0] | {"id": 600, "content": "<image>"}
    whole = Vocabulary(json.dumps(contents).encode())
    folder = folder_of(tmp_path, tokenizer__json=contents | {"added_tokens": [*contents["added_tokens"], image]})
    assert read(folder, 601).size == 601
    trimmed = read(folder, 600)
    assert trimmed.size == 600 and compare(trimmed, whole) is None
    with pytest.raises(UserError, match="600 ids and the model's embedding 599 rows"):
        read(folder, 599)
    image["special"] = False  # a token that stands in texts is missed
    folder_of(tmp_path, tokenizer__json=contents | {"added_tokens": [*contents["added_tokens"], image]})
    with pytest.raises(UserError, match="601 ids and the model's embedding 600 rows"):
        read(folder, 600)


def with_template(model, bos, bos_id):
    """`model` with a post-processor that puts `bos` before a text."""
    first, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    special = {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}
    processor = {"type": "TemplateProcessing", "single": [first, text], "pair": [first, text]}
    return json.loads(model) | {"post_processor": processor | {"special_tokens": special}}


@pytest.mark.parametrize(
    ("special", "first", "config", "expected"),
    [
        (["<|endoftext|>"], None, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}, (None, 0)),  # GPT
        (["<|endoftext|>", "<|im_end|>"], None, {"bos_token": None, "eos_token": "<|im_end|>"}, (None, 0)),  # Qwen
        (["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], 0, {"eos_token": "<|eot_id|>"}, (0, 1)),  # Llama 3
        (["<unk>", "<s>", "</s>"], None, {"bos_token": {"content": "<s>"}, "add_bos_token": True}, (1, 2)),  # Llama 2
        (["<B>", "<E>"], 0, {"bos_token": "<B>", "eos_token": "<E>"}, (0, 1)),  # names that we do not know
        (["<B>", "<E>"], None, {"bos_token": "<B>", "eos_token": "<E>", "add_bos_token": True}, (0, 1)),
        (["<B>", "<E>"], None, {"bos_token": "<B>", "eos_token": "<E>"}, (None, 1)),  # no text begins with it
        (["</s>", "<|endoftext|>"], None, {"eos_token": "<|endoftext|>"}, (None, 1)),
        (["<|endoftext|>"], 0, {"eos_token": "<|endoftext|>"}, (None, 0)),  # it would stand twice
    ],
)
def test_bos_and_eos_of_a_folder(special, first, config, expected, tmp_path):
    model = train_json("byte-level", special, size=300)
    contents = json.loads(model) if first is None else with_template(model, special[first], first)
    folder_of(tmp_path / "x", tokenizer__json=contents, tokenizer_config__json=config)
    vocabulary = read(tmp_path / "x", 304)
    assert (vocabulary.bos_id, vocabulary.eos_id) == expected
    write(vocabulary, tmp_path / "out")
    again = read(tmp_path / "out", 304)
    assert compare(again, vocabulary) is None and again.fingerprint == vocabulary.fingerprint
    vocabulary.with_sentinels(2).save(tmp_path / "saved")
    assert compare(Vocabulary.load(tmp_path / "saved"), vocabulary.with_sentinels(2)) is None


def test_other_ends_are_another_vocabulary(bpe, tmp_path):
    other = bpe.with_ends(None, 7)
    assert "BOS and EOS are 1, 2 in one and None, 7" in compare(bpe, other) and other.fingerprint != bpe.fingerprint
    assert other.with_ends(1, 2).fingerprint == bpe.fingerprint
    other.save(tmp_path)
    assert Vocabulary.load(tmp_path).fingerprint == other.fingerprint and Vocabulary.load(tmp_path).eos_id == 7
    with pytest.raises(UserError, match="eos_id=1200: the vocabulary has the ids 0 to 1199"):
        bpe.with_ends(1, 1200)


def test_ids_that_stop_an_answer(tmp_path):
    assert stop_ids(tmp_path) == ()
    folder_of(tmp_path, config__json={"eos_token_id": 7})
    assert stop_ids(tmp_path) == (7,)
    folder_of(tmp_path, config__json={"text_config": {"eos_token_id": [9, 7]}}, generation_config__json={"top_k": 3})
    assert stop_ids(tmp_path) == (7, 9)
    folder_of(tmp_path, generation_config__json={"eos_token_id": [3, 1, 3]})
    assert stop_ids(tmp_path) == (1, 3)
    folder_of(tmp_path, generation_config__json=b"[")
    with pytest.raises(UserError, match="generation_config.json: cannot be read"):
        stop_ids(tmp_path)
