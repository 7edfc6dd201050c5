"""The query language: what is read how, and where an error points."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_core.errors import ConfigError
from sdxl_core.query.expressions import And, Everything, Not, Or, Range, Rating, Tag, Values, Wildcard, walk
from sdxl_core.query.grammar import parse

A, B, C = Tag("a"), Tag("b"), Tag("c")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Everything()),
        ("   ", Everything()),
        ("a", A),
        ("a b", And((A, B))),
        ("a and b", And((A, B))),
        ("a or b c", Or((A, And((B, C))))),
        ("( a or b ) c", And((Or((A, B)), C))),
        ("~a ~b c", And((C, Or((A, B))))),
        ("~a", A),
        ("-a", Not(A)),
        ("-( a or b )", Not(Or((A, B)))),
        ("( ( a ) )", A),
        ("A", A),
        ('"long  hair"', Tag("long_hair")),
        ('-"or"', Not(Tag("or"))),
        ('"*"', Tag("*")),
        ('"-_-"', Tag("-_-")),
        ("astolfo_(fate)", Tag("astolfo_(fate)")),
        (r"astolfo_\(fate\)", Tag("astolfo_(fate)")),
        (":( >:( :)", And((Tag(":("), Tag(">:("), Tag(":)")))),
        ("(o)_(o)", Tag("(o)_(o)")),
        ("re:zero_kara", Tag("re:zero_kara")),
        ('"id:invaded"', Tag("id:invaded")),
        ('-"-_-" >_<', And((Not(Tag("-_-")), Tag(">_<")))),
        ("--x", Not(Tag("-x"))),
        ("it's #1 :\\", And((Tag("it's"), Tag("#1"), Tag(":\\")))),
        ("*_ears", Wildcard("*_ears")),
        ("a**b", Wildcard("a*b")),
        ("score:>=10", Range("score", 10, None)),
        ("score:>10", Range("score", 10, None, low_included=False)),
        ("score:<5", Range("score", None, 5, high_included=False)),
        ("id:5..10", Range("id", 5, 10)),
        ("id:7", Range("id", 7, 7)),
        ("id:3,1,3", Values("id", (1, 3))),
        ("ratio:16:9", Range("ratio", 16 / 9, 16 / 9)),
        ("filesize:<1.5kb", Range("filesize", None, 1536, high_included=False)),
        ("rating:g,Explicit", Rating((1, 4))),
        ("-rating:e", Not(Rating((4,)))),
    ],
)
def test_a_query_is_read(text: str, expected: object) -> None:
    assert parse(text).where == expected


def test_settings_are_about_the_whole_query() -> None:
    query = parse("a limit:10 random:5 seed:3")
    assert (query.where, query.limit, query.random, query.seed) == (A, 10, 5, 3)


@pytest.mark.parametrize(
    ("text", "character", "words"),
    [
        ("a ( b", 3, "never closed"),
        ("a )", 3, "closes nothing"),
        ("a ( )", 5, "nothing between"),
        ("a or", 5, "on its right"),
        ("or a", 1, "on its left"),
        ("a and", 6, "on its right"),
        ("a -", 3, "names no tag"),
        ('a "b', 3, "not closed"),
        ("score:abc", 7, "whole number"),
        ("a score:", 3, "no value"),
        ("score:..", 7, "one side"),
        ("score:9..2", 7, "smaller number first"),
        ("rating:x", 8, "g, s, q, e"),
        ("( limit:3 )", 3, "whole query"),
        ("-limit:3", 1, "whole query"),
        ("limit:3 limit:4", 9, "twice"),
        ("limit:many", 1, "whole number"),
        ("(pink_hair or blonde_hair)", 1, "blanks around a bracket"),
        ("x y)", 3, "blanks around a bracket"),
        ("has:everything", 5, "tags, caption or image"),
        ("a -a", 3, "both wanted and unwanted"),
        ('"long hair" b -long_hair', 15, "both wanted and unwanted"),
        ("-rating:e b rating:e", 13, "both wanted and unwanted"),
        ("a order:score", 3, "order: is not known"),
        ("a \udcff", 3, "no character"),
        ('a "b"c', 3, "not closed"),
        ('""', 1, "names no tag"),
        ("_", 1, "names no tag"),
        ("a - b", 3, "names no tag"),
    ],
)
def test_an_error_points_at_the_character_and_says_what_was_expected(text: str, character: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        parse(text)
    lines = str(error.value).split("\n")
    assert lines[0].startswith(f"query, character {character}:")
    assert "Expected" in lines[0]
    assert lines[-1].index("^") == character + 1


def test_the_mark_stands_below_its_character_where_characters_are_two_columns_wide() -> None:
    with pytest.raises(ConfigError) as error:
        parse("初音ミク\tscore:x")
    assert str(error.value).split("\n")[1:] == ["  初音ミク score:x", "  " + " " * 15 + "^"]


@settings(deadline=None)
@given(st.text(st.sampled_from('ab()-~":*,.<>=or and 1') | st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_text_is_read_or_refused_in_words(text: str) -> None:
    try:
        query = parse(text)
    except ConfigError as error:
        assert "query, character" in str(error)
    else:
        for part in walk(query.where):
            assert 0 <= part.start <= part.stop <= len(text)
