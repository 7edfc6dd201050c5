"""Listing: sd-scripts' order, every name accounted for, links that end."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_core.dataset.listing import key_of, list_images, scan_images
from sdxl_core.errors import ConfigError, DataError


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return folder


def names(folder: Path, *, recursive: bool = True) -> list[str]:
    return [image.name for image in list_images(folder, recursive=recursive, stage="test").images]


@settings(deadline=None)
@given(st.text("ab.", min_size=1, max_size=5).filter(lambda stem: stem.strip(".") != ""), st.sampled_from("ab/"))
def test_a_key_is_the_stem_that_pathlib_sees(stem: str, folder: str) -> None:
    name = f"{folder}/{stem}.png".lstrip("/")
    assert key_of(name) == str(Path(name).with_suffix(""))


def test_the_order_is_by_path_parts_and_any_case_of_extension_counts(tmp_path: Path) -> None:
    expected = ["A.PNG", "a.Jpg", "b/c.webp", "b-c/a.bmp", "b-c.jpeg", "d.avif"]
    touch(tmp_path, *expected, ".a.png.12-34.partial", "notes.txt", "b/x.gif")
    assert names(tmp_path) == [str(path) for path in sorted(Path(name) for name in expected)]
    assert [image.name for image in scan_images(tmp_path)] == names(tmp_path)
    assert names(tmp_path, recursive=False) == ["A.PNG", "a.Jpg", "b-c.jpeg", "d.avif"]


def test_every_name_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "a.jpg", "d/a.png", os.fsdecode(b"\xff.png"))
    (tmp_path / "gone.png").symlink_to("nowhere")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe.png")
    listing = list_images(tmp_path, recursive=True, stage="test")
    assert {row.key: row.reason for row in listing.rejected} == {
        "a.png": "duplicate_key",
        "gone.png": "not_a_file",
        "loop.png": "not_a_file",
        "pipe.png": "not_a_file",
        "\\udcff.png": "bad_file_name",
    }
    assert listing.num_seen == len(listing.images) + len(listing.rejected) == 7


def test_links_to_folders_are_followed_once_and_end(tmp_path: Path) -> None:
    touch(tmp_path / "in", "a/1.png", "z/2.png")
    touch(tmp_path / "other", "3.png")
    touch(tmp_path, "outside.png")
    (tmp_path / "in" / "a" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "up").symlink_to(tmp_path)  # would list everything beside the source
    (tmp_path / "in" / "b").symlink_to("z")  # already there under its own name
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "other")
    (tmp_path / "in" / "twice").symlink_to(tmp_path / "other")
    assert names(tmp_path / "in") == ["a/1.png", "linked/3.png", "z/2.png"]


def test_a_folder_named_like_a_picture_is_a_folder(tmp_path: Path) -> None:
    assert names(touch(tmp_path, "a.png/1.png")) == ["a.png/1.png"]


def test_a_folder_without_pictures_says_what_was_looked_for(tmp_path: Path) -> None:
    touch(tmp_path / "in", "sub/1.png")
    with pytest.raises(DataError, match=r"sub-folders were not looked into.*\.webp"):
        names(tmp_path / "in", recursive=False)
    with pytest.raises(ConfigError, match="not valid UTF-8"):
        names(tmp_path / os.fsdecode(b"\xff"))


def test_the_digest_follows_names_sizes_and_times(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    first = list_images(tmp_path, recursive=True, stage="test").ref()
    assert first == list_images(tmp_path, recursive=True, stage="test").ref() and first.num_images == 1
    os.utime(tmp_path / "a.png", ns=(1, 1))
    second = list_images(tmp_path, recursive=True, stage="test").ref()
    (tmp_path / "a.png").rename(tmp_path / "b.png")
    third = list_images(tmp_path, recursive=True, stage="test").ref()
    assert len({first.digest, second.digest, third.digest}) == 3
