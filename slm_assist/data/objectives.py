"""What a row asks of the model: from stored ids to tokens, targets, mask and perhaps a bidirectional prefix.

Each segment (a document, or the part of one that stands in the row) is transformed inside its own span of the
row, and every draw is a hash of (the row's key, where the segment starts in the row): it depends neither on the
other rows of a batch nor on the platform or the version of a library.

`causal`: every token predicts the next one.

`prefix`: a split drawn uniformly; the tokens before it see each other both ways and are not predicted, the rest
is predicted as in `causal`. Segments of one token have nothing to predict.

`span`: T5's span corruption (arXiv 1910.10683) for a decoder. Of the segment's text a share is cut out; how many
tokens in how many spans follows from its length alone, as T5's does, and all placings of spans that do not touch
and leave the first token (a document's BOS, if there is one) are equally likely. (T5's always cuts out the last
tokens too, in short texts nothing else.) The segment becomes inputs, then targets: the text with sentinel i in
place of span i, all of which see each other both ways; then sentinel 0, span 0, sentinel 1, span 1, ... and EOS,
where the vocabulary has it, all of which are predicted, one after the other. That is longer than the text, so the
end of the text is dropped, as little as will do (about a tenth with the defaults), and counted; what is then left
over of the segment's span is padding, less than three tokens. An EOS at the segment's end is not text: it is the
one behind the targets. Segments of fewer than `SHORTEST_SPAN` tokens are causal.

`ul2`: each segment draws one of the three (arXiv 2205.05131; the mixture's proportions are config keys).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from slm_assist import plugins
from slm_assist.data.order import mix
from slm_assist.errors import UserError, one_of

NAMES = ("causal", "prefix", "span", "ul2")
SHORTEST_SPAN = 8  # tokens in a segment that is worth corrupting
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_KIND, _SPLIT, _KEPT, _CUT = range(1, 5)  # what a segment's draws are for
_REQUIRED = ("tokens", "targets", "segment_ids", "positions", "mask")

Arrays = dict[str, np.ndarray]


def causal(ids_NxR: np.ndarray, starts_NxR: np.ndarray, length_N: np.ndarray, key_N: Any = None) -> Arrays:
    """Next-token prediction inside each document of a row.

    Args:
      ids_NxR: R = T + 1 ids a row.
      starts_NxR: bool, True where a document starts. A row's first id begins a segment in any case.
      length_N: how many of the R ids are text; the rest is padding.
      key_N: not used; other objectives draw from it.

    Returns:
      tokens, targets, segment_ids, positions: int32 [N, T]. Segments count from 1, padding is 0; positions
        restart at 0 in each segment.
      mask: float32 [N, T], 1 where the target is in its token's segment, else 0.
    """
    return _shifted(np.ascontiguousarray(ids_NxR, dtype=np.int32), *_segments(starts_NxR, length_N))


def _segments(starts_NxR: np.ndarray, length_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int32 [N, R]: each id's segment, from 1, and its place in it; both 0 for padding."""
    at = np.arange(starts_NxR.shape[1], dtype=np.int32)
    starts = starts_NxR.copy()
    starts[:, 0] = True
    segment = np.cumsum(starts, axis=1, dtype=np.int32)
    segment *= at < np.asarray(length_N)[:, None]
    positions = at - np.maximum.accumulate(np.where(starts, at, 0), axis=1)
    positions[segment == 0] = 0
    return segment, positions


def _shifted(ids: np.ndarray, segment: np.ndarray, positions: np.ndarray, prefix: np.ndarray | None = None) -> Arrays:
    """Tokens and their targets from R ids; a prefix is not predicted."""
    predicted = (segment[:, 1:] == segment[:, :-1]) & (segment[:, 1:] > 0)
    if prefix is not None:
        predicted &= ~prefix[:, 1:]
    arrays = {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "segment_ids": segment[:, :-1],
        "positions": positions[:, :-1],
        "mask": predicted.astype(np.float32),
    }
    return arrays if prefix is None else arrays | {"prefix_mask": prefix[:, :-1]}


