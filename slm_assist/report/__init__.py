"""Runs' files to numbers, pictures and one HTML page. Reads nothing else, and needs no accelerator.

from slm_assist import report
frame = report.load("runs/salt")  # pandas.DataFrame of metrics.jsonl
comparison = report.compare(["runs/small", "runs/baseline", "runs/salt"])
print(report.text_table(comparison))
report.write(comparison, "runs/report")
"""

import sys
from collections.abc import Sequence

from slm_assist.report.compare import Comparison, compare
from slm_assist.report.page import write
from slm_assist.report.runs import Run, load, read_run
from slm_assist.report.selection import Selection, look
from slm_assist.report.tables import text_table

__all__ = ["Comparison", "Run", "Selection", "compare", "load", "look", "read_run", "run_report", "text_table", "write"]


def run_report(
    run_dirs: list[str],
    out_dir: str,
    *,
    baseline: str | None = None,
    lists: Sequence[str] = (),
    scores: Sequence[str] = (),
) -> Comparison:
    """Compares the runs, writes the page, its pictures and results.json, and prints the table and the path.

    Args:
      lists: files of row ids that `slm-assist select` wrote, to be compared with what the runs selected.
      scores: directories that `slm-assist score` wrote, to be shown beside.

    Raises:
      UserError: as `compare`, `look` and `write`.
    """
    comparison = compare(run_dirs, baseline=baseline)
    page = write(comparison, out_dir, look(comparison, lists=lists, scores=scores))
    text = f"{text_table(comparison)}\n\n{page}"
    encoding = sys.stdout.encoding or "utf-8"  # a terminal without UTF-8 gets '?' instead of a traceback
    print(text.encode(encoding, "replace").decode(encoding))
    return comparison
