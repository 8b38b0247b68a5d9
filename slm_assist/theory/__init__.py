"""Bounds and exact risks of learning from soft labels, on sources whose law is known.

Nothing here is needed for training. The modules are imported one by one; this file imports none of them. Exact:
`sources` (rows from a known law), `teachers` (of chosen bias), `students`, `risk`, `martingale`, `bounds` (every term
computed). Measured: `tabular`, `simulate`, `neural`. Side by side: `checks`, `figures`, `figures_tabular`, `pictures`.
"""
