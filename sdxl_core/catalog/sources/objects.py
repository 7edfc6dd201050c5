"""Rows that are JSON objects: entries of a metadata JSON, lines of a JSONL."""

from __future__ import annotations

import re
from typing import Any

import orjson
import pyarrow as pa

from sdxl_core.catalog.config import CatalogSource
from sdxl_core.catalog.parts import PartWriter, TagColumn
from sdxl_core.catalog.schema import CATEGORY_CODES, RATING_CODES, ROWS
from sdxl_core.catalog.sources.base import prefixed, rejected
from sdxl_core.catalog.sources.columns import FACT_NAMES, TAG_PREFIX
from sdxl_core.catalog.sources.keys import BadKey, picture_key
from sdxl_core.dataset.text import MAX_TEXT_BYTES, UnreadableText, parse_tags
from sdxl_core.rejected import Rejected

_BATCH = 8_192
_WHOLE_NUMBER = re.compile(r"\s*[-+]?[0-9]{1,18}\s*")
_KEY_NAMES = ("image_path", "file_name", "key", "id")  # of a line; the first that is there names the picture
_WORDS = {"tags", "caption", "train_resolution"}  # sd-scripts' metadata has no more
_NO_FACTS: dict[str, int | None] = dict.fromkeys(("id", *FACT_NAMES))
_CATEGORY_FIELDS = {f"{TAG_PREFIX}_{name}": code for name, code in CATEGORY_CODES.items() if name}

Tags = dict[int, list[str]]  # by category code


class BadRow(ValueError):
    """An object that cannot be used; `str(error)` says why."""


class Rows:
    """Takes objects, gives their rows to the writer, keeps the rejections."""

    def __init__(self, source: CatalogSource, writer: PartWriter) -> None:
        self._source, self._writer = source, writer
        self._ratings = {RATING_CODES[word] for word in source.ratings}
        self._rows: list[dict[str, Any]] = []
        self._left_out: list[str] = []  # keys of rows of other ratings
        self.refused: list[Rejected] = []

    def add(self, name: str | None, entry: object, *, place: str) -> None:
        """One picture. `name`: path or stem; None: the entry tells it.   `place`: for the rejection of one without."""
        try:
            if not isinstance(entry, dict):
                raise BadRow(f"an object was expected, it is {_kind(entry)}")
            name = _name_of(entry) if name is None else name
            key = picture_key(name, self._source.root_map)
            row: dict[str, Any] = {"key": key, **_facts(entry)}
            if self._ratings and row["rating"] not in self._ratings:
                self._left_out.append(key)
                return
            row["tags"], row["raw_tags"] = _tags(entry) if "tags" in self._source.use else (None, None)
            row["caption"] = _caption(entry, self._source.caption_columns)
        except BadKey as error:
            self.refuse(name or place, "bad_key", str(error))
        except UnreadableText as error:
            self.refuse(name or place, error.reason, str(error))
        except BadRow as error:
            self.refuse(name or place, "bad_row", str(error))
        else:
            self._rows.append(row)
            if len(self._rows) >= _BATCH:
                self.flush()

    def refuse(self, key: str, reason: str, detail: str) -> None:
        self.refused.append(rejected(self._source.prefix + key, reason, detail))

    def flush(self) -> None:
        """Give the writer what was taken."""
        if self._left_out:
            self._writer.leave_out(prefixed(self._source.prefix, pa.array(self._left_out, pa.string())))
            self._left_out = []
        rows, self._rows = self._rows, []
        if not rows:
            return
        columns = {
            name: pa.array([row[name] for row in rows], ROWS.field(name).type)
            for name in ("key", "id", *FACT_NAMES, "raw_tags", "caption")
        }
        columns["key"] = prefixed(self._source.prefix, columns["key"])
        codes = sorted({code for row in rows for code in row["tags"] or ()} or {0})
        lists = {code: [None if row["tags"] is None else row["tags"].get(code, ()) for row in rows] for code in codes}
        self._writer.add(columns, [TagColumn(code, pa.array(lists[code], pa.list_(pa.string()))) for code in codes])


