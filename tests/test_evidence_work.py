"""Jobs are shared by processes, done once, and survive each other's failures; and all of it, on a corpus of a test."""

import dataclasses
import functools
import json
import re
import sysconfig
import threading
import time
from pathlib import Path

import evidence_made
import pytest

from slm_assist.data.loader import Prefetcher
from slm_assist.errors import UserError


@pytest.fixture(scope="module")
def evidence():
    with evidence_made.scripts() as found:
        yield found


@pytest.fixture
def setting(evidence, tmp_path):
    return evidence.planning.Setting(str(tmp_path), evidence.tiers.CPU)


def jobs_of(evidence, tmp_path, needs):
    """Jobs that make a file each, with what they need by name."""
    return [
        evidence.planning.Job(evidence.planning.LIST, str(tmp_path / "x" / name), name, 0, 20,
                              needs=tuple(str(tmp_path / "x" / other) for other in of))
        for name, of in needs.items()
    ]  # fmt: skip


def names(paths):
    return [Path(path).name for path in paths]


CHAIN = {"helper": "", "a": ["helper"], "b": ["helper"], "c": ["a"], "alone": "", "d": ["c", "b"]}


def test_each_job_is_done_once_behind_what_it_needs(evidence, setting, tmp_path):
    jobs, did = jobs_of(evidence, tmp_path, CHAIN), []

    def do(_, job, command):
        assert command == "the command" and all(Path(path).is_file() for path in job.needs)
        did.append(job.path)
        Path(job.path).touch()

    evidence.work.do_all(setting, jobs, "the command", do)
    assert names(did) == list(CHAIN)  # by rank
    evidence.work.do_all(setting, jobs, "the command", do)
    assert len(did) == len(CHAIN)


def test_two_workers_share_the_jobs(evidence, setting, tmp_path):
    needs = CHAIN | {f"free-{i}": "" for i in range(12)}
    jobs, did, errors = jobs_of(evidence, tmp_path, needs), {"one": [], "two": []}, []

    def worker(name):
        def do(_, job, command):
            assert all(Path(path).is_file() for path in job.needs)
            did[name].append(job.path)
            time.sleep(0.01)
            Path(job.path).touch()

        try:
            evidence.work.do_all(setting, jobs, "", do, lambda _: time.sleep(0.002))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=worker, args=(name,)) for name in did]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors and sorted(names(did["one"] + did["two"])) == sorted(needs)
    assert did["one"] and did["two"]


def test_a_claimed_job_is_left_to_the_other_and_waited_for_only_where_it_is_needed(evidence, setting, tmp_path):
    jobs, did, waits = jobs_of(evidence, tmp_path, CHAIN), [], []

    def do(_, job, command):
        did.append(job.path)
        Path(job.path).touch()

    def wait(seconds):
        waits.append(names(did))
        Path(jobs[0].path).touch()  # the other has done it

    with evidence.work.claim(jobs[0].path) as mine:
        assert mine
        with evidence.work.claim(jobs[0].path) as again:
            assert not again
        evidence.work.do_all(setting, jobs, "", do, wait)
    assert waits == [["alone"]] and names(did) == ["alone", "a", "b", "c", "d"]

    def never(*_):
        raise AssertionError

    (tmp_path / "x" / "alone").unlink()
    with evidence.work.claim(jobs[4].path):
        evidence.work.do_all(setting, jobs, "", never, never)  # what is left is another's: nothing to wait for


def test_a_job_that_fails_leaves_out_those_that_need_it_and_the_others_go_on(evidence, setting, tmp_path, capsys):
    jobs, did = jobs_of(evidence, tmp_path, CHAIN), []

    def do(_, job, command):
        did.append(job.path)
        if job.key == "a":
            raise UserError("there is no room")
        Path(job.path).touch()

    with pytest.raises(UserError, match=r"^3 job\(s\) failed, the first: .*/x/a: there is no room$"):
        evidence.work.do_all(setting, jobs, "", do)
    assert names(did) == ["helper", "a", "b", "alone"]
    assert f"failed: {jobs[1].path}: there is no room" in capsys.readouterr().out
    done = [job for job in jobs if evidence.work.done(job)]
    assert [job.key for job in done] == ["helper", "b", "alone"]


def test_killed_at_a_job_its_claim_is_free_again(evidence, setting, tmp_path):
    jobs, did = jobs_of(evidence, tmp_path, CHAIN), []

    def do(_, job, command):
        did.append(job.path)
        if job.key == "b" and did.count(job.path) == 1:
            raise KeyboardInterrupt
        Path(job.path).touch()

    with pytest.raises(KeyboardInterrupt):
        evidence.work.do_all(setting, jobs, "", do)
    evidence.work.do_all(setting, jobs, "", do)
    assert names(did) == ["helper", "a", "b", "b", "c", "alone", "d"]


