"""Choosing rows offline, and the file that keeps a choice with what made it."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from slm_assist.assist import row_list, selection
from slm_assist.assist.row_list import choose
from slm_assist.errors import UserError

NAMES = ["books", "code", "web"]


def pool(n=100, seed=0):
    """Tied scores, and domains of 10, 30 and 60 rows, mixed."""
    rng = np.random.default_rng(seed)
    domains = rng.permutation(np.repeat([0, 1, 2], [n // 10, 3 * n // 10, 6 * n // 10]))
    return rng.integers(-8, 9, n).astype(np.float32) / 4, domains


def best(scores, m, among=None):
    among = range(len(scores)) if among is None else among
    return sorted(sorted(among, key=lambda i: (-scores[i], i))[:m])


# Choosing.


def test_top_by_number_and_by_part():
    scores, _ = pool()
    chosen = choose(scores, rule="top", rows=17)
    assert chosen.dtype == np.int64 and chosen.tolist() == best(scores, 17)
    assert choose(scores, ratio=0.2).tolist() == best(scores, 20)
    assert choose(scores, ratio=0.29).tolist() == best(scores, 29)  # 0.29 * 100 is below 29 in floating point
    assert choose(scores[:7], ratio=0.5).tolist() == best(scores[:7], 3)
    assert choose(scores, ratio=1.0).tolist() == list(range(100))


def test_a_band_whole_in_part_and_inside_each_domain():
    scores, domains = pool()
    assert choose(scores, rule="band", low=0.3, high=0.5).tolist() == selection.band(scores, 0.3, 0.5).tolist()
    part = choose(scores, rule="band", low=0.3, high=0.5, rows=5, seed=1)
    assert len(part) == 5 and set(part) < set(selection.band(scores, 0.3, 0.5))
    assert part.tolist() != choose(scores, rule="band", low=0.3, high=0.5, rows=5, seed=2).tolist()
    inside = choose(scores, domains, NAMES, rule="band", low=0.5, high=0.7, quotas="natural")
    expected = []
    for d in range(3):
        rows = np.flatnonzero(domains == d)
        ranked = rows[np.argsort(scores[rows], kind="stable")]
        expected += ranked[len(rows) // 2 : len(rows) * 7 // 10].tolist()
    assert inside.tolist() == sorted(expected) and len(inside) == 20
    some = choose(scores, domains, NAMES, rule="band", low=0.5, high=0.7, quotas="natural", rows=10)
    assert set(some) < set(inside) and np.bincount(domains[some]).tolist() == [1, 3, 6]


def test_noise_and_chance():
    scores, _ = pool()
    assert choose(scores, rule="gumbel", rows=9, tau=0.7, seed=3).tolist() == (
        selection.gumbel_top(scores, 9, 0.7, 3).tolist()
    )
    assert choose(scores, rule="gumbel", rows=9, tau=0.0).tolist() == best(scores, 9)
    assert choose(scores, rule="random", rows=9, seed=3).tolist() == selection.random(100, 9, 3).tolist()
    assert choose(scores, rule="random", rows=9, seed=4).tolist() != selection.random(100, 9, 3).tolist()


@pytest.mark.parametrize(
    "quotas, rows, counts",
    [
        ("natural", 50, [5, 15, 30]),
        ("natural", 7, [1, 2, 4]),  # 0.7, 2.1, 4.2
        ("even", 30, [10, 10, 10]),
        ("even", 8, [3, 3, 2]),  # equal remainders go to the first
        ({"books": 0.5, "code": 0.25, "web": 0.25}, 20, [10, 5, 5]),
        ({"books": 1, "code": 0, "web": 3}, 20, [5, 0, 15]),
        ({"books": 0.1, "code": 0.2, "web": 0.7}, 10, [1, 2, 7]),
        ({"books": 1, "code": 1, "web": 5}, 3, [1, 0, 2]),  # 0.43, 0.43, 2.14
    ],
)
def test_quotas(quotas, rows, counts):
    scores, domains = pool()
    for rule in ("top", "gumbel", "random"):
        chosen = choose(scores, domains, NAMES, rule=rule, rows=rows, quotas=quotas, seed=5)
        assert (np.diff(chosen) > 0).all()
        assert np.bincount(domains[chosen], minlength=3).tolist() == counts
        if rule == "top":
            parts = [best(scores, n, np.flatnonzero(domains == d)) for d, n in enumerate(counts)]
            assert chosen.tolist() == sorted(sum(parts, []))


def test_a_domain_without_rows_needs_no_quota():
    scores, domains = pool()
    for quotas in ("even", "natural", {"web": 1, "books": 1, "code": 1}):
        assert len(choose(scores, domains, ["books", "code", "web", "news"], rows=12, quotas=quotas)) == 12


QUOTAS = {"books": 1, "code": 1, "web": 1}


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "rows=0 and ratio=0"),
        ({"rows": 5, "ratio": 0.5}, "rows=5 and ratio=0.5"),
        ({"rows": 101}, "rows=101.*100 rows"),
        ({"rows": -1}, "rows=-1"),
        ({"ratio": 0.001}, "ratio=0.001: keeps none of the 100"),
        ({"ratio": 1.5}, "ratio=1.5"),
        ({"ratio": float("nan")}, "ratio=nan"),
        ({"rows": 5, "rule": "tpo"}, "rule='tpo'.*did you mean top"),
        ({"rows": 5, "low": 0.2}, "low=0.2.*no meaning with rule=top"),
        ({"rule": "band", "low": 0.6, "high": 0.5}, "0 <= low < high"),
        ({"rule": "band", "low": 0.501, "high": 0.509}, "no row lies in this band of 100"),
        ({"rule": "band", "low": 0.5, "high": 0.6, "rows": 11}, "11 are wanted and there are 10"),
        ({"rule": "gumbel", "rows": 5, "tau": -1.0}, "tau=-1"),
        ({"rows": 33, "quotas": "even"}, "books: its quota is 11 rows and it has 10.*at most 30 rows"),
        ({"rows": 5, "quotas": "evn"}, "quotas='evn'"),
        ({"rows": 5, "quotas": QUOTAS | {"bokos": 1}}, "no domain 'bokos'.*did you mean books"),
        ({"rows": 5, "quotas": {"books": 1, "web": 1}}, "the 30 rows of domain 'code' have none"),
        ({"rows": 5, "quotas": QUOTAS | {"web": -1}}, "web=-1"),
        ({"rows": 5, "quotas": QUOTAS | {"web": float("nan")}}, "web=nan"),
        ({"rows": 5, "quotas": dict.fromkeys(NAMES, 0)}, "every share is 0"),
        ({"rule": "band", "low": 0.5, "quotas": "even"}, "rows=0 and ratio=0"),
    ],
)
def test_what_cannot_be_chosen_is_said(options, message):
    with pytest.raises(UserError, match=message) as caught:
        choose(*pool(), NAMES, **options)
    assert "\n" not in str(caught.value)


def test_broken_scores_and_domains_are_said():
    scores, domains = pool()
    scores[[40, 71]] = np.nan
    for rule in row_list.RULES:
        with pytest.raises(UserError, match="2 of 100 scores are NaN, the first that of row 40"):
            choose(scores, rule=rule, rows=5)
    with pytest.raises(UserError, match="no scores"):
        choose(np.zeros(0), rows=5)
    with pytest.raises(UserError, match="domain of each of the 100"):
        choose(pool()[0], None, NAMES, rows=5, quotas="even")
    with pytest.raises(UserError, match="domains from 0 to 2 do not fit 2"):
        choose(pool()[0], domains, NAMES[:2], rows=5, quotas="even")
    with pytest.raises(UserError, match="news: its quota is 5 rows and it has 0"):
        choose(pool()[0], domains, [*NAMES, "news"], rows=20, quotas=QUOTAS | {"news": 1})


def test_the_most_that_quotas_allow_is_right():
    scores, domains = pool()
    for quotas in ("even", {"books": 3, "code": 1, "web": 2}, {"books": 0.05, "code": 0.85, "web": 0.1}):
        with pytest.raises(UserError) as caught:
            choose(scores, domains, NAMES, rows=100, quotas=quotas)
        most = int(str(caught.value).split("at most ")[1].split()[0])
        assert len(choose(scores, domains, NAMES, rows=most, quotas=quotas)) == most
        with pytest.raises(UserError):
            choose(scores, domains, NAMES, rows=most + 3, quotas=quotas)


def test_quotas_on_a_command_line():
    assert row_list.parse_quotas("") is None
    assert row_list.parse_quotas("even") == "even" and row_list.parse_quotas("natural") == "natural"
    assert row_list.parse_quotas("Wikipedia (en)=0.5, a=b=2") == {"Wikipedia (en)": 0.5, "a=b": 2.0}
    for text in ("evn", "a=1,a=2", "a=x", "=1", "a=1,,b=2"):
        with pytest.raises(UserError, match="NAME=SHARE"):
            row_list.parse_quotas(text)


# The file.


def rows(n=100, corpus="c" * 32, vocabulary="v" * 32):
    """What `check` asks of `Rows`."""

    class Stand(SimpleNamespace):
        def __len__(self):
            return n

    return Stand(fingerprint=corpus, vocabulary=SimpleNamespace(fingerprint=vocabulary))


def made(ids=(3, 14, 15, 92), n=100):
    return row_list.make(
        np.array(ids), corpus="c" * 32, rows=n, vocabulary="v" * 32, made={"rule": "top", "scores": "runs/scores"}
    )


def write_raw(path: Path, ids, **changes):
    header = made().header | changes
    np.savez(path, row_ids=ids, header=json.dumps({k: v for k, v in header.items() if v is not None}))
    return path


def test_a_list_comes_back_as_it_was_written(tmp_path):
    path = row_list.write(tmp_path / "new" / "chosen.rows", made())
    found = row_list.read(path)
    assert found.row_ids.tolist() == [3, 14, 15, 92] and found.row_ids.dtype == np.int64 and len(found) == 4
    assert found.header == made().header and found.header["made"]["scores"] == "runs/scores"
    assert found.header["chosen"] == 4 and found.path == str(path)
    found.check(rows())
    first = path.read_bytes()
    assert row_list.write(path, found).read_bytes() == first
    assert [file.name for file in path.parent.iterdir()] == ["chosen.rows"]


@pytest.mark.parametrize(
    "other, message",
    [
        ({"corpus": "d" * 32}, r"chosen\.npz: .* another corpus \(cccccccccccc; these rows have dddddddddddd\): score"),
        (
            {"vocabulary": "w" * 32},
            r"chosen\.npz: .* another vocabulary \(vvvvvvvvvvvv; these rows have wwwwwwwwwwww\)",
        ),
        ({"n": 92}, "names row 92 where the corpus has 92"),
    ],
)
def test_a_list_for_other_rows_is_refused(tmp_path, other, message):
    found = row_list.read(row_list.write(tmp_path / "chosen.npz", made()))
    with pytest.raises(UserError, match=message):
        found.check(rows(**other))


@pytest.mark.parametrize(
    "ids, message",
    [
        ([], "names no rows"),
        ([3, 2], "ascend"),
        ([3, 3], "ascend"),
        ([-1, 3], "row -1 of a corpus with 100"),
        ([3, 100], "row 100 of a corpus with 100"),
    ],
)
def test_bad_ids_are_refused_when_made_and_when_read(tmp_path, ids, message):
    with pytest.raises(UserError, match=message):
        made(ids)
    ids = np.array(ids, np.int64)
    path = write_raw(tmp_path / "bad.npz", ids, fingerprint=row_list._fingerprint(ids))
    with pytest.raises(UserError, match=rf"bad\.npz: .*{message}"):
        row_list.read(path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no such list of rows"):
        row_list.read(tmp_path / "missing.npz")
    ids = np.array([3, 14, 15, 92])
    for number, (array, changes, message) in enumerate((
        (ids, {"format": 2}, "format 2 where"),
        (ids, {"corpus": None}, "header lacks one of"),
        (ids, {"rows": "100"}, "header lacks one of"),
        (ids + 1, {}, "not those it was written with"),
        (ids.astype(np.float64), {}, "not a list of rows"),
        (ids[None], {}, "not a list of rows"),
        (ids.astype(object), {}, "not a whole list of rows"),
    )):  # fmt: skip
        path = write_raw(tmp_path / f"{number}.npz", array, **changes)
        with pytest.raises(UserError, match=message):
            row_list.read(path)
    for name, content in (("text", b"3\n14\n"), ("empty", b""), ("pickle", b"\x80\x04K\x03.")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: not a whole list of rows"):
            row_list.read(tmp_path / name)


def test_a_file_cut_anywhere_or_with_any_byte_changed_is_refused_or_whole(tmp_path):
    data = row_list.write(tmp_path / "chosen.npz", made()).read_bytes()
    damaged = tmp_path / "damaged.npz"
    for end in range(0, len(data), 3):
        damaged.write_bytes(data[:end])
        with pytest.raises(UserError, match="damaged.npz: not a whole list of rows") as caught:
            row_list.read(damaged)
        assert "\n" not in str(caught.value)
    refused = 0
    for at in range(0, len(data), 3):
        damaged.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
        try:
            found = row_list.read(damaged)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
        else:  # a zip has bytes that mean nothing here, as times and attributes
            assert found.row_ids.tolist() == [3, 14, 15, 92] and found.header == made().header
    assert refused > 0.8 * len(range(0, len(data), 3))


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = row_list.write(tmp_path / "chosen.npz", made())
    before = path.read_bytes()

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(row_list.np, "savez", fail)
    with pytest.raises(UserError, match=r"chosen\.npz: cannot be written \(No space left"):
        row_list.write(path, made([1]))
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["chosen.npz"]
    monkeypatch.undo()
    with open(path, "rb") as old:
        row_list.write(path, made([1]))
        assert old.read() == before  # another file took its place at once
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        row_list.write(tmp_path / "file" / "chosen.npz", made())
