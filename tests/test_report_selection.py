import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
from test_report import BASE, BETTER, by_name, fabricate, said

from slm_assist import report
from slm_assist.assist import row_list, sample, score_store
from slm_assist.assist.sample import Sample
from slm_assist.data.tokenizers import train_vocabulary
from slm_assist.errors import UserError
from slm_assist.report import coloured, selection

N, T, CORPUS = 40, 6, "corpus" * 4
TEXT = "one two\nthree <b>four</b> & five " * 40


@pytest.fixture(scope="module")
def vocabulary():
    return train_vocabulary([TEXT + "".join(map(chr, range(33, 127))) * 9], 330)


def choosing(path, rows, *, curve=BETTER, scorer=None, config=(), stage="selecting", score=None, **more):
    """A run that chose `rows` (of one step each) among twice as many candidates in domains `web` and `code`."""
    select = {"rows": "online", "rule": "top", "score": "salt", "pool_factor": 2, "token_share": 1.0} | dict(config)
    facts = {"train_rows": CORPUS, "train_rows_count": N}
    if scorer:
        facts["helpers"] = {"scorer": scorer, **more.get("helpers", {})}
    run = Path(fabricate(path, curve, config={"select": select}, facts=facts))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    for record, chosen in zip(train, rows, strict=False):
        record |= {"stage": stage, "rows": list(chosen), "candidates": 2 * len(chosen), "kept_rows": len(chosen),
                   "score_mean": 1.0, "score_kept_mean": 2.0,
                   "domains": {"web": [3, len(chosen) - 1], "code": [2 * len(chosen) - 3, 1]}}  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if score is not None:
        sample.write(run / "selection_sample.npz", a_sample(score))
    return str(run)


def a_sample(score, targets=None):
    n = len(score)
    rng = np.random.default_rng(0)
    return Sample(
        row_ids=np.arange(n), domain=np.arange(n) % 2, domains=["web", "code"],
        targets=rng.integers(0, 300, (n, T)) if targets is None else targets, mask=np.ones((n, T)),
        loss=rng.uniform(0, 9, (n, T)), rank=rng.integers(0, 20, (n, T)), score=np.asarray(score, float),
        header={"score": "salt", "k": 10, "roles": {"scorer": {"run": "small", "step": 12}}, "kept_share": 0.5},
    )  # fmt: skip


def write_scores(path, score, domain, corpus=CORPUS):
    """A complete directory of scores, by the store's own writer."""
    meta = {"vocabulary": "v", "corpus": corpus, "rows": len(score), "seq_len": T, "dtype": "float32", "batch_rows": 8,
            "span_rows": 16, "score": {"name": "salt", "k": 10}, "helpers": {}, "domains": ["web", "code"]}  # fmt: skip
    values = np.zeros((len(score), len(score_store.COLUMNS)), np.float32)
    values[:, score_store.COLUMNS.index("score")] = score
    values[:, score_store.COLUMNS.index("domain")] = domain
    with score_store.Writer(path, meta) as writer:
        for first in writer.todo:
            writer.append(first, values[first : first + 16])
    return path


def write_list(path, ids, corpus=CORPUS):
    chosen = row_list.make(np.asarray(ids), corpus=corpus, rows=N, vocabulary="v", made={})
    return str(row_list.write(path, chosen))


def small(tmp_path, step=100, flops=600.0, name="small"):
    return {"run": str(tmp_path / name), "step": step, "parameters": 500, "train_flops": flops}


