"""Models in Hugging Face's form: the same logits as transformers, out and in again, and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

hub_models = pytest.importorskip("hub_models")

import transformers  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

from slm_assist import cli, pretrained, sharding  # noqa: E402
from slm_assist.assist import weights  # noqa: E402
from slm_assist.errors import UserError  # noqa: E402
from slm_assist.models import Transformer, named  # noqa: E402
from slm_assist.models.hf import families  # noqa: E402
from slm_assist.models.hf.export import export  # noqa: E402

T = 41


def our_logits(model, params, tokens, seen, positions):
    @jax.jit
    def run(params, tokens, seen, positions):
        c = model.config
        hidden = model.apply(params, tokens, segment_ids=seen, positions=positions)
        values = hidden @ model.head(params) * c.logit_scale
        return c.logit_softcap * jnp.tanh(values / c.logit_softcap) if c.logit_softcap else values

    return np.asarray(run(params, *(x.astype(np.int32) for x in (tokens, seen, positions))))


def rows(vocab_size, far):
    """Two rows, one with padding in front, at positions that begin at `far`."""
    rng = np.random.default_rng(0)
    seen = np.ones((2, T), np.int64)
    seen[1, :6] = 0
    positions = np.maximum(seen.cumsum(1) - 1, 0) + far
    return rng.integers(0, vocab_size, (2, T)), seen, positions


def apart(a, b, seen):
    """The largest difference where there is no padding."""
    return np.abs(a - b)[seen > 0].max()


@pytest.mark.parametrize("name", hub_models.CONFIGS)
def test_logits_are_those_of_transformers_both_ways(tmp_path, name):
    theirs = hub_models.folder(tmp_path / "in", name)
    loaded = pretrained.load(f"hf:{tmp_path / 'in'}")
    size = loaded.model.config.vocab_size
    assert size == loaded.vocabulary.size < hub_models.VOCAB
    for far in (0, 3000) if name == "gpt 2" else (0, 30_000):
        given = rows(size, far)
        expected = hub_models.logits(theirs, *given)[..., :size]
        assert np.abs(expected).max() > 1
        assert apart(our_logits(loaded.model, loaded.params, *given), expected, given[1]) < 1e-4

    kind = export(loaded.params, loaded.model.config, loaded.vocabulary, tmp_path / "out", shard_bytes=20_000)
    assert kind == json.loads((tmp_path / "in" / "config.json").read_text())["model_type"]
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    again = pretrained.load(f"hf:{tmp_path / 'out'}")
    assert again.model.config == loaded.model.config
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
    eager = hub_models.EAGER if "gemma" in name else {}
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32", **eager).eval()
    assert apart(hub_models.logits(read, *given), expected, given[1]) < 1e-5
    text = "def f(x):\n    return x + 1"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(text, add_special_tokens=False).input_ids == loaded.vocabulary.encode(text)


def test_older_files_mean_the_same(tmp_path):
    """Fields as transformers 4 wrote them, buffers among the tensors, names without prefix."""
    for name, old in {
        "pythia": {"rope_parameters": None, "rotary_pct": 0.25, "rotary_emb_base": 10000},
        "llama 3": {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": {
            key: value for key, value in hub_models.LLAMA3.items() if key != "rope_theta"}},
        "gemma 3": {"rope_parameters": None, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "layer_types": None,
                    "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window_pattern": 6,
                    "_sliding_window_pattern": None, "head_dim": 8},
        "gemma 2": {"layer_types": None, "rope_parameters": None, "rope_theta": 10000},
        "qwen 2": {"layer_types": None},
        "gpt 2": {},
    }.items():  # fmt: skip
        place = tmp_path / name
        hub_models.folder(place, name)
        new = pretrained.load(f"hf:{place}")
        hub_models.edit(place, **old)
        if name == "gpt 2":
            tensors = load_file(place / "model.safetensors")
            bare = {key.removeprefix("transformer."): value for key, value in tensors.items()}
            save_file(bare | {"h.0.attn.bias": np.ones((1, 1, 8, 8), np.float32)}, place / "model.safetensors")
        older = pretrained.load(f"hf:{place}")
        assert older.model.config == new.model.config, name
        jax.tree.map(np.testing.assert_array_equal, older.params, new.params)


def test_on_eight_devices_each_has_its_part(tmp_path):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    hub_models.folder(tmp_path, "pythia")
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    one, eight = pretrained.load(f"hf:{tmp_path}"), pretrained.load(f"hf:{tmp_path}", mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, eight.params, one.params)
    query = eight.params["groups"]["layer_0"]["attention"]["query"]
    assert query.addressable_shards[0].data.size * 4 == query.size


def test_rounded_and_half_sized(tmp_path):
    """bfloat16 in, as most models are published, and out."""
    theirs = hub_models.model("qwen 3").bfloat16()
    theirs.save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "tokenizer.json").write_text(hub_models.tokenizer_json())
    loaded = pretrained.load(f"hf:{tmp_path / 'in'}")
    weight = theirs.model.layers[1].mlp.up_proj.weight.detach().float().numpy()
    np.testing.assert_array_equal(loaded.params["groups"]["layer_0"]["mlp"]["up"][1], weight.T)
    export(loaded.params, loaded.model.config, loaded.vocabulary, tmp_path / "out", dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, pretrained.load(f"hf:{tmp_path / 'out'}").params, loaded.params)


BAD_CONFIGS = {
    "model_type": ({"model_type": "mamba"}, "mamba"),
    "a field that is not known": ({"use_magic": True}, "use_magic"),
    "a kind of rope": ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
    "an activation": ({"hidden_act": "quick_gelu"}, "quick_gelu"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "somebody's code": ({"auto_map": {"AutoModelForCausalLM": "x.Y"}}, "auto_map"),
    "a part of each head": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "interleaved rotation": ({"rope_interleaved": True}, "rope_interleaved"),
    "half of nothing": ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.1}}, "partial_rotary"),
    "no sizes": ({"hidden_size": None}, "hidden_size"),
    "sizes that do not fit": ({"intermediate_size": 30}, "mlp"),
    "more layers": ({"num_hidden_layers": 4}, "model.layers.3"),
    "fewer layers": ({"num_hidden_layers": 2}, "model.layers.2"),
    "fewer rows than tokens": ({"vocab_size": 280}, "280"),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    place = tmp_path_factory.mktemp("llama")
    hub_models.folder(place, "llama 3")
    return place


def copied(place, tmp_path):
    for file in place.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def refused(name):
    with pytest.raises(UserError) as caught:
        pretrained.load(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_what_is_not_understood_is_named(llama, tmp_path, case):
    changes, said = BAD_CONFIGS[case]
    hub_models.edit(copied(llama, tmp_path), **changes)
    assert said in refused(f"hf:{tmp_path}")


def test_fields_without_effect_are_read_over(llama, tmp_path):
    hub_models.edit(copied(llama, tmp_path), use_mrope=False, rope_interleaved=False, top_k=50, torchscript=False)
    assert pretrained.load(f"hf:{tmp_path}").model.config == pretrained.load(f"hf:{llama}").model.config


def test_transposed_and_contradicting_tensors(tmp_path):
    hub_models.folder(tmp_path, "gpt 2")
    weights_file = tmp_path / "model.safetensors"
    whole = load_file(weights_file)
    name = "transformer.h.1.mlp.c_fc.weight"
    save_file(whole | {name: np.ascontiguousarray(whole[name].T)}, weights_file)
    assert name in refused(f"hf:{tmp_path}")
    embedding = whole["transformer.wte.weight"]
    save_file(whole | {"lm_head.weight": embedding}, weights_file)
    pretrained.load(f"hf:{tmp_path}")
    save_file(whole | {"lm_head.weight": embedding + 1}, weights_file)
    assert "lm_head.weight is not transformer.wte.weight" in refused(f"hf:{tmp_path}")


def test_missing_fields_are_what_transformers_takes_them_for(tmp_path):
    for name, fields in {
        "gemma 2": ("attn_logit_softcapping", "final_logit_softcapping"),
        "mistral": ("sliding_window",),
        "gemma": ("hidden_act", "hidden_activation"),
    }.items():
        place = tmp_path / name
        hub_models.folder(place, name)
        hub_models.edit(place, **dict.fromkeys(fields))
        eager = hub_models.EAGER if name == "gemma 2" else {}
        theirs = transformers.AutoModelForCausalLM.from_pretrained(place, dtype="float32", **eager).eval()
        loaded = pretrained.load(f"hf:{place}")
        given = rows(loaded.model.config.vocab_size, 0)
        expected = hub_models.logits(theirs, *given)[..., : loaded.model.config.vocab_size]
        assert apart(our_logits(loaded.model, loaded.params, *given), expected, given[1]) < 1e-4, name


def test_damaged_and_missing_files(llama, tmp_path):
    place = copied(llama, tmp_path)
    weights = place / "model.safetensors"
    whole = weights.read_bytes()
    for cut in (4, 100, len(whole) - 8):
        weights.write_bytes(whole[:cut])
        assert "model.safetensors" in refused(f"hf:{place}") and "download it again" in refused(f"hf:{place}")
    weights.rename(place / "pytorch_model.bin")
    assert "pickle" in refused(f"hf:{place}")
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1-of-2.safetensors"}}))
    assert "model-1-of-2.safetensors" in refused(f"hf:{place}")
    (place / "tokenizer.json").unlink()
    assert "tokenizer" in refused(f"hf:{place}")
    (place / "config.json").unlink()
    assert "config.json" in refused(f"hf:{place}")
    assert "no such folder" in refused("hf:./nowhere")
    assert "hf download some/model" in refused("hf:some/model")
    assert f"hf:{llama}" in refused(str(llama))


def test_a_model_that_no_family_can_say(tmp_path, llama):
    loaded = pretrained.load(f"hf:{llama}")
    odd = dataclasses.replace(loaded.model.config, parallel_residual=True)
    with pytest.raises(UserError, match="parallel_residual=True"):
        export(loaded.params, odd, loaded.vocabulary, tmp_path / "out")
    with pytest.raises(UserError, match="there is something"):
        export(loaded.params, loaded.model.config, loaded.vocabulary, llama)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["pythia", "gemma 2"])
def test_a_student_grown_from_one_begins_where_it_is(tmp_path, name):
    hub_models.folder(tmp_path, name)
    small = pretrained.load(f"hf:{tmp_path}")
    old = small.model.config
    times = {"d_model": 2, "d_ff": 3, "num_heads": 2, "num_kv_heads": 2, "num_layers": 2}
    new = dataclasses.replace(old, **{field: getattr(old, field) * by for field, by in times.items()})
    grown = weights.grow(small.params, old, new, noise=0.02, key=jax.random.key(0))
    given = rows(old.vocab_size, 0)
    expected = our_logits(small.model, small.params, *given)
    assert apart(our_logits(Transformer(new), grown, *given), expected, given[1]) < 1e-5 * np.abs(expected).max()
    if old.norm == "layer":
        with pytest.raises(UserError, match=f"use model.d_model={2 * old.d_model}"):
            weights.check(old, dataclasses.replace(new, d_model=old.d_model + 8), depth="zero", noise=0.0)


@pytest.mark.parametrize("size", ["laptop-small", "gpu-35m", "paper-1.5b"])
def test_a_shape_of_ours_has_a_family(size):
    assert families.family_of(named(size, 512))[0].model_type == "granite"


def test_commands(tmp_path, llama, capsys):
    """Imported, exported again: the same numbers; a copy is a run like any other."""
    assert cli.main(["import", f"hf:{llama}", f"--out={tmp_path / 'run'}"]) == 0
    assert cli.main(["export", str(tmp_path / "run"), f"--out={tmp_path / 'back'}"]) == 0
    assert "llama" in capsys.readouterr().out
    here, there = load_file(llama / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert here.keys() == there.keys()
    size = pretrained.open_model(str(tmp_path / "run"), "model").shape().vocab_size
    for name, value in here.items():
        trimmed = value[:size] if "embed" in name or "lm_head" in name else value
        np.testing.assert_array_equal(there[name], trimmed)
    assert cli.main(["import", f"hf:{llama}", f"--out={tmp_path / 'run'}"]) == 2
    assert cli.main(["import", "hf:./nowhere", f"--out={tmp_path / 'x'}"]) == 2
    assert cli.main(["export", str(tmp_path / "none"), f"--out={tmp_path / 'x'}"]) == 2
    assert not (tmp_path / "x").exists()