def test_a_run_is_done_when_it_is_measured_on_the_part_that_is_its_own(evidence, tmp_path):
    m, planning = evidence.matrix, evidence.planning
    kinds = {
        (m.MAIN, False): {"validation"}, (m.CONFIRM, True): {"test"}, (m.BUCKETS, False): {"validation", "test"},
        (m.TUNED, False): set(), (None, False): set(),
    }  # fmt: skip
    for i, ((group, test), parts) in enumerate(kinds.items()):
        row = m.Row("k", "K", group, "baseline", test=test) if group else None
        job = planning.Job(planning.TRAIN, str(tmp_path / str(i)), "k", 0, 20, row=row)
        Path(job.path).mkdir()
        for part in parts:
            assert not evidence.work.done(job)
            (Path(job.path) / f"documents-{part}.json").touch()
        assert not evidence.work.done(job)
        (Path(job.path) / "evidence.json").touch()
        assert evidence.work.done(job)
        for part in parts:
            measured = Path(job.path) / f"documents-{part}.json"
            measured.unlink()
            assert not evidence.work.done(job)
            measured.touch()


def test_a_scored_corpus_is_done_when_it_is_complete(evidence, tmp_path):
    job = evidence.planning.Job(evidence.planning.SCORE, str(tmp_path / "scores"), "scores", 0, 20)
    (tmp_path / "scores").mkdir()
    assert not evidence.work.done(job)
    (tmp_path / "scores" / "complete").touch()
    assert evidence.work.done(job)


def test_a_number_that_was_measured_is_put_in(evidence, tmp_path):
    (tmp_path / "e.json").write_text(json.dumps({"weight": 0.25, "entropy": 1.5}))
    assert evidence.work._value(evidence.planning.Number(str(tmp_path / "e.json"))) == 0.25
    assert evidence.work._value("salt") == "salt"


# The command


def test_options_that_make_no_sense_are_told_in_one_line(evidence, setting, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evidence.planning, "_sizes", lambda _, sizes=setting.sizes: sizes)  # the same all the time
    base = ["--data", "nothing/*", "--out", str(tmp_path / "out")]
    for more, words in (
        (["--tier", "tpu"], "--tier"), (["--steps=3"], "--steps: the plan sets it"), (["--only=row=x"], "no such run"),
        (["--collect"], "the run that cuts the buckets is not there yet"),
        (["--collect", "--only=row=salt"], "the run that cuts the buckets is not there yet"),
        (["--hours=-1"], "--hours=-1"), (["--hours=nan"], "--hours=nan"), (["--processes=0"], "--processes=0"),
        ([f"--tuning={tmp_path}"], "no train.jsonl in it"),
        ([], "no file matches nothing/*"), (["word"], "'word' is not understood"),
    ):  # fmt: skip
        assert evidence.run.main([*base, *more]) == 2
        told = capsys.readouterr().err
        assert told.startswith("evidence: error: ") and words in told and told.count("\n") == 1
    assert evidence.run.main([*base, "--dry_run", "--hours", "1"]) == 0
    out = capsys.readouterr().out
    assert "dropped, " in out and "grid-baseline" in out and not list((tmp_path / "out").glob("ratio-*"))


# All of it


def stdlib(folder):
    """Sources of the standard library, as JSON lines in the Pile's form."""
    lines = []
    for domain in ("email", "asyncio", "json"):
        for path in sorted((Path(sysconfig.get_paths()["stdlib"]) / domain).glob("*.py")):
            for i, text in enumerate(path.read_text(encoding="utf-8").split("\n\n\n")):
                meta = {"pile_set_name": domain, "source": f"{path.name}/{i}"}
                lines.append(json.dumps({"text": text, "meta": meta}))
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder / "corpus.jsonl")


