"""Sizes of pictures that no source tells: Pillow's, from headers only, read once, and only where they are asked for."""

import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from support.pictures import encoded, picture
from support.tars import write_tar

from sdxl_core.catalog import sizes
from sdxl_core.catalog.build import build_catalog
from sdxl_core.catalog.config import CatalogConfig, CatalogSource
from sdxl_core.catalog.records import Catalog
from sdxl_core.catalog.sizes import read_sizes
from sdxl_core.cli import main
from sdxl_core.config import StatisticsConfig, SubsetConfig
from sdxl_core.errors import ConfigError
from sdxl_core.query.grammar import parse
from sdxl_core.query.index import open_index
from sdxl_core.query.select import select_by_scan
from sdxl_core.refs import CatalogRef
from sdxl_core.statistics.stage import statistics
from sdxl_core.subset.stage import select, subset, with_sizes
from sdxl_core.summary import describe

ENDINGS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "png", "BMP": "bmp", "AVIF": "avif"}
LYING_DOWN = 6  # EXIF: to be turned by 90 degrees
_opened: list[str] | None = None


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], str | Path):
        _opened.append(str(arguments[0]))


sys.addaudithook(_hear)


@contextmanager
def opened_pictures() -> Iterator[list[str]]:
    """Names of the pictures and tars that this process opens meanwhile."""
    global _opened
    found: list[str] = []
    _opened = []
    try:
        yield found
    finally:
        found += [Path(name).name for name in _opened if name.endswith((*ENDINGS.values(), ".tar"))]
        _opened = None


def made(width_px: int, height_px: int, kind: str = "PNG", orientation: int | None = None, **options: Any) -> bytes:
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
        options["exif"] = exif
    return encoded(picture(width_px, height_px), kind, **options)


def lay_out(where: Path, files: dict[str, bytes], form: str) -> Path:
    """The files in a folder, or in a tar in a folder. Returns: the source."""
    if form in ("tar", "one tar"):
        write_tar(where / "0000.tar", files)
        return where / "0000.tar" if form == "one tar" else where
    for name, data in files.items():
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        (where / name).write_bytes(data)
    return where


def build(out: Path, *sources: Path | CatalogSource, **options: Any) -> CatalogRef:
    listed = tuple(s if isinstance(s, CatalogSource) else CatalogSource(path=s) for s in sources)
    return build_catalog(CatalogConfig(sources=listed, out=out, processes=1, **options))


def known(catalog: Catalog) -> dict[str, tuple[int | None, int | None]]:
    rows = [row for chunk in catalog.chunks(["key", "width", "height"]) for row in chunk.table.to_pylist()]
    return {row["key"]: (row["width"], row["height"]) for row in rows}


def found(catalog: Path, text: str) -> list[str]:
    """Keys that a query picks, and picks by a scan."""
    query = parse(text)
    opened = with_sizes(Catalog.open(catalog), query)
    records = select(opened, query).records
    assert records.tolist() == select_by_scan(opened, query).records.tolist()
    return sorted(opened.take(records, ["key"])["key"].to_pylist())


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, bytes]:
    """0 to 7, 40 + 10 n wide and 60 high; even ones have the tag even."""
    files = {f"{n}.png": made(40 + 10 * n, 60) for n in range(8)}
    return files | {f"{n}.txt": b"1girl, even" if n % 2 == 0 else b"1girl" for n in range(8)}