def test_overlap_and_chance_by_hand(tmp_path):
    base = fabricate(tmp_path / "baseline", facts={"train_rows": CORPUS, "train_rows_count": N})
    one = choosing(tmp_path / "one", [[0, 1], [2, 3], [3, 4]])  # 5 distinct rows of 12 candidates
    two = choosing(tmp_path / "two", [[3, 4], [8, 9]], config={"score": "perplexity"})  # 4 of 8, in the same order
    other = choosing(tmp_path / "three", [[0, 9], [1, 8]])
    written = json.loads(Path(other, "config.json").read_text())
    written["config"]["data"] = {"order_seed": 5}
    Path(other, "config.json").write_text(json.dumps(written))
    listed = write_list(tmp_path / "best.npz", [1, 3, 4, 20, 21, 22, 23, 24])
    found = selection.look(report.compare([base, one, two, other]), lists=[listed])
    pairs = {o.names: o for o in found.overlaps}
    assert len(pairs) == 6
    near = pairs["one", "two"]
    assert (near.rows, near.common) == ((5, 4), 2)
    assert near.by_chance == pytest.approx(5 * 4 * 8 / (12 * 8))  # the second's candidates are among the first's
    assert near.share_of_smaller(near.common) == 2 / 4 and near.jaccard(near.common) == 2 / 7
    far = pairs["one", "three"]
    assert (far.common, far.by_chance) == (2, pytest.approx(5 * 4 / N))  # other order: two blind draws of the corpus
    to_list = pairs["one", "best"]
    assert (to_list.common, to_list.by_chance) == (3, pytest.approx(5 * 8 / N))


def test_chance_is_what_blind_choices_give():
    rng, order, common = np.random.default_rng(0), np.arange(500), []
    for _ in range(400):
        rng.shuffle(order)
        a = np.sort(rng.choice(order[:300], 60, replace=False))
        b = np.sort(rng.choice(order[:200], 50, replace=False))
        both = selection.overlap(selection.Picked("a", a, 300, 500, "seed"), selection.Picked("b", b, 200, 500, "seed"))
        common.append(both.common)
    assert both.by_chance == pytest.approx(10)
    assert abs(np.mean(common) - 10) < 4 * np.std(common) / 20


def test_kept_share_by_domain_adds_up(tmp_path):
    runs = [fabricate(tmp_path / "baseline"), choosing(tmp_path / "ds", [[0, 1, 2], [5, 6, 7]])]
    (choice,) = selection.look(report.compare(runs)).choices
    assert choice.domains == {"web": (6, 4), "code": (6, 2)}
    assert choice.kept_share == 0.5
    assert choice.means == {"steps": [10, 20], "candidates": [1, 1], "kept": [2, 2]}
    table = report.selection_page.domain_table(selection.Selection((choice,)))
    assert ("web", "66.7 % of 6 (1.33)") in table.rows and ("all", "50.0 % of 12 (1.00)") in table.rows


def test_rank_correlation_with_ties():
    a, b = np.array([1.0, 2, 2, 3, np.nan]), np.array([10.0, 30, 20, 40, 5])
    x, y = np.array([1, 2.5, 2.5, 4]), np.array([1.0, 3, 2, 4])
    assert selection.rank_correlation(a, b) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert selection.rank_correlation(a[:4], -(b[:4] ** 3)) == pytest.approx(-np.corrcoef(x, y)[0, 1])
    assert selection.rank_correlation(np.ones(4), b[:4]) == 0


def test_scores_of_a_corpus_give_domains_to_lists_and_are_correlated(tmp_path):
    score, domain = np.arange(N) % 7 / 3, np.arange(N) % 4 == 0
    first = write_scores(tmp_path / "salt", score, domain)
    second = write_scores(tmp_path / "ppl", -score, domain)
    listed = write_list(tmp_path / "best.npz", [0, 4, 5, 8])
    base = fabricate(tmp_path / "baseline", facts={"train_rows": CORPUS})
    comparison = report.compare([base])
    found = selection.look(comparison, lists=[listed], scores=[first, second])
    assert found.correlations == (("salt", "ppl", pytest.approx(-1)),)
    assert found.choices[0].domains == {"web": (30, 1), "code": (10, 3)}
    assert any("salt: 15 % of the rows have the same score, 0 (half of their tokens" in note for note in found.notes)
    page = report.write(comparison, tmp_path / "out", found).read_text()
    assert "10.0 % of 40" in page and "-1.000" in page
    other = write_list(tmp_path / "other.npz", [1, 2], corpus="elsewhere")
    with pytest.raises(UserError, match="other.npz: made for another corpus") as error:
        selection.look(comparison, lists=[other])
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="strange: made for another corpus"):
        selection.look(comparison, scores=[write_scores(tmp_path / "strange", score, domain, corpus="elsewhere")])