def test_from_a_corpus_to_the_page_killed_on_the_way(evidence, tmp_path, monkeypatch, capsys):
    """Two rows and two seeds of a model of a few thousand parameters, confirmed on one fresh seed."""
    m, shape = evidence.matrix, {"model.size": "laptop-small", "model.num_layers": 1, "model.num_kv_heads": 1}
    student = shape | {"model.d_model": 32, "model.d_ff": 64, "model.num_heads": 2, "model.head_dim": 16}
    small = shape | {"model.d_model": 16, "model.d_ff": 32, "model.num_heads": 1, "model.head_dim": 16}
    shared = {"batch_rows": 32, "data.seq_len": 64, "data.vocab_size": 384, "optimizer.warmup_steps": 1}
    tier = dataclasses.replace(
        evidence.tiers.CPU, student=student, helpers={"small": small}, shared=shared, ratios=(1,), own_best={}
    )
    rows = [dataclasses.replace(row, ends=(0.6, 1.0)) for row in m._main(2, 1)[:2]]
    fresh = {"seeds": 1, "first_seed": m.FRESH_SEEDS, "test": True, "group": m.CONFIRM, "ends": (1.0,)}
    cutter = m.Row("cutter", "cuts the buckets", m.BUCKETS, "baseline", seeds=1, first_seed=250, ends=(1.0,))
    rows = [cutter, *rows, *(dataclasses.replace(row, **fresh) for row in rows)]
    monkeypatch.setattr(m, "rows", lambda *_: rows)
    monkeypatch.setitem(evidence.run.TIERS, "cpu", tier)
    split = functools.partial(evidence.corpus.Split, held_out=0.1, train_share=0.9, unseen="json")
    monkeypatch.setattr(evidence.corpus, "Split", split)
    command = ["--data", stdlib(tmp_path), "--out", str(tmp_path / "out"), "--unseen=json", "--data.cores=1",
               f"--data.cache_dir={tmp_path / 'cache'}"]  # fmt: skip
    setting = evidence.planning.Setting(str(tmp_path / "out"), tier)
    jobs = evidence.planning.plan(setting, rows)
    assert evidence.planning.steps_of(setting, 1) < 15

    batches, trained, batch_at, train = [], [], Prefetcher.batch_at, evidence.work.train

    def killed(self, n):
        batches.append(n)
        if len(batches) == 50:
            raise KeyboardInterrupt
        return batch_at(self, n)

    def noted(config, path, **more):
        trained.append(path)
        return train(config, path, **more)

    monkeypatch.setattr(evidence.work, "train", noted)
    with monkeypatch.context() as patch:
        patch.setattr(Prefetcher, "batch_at", killed)
        assert evidence.run.main(command) == 130
    assert "the same command goes on" in capsys.readouterr().err
    begun = len(trained)
    assert 1 < begun < len(jobs)
    assert evidence.run.main([*command, "--dry_run"]) == 0
    assert f"{len(jobs) - begun + 1} jobs, about" in capsys.readouterr().out
    assert evidence.run.main(command) == 0
    assert len(trained) == len(jobs) + 1 and trained[begun] == trained[begun - 1]  # the one that was killed goes on
    assert sorted(set(trained)) == sorted(job.path for job in jobs) and all(map(evidence.work.done, jobs))

    capsys.readouterr()
    assert evidence.run.main([*command, "--collect", "--only=row=salt"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "README.md")
    page = (tmp_path / "out" / "README.md").read_text()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for part, seeds in (("validation", [0, 1]), ("test", [100])):
        assert [(row["title"], row["seeds"]) for row in results[part]["rows"]] == [("BASELINE", seeds), ("SALT", seeds)]
        assert not results[part]["missing"]
    assert len(re.findall(r"^\| BASELINE \|", page, re.M)) >= 2 and len(re.findall(r"^\| SALT \|", page, re.M)) >= 2
    for name in results["pictures"]:
        assert f"({name})" in page and (tmp_path / "out" / name).is_file()
    salt = next(row for row in results["validation"]["rows"] if row["key"] == "salt")["ends"]
    base = next(row for row in results["validation"]["rows"] if row["key"] == "baseline")["ends"]
    assert [end["steps"] for end in salt] == [round(0.6 * salt[-1]["steps"]), salt[-1]["steps"]]
    assert base[-1]["steps"] == 2 * salt[-1]["steps"] and base[0]["steps"] == salt[0]["steps"]
    assert base[0]["flops"] < salt[0]["flops"] and base[0]["helper_flops"] == 0 < salt[0]["helper_flops"]
    assert all(1 < end["measures"]["bits_per_byte"]["mean"] < 9 for end in base)
    assert base[-1]["measures"]["bits_per_byte"]["mean"] < base[0]["measures"]["bits_per_byte"]["mean"]
    documents = {part: held["documents"] for part, held in results["setting"]["held"].items()}
    counts = results["setting"]["corpus"]["parts"]
    for part in documents:
        assert documents[part] == sum(counts[part][domain]["documents"] for domain in ("email", "asyncio", "json"))
