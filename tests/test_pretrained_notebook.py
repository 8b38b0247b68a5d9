"""colabs/assist_with_a_pretrained_model.ipynb runs from top to bottom, offline; its first cells say what is amiss."""

import json
import os
import re
import sys
import types
from pathlib import Path

import pytest

hub_models = pytest.importorskip("hub_models")
pytest.importorskip("lm_eval")

import jax  # noqa: E402
import tiny  # noqa: E402

NOTEBOOK = Path(__file__).parents[1] / "colabs" / "assist_with_a_pretrained_model.ipynb"
SMALL = {"num_hidden_layers": 1}
LARGE = {"num_hidden_layers": 2, "hidden_size": 96, "num_attention_heads": 12}


def cells() -> list[str]:
    """The notebook's code."""
    found = [c for c in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in found)
    return ["".join(cell["source"]) for cell in found]


def with_settings(source: str, settings: dict) -> str:
    """The notebook's settings with other values."""
    for name, value in settings.items():
        source, found = re.subn(rf"(?m)^{name} = .*$", lambda _, line=f"{name} = {value!r}": line, source)
        assert found == 1, name
    return source


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two Pythias, small and larger, with one tokenizer."""
    made = tmp_path_factory.mktemp("models")
    hub_models.folder(made / "small", "pythia", **SMALL)
    hub_models.folder(made / "large", "pythia", **LARGE)
    return {"SMALL_LM": f"hf:{made / 'small'}", "STUDENT": f"hf:{made / 'large'}"}


def test_it_runs_from_top_to_bottom(models, tmp_path, monkeypatch, capsys):
    shown = []
    ipython = types.ModuleType("IPython.display")
    ipython.Image, ipython.display = lambda path: Path(path).read_bytes(), shown.append
    monkeypatch.setitem(sys.modules, "IPython.display", ipython)
    monkeypatch.chdir(tmp_path)
    extra = {"data.cache_dir": "cache", "data.validation_fraction": 0.2, "data.cores": 1, "mesh.data": 1,
             "validation.every": 2, "log.tensorboard": False, "log.progress": False,
             "log.samples": 0}  # fmt: skip
    settings = models | {"DATA": tiny.corpus(tmp_path / "corpus"), "STEPS": 2, "ROWS": 4,
                         "SEQ_LEN": 32, "QUESTIONS": 6, "OUT": "out", "PROMPTS": ["def "], "EXTRA": extra}  # fmt: skip
    install, given, *rest = cells()
    space: dict = {}
    for source in (install, with_settings(given, settings), *rest):
        exec(compile(source, NOTEBOOK.name, "exec"), space)
    said = capsys.readouterr().out
    assert said.count("what_follows") >= 3 and "=== SALT" in said
    assert "computes in float32, attention by xla" in said
    runs = [json.loads((tmp_path / "out" / name / "config.json").read_text()) for name in ("baseline", "salt")]
    assert {run["facts"]["dtype"] for run in runs} == {"float32"}  # what was said is what ran
    assert runs[0]["facts"]["train_rows"] == runs[1]["facts"]["train_rows"]
    assert [data[:4] for data in shown] == [b"\x89PNG"]
    assert space["difference"] < 1e-4 and type(space["theirs"]).__name__ == "GPTNeoXForCausalLM"


def test_a_gpu_that_jax_does_not_see_is_an_error(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '| Driver Version: 550.54  CUDA Version: 12.4 |'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    with pytest.raises(RuntimeError, match=r"has a GPU, but JAX .* sees only CPUs: run  pip install -U 'jax\[cuda12\]"):
        exec(cells()[0], {})
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    exec(cells()[0], {})
    smi.unlink()
    monkeypatch.setenv("COLAB_TPU_1VM", "1")
    monkeypatch.delenv("JAX_PLATFORMS")
    with pytest.raises(RuntimeError, match=r"has a TPU, but .*'jax\[tpu\]"):
        exec(cells()[0], {})


def test_a_t4_is_told_what_it_lacks(models, monkeypatch, capsys):
    client = types.SimpleNamespace(platform_version="cuda")
    t4 = types.SimpleNamespace(platform="gpu", device_kind="Tesla T4", compute_capability="7.5", client=client)
    monkeypatch.setattr(jax, "devices", lambda *_: [t4])
    space = {"jax": jax, "SEQ_LEN": 64, **models}
    exec(cells()[2], space)
    said = capsys.readouterr().out
    assert "Tesla T4: computes in float32, attention by xla" in said
    assert "bfloat16 is not native here (compute capability 7.5, below 8)" in said
    assert "flash attention (cudnn) is not taken: it takes bfloat16 and float16, not float32" in said
