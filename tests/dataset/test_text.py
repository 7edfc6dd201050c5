"""What a text of tags says."""

import pytest

from sdxl_core.dataset.text import normalise_tag, parse_tags


def test_tags_are_divided_by_commas_and_line_breaks() -> None:
    assert parse_tags("1girl, long hair,,\n blue eyes ,") == ["1girl", "long hair", "blue eyes"]


@pytest.mark.parametrize("spelling", ["Long Hair", "long_hair", " long  hair ", "LONG_hair"])
def test_spellings_of_one_tag_are_the_same(spelling: str) -> None:
    assert normalise_tag(spelling) == "long_hair"
