"""Metadata JSONs joined into one: as if they had been one dictionary, unknown fields and all."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdxl_core.config import MergeJsonConfig
from sdxl_core.errors import ConfigError, DataError
from sdxl_core.merge import jsons
from sdxl_core.merge.jsons import merge_jsons
from sdxl_core.rejected import read_rejected
from sdxl_core.summary import describe

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.sampled_from(['\n  "', '},\n  "k": {', '"'])
entry = st.dictionaries(
    st.sampled_from(["tags", "caption", "mine"]),
    words | st.lists(st.integers(8, 9), min_size=2, max_size=2),
    max_size=3,
)
file_of_one = st.dictionaries(words | st.sampled_from("abcd"), entry, min_size=1, max_size=5)
layouts = st.sampled_from([{"indent": 2}, {"indent": 2}, {"indent": 2, "ensure_ascii": False}, {}, {"indent": 4}])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=st.lists(st.tuples(file_of_one, layouts), min_size=1, max_size=4), block_bytes=st.integers(1, 40))
def test_it_is_the_union_with_the_first_of_each_key(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: list[tuple[dict[str, Any], dict[str, Any]]],
    block_bytes: int,
) -> None:
    monkeypatch.setattr(jsons, "BLOCK_BYTES", block_bytes)
    paths = []
    expected: dict[str, Any] = {}
    for number, (content, layout) in enumerate(files):
        paths.append(tmp_path / f"{number}.json")
        paths[-1].write_text(json.dumps(content, **layout), "utf-8")
        expected = content | expected  # the first wins
    expected = {key: expected[key] for content, _ in files for key in content}
    ref = merge_jsons(MergeJsonConfig(sources=tuple(paths), out=tmp_path / "out.json"))
    assert json.loads((tmp_path / "out.json").read_text("utf-8")) == expected
    assert list(json.loads((tmp_path / "out.json").read_text("utf-8"))) == list(expected)
    if not any(layout.get("ensure_ascii") is False for _, layout in files):
        assert (tmp_path / "out.json").read_text() == json.dumps(expected, indent=2)
    assert ref.num_kept == len(expected)
    assert ref.num_seen == sum(len(content) for content, _ in files) == ref.num_kept + ref.num_rejected
    assert {row.reason for row in read_rejected(ref.rejected)} <= {"duplicate_key"}


def test_what_was_left_out_is_told_with_its_reason(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.json").write_text('{"1": {"tags": "x"}}')
    ref = merge_jsons(
        MergeJsonConfig(sources=(tmp_path / "a.json", tmp_path / "b.json"), out=tmp_path / "out" / "all.json")
    )
    assert "kept 1 of 2 pictures (1 rejected: 1 duplicate_key)" in describe(ref)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"a": 1}',
        b'{\n  "a": 1\n}',
        b'{\n  "a": {"tags": "x"\n}',
        b"\xff\xfe",
        b'{"a": {"score": NaN}}',
        b'{\n  "a": {"score": NaN}\n}',
        b'{"a": %s1%s}' % (b'{"b": ' * 3_000, b"}" * 3_000),
        b'{\n  "a": %s1%s\n}' % (b'{"b": ' * 3_000, b"}" * 3_000),
    ],
)
def test_what_is_no_metadata_is_told_and_nothing_is_written(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"k": {"tags": "x"}}, indent=2))
    (tmp_path / "b.json").write_bytes(content)
    with pytest.raises(DataError, match=r"b\.json"):
        merge_jsons(MergeJsonConfig(sources=(tmp_path / "a.json", tmp_path / "b.json"), out=tmp_path / "out.json"))
    assert not (tmp_path / "out.json").exists()


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = json.dumps({"a": {"tags": "x, y", "train_resolution": [64, 128]}, "b": {"caption": "z"}}, indent=2).encode()
    for length in range(1, len(whole)):
        (tmp_path / "cut.json").write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut\.json"):
            merge_jsons(MergeJsonConfig(sources=(tmp_path / "cut.json",), out=tmp_path / "out.json"))


def test_a_source_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file"):
        merge_jsons(MergeJsonConfig(sources=(tmp_path / "x.json",), out=tmp_path / "out.json"))


def test_a_join_killed_anywhere_leaves_no_half_file(tmp_path: Path) -> None:
    expected: dict[str, Any] = {}
    for number in range(4):
        content = {f"{number}/{n}": {"tags": "tag, " * 60} for n in range(12_000)}
        (tmp_path / f"{number}.json").write_text(json.dumps(content, indent=2))
        expected |= content
    config = MergeJsonConfig(sources=tuple(sorted(tmp_path.glob("?.json"))), out=tmp_path / "out" / "all.json")
    code = (
        "import sys; from sdxl_core.config import MergeJsonConfig; from sdxl_core.merge.jsons import merge_jsons\n"
        "print('go', flush=True); merge_jsons(MergeJsonConfig.model_validate_json(sys.argv[1]))"
    )
    argv = [sys.executable, "-c", code, config.model_dump_json()]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    whole, rng = json.dumps(expected, indent=2), random.Random(2)
    for _ in range(4):
        with subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, start_new_session=True) as process:
            assert process.stdout is not None and process.stdout.readline() == b"go\n"
            time.sleep(rng.uniform(0, 0.08))
            os.killpg(process.pid, signal.SIGKILL)
        assert not config.out.exists() or config.out.read_text() == whole
    merge_jsons(config)
    assert config.out.read_text() == whole
    assert {path.name for path in config.out.parent.iterdir()} == {"all.json", "rejected.jsonl"}
