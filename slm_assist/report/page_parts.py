"""Figures and tables as HTML."""

import base64
import html

from slm_assist.report.tables import Table


def figure_html(name: str, image: bytes, caption: str) -> str:
    """A picture, within the page itself, and its caption."""
    source = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    words = html.escape(caption)
    return f'<figure><img alt="{name}" src="{source}"><figcaption>{words}</figcaption></figure>'


def table_html(table: Table | None, style: str = "") -> str:
    """A table under its title; empty for None."""
    if table is None:
        return ""
    header = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header)
    rows = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    return (
        f'<h2>{html.escape(table.title)}</h2>\n<div class="wide"><table class="{style}">\n'
        f"<thead><tr>{header}</tr></thead>\n<tbody>{rows}</tbody></table></div>{note}"
    )
