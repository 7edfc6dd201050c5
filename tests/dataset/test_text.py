"""What a text of tags says."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_core.dataset.text import (
    MAX_TEXT_BYTES,
    UnreadableText,
    normalise_tag,
    parse_tags,
    read_plain_texts,
    read_text,
)


def test_tags_are_divided_by_commas_and_line_breaks() -> None:
    assert parse_tags("1girl, long hair,,\n blue eyes ,") == ["1girl", "long hair", "blue eyes"]


@pytest.mark.parametrize("spelling", ["Long Hair", "long_hair", " long  hair ", "LONG_hair"])
def test_spellings_of_one_tag_are_the_same(spelling: str) -> None:
    assert normalise_tag(spelling) == "long_hair"


PIECES = st.sampled_from(
    [b"1girl", b", ", b" ", b"\n", b"\r\n", b"\r", b"\xef\xbb\xbf", b"\x1c", "é日😀\ufffd".encode(), b"\x7f"]
)
contents = st.lists(PIECES, max_size=6).map(b"".join)


def one_by_one(paths: list[str]) -> tuple[list[str | None], list[int]]:
    texts: list[str | None] = []
    states: list[int] = []
    for path in paths:
        try:
            texts.append(read_text(path, states))
        except FileNotFoundError:
            texts.append(None)
            states += (-1, -1)
    return texts, states


@settings(max_examples=150, deadline=None)
@given(files=st.lists(st.none() | contents, max_size=9), ahead=st.booleans())
def test_many_texts_at_once_are_read_as_one_by_one(
    tmp_path_factory: pytest.TempPathFactory, files: list[bytes | None], ahead: bool
) -> None:
    folder = tmp_path_factory.mktemp("texts")
    paths = [str(folder / f"{number}.txt") for number in range(len(files))]
    for path, content in zip(paths, files, strict=True):
        if content is not None:
            Path(path).write_bytes(content)
    before = os.listdir("/proc/self/fd")
    held = os.open(folder, os.O_RDONLY)  # the numbers of what is opened have a hole
    other = os.open(folder, os.O_RDONLY)
    os.close(held)
    assert read_plain_texts(paths, ahead=ahead) == one_by_one(paths)
    assert os.fstat(other)
    os.close(other)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("bad", [b"caf\xe9", b"\0", b"a" * (MAX_TEXT_BYTES + 1), "folder"])
def test_texts_that_are_not_plain_are_left_to_be_read_one_by_one(tmp_path: Path, bad: bytes | str) -> None:
    paths = [str(tmp_path / name) for name in ("good.txt", "bad.txt")]
    Path(paths[0]).write_bytes(b"fine")
    if isinstance(bad, bytes):
        Path(paths[1]).write_bytes(bad)
    else:
        Path(paths[1]).mkdir()
    before = os.listdir("/proc/self/fd")
    assert read_plain_texts(paths, ahead=False) is None
    assert os.listdir("/proc/self/fd") == before
    with pytest.raises((UnreadableText, IsADirectoryError)):
        read_text(paths[1])
