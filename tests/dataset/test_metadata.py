"""Reading metadata JSON: what is none is told, with the file, the entry and the command that makes it."""

from pathlib import Path

import pytest

from sdxl_core.dataset.metadata import read_metadata
from sdxl_core.errors import ConfigError, DataError


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


@pytest.mark.parametrize(("name", "command"), [("meta_cap_dd.json", "merge-tags"), ("meta_lat.json", "cache-latents")])
def test_the_command_that_makes_such_a_file_is_named(tmp_path: Path, name: str, command: str) -> None:
    with pytest.raises(ConfigError, match=f"`sdxl-flows {command}`"):
        read_metadata(tmp_path / name)
    (tmp_path / name).write_bytes(b'{"a": {"tags": "1gi')
    with pytest.raises(DataError, match=f"cut short.*`sdxl-flows {command}`"):
        read_metadata(tmp_path / name)
