"""colabs/inspect_selection.ipynb runs from top to bottom, on little text and for few steps."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import tiny

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "colabs" / "inspect_selection.ipynb"
# What a notebook shows goes to files shown-1, shown-2, ...
STUB = """
import sys, types
ipython, shown = types.ModuleType("IPython"), []
ipython.version_info = (9, 0)
ipython.display = types.ModuleType("IPython.display")
sys.modules["IPython"], sys.modules["IPython.display"] = ipython, ipython.display
ipython.display.HTML = str.encode
ipython.display.Image = lambda data: data
def display(data, shown=shown):
    shown.append(data)
    open(f"shown-{len(shown)}", "wb").write(data)
ipython.display.display = display
"""
SMALL = {"STEPS": 12, "POOL": 60, "OUT": "runs/inspect"}


def test_the_notebook_runs(tmp_path):
    cells = [c for c in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    program = "\n".join("".join(cell["source"]) for cell in cells)
    kept = ("steps", "validation.every", "checkpoint.every", "data.domain_field", "optimizer.warmup_steps")
    shape = {key: value for key, value in tiny.KEYS.items() if key not in kept}
    shape |= {"data.cache_dir": str(tmp_path / "cache"), "data.domain_field": "meta.pile_set_name",
              "data.source": tiny.corpus(tmp_path / "corpus")}  # fmt: skip
    for name, value in (SMALL | {"EXTRA": shape}).items():
        program, found = re.subn(rf"(?m)^{name} = .*$", lambda _, line=f"{name} = {value!r}": line, program)
        assert found == 1, name
    (tmp_path / "notebook.py").write_text(STUB + program, encoding="utf-8")
    done = subprocess.run([sys.executable, "notebook.py"], cwd=tmp_path, timeout=300, text=True, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    shown = [(tmp_path / f"shown-{i}").read_bytes() for i in range(1, 6)]
    assert [data[:4] == b"\x89PNG" for data in shown] == [True, True, False, False, False]
    domains, overlap, rows = (data.decode() for data in shown[2:])
    assert "email" in domains and "json" in domains
    assert "SALT \u2229 random" in overlap and "highest, 1 of 3" in rows
    assert len(re.findall(r"\d% of rows score 0", done.stdout)) == 3
    assert len(re.findall(r"of the rows are the same", done.stdout)) == 6
