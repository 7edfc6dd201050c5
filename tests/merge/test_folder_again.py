"""A merge that is run again: after a kill, a power cut, a change, in other processes; what comes out is the same."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.tag_folders import NESTED, as_sd_scripts, make, merge

from sdxl_core.config import MergeTagsConfig
from sdxl_core.dataset.metadata import read_metadata
from sdxl_core.errors import ShardError
from sdxl_core.merge.join import join_shards
from sdxl_core.merge.plan import merge_shard, merge_tags, plan_merge
from sdxl_core.merge.shards import shard_is_merged
from sdxl_core.rejected import read_rejected


def test_a_second_run_reads_no_text_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "in", NESTED)
    first = merge(folder, tmp_path / "out.json")
    work = tmp_path / ".out.json.work"  # its lock comes and goes

    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path != work}

    before = times()

    def no_reading(path: Path | str, states: object = None) -> str:
        raise AssertionError(f"read {path}")

    monkeypatch.setattr("sdxl_core.merge.texts.read_text", no_reading)
    monkeypatch.setattr("sdxl_core.merge.texts.read_plain_texts", no_reading)
    assert merge(folder, tmp_path / "out.json") == first
    assert times() == before


def test_a_changed_text_is_read_again_and_old_work_goes(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", {"a.png": "one", "b.png": "two"})
    merge(folder, tmp_path / "out.json", num_shards=2)
    (folder / "b.txt").write_text("changed")
    merge(folder, tmp_path / "out.json", num_shards=2)
    assert read_metadata(tmp_path / "out.json")["b"] == {"tags": "changed"}
    assert len(list((tmp_path / ".out.json.work").glob("*.fragment"))) == 2


def test_an_altered_output_is_written_again(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", {"a.png": "one"})
    merge(folder, tmp_path / "out.json")
    (tmp_path / "out.json").write_bytes((tmp_path / "out.json").read_bytes().replace(b"one", b"two"))
    merge(folder, tmp_path / "out.json")
    assert read_metadata(tmp_path / "out.json") == {"a": {"tags": "one"}}


def test_a_time_far_in_the_future_is_no_obstacle(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", {"a.png": "one", "b.png": "two"})
    os.utime(folder / "b.txt", (0, 10**10))  # the year 2286
    first = merge(folder, tmp_path / "out.json")
    assert first.num_kept == 2 and merge(folder, tmp_path / "out.json") == first


def test_a_text_that_could_not_be_read_is_tried_again_by_the_next_run(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", {"a.png": "one", "b.png": None})
    (folder / "b.txt").symlink_to("/proc/self/mem")  # a regular file whose first byte cannot be read
    ref = merge(folder, tmp_path / "out.json", num_shards=1)
    assert [row.reason for row in read_rejected(ref.rejected)] == ["unreadable_text"]
    assert not list((tmp_path / ".out.json.work").glob("*.result.json"))
    (folder / "b.txt").unlink()
    (folder / "b.txt").write_text("two")
    assert merge(folder, tmp_path / "out.json", num_shards=1).num_kept == 2


def test_a_merge_killed_anywhere_is_finished_by_the_next(tmp_path: Path) -> None:
    rng = random.Random(7)
    folder = make(tmp_path / "in", {f"{n:04}.png": f"tag {n}, 1girl" for n in range(1500)})
    expected = as_sd_scripts(folder, full_path=False, recursive=False)
    config = MergeTagsConfig(source=folder, out=tmp_path / "out.json", num_shards=40)
    code = (
        "import sys; from sdxl_core.config import MergeTagsConfig; from sdxl_core.merge.plan import merge_tags\n"
        "print('go', flush=True); merge_tags(MergeTagsConfig.model_validate_json(sys.argv[1]))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    for _ in range(8):
        with subprocess.Popen(
            [sys.executable, "-c", code, config.model_dump_json()], env=environment, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None and process.stdout.readline() == b"go\n"
            time.sleep(rng.uniform(0, 0.25))
            process.send_signal(signal.SIGKILL)
        if (tmp_path / "out.json").exists():
            assert (tmp_path / "out.json").read_text() == expected
    assert merge_tags(config).num_kept == 1500
    assert (tmp_path / "out.json").read_text() == expected
    assert len(plan_merge(config)) == 40
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out.json", ".out.json.work", "rejected.jsonl"}
    assert not list((tmp_path / ".out.json.work").glob(".*"))


@pytest.mark.parametrize("damage", [b"", b"{", None])
@pytest.mark.parametrize("kind", ["fragment", "result.json", "rejected.jsonl"])
def test_damaged_work_is_never_taken(tmp_path: Path, kind: str, damage: bytes | None) -> None:
    folder = make(tmp_path / "in", {"a.png": "one", "b.png": None})
    first = merge(folder, tmp_path / "out.json")
    expected = (tmp_path / "out.json").read_bytes()
    (path,) = [path for path in (tmp_path / ".out.json.work").glob(f"*.{kind}") if path.stat().st_size][-1:]
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage)
    (tmp_path / "out.json").unlink()
    with suppress(ShardError):
        merge(folder, tmp_path / "out.json")
    assert merge(folder, tmp_path / "out.json") == first
    assert (tmp_path / "out.json").read_bytes() == expected


def test_a_fragment_with_a_flipped_byte_is_told_and_redone(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", {"a.png": "one"})
    merge(folder, tmp_path / "out.json")
    expected = (tmp_path / "out.json").read_bytes()
    (fragment,) = (tmp_path / ".out.json.work").glob("*.fragment")
    fragment.write_bytes(fragment.read_bytes().replace(b"one", b"onf"))
    with pytest.raises(ShardError, match="run the same command again"):
        merge(folder, tmp_path / "out.json")
    assert (tmp_path / "out.json").read_bytes() == expected
    merge(folder, tmp_path / "out.json")
    assert (tmp_path / "out.json").read_bytes() == expected


@pytest.mark.parametrize("kind", ["fragment", "rejected.jsonl", "result.json"])
@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-1] + b"!", lambda data: bytes(len(data))])
def test_what_a_power_cut_tore_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, damage: Any
) -> None:
    folder = make(tmp_path / "in", {"a.png": "one", "b.png": None})
    first = merge(folder, tmp_path / "out.json", num_shards=1)
    expected = (tmp_path / "out.json").read_bytes()
    (path,) = (tmp_path / ".out.json.work").glob(f"*.{kind}")
    path.write_bytes(damage(path.read_bytes()))
    (tmp_path / "out.json").unlink()
    monkeypatch.setattr("sdxl_core.merge.shards.boot_id", lambda: "the next boot")
    assert merge(folder, tmp_path / "out.json", num_shards=1) == first
    assert (tmp_path / "out.json").read_bytes() == expected
    assert b"the next boot" in next((tmp_path / ".out.json.work").glob("*.result.json")).read_bytes()


ODD = {
    "plain.png": "1girl, solo",
    "empty.png": " \n",
    "none.png": None,
    "sub/folder.png": None,
    "nul.png": "1girl\0",
    "japanese.png": '日本, \U0001f600 \u2028 \x7f \x1f " \\ / é',
    "zero.png": "tag",
}


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("clean", [(), ("underscores",)])
def test_a_first_run_leaves_what_planning_and_merging_one_by_one_leave(
    tmp_path: Path, num_shards: int, clean: tuple[str, ...]
) -> None:
    folder = make(tmp_path / "in", ODD)
    (folder / "none.caption").write_text("A caption.")
    (folder / "nul.caption").write_bytes(b"\xff")
    (folder / "plain.caption").mkdir()
    options = {"num_shards": num_shards, "clean": clean}
    at_once = merge(folder, tmp_path / "a" / "out.json", **options)
    config = MergeTagsConfig(source=folder, out=tmp_path / "b" / "out.json", **options)
    one_by_one = join_shards(config, [merge_shard(shard, config) for shard in plan_merge(config)])
    assert (tmp_path / "a" / "out.json").read_bytes() == (tmp_path / "b" / "out.json").read_bytes()
    assert (at_once.parents, at_once.sha256) == (one_by_one.parents, one_by_one.sha256)
    assert read_rejected(at_once.rejected) == read_rejected(one_by_one.rejected)
    merged = config.model_copy(update={"out": tmp_path / "a" / "out.json"})
    assert all(shard_is_merged(shard, merged) for shard in plan_merge(merged))


SHARED = """
import os, sys
from pathlib import Path
from sdxl_core.config import MergeTagsConfig
from sdxl_core.dataset import forked
from sdxl_core.merge import plan

