"""Subsets made of files: copied or linked, taken up again after a kill, never over a file of somebody else."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet
import pytest
from support.rows import catalog_of

from sdxl_core.catalog.build import build_catalog
from sdxl_core.catalog.config import CatalogConfig, CatalogSource
from sdxl_core.catalog.records import Catalog
from sdxl_core.config import SubsetHow
from sdxl_core.errors import ConfigError, DataError
from sdxl_core.refs import SubsetRef
from sdxl_core.rejected import Rejected, read_rejected
from sdxl_core.subset.placed import Placed
from sdxl_core.subset.run import subset_records

FILES = {
    "1.png": b"one",
    "1.txt": b"pink hair, solo",
    "1.caption": b"A knight.\n",
    "deep/2.webp": b"two" * 9_000,
    "deep/2.txt": b"  comic\r\n",
    "3.jpg": b"three",
}
LINKS: list[SubsetHow] = ["hardlink", "symlink"]
PLACED: list[SubsetHow] = ["copy", *LINKS]


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """Records 1, 3, deep/2 in the listing's order."""
    write(tmp_path / "in", FILES)
    return cataloged(tmp_path)


def cataloged(folder: Path) -> Catalog:
    sources = (CatalogSource(path=folder / "in"),)
    build_catalog(CatalogConfig(sources=sources, out=folder / "catalog", processes=1))
    return Catalog.open(folder / "catalog")


def pick(catalog: Catalog, how: SubsetHow, keys: tuple[str, ...] = ("1", "3", "deep/2")) -> SubsetRef:
    return subset_records(
        catalog, numbers(catalog, keys), settings={"query": "q"}, how=how, out=catalog.path.parent / "out"
    )


def numbers(catalog: Catalog, keys: tuple[str, ...]) -> np.ndarray:  # type: ignore[type-arg]
    known = [key for chunk in catalog.chunks(["key"]) for key in chunk.table["key"].to_pylist()]
    return np.array([known.index(key) for key in keys], np.int64)


def contents(folder: Path) -> dict[str, bytes]:
    """Files below a folder that are not ours to keep book with."""
    own = {".subset.json", "rejected.jsonl", "missing.jsonl"}
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {
        name: data for name, data in found.items() if name not in own and not name.startswith((".lock.", ".subset/"))
    }


def ledger_of(out: Path) -> Path:
    """The ledger of the only shard."""
    (path,) = (out / ".subset").glob("*.ledger")
    return path


@pytest.mark.parametrize("how", PLACED)
def test_pictures_and_their_texts_come_unchanged(catalog: Catalog, how: SubsetHow) -> None:
    ref = pick(catalog, how)
    out = catalog.path.parent / "out"
    assert contents(out) == FILES
    assert (ref.num_seen, ref.num_kept, ref.num_unmatched, ref.num_rejected) == (3, 3, 0, 0)
    for name in FILES:
        source, placed = catalog.path.parent / "in" / name, out / name
        assert placed.is_symlink() == (how == "symlink")
        assert os.path.samefile(source, placed) == (how != "copy")
        assert placed.stat().st_mtime_ns == source.stat().st_mtime_ns


@pytest.mark.parametrize("how", PLACED)
def test_a_second_run_makes_nothing_and_a_missing_file_comes_back(catalog: Catalog, how: SubsetHow) -> None:
    first = pick(catalog, how)
    out = catalog.path.parent / "out"
    before = {path: path.lstat().st_ino for path in out.rglob("*")}
    assert pick(catalog, how) == first
    assert {path: path.lstat().st_ino for path in out.rglob("*")} == before
    (out / "deep/2.txt").unlink()
    assert pick(catalog, how) == first
    assert contents(out) == FILES


@pytest.mark.parametrize("how", PLACED)
def test_earlier_picks_leave_and_files_of_others_stay(catalog: Catalog, how: SubsetHow) -> None:
    out = catalog.path.parent / "out"
    pick(catalog, how, ("1", "3"))
    write(out, {"notes.txt": b"mine"})
    ref = pick(catalog, how, ("3", "deep/2"))
    assert contents(out).keys() == {"3.jpg", "deep/2.webp", "deep/2.txt", "notes.txt"}
    assert (ref.num_kept, ref.num_unmatched) == (2, 1)
    assert contents(catalog.path.parent / "in") == FILES


