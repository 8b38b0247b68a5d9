"""Examples to fine-tune on: templates, which targets count, packing, exact match, and runs on them."""

import json
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
from test_columnar import length_delimited, write_array_record, write_parquet

from slm_assist import config as config_lib
from slm_assist import corpus
from slm_assist.data import examples, row_store, seqio_tasks
from slm_assist.data import rows as rows_lib
from slm_assist.data.documents import Document, Prompt
from slm_assist.data.hugging_face import byte_tokenizer
from slm_assist.data.sources import open_source
from slm_assist.data.templates import Templates
from slm_assist.data.tokenizers import Vocabulary, train_vocabulary
from slm_assist.errors import UserError

T = 64
PROMPT, ANSWER = "Q: {question.text}\nA:", " {answer}"
DRAW = random.Random(5)
SUMS = [(DRAW.randrange(100), DRAW.randrange(1000)) for _ in range(150)]
RECORDS = [
    {
        "question": {"text": f"What is {a} + {b}?" + " Think first." * (30 if b % 5 == 0 else b % 4)},
        "answer": f"{a} and {b} make\n#### {a + b}",
        "label": a % 3,
        "set": "ab"[a % 2],
    }
    for a, b in SUMS
]


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    path = tmp_path_factory.mktemp("sums") / "sums.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return f"jsonl:{path}"


@pytest.fixture(scope="module")
def vocabulary():
    return train_vocabulary([r["question"]["text"] + r["answer"] for r in RECORDS], 330)


@pytest.fixture(scope="module")
def byte_vocabulary():
    return Vocabulary(byte_tokenizer(), "bytes.json")


def prepare(spec, vocabulary, cache, *, learn="answer", shorten="", cores=1, **options):
    source = open_source(spec, templates=Templates(PROMPT, ANSWER, shorten=shorten), domain_field="set")
    settings = {"seq_len": T, "validation_fraction": 0.1, "shard_documents": 40, "progress": False} | options
    return rows_lib.prepare(source, vocabulary=vocabulary, cache_dir=cache, cores=cores, learn=learn, **settings)


def in_rows(rows):
    """(ids, mask of the targets behind the first of them) of each segment of all rows."""
    batch, found = rows.get(np.arange(len(rows))), []
    for row in range(len(rows)):
        segment, mask = batch["segment_ids"][row], batch["mask"][row]
        for number in range(1, segment.max() + 1):
            (here,) = np.nonzero(segment == number)
            np.testing.assert_array_equal(here, np.arange(here[0], here[-1] + 1))
            np.testing.assert_array_equal(batch["positions"][row][here], np.arange(len(here)))
            ids = batch["tokens"][row][here].tolist()
            if ids[-1] == rows.vocabulary.eos_id:  # it predicts nothing, least of all another example
                assert mask[here[-1]] == 0
                here = here[:-1]
            else:  # the row's last target, which no token stands for
                assert here[-1] == len(segment) - 1
                ids.append(int(batch["targets"][row][-1]))
            found.append((ids, mask[here].tolist()))
    return found, batch


def by_characters(vocabulary, text, learn):
    """Which of an answer's ids and of its end count, id by id, from how much text the ids before it decode to."""
    ids, counted = vocabulary.encode(text), []
    chosen = {at for match in re.finditer(learn, text) for at in range(*match.span())}
    for n in range(len(ids)):
        start, stop = len(vocabulary.decode(ids[:n])), len(vocabulary.decode(ids[: n + 1]))
        counted.append(any(at in chosen for at in range(start, stop)))
    return [*counted, len(text) - 1 in chosen]


