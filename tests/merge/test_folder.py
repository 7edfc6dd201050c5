"""meta_cap_dd.json: byte-identical to what sd-scripts writes, whatever the shards; nothing vanishes."""

import json
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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdxl_core.config import MergeTagsConfig
from sdxl_core.dataset import text as text_module
from sdxl_core.dataset.metadata import read_metadata
from sdxl_core.errors import ConfigError, DataError, ShardError
from sdxl_core.merge import folder as folder_module
from sdxl_core.merge import texts as texts_module
from sdxl_core.merge.join import join_shards
from sdxl_core.merge.plan import merge_shard, merge_tags, plan_merge
from sdxl_core.merge.shards import shard_is_merged
from sdxl_core.refs import MetadataRef
from sdxl_core.rejected import read_rejected

EXTENSIONS = [".png", ".jpg", ".jpeg", ".webp", ".bmp"]


def as_sd_scripts(folder: Path, *, full_path: bool, recursive: bool) -> str:
    """The reference: captions merged first, then tags, one file at a time, dumped once (its documented behaviour)."""
    found: set[Path] = set()
    for extension in EXTENSIONS + [extension.upper() for extension in EXTENSIONS]:
        found.update(folder.rglob("*" + extension) if recursive else folder.glob("*" + extension))
    metadata: dict[str, dict[str, str]] = {}
    for field, extension in (("caption", ".caption"), ("tags", ".txt")):
        for image in sorted(found):
            source = image.with_suffix(extension)
            if source.exists():
                key = str(image) if full_path else image.stem
                metadata.setdefault(key, {})[field] = source.read_text("utf-8").strip()
    order = [str(image) if full_path else image.stem for image in sorted(found)]
    return json.dumps({key: metadata[key] for key in order if key in metadata}, indent=2)