def parsed(data: bytes) -> Any:
    """A JSON value. Raises: UnreadableText: not UTF-8.   BadRow: not JSON."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        try:
            data.decode()
        except UnicodeDecodeError as wrong:
            detail = f"it is not UTF-8 ({wrong.reason} at byte {wrong.start} of the row)"
            raise UnreadableText("unreadable_text", detail) from None
        raise BadRow(f"it is not valid JSON ({error})") from None


def _name_of(entry: dict[str, Any]) -> str:
    name = next((entry[field] for field in _KEY_NAMES if entry.get(field) is not None), None)
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise BadRow(f"none of {', '.join(_KEY_NAMES)} names its picture")
    return str(name)


def _facts(entry: dict[str, Any]) -> dict[str, int | None]:
    if entry.keys() <= _WORDS:
        return _NO_FACTS
    facts = {"id": _integer(entry.get("id"), 63)}
    for name, fields in FACT_NAMES.items():
        value = next((found for field in fields if (found := _at(entry, field)) is not None), None)
        facts[name] = _rating(value) if name == "rating" else _integer(value, 31)
    size = entry.get("image_size")
    if facts["width"] is None and isinstance(size, list) and len(size) == 2:
        facts["width"], facts["height"] = _integer(size[0], 31), _integer(size[1], 31)
    return facts


def _at(entry: dict[str, Any], field: str) -> Any:
    top, _, below = field.partition(".")
    value = entry.get(top)
    if below:
        return value.get(below) if isinstance(value, dict) else None
    return None if isinstance(value, dict) else value


def _integer(value: Any, bits: int) -> int | None:
    if isinstance(value, str) and _WHOLE_NUMBER.fullmatch(value):
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    fits = isinstance(value, int) and not isinstance(value, bool) and -(2**bits) <= value < 2**bits
    return value if fits else None


def _rating(value: Any) -> int | None:
    if isinstance(value, list):
        value = value[0] if value else None
    return RATING_CODES.get(value.strip().lower()) or None if isinstance(value, str) else None


def _tags(entry: dict[str, Any]) -> tuple[Tags | None, str | None]:
    """Tags by category, None where nothing is known of them; and their text as it stands, where that tells more."""
    by_category = {}
    if not entry.keys() <= _WORDS:
        by_category = {code: entry[name] for name, code in _CATEGORY_FIELDS.items() if entry.get(name) is not None}
    if by_category:
        return {code: _text(text, TAG_PREFIX).split() for code, text in by_category.items()}, None
    tags = entry.get("tags")
    if isinstance(tags, dict):
        found: Tags = {}
        for category, words in tags.items():
            found.setdefault(CATEGORY_CODES.get(category, 0), []).extend(_words(words))
        return found, None
    if isinstance(tags, list):
        return {0: _words(tags)}, None
    if tags is not None:
        text = _text(tags, "tags")
        words = parse_tags(text)
        return {0: words}, text if text != ", ".join(dict.fromkeys(words)) else None
    if entry.get(TAG_PREFIX) is not None:
        return {0: _text(entry[TAG_PREFIX], TAG_PREFIX).split()}, None
    return None, None


def _words(tags: Any) -> list[str]:
    if not isinstance(tags, list):
        raise BadRow(f"its tags: a list of texts was expected, it is {_kind(tags)}")
    return [word for tag in tags if tag is not None and (word := _text(tag, "tags").strip())]


def _caption(entry: dict[str, Any], names: tuple[str, ...]) -> str | None:
    parts = [_text(entry[name], name) for name in names if entry.get(name) is not None]
    return " ".join(part for part in parts if part) if parts else None


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"its {name}: text was expected, it is {_kind(value)}")
    if len(value) > MAX_TEXT_BYTES // 4 and len(value.encode()) > MAX_TEXT_BYTES:
        raise UnreadableText("text_too_long", f"its {name} is larger than {MAX_TEXT_BYTES} bytes")
    if "\0" in value:
        raise UnreadableText("unreadable_text", f"its {name} holds NUL bytes")
    return value


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