@pytest.mark.parametrize("learn", ["answer", "all", r"#### .*$", r"\d+", "make"])
@pytest.mark.parametrize("which", ["vocabulary", "byte_vocabulary"])
def test_which_targets_count(request, which, learn):
    vocabulary = request.getfixturevalue(which)
    head = [] if vocabulary.bos_id is None else [vocabulary.bos_id]
    assert bool(head) == (which == "vocabulary") and vocabulary.eos_id is not None
    for record in RECORDS[:40]:
        prompt, answer = f"Q: {record['question']['text']}\nA:", f" {record['answer']}"
        example = examples.encode(Document(answer, "", prompt=Prompt(prompt)), vocabulary, learn, 500)
        before = [*head, *vocabulary.encode(prompt)]
        behind = [*vocabulary.encode(answer), vocabulary.eos_id]
        assert example.ids.tolist() == before + behind
        if learn in ("answer", "all"):
            counts = [learn == "all"] * len(before) + [True] * len(behind)
            counts[0] = False
        else:
            counts = [False] * len(before) + by_characters(vocabulary, answer, learn)
        assert example.learnt.tolist() == counts
        assert any(counts) and not all(counts)


def test_characters_of_several_bytes(vocabulary, byte_vocabulary):
    text = "né 日本 #### 7"
    for used in (vocabulary, byte_vocabulary):
        ids, spans = used.encode_with_spans(text)
        assert ids.tolist() == used.encode(text)
        example = examples.encode(Document(text, "", prompt=Prompt("p")), used, "本|é", 99)
        learnt = used.decode(example.ids[example.learnt])
        assert {"本", "é"} <= set(learnt) and "日" not in learnt and "7" not in learnt
        assert spans.max() == len(text) and not example.learnt[-1]
    ids, spans = vocabulary.encode_with_spans("")
    assert ids.shape == (0,) and spans.shape == (0, 2)


def test_examples_stand_whole_in_rows_once(spec, vocabulary, tmp_path):
    expected = []
    for record in RECORDS:
        before = [vocabulary.bos_id, *vocabulary.encode(f"Q: {record['question']['text']}\nA:")]
        behind = [*vocabulary.encode(f" {record['answer']}"), vocabulary.eos_id]
        expected.append((before + behind, [0.0] * (len(before) - 1) + [1.0] * len(behind)))
    room = 100  # most are 25 to 45
    fit = [(ids, mask) for ids, mask in expected if len(ids) <= room]
    assert 10 < len(fit) < len(RECORDS) - 10
    prepared = prepare(spec, vocabulary, tmp_path, seq_len=room - 1)
    found, tokens = [], 0
    for rows in (prepared.train, prepared.validation):
        segments, batch = in_rows(rows)
        found += segments
        assert len(segments) >= 2 * len(rows)
        tokens += rows.tokens
        assert rows.tokens == batch["mask"].sum()
    assert sorted(found) == sorted(fit)
    assert tokens == sum(sum(mask) for _, mask in fit)
    counts = [prepared.meta["splits"][split] for split in ("train", "validation")]
    assert sum(split["documents"] for split in counts) == len(fit)
    assert sum(split["too_long"] for split in counts) == len(expected) - len(fit)
    ids = sum(split["ids"] for split in counts)
    assert ids == sum(len(ids) for ids, _ in fit) and ids > 0.8 * room * sum(split["rows"] for split in counts)


def test_the_same_bytes_however_made(spec, vocabulary, tmp_path):
    one = prepare(spec, vocabulary, tmp_path / "one", cores=1)
    three = prepare(spec, vocabulary, tmp_path / "three", cores=3)
    assert prepare(spec, vocabulary, tmp_path / "parts", part=(1, 2)) is None
    joined = prepare(spec, vocabulary, tmp_path / "parts", part=(0, 2))
    for other in (three, joined):
        assert other.path.name == one.path.name and other.meta == one.meta
        for name in ("train.rows", "validation.rows"):
            assert (other.path / name).read_bytes() == (one.path / name).read_bytes()
    again = rows_lib.open_rows(one.path)
    assert again.train.examples and again.train.fingerprint == one.train.fingerprint
    results = prepare(spec, vocabulary, tmp_path / "one", learn=r"\d+$")
    assert results.path.name != one.path.name and 0 < results.train.tokens < one.train.tokens / 2
    np.testing.assert_array_equal(results.train.get(np.arange(3))["tokens"], one.train.get(np.arange(3))["tokens"])


