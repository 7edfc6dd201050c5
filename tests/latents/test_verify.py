"""Verify finds whatever is not as it was written; repair makes exactly that again; nothing damaged is ever served."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.latent_sets import collection, contents, snapshot

from sdxl_core.config import CacheLatentsConfig, RemoveLatentsConfig, VerifyLatentsConfig
from sdxl_core.errors import DataError, SdxlFlowsError, ShardError
from sdxl_core.latents import LatentStore, verify
from sdxl_core.latents.cache import cache_latents
from sdxl_core.latents.formats import (
    LatentRecord,
    PackedFile,
    WrittenFile,
    read_per_image,
    write_packed,
    write_per_image,
)
from sdxl_core.latents.ledger import CommitGroup, LatentFile, ShardLedger
from sdxl_core.latents.remove import remove_latents
from sdxl_core.latents.rows import ShardRows
from sdxl_core.latents.verify import verify_latents


def flip(path: Path, place: int, bit: int = 1) -> None:
    """Change one bit and leave size and time as they were, as a disk does."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[place] ^= bit
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture(scope="module", params=["per_image", "packed"])
def cached(request: Any, tmp_path_factory: pytest.TempPathFactory) -> CacheLatentsConfig:
    """A finished set of two shards; tests copy it."""
    folder = tmp_path_factory.mktemp("set")
    (folder / "in" / "deep").mkdir(parents=True)
    files = collection(7)
    for name, data in files.items():
        (folder / "in" / name).write_bytes(data)
    keys = [name.rpartition(".")[0] for name in files]
    (folder / "meta.json").write_text(json.dumps({key: {"tags": key} for key in keys}, indent=2))
    config = CacheLatentsConfig(
        source=folder / "in", metadata=folder / "meta.json", out=folder / "out", vae="tiny", resolution_px=64,
        min_bucket_px=32, max_bucket_px=128, bucket_step_px=32, devices="cpu", shard_size=5, batch_size=2,
        layout=request.param,
    )  # fmt: skip
    cache_latents(config)
    return config


@pytest.fixture
def mine(cached: CacheLatentsConfig, tmp_path: Path) -> CacheLatentsConfig:
    shutil.copytree(cached.out, tmp_path / "out")
    return cached.model_copy(update={"out": tmp_path / "out"})


def test_a_good_set_is_said_to_be_good_and_not_touched(mine: CacheLatentsConfig) -> None:
    before = snapshot(mine.out)
    for path in (mine.out, mine.out / "latents"):
        ref = verify_latents(VerifyLatentsConfig(path=path))
        files = list((mine.out / "latents").rglob("*.npz"))
        assert (ref.num_rows, ref.num_files, ref.num_repaired) == (7, len(files), 0)
        assert ref.num_bytes == sum(file.stat().st_size for file in files)
    assert verify_latents(VerifyLatentsConfig(path=mine.out, repair=True)).num_repaired == 0
    assert snapshot(mine.out) == before


def test_one_flipped_byte_anywhere_is_found_and_never_served(mine: CacheLatentsConfig) -> None:
    right = contents(mine.out)
    path = sorted((mine.out / "latents").rglob("*.npz"))[0]
    size = path.stat().st_size
    places = {*range(0, 300, 9), *range(0, size, 307), *range(size - 400, size, 11)}
    for place in sorted(places):
        flip(path, place, 1 << place % 8)
        with pytest.raises(ShardError, match="1 file not as written"):
            verify_latents(VerifyLatentsConfig(path=mine.out))
        store = LatentStore(mine.out / "latents")
        for key, expected in right.items():
            try:
                record = store.read(key)
            except ShardError:
                continue
            assert tuple((n, a.dtype.str, a.tobytes()) for n, a in record.arrays()) == expected[0], place
        flip(path, place, 1 << place % 8)
    assert verify_latents(VerifyLatentsConfig(path=mine.out)).num_rows == 7


@pytest.mark.parametrize("damage", ["row", "header", "cut", "gone", "two files"])
def test_repair_encodes_exactly_what_is_bad_to_the_same_bytes(
    mine: CacheLatentsConfig, damage: str, monkeypatch: Any
) -> None:
    whole, right = snapshot(mine.out), contents(mine.out)
    paths = sorted((mine.out / "latents").rglob("*.npz"))
    for path in paths[:2] if damage == "two files" else paths[:1]:
        if damage == "gone":
            path.unlink()
        elif damage == "cut":
            path.write_bytes(path.read_bytes()[:-7])
        else:
            flip(path, 30 if damage == "header" else 500)
    written: list[int] = []
    commit = ShardLedger.commit

    def watched(ledger: Any, group: Any) -> None:
        written.extend(group.rows)
        commit(ledger, group)

    monkeypatch.setattr(ShardLedger, "commit", watched)
    ref = verify_latents(VerifyLatentsConfig(path=mine.out, repair=True))
    assert ref.findings is not None
    findings = [json.loads(line) for line in ref.findings.read_text().splitlines()]
    bad = {key for finding in findings for key in finding["keys"]}
    assert ref.num_rows == 7 - len(bad) and ref.num_repaired == len(bad) == len(written) > 0
    assert contents(mine.out) == right
    if mine.layout == "per_image":
        assert snapshot(mine.out) == whole
    assert verify_latents(VerifyLatentsConfig(path=mine.out)).num_rows == 7


