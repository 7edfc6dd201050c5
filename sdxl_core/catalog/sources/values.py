"""Columns of a dump as the catalog stores them: whole columns at a time, no Python a row where nothing is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdxl_core.catalog.schema import RATING_CODES
from sdxl_core.dataset.text import MAX_TEXT_BYTES

Mask = np.ndarray[Any, np.dtype[np.bool_]]
Problems = dict[int, tuple[str, str]]  # row -> reason, detail

_WHOLE_NUMBER = r"^\s*[-+]?[0-9]{1,18}\s*$"


def integers(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """Whole numbers; null for what is none, or does not fit. Text and floating point (pandas' way to say null) too."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        fits = pc.fill_null(pc.match_substring_regex(array, _WHOLE_NUMBER), False)
        trimmed = pc.utf8_ltrim(pc.utf8_trim_whitespace(pc.if_else(fits, array, None)), "+")
        array = trimmed.cast(pa.int64())
    elif pa.types.is_floating(array.type) or pa.types.is_decimal(array.type):
        values = array.cast(pa.float64())
        whole = pc.and_(pc.equal(values, pc.trunc(values)), pc.less(pc.abs(values), 2.0**53))
        array = pc.if_else(whole, values, None).cast(pa.int64())
    elif not (pa.types.is_integer(array.type) or pa.types.is_boolean(array.type)):
        return pa.nulls(len(array), kind)
    if pa.types.is_uint64(array.type):
        array = pc.if_else(pc.less_equal(array, pa.scalar(2**63 - 1, pa.uint64())), array, None)
    values = array.cast(pa.int64())
    if kind.bit_width < 64:
        top = 2 ** (kind.bit_width - 1)
        values = pc.if_else(pc.and_(pc.greater_equal(values, -top), pc.less(values, top)), values, None)
    return values.cast(kind)


def rating_codes(array: pa.Array) -> pa.Array:
    """Positions in RATINGS (uint8), null where the word is none of a rating's. Of a list the first word counts."""
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        filled = pc.greater(pc.list_value_length(array), 0)
        array = pc.list_element(pc.if_else(filled, array, pa.scalar([None], array.type)), 0)
    words = pc.utf8_lower(pc.utf8_trim_whitespace(as_text(array)[0])).dictionary_encode()
    codes = pa.array([RATING_CODES.get(word) or None for word in words.dictionary.to_pylist()], pa.uint8())
    return codes.take(words.indices)


def as_text(array: pa.Array) -> tuple[pa.Array, Problems]:
    """Valid UTF-8 without NUL bytes, at most 1 MB each; null for the others, which are told."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if not _is_text(array.type):
        array = pa.nulls(len(array), pa.string()) if pa.types.is_nested(array.type) else array.cast(pa.string())
    try:
        text = array.cast(pa.large_string())
        text.validate(full=True)
    except pa.ArrowInvalid:
        return _one_by_one(array)
    offsets, data = text_buffers(text)
    if len(data) and (data.min() == 0 or np.diff(offsets).max() > MAX_TEXT_BYTES):
        return _one_by_one(array)
    return text, {}


def text_buffers(text: pa.Array) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Offsets (int64 [rows + 1], from 0) and the bytes of a large_string array."""
    offsets = np.frombuffer(text.buffers()[1], np.int64)[text.offset : text.offset + len(text) + 1]
    if not len(text) or offsets[0] == offsets[-1]:
        return np.zeros(len(text) + 1, np.int64), np.zeros(0, np.uint8)
    return offsets - offsets[0], np.frombuffer(text.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]


def separated_tags(array: pa.Array, *, commas: bool) -> tuple[pa.Array, Problems]:
    """Lists of tags from text that separates them by spaces or, with `commas` and where a comma is, by commas."""
    text, problems = as_text(array)
    if commas:
        by_comma = pc.match_substring(text, ",")
        if pc.any(by_comma).as_py():
            lists = pc.split_pattern(text, ",")
            by_space = pc.split_pattern(_spaces(text), " ")
            mixed = pc.if_else(by_comma, lists, by_space)
            return clean_lists(mixed)[0], problems
    return _without_empty(pc.split_pattern(_spaces(text), " ")), problems


def clean_lists(array: pa.Array) -> tuple[pa.Array, Problems]:
    """Lists of tags, each stripped, without nulls and empty ones."""
    if not (pa.types.is_list(array.type) or pa.types.is_large_list(array.type)):
        array = array.cast(pa.list_(array.type.value_type))
    lengths = np.asarray(pc.fill_null(pc.list_value_length(array), 0)).astype(np.int64)
    values, wrong = as_text(array.flatten())
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rows = {int(np.searchsorted(offsets, place, "right")) - 1: reason for place, reason in wrong.items()}
    trimmed = pc.fill_null(pc.utf8_trim_whitespace(values), "")
    mask = array.is_null() if array.null_count else None
    return _without_empty(pa.LargeListArray.from_arrays(pa.array(offsets), trimmed, mask=mask)), rows


def one_line(array: pa.Array) -> tuple[pa.Array, Problems]:
    """Sentences: stripped, line breaks become spaces, null where nothing is left."""
    text, problems = as_text(array)
    _, data = text_buffers(text)
    if len(data) and data.min() < ord(" "):
        text = pc.replace_substring_regex(text, r"\s*[\r\n]\s*", " ")
    text = pc.utf8_trim_whitespace(text)
    return pc.if_else(pc.equal(text, ""), None, text), problems


def _spaces(text: pa.Array) -> pa.Array:
    """Any white space as one space."""
    _, data = text_buffers(text)
    if len(data) and data.min() < ord(" "):
        return pc.replace_substring_regex(text, r"\s+", " ")
    return text


def _without_empty(lists: pa.Array) -> pa.Array:
    """Lists of text (int32 offsets) without "" in them; a null list stays null."""
    values = lists.flatten()
    lengths = np.asarray(pc.fill_null(pc.list_value_length(lists), 0)).astype(np.int64)
    filled = np.asarray(pc.binary_length(values)) > 0
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    if not filled.all():
        kept = np.concatenate([[0], np.cumsum(filled)])
        values, offsets = values.filter(pa.array(filled)), kept[offsets]
    mask = lists.is_null() if lists.null_count else None
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values, mask=mask)


def _one_by_one(array: pa.Array) -> tuple[pa.Array, Problems]:
    """The slow way, taken only where something in the column is wrong."""
    binary = pa.large_binary() if array.type in (pa.large_string(), pa.large_binary()) else pa.binary()
    texts: list[str | None] = []
    problems: Problems = {}
    checks: tuple[tuple[Callable[[bytes], bool], str, str], ...] = (
        (lambda data: len(data) > MAX_TEXT_BYTES, "text_too_long", f"a text of it is over {MAX_TEXT_BYTES} bytes"),
        (lambda data: b"\0" in data, "unreadable_text", "a text of it holds NUL bytes"),
    )  # fmt: skip
    raw = array if array.type == binary else array.view(binary)
    for row, data in enumerate(raw.to_pylist()):
        texts.append(None)
        for is_wrong, reason, detail in checks:
            if data is not None and is_wrong(data):
                problems[row] = (reason, detail)
                break
        else:
            try:
                texts[-1] = data if data is None else data.decode()
            except UnicodeDecodeError as error:
                detail = f"a text of it is not UTF-8 ({error.reason} at byte {error.start})"
                problems[row] = ("unreadable_text", detail)
    return pa.array(texts, pa.large_string()), problems


def _is_text(kind: pa.DataType) -> bool:
    return kind in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())