@pytest.mark.parametrize("how", PLACED)
def test_a_file_of_another_content_is_never_overwritten(catalog: Catalog, how: SubsetHow) -> None:
    out = catalog.path.parent / "out"
    write(out, {"deep/2.webp": b"no!" * 9_000})
    source = (catalog.path.parent / "in" / "deep/2.webp").stat()
    os.utime(out / "deep/2.webp", ns=(source.st_mtime_ns, source.st_mtime_ns))  # same size, same time
    with pytest.raises(DataError, match=r"deep/2\.webp exists with another content"):
        pick(catalog, how)
    assert contents(out) == {"deep/2.webp": b"no!" * 9_000}


@pytest.mark.parametrize("how", PLACED)
def test_an_edited_pick_that_must_leave_is_told_not_removed(catalog: Catalog, how: SubsetHow) -> None:
    out = catalog.path.parent / "out"
    pick(catalog, how)
    (out / "1.png").unlink()
    (out / "1.png").write_bytes(b"repainted")
    with pytest.raises(DataError, match=r"1\.png belongs to a picture that the query no longer picks"):
        pick(catalog, how, ("3",))
    assert (out / "1.png").read_bytes() == b"repainted"


@pytest.mark.parametrize("how", PLACED)
def test_a_picture_replaced_in_the_source_is_placed_again(catalog: Catalog, how: SubsetHow) -> None:
    pick(catalog, how)
    source = catalog.path.parent / "in" / "1.png"
    source.unlink()
    source.write_bytes(b"one, better")
    pick(cataloged(catalog.path.parent), how)
    assert (catalog.path.parent / "out" / "1.png").read_bytes() == b"one, better"


@pytest.mark.parametrize("how", PLACED)
def test_a_picture_that_is_gone_is_rejected_with_its_texts(catalog: Catalog, how: SubsetHow) -> None:
    (catalog.path.parent / "in" / "1.png").unlink()
    ref = pick(catalog, how)
    assert [(row.key, row.reason) for row in read_rejected(ref.rejected)] == [("1", "unreadable_file")]
    assert ref.num_kept + ref.num_unmatched + ref.num_rejected == ref.num_seen == 3
    assert contents(catalog.path.parent / "out").keys() == {"3.jpg", "deep/2.webp", "deep/2.txt"}


def test_another_way_in_the_same_folder_is_refused(catalog: Catalog) -> None:
    pick(catalog, "copy")
    with pytest.raises(ConfigError, match="how = 'copy'; now it is 'hardlink'"):
        pick(catalog, "hardlink")


def test_a_copy_whose_content_a_power_cut_lost_is_found_and_made_again(catalog: Catalog) -> None:
    pick(catalog, "copy")
    ledger, copy = ledger_of(catalog.path.parent / "out"), catalog.path.parent / "out" / "1.png"
    stored = orjson.loads(ledger.read_bytes())
    ledger.write_bytes(orjson.dumps({**stored, "finished": False, "marks": {}}))  # as it stands before the end
    time_ns = copy.stat().st_mtime_ns
    copy.write_bytes(b"\0\0\0")
    os.utime(copy, ns=(time_ns, time_ns))
    pick(catalog, "copy")
    assert copy.read_bytes() == b"one"


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("how", [*PLACED, "manifest"])
def test_what_a_killed_process_left_half_written_is_removed(catalog: Catalog, how: SubsetHow, finished: bool) -> None:
    out = catalog.path.parent / "out"
    if finished:
        pick(catalog, how, ("1",))
    left = [
        f".{name}.99999999-1.partial" for name in (".subset.json", "..rejected.jsonl.new", "1.png", "manifest.arrow")
    ]
    if how != "manifest":
        left.append(".subset/.known.99999999-1.partial")
    write(out, dict.fromkeys(left, b"half"))
    pick(catalog, how)
    assert not list(out.rglob("*.partial"))


def test_every_finished_copy_has_the_digest_of_its_content(catalog: Catalog) -> None:
    import hashlib

    pick(catalog, "copy")
    marks = orjson.loads(ledger_of(catalog.path.parent / "out").read_bytes())["marks"]
    assert marks == {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}