@dataclasses.dataclass(frozen=True)
class Objective:
    """A named objective: `objective(ids_NxR, starts_NxR, length_N, key_N)` gives the arrays of a batch.

    Those of `causal`, and for all but `causal` also

      prefix_mask: bool [N, T], the tokens that see each other both ways (see models/attention.py); only if
        `has_prefix`.
      dropped: int32 [N], tokens of the row that no longer fit; only for span and ul2.

    `key_N` is uint64 [N], one key a row; only `causal` takes None.

    Attributes:
      name: as the config has it.
      has_prefix: whether there is a prefix_mask.
      fingerprint: what the batches depend on beside the rows and their keys.
    """

    name: str
    has_prefix: bool
    fingerprint: str
    function: Callable[..., Arrays] = dataclasses.field(repr=False)

    def __call__(
        self, ids_NxR: np.ndarray, starts_NxR: np.ndarray, length_N: np.ndarray, key_N: np.ndarray | None = None
    ) -> Arrays:
        if key_N is None and self.name != "causal":
            raise ValueError(f"objective {self.name} draws from a key for each row; none were given")
        return self.function(ids_NxR, starts_NxR, length_N, key_N)


def make(data: Any, vocabulary: Any) -> Objective:
    """The objective of a config's `data` section, for rows of `data.seq_len` + 1 ids of `vocabulary`.

    A "package.module:function" of one's own is called with the four arrays of `Objective` and returns its
    arrays. It may have attributes `has_prefix` (False if it has not) and `fingerprint` (else its name).

    Raises:
      UserError: an unknown name, proportions that do not add up, or too few sentinels for a row's spans.
    """
    name = data.objective
    if plugins.is_plugin(name):
        return _custom(name, vocabulary.size)
    check(data)
    if name == "causal":
        return Objective("causal", False, "causal", causal)
    corruption = _Corruption(
        data.corrupted,
        data.span_length,
        tuple(int(i) for i in vocabulary.sentinel_ids),
        vocabulary.eos_id,
        vocabulary.pad_id,
    )
    need, have = sentinels_needed(data), len(corruption.sentinel_ids)
    if have < need:
        raise UserError(
            f"data.objective={name} needs a sentinel for each of the up to {need} spans of a row of {data.seq_len} "
            f"tokens, and the vocabulary has {have}: set data.sentinels={need} (in the small LM's run too), "
            f"{'raise data.span_length, ' if have else ''}or use data.objective=prefix"
        )
    shares = {"prefix": (0.0, 1.0), "span": (0.0, 0.0), "ul2": (data.ul2_causal, 1.0 - data.ul2_span)}
    facts = {
        "prefix": "prefix",
        "span": f"span {corruption.describe()}",
        "ul2": f"ul2 {data.ul2_causal:g}/{data.ul2_prefix:g}/{data.ul2_span:g} {corruption.describe()}",
    }
    return Objective(name, True, facts[name], functools.partial(_mixture, name, *shares[name], corruption))


def check(data: Any) -> None:
    """Raises `UserError` where the keys of `data` that objectives read are out of range."""
    if plugins.is_plugin(data.objective):
        _custom(data.objective)
        return
    one_of("data.objective", data.objective, NAMES)
    shares = {key: getattr(data, key) for key in ("ul2_causal", "ul2_prefix", "ul2_span")}
    if data.objective == "ul2" and not (abs(sum(shares.values()) - 1) <= 1e-6 and min(shares.values()) >= 0):
        said = ", ".join(f"data.{key}={share:g}" for key, share in shares.items())
        raise UserError(f"{said}: the shares of data.objective=ul2 must not be negative and must add up to 1")
    if data.objective in ("span", "ul2"):
        if not 0 < data.corrupted < 1:
            raise UserError(f"data.corrupted={data.corrupted}: must lie between 0 and 1; 0.15 is usual")
        if not 1 <= data.span_length < 2**20:
            raise UserError(f"data.span_length={data.span_length}: must be at least 1; 3 is usual")


def sentinels_needed(data: Any) -> int:
    """How many sentinels a row of `data.seq_len` + 1 ids can take under `data.objective`; 0 where none."""
    if data.objective == "span" or (data.objective == "ul2" and data.ul2_span > 0):
        return int(_plan(data.seq_len + 1, float(data.corrupted), float(data.span_length)).spans.max())
    return 0


