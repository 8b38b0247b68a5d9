"""Domains in proportions that the user chooses, instead of as much as the corpus happens to have of each."""

import functools
import logging
from collections.abc import Mapping, Sequence

import numpy as np

from slm_assist.data.order import Order, permute
from slm_assist.errors import UserError, nearest

_log = logging.getLogger(__name__)

# Percent of the Pile that each domain is, in bytes, after its epochs: "The Pile: An 800GB Dataset of Diverse
# Text for Language Modeling" (arXiv 2101.00027), table 1, by the names that its files have.
PILE = {
    "Pile-CC": 18.11,
    "PubMed Central": 14.40,
    "Books3": 12.07,
    "OpenWebText2": 10.01,
    "ArXiv": 8.96,
    "Github": 7.59,
    "FreeLaw": 6.12,
    "StackExchange": 5.13,
    "USPTO Backgrounds": 3.65,
    "PubMed Abstracts": 3.07,
    "Gutenberg (PG-19)": 2.17,
    "OpenSubtitles": 1.55,
    "Wikipedia (en)": 1.53,
    "DM Mathematics": 1.24,
    "Ubuntu IRC": 0.88,
    "BookCorpus2": 0.75,
    "EuroParl": 0.73,
    "HackerNews": 0.62,
    "YoutubeSubtitles": 0.60,
    "PhilPapers": 0.38,
    "NIH ExPorter": 0.30,
    "Enron Emails": 0.14,
}
CYCLE = 65_536  # positions in which every domain has its exact share


def weights(spec: str, domains: Sequence[str], source_spec: str = "") -> dict[str, float] | None:
    """What `data.domain_weights` says for a corpus, as shares of the rows that add up to 1.

    Args:
      spec: "DOMAIN=WEIGHT,..." (any numbers >= 0, one for each domain); "pile", the Pile's published weights,
        divided among those of its domains that are there; "natural"; or "", which is "pile" for a source
        `pile:` and "natural" for all others.
      domains: the corpus's.
      source_spec: the source's name, as in `data.source`.

    Returns:
      A share for each domain, or None for natural: each row once an epoch.

    Raises:
      UserError: a weight for a domain that is not there, a domain without a weight, a bad number.
    """
    given = spec.strip()
    if given == "natural" or (not given and not source_spec.startswith("pile:")):
        return None
    if given in ("", "pile"):
        named = _pile(domains)
    else:
        named = _parse(given)
        for domain in named:
            if domain not in domains:
                raise UserError(
                    f"data.domain_weights: no domain {domain!r} in the corpus{nearest(domain, domains)}; it has "
                    f"{', '.join(sorted(domains))}"
                )
        missing = [domain for domain in domains if domain not in named]
        if missing:
            raise UserError(
                f"data.domain_weights: no weight for {', '.join(map(repr, missing))}; add {missing[0]}=WEIGHT "
                "(0 leaves a domain out)"
            )
    total = sum(named.values())
    if not total > 0:
        raise UserError(f"data.domain_weights={spec}: no weight is above 0; give one that is")
    return {domain: named[domain] / total for domain in domains}


def _pile(domains: Sequence[str]) -> dict[str, float]:
    strange = [domain for domain in domains if domain not in PILE]
    if strange:
        raise UserError(
            f"data.domain_weights=pile: the Pile has no domain {strange[0]!r}{nearest(strange[0], PILE)}; set "
            "data.domain_weights=natural, or DOMAIN=WEIGHT,... of your own"
        )
    missing = sorted(PILE.keys() - set(domains))
    if missing:
        _log.warning("the Pile's weights are divided among its domains in this corpus, which lacks: %s",
                     ", ".join(missing))  # fmt: skip
    return {domain: PILE[domain] for domain in domains}


def check(spec: str) -> None:
    """Raises `UserError` where data.domain_weights cannot be right for any corpus."""
    if spec not in ("", "pile", "natural"):
        _parse(spec)


def _parse(spec: str) -> dict[str, float]:
    named: dict[str, float] = {}
    for item in filter(None, map(str.strip, spec.split(","))):
        domain, equals, number = (part.strip() for part in item.rpartition("="))
        try:
            weight = float(number)
        except ValueError:
            weight = -1.0
        if not equals or not domain or not 0 <= weight < float("inf"):
            raise UserError(
                f"data.domain_weights: {item!r} is not DOMAIN=WEIGHT with a number of at least 0"
                f"{nearest(item, ('natural', 'pile'))}; mend it"
            )
        if domain in named:
            raise UserError(f"data.domain_weights: {domain!r} has two weights; leave one out")
        named[domain] = weight
    return named