def test_missing_halves_are_counted_and_listed(tmp_path: Path) -> None:
    rows = [
        {"key": "both", "image": "both.png", "tags": {"": ["a"]}, "caption": "A."},
        {"key": "bare", "image": "bare.png"},
        {"key": "words", "tags": {"": ["a"]}},
        {"key": "unjudged", "image": "unjudged.png"},
        {"key": "other", "image": "other.png"},
    ]
    write(tmp_path / "source0", {"both.png": b"1", "both.txt": b"a", "both.caption": b"A.", "bare.png": b"2"})
    catalog = catalog_of(tmp_path, [rows])
    ref = subset_records(
        catalog,
        numbers(catalog, ("both", "bare", "words")),
        settings={"query": "a"},
        how="copy",
        out=tmp_path / "out",
        unjudged=[Rejected(stage="subset", key="unjudged", reason="no_caption", detail="")],
    )
    assert ref.missing == {"image": 1, "tags": 1, "caption": 2, "text": 1}
    assert (ref.num_kept, ref.num_unmatched, ref.num_rejected, ref.num_seen) == (2, 1, 2, 5)
    assert {row.key: row.reason for row in read_rejected(ref.rejected)} == {
        "unjudged": "no_caption",
        "words": "no_image",
    }
    assert [(row.key, row.reason) for row in read_rejected(tmp_path / "out" / "missing.jsonl")] == [("bare", "no_text")]


def test_words_that_stand_in_a_parquet_are_written_beside_the_pictures(tmp_path: Path) -> None:
    write(tmp_path / "in", {"7.png": b"seven", "8.png": b"eight"})
    table = {"id": [7, 8], "tag_string": ["pink_hair solo", "é_tag"], "rating": ["g", "s"]}
    pa.parquet.write_table(pa.table(table), tmp_path / "posts.parquet")
    sources = (CatalogSource(path=tmp_path / "in", use=("images",)), CatalogSource(path=tmp_path / "posts.parquet"))
    build_catalog(CatalogConfig(sources=sources, out=tmp_path / "catalog", processes=1))
    catalog = Catalog.open(tmp_path / "catalog")
    expected = {"7.png": b"seven", "8.png": b"eight", "7.txt": b"pink_hair, solo", "8.txt": "é_tag".encode()}
    for how in PLACED:
        out = tmp_path / how
        subset_records(catalog, np.arange(2), settings={"query": ""}, how=how, out=out)
        before = {path: path.lstat().st_ino for path in out.rglob("*")}
        subset_records(catalog, np.arange(2), settings={"query": ""}, how=how, out=out)
        assert contents(out) == expected and {path: path.lstat().st_ino for path in out.rglob("*")} == before


def test_pictures_keyed_by_name_are_found_in_their_sub_folders(tmp_path: Path) -> None:
    write(tmp_path / "in", {"0001/7.png": b"seven", "0001/7.txt": b"solo,pink hair"})
    sources = (CatalogSource(path=tmp_path / "in", key="name"),)
    build_catalog(CatalogConfig(sources=sources, out=tmp_path / "catalog", processes=1))
    pick(Catalog.open(tmp_path / "catalog"), "hardlink", ("7",))
    assert contents(tmp_path / "out") == {"7.png": b"seven", "7.txt": b"solo,pink hair"}


@pytest.fixture
def tars(tmp_path: Path) -> Catalog:
    rng = random.Random(1)
    rows = []
    (tmp_path / "source0").mkdir()
    for name in ("0000.tar", "sub/0001.tar"):
        path = tmp_path / "source0" / name
        path.parent.mkdir(exist_ok=True)
        write(tmp_path / "loose", {f"{name[-5]}{i}.webp": rng.randbytes(rng.randrange(2_000)) for i in range(9)})
        with tarfile.open(path, "w") as tar:
            for file in sorted((tmp_path / "loose").glob(f"{name[-5]}*")):
                tar.add(file, file.name)
        with tarfile.open(path) as tar:
            rows += [
                {
                    "key": member.name[:-5],
                    "image": member.name,
                    "tar": name,
                    "offset": member.offset_data,
                    "num_bytes": member.size,
                    "tags": {"": ["a", "b"]},
                }
                for member in tar
            ]
    return catalog_of(tmp_path, [rows], kind="tars")


def test_members_of_tars_are_taken_out_for_a_copy(tars: Catalog) -> None:
    out = tars.path.parent / "out"
    subset_records(tars, np.arange(18), settings={"query": ""}, how="copy", out=out)
    loose = contents(tars.path.parent / "loose")
    assert contents(out) == loose | {name.replace("webp", "txt"): b"a, b" for name in loose}
    subset_records(tars, np.arange(3), settings={"query": ""}, how="copy", out=out)
    assert len(contents(out)) == 6


@pytest.mark.parametrize("how", [*LINKS, "reflink"])
def test_links_into_a_tar_are_refused_before_anything_is_made(tars: Catalog, how: SubsetHow) -> None:
    out = tars.path.parent / "out"
    with pytest.raises(ConfigError, match=r"copy .*or manifest"):
        subset_records(tars, np.arange(18), settings={"query": ""}, how=how, out=out)
    assert not contents(out)


