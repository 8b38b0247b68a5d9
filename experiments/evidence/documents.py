"""What a finished model makes of held-out documents, each by itself: the figures that everything is compared by.

A document is cut into rows of the runs' length, none of which goes on into the next document. Of each row the nats and
the right guesses are kept, `RUN/documents-PART.json`; what the rows are is kept once, `OUT/corpus/rows-PART.json`.
"""

import functools
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import corpus
import jax
import jax.numpy as jnp
import numpy as np
from planning import Setting

from slm_assist import metrics, pretrained, programs, steps
from slm_assist.assist.labels import ARRAYS, hidden_and_head
from slm_assist.data.objectives import causal
from slm_assist.data.row_store import pack, row_dtype
from slm_assist.data.tokenizers import Vocabulary
from slm_assist.errors import UserError
from slm_assist.run_dir import RunDir

AT_ONCE = 64  # rows in a forward pass
ENTROPY_ROWS = 512


class Rows(NamedTuple):
    """Rows of held-out documents; `documents` and `domains` are names, the others have an entry a row."""

    arrays: dict[str, np.ndarray]  # those of a batch, [rows, T]
    documents: list[str]
    domains: list[str]
    document: np.ndarray
    domain: np.ndarray
    bytes: np.ndarray  # of the targets
    tokens: np.ndarray

    def facts(self) -> dict[str, Any]:
        """All but the arrays, as JSON has it."""
        return {"documents": self.documents, "domains": self.domains} | {
            name: getattr(self, name).tolist() for name in ("document", "domain", "bytes", "tokens")
        }


def file(run: Path, part: str) -> Path:
    return run / f"documents-{part}.json"


def rows_file(out: Path, part: str) -> Path:
    return out / "corpus" / f"rows-{part}.json"


def measure(run: Path, setting: Setting, part: str) -> None:
    """Writes `RUN/documents-PART.json` unless it is there.

    Raises:
      UserError: the run's vocabulary is not that of the other runs.
    """
    if file(run, part).is_file():
        return
    config = RunDir(run).read(RunDir(run).config)["config"]
    out, seq_len = Path(setting.out), config["data"]["seq_len"]
    with programs.compilation_cache(config["compute"]["cache_dir"]):
        loaded = pretrained.load(str(run), say=lambda line: None)
        rows = make_rows(str(out / "corpus"), part, loaded.vocabulary, seq_len)
        _keep_facts(out, part, rows, loaded.vocabulary)
        sums = row_sums(loaded.model, loaded.params, rows)
    written = {name: np.round(sums[name], 4).tolist() for name in ("cross_entropy", "correct")}
    metrics.write_json(file(run, part), {"part": part, "step": loaded.step, **written})


def row_sums(model: Any, params: Any, rows: Rows) -> dict[str, np.ndarray]:
    """`cross_entropy` (nats), `correct` and `tokens` of each row, float64 [rows]."""
    step = jax.jit(functools.partial(steps.eval_step, model=model))
    count, parts = len(rows.tokens), []
    for start in range(0, count, AT_ONCE):
        ids = np.arange(start, min(start + AT_ONCE, count))
        batch = {name: rows.arrays[name][np.resize(ids, AT_ONCE)] for name in ARRAYS}
        parts.append({name: np.asarray(x, np.float64)[: len(ids)] for name, x in step(params, batch).items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@functools.lru_cache(maxsize=4)
def make_rows(folder: str, part: str, vocabulary: Vocabulary, seq_len: int) -> Rows:
    """The rows of a part of the corpus."""
    domains: dict[str, int] = {}
    names: list[str] = []
    records, document, domain = [], [], []
    dtype = row_dtype(seq_len, vocabulary.size)
    found = itertools.groupby(corpus.documents(Path(folder), part), key=lambda found: found[:2])
    for (kind, name), pieces in found:
        index = domains.setdefault(kind, len(domains))
        packed = [pack([vocabulary.encode_array(text)], [index], vocabulary, dtype)[0] for *_, text in pieces]
        count = sum(map(len, packed))
        if count and name not in names:
            names.append(name)
        records += packed
        document += [names.index(name)] * count if count else []
        domain += [index] * count
    joined = np.concatenate(records)
    starts = np.unpackbits(joined["starts"], axis=1, count=seq_len + 1).view(bool)
    arrays = causal(joined["ids"], starts, joined["length"])
    counted = arrays["mask"] > 0
    return Rows(
        {name: arrays[name] for name in ARRAYS}, names, list(domains), np.array(document), np.array(domain),
        (vocabulary.token_bytes[arrays["targets"]] * counted).sum(axis=1), counted.sum(axis=1),
    )  # fmt: skip


def _keep_facts(out: Path, part: str, rows: Rows, vocabulary: Vocabulary) -> None:
    path = rows_file(out, part)
    found = {"vocabulary": vocabulary.fingerprint, "seq_len": int(rows.arrays["tokens"].shape[1])} | rows.facts()
    if not path.is_file():
        metrics.write_json(path, found)
    elif json.loads(path.read_text(encoding="utf-8")) != json.loads(json.dumps(found)):
        raise UserError(f"{path}: made with another vocabulary, length of rows or text; use another --out")


def matched_smoothing(helper: str, setting: Setting, w: float = 0.667) -> Mapping[str, float]:
    """The weight of a uniform teacher that gives targets as much entropy, in the mean, as SALT's have.

    Returns:
      `weight`, and the `entropy` in nats: of (1 - weight) e_y + weight / V, and of (1 - w) e_y + w q.
    """
    loaded = pretrained.load(helper, say=lambda line: None)
    seq_len = RunDir(helper).read(RunDir(helper).config)["config"]["data"]["seq_len"]
    rows = make_rows(str(Path(setting.out) / "corpus"), corpus.VALIDATION, loaded.vocabulary, seq_len)
    entropies = _mixture_entropy(loaded.model, loaded.params, rows, w)
    low, high, size = 0.0, 1.0, loaded.vocabulary.size
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if smoothed_entropy(middle, size) > entropies else (middle, high)
    return {"weight": low, "entropy": entropies, "w": w}


def smoothed_entropy(weight: float, size: int) -> float:
    """Nats: of a target with probability 1 - weight (1 - 1/size), and weight / size for each other token."""
    other, right = weight / size, 1 - weight * (1 - 1 / size)
    return -right * np.log(right) - (size - 1) * other * np.log(max(other, 1e-300))


def _mixture_entropy(model: Any, params: Any, rows: Rows, w: float) -> float:
    @jax.jit
    def sums(params: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden, head = hidden_and_head(model, params, batch)
        q = jax.nn.softmax(jnp.einsum("btd,dv->btv", hidden, head).astype(jnp.float32))
        mixed = w * q + (1 - w) * jax.nn.one_hot(batch["targets"], q.shape[-1])
        entropy = -(mixed * jnp.log(jnp.maximum(mixed, 1e-30))).sum(axis=-1)
        return (entropy * batch["mask"]).sum(), batch["mask"].sum()

    chosen = np.linspace(0, len(rows.tokens) - 1, ENTROPY_ROWS).astype(int)
    totals = [sums(params, {name: rows.arrays[name][ids] for name in ARRAYS}) for ids in chosen.reshape(-1, AT_ONCE)]
    entropy, tokens = (float(sum(total[i] for total in totals)) for i in (0, 1))
    return entropy / tokens