def test_a_run_with_a_list_shows_the_list(tmp_path):
    listed = write_list(tmp_path / "best.npz", [1, 3, 4])
    run = choosing(tmp_path / "ds", [], config={"rows": "list", "list": listed})
    base = fabricate(tmp_path / "baseline")
    (choice,) = selection.look(report.compare([base, run])).choices
    assert (choice.name, choice.picked.name, choice.picked.row_ids.tolist()) == ("ds", "ds", [1, 3, 4])


def test_the_rows_picked_for_the_eye():
    score = np.array([0.5, np.nan, 3, 1, 2, 9, 4, 4])
    assert coloured.pick(score, 1) == {"highest": [5], "middle": [2], "lowest": [0]}
    assert coloured.pick(score, 2) == {"highest": [5, 6], "middle": [7, 2], "lowest": [3, 0]}
    assert coloured.pick(np.array([1.0, 2]), 3) == {"highest": [1], "lowest": [0]}
    assert coloured.pick(np.array([1.0]), 3) == {"highest": [0]}
    assert coloured.pick(np.array([np.nan]), 3) == {}


def test_tokens_show_their_loss_their_rank_and_their_text(vocabulary):
    ids = [*vocabulary.encode("<b> five\n"), vocabulary.eos_id]
    targets = np.array([[*ids[:T]] + [0] * (T - len(ids[:T]))])
    one = a_sample([1.0], targets)
    one.loss[0], one.rank[0] = [0.1, 0.7, 3, 6.9, 7, 99], [9, 10, 0, 11, 3, 20]
    one.mask[0, 5] = 0
    page = coloured.rows_html(one, vocabulary)
    spans = re.findall(r'<i class="(l\d)( k)?" title="loss ([\d.]+), rank (\d+)">(.*?)</i>', page, re.DOTALL)
    assert [(level, bool(top)) for level, top, *_ in spans] == [
        ("l0", True), ("l1", False), ("l3", True), ("l4", False), ("l5", True)]  # fmt: skip
    shown = html.unescape(re.sub(r"<[^>]+>", "", "".join(text for *_, text in spans)))
    assert shown.replace("\u00b7", " ").replace("\u21b5\n", "\n") == vocabulary.decode(ids[:5])
    assert "<b> five" not in page and "mean loss 3.54 nats, 60 % of 5 tokens in the top 10" in page
    assert "<script" not in page and "underlined" in page


def test_long_rows_are_cut_and_padding_is_not_shown(vocabulary):
    one = a_sample([1.0])
    one.mask[0, 4:] = 0
    page = coloured.rows_html(one, vocabulary, tokens=3)
    assert len(re.findall(r"title=", page)) == 3 and "1 more tokens" in page


class Pieces:
    """A vocabulary in the style of byte-level BPE, where a piece is no text."""

    def pieces(self):
        return ["<|end|>", "\u0120the", "\u010a", "\u00e2"]

    def decode(self, ids):
        return {0: "", 1: " the", 2: "\n", 3: "\ufffd"}[ids[0]]


def test_pieces_that_are_no_text_are_decoded():
    texts = coloured.token_texts(Pieces(), [0, 1, 2, 3, 99])
    assert texts[0] == "<u>&lt;|end|&gt;</u>"
    assert texts[1] == "<s>\u00b7</s>the" and texts[2] == "<s>\u21b5</s>\n"
    assert texts[3] == "\ufffd" and texts[99] == "<u>\u203999\u203a</u>"


def test_bytes_and_signs_without_a_shape_are_spelt(vocabulary):
    pieces = vocabulary.pieces()
    texts = coloured.token_texts(vocabulary, range(len(pieces)))
    assert texts[pieces.index("<0x0A>")] == "<s>\u21b5</s>\n"
    assert texts[pieces.index("<0xE2>")] == "<u>\u2039E2\u203a</u>"
    assert texts[pieces.index("<0x3C>")] == "&lt;"
    assert texts[vocabulary.eos_id] == "<u>&lt;/s&gt;</u>"
    assert coloured.visible("a\u202eb\u00a0") == "a<u>\u2039202E\u203a</u>b<u>\u2039A0\u203a</u>"