def make(folder: Path, files: dict[str, str | None]) -> Path:
    """Pictures (never opened by merging) and their texts; None: a picture without text."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"picture")
        if text is not None:
            path.with_suffix(".txt").write_bytes(text.encode())
    return folder


def merge(folder: Path, out: Path, **options: Any) -> MetadataRef:
    return merge_tags(MergeTagsConfig(source=folder, out=out, **options))


names = st.text(
    st.characters(codec="utf-8", exclude_characters="/\0", exclude_categories=["Cc"]), min_size=1, max_size=12
)
stems = names.filter(lambda name: name not in (".", "..") and len(name.encode()) < 100 and name == name.strip("."))
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0\ufeff"), max_size=40)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    collection=st.dictionaries(stems, st.tuples(st.sampled_from(EXTENSIONS), texts), min_size=1, max_size=12),
    num_shards=st.integers(1, 5),
    full_path=st.booleans(),
)
def test_a_flat_folder_gives_the_bytes_of_sd_scripts(
    tmp_path_factory: pytest.TempPathFactory,
    collection: dict[str, tuple[str, str]],
    num_shards: int,
    full_path: bool,
) -> None:
    folder = tmp_path_factory.mktemp("flat")
    make(folder / "in", {stem + extension: text for stem, (extension, text) in collection.items()})
    options = {"key_style": "full_path" if full_path else "relative", "recursive": False, "num_shards": num_shards}
    merge(folder / "in", folder / "out.json", **options)
    expected = as_sd_scripts(folder / "in", full_path=full_path, recursive=False)
    assert (folder / "out.json").read_bytes() == expected.encode("ascii")


NESTED = {
    "b/2.PNG": "tag with \"quotes\" and \\ backslash",
    "b-c/1.jpg": "日本語, ünïcode, \U0001f600",
    "b/a/3.webp": "line one\r\nline two\rline three\n",
    "1.png": "",
    ".hidden.png": "1girl",
    "b/with.dots.bmp": "  stripped  ",
}  # fmt: skip


@pytest.mark.parametrize("num_shards", [1, 2, 6, 50])
def test_nested_folders_with_full_path_keys_give_the_bytes_of_sd_scripts(tmp_path: Path, num_shards: int) -> None:
    folder = make(tmp_path / "in", NESTED)
    (folder / "b" / "2.caption").write_text("A picture.\n")
    ref = merge(folder, tmp_path / "out.json", key_style="full_path", num_shards=num_shards)
    assert (tmp_path / "out.json").read_text() == as_sd_scripts(folder, full_path=True, recursive=True)
    assert (ref.num_seen, ref.num_kept, ref.num_empty) == (6, 6, 1)


def test_relative_keys_name_the_path_below_the_source(tmp_path: Path) -> None:
    merge(make(tmp_path / "in", NESTED), tmp_path / "out.json")
    keys = list(read_metadata(tmp_path / "out.json"))
    assert keys == [".hidden", "1", "b/2", "b/a/3", "b/with.dots", "b-c/1"]


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


def test_a_byte_order_mark_is_no_part_of_the_first_tag(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", {"a.png": "x"})
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbf1girl")
    merge(folder, tmp_path / "out.json")
    assert read_metadata(tmp_path / "out.json") == {"a": {"tags": "1girl"}}


def test_empty_texts_are_kept_or_rejected_as_asked(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", {"a.png": "", "b.png": "1girl"})
    assert merge(folder, tmp_path / "keep.json").num_empty == 1
    ref = merge(folder, tmp_path / "reject.json", empty_tags="reject")
    assert (ref.num_kept, ref.num_rejected) == (1, 1)


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


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", {"a/1.png": "1girl"})
    (folder / "a" / "back").symlink_to(folder)
    assert merge(folder, tmp_path / "out.json").num_kept == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "holds a list"),
        (b"{}", "holds no picture"),
        (b'{"a": 3}', "entry of 'a' is int"),
        (b'{"a": {"tags": 3}}', "tags that is not a text"),
        (b'{"a": {"train_resolution": [3]}}', "train_resolution"),
        (b'{"a": {"train_resolution": [3, 0]}}', "train_resolution"),
        (b'{"a": {"train_resolution": [3, true]}}', "train_resolution"),
        (b'{"a": {"caption": null}}', "caption that is not a text"),
        (b"\x89PNG", "not valid JSON"),
    ],
)
def test_a_json_that_is_not_metadata_is_told(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "m.json").write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        read_metadata(tmp_path / "m.json")
    assert "m.json" in str(caught.value)


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


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    collection=st.dictionaries(
        st.lists(stems, min_size=1, max_size=3).map("/".join), st.tuples(texts, texts), min_size=1, max_size=10
    ),
    num_shards=st.integers(1, 5),
)
def test_nested_folders_with_captions_give_the_bytes_of_sd_scripts(
    tmp_path_factory: pytest.TempPathFactory, collection: dict[str, tuple[str, str]], num_shards: int
) -> None:
    folder = tmp_path_factory.mktemp("nested")
    for stem, (tags, caption) in collection.items():
        path = make(folder / "in", {f"{stem}-.png": tags}) / f"{stem}-.png"
        path.with_suffix(".caption").write_bytes(caption.encode())
    merge(folder / "in", folder / "out.json", key_style="full_path", num_shards=num_shards)
    assert (folder / "out.json").read_text() == as_sd_scripts(folder / "in", full_path=True, recursive=True)


@pytest.mark.parametrize("spelling", ["in", "./in", "in/", "../{here}/in", "."])
def test_full_path_keys_are_spelled_as_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    source = make(tmp_path / "in", NESTED)
    monkeypatch.chdir(source if spelling == "." else tmp_path)
    given_path = Path(spelling.format(here=tmp_path.name))
    merge(given_path, tmp_path / "out.json", key_style="full_path")
    assert (tmp_path / "out.json").read_text() == as_sd_scripts(given_path, full_path=True, recursive=True)


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


def test_an_altered_output_is_written_again(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", {"a.png": "one"})
    merge(folder, tmp_path / "out.json")
    (tmp_path / "out.json").write_bytes((tmp_path / "out.json").read_bytes().replace(b"one", b"two"))
    merge(folder, tmp_path / "out.json")
    assert read_metadata(tmp_path / "out.json") == {"a": {"tags": "one"}}


def test_a_text_that_could_not_be_read_is_tried_again_by_the_next_run(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", {"a.png": "one", "b.png": None})
    (folder / "b.txt").symlink_to("/proc/self/mem")  # a regular file whose first byte cannot be read
    ref = merge(folder, tmp_path / "out.json", num_shards=1)
    assert [row.reason for row in read_rejected(ref.rejected)] == ["unreadable_text"]
    assert not list((tmp_path / ".out.json.work").glob("*.result.json"))
    (folder / "b.txt").unlink()
    (folder / "b.txt").write_text("two")
    assert merge(folder, tmp_path / "out.json", num_shards=1).num_kept == 2


def test_an_out_that_cannot_be_is_told(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", {"a.png": "one"})
    with pytest.raises(ConfigError, match="this is a folder"):
        merge(folder, folder)
    with pytest.raises(ConfigError, match=r"a\.txt is a file, not a folder"):
        merge(folder, folder / "a.txt" / "deeper" / "out.json")


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


@pytest.mark.parametrize("name", ["a.png", "a.txt", "notes.json"])
def test_a_file_that_is_no_metadata_is_never_overwritten(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "in", {"a.png": "1girl"})
    (folder / "notes.json").write_text("[1]")
    before = (folder / name).read_bytes()
    with pytest.raises(ConfigError, match="not overwritten"):
        merge(folder, folder / name)
    assert (folder / name).read_bytes() == before


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


def test_every_character_is_written_as_json_writes_it(tmp_path: Path) -> None:
    characters = [chr(code) for code in [*range(1, 0x250), 0x2028, 0x2029, 0xFFFD, 0xFFFF, 0x10000, 0x1F600, 0x10FFFF]]
    folder = make(tmp_path / "in", {"a.png": "x" + "".join(characters).replace("\r", "") + "x", "b.png": "plain"})
    for character in characters:
        if character not in "/\r":
            make(folder, {f"{character}.png": character * 2})
    merge(folder, tmp_path / "out.json", recursive=False)
    assert (tmp_path / "out.json").read_text() == as_sd_scripts(folder, full_path=False, recursive=False)


@given(
    rows=st.lists(
        st.tuples(stems, st.text(st.characters(codec="utf-8"), min_size=1, max_size=9)), min_size=1, max_size=5
    )
)
def test_tags_alone_are_written_as_any_entries_are(rows: list[tuple[str, str]]) -> None:
    rows = list(dict(rows).items())
    assert folder_module.tags_text(rows) == folder_module.entries_text({key: {"tags": tags} for key, tags in rows})


def test_a_time_far_in_the_future_is_no_obstacle(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", {"a.png": "one", "b.png": "two"})
    os.utime(folder / "b.txt", (0, 10**10))  # the year 2286
    first = merge(folder, tmp_path / "out.json")
    assert first.num_kept == 2 and merge(folder, tmp_path / "out.json") == first


def test_only_regular_files_are_opened_as_texts(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", {"a.png": "one", "pipe.png": None, "folder.png": None, "gone.png": None})
    os.mkfifo(folder / "pipe.txt")  # opening it would wait for ever
    (folder / "folder.txt").mkdir()
    (folder / "gone.txt").symlink_to("nowhere")
    ref = merge(folder, tmp_path / "out.json")
    assert {row.key: row.reason for row in read_rejected(ref.rejected)} == dict.fromkeys(
        ["pipe", "folder", "gone"], "no_caption"
    )


@pytest.mark.parametrize("options", [{}, {"key_style": "full_path"}])
def test_files_that_are_asked_for_ahead_are_read_as_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str]
) -> None:
    folder = make(tmp_path / "in", {f"{n:03}.png": f"tag {n}" if n % 7 else None for n in range(90)})
    merge(folder, tmp_path / "warm.json", **options)
    monkeypatch.setattr(texts_module, "COLD_S", 0.0)
    monkeypatch.setattr(folder_module, "ENTRIES_A_WRITE", 4)
    asked: list[int] = []
    ask_for = os.posix_fadvise
    monkeypatch.setattr(os, "posix_fadvise", lambda *call: (asked.append(call[0]), ask_for(*call)))
    merge(folder, tmp_path / "cold.json", num_shards=2, **options)
    assert (tmp_path / "cold.json").read_bytes() == (tmp_path / "warm.json").read_bytes()
    assert len(asked) > 50


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
