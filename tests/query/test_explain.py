"""`subset --explain`: the count of every term is told, and nothing is done."""

import json
import shutil
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


@pytest.fixture
def catalog(tmp_path: Path) -> Path:
    """0 to 3 in a folder, of which a JSONL tells sizes and ratings of 0 and 1; 3 has no tags."""
    (tmp_path / "in").mkdir()
    for number in range(4):
        (tmp_path / "in" / f"{number}.png").touch()
        if number < 3:
            (tmp_path / "in" / f"{number}.txt").write_text(("boat, red", "fish", "boat, fish")[number])
    facts = [{"key": "0", "width": 500, "height": 400, "rating": "g"}, {"key": "1", "width": 90}]
    (tmp_path / "facts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in facts))
    main(
        [
            "catalog",
            "--sources",
            *(str(tmp_path / name) for name in ("in", "facts.jsonl")),
            "--out",
            str(tmp_path / "c"),
        ]
    )
    return tmp_path / "c"


def explained(catalog: Path, query: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    main(["subset", "--source", str(catalog), f"--query={query}", "--explain"])
    return [line.strip() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("with_index", [True, False])
def test_a_term_says_of_how_many_pictures_its_answer_is_unknown(
    catalog: Path, capsys: pytest.CaptureFixture[str], with_index: bool
) -> None:
    if not with_index:
        shutil.rmtree(catalog / "index")
    told = explained(catalog, "width:>=100 ( ratio:5:4 or -rating:g ) score:>0", capsys)
    assert told[2:] == [
        "1    width:>=100 (2 unknown)",
        "4    ( ratio:5:4 or -rating:g )",
        "1      ratio:5:4 (3 unknown)",
        "3      -rating:g",
        "1        rating:g (3 unknown)",
        "0    score:>0 (4 unknown)   <- no source tells it: facts come from parquet, JSON or JSONL, see "
        "docs/catalog_sources.md",
        "0  picked",
    ]


def test_a_subset_that_is_empty_as_nothing_is_known_says_so(catalog: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for query, unknown in (("height:<300", 3), ("boat score:1..9", 4)):
        with pytest.raises(SystemExit):
            main(["subset", "--source", str(catalog), "--query", query, "--out", str(catalog.parent / "out")])
        said = capsys.readouterr().err
        term = query.removeprefix("boat ")
        assert f"{term} cannot be answered for {unknown} of them: what is unknown matches nothing" in said


@pytest.mark.parametrize(
    ("query", "num_picked", "why"),
    [
        ("limit:2", 2, " (limit:2)"),
        ("random:3 limit:9", 3, " (limit:9, random:3)"),
        ("-boat", 1, " (1 of unknown tags left out)"),
        ("boat", 2, ""),
    ],
)
def test_the_last_line_is_what_the_subset_picks(
    catalog: Path, capsys: pytest.CaptureFixture[str], query: str, num_picked: int, why: str
) -> None:
    assert explained(catalog, query, capsys)[-1] == f"{num_picked}  picked{why}"
    main(
        ["subset", "--source", str(catalog), f"--query={query}", "--how", "manifest", "--out", f"{catalog.parent}/out"]
    )
    assert f"kept {num_picked} of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("query", "terms"),
    [
        ("~boat ~fish", ["~boat ~fish", "boat", "fish"]),
        ("~boat red ~fish", ["~boat red ~fish", "red", "~boat ~fish", "boat", "fish"]),
        ("~( boat red ) ~fish", ["~( boat red ) ~fish", "( boat red )", "boat", "red", "fish"]),
        ("red ~boat", ["red ~boat", "red", "~boat"]),
        ("~boat or ~fish", ["~boat or ~fish", "~boat", "~fish"]),
    ],
)
def test_terms_are_shown_as_they_were_written(
    catalog: Path, capsys: pytest.CaptureFixture[str], query: str, terms: list[str]
) -> None:
    assert [line.split(maxsplit=1)[1] for line in explained(catalog, query, capsys)[1:-1]] == terms
