"""Metadata JSON and JSONL: every entry is read once, wherever the file is cut into pieces."""

import json
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sdxl_core.catalog import jsonsplit
from sdxl_core.catalog.build import build_catalog
from sdxl_core.catalog.config import CatalogConfig, CatalogSource
from sdxl_core.catalog.records import Catalog
from sdxl_core.catalog.sources import json as json_source
from sdxl_core.catalog.sources import jsonl as jsonl_source
from sdxl_core.catalog.sources.keys import BadKey, picture_key
from sdxl_core.dataset.text import parse_tags
from sdxl_core.errors import DataError
from sdxl_core.rejected import read_rejected

COLUMNS = ["key", "id", "width", "height", "rating", "score", "fav_count", "tags", "raw_tags", "caption"]


def told(source: CatalogSource, out: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The catalog's records by key, and the reasons of what was rejected."""
    ref = build_catalog(CatalogConfig(sources=(source,), out=out))
    catalog = Catalog.open(out)
    names = catalog.vocabulary["tag"].to_pylist()
    rows = [row for chunk in catalog.chunks(COLUMNS) for row in chunk.table.to_pylist()]
    for row in rows:
        row["tags"] = None if row["tags"] is None else [names[tag] for tag in row["tags"]]
    rejected = read_rejected(ref.rejected)
    assert ref.num_seen == len(rows) + ref.num_filtered + ref.num_rejected
    return {row.pop("key"): row for row in rows}, {row.key: row.reason for row in rejected}


def usable(text: str | None) -> bool:
    return text is None or "\0" not in text


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ['a, "b", \\(c\\)', "{", '"}', '\n  "x": {', "日本, é", "a\r\nb", "}, {", "\0", ","]
)
metadata = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/\\:."), min_size=1, max_size=6),
    st.fixed_dictionaries({}, optional={"tags": words, "caption": words, "train_resolution": st.just([832, 1216])}),
    min_size=1,
    max_size=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    metadata=metadata,
    indent=st.sampled_from([2, 2, 4, "\t", None]),
    ascii_only=st.booleans(),
    line=st.sampled_from(["\n", "\r\n"]),
    mark=st.sampled_from(["", "\ufeff"]),
    piece_bytes=st.integers(1, 60),
    block_bytes=st.integers(8, 40),
)
@example({"a": {"tags": 'x"\n  "y"'}, "b": {}}, 2, True, "\r\n", "\ufeff", 1, 8)
def test_every_layout_cut_anywhere_is_what_json_reads(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, metadata: Mapping[str, dict[str, Any]],
    indent: Any, ascii_only: bool, line: str, mark: str, piece_bytes: int, block_bytes: int,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("json")
    text = mark + json.dumps(metadata, indent=indent, ensure_ascii=ascii_only).replace("\n", line)
    (folder / "m.json").write_bytes(text.encode())
    monkeypatch.setattr(json_source, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(jsonsplit, "_BLOCK_BYTES", block_bytes)
    expected = {k: e for k, e in metadata.items() if usable(e.get("tags")) and usable(e.get("caption"))}
    source = CatalogSource(path=folder / "m.json", prefix="d/")
    if not expected:
        with pytest.raises(DataError, match="NUL bytes"):
            told(source, folder / "c")
        return
    found, rejected = told(source, folder / "c")
    assert list(found) == ["d/" + key for key in expected]
    for key, entry in expected.items():
        row = found["d/" + key]
        tags = entry.get("tags")
        assert row["caption"] == entry.get("caption")
        assert row["tags"] == (None if tags is None else list(dict.fromkeys(parse_tags(tags))))
        assert tags is None or (row["raw_tags"] if row["raw_tags"] is not None else ", ".join(row["tags"])) == tags
    assert rejected == {"d/" + key: "unreadable_text" for key in metadata if key not in expected}


@settings(max_examples=100, deadline=None)
@given(metadata=metadata, indent=st.sampled_from([2, None]), range_bytes=st.integers(1, 80), block=st.integers(8, 60))
def test_ranges_hold_whole_entries_and_together_all(
    metadata: Mapping[str, Any], indent: int | None, range_bytes: int, block: int
) -> None:
    data = json.dumps(metadata, indent=indent).encode()
    file = BytesIO(data)
    layout = jsonsplit.layout_of(file, "m.json")
    before = jsonsplit._BLOCK_BYTES
    try:
        jsonsplit._BLOCK_BYTES = block
        ranges = list(jsonsplit.ranges(file, layout, range_bytes=range_bytes))
    finally:
        jsonsplit._BLOCK_BYTES = before
    assert [begin for begin, _ in ranges] == [layout.begin, *(end for _, end in ranges[:-1])]
    assert ranges[-1][1] == len(data)
    found = [entry for begin, end in ranges for entry in jsonsplit.entries(data[begin:end], layout)]
    found = [entry for entry in found if entry != b"}"]
    found[-1] = found[-1].removesuffix(b"}")
    assert [json.loads(b"{" + entry + b"}") for entry in found] == [{key: value} for key, value in metadata.items()]


@pytest.mark.parametrize("indent", [2, None])
def test_of_a_cut_file_the_whole_entries_are_kept(tmp_path: Path, indent: int | None) -> None:
    data = json.dumps({str(n): {"tags": f"t{n}"} for n in range(4)}, indent=indent).encode()
    starts = [data.index(b'"%d"' % n) for n in range(4)]
    for keep in range(starts[1], len(data)):
        (tmp_path / "m.json").write_bytes(data[:keep])
        found, rejected = told(CatalogSource(path=tmp_path / "m.json"), tmp_path / f"c{keep}")
        whole = [str(n) for n in range(4) if data[:keep].rstrip().find(b"}", starts[n]) >= 0]
        assert list(found) == whole
        if data[keep - 1 : keep] != b"," and not data[:keep].rstrip().endswith(b","):
            assert rejected["m.json"] == "damaged_json"


def test_bad_entries_are_told_and_the_others_kept(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_bytes(
        b'{\n  "good": {\n    "tags": "a, b"\n  },\n  "latin": {\n    "tags": "caf\xe9"\n  },\n'
        b'  "list": [\n    1\n  ],\n'
        b'  "text": "x",\n  "number": {\n    "tags": 7\n  },\n  "broken": {\n    "tags": x\n  },\n'
        b'  "half": {\n    "tags": "\\ud800"\n  },\n  "good": {\n    "tags": "again"\n  },\n'
        b'  "long": {\n    "caption": "' + b"x" * 10_000_000 + b'"\n  },\n  "last": {}\n}'
    )
    found, rejected = told(CatalogSource(path=tmp_path / "m.json"), tmp_path / "c")
    assert list(found) == ["good", "last"] and found["good"]["tags"] == ["a", "b"]
    assert rejected == {
        "latin": "unreadable_text", "list": "bad_row", "text": "bad_row", "number": "bad_row", "broken": "bad_row",
        "half": "bad_row", "good": "duplicate_key", "long": "text_too_long",
    }  # fmt: skip


@pytest.mark.parametrize("data", [b"", b"[1, 2]", b"\xff\xfe{\0}\0", b'"text"', b"PK\x03\x04"])
def test_what_is_no_object_is_refused_with_words(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.json").write_bytes(data)
    with pytest.raises(DataError, match=r"one JSON object was expected.*begins"):
        told(CatalogSource(path=tmp_path / "m.json"), tmp_path / "c")
    assert not (tmp_path / "c" / "catalog.json").exists()


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("1", "1"), ("a/1.PNG", "a/1"), ("./1.webp", "1"), ("1.5", "1.5"), ("H:\\art\\sub\\1.png", "sub/1"),
        ("H:/art/1.jpg", "1"), ("/data/train/2.png", "x/2"), ("/data/train/deep/2.png", "y/2"),
        ("sub\\1.png", "sub/1"), ("a_\\(b\\).png", "a_\\(b\\)"), ("日本.webp", "日本"),
    ],
)  # fmt: skip
def test_a_path_of_another_machine_becomes_a_key(name: str, key: str) -> None:
    root_map = {"H:/art/": "", "/data/train/": "x/", "/data/train/deep/": "y/"}
    assert picture_key(name, root_map) == key


@pytest.mark.parametrize(
    "name",
    ["", "../1.png", "a/../../1", "/abs/1.png", "C:\\x.png", "C:/x.png", "\\\\host\\1.png", "a\0b", "..", "\ud800"],
)
def test_a_name_that_leads_elsewhere_is_no_key(name: str) -> None:
    with pytest.raises(BadKey):
        picture_key(name, {})


def test_keys_that_lead_elsewhere_are_told_and_mapped_ones_kept(tmp_path: Path) -> None:
    keys = ["../1.png", "/abs/2.png", "C:\\3.png", "H:\\art\\4.png", "5"]
    (tmp_path / "m.json").write_text(json.dumps({key: {"tags": "x"} for key in keys}, indent=2))
    found, rejected = told(CatalogSource(path=tmp_path / "m.json", root_map={"H:/art/": "art/"}), tmp_path / "c")
    assert list(found) == ["art/4", "5"]
    assert rejected == dict.fromkeys(keys[:3], "bad_key")


rows = st.lists(
    st.fixed_dictionaries(
        {"image_path": st.integers(0, 10**6).map(lambda n: f"./pix/{n}.webp")},
        optional={
            "caption": words, "tags": words | st.lists(words, max_size=3), "image_size": st.just([640, 480]),
            "rating": st.sampled_from(["g", "s", "q", "e", "safe", "E", "", None]),
            "score": st.integers(-(2**40), 2**40),
            "id": st.integers(1, 2**50), "fav_count": st.none() | st.floats(0, 100, width=16),
        },
    ),
    min_size=1, max_size=8, unique_by=lambda row: row["image_path"],
)  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=rows, piece_bytes=st.integers(1, 200), line=st.sampled_from(["\n", "\r\n", "\n\n"]))
def test_lines_are_rows_wherever_the_file_is_cut(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]],
    piece_bytes: int, line: str,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("jsonl")
    (folder / "m.jsonl").write_bytes(("\ufeff" + line.join(map(json.dumps, rows))).encode())
    monkeypatch.setattr(jsonl_source, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(jsonsplit, "_BLOCK_BYTES", 16)
    bad = [
        row for row in rows
        if any("\0" in text for text in [row.get("caption", ""), *row.get("tags", "")])
    ]  # fmt: skip
    if len(bad) == len(rows):
        return
    found, rejected = told(CatalogSource(path=folder / "m.jsonl"), folder / "c")
    assert rejected == {row["image_path"]: "unreadable_text" for row in bad}
    assert len(found) == len(rows) - len(bad)
    for row in rows:
        if row in bad:
            continue
        tags = row.get("tags")
        if isinstance(tags, list):
            tags = [tag.strip() for tag in tags]
        got = found[row["image_path"][2:-5]]
        assert got["caption"] == row.get("caption")
        split = parse_tags(tags) if isinstance(tags, str) else [tag for tag in tags or () if tag]
        assert got["tags"] == (None if tags is None else list(dict.fromkeys(split)))
        codes = {"g": 1, "s": 2, "q": 3, "e": 4, "safe": 1, "E": 4}
        assert got["rating"] == codes.get(row.get("rating") or "")
        assert got["score"] == (row["score"] if -(2**31) <= row.get("score", 2**40) < 2**31 else None)
        assert (got["width"], got["height"]) == ((640, 480) if "image_size" in row else (None, None))
        assert got["id"] == row.get("id")


def test_lines_as_boorus_dump_them(tmp_path: Path) -> None:
    lines: list[Any] = [
        {"id": 7, "rating": "s", "score": 5, "image_width": 10, "image_height": 20,
         "tag_string_general": "1girl long_hair", "tag_string_artist": "", "tag_string": "1girl long_hair"},
        {"id": "8", "rating": "q", "score": {"up": 3, "down": -1, "total": 2}, "tag_string": "a b a", "width": "30"},
        {"id": 9, "rating": "s", "tags": {"general": ["solo"], "invalid": ["odd"], "species": ["fox"]}},
        {"caption": "no name"}, 3, {"id": 10, "rating": "s", "tags": [1]}, {"id": True, "rating": "s"},
    ]  # fmt: skip
    (tmp_path / "posts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"id": 11, "rat')
    everything, rejected = told(CatalogSource(path=tmp_path / "posts.jsonl"), tmp_path / "a")
    assert {key: row["tags"] for key, row in everything.items()} == {
        "7": ["1girl", "long_hair"], "8": ["a", "b"], "9": ["odd", "solo", "fox"],
    }  # fmt: skip
    assert everything["8"]["score"] == 2 and everything["8"]["width"] == 30 and everything["7"]["height"] == 20
    starts = [sum(len(json.dumps(line)) + 1 for line in lines[:n]) for n in range(8)]
    assert rejected == {**{f"posts.jsonl byte {starts[n]}": "bad_row" for n in (3, 4, 6, 7)}, "10": "bad_row"}
    some, _ = told(CatalogSource(path=tmp_path / "posts.jsonl", ratings=("s",)), tmp_path / "b")
    assert list(some) == ["7", "9"]
