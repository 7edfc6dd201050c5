"""Pictures and texts in tars: found where Python's tarfile finds them, joined by key, never unpacked."""

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tars import FORMATS, write_tar

from sdxl_core.catalog.build import build_catalog, plan_catalog
from sdxl_core.catalog.config import CatalogConfig, CatalogSource
from sdxl_core.catalog.images import image_places, read_image_bytes
from sdxl_core.catalog.records import Catalog
from sdxl_core.catalog.sources import tars
from sdxl_core.catalog.tarheaders import End, Member, scan
from sdxl_core.errors import DataError
from sdxl_core.rejected import read_rejected


def write_index(path: Path, num_bytes: int | None = None) -> None:
    with tarfile.open(path) as tar:
        files = {m.name: {"offset": m.offset_data, "size": m.size, "sha256": "0" * 64} for m in tar}
    size = path.stat().st_size if num_bytes is None else num_bytes
    path.with_suffix(".json").write_text(json.dumps({"filesize": size, "hash": "0", "files": files}))


def build(tmp_path: Path, *sources: Path | CatalogSource, **options: Any) -> Catalog:
    made = tuple(s if isinstance(s, CatalogSource) else CatalogSource(path=s, **options) for s in sources)
    ref = build_catalog(CatalogConfig(sources=made, out=tmp_path / "catalog"))
    assert ref.num_seen == ref.num_rejected + sum(part.rows.num_rows for part in Catalog.open(ref.path).parts) - len(
        [row for row in read_rejected(ref.rejected) if row.detail.endswith("its first row is used")]
    )
    return Catalog.open(tmp_path / "catalog")


def told(catalog: Catalog) -> dict[str, dict[str, Any]]:
    names = catalog.vocabulary["tag"].to_pylist()
    rows = [
        r
        for c in catalog.chunks(["key", "image", "tar", "offset", "num_bytes", "tags", "caption"])
        for r in c.table.to_pylist()
    ]
    for row in rows:
        row["tags"] = None if row["tags"] is None else [names[tag] for tag in row["tags"]]
    return {row.pop("key"): row for row in rows}


def reasons(catalog: Catalog) -> dict[str, str]:
    return {row.key: row.reason for row in read_rejected(catalog.path / "rejected.jsonl")}


texts = st.text(st.characters(exclude_characters="\0/\\", exclude_categories=["Cs"]), min_size=1, max_size=60)
names = st.lists(texts, min_size=1, max_size=4).map("/".join).filter(lambda name: len(name.encode()) < 240)
kinds = st.sampled_from(["file", "file", "file", "folder", "link", "symlink", "fifo"])


@settings(max_examples=200, deadline=None)
@given(
    entries=st.lists(st.tuples(names, kinds, st.integers(0, 3_000)), max_size=8),
    form=st.sampled_from(["gnu", "pax"]),
    shared=st.booleans(),
    data=st.data(),
)
def test_names_and_offsets_are_those_of_tarfile(
    tmp_path_factory: pytest.TempPathFactory,
    entries: list[tuple[str, str, int]],
    form: str,
    shared: bool,
    data: st.DataObject,
) -> None:
    shared = shared and bool(entries)
    path = tmp_path_factory.mktemp("tar") / "t.tar"
    types = {"file": tarfile.REGTYPE, "folder": tarfile.DIRTYPE, "link": tarfile.LNKTYPE, "symlink": tarfile.SYMTYPE,
             "fifo": tarfile.FIFOTYPE}  # fmt: skip
    with tarfile.open(path, "w", format=FORMATS[form], pax_headers={"comment": "é"} if shared else {}) as tar:
        for name, kind, size in entries:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.mtime = types[kind], name if "link" in kind else "", 1.5
            info.size = size if kind == "file" else 0
            tar.addfile(info, io.BytesIO(b"x" * size))
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset, m.offset_data, m.size) for m in tar if m.isreg() or m.islnk() or m.issym()]
    with open(path, "rb") as file:
        found = list(scan(file.fileno()))
        assert isinstance(found[-1], End) and not found[-1].damage
        members = [m for m in found if isinstance(m, Member)]
        assert [m[:4] for m in members] == expected
        if members and not shared:  # from any member on, and up to any
            cut = data.draw(st.sampled_from(members)).header
            parts = [*scan(file.fileno(), end=cut), *scan(file.fileno(), begin=cut)]
            assert [m for m in parts if isinstance(m, Member)] == members


