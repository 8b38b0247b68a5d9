"""How many distinct rows a run has learnt from, against what its feed gives it."""

import evidence_made
import numpy as np
import pytest

from slm_assist.assist import row_list
from slm_assist.data.order import Order

ROWS, BATCH, SEED = 50, 4, 3


@pytest.fixture(scope="module")
def reading():
    with evidence_made.scripts() as found:
        yield found.reading


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    path = tmp_path_factory.mktemp("lists") / "list.npz"
    made = row_list.make(np.arange(0, 20, 2), corpus="c", rows=ROWS, vocabulary="v", made={})
    return str(row_list.write(path, made)), made.row_ids


def config(**select):
    return {"batch_rows": BATCH, "seed": 9, "data": {"order_seed": SEED}, "select": {"rows": "all"} | select}


def test_without_a_list_a_row_is_read_once_an_epoch(reading):
    for rows in ("all", "online"):
        assert reading.distinct(config(rows=rows), ROWS, 7) == 28
        assert reading.distinct(config(rows=rows), ROWS, 30) == ROWS
    assert reading.distinct({"batch_rows": BATCH}, ROWS, 7) == 28


@pytest.mark.parametrize("steps", [3, 5, 8, 14, 40])
def test_a_list_and_what_follows(reading, chosen, steps):
    path, ids = chosen
    listed = config(rows="list", list=path, fraction=0.0, steps=5)
    first = set(Order(ids, SEED).rows_at(np.arange(BATCH * min(steps, 5))).tolist())
    after = set(Order(ROWS, SEED).rows_at(np.arange(BATCH * max(0, steps - 5))).tolist())
    listed["select"]["then"] = "all"
    assert reading.distinct(listed, ROWS, steps) == len(first | after)
    listed["select"]["then"] = "unseen"
    rest = min(BATCH * max(0, steps - 5), ROWS - len(first))
    assert reading.distinct(listed, ROWS, steps) == len(first) + rest


def test_a_list_for_the_whole_run_is_read_over_and_over(reading, chosen):
    path, ids = chosen
    whole = config(rows="list", list=path, fraction=1.0, steps=0, then="all")
    assert reading.distinct(whole, ROWS, 2) == 8
    assert reading.distinct(whole, ROWS, 30) == len(ids)
