"""Latent sets in other forms: what they hold stays the same, bad files are refused, a kill costs nothing."""

import json
import os
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from support.latent_sets import collection, contents

from sdxl_core.config import (
    CompactLatentsConfig,
    ConvertLatentsConfig,
    ImportLatentsConfig,
    PackTarsConfig,
    RemoveLatentsConfig,
    VerifyLatentsConfig,
)
from sdxl_core.errors import ConfigError, DataError, ShardError
from sdxl_core.latents import LatentStore, encode
from sdxl_core.latents.cache import cache_latents
from sdxl_core.latents.convert import compact
from sdxl_core.latents.convert.compact import compact_latents
from sdxl_core.latents.convert.importing import import_latents
from sdxl_core.latents.convert.layouts import convert_latents
from sdxl_core.latents.convert.tars import pack_tars, tar_of
from sdxl_core.latents.formats import PackedFile
from sdxl_core.latents.index import LatentIndex
from sdxl_core.latents.ledger import LatentFile
from sdxl_core.latents.remove import remove_latents
from sdxl_core.latents.verify import verify_latents
from sdxl_core.rejected import read_rejected

SHAPES = [(3, 2), (2, 3), (4, 4)]


def arrays_of(number: int, *, flip: bool = True, mask: bool = True) -> dict[str, Any]:
    """What sd-scripts hands to np.savez for a picture."""
    rng = np.random.default_rng(number)
    height, width = SHAPES[number % 3]
    latents = {"latents": rng.normal(size=(4, height, width)).astype(np.float32)}
    sizes = {"original_size": np.array([700 + number, 1216]), "crop_ltrb": np.array([0.0, 1.5, 8.0, 7.25])}
    if flip:
        sizes["latents_flipped"] = rng.normal(size=(4, height, width)).astype(np.float32)
    if mask:
        alpha = rng.integers(0, 256, (8 * height, 8 * width)).astype(np.uint8)
        sizes["alpha_mask"] = alpha.astype(np.float32) / 255.0
    return latents | sizes