def _custom(name: str, vocab_size: int | None = None) -> Objective:
    """Somebody's objective, tried on two rows of 9 ids; what it gives is checked in every batch.

    Args:
      vocab_size: tokens and targets must be below; None: not checked.
    """
    function = plugins.load("data.objective", name)
    plugins.check_parameters("data.objective", name, function, "ids", "starts", "length", "key")
    has_prefix = bool(getattr(function, "has_prefix", False))
    required = (*_REQUIRED, *(["prefix_mask"] if has_prefix else []))

    def refuse(problem: str) -> None:
        raise UserError(f"data.objective={name!r}: {problem}")

    def checked(ids_NxR, starts_NxR, length_N, key_N):
        arrays = plugins.call("data.objective", name, function, ids_NxR, starts_NxR, length_N, key_N)
        shape = (ids_NxR.shape[0], ids_NxR.shape[1] - 1)
        for key in required:
            found = np.shape(arrays[key]) if isinstance(arrays, dict) and key in arrays else None
            if found != shape:
                said = "missing" if found is None else list(found)
                refuse(f"it must return a dict with {', '.join(required)}, each {list(shape)} here; {key} is {said}")
        for key in ("tokens", "targets"):
            low, high = int(np.min(arrays[key])), int(np.max(arrays[key]))
            if low < 0 or (vocab_size is not None and high >= vocab_size):
                refuse(f"{key} from {low} to {high}: a token is at least 0 and below the vocabulary's {vocab_size}")
        if not np.isfinite(arrays["mask"]).all():
            refuse("its mask is not finite; give 0 to what does not count")
        return arrays

    rows = np.zeros((2, 9), np.int32)
    checked(rows, rows == 1, np.array([9, 9]), np.array([1, 2], np.uint64))
    return Objective(name, has_prefix, str(getattr(function, "fingerprint", name)), checked)


class _Plan(NamedTuple):
    """What becomes of `text` tokens of text, for text = 0, 1, 2, ...; int64 arrays."""

    cut: np.ndarray  # tokens that are cut out
    spans: np.ndarray  # the spans they are in
    total: np.ndarray  # inputs and targets together, without EOS


@functools.lru_cache(maxsize=8)
def _plan(longest: int, corrupted: float, span_length: float) -> _Plan:
    """For texts whose inputs and targets are at most `longest` tokens together."""
    text = np.arange(longest)
    cut = np.clip(np.rint(text * corrupted), 1, np.maximum(text - 1, 1))
    spans = np.minimum(np.maximum(np.rint(cut / span_length), 1), np.minimum(cut, np.maximum(text - cut, 1)))
    total = text + 2 * spans
    fits = total <= longest
    return _Plan(*(array[fits].astype(np.int64) for array in (cut, spans, total)))


class _Corruption(NamedTuple):
    corrupted: float
    span_length: float
    sentinel_ids: tuple[int, ...]
    eos_id: int | None
    pad_id: int

    def describe(self) -> str:
        return f"corrupted={self.corrupted:g} span_length={self.span_length:g}"


def _hash(key: np.ndarray, number: np.ndarray | int) -> np.ndarray:
    """uint64: a hash of a key and a number >= 0."""
    return mix(key + (np.atleast_1d(number).astype(np.uint64) + np.uint64(1)) * _GOLDEN)


