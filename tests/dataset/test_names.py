"""Many names held joined: the same names, in the order of path parts."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_core.dataset import names as names_module
from sdxl_core.dataset.listing import list_names
from sdxl_core.dataset.names import Names

parts = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=4)
paths = st.lists(parts, min_size=1, max_size=3).map("/".join)


@settings(deadline=None, max_examples=200)
@given(names=st.lists(paths, unique=True, max_size=30), few=st.sampled_from([0, 1 << 17]), chunk=st.integers(1, 9))
def test_they_are_sorted_by_parts_in_a_table_as_in_a_list(names: list[str], few: int, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(names_module, "FEW", few)
        patch.setattr(names_module, "NAMES_A_CHUNK", chunk)
        packed = Names.of(names)
        assert list(packed) == names and len(packed) == len(names)
        ordered = packed.in_order()
        assert list(ordered) == sorted(names, key=lambda name: name.split("/"))
        for start in range(0, len(names), 4):
            assert ordered.part(start, min(start + 4, len(names))) == list(ordered)[start : start + 4]
        for name in names:
            assert ordered.has_last_part(name.rpartition("/")[2])
        assert not ordered.has_last_part("longer than all")


@pytest.mark.parametrize("files", [[".png", ".png.png"], [".png", ".png.jpg"], ["a/.webp", "a/.webp.webp", "b.webp"]])
def test_a_hidden_name_that_is_all_extension_shares_its_key(tmp_path: Path, files: list[str]) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    listing = list_names(tmp_path, recursive=True, stage="test")
    assert [(row.key, row.reason) for row in listing.rejected] == [(files[1], "duplicate_key")]
    assert list(listing.names) == [name for name in files if name != files[1]]
