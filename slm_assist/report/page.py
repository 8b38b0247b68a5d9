"""One HTML page that needs nothing beside it, its pictures, and results.json with every figure in it."""

import html
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from slm_assist.errors import UserError
from slm_assist.report import coloured, samples, selection_page, selection_plots, tables
from slm_assist.report.compare import Comparison, Method
from slm_assist.report.gifts import gifts
from slm_assist.report.page_parts import figure_html, table_html
from slm_assist.report.plots import colours_of, pictures
from slm_assist.report.selection import Selection, look
from slm_assist.report.words import first_lines

STYLE = """
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #222; background: #fff;
       max-width: 62rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin: 0 0 1rem; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .5rem; }
ul.first { list-style: none; margin: 0; padding: 0; }
ul.first li { border-left: 4px solid #bbb; margin: .35rem 0; padding: .15rem .8rem; }
ul.first li.gain { border-color: #009E73; } ul.first li.loss { border-color: #D55E00; background: #fdf3ec; }
ul.first li.data, ul.first li.noise { border-color: #0072B2; }
img { width: 100%; height: auto; } figure { margin: 0; }
figcaption, p.note { color: #555; font-size: .87rem; margin: .4rem 0 0; }
div.wide { overflow-x: auto; }
summary { cursor: pointer; font-weight: 600; margin: .8rem 0 .4rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; min-width: 60%; }
th { text-align: right; vertical-align: bottom; font-weight: 600; border-bottom: 2px solid #444; }
td { text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th, td { padding: .3rem .7rem; } th:first-child, td:first-child { text-align: left; padding-left: 0; }
table.words { font-size: .8rem; } table.words th, table.words td { text-align: left; white-space: normal; }
table.words td { overflow-wrap: anywhere; min-width: 2rem; }
@media print { body { margin: 0; max-width: none; font-size: 11px; } h2 { break-after: avoid; }
  figure, tr { break-inside: avoid; } div.wide { overflow: visible; } }
"""
CAPTIONS = {
    "validation.png": "Plain cross-entropy on the validation rows. Training losses of assisted runs contain "
    "soft labels and are compared nowhere. Below: the last half of BASELINE's run, enlarged. Dotted: where soft labels "
    "end. Dashed: BASELINE's final quality. The learning rate of a point is that of the running schedule.",
    "seconds.png": "The same against seconds of training, without compilation, validation and saves.",
    "buckets.png": "Validation rows in thirds by the loss of the run that the configs' validation.buckets names.",
    "cost.png": "Where the time of each run went.",
}


def write(comparison: Comparison, out_dir: str | Path, selection: Selection | None = None) -> Path:
    """Writes report.html, its pictures as PNG files and results.json, each whole or not at all.

    Args:
      selection: what the section on selected rows shows; None: what the runs themselves say of it.

    Returns:
      The path of the page.

    Raises:
      UserError: matplotlib is not installed, `out_dir` cannot be written, or as `selection.look`.
    """
    selection = look(comparison) if selection is None else selection
    try:
        images = pictures(comparison) | selection_plots.pictures(selection, colours_of(comparison))
    except ImportError as error:
        raise UserError(f"the report needs matplotlib ({error}): pip install matplotlib") from error
    out = Path(out_dir)
    results = json.dumps(to_json(comparison, selection), indent=1, ensure_ascii=False) + "\n"
    files = images | {"results.json": results.encode(), "report.html": page(comparison, images, selection).encode()}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            _write_atomically(out / name, content)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{out}: the report cannot be written there ({reason}); choose another") from error
    return out / "report.html"


def _write_atomically(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def page(comparison: Comparison, images: dict[str, bytes], selection: Selection) -> str:
    """The page as a string; pictures are data URLs, and there is no script."""
    figures = {name: figure_html(name, images[name], CAPTIONS[name]) for name in CAPTIONS if name in images}
    first = first_lines(comparison)
    lines = "".join(f'<li class="{line.tone}">{html.escape(line.text)}</li>\n' for line in first)
    body = [
        "<h1>What the small LM was worth</h1>", f'<ul class="first">\n{lines}</ul>',
        figures["validation.png"], table_html(tables.quality_table(comparison)),
        table_html(tables.ratio_table(comparison)), table_html(tables.absolute_table(comparison)),
        figures["seconds.png"],
        "<h2>Easy, medium and hard rows</h2>" if "buckets.png" in figures else "",
        figures.get("buckets.png", ""),
        table_html(tables.part_table(comparison, "buckets", "Final log-perplexity by bucket")),
        table_html(tables.part_table(comparison, "domains", "Final log-perplexity by domain")),
        selection_page.section(selection, images), samples.section(comparison),
        table_html(tables.gift_table(comparison)), table_html(tables.update_table(comparison)),
        table_html(tables.phase_table(comparison)), figures.get("cost.png", ""),
        table_html(tables.run_table(comparison), "words"),
    ]  # fmt: skip
    style = STYLE + samples.STYLE + (coloured.STYLE if selection else "")
    head = f'<meta charset="utf-8"><title>slm_assist report</title><style>{style}</style>'
    content = "\n".join(body)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{content}\n</body></html>\n'


def to_json(comparison: Comparison, selection: Selection) -> dict[str, Any]:
    """Every figure of the tables, with the runs' configs and facts (hardware, versions, fingerprints)."""
    return {
        "first_lines": [line.text for line in first_lines(comparison)],
        "baseline": comparison.baseline.name if comparison.baseline else None,
        "noise": comparison.noise,
        "methods": {m.name: _method_json(m) for m in comparison.methods},
    } | ({"selection": selection.to_json()} if selection else {})


def _method_json(m: Method) -> dict[str, Any]:
    fields = ("final", "difference", "to_target", "ratio", "whole", "domains", "buckets", "seconds", "flops",
              "helper", "curves")  # fmt: skip
    runs = [
        {"path": str(run.path), "seed": run.seed, "finished": run.finished, "step": run.final["step"],
         "tokens": run.tokens, "switch_step": run.switch_step, "summary": run.summary, "facts": run.facts,
         "config": run.config}
        for run in m.runs
    ]  # fmt: skip
    given = {gift.name: gift.to_json() for gift in gifts(m.runs[0])}
    return {"kind": m.kind, "gifts": given} | {name: _plain(getattr(m, name)) for name in fields} | {"runs": runs}


def _plain(value: Any) -> Any:
    if hasattr(value, "to_json"):
        return value.to_json()
    return {key: _plain(part) for key, part in value.items()} if isinstance(value, dict) else value