def _below(hashed: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """int64 in [0, bound), uniform to within bound / 2**32, from uint64 hashes; bound < 2**32."""
    return (((hashed >> np.uint64(32)) * bound.astype(np.uint64)) >> np.uint64(32)).astype(np.int64)


def _ranges(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """first[0], first[0] + 1, ... (count[0] of them), first[1], ...: int64 [sum of count]."""
    return np.arange(count.sum()) + np.repeat(first - (np.cumsum(count) - count), count)


def _mixture(
    name: str,
    causal_below: float,
    prefix_below: float,
    corruption: _Corruption,
    ids_NxR: np.ndarray,
    starts_NxR: np.ndarray,
    length_N: np.ndarray,
    key_N: np.ndarray,
) -> Arrays:
    """Each segment draws u in [0, 1): causal below the first bound, prefix LM below the second, else spans."""
    N, R = ids_NxR.shape
    ids = np.array(ids_NxR, dtype=np.int32, order="C")
    segment, positions = _segments(starts_NxR, length_N)
    first = np.flatnonzero((positions == 0) & (segment > 0))
    row, offset = np.divmod(first, R)
    length = np.minimum(np.append(first, N * R)[1:], row * R + np.asarray(length_N, np.int64)[row]) - first
    key = _hash(np.asarray(key_N, np.uint64)[row], offset)
    u = (_hash(key, _KIND) >> np.uint64(11)) * 2.0**-53
    spans = (u >= prefix_below) & (length >= SHORTEST_SPAN)
    prefixes = (u >= causal_below) & (u < prefix_below) & (length >= 2)

    prefix = np.zeros(N * R, bool)
    split = 1 + _below(_hash(key[prefixes], _SPLIT), length[prefixes] - 1)
    prefix[_ranges(first[prefixes], split)] = True
    if name == "prefix":
        return _shifted(ids, segment, positions, prefix.reshape(N, R))
    dropped = _corrupt(corruption, ids.reshape(-1), segment, prefix, first[spans], length[spans], key[spans])
    positions *= segment > 0
    arrays = _shifted(ids, segment, positions, prefix.reshape(N, R))
    return arrays | {"dropped": np.bincount(row[spans], dropped, minlength=N).astype(np.int32)}


def _corrupt(
    corruption: _Corruption,
    ids: np.ndarray,
    segment: np.ndarray,
    prefix: np.ndarray,
    first: np.ndarray,
    length: np.ndarray,
    key: np.ndarray,
) -> np.ndarray:
    """Rewrites S segments of the flat `ids`, `segment` and `prefix` in place; returns tokens dropped, int64 [S]."""
    if not first.size:
        return np.zeros(0, np.int64)
    plan = _plan(segment.shape[1], float(corruption.corrupted), float(corruption.span_length))
    sentinel_ids = np.array(corruption.sentinel_ids, np.int32)
    has_eos = corruption.eos_id is not None
    ends = ids[first + length - 1] == corruption.eos_id if has_eos else np.zeros(len(first), bool)
    text = np.searchsorted(plan.total, length - has_eos, side="right") - 1  # the longest that fits
    cut, spans = plan.cut[text], plan.spans[text]

    # Parts in turn kept and cut, one pair for each span and one behind them: what is kept to the end, perhaps nothing.
    last = np.zeros(int((spans + 1).sum()), bool)
    last[np.cumsum(spans + 1) - 1] = True
    parts = np.zeros((len(last), 2), np.int64)
    parts[:, 0] = _parts(text - cut + 1, spans + 1, _hash(key, _KEPT)) - last
    parts[~last, 1] = _parts(cut, spans, _hash(key, _CUT))
    # From here on one number for each token of all texts, one after another.
    is_cut = np.repeat(np.tile([False, True], len(parts)), parts.ravel())
    begins = np.zeros(len(is_cut), bool)
    begins[np.cumsum(parts)[0::2][~last]] = True
    cut_before = np.cumsum(is_cut) - is_cut - np.repeat(np.cumsum(cut) - cut, text)
    begun = np.cumsum(begins) - np.repeat(np.cumsum(spans) - spans, text)  # spans, with this token's own

    start = np.repeat(first, text)
    inputs = text - cut + spans
    target = start + np.repeat(inputs, text) + cut_before + begun  # where a token goes that is cut out
    source = ids[_ranges(first, text)]
    at = np.arange(len(is_cut)) - np.repeat(np.cumsum(text) - text, text)
    kept_to = start + at - cut_before + begun
    ids[_ranges(first, length)] = corruption.pad_id
    ids[kept_to[~is_cut]] = source[~is_cut]
    ids[target[is_cut]] = source[is_cut]
    ids[kept_to[begins] - 1] = ids[target[begins] - 1] = sentinel_ids[begun[begins] - 1]
    used = plan.total[text] + has_eos
    if has_eos:
        ids[first + used - 1] = corruption.eos_id
    prefix[_ranges(first, inputs)] = True
    segment.reshape(-1)[_ranges(first + used, length - used)] = 0
    return length - ends - text


def _parts(size: np.ndarray, count: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Cuts each size[s] into count[s] parts of at least 1, all ways being equally likely: int64 [sum of count]."""
    places = size - 1  # where a cut may be
    group = np.repeat(np.arange(len(size)), places)
    at = _ranges(np.zeros_like(places), places)
    order = np.lexsort((_hash(key[group], at), group))
    cuts = np.sort(order[at < count[group] - 1])  # those with the least hashes of each group
    first = np.cumsum(size) - size
    begins = np.sort(np.concatenate([first, first[group[cuts]] + at[cuts] + 1]))
    return np.diff(begins, append=size.sum())
