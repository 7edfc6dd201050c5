"""`subset --explain`: the count of every term is told, and nothing is done."""

from pathlib import Path

import pytest

from sdxl_core.cli import main


def test_every_term_is_counted_and_nothing_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    for number in range(6):
        (tmp_path / "in" / f"{number}.png").touch()
        (tmp_path / "in" / f"{number}.txt").write_text("1girl, cat_ears" if number < 4 else "fox_ears, comic")
    main(["catalog", "--sources", str(tmp_path / "in"), "--out", str(tmp_path / "catalog")])
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    asked = ["--query", "*_ears -comic ( 1girl or 1gril )", "--out", str(tmp_path / "out"), "--explain"]
    main(["subset", "--source", str(tmp_path / "catalog"), *asked])
    told = capsys.readouterr().out
    lines = {words[1]: words[0] for line in told.splitlines() if len(words := line.split()) > 1}
    assert (lines["*_ears"], lines["comic"], lines["1girl"], lines["1gril"]) == ("6", "2", "4", "0"), told
    assert "did you mean 1girl (4)?" in told and "4  *_ears -comic ( 1girl or 1gril )" in told
    assert sorted(tmp_path.rglob("*")) == before
