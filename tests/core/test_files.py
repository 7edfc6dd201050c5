"""Files exist whole or not at all."""

import errno
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sdxl_core import files
from sdxl_core.errors import DataError, DiskFullError
from sdxl_core.files import digest_of, disk_errors, sync_files, write_atomic
from sdxl_core.rejected import Rejected, count_reasons, read_rejected, update_rejected


def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "file.json"
    write_atomic(path, b"old")

    def pieces() -> Iterator[bytes]:
        yield b"new"
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        write_atomic(path, pieces())
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.json"]


def test_a_full_disk_says_that_finished_work_is_kept(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match="continues where it stopped"), disk_errors(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be written"), disk_errors(tmp_path / "x"):
        raise OSError(errno.EROFS, "Read-only file system")


def test_syncing_a_group_keeps_the_content(tmp_path: Path) -> None:
    paths = [tmp_path / name / "f" for name in "ab"]
    for path in paths:
        write_atomic(path, path.parent.name.encode(), sync=False)
    sync_files(paths)
    assert [path.read_bytes() for path in paths] == [b"a", b"b"]


def test_a_digest_cannot_run_its_parts_together() -> None:
    assert digest_of("ab", "c") != digest_of("a", "bc")


def test_a_stage_replaces_only_its_own_rejections(tmp_path: Path) -> None:
    path = tmp_path / "rejected.jsonl"
    row = Rejected(stage="merge", key="a", reason="no_caption", detail="a.txt is missing")
    update_rejected(path, "merge", [row])
    update_rejected(path, "latents", [Rejected(stage="latents", key="b", reason="undecodable", detail="cut")])
    update_rejected(path, "merge", [row, row])
    assert count_reasons(read_rejected(path)) == {"no_caption": 2, "undecodable": 1}
    update_rejected(path, "merge", [])
    assert [row.stage for row in read_rejected(path)] == ["latents"]


def test_unchanged_rejections_are_not_written_again_and_stages_keep_their_places(tmp_path: Path) -> None:
    path = tmp_path / "rejected.jsonl"
    rows = {stage: [Rejected(stage=stage, key="a", reason="no_caption", detail="x")] for stage in ("merge", "latents")}
    for stage in ("merge", "latents"):
        update_rejected(path, stage, rows[stage])
    before = path.stat().st_mtime_ns
    for stage in ("merge", "latents"):
        update_rejected(path, stage, rows[stage])
    assert path.stat().st_mtime_ns == before
    update_rejected(path, "merge", rows["merge"] * 2)
    assert [row.stage for row in read_rejected(path)] == ["merge", "merge", "latents"]


def test_a_damaged_list_of_rejections_is_told(tmp_path: Path) -> None:
    (tmp_path / "rejected.jsonl").write_bytes(b'{"stage": "merge", "ke')
    with pytest.raises(DataError, match=r"rejected\.jsonl: damaged"):
        read_rejected(tmp_path / "rejected.jsonl")


def test_stages_that_end_at_once_all_keep_their_rejections(tmp_path: Path) -> None:
    path = tmp_path / "rejected.jsonl"
    names = [f"stage{number}" for number in range(8)]

    def end(name: str) -> None:
        rows = [Rejected(stage=name, key=f"{name}{number}", reason="x", detail="") for number in range(50)]
        update_rejected(path, name, rows)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(end, names))
    assert {row.stage for row in read_rejected(path)} == set(names)
    assert len(read_rejected(path)) == 400


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_group_is_synced_whole_or_file_by_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_whole: bool
) -> None:
    paths = [tmp_path / folder / str(number) for folder in ("a", "b") for number in range(files.MANY_FILES)]
    for path in paths:
        write_atomic(path, b"data", sync=False)
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))
    monkeypatch.setattr(files, "WHOLE_SYNC", files.WHOLE_SYNC if is_whole else ())
    sync_files(paths)
    everything = {*map(str, paths), str(tmp_path / "a"), str(tmp_path / "b")}
    assert {*synced} == (set() if is_whole else everything)
    synced.clear()
    sync_files(paths[:2])
    assert synced == [*map(str, paths[:2]), str(tmp_path / "a")]
