"""Which rows a run has learnt from: how many are distinct, as the order of the data is known without training."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from slm_assist.assist import row_list
from slm_assist.data.order import Order


def distinct(config: Mapping[str, Any], rows: int, steps: int) -> int:
    """Rows of the corpus that a run of so many updates has learnt from, each counted once.

    Args:
      config: the run's; rows: of the corpus.

    Without a list a run goes through the corpus in one order, and rows that were candidates only are not met again
    within an epoch. A list has an order of its own, and so has what is read after it.
    """
    batch, select = config["batch_rows"], config.get("select") or {}
    learnt = steps * batch
    if select.get("rows", "all") != "list":
        return min(learnt, rows)
    seed = config["seed"] if config["data"]["order_seed"] < 0 else config["data"]["order_seed"]
    until = steps if select["fraction"] == 1.0 else min(select["steps"], steps)
    listed = Order(row_list.read(select["list"]).row_ids, seed).rows_at(np.arange(until * batch))
    first = len(np.unique(listed))
    if until == steps:
        return first
    if select["then"] == "unseen":
        return first + min(learnt - len(listed), rows - first)
    after = Order(rows, seed).rows_at(np.arange(learnt - len(listed)))
    return len(np.unique(np.concatenate([listed, after])))
