"""Rows as text, each token coloured by its loss and underlined where it is among the scorer's top k.

Colour is lightness only, from white to dark brown, so that colour-blind readers and grey prints lose nothing;
the top k is marked by a line, not by a colour.
"""

import html
import re
from collections.abc import Sequence

import numpy as np

from slm_assist.assist.sample import Sample
from slm_assist.data.tokenizers import Vocabulary

EDGES = (0.5, 1.0, 2.0, 4.0, 7.0)  # nats: where one shade ends and the next begins
SHADES = ("#ffffff", "#fff0c2", "#fed27c", "#fb9a3c", "#b8480a", "#6b2503")
DARK = 4  # the first shade with white letters
STYLE = "\n".join([
    ".tokens { white-space: pre-wrap; overflow-wrap: anywhere;",
    "  font: .82rem/1.75 ui-monospace, Menlo, Consolas, monospace;",
    "  border-left: 3px solid #ddd; padding-left: .7rem; margin: .3rem 0 1rem;",
    "  -webkit-print-color-adjust: exact; print-color-adjust: exact; }",
    ".tokens i { font-style: normal; unicode-bidi: isolate; padding-bottom: 1px; color: #111;",
    "  box-shadow: inset -1px 0 rgba(255, 255, 255, .6); }",
    ".tokens s { text-decoration: none; opacity: .4; } .tokens u { text-decoration: none; color: #999; }",
    ".tokens i.k { border-bottom: 2px solid #0072B2; }",
    *(f".tokens i.l{level} {{ background: {shade};{' color: #fff;' if level >= DARK else ''} }}"
      for level, shade in enumerate(SHADES)),
    "p.row { font-size: .87rem; margin: .6rem 0 0; }",
])  # fmt: skip
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"


def rows_html(sample: Sample, vocabulary: Vocabulary, *, each: int = 3, tokens: int = 256, style: bool = False) -> str:
    """The highest-, middle- and lowest-scored rows of a sample, with a legend, as HTML without script.

    Args:
      sample: rows with the loss and rank of their tokens, from `slm_assist.assist.sample`.
      vocabulary: of its ids.
      each: rows of each of the three kinds; fewer where the sample is small.
      tokens: of each row, the first so many are shown.
      style: put the style sheet before it, for a notebook.
    """
    texts, k = token_texts(vocabulary, np.unique(sample.targets)), int(sample.header["k"])
    parts = [f"<style>{STYLE}</style>"] * style + [legend(k)]
    for words, places in pick(sample.score, each).items():
        for number, place in enumerate(places, 1):
            title = f"{words}, {number} of {len(places)}" if len(places) > 1 else words
            parts.append(_row(sample, place, title, texts, tokens))
    return "\n".join(parts)


def pick(score_N: np.ndarray, each: int) -> dict[str, list[int]]:
    """Places of the `each` highest, middle and lowest scores, best first; no place twice, NaN never."""
    order = np.argsort(-np.asarray(score_N, np.float64), kind="stable")
    order = order[~np.isnan(score_N[order])]
    each = max(1, min(each, len(order) // 3))
    rest = order[each:-each]  # empty where there are no more than the highest and the lowest
    middle = max(len(rest) - each, 0) // 2
    spans = {"highest": order[:each], "middle": rest[middle : middle + each], "lowest": order[each:][-each:]}
    return {words: places.tolist() for words, places in spans.items() if len(places)}


def token_texts(vocabulary: Vocabulary, ids: Sequence[int]) -> dict[int, str]:
    """HTML of each id, by id, with spaces, line ends and what cannot be printed made visible."""
    pieces = vocabulary.pieces()
    plain = any(_SPACE in piece for piece in pieces)  # SentencePiece's way of writing, else a piece is no text
    return {int(i): _token(vocabulary, int(i), pieces, plain) for i in ids}


def _token(vocabulary: Vocabulary, i: int, pieces: Sequence[str], plain: bool) -> str:
    if not 0 <= i < len(pieces):
        return f"<u>\u2039{i}\u203a</u>"
    piece = pieces[i]
    if byte := _BYTE.fullmatch(piece):
        value = int(byte[1], 16)
        return visible(chr(value)) if value < 128 else f"<u>\u2039{value:02X}\u203a</u>"
    text = vocabulary.decode([i])
    if not text:  # a control piece, or one that the decoder drops at the beginning of a text
        return visible(piece.replace(_SPACE, " ")) if piece.strip(_SPACE) == "" else f"<u>{visible(piece)}</u>"
    return visible(piece.replace(_SPACE, " ") if plain else text)


def visible(text: str) -> str:
    """`text` escaped for HTML, with marks for spaces, line ends, tabs and other characters that have no shape."""
    return "".join(_MARKS.get(c) or (html.escape(c) if c.isprintable() else _code(c)) for c in text)


def _code(c: str) -> str:
    return f"<u>\u2039{ord(c):02X}\u203a</u>"


_MARKS = {" ": "<s>\u00b7</s>", "\n": "<s>\u21b5</s>\n", "\t": "<s>\u21e5</s>\t"}


def legend(k: int) -> str:
    """What the shades and the line mean."""
    low = [0.0, *EDGES]
    names = [f"{a:g}\u2013{b:g}" for a, b in zip(low, EDGES, strict=False)] + [f"over {EDGES[-1]:g}"]
    shades = " ".join(f'<i class="l{level}">&nbsp;{name}&nbsp;</i>' for level, name in enumerate(names))
    return (
        f'<div class="tokens">loss of a token, nats: {shades}\n'
        f'<i class="k">underlined</i>: among the model\u2019s {k} likeliest tokens (rank below {k}); others are not. '
        "<s>\u00b7</s> space, <s>\u21b5</s> line end, <s>\u21e5</s> tab, <u>grey</u>: bytes, control pieces, and "
        "tokens that are not predicted.</div>"
    )


def _row(sample: Sample, place: int, title: str, texts: dict[int, str], tokens: int) -> str:
    mask, k = sample.mask[place] != 0, int(sample.header["k"])
    counted = max(int(mask.sum()), 1)
    last = int(np.flatnonzero(mask)[-1]) + 1 if mask.any() else 0
    loss, rank = sample.loss[place], sample.rank[place]
    level = np.searchsorted(EDGES, loss, side="right")
    spans = []
    for t in range(min(last, tokens)):
        text = texts[int(sample.targets[place, t])]
        if not mask[t]:
            spans.append(f"<u>{text}</u>")
            continue
        top = " k" if rank[t] < k else ""
        spans.append(f'<i class="l{level[t]}{top}" title="loss {loss[t]:.2f}, rank {rank[t]}">{text}</i>')
    more = f"<u> \u2026 {last - tokens} more tokens</u>" if last > tokens else ""
    mean, share = loss[mask].sum() / counted, (rank[mask] < k).sum() / counted
    facts = (
        f"score {sample.score[place]:.3f}, {html.escape(str(sample.domains[sample.domain[place]]))}, row "
        f"{sample.row_ids[place]}: mean loss {mean:.2f} nats, {100 * share:.0f} % of {int(mask.sum())} tokens in the "
        f"top {k}"
    )
    return f'<p class="row"><b>{title}</b>: {facts}</p>\n<div class="tokens">{"".join(spans)}{more}</div>'
