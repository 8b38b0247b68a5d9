"""The page says what results.json says: tables read back, sentences by verdicts; and the page that is kept is it."""

import copy
import json
import re

import evidence_made
import numpy as np
import pytest
from test_evidence_points import COMMAND, make

KEPT = evidence_made.SCRIPTS
PRIMARY = "bits_per_byte"


@pytest.fixture(scope="module")
def evidence():
    with evidence_made.scripts() as found:
        evidence_made.fewer_replicates(found)
        yield found


@pytest.fixture(scope="module")
def results(evidence, tmp_path_factory):
    setting, jobs, _ = make(evidence, tmp_path_factory.mktemp("made"))
    return json.loads(json.dumps(evidence.collect.collect(setting, jobs, COMMAND), allow_nan=False))


def last(row):
    return next(end for end in row["ends"] if end["steps"] == row["steps"])


def tables(page):
    """{(heading, words of the header's first line): {first cell: cells by header}}"""
    found, heading = [], ""
    lines = page.splitlines()
    for i, line in enumerate(lines):
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if line.startswith("| ---"):
            header = cells(lines[i - 1])
            rows = []
            for row in lines[i + 1 :]:
                if not row.startswith("|"):
                    break
                assert len(cells(row)) == len(header), row
                rows.append(dict(zip(header, cells(row), strict=True)))
            found.append((heading, rows))
    return found


def cells(line):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]


def table(page, heading, column):
    return next(rows for name, rows in tables(page) if name.startswith(heading) and rows and column in rows[0])


def signed(apart):
    """A difference in a cell, written again."""
    if apart["mean"] is None:
        return apart["verdict"]
    between = "" if apart["interval"] is None else f" [{apart['interval'][0]:+.4f}, {apart['interval'][1]:+.4f}]"
    return f"{apart['mean']:+.4f}{between}, {apart['verdict']}"


def the_tables_are_the_results(page, results):
    """Every cell of the main tables, against what results.json has."""
    checked, headings = 0, [heading for heading, _ in tables(page)]
    for start, part in (*((name, "validation") for name in ("BASELINE, SALT, RKD", "Other gifts", "Controls")),
                        ("Confirmation", "test")):  # fmt: skip
        for ratio in results["setting"]["ratios"]:
            ends = f"{ratio} tokens a parameter"
            full = next((one for one in headings if one.startswith(start) and one.endswith(f", {ends}")), "")
            if not full:
                continue
            group = {"BASE": "main", "Othe": "gifts", "Cont": "controls", "Conf": "confirmation"}[full[:4]]
            expected = [r for r in results[part]["rows"] if (r["group"], r["ratio"]) == (group, ratio)]
            shown = table(page, full, "bits a byte")
            assert [line["row"] for line in shown] == [row["title"] for row in expected]
            for line, row in zip(shown, expected, strict=True):
                end = last(row)
                assert line["seeds"] == str(len(row["seeds"]))
                assert line["bits a byte"] == f"{end['measures'][PRIMARY]['mean']:.4f}"
                if "equal_steps" in end:
                    assert line["at equal steps"] == signed(end["equal_steps"][PRIMARY])
                    for share, words in (("full", "in full"), ("shared", "shared by 10"), ("free", "left out")):
                        cell = line[f"at equal FLOPs, small LM {words}"]
                        assert cell == signed(end["equal_flops"][share][PRIMARY])
                    limit = end["equal_steps"][PRIMARY]["detectable"]
                    assert line["detectable"] == (f"{limit:.4f}" if limit else "–")
                checked += 1
    return checked


def aparts(found, path=()):
    """Every difference in results.json, with where it stands."""
    if isinstance(found, dict):
        if "verdict" in found and "interval" in found:
            yield path, found
        for key, value in found.items():
            yield from aparts(value, (*path, key))
    elif isinstance(found, list):
        for i, value in enumerate(found):
            yield from aparts(value, (*path, i))


def means(found):
    """Every mean with its seeds' figures."""
    if isinstance(found, dict):
        if isinstance(found.get("seeds"), list) and "mean" in found and found["seeds"]:
            yield found
        for value in found.values():
            yield from means(value)
    elif isinstance(found, list):
        for value in found:
            yield from means(value)


def the_results_are_whole(results):
    """Means are those of their seeds, and every verdict follows from its interval and its detectable difference."""
    count = 0
    for found in means(results):
        if isinstance(found["mean"], float) and None not in found["seeds"]:
            assert found["mean"] == pytest.approx(np.mean(found["seeds"]), abs=2e-6)
            count += 1
    verdicts = set()
    for path, found in aparts(results):
        verdicts.add(found["verdict"])
        if found["mean"] is None:
            expected = "outside the measured range"
        elif found["interval"] is None or found["detectable"] is None:
            expected = "one seed"
        else:
            low, high = found["interval"]
            assert low <= high
            resolved = abs(found["mean"]) >= found["detectable"] and (low > 0 or high < 0)
            expected = ("worse" if found["mean"] > 0 else "better") if resolved else "not resolved"
        assert found["verdict"] == expected, path
    assert count > 20
    return verdicts


