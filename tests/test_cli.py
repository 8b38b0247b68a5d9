"""The command line: one line for a mistake, status 2, and nothing written."""

import pytest

from slm_assist import cli


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
    ],
)
def test_mistakes_take_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("slm-assist: error: ") and message in said[0]
    assert not list(tmp_path.iterdir())