def sd_scripts_cache(folder: Path, num: int = 20, *, size_in_name: bool = False, **kinds: bool) -> list[str]:
    """Files as sd-scripts leaves them, some nested; meta_lat.json above. Returns the keys."""
    entries = {}
    for number in range(num):
        key = f"{'deep/' if number % 4 == 3 else ''}{number:03}"
        arrays = arrays_of(number, **kinds)
        path = folder / (f"{key}_{700 + number:04}x1216_sdxl.npz" if size_in_name else f"{key}.npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **arrays)
        height, width = SHAPES[number % 3]
        entries[key] = {"tags": f"tag {number}", "train_resolution": [8 * width, 8 * height]}
    (folder.parent / "meta_lat.json").write_text(json.dumps(entries, indent=2))
    return list(entries)


def imported(folder: Path, **options: Any) -> Any:
    return import_latents(
        ImportLatentsConfig(
            path=folder, metadata=folder.parent / "meta_lat.json", commit_size=6, shard_size=9, **options
        )
    )


def tree(folder: Path) -> dict[str, bytes]:
    """Every .npz below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.npz"))}


@pytest.mark.parametrize("size_in_name", [False, True])
def test_a_cache_of_sd_scripts_becomes_a_set_without_a_byte_changed(tmp_path: Path, size_in_name: bool) -> None:
    folder = tmp_path / "train_data"
    keys = sd_scripts_cache(folder, size_in_name=size_in_name)
    before, metadata = tree(folder), (tmp_path / "meta_lat.json").read_bytes()
    ref = imported(folder)
    assert (ref.num_rows, ref.num_rejected, ref.metadata) == (20, 0, tmp_path / "meta_lat.json")
    assert tree(folder) == before and (tmp_path / "meta_lat.json").read_bytes() == metadata
    store = LatentStore(folder)
    assert store.keys == tuple(keys)
    crc32s = LatentIndex.open(folder).take(range(20), ["crc32"])["crc32"].to_pylist()
    for number, key in enumerate(keys):
        record, expected = store.read(key), arrays_of(number)
        assert np.array_equal(record.latents, expected["latents"])
        assert record.latents_flipped is not None and record.alpha_mask is not None
        assert np.array_equal(record.latents_flipped, expected["latents_flipped"])
        assert np.array_equal(record.alpha_mask.astype(np.float32) / 255.0, expected["alpha_mask"])
        assert [record.original_width_px, record.original_height_px] == expected["original_size"].tolist()
        assert crc32s[number] == zlib.crc32(before[store.path(key).relative_to(folder).as_posix()])
    assert verify_latents(VerifyLatentsConfig(path=folder)).num_rows == 20
    assert imported(folder) == ref


def test_what_rots_in_an_imported_set_is_found_and_nothing_is_encoded_into_it(make_job: Any, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "latents"
    sd_scripts_cache(folder)
    imported(folder)
    for path in (folder / "002.npz", folder / "index.arrow"):
        whole = path.read_bytes()
        path.write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
        with pytest.raises(ShardError, match=rf"(?s)1 file not as written.*{path.name}.*import-latents again"):
            verify_latents(VerifyLatentsConfig(path=folder))
        with pytest.raises(DataError, match=r"was imported.*import-latents again"):
            verify_latents(VerifyLatentsConfig(path=folder, repair=True))
        path.write_bytes(whole)
    with pytest.raises(ConfigError, match=r"was imported.*another out folder"):
        cache_latents(make_job(collection(2)))


def test_without_metadata_every_file_is_taken(tmp_path: Path) -> None:
    folder = tmp_path / "latents"
    keys = sd_scripts_cache(folder)
    (tmp_path / "meta_lat.json").unlink()
    import_latents(ImportLatentsConfig(path=folder))
    assert sorted(LatentStore(folder).keys) == sorted(keys)
    told = json.loads((tmp_path / "meta_lat.json").read_bytes())
    assert told["deep/003"] == {"train_resolution": [16, 24]}


def test_bad_files_are_refused_with_the_reason_and_taken_once_they_are_whole(tmp_path: Path) -> None:
    folder = tmp_path / "latents"
    sd_scripts_cache(folder)
    whole = (folder / "000.npz").read_bytes()
    (folder / "000.npz").write_bytes(whole[:-9])
    nan = arrays_of(1)
    nan["latents"][0, 0, 0] = np.nan
    np.savez(folder / "001.npz", **nan)
    np.savez(folder / "002.npz", **arrays_of(0))
    flipped = bytearray((folder / "deep" / "003.npz").read_bytes())
    flipped[250] ^= 4
    (folder / "deep" / "003.npz").write_bytes(flipped)
    (folder / "004.npz").unlink()
    np.savez(folder / "005.npz", **arrays_of(5) | {"latents": arrays_of(5)["latents"].astype(np.float64)})
    np.savez(folder / "006.npz", **arrays_of(6) | {"latents": np.zeros((3, 3, 2), np.float32)})
    np.savez(folder / "deep" / "007.npz", **arrays_of(7) | {"alpha_mask": np.full((24, 16), 0.3, np.float32)})
    ref = imported(folder)
    reasons = {row.key: row.reason for row in read_rejected(tmp_path / "rejected.jsonl")}
    assert reasons == {
        "000": "bad_latents", "001": "nan_latent", "002": "wrong_shape", "deep/003": "bad_latents",
        "004": "missing_latents", "005": "bad_latents", "006": "bad_latents", "deep/007": "bad_latents",
    }  # fmt: skip
    assert ref.num_rows == 12 and ref.metadata == tmp_path / "meta_lat.imported.json"
    assert list(json.loads(ref.metadata.read_bytes())) == list(LatentStore(folder).keys)
    (folder / "000.npz").write_bytes(whole)
    assert imported(folder).num_rows == 13 and LatentStore(folder).has("000")
    (folder / "008.npz").write_bytes(whole)  # good, but not what was recorded
    assert imported(folder).num_rows == 12 and not LatentStore(folder).has("008")


def test_nothing_good_and_nothing_there_are_errors(tmp_path: Path) -> None:
    (tmp_path / "latents").mkdir()
    with pytest.raises(DataError, match=r"holds no \.npz"):
        import_latents(ImportLatentsConfig(path=tmp_path / "latents"))
    assert list(tmp_path.rglob("*")) == [tmp_path / "latents"], "a folder of anything else stays as it was"
    (tmp_path / "latents" / "a.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match="none of its 1 latents"):
        import_latents(ImportLatentsConfig(path=tmp_path / "latents"))
    with pytest.raises(ConfigError, match="no such folder"):
        import_latents(ImportLatentsConfig(path=tmp_path / "other"))


@pytest.mark.parametrize("naming", ["stem", "size"])
@pytest.mark.parametrize("kinds", [{}, {"flip": False, "mask": False}])
def test_there_and_back_is_the_same_byte_for_byte(tmp_path: Path, naming: Any, kinds: dict[str, bool]) -> None:
    folder = tmp_path / "given" / "latents"
    sd_scripts_cache(folder, size_in_name=naming == "size", **kinds)
    imported(folder)
    ref = convert_latents(ConvertLatentsConfig(path=folder, out=tmp_path / "packed", layout="packed"))
    assert ref.num_rows == 20 and ref.num_files < 20
    assert contents(tmp_path / "packed") == contents(tmp_path / "given")
    assert (tmp_path / "packed" / "meta_lat.json").read_bytes() == (folder.parent / "meta_lat.json").read_bytes()
    for path in (tmp_path / "packed" / "latents" / "packed").rglob("*.npz"):
        with np.load(path, allow_pickle=False) as plain:
            assert plain["latents"].dtype == np.float32 and len(plain["crc32"]) == len(plain["latents"])
    back = ConvertLatentsConfig(path=tmp_path / "packed", out=tmp_path / "back", layout="per_image", npz_naming=naming)
    convert_latents(back)
    for out in ("packed", "back"):
        verify_latents(VerifyLatentsConfig(path=tmp_path / out))
    names = {
        name.split("_")[0].removesuffix(".npz"): data for name, data in tree(tmp_path / "back" / "latents").items()
    }
    given = {name.split("_")[0].removesuffix(".npz"): data for name, data in tree(folder).items()}
    assert len(names) == 20 and sorted(names.values()) == sorted(given.values())


def test_half_precision_is_asked_for_and_lossless_from_then_on(tmp_path: Path) -> None:
    folder = tmp_path / "given" / "latents"
    keys = sd_scripts_cache(folder)
    imported(folder)
    half = ConvertLatentsConfig(path=folder, out=tmp_path / "half", layout="packed", packed_dtype="float16")
    convert_latents(half)
    store, given = LatentStore(tmp_path / "half" / "latents"), LatentStore(folder)
    for key in keys:
        assert np.array_equal(store.read(key).latents, given.read(key).latents.astype(np.float16))
    convert_latents(ConvertLatentsConfig(path=tmp_path / "half", out=tmp_path / "wide", layout="per_image"))
    convert_latents(
        ConvertLatentsConfig(path=tmp_path / "wide", out=tmp_path / "again", layout="packed", packed_dtype="float16")
    )
    assert contents(tmp_path / "again") == contents(tmp_path / "half")
    large = arrays_of(0)
    large["latents"][0, 0, 0] = 1e6
    np.savez(folder / "000.npz", **large)
    imported(folder)
    with pytest.raises(DataError, match="'000' reach 1e"):
        convert_latents(half.model_copy(update={"out": tmp_path / "too_large"}))


def test_a_conversion_continues_where_it_was_killed_and_refuses_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "given" / "latents"
    sd_scripts_cache(folder)
    imported(folder)
    calm = ConvertLatentsConfig(path=folder, out=tmp_path / "calm", layout="packed")
    convert_latents(calm)
    config = calm.model_copy(update={"out": tmp_path / "out"})
    replace, count = os.replace, 0

    def killed(source: Any, target: Any) -> None:
        nonlocal count
        count += 1
        if count == limit:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    for limit in (3, 6, 10, 15, 10_000):
        count = 0
        if limit == 10_000:
            convert_latents(config)
        else:
            with pytest.raises(KeyboardInterrupt):
                convert_latents(config)
    assert tree(tmp_path / "out") == tree(tmp_path / "calm") and contents(tmp_path / "out") == contents(folder.parent)
    data = bytearray((folder / "002.npz").read_bytes())
    data[300] ^= 1
    (folder / "002.npz").write_bytes(data)
    with pytest.raises(ShardError, match=r"002\.npz|not finished"):
        convert_latents(config.model_copy(update={"out": tmp_path / "other"}))
    with pytest.raises(ConfigError, match="is the set that is converted"):
        convert_latents(config.model_copy(update={"out": folder.parent}))
    with pytest.raises(ConfigError, match="other settings"):
        convert_latents(config.model_copy(update={"packed_dtype": "float16"}))


def test_a_lost_file_of_a_conversion_is_made_again_beside_those_of_its_group(tmp_path: Path) -> None:
    folder = tmp_path / "given" / "latents"
    sd_scripts_cache(folder)
    for number in range(0, 20, 2):  # half of the pictures have no mask
        np.savez(next(folder.rglob(f"{number:03}.npz")), **arrays_of(number, mask=False))
    import_latents(ImportLatentsConfig(path=folder))
    config = ConvertLatentsConfig(path=folder, out=tmp_path / "out", layout="packed")
    assert convert_latents(config).num_files == 6
    before = contents(tmp_path / "out")
    for path in sorted((tmp_path / "out").rglob("*.npz")):
        path.unlink()
        convert_latents(config)
        assert contents(tmp_path / "out") == before


def test_cache_latents_goes_on_with_a_converted_set(make_job: Any, tmp_path: Path, monkeypatch: Any) -> None:
    config = make_job(collection(9) | {"bad.png": b"no picture"}, commit_size=4, shard_size=6)
    ref = cache_latents(config)
    convert_latents(ConvertLatentsConfig(path=config.out, out=tmp_path / "packed", layout="packed"))
    changes = {"out": tmp_path / "packed", "layout": "packed", "packed_dtype": "float32"}
    with monkeypatch.context() as patch:
        patch.setattr(encode, "Engine", None)  # nothing is left to do
        again = cache_latents(config.model_copy(update=changes))
    assert (again.num_kept, again.num_rejected, again.buckets) == (ref.num_kept, ref.num_rejected, ref.buckets)
    assert contents(tmp_path / "packed") == contents(config.out)
    victim = sorted((tmp_path / "packed").rglob("*.npz"))[0]
    data = bytearray(victim.read_bytes())
    data[200] ^= 1
    victim.write_bytes(data)
    repaired = verify_latents(VerifyLatentsConfig(path=tmp_path / "packed", repair=True))
    assert repaired.num_repaired and contents(tmp_path / "packed") == contents(config.out)


def packed_set(tmp_path: Path, *, num: int = 40) -> Path:
    """A packed set of many small files, some rows of which are removed."""
    folder = tmp_path / "given" / "latents"
    sd_scripts_cache(folder, num)
    import_latents(
        ImportLatentsConfig(path=folder, metadata=folder.parent / "meta_lat.json", commit_size=5, shard_size=25)
    )
    convert_latents(ConvertLatentsConfig(path=folder, out=tmp_path / "set", layout="packed"))
    return tmp_path / "set"


def test_small_files_are_merged_and_the_latents_stay_the_same(tmp_path: Path) -> None:
    out = packed_set(tmp_path)
    before = contents(out)
    num_before = len(tree(out))
    ref = compact_latents(CompactLatentsConfig(path=out))
    assert ref.num_files == len(tree(out)) == 6 < num_before  # a file a bucket and shard
    assert contents(out) == before and ref.num_rows == 40
    verify_latents(VerifyLatentsConfig(path=out))
    again = tree(out)
    assert compact_latents(CompactLatentsConfig(path=out)) == ref and tree(out) == again


def test_no_merged_file_is_larger_than_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact, "MB", 2500)
    out = packed_set(tmp_path)
    before = contents(out)
    compact_latents(CompactLatentsConfig(path=out, file_mb=4))
    assert contents(out) == before
    assert all(len(data) <= 10_000 for data in tree(out).values())


def test_removed_rows_are_dropped(tmp_path: Path) -> None:
    out = packed_set(tmp_path)
    before = contents(out)
    gone = ["000", "deep/003", "012"]
    remove_latents(RemoveLatentsConfig(path=out, keys=gone))
    assert sum(PackedFile(path).num_rows for path in out.rglob("packed/*/*.npz")) == 40
    compact_latents(CompactLatentsConfig(path=out))
    kept = [key for path in out.rglob("packed/*/*.npz") for key in PackedFile(path).keys]
    assert sorted(kept) == sorted(set(before) - set(gone))


def test_a_compaction_killed_at_any_point_leaves_a_whole_set(tmp_path: Path) -> None:
    """Killed before every rename, sync and removal; what is left is read, and then continued until the next."""
    out = packed_set(tmp_path, num=30)
    before, kills = contents(out), 0
    while not compact_in_a_process_that_ends_at(out, step=kills % 40 + 1):
        kills += 1
        assert contents(out) == before, kills
    assert kills > 20 and contents(out) == before
    assert verify_latents(VerifyLatentsConfig(path=out)).num_files == len(tree(out)) == 6
    assert not list(out.rglob("*.partial"))


def compact_in_a_process_that_ends_at(out: Path, *, step: int) -> bool:
    """Whether it came to its end."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    steps = 0

    def stepping(function: Any) -> Any:
        def stepped(*args: Any, **options: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == step:
                os._exit(9)
            return function(*args, **options)

        return stepped

    for name in ("replace", "unlink", "fsync"):
        setattr(os, name, stepping(getattr(os, name)))
    compact_latents(CompactLatentsConfig(path=out))
    os._exit(0)


def test_files_of_one_picture_are_not_compacted(tmp_path: Path) -> None:
    folder = tmp_path / "latents"
    sd_scripts_cache(folder)
    imported(folder)
    with pytest.raises(ConfigError, match="convert-latents"):
        compact_latents(CompactLatentsConfig(path=folder))


def test_tars_hold_the_files_and_the_index_says_where(tmp_path: Path) -> None:
    folder = tmp_path / "latents"
    keys = sd_scripts_cache(folder)
    files = tree(folder)
    ref = pack_tars(PackTarsConfig(path=folder, out=tmp_path / "tars", num_tars=7))
    assert ref.num_rows == len(keys) and tar_of("deep/1003_0832x1216_sdxl.npz", 1000) == 3
    found = {}
    for path in sorted((tmp_path / "tars").glob("*.tar")):
        index = orjson.loads(path.with_suffix(".json").read_bytes())
        data = path.read_bytes()
        assert index["filesize"] == len(data)
        for name, place in index["files"].items():
            found[name] = data[place["offset"] : place["offset"] + place["size"]]
            assert tar_of(name, 7) == int(path.stem)
        with tarfile.open(path) as tar:
            assert {member.name: (member.offset_data, member.size) for member in tar} == {
                name: (place["offset"], place["size"]) for name, place in index["files"].items()
            }
    assert found == files
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "tars").iterdir()}
    assert pack_tars(PackTarsConfig(path=folder, out=tmp_path / "tars", num_tars=7)) == ref
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "tars").iterdir()} == times