@pytest.mark.parametrize("form", FORMATS)
def test_long_names_and_other_formats(tmp_path: Path, form: str) -> None:
    name = f"{'d' * 90}/{'e' * 90}.webp"
    write_tar(tmp_path / "t.tar", {name: b"picture", "2.webp": b"second"}, form)
    catalog = build(tmp_path, tmp_path / "t.tar")
    assert list(told(catalog)) == [name[:-5], "2"]
    assert list(read_image_bytes(catalog, np.array([1, 0]))) == [b"second", b"picture"]


def test_a_size_of_more_than_octal_digits_hold_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    size = 9 << 30
    info = tarfile.TarInfo("1.webp")
    info.size = size
    after = tarfile.TarInfo("2.webp")
    with open(path, "wb") as file:  # nine gigabytes that no disk has to hold
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.seek(512 + size)
        file.write(after.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with open(path, "rb") as file:
        found = list(scan(file.fileno()))
    assert [member[0] for member in found[:2]] == ["1.webp", "2.webp"]
    assert found[0].num_bytes == size


@pytest.mark.parametrize("with_index", [False, True])
def test_parallel_shards_of_one_folder_and_of_others_are_joined(tmp_path: Path, with_index: bool) -> None:
    pictures = {f"{n}.webp": f"picture {n}".encode() * 50 for n in range(40)}
    for shard in range(2):
        mine = {name: data for name, data in pictures.items() if int(name[:-5]) % 2 == shard}
        write_tar(tmp_path / "pix" / f"{shard:04}.tar", mine)
        write_tar(
            tmp_path / "pix" / f"tags-{shard:04}.tar",
            {name[:-5] + ".txt": f"1girl, t{name[:-5]}".encode() for name in mine},
        )
        write_tar(
            tmp_path / "words" / f"{shard:04}.tar", {f"{name[:-5]}.caption": f"about {name}".encode() for name in mine}
        )
    if with_index:
        for path in (tmp_path / "pix").glob("*.tar"):
            write_index(path)
    catalog = build(tmp_path, tmp_path / "pix", tmp_path / "words", prefix="d/")
    found = told(catalog)
    assert len(found) == 40 and not reasons(catalog)
    for number in range(40):
        row = found[f"d/{number}"]
        assert row["tags"] == ["1girl", f"t{number}"]
        assert row["caption"] == f"about {number}.webp"
        assert row["tar"] == f"{number % 2:04}.tar"
    keys = list(found)
    assert list(read_image_bytes(catalog, np.arange(40))) == [pictures[key[2:] + ".webp"] for key in keys]


def test_an_index_spares_the_headers_and_a_stale_one_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "in" / "0000.tar"
    write_tar(path, {f"{n}.webp": b"p" * n for n in range(5)})
    expected = told(build(tmp_path / "a", tmp_path / "in"))
    write_index(path)
    assert told(build(tmp_path / "b", tmp_path / "in")) == expected
    index = path.with_suffix(".json")
    write_index(path, num_bytes=path.stat().st_size + 1)
    plan = plan_catalog(CatalogConfig(sources=(CatalogSource(path=tmp_path / "in"),), out=tmp_path / "c"))
    assert "0000.json" in plan[0].label and "another size" in plan[0].label
    assert told(build(tmp_path / "c", tmp_path / "in")) == expected
    write_index(path)  # the right size, but places where nothing begins
    text = json.loads(index.read_text())
    for entry in text["files"].values():
        entry["offset"] += 512
    index.write_text(json.dumps(text))
    assert told(build(tmp_path / "d", tmp_path / "in")) == expected


def test_the_headers_of_an_indexed_tar_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "in" / "0000.tar"
    write_tar(path, {f"{n}.webp": b"p" * 600 for n in range(30)})
    expected = told(build(tmp_path / "a", tmp_path / "in"))
    write_index(path)
    data = bytearray(path.read_bytes())
    data[5 * 1536 : 5 * 1536 + 512] = b"?" * 512  # a header in the middle is gone
    path.write_bytes(data)
    assert told(build(tmp_path / "b", tmp_path / "in")) == expected


@pytest.mark.parametrize("keep", [1, 511, 512, 600, 1023, 1024, 1537, 1800, 2048, 3000])
def test_of_a_cut_tar_the_whole_members_are_kept_and_the_cut_one_is_told(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "in" / "0000.tar"
    pictures = {f"{n}.webp": bytes([65 + n]) * 900 for n in range(3)}
    write_tar(tmp_path / "in" / "1111.tar", {"9.webp": b"whole"})
    write_tar(path, pictures)
    os.truncate(path, keep)
    catalog = build(tmp_path, tmp_path / "in")
    whole = [n for n in range(3) if n * 1536 + 512 + 900 <= keep]
    assert list(told(catalog)) == [*(str(n) for n in whole), "9"]
    assert list(read_image_bytes(catalog, np.arange(len(whole)))) == [pictures[f"{n}.webp"] for n in whole]
    assert set(reasons(catalog).values()) == {"damaged_tar"}
    first_cut = next((n for n in range(3) if n not in whole and n * 1536 + 512 <= keep), None)
    if first_cut is not None:
        assert f"{first_cut}.webp" in reasons(catalog)


def test_what_is_no_tar_is_told_and_the_others_are_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "0.tar", {"1.webp": b"p"})
    (tmp_path / "in" / "1.tar").write_bytes(b"\x1f\x8b" + b"compressed" * 100)
    (tmp_path / "in" / "2.tar").write_bytes(b"")
    catalog = build(tmp_path, tmp_path / "in")
    assert list(told(catalog)) == ["1"]
    assert reasons(catalog) == {"1.tar": "damaged_tar", "2.tar": "damaged_tar"}


def test_names_that_lead_elsewhere_links_and_sparse_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "in" / "0.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("../a.webp", "/b.webp", "C:\\c.webp", "./ok.webp", "d/../e.webp", "bad\udcff.webp"):
            tar.addfile(tarfile.TarInfo(name))
        link = tarfile.TarInfo("l.webp")
        link.type, link.linkname = tarfile.SYMTYPE, "ok.webp"
        tar.addfile(link)
        sparse = tarfile.TarInfo("s.webp")
        sparse.type = tarfile.GNUTYPE_SPARSE
        tar.addfile(sparse)
        tar.addfile(tarfile.TarInfo("last.webp"))
    catalog = build(tmp_path, tmp_path / "in")
    assert list(told(catalog)) == ["ok", "last"]
    assert reasons(catalog) == {
        "../a.webp": "bad_key", "/b.webp": "bad_key", "C:\\c.webp": "bad_key", "d/../e.webp": "bad_key",
        "bad\\udcff.webp": "bad_file_name", "l.webp": "not_a_file", "s.webp": "not_a_file",
    }  # fmt: skip


def test_unreadable_texts_and_repeated_names_are_told(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "in" / "0.tar",
        [
            ("1.png", b"one"), ("1.jpg", b"other"), ("1.txt", b"\xef\xbb\xbf1girl,\r\nlong \\(hair\\), \"q\""),
            ("2.png", b"old"), ("2.png", b"newer"), ("2.txt", b"x"),
            ("3.png", b"p"), ("3.txt", b"caf\xe9"),
            ("4.png", b"p"), ("4.txt", b"a\0b"),
            ("5.png", b"p"), ("5.caption", b"x" * 10_000_000),
            ("6.txt", b"no, picture"), ("7.npz", b"latents"),
        ],
    )  # fmt: skip
    catalog = build(tmp_path, tmp_path / "in")
    found = told(catalog)
    assert list(found) == ["1", "2", "6"]
    assert found["1"]["tags"] == ["1girl", "long \\(hair\\)", '"q"'] and found["6"]["image"] is None
    assert list(read_image_bytes(catalog, np.array([0, 1]))) == [b"one", b"newer"]
    assert reasons(catalog) == {
        "1.jpg": "duplicate_key", "2.png": "duplicate_key", "3": "unreadable_text", "4": "unreadable_text",
        "5": "text_too_long",
    }  # fmt: skip
    with pytest.raises(DataError, match="no source has a picture of 6"):
        list(read_image_bytes(catalog, np.array([2])))


def test_a_key_in_two_shards_is_told(tmp_path: Path) -> None:
    for shard in "ab":
        write_tar(tmp_path / "in" / f"{shard}.tar", {"1.webp": shard.encode(), f"{shard}.webp": b"p"})
    catalog = build(tmp_path, tmp_path / "in")
    assert list(told(catalog)) == ["1", "a", "b"]
    assert reasons(catalog) == {"1": "duplicate_key"}
    assert next(read_image_bytes(catalog, np.array([0]))) == b"a"


@pytest.mark.parametrize("limit", [1_000, 5_000, 20_000])
def test_a_large_tar_is_cut_and_says_the_same(tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {}
    for number in range(50):
        files[f"{number}.webp"] = b"p" * (number * 37)
    for number in range(50):
        files[f"{number}.txt"] = f"t{number}".encode()
    write_tar(tmp_path / "in" / "0.tar", files)
    write_tar(tmp_path / "in" / "1.tar", {"last.webp": b"p"})
    whole = told(build(tmp_path / "whole", tmp_path / "in"))
    monkeypatch.setattr(tars, "_PIECE_BYTES", limit)
    config = CatalogConfig(sources=(CatalogSource(path=tmp_path / "in"),), out=tmp_path / "cut" / "catalog")
    assert len(plan_catalog(config)) > 2
    assert told(build(tmp_path / "cut", tmp_path / "in")) == whole
    write_index(tmp_path / "in" / "0.tar")
    assert told(build(tmp_path / "indexed", tmp_path / "in")) == whole


def test_pictures_of_folders_and_tars_are_read_alike_and_a_change_is_told(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.png").write_bytes(b"in a folder")
    write_tar(tmp_path / "t.tar", {"b.png": b"in a tar"})
    catalog = build(tmp_path, tmp_path / "t.tar", tmp_path / "folder")
    assert list(read_image_bytes(catalog, np.array([1, 0, 1]))) == [b"in a folder", b"in a tar", b"in a folder"]
    assert [place.in_tar for place in image_places(catalog, np.array([0, 1])) if place] == [True, False]
    (tmp_path / "folder" / "a.png").write_bytes(b"other")
    with pytest.raises(DataError, match=r"a\.png has 5 bytes, the catalog says 11.*build the catalog again"):
        list(read_image_bytes(catalog, np.array([1])))
    (tmp_path / "t.tar").unlink()
    with pytest.raises(DataError, match=r"t\.tar: cannot be read"):
        list(read_image_bytes(catalog, np.array([0])))


def test_tars_of_texts_make_small_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "_TEXT_PIECE_BYTES", 30_000)
    for shard in range(4):
        write_tar(tmp_path / "in" / f"{shard}.tar", {f"{shard}{n}.webp": b"p" * 900 for n in range(10)})
        write_tar(tmp_path / "in" / f"{shard}.txt.tar", {f"{shard}{n}.txt": b"1girl" for n in range(20)})
    plan = plan_catalog(CatalogConfig(sources=(CatalogSource(path=tmp_path / "in"),), out=tmp_path / "c"))
    texts = [[name for name, *_ in part.payload["ranges"] if "txt" in name] for part in plan]
    assert max(map(len, texts)) == 1 and sum(map(len, texts)) == 4
    assert len(told(build(tmp_path / "whole", tmp_path / "in"))) == 80


def test_pictures_spread_over_folders_by_id_meet_the_ids(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "0.tar", {"0123/5123.webp": b"tarred", "0123/5123.txt": b"1girl", "0001/1.webp": b"p"})
    (tmp_path / "pix" / "0002").mkdir(parents=True)
    (tmp_path / "pix" / "0002" / "2.webp").write_bytes(b"in a folder")
    (tmp_path / "pix" / "0002" / "1.webp").write_bytes(b"again")
    (tmp_path / "pix" / "0002" / "2.txt").write_text("solo")
    (tmp_path / "m.jsonl").write_text("".join(f'{{"id": {n}, "caption": "c{n}"}}\n' for n in (5123, 2, 1)))
    by_path = told(build(tmp_path / "path", tmp_path / "in", tmp_path / "pix"))
    assert list(by_path) == ["0123/5123", "0001/1", "0002/1", "0002/2"]
    catalog = build(tmp_path, tmp_path / "in", tmp_path / "pix", tmp_path / "m.jsonl", key="name", prefix="d/")
    found = told(catalog)
    assert {key: (row["tags"], row["caption"]) for key, row in found.items()} == {
        "d/5123": (["1girl"], "c5123"), "d/1": (None, "c1"), "d/2": (["solo"], "c2"),
    }  # fmt: skip
    assert list(read_image_bytes(catalog, np.arange(3))) == [b"tarred", b"p", b"in a folder"]