def test_the_page_shows_what_was_selected(tmp_path, vocabulary):
    helpers = small(tmp_path)
    run = choosing(tmp_path / "salt", [[i, i + 1] for i in range(10)], scorer=helpers, score=np.linspace(0, 2, 12))
    vocabulary.save(Path(run, "tokenizer"))
    base = fabricate(tmp_path / "baseline", facts={"train_rows": CORPUS, "train_rows_count": N})
    report.run_report([base, run], tmp_path / "out", lists=[write_list(tmp_path / "best.npz", [1, 2, 30])])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "What was selected" in page and "highest, 1 of 3" in page and "salt \u2229 best" in page
    assert not re.search(r"https?:|src=\"(?!data:)|<link|<script|url\(", page)
    for name in ("scores", "steps", "domains"):
        picture = (tmp_path / "out" / f"selection-{name}.png").read_bytes()
        assert picture[:4] == b"\x89PNG" and len(picture) < 200_000
    results = json.loads((tmp_path / "out" / "results.json").read_text())["selection"]
    assert results["choices"]["salt"]["kept_share"] == 0.5
    assert results["overlaps"][0]["common"] == 2


def test_a_report_without_selection_says_nothing_of_it(tmp_path):
    comparison = report.compare([fabricate(tmp_path / "baseline"), fabricate(tmp_path / "salt", BETTER)])
    assert not selection.look(comparison)
    assert "selected" not in report.write(comparison, tmp_path / "out").read_text()


def test_a_damaged_sample_is_named(tmp_path):
    run = choosing(tmp_path / "ds", [[1]], score=[1.0, 2.0])
    file = Path(run, "selection_sample.npz")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="selection_sample.npz"):
        selection.look(report.compare([run]))


def test_scores_with_nothing_finite_are_drawn(tmp_path):
    run = choosing(tmp_path / "ds", [[1, 2]], score=[np.nan, np.nan])
    comparison = report.compare([fabricate(tmp_path / "baseline"), run])
    report.write(comparison, tmp_path / "out")


# Stages, kinds and costs


def test_a_switch_is_where_the_teacher_leaves_whatever_is_selected(tmp_path):
    names = ["assisted_selecting"] * 5 + ["assisted"] * 5 + ["plain"] * 20
    for label, stages, soft, chosen in (
        ("ds", names, 100, 50),
        ("early", ["assisted_selecting"] * 5 + ["selecting"] * 5 + ["plain"] * 20, 50, 100),
        ("rows", ["selecting"] * 10 + ["plain"] * 20, None, 100),
        ("both", ["assisted_selecting"] * 10 + ["plain"] * 20, 100, 100),
    ):
        run = Path(fabricate(tmp_path / label, BASE, finished=False))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        train = [line for line in lines if line["kind"] == "train"]
        for record, stage in zip(train, stages, strict=True):
            record["stage"] = stage
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        read = report.read_run(run)
        assert (read.switch_step, read.selection_stop) == (soft, chosen), label


def test_kinds_of_methods_that_choose(tmp_path):
    helpers = {"helpers": {"teacher": small(tmp_path, 200)}}
    plain = choosing(tmp_path / "rows", [[1]], scorer=small(tmp_path))
    ds = choosing(tmp_path / "a" / "salt", [[1]], scorer=small(tmp_path), **helpers)
    blind = choosing(tmp_path / "b" / "salt", [[1]], config={"rule": "random"}, scorer=small(tmp_path), **helpers)
    tokens = choosing(tmp_path / "rho", [], scorer=small(tmp_path), config={"rows": "all", "token_share": 0.6})
    named = {ds: "SALT_DS", blind: "SALT, random rows"}
    for run, name in named.items():
        written = json.loads(Path(run, "config.json").read_text())
        written["config"]["name"] = name
        Path(run, "config.json").write_text(json.dumps(written))
    comparison = report.compare([plain, ds, blind, tokens, fabricate(tmp_path / "baseline")])
    kinds = {m.name: m.kind for m in comparison.methods}
    assert kinds == {"baseline": "BASELINE", "SALT_DS": "SALT_DS", "SALT, random rows": "other", "rows": "other",
                     "rho": "other"}  # fmt: skip
    assert all(m.assisted for m in comparison.methods if m.kind != "BASELINE")
    text = said(comparison)
    assert "SALT_DS (soft labels and rows chosen by the small LM) ends better" in text
    assert "SALT, random rows (soft labels and rows drawn at random) ends better" in text
    assert "rows (rows chosen by the small LM) ends better" in text
    assert "rho (tokens chosen by the small LM) ends better" in text


