"""How far do online and offline selection agree, where both keep the same part of the rows?

    python experiments/benchmarks/selection_overlap.py SCORES [--ratio 0.2] [--batches 16,64,256,2048] [--run RUN]

SCORES is a directory of `slm-assist score`. Offline keeps the best rows of the corpus. Online takes the rows in a
training run's order and keeps the best of every pool: here by the same scores, so the difference is the pool's alone.
With --run, an online run's own choice is compared with the offline list over the candidates it saw. JSON on stdout.
"""

import common
import numpy as np

from slm_assist import report
from slm_assist.assist import score_store, selection
from slm_assist.data.order import Order
from slm_assist.errors import UserError
from slm_assist.run_dir import RunDir


def agreement(online: np.ndarray, offline: np.ndarray) -> dict[str, float]:
    """Of two choices (bool [rows]) among the same rows."""
    both, either = (online & offline).sum(), (online | offline).sum()
    return {
        "rows": len(online),
        "kept_online": float(online.mean()),
        "kept_offline": float(offline.mean()),
        "of_online_also_offline": float(both / max(online.sum(), 1)),
        "jaccard": float(both / max(either, 1)),
        "by_chance": float(offline.mean()),
    }


def by_pools(scores: np.ndarray, batch: int, factor: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of whole pools, and which of them (bool) are kept when `batch * factor` give their best `batch`."""
    pool = batch * factor
    rows = Order(len(scores), seed).rows_at(np.arange(len(scores) // pool * pool))
    kept = np.zeros(len(rows), bool)
    for start in range(0, len(rows), pool):
        kept[start + selection.top(scores[rows[start : start + pool]], batch)] = True
    return rows, kept


def main() -> None:
    parser = common.parser(__doc__, rounds=None)
    parser.add_argument("scores")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--batches", default="16,64,256,2048")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run")
    options = parser.parse_args()
    found = score_store.open_scores(options.scores)
    scores, factor = found.score, round(1 / options.ratio)
    offline = np.zeros(len(scores), bool)
    offline[selection.top(scores, int(options.ratio * len(scores)))] = True
    pools = {}
    for batch in map(int, options.batches.split(",")):
        if batch * factor <= len(scores):
            rows, kept = by_pools(scores, batch, factor, options.seed)
            pools[batch] = agreement(kept, offline[rows])
    result = {
        "score": found.meta["score"],
        "scores_exactly_zero": float((scores == 0).mean()),
        "pools": pools,
    }
    if options.run:
        result["run"] = of_run(options.run, scores, offline)
    common.finish(options, result)


def of_run(directory: str, scores: np.ndarray, offline: np.ndarray) -> dict[str, float]:
    """A run's rows against the offline list, over the candidates it saw."""
    run = RunDir(directory)
    config = run.read(run.config)["config"]
    frame = report.load(directory)
    frame = frame[frame["kind"].eq("train") & frame["rows"].notna()] if "rows" in frame else frame[:0]
    if frame.empty:
        raise UserError(f"{directory}: no update of this run chose rows")
    seed = config["seed"] if config["data"]["order_seed"] < 0 else config["data"]["order_seed"]
    seen = Order(len(scores), seed).rows_at(np.arange(int(frame["candidates"].sum())))
    kept = np.zeros(len(scores), bool)
    kept[np.concatenate(frame["rows"].to_list()).astype(int)] = True
    return agreement(kept[seen], offline[seen])


if __name__ == "__main__":
    common.run(main)
