"""Generation: cached = uncached, sampling against exact probabilities, stop strings, streams, the command."""

import dataclasses
import functools
import html
import io
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from slm_assist import cli, report, samples, sharding
from slm_assist.commands.generate import read_prompts
from slm_assist.data.hugging_face import byte_tokenizer
from slm_assist.data.tokenizers import Vocabulary
from slm_assist.decode import Generator, Sampling, sample
from slm_assist.decode.generate import padded
from slm_assist.decode.text import Text
from slm_assist.errors import UserError
from slm_assist.models import ModelConfig, Transformer
from slm_assist.models.rope import RopeScaling
from slm_assist.report import samples as report_samples

BYTES = Vocabulary(byte_tokenizer(), "bytes")
V, LONGEST = BYTES.size, 64
SMALL = ModelConfig(
    vocab_size=V, num_layers=2, d_model=16, d_ff=24, num_heads=4, num_kv_heads=2, head_dim=8,
    pattern=("local", "global"), window=5,
)  # fmt: skip
WHOLE = dataclasses.replace(SMALL, pattern=("global",), window=0)
VARIANTS = {
    "grouped, local, scanned": SMALL,
    "grouped, local, unrolled": dataclasses.replace(SMALL, scan_layers=False),
    "GPT-NeoX": dataclasses.replace(
        WHOLE, norm="layer", attention_bias=True, attention_out_bias=True, mlp_bias=True, gated_mlp=False,
        parallel_residual=True, rotary_dim=4, tie_embeddings=False, embed_scale=False,
    ),
    "Gemma 3 and more": dataclasses.replace(
        SMALL, norm="rms_offset", qk_norm=True, post_norms=True, attention_softcap=5.0, logit_softcap=30.0,
        logit_scale=2.0, attention_scale=0.3, rope_scaling=RopeScaling(kind="linear", factor=4.0),
        local_rope_theta=100.0,
    ),
    "learned positions": dataclasses.replace(
        WHOLE, norm="layer", positions="learned", max_positions=LONGEST, scan_layers=False
    ),
}  # fmt: skip
# A chunk is 16 tokens, and the last token of a prompt is not in it: each side of one border, and of two.
LENGTHS = (17, 1, 40, 16, 5, 18, 33, 34)
DRAWN = Sampling(temperature=1.0, top_k=40, top_p=0.95)


def made(config):
    """A model with random parameters, norms and biases among them."""
    model, rng = Transformer(config), np.random.default_rng(0)

    def drawn(path, x):
        return jnp.asarray((path[-1].key == "scale") + 0.5 * rng.normal(size=x.shape), jnp.float32)

    return model, jax.tree_util.tree_map_with_path(drawn, model.shapes())


@pytest.fixture(scope="module")
def small():
    return made(dataclasses.replace(WHOLE, num_layers=1, scan_layers=False))


@pytest.fixture(scope="module")
def letters(small):
    """A generator without EOS, whose text is known token by token."""
    return Generator(*small, Letters(), burst=4)


def prompts_of(lengths=LENGTHS):
    rng = np.random.default_rng(0)
    return [rng.integers(3, V, length).tolist() for length in lengths]


def uncached(model, params, prompts, count):
    """The likeliest tokens by whole forward passes, one a token."""
    c = model.config

    @jax.jit
    def next_tokens(tokens, ends):
        hidden = model.apply(params, tokens)[jnp.arange(len(tokens)), ends - 1]
        logits = c.logit_scale * hidden @ model.head(params)
        return jnp.argmax(c.logit_softcap * jnp.tanh(logits / c.logit_softcap) if c.logit_softcap else logits, axis=-1)

    rows = [list(prompt) for prompt in prompts]
    for _ in range(count):
        tokens = np.zeros((len(rows), LONGEST), np.int32)
        for row, ids in zip(tokens, rows, strict=True):
            row[: len(ids)] = ids
        for ids, token in zip(rows, next_tokens(tokens, np.array([len(ids) for ids in rows])).tolist(), strict=True):
            ids.append(token)
    new = [ids[len(prompt) :] for ids, prompt in zip(rows, prompts, strict=True)]
    return [ids[: ids.index(BYTES.eos_id)] if BYTES.eos_id in ids else ids for ids in new]


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_is_uncached(name):
    model, params = made(VARIANTS[name])
    prompts = prompts_of()
    wanted = uncached(model, params, prompts, 12)
    assert len({i for ids in wanted for i in ids}) > 10 and sum(map(len, wanted)) > 60  # it says something
    generator = Generator(model, params, BYTES, prefill_tokens=8 * 16, burst=5)
    assert generator.generate_ids(prompts, max_tokens=12) == wanted
    speed = generator.speed
    assert (speed.prefill_tokens, speed.decode_tokens) == (sum(LENGTHS) - len(LENGTHS), sum(map(len, wanted)))
    assert speed.decode_seconds > 0 and speed.compile_seconds > 0


