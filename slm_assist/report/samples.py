"""The section "What the models write" of the page."""

from slm_assist.report.compare import Comparison
from slm_assist.report.page_parts import table_html
from slm_assist.report.tables import Table

STYLE = """
table.words.samples td { white-space: pre-wrap; vertical-align: top; min-width: 9rem; }
table.words.samples td:first-child { min-width: 0; }
"""


def section(comparison: Comparison) -> str:
    """HTML of the section: of each method the first run's texts; empty where no run has any."""
    rows, temperatures = [], set()
    for m in comparison.methods:
        found = m.runs[0].samples or {"samples": []}
        temperatures.add(found.get("temperature"))
        rows += [(m.name, one["prompt"], one["greedy"], one["drawn"]) for one in found["samples"]]
    if not rows:
        return ""
    drawn = ", ".join(f"{temperature:g}" for temperature in sorted(temperatures - {None}))
    note = "Beginnings of validation rows, continued by the finished models: small models write what looks alike."
    header = ("method", "prompt", "the likeliest tokens", f"drawn at temperature {drawn}")
    return table_html(Table("What the models write", header, rows, note), "words samples")
