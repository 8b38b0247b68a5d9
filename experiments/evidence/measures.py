"""Bits a byte of held-out documents, overall, by domain and by bucket; and what another choice of documents would give.

Every measure is a weighted sum over strata (a domain, or a bucket) of nats over bytes. Documents are drawn with
replacement within their domains, so that a replicate has as many of each; a measure of a replicate is computed anew.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import corpus
import documents
import numpy as np

from slm_assist.errors import UserError
from slm_assist.evals.perplexity import BUCKETS, thirds
from slm_assist.report import stats

PRIMARY = "bits_per_byte"
EQUAL, UNSEEN = "domain_mean", "unseen"
REPLICATES = 2000


@dataclasses.dataclass(frozen=True)
class Held:
    """Held-out rows of a part, what they are, and how they are weighed.

    Attributes:
      document, domain, bucket: of each row; bytes: of its targets; domains: names.
      shares: of each domain in the training text; 0 of the one that is never trained on.
    """

    document: np.ndarray
    domain: np.ndarray
    bucket: np.ndarray
    bytes: np.ndarray
    domains: tuple[str, ...]
    shares: np.ndarray

    @property
    def seen(self) -> np.ndarray:
        """Rows of domains that are trained on."""
        return self.shares[self.domain] > 0

    @property
    def count(self) -> int:
        """Documents."""
        return int(self.document.max()) + 1

    def strata(self) -> dict[str, list[tuple[float, np.ndarray]]]:
        """Each measure as (weight, rows) pairs whose weights add up to 1."""
        of = [self.domain == i for i in range(len(self.domains))]
        trained = [i for i in range(len(self.domains)) if self.shares[i] > 0]
        total = sum(self.shares[i] for i in trained)
        found = {
            PRIMARY: [(self.shares[i] / total, of[i]) for i in trained],
            EQUAL: [(1 / len(trained), of[i]) for i in trained],
        }
        if len(trained) < len(of):
            found[UNSEEN] = [(1.0, ~self.seen)]
        found |= {f"domain:{self.domains[i]}": [(1.0, of[i])] for i in trained}
        return found | {f"bucket:{name}": [(1.0, self.seen & (self.bucket == i))] for i, name in enumerate(BUCKETS)}

    def draws(self, replicates: int = REPLICATES, seed: int = 0) -> np.ndarray:
        """[1 + replicates, documents] how often each document counts: once each, then as drawn."""
        rng = np.random.default_rng(seed)
        found = np.zeros((1 + replicates, self.count), np.float64)
        found[0] = 1
        domain_of = np.zeros(self.count, int)
        domain_of[self.document] = self.domain
        for index in range(len(self.domains)):
            members = np.flatnonzero(domain_of == index)
            if len(members):
                chances = np.full(len(members), 1 / len(members))
                found[1:, members] = rng.multinomial(len(members), chances, size=replicates)
        return found

    def measure(self, nats: np.ndarray, draws: np.ndarray) -> dict[str, np.ndarray]:
        """Each measure, bits a byte.

        Args:
          nats: [points, rows]; draws: [replicates, documents].

        Returns:
          [replicates, points] for each name.
        """
        return {
            name: sum(weight * self._ratio(nats, rows, draws) for weight, rows in strata)
            for name, strata in self.strata().items()
        }

    def _ratio(self, nats: np.ndarray, rows: np.ndarray, draws: np.ndarray) -> np.ndarray:
        which = np.zeros((int(rows.sum()), self.count))
        which[np.arange(len(which)), self.document[rows]] = 1
        by_document, size = nats[:, rows] @ which, self.bytes[rows] @ which
        return (draws @ by_document.T) / np.maximum(draws @ size, 1)[:, None] / np.log(2)


def held(out: Path, part: str, cutter: Path) -> Held:
    """The rows of a part with their buckets, thirds by the loss of the model that cuts.

    Raises:
      UserError: nothing was measured on that part yet.
    """
    path = documents.rows_file(out, part)
    if not path.is_file():
        raise UserError(f"{path}: nothing was measured on this part yet; train first")
    facts: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    made = json.loads((out / "corpus" / "corpus.json").read_text(encoding="utf-8"))
    trained, unseen = made["parts"][corpus.TRAIN], made["split"]["unseen"]
    shares = np.array([0 if name == unseen else trained.get(name, {}).get("bytes", 0) for name in facts["domains"]])
    domain = np.array(facts["domain"])
    sums = {"cross_entropy": row_nats(cutter, part), "tokens": np.array(facts["tokens"], float)}
    bucket, seen = np.full(len(domain), -1), shares[domain] > 0
    bucket[seen] = thirds({name: value[seen] for name, value in sums.items()})
    return Held(
        np.array(facts["document"]), domain, bucket, np.array(facts["bytes"], float), tuple(facts["domains"]),
        shares / shares.sum(),
    )  # fmt: skip


def row_nats(run: Path, part: str) -> np.ndarray:
    """Nats of each held-out row by a finished run."""
    found = json.loads(documents.file(run, part).read_text(encoding="utf-8"))
    return np.array(found["cross_entropy"])


def interval(values: np.ndarray) -> list[float] | None:
    """The 95 % percentile interval of a mean over seeds, documents and seeds being drawn with replacement.

    What the draw of seeds adds is widened by `widening`.

    Args:
      values: [1 + replicates, seeds], of which [b] goes with the b-th draw of documents.

    Returns:
      None with one seed, of which nothing can be drawn.
    """
    count = values.shape[1]
    if count < 2:
        return None
    rng = np.random.default_rng(1)
    drawn = rng.integers(count, size=(len(values) - 1, count))
    means = values[1:].mean(axis=1)
    parted = np.take_along_axis(values[1:], drawn, axis=1).mean(axis=1) - means
    spread = means + widening(count) * parted
    return [float(x) for x in np.quantile(spread, (0.025, 0.975))]


def widening(seeds: int) -> float:
    """What drawn seeds' deviation from the mean is multiplied by: without it intervals of 3 seeds hold in 78 %.

    sqrt(n / (n - 1)) makes the variance of n drawn seeds unbiased; Student's t over the normal quantile is for its
    being estimated.
    """
    return float(np.sqrt(seeds / (seeds - 1)) * stats.t_975(seeds - 1) / 1.95996)
