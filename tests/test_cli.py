"""The command line: one line for a mistake, status 2, and nothing written."""

import os
import re
import signal
import subprocess
import sys

import pytest

from slm_assist import cli

COMMANDS = re.findall(r"^    (\w+) ", cli._parser().format_help(), re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["select", "scores", "--out=a.npz", "--rows=x"], "--rows: 'x' is not a number; give a whole one"),
        (["select", "scores", "--out=a.npz", "--ratio=x"], "give one such as 0.2"),
        (["select", "scores"], "--out; see slm-assist select --help"),
        (["select", "scores", "--out=a.npz", "--ratio=0.2"], "scores: not a directory of scores"),
        (["select", "scores", "--out=a.npz", "--ratio=0.2", "--quota=even"], "--quota is not an option of select"),
        (["select", "scores", "--out=a.npz", "--ratio=0.2", "--quotas=evne"], "NAME=SHARE"),
        (["score", "--out=scores", "--part=2/2"], "--part=2/2: give I/N"),
        (["score", "--out=scores", "--select.score=learnability"], "cannot be computed beforehand"),
        (["score", "--out=scores", "--select.score=sal"], "did you mean salt"),
        (["score", "--out=scores"], "needs select.scorer"),
        (["prepare", "--part=x"], "--part=x: give I/N"),
        (["prepare", "--part=0/2", "--beam=2"], "give one of the two"),
        (["prepare", "--beam=-1"], "--beam=-1: use at least 1"),
        (["prepare", "--data.source=seqio:nothing"], "nothing"),
        (["report", "run", "--frm=x"], "--frm is not an option of report"),
        (["trian"], "trian"),
        (["--trian"], "'--trian' comes before a command"),
        (["export", "run", "--out=x", "--step=x"], "--step: 'x' is not a number"),
    ],
)
def test_mistakes_take_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("slm-assist: error: ") and message in said[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_examples_and_refuses_what_it_does_not_know(command, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([command, "--help"])
    assert left.value.code == 0
    examples = capsys.readouterr().out.partition("\nExamples:\n")[2]
    assert examples.count(f"slm-assist {command} ") >= 2
    assert cli.main([command, "--no_such_option"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_help_names_every_command(capsys):
    assert {"train", "prepare", "score", "select", "plan", "report", "import", "export"} <= set(COMMANDS)
    assert cli.main([]) == 0
    assert "Exit status: 0 done; 2 a mistake" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("interrupt", "status"), [(KeyboardInterrupt(), 130), (KeyboardInterrupt(int(signal.SIGTERM)), 143)]
)
def test_a_signal_is_in_the_status(interrupt, status, monkeypatch, capsys):
    def stopped(*_):
        raise interrupt

    monkeypatch.setattr(cli, "_prepare", stopped)
    assert cli.main(["prepare"]) == status
    assert "stopped" in capsys.readouterr().err


def test_a_reader_that_leaves_ends_it_quietly():
    read, write = os.pipe()
    os.close(read)
    try:
        words = [sys.executable, "-m", "slm_assist.cli", "--help"]
        done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, timeout=60)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")