def test_a_tar_that_ends_too_early_rejects_its_pictures_only(tars: Catalog) -> None:
    tar = tars.path.parent / "source0" / "0000.tar"
    os.truncate(tar, tars.take(np.array([5]), ["offset"])["offset"][0].as_py() + 1)
    ref = subset_records(tars, np.arange(18), settings={"query": ""}, how="copy", out=tars.path.parent / "out")
    assert {row.key for row in read_rejected(ref.rejected)} >= {"06", "07", "08"}
    assert ref.num_kept + ref.num_rejected == 18 and ref.num_kept >= 14


@pytest.mark.parametrize("how", ["hardlink", "reflink"])
def test_links_that_this_place_cannot_have_are_refused_before_anything_is_made(
    catalog: Catalog, how: SubsetHow
) -> None:
    if not Path("/dev/shm").is_dir() or os.stat("/dev/shm").st_dev == os.stat(catalog.path).st_dev:
        pytest.skip("needs a second file system")
    out = Path("/dev/shm") / f"subset-{os.getpid()}-{how}"
    try:
        with pytest.raises(ConfigError, match=r"different file systems.*how = copy"):
            subset_records(catalog, np.arange(3), settings={"query": ""}, how=how, out=out)
        assert not out.exists() or not contents(out)
        assert not list(out.parent.glob(".sdxl-flows-trial*"))
    finally:
        shutil.rmtree(out, ignore_errors=True)


@pytest.fixture
def sharing(tmp_path: Path) -> Iterator[Path]:
    """A file system that shares blocks."""
    maker = shutil.which("mkfs.xfs")
    if os.geteuid() or maker is None:
        pytest.skip("needs root and mkfs.xfs")
    image, folder = tmp_path / "disk.img", tmp_path / "disk"
    folder.mkdir()
    with open(image, "wb") as file:
        file.truncate(400 << 20)
    subprocess.run([maker, "-q", "-m", "reflink=1", str(image)], check=True)
    if subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_reflinks_are_files_of_their_own(sharing: Path) -> None:
    write(sharing / "in", FILES)
    catalog = cataloged(sharing)
    first = pick(catalog, "reflink")
    out = sharing / "out"
    assert contents(out) == FILES and not os.path.samefile(out / "1.png", sharing / "in" / "1.png")
    assert pick(catalog, "reflink") == first
    (out / "1.png").write_bytes(b"ONE")
    assert (sharing / "in" / "1.png").read_bytes() == b"one"
    with pytest.raises(DataError, match=r"1\.png exists with another content"):
        pick(catalog, "reflink")


@pytest.mark.parametrize("how", PLACED)
def test_a_subset_killed_anywhere_is_finished_by_the_next(tmp_path: Path, how: SubsetHow) -> None:
    rng = random.Random(how)
    files = {f"{number % 7}/{number}.png": rng.randbytes(20_000) for number in range(500)}
    files |= {name.replace(".png", ".txt"): b"1girl, %d" % len(name) for name in files}
    write(tmp_path / "in", files)
    catalog = cataloged(tmp_path)
    code = (
        "import sys; import numpy as np; from pathlib import Path\n"
        "from sdxl_core.catalog.records import Catalog; from sdxl_core.subset.run import subset_records\n"
        "catalog = Catalog.open(Path(sys.argv[1]))\n"
        "print('go', flush=True)\n"
        "subset_records(catalog, np.arange(500), settings={'query': 'q'}, how=sys.argv[2], out=Path(sys.argv[3]))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    argv = [sys.executable, "-c", code, str(catalog.path), how, str(tmp_path / "out")]
    for _ in range(4):
        with subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"go\n"
            time.sleep(rng.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
    ref = subset_records(catalog, np.arange(500), settings={"query": "q"}, how=how, out=tmp_path / "out")
    assert ref.num_kept == 500 and contents(tmp_path / "out") == files


def test_a_name_that_was_given_up_belongs_to_whoever_takes_it(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = catalog.path.parent / "out"
    pick(catalog, "copy", ("1", "3"))
    for name in ("1.png", "1.txt", "1.caption"):
        (out / name).unlink()

    def stopped(self: Placed, group: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Placed, "place", stopped)
        with pytest.raises(KeyboardInterrupt):
            pick(catalog, "copy", ("3", "deep/2"))
    write(out, {"1.png": b"mine"})
    assert pick(catalog, "copy", ("3", "deep/2")).num_kept == 2
    assert (out / "1.png").read_bytes() == b"mine"