def work(item):
    if item == 3 and os.getpid() != parent:
        os.kill(os.getpid(), 9)
    return item * item, os.getpid()

parent = os.getpid()
results = list(forked.map_forked(work, range(8), count=2))
assert [square for square, _ in results] == [item * item for item in range(8)], results
pids = [pid for _, pid in results]
assert pids[1] != parent, "the first odd item was done by the child"
assert all(pids[item] == parent for item in (0, 2, 3, 4, 5, 6, 7)), "what the killed child left was done here"
assert all(pid != parent for _, pid in list(forked.map_forked(work, range(3), count=2, caller_works=False)))
results = list(forked.map_forked(work, range(6), count=2, caller_works=False))
assert [square for square, _ in results] == [item * item for item in range(6)], results
assert [pid == parent for _, pid in results] == [False, False, False, True, False, True], results
plan.MIN_IMAGES_A_PROCESS = 1
num_expected = min(2, len(os.sched_getaffinity(0)))
assert forked.num_processes(2) == num_expected

def noted(index, merge_part=plan.merge_part, **options):
    with open("workers.txt", "a") as file:
        file.write(f"{os.getpid()} ")
    return merge_part(index, **options)

plan.merge_part = noted
ref = plan.merge_tags(MergeTagsConfig(source=Path("in"), out=Path("forked.json"), num_shards=3))
assert ref.num_kept == 6
workers = set(Path("workers.txt").read_text().split())
assert len(workers) == num_expected, f"{num_expected} processes read the texts while the output is held, not {workers}"
assert num_expected == 1 or str(parent) not in workers
"""


def test_processes_share_the_work_and_a_killed_one_costs_nothing(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", NESTED)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SHARED], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    merge(folder, tmp_path / "serial.json", num_shards=1)
    assert (tmp_path / "forked.json").read_bytes() == (tmp_path / "serial.json").read_bytes()