class Mixture:
    """An endless shuffled sequence of row ids with a fixed share of each domain. The interface of `Order`.

    Time is cut into cycles of `CYCLE` positions. In each, every domain has the same number of positions, its
    share rounded by largest remainder (at least one), at places drawn anew. Each domain goes through its own
    rows in its own order and at its own pace: a small one with a large weight has seen more epochs. So any
    position is found from two numbers, the cycle and the place in it.

    Args:
      domain_of_row: int [rows], the index in `domains` of each row of the corpus.
      domains: names.
      weights: share of each domain by name, as from `weights`; 0 leaves it out.
      seed: of the shuffle.
      row_ids: only these rows, int64; None is all. Weights of domains that have no row are divided among the
        others, and said.

    Raises:
      UserError: no row is in a domain with a weight.
    """

    def __init__(
        self,
        domain_of_row: np.ndarray,
        domains: Sequence[str],
        weights: Mapping[str, float],
        seed: int,
        *,
        row_ids: np.ndarray | None = None,
    ):
        here = np.asarray(domain_of_row)
        if row_ids is not None:
            row_ids = np.asarray(row_ids, np.int64)
            here = here[row_ids]
        share = np.array([weights.get(name, 0.0) for name in domains], np.float64)
        rows = np.bincount(here, minlength=len(domains))
        without = [name for name, w, n in zip(domains, share, rows, strict=True) if w > 0 and n == 0]
        used = np.flatnonzero((share > 0) & (rows > 0))
        if not used.size:
            raise UserError("data.domain_weights: no row is in a domain with a weight above 0; change the weights")
        if without:
            _log.warning("no row of %s to choose from: the weights are divided among the others", ", ".join(without))
        # Row ids by domain, in one array that is as narrow as they allow.
        by_domain = np.argsort(here, kind="stable")
        ids = by_domain if row_ids is None else row_ids[by_domain]
        self._rows = ids.astype(np.uint32) if not ids.size or ids.max() < 1 << 32 else ids
        self._first = (np.cumsum(rows) - rows)[used]
        self._orders = [Order(int(rows[d]), seed=(int(seed) << 20) + 1 + int(d)) for d in used]
        self._quota = _quotas(share[used] / share[used].sum(), CYCLE)
        self._seed, self._n = int(seed), int(rows[used].sum())
        self._cycle = functools.lru_cache(maxsize=4)(self._make_cycle)

    def __len__(self) -> int:
        return self._n

    def _make_cycle(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each place in a cycle: its domain, and how many places of that domain come before it."""
        domain = np.repeat(np.arange(len(self._quota)), self._quota)
        domain = domain[permute(np.arange(CYCLE), CYCLE, self._seed, cycle)].astype(np.int32)
        before = np.empty(CYCLE, np.int32)
        first = np.cumsum(self._quota) - self._quota
        before[np.argsort(domain, kind="stable")] = np.arange(CYCLE) - np.repeat(first, self._quota)
        return domain, before

    def _find(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The domain at each of `positions`, and the position in that domain's own order."""
        cycles, places = np.divmod(np.asarray(positions, np.int64), CYCLE)
        domain, own = np.empty_like(cycles), np.empty_like(cycles)
        for cycle in np.unique(cycles):
            here = cycles == cycle
            domains, before = self._cycle(int(cycle))
            domain[here] = domains[places[here]]
            own[here] = before[places[here]]
        return domain, own + cycles * self._quota[domain]

    def rows_at(self, positions: np.ndarray) -> np.ndarray:
        """Row ids, int64 [n], at `positions`, int64 [n] >= 0, of the endless sequence."""
        domain, own = self._find(positions)
        out = np.empty_like(own)
        for d in np.unique(domain):
            here = domain == d
            out[here] = self._rows[self._first[d] + self._orders[d].rows_at(own[here])]
        return out

    def epochs_at(self, positions: np.ndarray) -> np.ndarray:
        """How often the row at each of `positions`, int64 [n], has been there before, int64 [n]."""
        domain, own = self._find(positions)
        return own // np.array([len(order) for order in self._orders], np.int64)[domain]


def _quotas(share: np.ndarray, places: int) -> np.ndarray:
    """`places` divided by `share` (adding up to 1): largest remainders, and at least one each. int64."""
    if len(share) > places:
        raise UserError(f"data.domain_weights: {len(share)} domains, at most {places} can have one; join some")
    exact = share * places
    quota = np.maximum(np.floor(exact), 1).astype(np.int64)
    while (left := places - int(quota.sum())) > 0:
        quota[np.argsort(quota - exact, kind="stable")[:left]] += 1
    while left < 0:  # the smallest were raised to one: those above their share by most pay for it
        rich = np.flatnonzero(quota > 1)
        rich = rich[np.argsort((exact - quota)[rich], kind="stable")[:-left]]
        quota[rich] -= 1
        left += len(rich)
    return quota