def test_a_damaged_file_is_not_packed(tmp_path: Path) -> None:
    folder = tmp_path / "latents"
    sd_scripts_cache(folder)
    imported(folder)
    np.savez(folder / "002.npz", **arrays_of(5))
    with pytest.raises(ShardError, match=r"002\.npz: holds other bytes"):
        pack_tars(PackTarsConfig(path=folder, out=tmp_path / "tars"))
    (folder / "002.npz").write_bytes(b"PK\3\4")
    with pytest.raises(ShardError, match=r"002\.npz"):
        pack_tars(PackTarsConfig(path=folder, out=tmp_path / "tars"))


def test_a_packed_set_is_converted_before_it_goes_into_tars(tmp_path: Path) -> None:
    out = packed_set(tmp_path, num=6)
    with pytest.raises(ConfigError, match="convert-latents"):
        pack_tars(PackTarsConfig(path=out, out=tmp_path / "tars"))


def test_no_ledger_says_a_merged_file_before_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = packed_set(tmp_path, num=9)
    moved: list[LatentFile] = []
    move = compact.ShardLedger.move

    def watched(self: Any, files: Any, rows: Any, file: Any, at: Any) -> None:
        moved.extend(files)
        assert all((out / "latents" / one.path).stat().st_size == one.num_bytes for one in files)
        move(self, files, rows, file, at)

    monkeypatch.setattr(compact.ShardLedger, "move", watched)
    compact_latents(CompactLatentsConfig(path=out))
    assert moved