@pytest.mark.parametrize("form", ["folder", "tar", "one tar"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_size_is_that_of_the_upright_picture(tmp_path: Path, form: str, kind: str) -> None:
    ending = ENDINGS[kind]
    files = {
        f"plain.{ending}": made(96, 64, kind),
        f"standing.{ending}": made(96, 64, kind, orientation=1),
        f"lying.{ending}": made(96, 64, kind, orientation=LYING_DOWN),
        f"cut.{ending}": made(96, 64, kind)[:18],
        f"empty.{ending}": b"",
        f"endless.{ending}": b"BM" + struct.pack("<IIIIIIHHIIIIII", 99, 0, 54, 40, 2**32 - 1, 5, 1, 24, *[0] * 6),
    }
    ref = build(tmp_path / "c", lay_out(tmp_path / "in", files, form), sizes="read")
    assert known(Catalog.open(ref.path)) == {
        "plain": (96, 64),
        "standing": (96, 64),
        "lying": (64, 96),
        "cut": (None, None),
        "empty": (None, None),
        "endless": (None, None),
    }
    assert (ref.num_sized, ref.num_records, ref.num_rejected) == (3, 6, 0), "an unreadable header is not rejected here"
    assert "; sizes of 3 of 6 known ->" in describe(ref)
    assert found(ref.path, "height:>=96") == ["lying"] and found(ref.path, "ratio:3:2") == ["plain", "standing"]


sides = st.integers(1, 90)


@settings(max_examples=12, deadline=None)
@given(
    drawn=st.lists(
        st.tuples(
            sides, sides, st.sampled_from(sorted(ENDINGS)), st.none() | st.integers(0, 9), st.integers(0, 60_000)
        ),
        min_size=1,
        max_size=12,
    ),
    form=st.sampled_from(["folder", "tar"]),
)
def test_sizes_are_pillows(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[int, int, str, int | None, int]], form: str
) -> None:
    """Whatever stands before the size in the file, and however long it is."""
    tmp_path, files, expected = tmp_path_factory.mktemp("pillow"), dict[str, bytes](), dict[str, tuple[int, int]]()
    for number, (width, height, kind, orientation, num_bytes) in enumerate(drawn):
        profile = {"icc_profile": os.urandom(num_bytes)} if kind in ("JPEG", "PNG", "WEBP") else {}
        turned = orientation if kind in ("JPEG", "PNG", "WEBP", "AVIF") else None
        path = tmp_path / f"whole.{ENDINGS[kind]}"
        path.write_bytes(made(width, height, kind, turned, **profile))
        files[f"{number}.{ENDINGS[kind]}"] = path.read_bytes()
        with Image.open(path) as image:
            expected[str(number)] = ImageOps.exif_transpose(image).size
    ref = build(tmp_path / "c", lay_out(tmp_path / "in", files, form), index=False, sizes="read")
    assert known(Catalog.open(ref.path)) == expected


def test_only_the_beginning_of_a_picture_is_read(tmp_path: Path) -> None:
    noise = [Image.frombytes("RGB", (300, 200), os.urandom(180_000)) for _ in range(3)]
    kinds = ("PNG", "JPEG", "BMP", "GIF")
    files = {f"{kind}{n}.{ENDINGS[kind]}": encoded(image, kind) for kind in kinds for n, image in enumerate(noise)}
    files |= {f"webp{n}.webp": encoded(image, "WEBP", lossless=True) for n, image in enumerate(noise)}
    ref = build(tmp_path / "c", lay_out(tmp_path / "in", files, "tar"))

    def num_read() -> int:
        with open("/proc/self/io") as file:
            return int(file.readline().split()[1])

    catalog = Catalog.open(ref.path)
    read_sizes(catalog.__class__.open(ref.path), [0])  # imports
    before = num_read()
    catalog = read_sizes(catalog)
    assert set(known(catalog).values()) == {(300, 200)}
    assert num_read() - before < 15 * 5_000 + 20_000 < (tmp_path / "in" / "0000.tar").stat().st_size / 15


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_nothing_is_opened_before_a_size_is_asked_for(tmp_path: Path, pictures: dict[str, bytes], form: str) -> None:
    source = lay_out(tmp_path / "in", pictures, form)
    with opened_pictures() as opened:
        build(tmp_path / "c", source)
        build(tmp_path / "skips", source, sizes="skip")
    assert opened == (["0000.tar"] * len(opened) if form == "tar" else [])  # a tar is opened to find what is in it
    with opened_pictures() as opened:
        assert found(tmp_path / "c", "even filesize:>0") == ["0", "2", "4", "6"]
        assert found(tmp_path / "skips", "even width:>0") == []
        main(["subset", "--source", str(tmp_path / "c"), "--query", "even", "--explain"])
    assert opened == [] and not list(tmp_path.glob("*/parts/*.sizes.arrow"))


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_headers_are_read_once(tmp_path: Path, pictures: dict[str, bytes], form: str) -> None:
    source = lay_out(tmp_path / "in", pictures, form)
    build(tmp_path / "c", source)
    assert found(tmp_path / "c", "width:>=100") == ["6", "7"]
    shutil.rmtree(source)
    assert found(tmp_path / "c", "width:>=100") == ["6", "7"]
    assert found(tmp_path / "c", "width:<=50 or ( even -ratio:<1.5 )") == ["0", "1", "6"]


def test_only_pictures_that_the_rest_of_the_query_finds_are_opened(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    build(tmp_path / "c", lay_out(tmp_path / "in", pictures, "folder"))
    with opened_pictures() as opened:
        assert found(tmp_path / "c", "even width:>=80 -height:<60") == ["4", "6"]
    assert sorted(opened) == ["0.png", "2.png", "4.png", "6.png"]
    with opened_pictures() as opened:
        assert found(tmp_path / "c", "1girl -width:>=80 limit:9") == ["0", "1", "2", "3"]
    assert sorted(opened) == ["1.png", "3.png", "5.png", "7.png"]


def test_explain_counts_sizes_over_all_and_a_failing_query_says_what_was_not_read(
    tmp_path: Path, pictures: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    pictures |= {"8.png": b"no picture", "8.txt": b"even"}
    build(tmp_path / "c", lay_out(tmp_path / "in", pictures, "folder"))
    with pytest.raises(SystemExit):
        main(["subset", "--source", str(tmp_path / "c"), "--query", "evem width:>=80", "--out", str(tmp_path / "no")])
    said = capsys.readouterr().err
    assert "width:>=80 (9 unknown)   <- sizes are read only of pictures that the rest of the query finds" in said
    assert "cannot be answered" not in said
    for source in ("c", "in"):  # a catalog and a folder
        main(["subset", "--source", str(tmp_path / source), "--query", "even width:>=80", "--explain"])
        lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
        assert lines[1:] == ["2  even width:>=80", "5    even", "4    width:>=80 (1 unknown)", "2  picked"]


def test_a_catalog_that_skips_sizes_says_what_to_set(
    tmp_path: Path, pictures: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["subset", "--source", str(tmp_path / "c"), "--query", "width:>=80"]
    source = lay_out(tmp_path / "in", pictures, "folder")
    made = ["catalog", "--sources", str(source), "--out", str(tmp_path / "c"), "--sizes"]
    main([*made, "skip"])
    with opened_pictures() as opened:
        main([*asked, "--explain"])
        with pytest.raises(SystemExit):
            main([*asked, "--out", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert (
        opened == [] and said.err.count("make it with --sizes auto") == said.out.count("make it with --sizes auto") == 1
    )
    rows = next((tmp_path / "c" / "parts").glob("*.rows.arrow")).stat().st_mtime_ns
    main([*made, "auto"])
    assert next((tmp_path / "c" / "parts").glob("*.rows.arrow")).stat().st_mtime_ns == rows, "it is not read again"
    main([*asked, "--out", str(tmp_path / "out"), "--how", "manifest"])
    assert "kept 4 of 8 pictures, 4 did not match" in capsys.readouterr().out


@pytest.mark.parametrize("first", [True, False])
def test_what_a_source_tells_counts_and_sizes_that_were_read_hide_nothing(tmp_path: Path, first: bool) -> None:
    folder = lay_out(tmp_path / "in", {"1.png": made(50, 60), "2.png": made(70, 80)}, "folder")
    facts = tmp_path / "facts.jsonl"
    facts.write_text('{"key": "1", "width": 500, "height": 600, "rating": "g"}\n{"key": "2", "width": 9, "score": 3}\n')
    sources = (folder, facts) if first else (facts, folder)
    build(tmp_path / "c", *sources)
    with opened_pictures() as opened:
        assert found(tmp_path / "c", "width:>=1") == ["1", "2"]
    assert opened == ["2.png"]
    assert known(Catalog.open(tmp_path / "c")) == {"1": (500, 600), "2": (70, 80)}, "a pair comes from one place"
    assert found(tmp_path / "c", "rating:g or score:3") == ["1", "2"]
    ref = build(tmp_path / "c2", *(CatalogSource(path=s, use=("images", "tags")) for s in sources[: 1 if first else 2]))
    with opened_pictures() as opened:
        assert found(ref.path, "width:>=1") == []
    assert opened == [], "sizes are facts"


def test_an_index_knows_the_sizes_there_were_when_it_was_made(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    source = lay_out(tmp_path / "in", pictures, "folder")
    first = build(tmp_path / "c", source)
    assert found(tmp_path / "c", "even width:>=80") == ["4", "6"]

    def knows() -> bool:
        index = open_index(Catalog.open(tmp_path / "c"))
        assert index is not None
        return index.knows_sizes

    assert not knows()
    with opened_pictures() as opened:
        again = build(tmp_path / "c", source, sizes="read")
    assert sorted(opened) == ["1.png", "3.png", "5.png", "7.png"], "those that no query has asked for"
    assert knows() and again.digest == first.digest and again.num_sized == 8
    assert found(tmp_path / "c", "width:>=80") == ["4", "5", "6", "7"]
    with opened_pictures() as opened:
        build(tmp_path / "c", source, sizes="read")
    assert opened == []


def test_reading_goes_on_where_it_was_interrupted(
    tmp_path: Path, pictures: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "BLOCK", 3)
    build(tmp_path / "c", lay_out(tmp_path / "in", pictures, "folder"))

    def interrupt(stage: str, done: int, total: int, note: str = "") -> None:
        assert (stage, total) == ("sizes", 8)
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_sizes(Catalog.open(tmp_path / "c"), progress=interrupt)
    with opened_pictures() as opened:
        assert found(tmp_path / "c", "width:>=50") == [str(number) for number in range(1, 8)]
    assert sorted(opened) == ["6.png", "7.png"]


def test_a_picture_that_cannot_be_opened_is_tried_again(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    source = lay_out(tmp_path / "in", pictures, "folder")
    build(tmp_path / "c", source)
    (source / "7.png").rename(source / "away")
    assert found(tmp_path / "c", "width:>=100") == ["6"]
    (source / "away").rename(source / "7.png")
    assert found(tmp_path / "c", "width:>=100") == ["6", "7"]


def test_a_picture_that_was_replaced_is_read_again(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    source = lay_out(tmp_path / "in", pictures, "folder")
    build(tmp_path / "c", source, sizes="read")
    (source / "0.png").write_bytes(made(200, 200))
    build(tmp_path / "c", source, sizes="read")
    assert found(tmp_path / "c", "width:200") == ["0"]


def test_damaged_sizes_are_read_again(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    build(tmp_path / "c", lay_out(tmp_path / "in", pictures, "folder"), sizes="read", index=False)
    (file,) = (tmp_path / "c" / "parts").glob("*.sizes.arrow")
    file.write_bytes(file.read_bytes()[:100])
    assert found(tmp_path / "c", "width:>=100") == ["6", "7"]


def test_a_catalog_that_cannot_be_written_says_so(
    tmp_path: Path, pictures: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "c", lay_out(tmp_path / "in", pictures, "folder"))
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(
        ConfigError, match="sizes of 4 of its pictures are not known, and this folder cannot be written"
    ):
        found(tmp_path / "c", "even width:>=100")
    tables = statistics(StatisticsConfig(source=tmp_path / "c", out=tmp_path / "out")).tables.read_text()
    assert "| size unknown | 8 | 100.0% |" in tables


def test_statistics_read_the_sizes_of_the_pictures_they_count(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    build(tmp_path / "c", lay_out(tmp_path / "in", pictures, "tar"))
    config = StatisticsConfig(source=tmp_path / "c", query="even", out=tmp_path / "out")
    tables = statistics(config).tables.read_text()
    assert "| 100 x 60 | 1 | 25.0% |" in tables and "| size unknown | 0 | 0.0% |" in tables
    assert sum(width is not None for width, _ in known(Catalog.open(tmp_path / "c")).values()) == 4


def test_a_folders_subset_by_width_opens_its_pictures_once(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    """The catalog beside a subset of a folder serves the next run, and other queries."""
    source = lay_out(tmp_path / "in", pictures, "folder")

    def pick(query: str) -> int:
        return subset(SubsetConfig(source=source, query=query, how="manifest", out=tmp_path / "out")).num_kept

    assert pick("width:>=80") == 4
    with opened_pictures() as opened:
        assert pick("width:>=80") == 4
    assert opened == []


CHILD = """
import sys
from sdxl_core.catalog import sizes
from sdxl_core.cli import main

sizes.BLOCK = 2
main(sys.argv[1:])
"""


def test_the_number_of_processes_changes_nothing(tmp_path: Path) -> None:
    files = {f"{n // 8}/{n}.png": made(20 + n, 30 + n) for n in range(24)}
    for root in ("a", "b"):
        lay_out(tmp_path / root, files, "folder")
    write_tar(tmp_path / "tars" / "0.tar", files)
    sources = [f"{name}/={tmp_path / name}" for name in ("a", "b", "tars")]
    asked = {"one": ("auto", "1"), "read": ("read", "2"), "asked": ("auto", "2")}
    for name, (when, processes) in asked.items():
        told = ["catalog", "--sources", *sources, "--out", tmp_path / name, "--sizes", when, "--processes", processes]
        subprocess.run([sys.executable, "-c", CHILD, *map(str, told)], check=True, capture_output=True)
    told = ["subset", "--source", tmp_path / "asked", "--query", "width:>0", "--explain"]
    subprocess.run([sys.executable, "-c", CHILD, *map(str, told)], check=True, capture_output=True)
    expected = {f"{root}/{n // 8}/{n}": (20 + n, 30 + n) for root in ("a", "b", "tars") for n in range(24)}
    for name in ("read", "asked"):
        assert known(Catalog.open(tmp_path / name)) == expected
    assert known(read_sizes(Catalog.open(tmp_path / "one"))) == expected
