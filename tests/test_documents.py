"""What the README and the colabs show, runs."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import hub_models
import pytest
import tiny

from slm_assist import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [line for language, code in BLOCKS if language == "bash" for line in code.splitlines() if line]

# The README's commands, on less data and for fewer steps.
SMALL = tiny.KEYS | {
    "steps": 4,
    "checkpoint.keep_fraction": 0.5,
    "select.pool_factor": 2,
    "data.cache_dir": "cache",
    "validation.every": 2,
    "data.domain_field": "",
}
SOONER = {
    "represent.steps=173": "represent.steps=1",
    "=400": "=2",
    "hf:EleutherAI/": "hf:models/",
    "--max_tokens=32": "--max_tokens=4",
    "--temperature=0": "--temperature=0 --max_tokens=4",
}
WITH_KEYS = ("train", "prepare", "score")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A directory in which the README's files and runs exist."""
    directory = tmp_path_factory.mktemp("readme")
    (directory / "experiments").symlink_to(ROOT / "experiments")
    corpus = Path(tiny.corpus(directory / "pile").removeprefix("jsonl:"))
    import zstandard

    (directory / "pile" / "00.jsonl.zst").write_bytes(zstandard.compress(corpus.read_bytes()))
    corpus.unlink()
    (directory / "books").mkdir()
    for name in ("statistics", "textwrap"):
        source = Path(os.__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
        (directory / "books" / f"{name}.txt").write_text(source, encoding="utf-8")
    hub_models.folder(directory / "models" / "pythia-70m", "pythia")
    hub_models.folder(directory / "models" / "pythia-410m", "pythia", hidden_size=96, num_attention_heads=12)
    (directory / "prompts.txt").write_text("import\ndef main(\n", encoding="utf-8")
    (directory / "gsm8k").mkdir()
    problems = [{"question": f"{n} and {n}?", "answer": f"Twice {n}.\n#### {2 * n}"} for n in range(400)]
    for split in ("train", "test"):
        lines = "".join(json.dumps(problem) + "\n" for problem in (problems if split == "train" else problems[:2]))
        (directory / "gsm8k" / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return directory


def small_options(words: list[str]) -> list[str]:
    """Smaller everything; but a shape that is named stays."""
    named = any("model=" in word or "size=hf:" in word for word in words)
    keys = {key: value for key, value in SMALL.items() if not (named and key.startswith("model."))}
    if named:
        keys["data.seq_len"] = 64
    return [f"--{key}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for key, v in keys.items()]


@pytest.fixture(scope="module")
def after_commands(workplace):
    """The same directory, once the README's `slm-assist` commands have run there, one after the other."""
    before = os.getcwd()
    os.chdir(workplace)
    try:
        for command in COMMANDS:
            for there, here in SOONER.items():
                command = command.replace(there, here)
            words = shlex.split(command)
            if words[0] == "slm-assist":
                assert cli.main(words[1:] + (small_options(words) if words[1] in WITH_KEYS else [])) == 0, command
    finally:
        os.chdir(before)
    return workplace


def test_readme_commands(after_commands):
    assert (after_commands / "runs" / "salt" / "summary.json").is_file()
    assert (after_commands / "runs" / "report" / "report.html").is_file()


QUICKSTARTS = [command for command in COMMANDS if "quickstart" in command]


@pytest.mark.slow  # the colab runs the quickstart too
@pytest.mark.parametrize("command", QUICKSTARTS[1:])
def test_readme_quickstart_commands(workplace, monkeypatch, command):
    monkeypatch.chdir(workplace)
    sys.path.insert(0, str(ROOT / "experiments"))
    import quickstart

    assert QUICKSTARTS[0] == "make quickstart"
    words = shlex.split(command.replace("--seeds 3", "--seeds 2"))  # the same, but sooner
    arguments = shlex.split(words[2].removeprefix("ARGS=")) if words[0] == "make" else words[2:]
    options = [option for option in small_options([]) if "steps" not in option and "domain_field" not in option]
    shape = [option for option in options if not option.startswith(("--mesh", "--data.validation_fraction"))]
    out = [] if any(word.startswith("--out") for word in arguments) else ["--out", "runs/quickstart"]
    assert quickstart.main([*arguments, *out, "--scale", "0.01", *shape]) == 0
    report = Path(out[1] if out else arguments[arguments.index("--out") + 1])
    assert (report / "report.html").is_file() and (report / "results.json").is_file()


def test_the_quickstart_runs_what_the_gifts_ask_for(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import quickstart

    assert quickstart.methods("labels,data") == ["small_lm", "baseline", "rkd", "salt", "salt_ds"]
    assert quickstart.methods("data, weights") == ["small_lm", "baseline", "select_only", "grow"]
    everything = quickstart.methods(",".join(quickstart.GIFTS))
    assert everything[-4:] == ["grow", "grow_salt", "let", "let_salt"]
    assert all((ROOT / "experiments" / f"{method}.py").is_file() for method in everything)
    assert quickstart.main(["--gifts", "labels,wieghts"]) == 2
    assert "--gifts='wieghts': choose one of" in capsys.readouterr().err


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_readme_python(after_commands, monkeypatch, code):
    monkeypatch.chdir(after_commands)
    exec(compile(code, "README.md", "exec"), {})


def test_own_loop_is_under_20_lines():
    loop = next(code for code in PYTHON if "train_step" in code)
    needed = loop[loop.index("salt, optimizer") : loop.index("tokens = jax.random")]
    assert len([line for line in needed.splitlines() if line.strip()]) < 20


def test_readme_names_every_metric(workplace):
    """Each name in a run's metrics.jsonl stands in the README's table."""
    table = set(re.findall(r"`([a-z_]+)(?:\.\*)?`", README[README.index("### Metrics") : README.index("The buckets")]))
    small = str(tiny.run(workplace, "metrics/small", steps=3, data__sentinels=8, checkpoint__keep_fraction=0.3))
    common = {"steps": 3, "select__steps": 1, "data__objective": "span", "data__vocabulary": small}
    runs = [
        tiny.run(workplace, "metrics/salt_ds", assist__schedule="step", assist__steps=1, assist__teacher=small,
                 validation__buckets=small, select__rows="online", select__rule="threshold", **common),
        tiny.run(workplace, "metrics/rho1", select__token_share=0.5, select__reference=small, **common),
    ]  # fmt: skip
    lines = [json.loads(line) for run in runs for line in run.metrics.read_text().splitlines()]
    names = {key for line in lines for key in line} - {"kind", "step", "stage"}
    assert {"rows", "score_threshold", "selected_tokens", "dropped_tokens"} <= names <= table


def test_no_link_in_the_readme_is_broken():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_colab_runs_from_top_to_bottom(tmp_path):
    notebook = json.loads((ROOT / "colabs" / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    shape = {k: v for k, v in SMALL.items() if k not in ("model.size", "data.domain_field", "data.cache_dir")}
    shape |= {"data.cache_dir": str(tmp_path / "cache"), "data.source": tiny.corpus(tmp_path / "corpus")}
    stub = (
        "import sys, types\n"
        "sys.modules['IPython'] = types.ModuleType('IPython')\n"
        "sys.modules['IPython'].version_info = (9, 0)\n"
        "sys.modules['IPython.display'] = types.ModuleType('IPython.display')\n"
        "sys.modules['IPython.display'].Image = lambda path: open(path, 'rb').read()\n"
        "sys.modules['IPython.display'].display = len\n"
    )
    program = stub + "\n".join("".join(cell["source"]).replace("EXTRA = {}", f"EXTRA = {shape!r}") for cell in cells)
    (tmp_path / "colab.py").write_text(program)
    subprocess.run([sys.executable, "colab.py"], cwd=tmp_path, check=True, timeout=300,
                   env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert (tmp_path / "runs" / "colab" / "report" / "report.html").is_file()