@pytest.mark.parametrize(
    "name",
    ["index.arrow", "index.files.arrow", "index.keys.arrow", "index.json", "../meta_lat.json", "*.rows.arrow",
     "*.done.arrow", "*.ledger.jsonl", "set.json"],
)  # fmt: skip
def test_damaged_lists_of_ours_are_found_and_made_again(mine: CacheLatentsConfig, name: str) -> None:
    whole, right = snapshot(mine.out), contents(mine.out)
    latents = mine.out / "latents"
    path = next(iter(sorted((latents / ".ledger").glob(name))), latents / name) if "/" not in name else latents / name
    for place in (0, path.stat().st_size // 3, path.stat().st_size // 2, path.stat().st_size - 2):
        if not path.exists():
            path = next(iter(sorted((latents / ".ledger").glob(name))))
        flip(path, min(place, path.stat().st_size - 1), 4)
        with pytest.raises(SdxlFlowsError):
            verify_latents(VerifyLatentsConfig(path=mine.out))
        try:
            verify_latents(VerifyLatentsConfig(path=mine.out, repair=True))
        except DataError as error:
            assert "again" in str(error)
            verify_latents(VerifyLatentsConfig(path=mine.out, repair=True))
        verify_latents(VerifyLatentsConfig(path=mine.out))
        assert contents(mine.out) == right
    assert json.loads(snapshot(mine.out)["meta_lat.json"]) == json.loads(whole["meta_lat.json"])


@pytest.mark.parametrize("gone", [("*.ledger.jsonl",), ("*.ledger.jsonl", "*.done.arrow"), ("*",)])
def test_latents_that_no_ledger_holds_any_more_are_found(mine: CacheLatentsConfig, gone: tuple[str, ...]) -> None:
    """Else nobody would look at what training reads."""
    right, folder = contents(mine.out), mine.out / "latents" / ".ledger"
    for path in (path for pattern in gone for path in folder.glob(pattern)):
        if path.name not in ("settings.json", "config.json"):
            path.unlink()
    with pytest.raises(ShardError, match="names 7 pictures whose latents no ledger holds"):
        verify_latents(VerifyLatentsConfig(path=mine.out))
    verify_latents(VerifyLatentsConfig(path=mine.out, repair=True))
    assert contents(mine.out) == right


def test_values_that_are_not_finite_are_found_though_all_checksums_fit(mine: CacheLatentsConfig) -> None:
    listing = sorted((mine.out / "latents" / ".ledger").glob("*.rows.arrow"))[0]
    ledger = ShardLedger.read(listing, ShardRows.open(listing).num_rows)
    file = ledger.files[0]
    path = mine.out / "latents" / file.path
    if mine.layout == "packed":
        packed = PackedFile(path)
        keys, records = packed.keys, [packed.row(row) for row in range(packed.num_rows)]
        records[-1] = with_nan(records[-1])
        written = write_packed(path, keys, records, mine.packed_dtype)
    else:
        keys, records = [file.path.removesuffix(".npz")], [with_nan(read_per_image(path))]
        written = write_per_image(path, records[0])
    rows = np.flatnonzero(ledger.columns["file"] == 0).tolist()
    bad = rows[-1:]
    assert len(rows) == len(keys)
    record_again(
        ledger, rows, LatentFile(file.path, written.num_bytes, path.stat().st_mtime_ns, written.crc32), written
    )
    with pytest.raises(ShardError, match="not finite" if mine.layout == "per_image" else "1 of its rows are damaged"):
        verify_latents(VerifyLatentsConfig(path=mine.out))
    findings = (mine.out / "latents" / ".ledger" / "verify.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in findings]
    assert [one["keys"] for one in found if one["file"] == file.path] == [
        ShardRows.open(listing).table["key"].take(bad).to_pylist()
    ]


def with_nan(record: LatentRecord) -> LatentRecord:
    latents = record.latents.copy()
    latents[0, 0, 0] = np.nan
    return dataclasses.replace(record, latents=latents)


def record_again(ledger: ShardLedger, rows: list[int], file: LatentFile, written: WrittenFile) -> None:
    """A line as if the rows had been committed with what was written now."""
    columns = {name: ledger.columns[name][rows].tolist() for name in ("at", "bucket", "size", "crop")}
    ledger.commit(
        CommitGroup(number=0, files=[file], rows=rows, file=[0] * len(rows), crc32=list(written.row_crc32s), **columns)
    )


def test_removed_pictures_are_gone_until_they_are_wanted_again(mine: CacheLatentsConfig) -> None:
    right = contents(mine.out)
    ref = remove_latents(RemoveLatentsConfig(path=mine.out, keys=["000", "deep/003", "unknown"]))
    assert (ref.num_removed, ref.num_unknown) == (2, 1)
    left = {key: value for key, value in right.items() if key not in ("000", "deep/003")}
    assert contents(mine.out) == left and list(json.loads((mine.out / "meta_lat.json").read_text())) == list(left)
    if mine.layout == "per_image":
        assert not (mine.out / "latents" / "000.npz").exists()
    rejected = [json.loads(line) for line in (mine.out / "rejected.jsonl").read_text().splitlines()]
    assert [(row["key"], row["reason"]) for row in rejected] == [("000", "removed"), ("deep/003", "removed")]
    assert verify_latents(VerifyLatentsConfig(path=mine.out)).num_rows == 5
    assert cache_latents(mine).num_kept == 7 and list(contents(mine.out)) == list(right)


def test_a_set_that_cannot_be_written_to_is_verified_all_the_same(mine: CacheLatentsConfig) -> None:
    path = mine.out / "latents" / ".ledger" / "verify.jsonl"

    def read_only(*_: Any, **__: Any) -> None:
        raise DataError(f"{path}: cannot be written (Read-only file system).")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "write_atomic", read_only)
        assert verify_latents(VerifyLatentsConfig(path=mine.out)).findings is None
        for victim in sorted((mine.out / "latents").rglob("*.npz")):
            flip(victim, 400)
        with pytest.raises(ShardError) as told:
            verify_latents(VerifyLatentsConfig(path=mine.out))
    assert all(victim.name in str(told.value) for victim in (mine.out / "latents").rglob("*.npz"))


def test_keys_to_remove_come_from_a_file_too(mine: CacheLatentsConfig, tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text("001\n002\n")
    assert remove_latents(RemoveLatentsConfig(path=mine.out, keys_file=tmp_path / "keys.txt")).num_removed == 2
    with pytest.raises(DataError, match="list of keys"):
        remove_latents(RemoveLatentsConfig(path=mine.out, keys_file=tmp_path / "none.txt"))


def test_what_is_no_latent_set_is_told(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="not a latent set of ours"):
            verify_latents(VerifyLatentsConfig(path=path))


def test_a_packed_file_in_the_place_of_another_is_found(mine: CacheLatentsConfig) -> None:
    files = sorted((mine.out / "latents").glob("packed/*/*.npz"))
    for one, other in ((one, other) for one in files for other in files if one != other):
        data, status = one.read_bytes(), one.stat()
        shutil.copyfile(other, one)
        with pytest.raises(ShardError, match=one.name):
            verify_latents(VerifyLatentsConfig(path=mine.out))
        one.write_bytes(data)
        os.utime(one, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_file_that_cannot_be_read_is_found(mine: CacheLatentsConfig) -> None:
    victim = sorted((mine.out / "latents").rglob("*.npz"))[0]
    victim.unlink()
    victim.symlink_to(victim.name)
    with pytest.raises(ShardError, match=victim.name):
        verify_latents(VerifyLatentsConfig(path=mine.out))


def test_a_repair_without_its_source_takes_nothing_out(mine: CacheLatentsConfig) -> None:
    flip(sorted((mine.out / "latents").rglob("*.npz"))[0], 400)
    path = mine.out / "latents" / ".ledger" / "config.json"
    path.write_text(mine.model_copy(update={"source": Path("elsewhere")}).model_dump_json())
    before = snapshot(mine.out / "latents")
    with pytest.raises(DataError, match=r"elsewhere: is not there, .*nothing was taken out"):
        verify_latents(VerifyLatentsConfig(path=mine.out, repair=True))
    after = snapshot(mine.out / "latents")
    assert {name: after[name] for name in after if "verify.jsonl" not in name} == before


def test_a_set_made_with_relative_paths_is_repaired_from_any_folder(make_job: Any, monkeypatch: Any) -> None:
    config = make_job(collection(5))
    folder = config.source.parent
    monkeypatch.chdir(folder)
    places = {name: getattr(config, name).relative_to(folder) for name in ("source", "metadata", "out")}
    cache_latents(config.model_copy(update=places))
    right = snapshot(config.out)
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    flip(config.out / "latents" / "001.npz", 400)
    ref = verify_latents(VerifyLatentsConfig(path=Path("../out"), repair=True))
    assert ref.num_repaired == 1 and snapshot(config.out) == right


def test_a_damaged_plan_is_found_wherever_it_is_damaged(mine: CacheLatentsConfig) -> None:
    for place in (300, -60):
        path = mine.out / "latents" / ".ledger" / "plan.arrow"
        flip(path, place)
        with pytest.raises(ShardError, match=r"plan\.arrow"):
            verify_latents(VerifyLatentsConfig(path=mine.out))
        verify_latents(VerifyLatentsConfig(path=mine.out, repair=True))
