"""The ledger of a shard: later lines win, torn and damaged ones never count, and its summary says the same."""

import os
from pathlib import Path

import numpy as np
import pytest

from sdxl_core.latents.formats import crc32
from sdxl_core.latents.ledger import (
    KEPT,
    OPEN,
    REJECTED,
    REMOVED,
    CommitGroup,
    LatentFile,
    Rejection,
    ShardLedger,
    finished,
    read_summary,
)

ROWS = "shard.rows.arrow"


def group(latents: Path, number: int, rows: list[int], rejected: dict[int, Rejection] | None = None) -> CommitGroup:
    """A group with a file a row, written here."""
    files = []
    for row in rows:
        data = f"latents of {row}".encode()
        (latents / f"{row}.npz").write_bytes(data)
        mtime_ns = (latents / f"{row}.npz").stat().st_mtime_ns
        files.append(LatentFile(f"{row}.npz", len(data), mtime_ns, crc32(data)))
    return CommitGroup(
        number=number, files=files, rows=rows, file=list(range(len(rows))), at=[-1] * len(rows),
        crc32=[file.crc32 for file in files], bucket=[(64, 128)] * len(rows), size=[(60, 120)] * len(rows),
        crop=[(0.0, 1.5, 64.0, 126.5)] * len(rows), rejected=rejected or {}, notes=["halved"] if number else [],
    )  # fmt: skip


def ledger(latents: Path, num_rows: int = 6) -> ShardLedger:
    return ShardLedger.read(latents / ROWS, num_rows)


def whole(latents: Path) -> ShardLedger:
    """Rows 0 to 4 kept, 5 rejected, closed."""
    made = ledger(latents)
    made.commit(group(latents, 0, [0, 1, 2]))
    made.commit(group(latents, 1, [3, 4], {5: Rejection("undecodable", "cut", 2)}))
    made.close({"bound_by": "vae"})
    return made


def states(latents: Path) -> list[int]:
    return [int(state) for state in ledger(latents).columns["state"]]


def test_what_was_recorded_is_read_back(tmp_path: Path) -> None:
    assert not ledger(tmp_path).is_done and states(tmp_path) == [OPEN] * 6
    made, read = whole(tmp_path), ledger(tmp_path)
    assert read.is_done and read.rejected == {5: Rejection("undecodable", "cut", 2)} and read.notes == ["halved"]
    for name, column in made.columns.items():
        assert np.array_equal(column, read.columns[name]), name
    assert read.columns["crop"][4].tolist() == [0.0, 1.5, 64.0, 126.5]
    summary = finished(tmp_path / ROWS, tmp_path)
    assert summary is not None and (summary.num_kept, summary.num_rejected, summary.num_removed) == (5, 1, 0)
    assert summary.table()["state"].to_pylist() == [KEPT] * 5 + [REJECTED]
    assert summary.report == {"bound_by": "vae"} and summary.rejected == [(5, Rejection("undecodable", "cut", 2))]


def test_later_lines_win(tmp_path: Path) -> None:
    made = whole(tmp_path)
    made.lose([1])
    assert states(tmp_path) == [KEPT, OPEN, KEPT, KEPT, KEPT, REJECTED] and not ledger(tmp_path).is_done
    assert read_summary(tmp_path / ROWS) is None, "a summary older than its ledger does not count"
    made.commit(group(tmp_path, 0, [1]))
    made.remove([0, 5])
    assert states(tmp_path) == [REMOVED, KEPT, KEPT, KEPT, KEPT, REMOVED]
    assert ledger(tmp_path).is_done and ledger(tmp_path).rejected == {}
    (tmp_path / "packed.npz").write_bytes(b"12345")
    made.move([LatentFile("packed.npz", 5, 7, 8)], [2, 3], [0, 0], [0, 1])
    read = ledger(tmp_path)
    assert [read.files[number].path for number in read.columns["file"][[1, 2, 3, 4]]] == [
        "1.npz", "packed.npz", "packed.npz", "4.npz",
    ]  # fmt: skip
    assert read.columns["at"][:5].tolist() == [-1, -1, 0, 1, -1]


def test_a_ledger_cut_anywhere_loses_only_the_lines_it_lost(tmp_path: Path) -> None:
    whole(tmp_path)
    path = tmp_path / "shard.ledger.jsonl"
    data = path.read_bytes()
    ends = [place + 1 for place in range(len(data)) if data[place : place + 1] == b"\n"]
    expected = {0: [OPEN] * 6, 1: [KEPT] * 3 + [OPEN] * 3, 2: [KEPT] * 5 + [REJECTED], 3: [KEPT] * 5 + [REJECTED]}
    for length in range(len(data)):
        path.write_bytes(data[:length])
        num_lines = sum(end <= length for end in ends)
        assert states(tmp_path) == expected[num_lines], length
        assert not ledger(tmp_path).is_done and not ledger(tmp_path).is_damaged
    again = ledger(tmp_path)
    again.close({"bound_by": "read"})  # the torn line is cut off first
    assert ledger(tmp_path).is_done and not ledger(tmp_path).is_damaged


def test_a_flipped_byte_anywhere_is_a_damaged_line_never_another_record(tmp_path: Path) -> None:
    whole(tmp_path)
    path = tmp_path / "shard.ledger.jsonl"
    data = path.read_bytes()
    right = ledger(tmp_path)
    for place in range(len(data)):
        for bit in (1, 0x20):
            path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
            read = ledger(tmp_path)
            assert not read.is_done
            kept = read.rows(KEPT)
            for name in ("crc32", "bucket", "size", "crop"):
                assert np.array_equal(read.columns[name][kept], right.columns[name][kept]), (place, name)


@pytest.mark.parametrize("victim", ["2.npz", "3.npz"])
@pytest.mark.parametrize("damage", ["gone", "short", "same size, other time"])
def test_files_that_are_not_as_written_open_their_rows_again(tmp_path: Path, victim: str, damage: str) -> None:
    whole(tmp_path)
    path = tmp_path / victim
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + (b"" if damage == "short" else b"X"))
        os.utime(path, ns=(5, 5))
    assert finished(tmp_path / ROWS, tmp_path) is None
    read = ledger(tmp_path)
    read.settle(tmp_path)
    row = int(victim[0])
    assert states(tmp_path)[row] == OPEN and states(tmp_path).count(KEPT) == 4


def test_a_file_of_another_time_and_the_same_content_is_believed(tmp_path: Path) -> None:
    whole(tmp_path)
    os.utime(tmp_path / "2.npz", ns=(5, 5))
    assert finished(tmp_path / ROWS, tmp_path) is None
    read = ledger(tmp_path)
    read.settle(tmp_path)
    assert read.is_done and ledger(tmp_path).files[2].mtime_ns == 5
    read.summarise()
    assert finished(tmp_path / ROWS, tmp_path) is not None


def test_a_damaged_summary_is_not_believed(tmp_path: Path) -> None:
    whole(tmp_path)
    path = tmp_path / "shard.done.arrow"
    data = path.read_bytes()
    for place in range(0, len(data), 11):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        summary = read_summary(tmp_path / ROWS)
        if summary is not None:
            with pytest.raises(Exception, match=r"done\.arrow"):
                summary.table()
    path.write_bytes(b"")
    assert read_summary(tmp_path / ROWS) is None
