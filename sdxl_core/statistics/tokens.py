"""How many CLIP tokens the texts of many records take, without tokenizing each list of tags.

CLIP divides a text at white space before anything else, so the tokens of "a, b, c" are those of "a,", "b," and "c",
each by itself. A tag's length is looked up once; a list's is a sum. That is exact, whatever the tags hold but line
breaks. Captions, and tag texts that are no plain list, go through the tokenizer one by one.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from sdxl_core.dataset.text import first_line
from sdxl_core.dataset.tokens import count_tokens

Ints = np.ndarray[Any, np.dtype[Any]]
NONE = -1  # there is no such text


class TagLengths:
    """Tokens of each tag of a vocabulary, counted when first asked for; 8 bytes a tag."""

    def __init__(self, tags: pa.StringArray) -> None:
        self._tags = tags
        self._within = np.full(len(tags), NONE, np.int32)  # with the comma that follows it
        self._last = np.full(len(tags), NONE, np.int32)

    def of_lists(self, lists: pa.ListArray) -> Ints:
        """Tokens of ", ".join(tags) of each list (int64 [num_lists]); NONE for null."""
        ids = lists.flatten().to_numpy()
        self._count(ids)
        lengths = np.asarray(lists.value_lengths().fill_null(0)).astype(np.int64)
        sums = np.concatenate([[0], np.cumsum(self._within[ids], dtype=np.int64)])
        ends = np.cumsum(lengths)
        tokens: Ints = sums[ends] - sums[ends - lengths]
        filled = np.flatnonzero(lengths)
        last = ids[ends[filled] - 1]
        tokens[filled] += self._last[last] - self._within[last]
        tokens[np.asarray(lists.is_null())] = NONE
        return tokens

    def _count(self, ids: Ints) -> None:
        seen = np.zeros(len(self._tags), bool)
        seen[ids] = True
        news = np.flatnonzero(seen & (self._last < 0))
        if len(news):
            names = self._tags.take(pa.array(news)).to_pylist()
            self._last[news] = [count_tokens(name) for name in names]
            self._within[news] = [count_tokens(f"{name},") for name in names]


def text_tokens(texts: pa.StringArray) -> tuple[Ints, Ints]:
    """Tokens of the first line of each text, and with a comma behind it (int64 [num_texts] each); NONE for null.

    A blank text has no tokens, and no comma.
    """
    alone = np.full(len(texts), NONE, np.int64)
    before_more = alone.copy()
    for number in np.flatnonzero(np.asarray(texts.is_valid())).tolist():
        line = first_line(texts[number].as_py())
        alone[number] = before_more[number] = count_tokens(line)
        if line:
            before_more[number] += _of_comma(line.rpartition(" ")[2])
    return alone, before_more


@lru_cache(100_000)
def _of_comma(word: str) -> int:
    """How many tokens a comma adds to a word: none where both become one, as "!," does."""
    return count_tokens(f"{word},") - count_tokens(word)


def record_tokens(table: pa.RecordBatch, lengths: TagLengths) -> dict[str, Ints]:
    """Tokens of each record's tags, caption, and `both` as they are trained on: "caption, tags". NONE: no such text.

    Args:   table: with tags, raw_tags, caption.
    """
    tags = lengths.of_lists(table["tags"])
    raw, _ = text_tokens(table["raw_tags"])
    tags = np.where(raw != NONE, raw, tags)
    caption, before_tags = text_tokens(table["caption"])
    before_tags = np.where(tags > 0, before_tags, caption)
    both = np.maximum(before_tags, 0) + np.maximum(tags, 0)
    both[(tags == NONE) & (caption == NONE)] = NONE
    return {"tags": tags, "caption": caption, "both": both}