def test_text_has_the_rows_and_the_key_it_always_had(byte_vocabulary, tmp_path):
    lines = [{"text": f"document {i}: " + "words and more " * (i % 7), "set": "ab"[i % 2]} for i in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = open_source(f"jsonl:{tmp_path}/a.jsonl", domain_field="set")
    options = {"seq_len": 32, "validation_fraction": 0.2, "cores": 1, "progress": False, "learn": "all"}
    prepared = rows_lib.prepare(source, vocabulary=byte_vocabulary, cache_dir=tmp_path / "cache", **options)
    # Made by the commit before there were examples.
    assert prepared.path.name == "a1338e8054d94a92fcfba4a3490b7d9c"
    assert prepared.train.fingerprint == "712207284eb66e6ed42842f3bb29a7d1"
    assert prepared.validation.fingerprint == "d6fd350610f9166eb89279b57bef7c79"
    assert sorted(prepared.meta) == ["format", "seq_len", "source", "splits", "vocabulary"]
    assert not prepared.train.examples and "learnt" not in row_store.row_dtype(32, 300).names


def test_shortened_prompts_and_examples_that_teach_nothing(vocabulary, tmp_path):
    long = " ".join(f"{i} and {i}" for i in range(60))
    answer = " 4\n#### 4"
    document = Document(answer, "", prompt=Prompt(f"Q: {long}\nA:", (3, 3 + len(long))))
    example = examples.encode(document, vocabulary, "answer", 50)
    text = vocabulary.decode(example.ids)
    assert example.shortened and 40 < len(example.ids) <= 50
    body = text.removeprefix("Q: ").removesuffix(f"\nA:{answer}")
    assert len(body) > 20 and long.startswith(body)  # its end is gone, the rest is whole
    assert example.ids.tolist() == [vocabulary.bos_id, *vocabulary.encode(f"Q: {body}\nA:"),
                                    *vocabulary.encode(answer), vocabulary.eos_id]  # fmt: skip
    assert examples.encode(document, vocabulary, "answer", 10) is None  # nothing of the field would be left
    fixed = document._replace(prompt=Prompt(document.prompt.text))
    assert examples.encode(fixed, vocabulary, "answer", 50) is None
    dtype = row_store.row_dtype(49, vocabulary.size, examples=True)
    records, counts = examples.pack([fixed, document], [0, 1], vocabulary, dtype, "####")
    assert (counts["too_long"], counts["shortened"], counts["documents"], len(records)) == (1, 1, 1, 1)
    assert records["domain"].tolist() == [1]
    records, counts = examples.pack([document], [0], vocabulary, dtype, "x+")
    assert (counts["without_target"], counts["tokens"], len(records)) == (1, 0, 0)
    said = examples.left_out({"too_long": 2, "shortened": 3, "without_target": 0})
    assert "2 longer than a row" in said and "3 with a shortened prompt" in said and "target" not in said
    with pytest.raises(UserError, match=r"no example to train on: .* without a target that counts left out"):
        prepare(write(tmp_path, RECORDS), vocabulary, tmp_path, learn="nowhere")


def write(tmp_path, records):
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return f"jsonl:{path}"


def test_templates():
    record = {"q": {"text": "é"}, "n": 3, "x": 0.5, "l": 2, "c": "n", "b": True, "a.b": "dot", "d": "news"}
    templates = Templates("{{{q.text}}} {n} {x}{a.b}", " {l}, {c} or {b}", shorten="q.text",
                          choices="l:no|may be|yes;c:n=neither|e=a, b;b:true=so|false=not so")  # fmt: skip
    assert templates.fields == ("a.b", "b", "c", "l", "n", "q.text", "x")
    document = templates.document(record, "d", "here")
    assert document == Document(" yes, neither or so", "news", prompt=Prompt("{é} 3 0.5dot", (1, 2)))
    assert Templates("p", "{c}").document({"c": " "}, "", "here").text == ""
    assert Templates("{c} ", "{c}").document({"c": np.int64(7)}, "", "here") == Document("7", "", prompt=Prompt("7 "))
    assert Templates("{c} ", "{c}").document({"c": b"x"}, "", "here").prompt.text == "x "


def error(function, *arguments, **options) -> str:
    with pytest.raises(UserError) as raised:
        function(*arguments, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_bad_templates_in_one_line(tmp_path):
    assert "data.prompt='{'" in error(Templates, "{", "{a}")
    assert "only names of fields" in error(Templates, "{a!r}", "{a}")
    assert "only names of fields" in error(Templates, "{}", "{a}")
    assert "no field in braces" in error(Templates, "{a}", "a")
    assert "'b:yes|no'" not in error(Templates, "{a}", "{a}", choices="b:yes|no")
    assert "no field 'bb' in data.prompt or data.answer (did you mean b?)" in error(
        Templates, "{a}", "{b}", choices="bb:yes|no"
    )
    for bad in ("a", "a:", "a:x||y", "a:x|1=y"):
        assert "is neither FIELD:word|word|word" in error(Templates, "{a}", "{a}", choices=bad)
    assert "must be a field that stands once" in error(Templates, "{a}{a}", "{b}", shorten="a")
    spec = write(tmp_path, [*RECORDS[:2], {"question": {"text": "x"}, "answr": "y", "set": "a"}])
    where = f"{tmp_path}/records.jsonl, line 3: no field 'answer' (did you mean answr?)"
    assert where in error(lambda: list(open_source(spec, templates=Templates(PROMPT, ANSWER)).documents()))
    labels = Templates("{answer}", "{label}", choices="label:x|y")
    assert "field 'label' is 2, data.choices has words for 0, 1" in error(
        labels.document, {"answer": "", "label": 2}, "", ""
    )
    assert "field 'a' is a dict, not text or a number: set data.answer" in error(
        Templates("p", "{a}").document, {"a": {}}, "", "here"
    )
    assert "half a surrogate pair" in error(Templates("p", "{a}").document, {"a": "\ud800"}, "", "here")
    for source in ("python:", "pile:x", "seqio:x", "text:x"):
        assert "need records with fields" in error(open_source, source, templates=labels)


def test_bad_configs_in_one_line(spec):
    good = {"data.prompt": PROMPT, "data.answer": ANSWER, "data.source": spec}
    config_lib.resolve("", good)

    def bad(**more):
        return error(config_lib.resolve, "", good | {key.replace("__", "."): value for key, value in more.items()})

    assert "data.prompt=" in bad(data__answer="") and "without data.answer" in bad(data__answer="")
    assert "data.learn='(': neither answer nor all nor a regular expression" in bad(data__learn="(")
    assert "data.objective=ul2 with data.prompt" in bad(data__objective="ul2")
    assert "data.source=python:: data.prompt and data.answer need records" in bad(data__source="python:")
    assert "data.validation=text:a: data.prompt" in bad(data__validation="text:a")
    assert "data.learn='all' is for examples" in bad(data__prompt="", data__answer="", data__learn="all")


def test_other_kinds_of_files(tmp_path):
    templates = Templates("{question.text}", "{label}", choices="label:x|y|z")
    expected = [(r["question"]["text"], "xyz"[r["label"]], r["set"]) for r in RECORDS]

    def found(spec):
        documents = open_source(spec, templates=templates, domain_field="set").documents()
        return [(d.prompt.text, d.text, d.domain) for d in documents]

    columns = {name: [record[name] for record in RECORDS] for name in RECORDS[0]}
    write_parquet(tmp_path / "a.parquet", columns, row_group_size=60)
    assert found(f"parquet:{tmp_path}/a.parquet") == expected
    wrong = Templates("{questio}", "{label}")
    assert "no column 'questio' (did you mean question?)" in error(
        lambda: list(open_source(f"parquet:{tmp_path}/a.parquet", templates=wrong).documents())
    )
    write_array_record(tmp_path / "a.array_record", [json.dumps(record).encode() for record in RECORDS])
    assert found(f"array_record:{tmp_path}/a.array_record") == expected

    def feature(name, value):
        kind = 3 if isinstance(value, int) else 1
        inside = length_delimited(1, bytes([value]) if kind == 3 else value.encode())
        return length_delimited(
            1, length_delimited(1, name.encode()) + length_delimited(2, length_delimited(kind, inside))
        )

    serialised = [
        length_delimited(1, feature("question.text", r["question"]["text"]) + feature("label", r["label"])
                         + feature("set", r["set"])) for r in RECORDS
    ]  # fmt: skip
    write_array_record(tmp_path / "b.array_record", serialised)
    assert found(f"array_record:{tmp_path}/b.array_record") == expected


def test_a_function_that_gives_examples(tmp_path, monkeypatch, vocabulary):
    (tmp_path / "my_examples.py").write_text("""
from slm_assist.data.documents import Document, Prompt
def sums():
    for i in range(200):
        yield Document(f" {i + i}", "sums", prompt=Prompt(f"{i} and {i} make"))
sums.fingerprint, sums.examples = "1", True
def text():
    yield Document("text", "")
text.fingerprint, text.examples = "1", True
""")
    monkeypatch.syspath_prepend(tmp_path)
    options = {"vocabulary": vocabulary, "seq_len": 40, "validation_fraction": 0.2, "cache_dir": tmp_path, "cores": 1}
    prepared = rows_lib.prepare(open_source("my_examples:sums"), progress=False, **options)
    assert prepared.train.examples and prepared.train.tokens > 200
    assert "no slm_assist.data.sources.Document with a prompt" in error(
        lambda: list(open_source("my_examples:text").documents())
    )
    prefix = config_lib.get_config()
    prefix.data.objective = "prefix"
    assert "learnt with data.objective=causal" in error(corpus.make_objective, prefix, prepared)


def test_sets_of_tfds(monkeypatch):
    """With a stand-in for the builder; TensorFlow is slow to import."""
    records = [{"question": {"text": r["question"]["text"].encode()}, "label": np.int64(r["label"])} for r in RECORDS]

    class Split(SimpleNamespace):
        num_examples, num_bytes, shard_lengths = len(RECORDS), 10, [len(RECORDS)]

    features = {"question": {"text": None}, "label": SimpleNamespace(int2str="xyz".__getitem__)}
    info = SimpleNamespace(
        full_name="sums/1.0.0", name="sums", version="1.0.0", splits={"train": Split()}, features=features
    )
    dataset = SimpleNamespace(as_numpy_iterator=lambda: iter(records))
    builder = SimpleNamespace(info=info, data_path="here", as_dataset=lambda **options: dataset)
    tf = SimpleNamespace(errors=SimpleNamespace(OpError=ZeroDivisionError))
    monkeypatch.setattr(seqio_tasks, "tfds_builder", lambda spec, name: builder)
    monkeypatch.setattr(seqio_tasks, "modules", lambda spec: (None, SimpleNamespace(ReadConfig=dict), tf))
    source = open_source(
        "tfds:sums:train",
        templates=Templates("{question.text}", "{label}", choices="label:a|b|c"),
        domain_field="label",
    )
    found = [(d.prompt.text, d.text, d.domain) for d in source.documents()]
    assert found == [(r["question"]["text"], "abc"[r["label"]], "xyz"[r["label"]]) for r in RECORDS]
    assert source.examples and not source.splits
    numbers = open_source("tfds:sums:train", templates=Templates("{question.text}", "{label}"))
    assert {d.text for d in numbers.documents()} == {"0", "1", "2"} and numbers.fingerprint != source.fingerprint
    no_field = Templates("{question.txt}", "{label}")
    assert "no field 'question.txt' (did you mean text?); it has ['text']: set data.prompt" in error(
        open_source, "tfds:sums:train", templates=no_field
    )
