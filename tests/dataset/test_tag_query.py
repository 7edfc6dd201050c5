"""A query means exactly these tags; whatever cannot be meant is told."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_core.dataset.query import TagQuery
from sdxl_core.dataset.text import normalise_tag, parse_tags
from sdxl_core.errors import ConfigError


@pytest.mark.parametrize(
    ("query", "word"),
    [
        ("-", "'-'"),
        ("a - b", "'- b'"),
        ("a -a", "a is both"),
        ('"long hair" -long_hair', "long_hair is both"),
        ('""', "'\"\"' names no tag"),
        ('-""', "names no tag"),
        ("_", "'_' names no tag"),
        ('"long hair', "cannot read"),
        ('-"long hair', "cannot read"),
        ('a "b"c', "cannot read '\"b\"c'"),
    ],
)
def test_a_query_that_cannot_be_right_is_told_with_its_term(query: str, word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TagQuery.parse(query)
    assert word in str(caught.value) and repr(query) in str(caught.value)


@pytest.mark.parametrize(
    ("query", "wanted", "unwanted"),
    [
        ('-"long hair" "Pink Hair"', ["pink_hair"], ["long_hair"]),
        ('"-_-" >_<', ["-_-", ">_<"], []),
        ("  a\tb  ", ["a", "b"], []),
        ("--x", [], ["-x"]),
        (r"saber_\(fate\)", ["saber_(fate)"], []),
        ("it's #1 :\\", ["it's", "#1", ":\\"], []),
        ("", [], []),
    ],
)
def test_a_query_is_read_as_written(query: str, wanted: list[str], unwanted: list[str]) -> None:
    assert TagQuery.parse(query) == TagQuery(tuple(wanted), tuple(unwanted))


tags = st.text("abc_ ()-", min_size=1, max_size=6).map(normalise_tag).filter(bool)


@given(has=st.sets(tags), wanted=st.sets(tags), unwanted=st.sets(tags), with_spaces=st.booleans())
def test_a_query_means_all_of_these_and_none_of_those(
    has: set[str], wanted: set[str], unwanted: set[str], with_spaces: bool
) -> None:
    unwanted -= wanted
    terms = [f'"{tag}"' for tag in wanted] + [f'-"{tag}"' for tag in unwanted]
    query = TagQuery.parse(" ".join(term.replace("_", " ") if with_spaces else term for term in terms))
    assert query.matches(has) == (wanted <= has and not unwanted & has)


def test_tags_are_divided_by_commas_and_line_breaks() -> None:
    assert parse_tags("1girl, long hair,,\n blue eyes ,") == ["1girl", "long hair", "blue eyes"]


@pytest.mark.parametrize("spelling", ["Long Hair", "long_hair", " long  hair ", "LONG_hair"])
def test_spellings_of_one_tag_are_the_same(spelling: str) -> None:
    assert normalise_tag(spelling) == "long_hair"
