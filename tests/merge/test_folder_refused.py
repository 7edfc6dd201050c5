"""What of a folder cannot be merged: each picture is in the rejected list, nothing is overwritten, nothing vanishes."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from support.tag_folders import make, merge

from sdxl_core.dataset import text as text_module
from sdxl_core.errors import ConfigError, DataError
from sdxl_core.rejected import read_rejected


def test_whatever_cannot_be_used_is_in_the_rejected_list(tmp_path: Path) -> None:
    folder = make(
        tmp_path / "in", {"ok.png": "1girl", "none.png": None, "latin.png": "x", "nul.png": "x", "big.png": "x"}
    )
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "nul.txt").write_bytes(b"1girl\0\0")
    (folder / "big.txt").write_bytes(b"a" * (text_module.MAX_TEXT_BYTES + 1))
    (folder / "ok.jpg").write_bytes(b"the same stem")
    (folder / os.fsdecode(b"\xff.png")).write_bytes(b"x")
    ref = merge(folder, tmp_path / "run" / "out.json")
    rows = {row.key: row.reason for row in read_rejected(ref.rejected)}
    assert rows == {
        "none": "no_caption",
        "latin": "unreadable_text",
        "nul": "unreadable_text",
        "big": "text_too_long",
        "ok.png": "duplicate_key",
        "\\udcff.png": "bad_file_name",
    }
    assert ref.num_kept + ref.num_rejected == ref.num_seen == 7
    assert json.loads((tmp_path / "run" / "out.json").read_text()) == {"ok": {"tags": "1girl"}}


def test_empty_texts_are_kept_or_rejected_as_asked(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", {"a.png": "", "b.png": "1girl"})
    assert merge(folder, tmp_path / "keep.json").num_empty == 1
    ref = merge(folder, tmp_path / "reject.json", empty_tags="reject")
    assert (ref.num_kept, ref.num_rejected) == (1, 1)


def test_only_regular_files_are_opened_as_texts(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", {"a.png": "one", "pipe.png": None, "folder.png": None, "gone.png": None})
    os.mkfifo(folder / "pipe.txt")  # opening it would wait for ever
    (folder / "folder.txt").mkdir()
    (folder / "gone.txt").symlink_to("nowhere")
    ref = merge(folder, tmp_path / "out.json")
    assert {row.key: row.reason for row in read_rejected(ref.rejected)} == dict.fromkeys(
        ["pipe", "folder", "gone"], "no_caption"
    )


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", {"a/1.png": "1girl"})
    (folder / "a" / "back").symlink_to(folder)
    assert merge(folder, tmp_path / "out.json").num_kept == 1


@pytest.mark.parametrize(
    ("make_source", "error", "words"),
    [
        (lambda folder: None, ConfigError, "does not exist"),
        (lambda folder: folder.write_bytes(b""), ConfigError, "is a file"),
        (lambda folder: folder.mkdir(), DataError, "no pictures"),
        (lambda folder: make(folder, {"a.png": None}), DataError, "1 no_caption"),
    ],
)
def test_a_source_without_use_is_told(tmp_path: Path, make_source: Any, error: type, words: str) -> None:
    make_source(tmp_path / "in")
    with pytest.raises(error, match=words):
        merge(tmp_path / "in", tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_an_out_that_cannot_be_is_told(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", {"a.png": "one"})
    with pytest.raises(ConfigError, match="this is a folder"):
        merge(folder, folder)
    with pytest.raises(ConfigError, match=r"a\.txt is a file, not a folder"):
        merge(folder, folder / "a.txt" / "deeper" / "out.json")


@pytest.mark.parametrize("name", ["a.png", "a.txt", "notes.json"])
def test_a_file_that_is_no_metadata_is_never_overwritten(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "in", {"a.png": "1girl"})
    (folder / "notes.json").write_text("[1]")
    before = (folder / name).read_bytes()
    with pytest.raises(ConfigError, match="not overwritten"):
        merge(folder, folder / name)
    assert (folder / name).read_bytes() == before