def test_one_small_lm_in_several_roles_is_charged_once_at_its_most(tmp_path):
    fabricate(tmp_path / "small", {100: 3.2, 200: 2.6, 300: 2.5})
    late = {"helpers": {"teacher": small(tmp_path, 200, 2000.0), "reference": small(tmp_path, 100, 1000.0)}}
    run = choosing(tmp_path / "salt", [[1]], scorer=small(tmp_path, 100, 1000.0), **late)
    runs = [fabricate(tmp_path / "baseline"), run, tmp_path / "small"]
    salt = by_name(report.compare(runs))["salt"]
    assert salt.helper["flops"].mean == 2000.0
    assert salt.helper["seconds"].mean == pytest.approx(20)  # 200 steps of 0.1
    assert salt.small_lms == "small LM"


def test_two_small_lms_are_both_charged(tmp_path):
    both = {"helpers": {"reference": small(tmp_path, 50, 300.0, "tiny"), "buckets": small(tmp_path, 9, 9e9, "third")}}
    run = choosing(tmp_path / "pl", [[1]], scorer=small(tmp_path, 100, 600.0), **both)
    comparison = report.compare([fabricate(tmp_path / "baseline"), run])
    method = by_name(comparison)["pl"]
    assert method.helper["flops"].mean == 900.0
    assert method.ratio["flops"]["full"].mean - method.ratio["flops"]["free"].mean == pytest.approx(900 / 3000)
    assert "the small LMs taken as given" in said(comparison)
    assert "With the small LMs' own training counted in full" in said(comparison)


def test_scoring_has_a_column_of_its_own(tmp_path):
    run = Path(choosing(tmp_path / "ds", [[1]], scorer=small(tmp_path)))
    summary = json.loads((run / "summary.json").read_text())
    summary["flops"]["scorer"] = 777.0
    (run / "summary.json").write_text(json.dumps(summary))
    comparison = report.compare([fabricate(tmp_path / "baseline"), run])
    table = report.tables.phase_table(comparison)
    column = table.header.index("scoring, FLOPs")
    assert {row[0]: row[column] for row in table.rows} == {"baseline": "\u2013", "ds": "777"}
    assert by_name(comparison)["ds"].flops["scorer"].mean == 777.0


def test_the_step_of_a_scorer_is_no_seed(tmp_path):
    one = choosing(tmp_path / "one" / "ds", [[1]], config={"scorer": "a", "scorer_step": 3})
    other = choosing(tmp_path / "two" / "ds", [[1]], config={"scorer": "b", "scorer_step": 4})
    written = json.loads(Path(other, "config.json").read_text())
    written["config"]["seed"] = 1
    Path(other, "config.json").write_text(json.dumps(written))
    with pytest.raises(UserError, match="differ in select.scorer_step"):
        report.compare([one, other])


def test_what_a_list_cost_is_charged(tmp_path):
    """Its scorer's training and the scoring of the corpus; no file says how many seconds that took."""
    listed = {"scorer": small(tmp_path, 100, 600.0)}
    made = {"helpers": listed, "scoring_flops": 300.0, "scores_fingerprint": "f", "kept": {"domains": {"web": [9, 3]}}}
    chosen = row_list.make(np.arange(3), corpus=CORPUS, rows=N, vocabulary="v", made=made)
    file = row_list.write(tmp_path / "best.npz", chosen)
    run = choosing(tmp_path / "ds", [], config={"rows": "list", "list": str(file)})
    written = json.loads(Path(run, "config.json").read_text())
    written["facts"]["data"] = {"lists": {"list": chosen.header, "then": chosen.header}}
    Path(run, "config.json").write_text(json.dumps(written))
    fabricate(tmp_path / "small", {100: 3.2, 200: 2.6, 300: 2.5})
    comparison = report.compare([fabricate(tmp_path / "baseline"), run, tmp_path / "small"])
    method = by_name(comparison)["ds"]
    assert by_name(comparison)["small"].kind == "small LM"
    assert (method.helper["flops"].mean, method.helper["seconds"].mean) == (900.0, None)
    assert "ds (rows chosen by the small LM)" in said(comparison)
    assert selection.look(comparison).choices[0].domains == {"web": (9, 3)}