# Made-up results


def test_tables_are_the_results(evidence, results):
    page = evidence.page.markdown(results)
    assert the_tables_are_the_results(page, results) == 3 + 3 + 1 + 3
    assert the_results_are_whole(results) >= {"better", "worse", "not resolved", "one seed"}
    assert not re.search(r"\bNone\b", page) and not re.search(r"\bnan\b|\binf\b", page)


def test_costs_pairs_domains_and_what_rows_stand_on_are_the_results(evidence, results):
    page = evidence.page.markdown(results)
    by_title = {row["title"]: row for row in results["validation"]["rows"]}
    heading = "BASELINE, SALT, RKD, 2 tokens"
    for line in table(page, heading, "FLOPs, small LM left out"):
        costs = by_title[line["row"]]["to_quality"]
        for name, header in (("steps", "steps"), ("flops_free", "FLOPs, small LM left out"), ("flops_full", "in full")):
            if costs[name]["where"] == "never":
                assert line[header] == "never"
            else:
                low, high = costs[name]["interval"]
                assert line[header] == f"{costs[name]['mean']:.2f} [{low:.2f}, {high:.2f}]"
        assert line["seconds, small LM left out"] == "–"
    both = [rows for name, rows in tables(page) if name.startswith(heading) and "never trained on" in rows[0]]
    names = {
        "mean of domains": "domain_mean",
        "never trained on": "unseen",
        "Wiki": "domain:Wiki",
        "hard": "bucket:hard",
    }
    for rows, of in zip(both, (lambda end: end["equal_steps"], lambda end: end["equal_flops"]["full"]), strict=True):
        for line in rows:
            end = of(last(by_title[line["row"]]))
            for header, name in names.items():
                text = f"{end[name]['mean']:+.3f}"
                assert line[header] == (f"**{text}**" if end[name]["verdict"] in ("better", "worse") else text)
    pair = next(line for line in table(page, "Other gifts", "against") if line["row"] == "growth, then SALT")
    assert pair["against"] == "growth"
    grown = by_title["growth, then SALT"]
    assert pair["at equal steps"] == signed(grown["against_pair"])
    assert pair["at equal FLOPs, small LM in full"] == signed(grown["against_pair_flops"]["full"])
    stands = table(page, "What each row stands on", "of all rows read")
    assert len(stands) == len(results["validation"]["rows"]) + len(results["test"]["rows"])
    for line in stands:
        row = next(r for r in results[line["part"]]["rows"] if r["title"] == line["row"])
        assert line["of all rows read"] == f"{last(row)['read']:.3f}" and line["epochs"] == "1.000"
        assert line["seeds"] == ", ".join(map(str, row["seeds"])) and line["ratio"] == "2"
        assert line["tokens learnt from"] == f"{last(row)['tokens']:,.0f}" == line["unique"]
    runs = table(page, "How to run a line again", "only")
    assert {line["only"] for line in runs} == {
        f"`--only=row={row['key']},part={part},ratio=2`" for part in ("validation", "test")
        for row in results[part]["rows"]}  # fmt: skip


FIGURES = [
    ("measures", PRIMARY, "mean"),
    *(("equal_steps", PRIMARY, *which) for which in (("mean",), ("interval", 0), ("interval", 1), ("detectable",))),
    *(("equal_steps", name, "mean") for name in ("unseen", "domain_mean", "domain:Code")),
    *(("equal_steps", name, "verdict") for name in (PRIMARY, "bucket:easy")),
    *(("equal_flops", share, PRIMARY, "mean") for share in ("full", "shared", "free")),
    *(("equal_flops", "full", PRIMARY, *which) for which in (("interval", 0), ("interval", 1), ("verdict",))),
    *((name,) for name in ("flops", "helper_flops", "tokens", "epochs", "read")),
]


@pytest.mark.parametrize("path", FIGURES, ids=str)
def test_another_figure_in_the_results_is_another_page(evidence, results, path):
    page = evidence.page.markdown(results)
    for part in ("validation", "test"):
        changed = copy.deepcopy(results)
        at = last(next(row for row in changed[part]["rows"] if row["key"] == "salt"))
        for key in path[:-1]:
            at = at[key]
        value = at[path[-1]]
        at[path[-1]] = {"better": "not resolved"}.get(value, "better") if isinstance(value, str) else 1.25 * value + 0.1
        assert evidence.page.markdown(changed) != page


