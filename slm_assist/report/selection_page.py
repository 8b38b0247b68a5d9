"""The section "What was selected" of the page."""

import html

from slm_assist.report import coloured
from slm_assist.report.page_parts import figure_html, table_html
from slm_assist.report.selection import Choice, Selection
from slm_assist.report.tables import NONE, Table

SHOWN = 3  # samples as text; those of further runs stay in their directories
CAPTIONS = {
    "selection-scores.png": "Scores by domain, each histogram scaled to its own highest column; the numbers of rows "
    "are in brackets, the orange lines are medians. A sample: rows scored once, when the run began.",
    "selection-steps.png": "What the scorer thought of the rows it was offered and of those that were kept.",
    "selection-domains.png": "Right of the dashed line a domain is kept more often than rows in general. Thin lines "
    "are 95 % intervals, as if rows were independent.",
}
RUNS_COMPARED = (
    " Of each method, the first run. Only the rows that a run kept are in its files, not those it refused: two runs "
    "with one order of the data are taken to have been offered its first rows, others to have been offered rows drawn "
    "blindly from the corpus. So a run and a list agree on few rows even if they judge alike, as the run was offered "
    "only a part of the corpus: read the last column."
)


def section(selection: Selection, images: dict[str, bytes]) -> str:
    """HTML of the section; empty if nothing was selected."""
    if not selection:
        return ""
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in selection.notes)
    parts = [
        "<h2>What was selected</h2>", notes,
        *(figure_html(name, images[name], CAPTIONS[name]) for name in CAPTIONS if name in images),
        table_html(domain_table(selection)), table_html(overlap_table(selection)),
        table_html(correlation_table(selection)), *_rows(selection),
    ]  # fmt: skip
    return "\n".join(part for part in parts if part)


def _rows(selection: Selection):
    """The samples as coloured text, the first one unfolded."""
    readable = [c for c in selection.choices if c.sample is not None and c.vocabulary is not None]
    if readable:
        yield "<h2>Rows with the highest, middle and lowest scores</h2>"
    for number, choice in enumerate(readable[:SHOWN]):
        words = f"{choice.name}: {choice.score}, {_model(choice)}"
        text = coloured.rows_html(choice.sample, choice.vocabulary)
        state = " open" if number == 0 else ""
        yield f"<details{state}><summary>{html.escape(words)}</summary>\n{text}</details>"
    if len(readable) > SHOWN:
        names = ", ".join(choice.name for choice in readable[SHOWN:])
        yield f'<p class="note">Not shown as text: {html.escape(names)}.</p>'


def _model(choice: Choice) -> str:
    roles = choice.sample.header["roles"]
    role = "scorer" if "scorer" in roles else next(iter(roles), None)
    if role is None:
        return f"of {len(choice.sample.row_ids)} rows"
    known = roles[role] if isinstance(roles[role], dict) else {}
    step = f" at step {known['step']}" if "step" in known else ""
    return f"of {len(choice.sample.row_ids)} rows, as the {role}{step} sees them"


def _of_runs(selection: Selection, words: str) -> str:
    """`words` if some of the rows were chosen by a run, from candidates that are not known."""
    return words if any(c.picked is not None and c.picked.order is not None for c in selection.choices) else ""


def domain_table(selection: Selection) -> Table | None:
    """Candidates and kept rows of each domain, a choice a column."""
    choices = [c for c in selection.choices if c.kept_share]
    if not choices:
        return None
    names = list(dict.fromkeys(name for c in choices for name in c.domains))
    names.sort(key=lambda name: -sum(c.domains.get(name, (0, 0))[0] for c in choices))

    def cell(choice: Choice, pair: tuple[int, int]) -> str:
        if not pair[0]:
            return NONE
        share = pair[1] / pair[0]
        return f"{100 * share:.1f} % of {pair[0]:,} ({share / choice.kept_share:.2f})"

    rows = [(name, *(cell(c, c.domains.get(name, (0, 0))) for c in choices)) for name in names]
    rows.append(("all", *(cell(c, tuple(map(sum, zip(*c.domains.values(), strict=True)))) for c in choices)))
    return Table(
        "What was kept of each domain", ("domain", *(c.name for c in choices)), rows,
        "Rows kept, of the candidates; in brackets, over the share kept of all candidates."
        + _of_runs(selection, " A row that was a candidate in several epochs counts each time; for a list, every row "
                              "of the corpus is a candidate."),
    )  # fmt: skip


def overlap_table(selection: Selection) -> Table | None:
    """A pair of selections a row, with what chance would give."""
    if not selection.overlaps:
        return None
    rows = []
    for o in selection.overlaps:
        times = f"{o.common / o.by_chance:.2f}" if o.by_chance else NONE
        pairs = (f"{100 * measure(o.common):.1f} % ({100 * measure(o.by_chance):.1f} %)"
                 for measure in (o.share_of_smaller, o.jaccard))  # fmt: skip
        shares = (f"{100 * o.common / n:.1f} %" for n in o.rows)
        rows.append((" \u2229 ".join(o.names), *(f"{n:,}" for n in o.rows), f"{o.common:,}", *shares, *pairs, times))
    return Table(
        "How much the selections agree",
        ("pair", "rows of the first", "of the second", "in both", "both / first", "both / second",
         "share of the smaller (by chance)", "Jaccard (by chance)", "times chance"), rows,
        "Distinct rows that were selected. By chance: if each had chosen as many rows blindly, all candidates being "
        "equally likely." + _of_runs(selection, RUNS_COMPARED),
    )  # fmt: skip


def correlation_table(selection: Selection) -> Table | None:
    """Rank correlations of scores over the whole corpus."""
    if not selection.correlations:
        return None
    rows = [(f"{a}, {b}", f"{value:+.3f}") for a, b, value in selection.correlations]
    note = "Spearman\u2019s, over all rows of the corpus: 1 is the same order, 0 none, -1 the reverse."
    return Table("How alike the scores rank the corpus", ("scores", "rank correlation"), rows, note)
