"""meta_cap_dd.json: byte-identical to what sd-scripts writes, whatever the shards."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.tag_folders import EXTENSIONS, NESTED, as_sd_scripts, make, merge, stems, texts

from sdxl_core.config import MergeTagsConfig
from sdxl_core.dataset.metadata import read_metadata
from sdxl_core.merge import folder as folder_module
from sdxl_core.merge import texts as texts_module
from sdxl_core.merge.plan import plan_merge


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


@pytest.mark.parametrize("num_shards", [1, 2, 6, 50])
def test_nested_folders_with_full_path_keys_give_the_bytes_of_sd_scripts(tmp_path: Path, num_shards: int) -> None:
    folder = make(tmp_path / "in", NESTED)
    (folder / "b" / "2.caption").write_text("A picture.\n")
    ref = merge(folder, tmp_path / "out.json", key_style="full_path", num_shards=num_shards)
    assert (tmp_path / "out.json").read_text() == as_sd_scripts(folder, full_path=True, recursive=True)
    assert (ref.num_seen, ref.num_kept, ref.num_empty) == (6, 6, 1)


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


def test_no_shard_grows_with_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "in", NESTED)
    monkeypatch.setattr(folder_module, "IMAGES_A_SHARD", 2)
    config = MergeTagsConfig(source=folder, out=tmp_path / "planned.json", num_shards=1, key_style="full_path")
    assert [shard.stop - shard.start for shard in plan_merge(config)] == [2, 2, 2]
    merge(folder, tmp_path / "out.json", num_shards=1, key_style="full_path")
    assert (tmp_path / "out.json").read_text() == as_sd_scripts(folder, full_path=True, recursive=True)


def test_relative_keys_name_the_path_below_the_source(tmp_path: Path) -> None:
    merge(make(tmp_path / "in", NESTED), tmp_path / "out.json")
    keys = list(read_metadata(tmp_path / "out.json"))
    assert keys == [".hidden", "1", "b/2", "b/a/3", "b/with.dots", "b-c/1"]


@pytest.mark.parametrize("spelling", ["in", "./in", "in/", "../{here}/in", "."])
def test_full_path_keys_are_spelled_as_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    source = make(tmp_path / "in", NESTED)
    monkeypatch.chdir(source if spelling == "." else tmp_path)
    given_path = Path(spelling.format(here=tmp_path.name))
    merge(given_path, tmp_path / "out.json", key_style="full_path")
    assert (tmp_path / "out.json").read_text() == as_sd_scripts(given_path, full_path=True, recursive=True)


def test_a_byte_order_mark_is_no_part_of_the_first_tag(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", {"a.png": "x"})
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbf1girl")
    merge(folder, tmp_path / "out.json")
    assert read_metadata(tmp_path / "out.json") == {"a": {"tags": "1girl"}}


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