def test_the_answer_is_by_the_verdict_of_the_test_part(evidence, results):
    def answer(found):
        return evidence.page.markdown(found).partition("**Does it pay?")[2].partition("**How much")[0]

    found = next(row for row in results["test"]["rows"] if row["key"] == "salt")
    full = last(found)["equal_flops"]["full"][PRIMARY]
    text = f"({full['mean']:+.4f} [{full['interval'][0]:+.4f}, {full['interval'][1]:+.4f}])"
    assert f"- SALT (test): in full better {text}" in answer(results)
    changed = copy.deepcopy(results)
    found = next(row for row in changed["test"]["rows"] if row["key"] == "salt")
    last(found)["equal_flops"]["full"][PRIMARY]["verdict"] = "not resolved"
    assert f"- SALT (test): in full not resolved {text}" in answer(changed)
    del changed["test"]
    assert "SALT (validation only, not confirmed): in full better" in answer(changed)


def test_sentences_follow_verdicts(evidence, results):
    page = evidence.page.markdown(results)
    assert "Growth, then SALT against growth alone, at equal steps: " in page
    grown = next(row for row in results["validation"]["rows"] if row["key"] == "grow_salt")["against_pair"]
    assert f"at equal steps: {grown['verdict']} (" in page
    assert "resolved on no domain or bucket" not in page.split("**Is it")[0].split("SALT at 100%")[1].split(";")[0]
    assert re.search(r"\bbetter \(", page) and re.search(r"\bworse on ", page)
    nothing = copy.deepcopy(results)
    for _, apart in aparts(nothing):
        apart["verdict"] = "not resolved"
    text = evidence.answers.markdown(nothing)
    assert not re.search(r"\b(better|worse) (\(|on )", text) and " not resolved (" in text
    assert "resolved on no domain or bucket" in text
    fresh = copy.deepcopy(results)
    found = copy.deepcopy(next(row for row in fresh["test"]["rows"] if row["key"] == "salt"))
    found |= {"key": evidence.matrix.FOUND[0], "title": "both", "against_pair": last(found)["equal_steps"][PRIMARY]}
    fresh["test"]["rows"].append(found)
    told = evidence.answers.markdown(fresh).partition("on fresh seeds and the test part:\n\n- both: ")[2]
    assert told.startswith(f"against SALT at equal steps {found['against_pair']['verdict']} (")
    assert f"in full {last(found)['equal_flops']['full'][PRIMARY]['verdict']} (" in told
    assert "with all charged: both." in told and "Claimed later" not in told
    found["key"] = evidence.matrix.LATER[0]
    last(found)["equal_flops"]["full"][PRIMARY]["verdict"] = "not resolved"
    page = evidence.answers.markdown(fresh)
    assert "with all charged: none." in page and "\n\nClaimed later: both. They were chosen on the validation" in page


def test_exploratory_rows_are_told_beside_salt_of_the_same_seed(evidence, results):
    found = copy.deepcopy(next(row for row in results["validation"]["rows"] if row["key"] == "rkd"))
    found |= {"key": "tau-4", "title": "SALT, temperature 4"}
    salt = next(row for row in results["validation"]["rows"] if row["key"] == "salt")
    apart = [last(row)["measures"][PRIMARY]["mean"] for row in (found, salt)]
    told = evidence.answers.markdown(results | {"validation": {"rows": [*results["validation"]["rows"], found]}})
    assert (
        "**How soft should its labels be?**" in told and f"temperature 4 {apart[0] - apart[1]:+.4f} (3 seeds)" in told
    )


def test_a_page_of_one_row_has_no_figures_of_others(evidence, results):
    alone = copy.deepcopy(results)
    for part in ("validation", "test"):
        alone[part]["rows"] = [row for row in alone[part]["rows"] if row["key"] in ("baseline", "salt")]
    page = evidence.page.markdown(alone)
    assert "| SALT |" in page and "RKD |" not in page and "growth |" not in page


def test_pictures_are_drawn_of_what_is_there(evidence, results):
    drawn = evidence.pictures.all_pictures(results)
    assert drawn.keys() == {"curves.png", "time.png", "sweeps.png", "undecayed.png"}
    for picture in drawn.values():
        assert picture.startswith(b"\x89PNG") and 4_000 < len(picture) < 400_000
    page = evidence.page.markdown(results | {"pictures": sorted(drawn)})
    assert re.findall(r"\]\((.*png)\)", page) == ["curves.png", "time.png", "sweeps.png", "undecayed.png"]
    assert "png" not in evidence.page.markdown(results | {"pictures": []})


# The page that is kept


@pytest.mark.skipif(not (KEPT / "results.json").is_file(), reason="nothing has been collected yet")
def test_the_kept_page_is_that_of_the_kept_results(evidence):
    kept = json.loads((KEPT / "results.json").read_text(encoding="utf-8"))
    page = (KEPT / "README.md").read_text(encoding="utf-8")
    assert page == evidence.page.markdown(kept, evidence.page.read_theory(KEPT))
    assert the_tables_are_the_results(page, kept) >= 2
    the_results_are_whole(kept)
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page)
    assert set(kept["pictures"]) <= set(pictures)
    for name in pictures:
        assert (KEPT / name).read_bytes().startswith(b"\x89PNG"), name