def test_a_row_is_its_prompt_seed_and_number(small):
    prompts = [*prompts_of((3, 9, 15)), *prompts_of((3,))]
    together, apart = (Generator(*small, BYTES, max_rows=rows) for rows in (4, 1))
    generate = functools.partial(together.generate_ids, max_tokens=16, sampling=Sampling(1.0))
    drawn = generate(prompts, seed=5)
    assert apart.generate_ids(prompts, max_tokens=16, sampling=Sampling(1.0), seed=5) == drawn
    assert generate(prompts[:3], seed=5) == drawn[:3] and generate(prompts, seed=5) == drawn
    assert drawn[0] != drawn[3]  # one prompt, two numbers
    assert generate(prompts, seed=6) != drawn


def test_on_eight_devices(small):
    prompts = prompts_of((3, 9, 20, 1, 17))
    one = Generator(*small, BYTES)
    eight = Generator(*small, BYTES, mesh=sharding.make_mesh(data=2, fsdp=2, tensor=2), max_rows=6)
    assert eight.generate_ids(prompts, max_tokens=8) == one.generate_ids(prompts, max_tokens=8)
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(eight.params)} == {8}


def test_padded_lengths_are_few_and_near():
    lengths = np.arange(1, 5000)
    found = np.array([padded(int(length)) for length in lengths])
    assert padded(0) == 0 and (found >= lengths).all() and (found - lengths <= np.maximum(15, lengths / 4)).all()
    assert len(set(found.tolist())) < 40


LOGITS = np.log([0.30, 0.05, 0.25, 0.02, 0.2, 0.18])


def exact(sampling):
    """Probabilities by the definition, in float64."""
    p = np.exp(LOGITS / sampling.temperature)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    if sampling.top_k:
        p[order[sampling.top_k :]] = 0
        p /= p.sum()
    kept = next(n for n in range(1, len(p) + 1) if p[order[:n]].sum() >= sampling.top_p - 1e-12)
    p[order[kept:]] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    ("sampling", "support"),
    [
        (Sampling(0.7), 6),
        (Sampling(1.3, top_k=3), 3),
        (Sampling(1.0, top_p=0.7), 3),  # 0.30 + 0.25 + 0.20 is the first sum above
        (Sampling(2.0, top_k=4, top_p=0.6), 3),
        (Sampling(1.0, top_p=1e-6), 1),
        (Sampling(1.0, top_k=100), 6),
    ],
)
def test_tokens_are_drawn_as_the_definition_says(sampling, support):
    count, wanted = 20000, exact(sampling)
    assert (wanted > 0).sum() == support
    keys = jax.random.split(jax.random.key(3), count)
    drawn = jax.jit(sample, static_argnums=2)(jnp.tile(jnp.asarray(LOGITS, jnp.bfloat16), (count, 1)), keys, sampling)
    seen = np.bincount(np.asarray(drawn), minlength=6)
    assert (seen[wanted == 0] == 0).all()
    expected = count * wanted[wanted > 0]
    assert ((seen[wanted > 0] - expected) ** 2 / expected).sum() < 30  # chi-square; at 5 degrees of freedom p = 1e-5


