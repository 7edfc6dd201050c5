"""Lengths in tokens, added up tag by tag, are those that the tokenizer gives for the whole text."""

import numpy as np
import pyarrow as pa
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sdxl_core.dataset.text import first_line
from sdxl_core.dataset.tokens import count_tokens
from sdxl_core.statistics.tokens import NONE, TagLengths, record_tokens, text_tokens

tags = st.text(
    st.sampled_from("ab1_()!',.&;:<>|é狐 \u2028\x1c'st") | st.characters(exclude_characters="\n", codec="utf-8"),
    min_size=1,
    max_size=14,
).filter(str.strip)


@settings(deadline=None)
@given(st.lists(tags, min_size=1, max_size=6), st.lists(st.none() | st.lists(st.integers(0, 5), max_size=5)))
@example(["astolfo_(fate)", "^_^", "!", "don't", ":,(", "<|endoftext|>"], [[0, 1, 2, 3, 4, 5], [], None, [5]])
def test_a_list_of_tags_has_as_many_tokens_as_its_text(names: list[str], rows: list[list[int] | None]) -> None:
    rows = [row if row is None else [number % len(names) for number in row] for row in rows]
    lengths = TagLengths(pa.array(names, pa.string()))
    for _ in range(2):
        found = lengths.of_lists(pa.array(rows, pa.list_(pa.uint32())))
        assert found.tolist() == [
            NONE if row is None else count_tokens(", ".join(names[number] for number in row)) for row in rows
        ]


@settings(deadline=None)
@given(st.lists(st.none() | st.text(st.sampled_from("ab,.!' \n"), max_size=12)))
def test_a_comma_behind_a_text_is_counted_as_the_tokenizer_does(texts: list[str | None]) -> None:
    alone, before_more = text_tokens(pa.array(texts, pa.string()))
    lines = [None if text is None else first_line(text) for text in texts]
    assert alone.tolist() == [NONE if line is None else count_tokens(line) for line in lines]
    assert before_more.tolist() == [
        NONE if line is None else count_tokens(f"{line}, ".strip() if line else "") for line in lines
    ]


@settings(deadline=None)
@given(tags, st.lists(st.sampled_from("xyz"), max_size=3), st.none() | tags)
def test_caption_and_tags_are_measured_as_they_are_trained_on(caption: str, given_tags: list[str], raw: str) -> None:
    names = ["x", "y", "z"]
    table = pa.RecordBatch.from_arrays(
        [
            pa.array([[names.index(tag) for tag in given_tags]], pa.list_(pa.uint32())),
            pa.array([raw], pa.string()),
            pa.array([caption], pa.string()),
        ],
        names=["tags", "raw_tags", "caption"],
    )
    found = record_tokens(table, TagLengths(pa.array(names)))
    tag_text = ", ".join(given_tags) if raw is None else first_line(raw)
    both = ", ".join(part for part in (first_line(caption), tag_text) if part)
    assert found["tags"].tolist() == [count_tokens(tag_text)]
    assert found["both"].tolist() == [count_tokens(both)]


def test_a_long_vocabulary_is_only_tokenized_where_it_is_used() -> None:
    lengths = TagLengths(pa.array([f"tag_{number}" for number in range(1_000)]))
    lengths.of_lists(pa.array([[3, 5]], pa.list_(pa.uint32())))
    assert np.flatnonzero(lengths._last >= 0).tolist() == [3, 5]
