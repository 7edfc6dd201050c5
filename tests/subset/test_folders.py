"""Subsets: exact tags, copies that are never torn and never overwrite, a query that matches nothing is explained."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdxl_core.config import SubsetConfig
from sdxl_core.errors import ConfigError, DataError, DiskFullError
from sdxl_core.refs import SubsetRef
from sdxl_core.rejected import read_rejected
from sdxl_core.subset.stage import subset

TAGS = {
    "1": "astolfo (fate), pink hair",
    "2": "astolfo_\\(fate\\), comic",
    "3": "astolfo (fate) (cosplay), pink_hair",
    "deep/4": "Astolfo (Fate),solo\npink hair",
    "5": "fate",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for name, tags in TAGS.items():
        path = tmp_path / "in" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"picture " + name.encode())
        path.with_suffix(".txt").write_text(tags)
    (tmp_path / "in" / "1.caption").write_text("A knight.")
    (tmp_path / "in" / "6.png").write_bytes(b"no text")
    return tmp_path / "in"


def pick(source: Path, query: str, **options: Any) -> SubsetRef:
    return subset(SubsetConfig(source=source, query=query, out=source.parent / "out", **options))


def pictures(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.png"))


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("astolfo_(fate)", ["1", "2", "deep/4"]),
        ("astolfo_(fate) pink_hair", ["1", "deep/4"]),
        ('"pink hair" -astolfo_(fate)', ["3"]),
        ("astolfo_(fate) -comic -solo", ["1"]),
        ("fate", ["5"]),
        ("", ["1", "2", "3", "5", "6", "deep/4"]),
    ],
)
def test_a_query_picks_exact_tags(source: Path, query: str, expected: list[str]) -> None:
    ref = pick(source, query)
    assert pictures(source.parent / "out") == expected
    assert ref.num_kept + ref.num_unmatched + ref.num_rejected == ref.num_seen == 6
    assert [row.reason for row in read_rejected(ref.rejected)] == (["no_caption"] if query else [])


def test_texts_and_captions_come_along_unchanged(source: Path) -> None:
    pick(source, "astolfo_(fate)")
    for name in ("1.png", "1.txt", "1.caption", "deep/4.txt"):
        copy = source.parent / "out" / name
        assert copy.read_bytes() == (source / name).read_bytes()
        assert copy.stat().st_mtime_ns == (source / name).stat().st_mtime_ns


def test_a_second_run_copies_nothing_and_a_missing_copy_comes_back(source: Path) -> None:
    first = pick(source, "fate")
    (source.parent / "out" / "5.txt").unlink()
    assert pick(source, "fate") == first
    assert (source.parent / "out" / "5.txt").exists()

    before = {path: path.stat().st_ino for path in (source.parent / "out").rglob("*")}
    assert pick(source, "fate") == first
    assert {path: path.stat().st_ino for path in (source.parent / "out").rglob("*")} == before


def test_a_different_file_is_never_overwritten(source: Path) -> None:
    (source.parent / "out").mkdir()
    (source.parent / "out" / "5.png").write_bytes(b"precious")
    with pytest.raises(DataError, match=r"5\.png exists with another content"):
        pick(source, "fate")
    assert (source.parent / "out" / "5.png").read_bytes() == b"precious"


def test_the_folder_of_another_query_is_refused(source: Path) -> None:
    pick(source, "fate")
    with pytest.raises(ConfigError, match="query = 'fate'; now it is 'comic'"):
        pick(source, "comic")


def test_a_query_that_matches_nothing_counts_its_terms_and_suggests(source: Path) -> None:
    with pytest.raises(DataError) as caught:
        pick(source, "pink_hiar comic")
    text = str(caught.value)
    assert "none of the 6 pictures" in text and "(1 no_caption)" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["1", "comic"] in lines
    assert [
        "0",
        "pink_hiar",
        "<-",
        "no",
        "picture",
        "has",
        "pink_hiar;",
        "did",
        "you",
        "mean",
        "pink_hair",
        "(3)?",
    ] in lines


def test_a_text_without_a_picture_is_counted_and_listed(source: Path) -> None:
    (source / "deep" / "lost.txt").write_text("fate")
    ref = pick(source, "fate")
    assert ("deep/lost.txt", "no_image") in [(row.key, row.reason) for row in read_rejected(ref.rejected)]
    assert ref.num_kept + ref.num_unmatched + ref.num_rejected == ref.num_seen == 7


def test_a_subset_inside_its_source_is_refused(source: Path) -> None:
    with pytest.raises(ConfigError, match="lies inside"):
        subset(SubsetConfig(source=source, query="fate", out=source / "sub"))


def test_a_source_inside_its_subset_is_refused(source: Path) -> None:
    with pytest.raises(ConfigError, match="lies inside out"):
        subset(SubsetConfig(source=source, query="fate", out=source.parent))


def test_a_source_without_any_text_says_so(source: Path) -> None:
    for path in source.rglob("*.txt"):
        path.unlink()
    with pytest.raises(DataError, match=r"6 of them cannot be judged \(6 no_caption\)"):
        pick(source, "fate")


def test_a_caption_edited_in_the_source_is_copied_again(source: Path) -> None:
    first = pick(source, "fate")
    (source / "5.txt").write_text("fate, better words")
    second = pick(source, "fate")
    assert (source.parent / "out" / "5.txt").read_text() == "fate, better words"
    assert second.digest != first.digest and second.num_kept == first.num_kept == 1


def test_a_copy_edited_by_hand_is_kept_and_told(source: Path) -> None:
    pick(source, "fate")
    (source.parent / "out" / "5.txt").write_text("my own words")
    with pytest.raises(DataError, match=r"5\.txt exists with another content"):
        pick(source, "fate")
    assert (source.parent / "out" / "5.txt").read_text() == "my own words"


def test_a_picture_that_no_longer_matches_leaves_the_subset_and_other_files_stay(source: Path) -> None:
    out = source.parent / "out"
    pick(source, "astolfo_(fate)")
    (out / "notes.txt").write_text("mine")
    (source / "1.txt").write_text("someone else")
    ref = pick(source, "astolfo_(fate)")
    assert pictures(out) == ["2", "deep/4"] and ref.num_kept == 2
    assert not (out / "1.txt").exists() and not (out / "1.caption").exists() and (out / "notes.txt").exists()


def test_a_stale_copy_that_was_edited_is_told_instead_of_removed(source: Path) -> None:
    pick(source, "astolfo_(fate)")
    (source / "1.txt").write_text("someone else")
    (source.parent / "out" / "1.caption").write_text("my own words")
    with pytest.raises(DataError, match=r"1\.caption belongs to a picture that the query no longer picks"):
        pick(source, "astolfo_(fate)")


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("nowhere")])
def test_a_folder_or_a_dead_link_in_the_way_is_told(source: Path, make: Callable[[Path], None]) -> None:
    (source.parent / "out").mkdir()
    make(source.parent / "out" / "5.png")
    with pytest.raises(DataError, match=r"5\.png exists"):
        pick(source, "fate")


def test_a_copy_torn_by_a_power_cut_is_made_again(source: Path) -> None:
    first = pick(source, "fate")
    torn, time_ns = source.parent / "out" / "5.png", (source / "5.png").stat().st_mtime_ns
    torn.write_bytes(b"")
    os.utime(torn, ns=(time_ns, time_ns))
    assert pick(source, "fate") == first
    assert torn.read_bytes() == (source / "5.png").read_bytes()


def test_the_same_file_copied_by_hand_is_taken_as_it_is(source: Path) -> None:
    (source.parent / "out").mkdir()
    (source.parent / "out" / "5.png").write_bytes((source / "5.png").read_bytes())
    assert pick(source, "fate").num_kept == 1


def test_names_as_long_as_the_file_system_allows_are_copied(source: Path) -> None:
    name = "é" * 120
    (source / f"{name}.png").write_bytes(b"p")
    (source / f"{name}.txt").write_text("longname")
    assert pick(source, "longname").num_kept == 1
    assert (source.parent / "out" / f"{name}.png").read_bytes() == b"p"


def test_a_picture_that_cannot_be_read_is_rejected_with_all_its_files(source: Path) -> None:
    (source / "5.png").unlink()
    (source / "5.png").symlink_to("/proc/self/mem")  # a regular file whose first byte cannot be read
    ref = pick(source, "")
    assert {row.key: row.reason for row in read_rejected(ref.rejected)} == {"5": "unreadable_file"}
    assert ref.num_kept + ref.num_unmatched + ref.num_rejected == ref.num_seen == 6
    assert not (source.parent / "out" / "5.txt").exists()


def test_a_subset_killed_anywhere_is_finished_by_the_next(tmp_path: Path) -> None:
    rng = random.Random(3)
    for number in range(600):
        path = tmp_path / "in" / f"{number % 7}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.randbytes(20_000))
        path.with_suffix(".txt").write_text("1girl")
    config = SubsetConfig(source=tmp_path / "in", query="1girl", out=tmp_path / "out")
    code = (
        "import sys; from sdxl_core.config import SubsetConfig; from sdxl_core.subset.stage import subset\n"
        "print('go', flush=True); subset(SubsetConfig.model_validate_json(sys.argv[1]))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    for _ in range(6):
        argv = [sys.executable, "-c", code, config.model_dump_json()]
        with subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"go\n"
            time.sleep(rng.uniform(0, 0.12))
            process.send_signal(signal.SIGKILL)
    assert subset(config).num_kept == 600
    source = {path.relative_to(tmp_path / "in"): path for path in (tmp_path / "in").rglob("*.*")}
    copies = {path.relative_to(tmp_path / "out"): path for path in (tmp_path / "out").rglob("*.*")}
    ours = {name for name in copies.keys() - source.keys() if name.parts[0] != ".subset"}
    assert ours == {Path(".subset.json"), Path("rejected.jsonl"), Path("missing.jsonl")}
    assert all(copies[name].read_bytes() == path.read_bytes() for name, path in source.items())


def test_a_full_disk_is_told_and_what_was_copied_stays(source: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs a small file system, which only root can mount")
    out = source.parent / "small"
    out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", out], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        for number in range(8):
            (source / f"big{number}.png").write_bytes(b"x" * 20_000)
            (source / f"big{number}.txt").write_text("big")
        with pytest.raises(DiskFullError, match="continues where it stopped"):
            subset(SubsetConfig(source=source, query="big", out=out))
        assert 1 <= len(list(out.glob("*.png"))) < 8 and not list(out.glob(".*.partial"))
    finally:
        subprocess.run(["umount", out], check=True)