def test_greedy_takes_the_lower_id_of_equals():
    logits = jnp.array([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert sample(logits, jax.random.split(jax.random.key(0), 2), Sampling()).tolist() == [1, 0]


class Letters:
    """A vocabulary of one letter an id."""

    size, bos_id, eos_id = V, None, None

    def encode(self, text):
        return [ord(letter) - 97 for letter in text]

    def decode(self, ids):
        return "".join(chr(97 + i % 26) for i in ids)


def test_stop_strings_across_tokens_and_bursts(letters):
    prompts, options = ["abc", "z"], {"max_tokens": 16, "sampling": Sampling(1.0), "seed": 2}
    texts = letters.generate(prompts, **options)
    assert [len(text) for text in texts] == [16, 16]
    for first, last in ((2, 5), (3, 4), (6, 9), (13, 16)):  # a burst is four
        stop, pieces = [texts[0][first:last], "never"], [[], []]
        wanted = [text[: text.index(stop[0])] if stop[0] in text else text for text in texts]
        assert len(wanted[0]) <= first
        told = letters.generate(prompts, stop=stop, on_text=lambda n, piece, to=pieces: to[n].append(piece), **options)
        assert told == wanted == ["".join(row) for row in pieces]
        ids = letters.generate_ids([Letters().encode(prompt) for prompt in prompts], stop=stop, **options)
        assert Letters().decode(ids[0]) == wanted[0] + stop[0]  # the token that completes it is the last


def test_ends(small, letters):
    ids = letters.generate_ids([[5, 6], [7]], max_tokens=16)
    end = next(n for n in range(2, 16) if ids[0][n] not in ids[0][:n])
    ended = Generator(*small, BYTES, stop_ids=[ids[0][end]])
    told = ended.generate_ids([[5, 6], [7], [], [BYTES.eos_id]], max_tokens=16)
    assert told[0] == ids[0][:end] and told[1] == ids[1][: len(told[1])]
    assert told[2] == told[3]


def test_characters_of_several_tokens_come_whole():
    told = []
    text = Text(BYTES, BYTES.encode("né")[:-1], ["stop!"], told.append)  # the prompt ends within a character
    for i in [*BYTES.encode("né")[-1:], *BYTES.encode("a🙂 st\nsto")]:
        text.add([i])
    assert told == ["é", "a", "🙂", " ", "st\n"]
    text.add(BYTES.encode("€")[:2])
    assert told[-1] == "st\n"
    text.finish()
    assert "".join(told) == text.text and text.text.startswith("éa🙂 st\nsto\N{REPLACEMENT CHARACTER}")


def test_pieces_of_broken_text_make_up_the_result():
    rng = np.random.default_rng(0)
    for _ in range(20):
        told, ids = [], rng.integers(3, V, 40).tolist()
        text = Text(BYTES, BYTES.encode("x"), [], told.append)
        for first in range(0, 40, 3):
            text.add(ids[first : first + 3])
        text.finish()
        assert "".join(told) == text.text == BYTES.decode(ids) and len(told) > 3


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([3], {"sampling": Sampling(temperature=-1.0)}, "temperature=-1.0"),
        ([3], {"sampling": Sampling(temperature=float("nan"))}, "temperature=nan"),
        ([3], {"sampling": Sampling(top_p=0.0)}, "top_p=0.0"),
        ([3], {"sampling": Sampling(top_p=1.5)}, "top_p=1.5"),
        ([3], {"sampling": Sampling(top_k=-1)}, "top_k=-1"),
        ([3], {"max_tokens": 0}, "max_tokens=0"),
        ([3, V], {}, f"prompt 0 has the id {V}"),
        ([-1], {}, "prompt 0 has the id -1"),
        ([], {}, "neither BOS nor EOS"),
        ([3] * 60, {}, "64 learned positions"),
    ],
)
def test_mistakes(prompt, options, message):
    generator = Generator(*made(VARIANTS["learned positions"]), Letters())
    with pytest.raises(UserError, match=message) as error:
        generator.generate_ids([prompt], **{"max_tokens": 5} | options)
    assert "\n" not in str(error.value)


def test_a_run_writes_samples_and_its_model_generates(tmp_path, capsys):
    run = tiny.run(tmp_path, "run", steps=2, optimizer__warmup_steps=1, log__samples=2)
    told = json.loads(run.samples.read_text())
    assert told["step"] == 2 and len(told["samples"]) == 2 and all(one["prompt"] for one in told["samples"])
    assert all(one["greedy"] != one["drawn"] for one in told["samples"])
    section = report_samples.section(report.compare([str(run)]))
    assert "temperature 0.8" in section and all(html.escape(one["greedy"]) in section for one in told["samples"])
    capsys.readouterr()

    def says(*words, status=0):
        assert cli.main(["generate", str(run), "--max_tokens=6", *words]) == status
        return capsys.readouterr()

    streamed = says("--prompt=def ", "--seed=3")
    assert "6 new tokens in" in streamed.err
    (tmp_path / "some.jsonl").write_text('{"prompt": "def "}\n')
    lines = says(f"--prompts={tmp_path / 'some.jsonl'}", "--json", "--seed=3", "--samples=2").out.splitlines()
    told = [json.loads(line) for line in lines]
    assert [one["prompt"] for one in told] == ["def ", "def "]
    assert told[0]["text"] + "\n" == streamed.out and told[1]["text"] != told[0]["text"]
    for words in (["--prompts=absent"], ["--top_p=2"], ["--dtype=float8"], ["--samples=0"], ["--steps=3"]):
        err = says(*words, status=2).err
        assert err.count("\n") == 1 and words[0].partition("=")[0].strip("-") in err


def test_prompts_of_files(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes("def \r\n\nclass\u2028 A".encode())
    (tmp_path / "a.jsonl").write_text('{"prompt": "a\\nb"}\n\n{"prompt": ""}\n')
    assert read_prompts(str(tmp_path / "a.txt")) == ["def ", "class\u2028 A"]
    assert read_prompts(str(tmp_path / "a.jsonl")) == ["a\nb", ""]
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert read_prompts("-") == ["one", "two"]
    for name, content in {"b.jsonl": '{"prompt": "a"}\n{"text": "b"}', "c.txt": "\n", "d.txt": b"\xff"}.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UserError, match="line 2" if name == "b.jsonl" else name):
            read_prompts(str(tmp_path / name))


def test_samples_never_end_a_run(tmp_path):
    said = []
    experiment = SimpleNamespace(config=SimpleNamespace(log=SimpleNamespace(samples=2), steps=1))
    samples.write(experiment, SimpleNamespace(samples=tmp_path / "samples.json"), None, said.append)
    assert len(said) == 1 and said[0].startswith("no samples for the report (AttributeError")
    assert not list(tmp_path.iterdir())
