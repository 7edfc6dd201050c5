"""What stands behind the colon: ranges, lists, ratings."""

from __future__ import annotations

import re
from collections.abc import Callable

from sdxl_core.catalog.words import RATING_CODES
from sdxl_core.query.expressions import Expression, FileType, Has, Number, Presence, Range, Rating, Source, Values

_WHOLE = re.compile(r"[+-]?\d{1,18}")
_DECIMAL = re.compile(r"[+-]?(\d{1,18}(\.\d{0,9})?|\.\d{1,9})")
_SIZE = re.compile(r"(?P<number>\d{1,18}(\.\d{0,9})?)(?P<unit>b|kb|mb|gb|)", re.IGNORECASE)
_RATIO = re.compile(r"(?P<width>\d{1,9}(\.\d{0,9})?)[:/](?P<height>\d{1,9}(\.\d{0,9})?)")
_UNITS = {"": 1, "b": 1, "kb": 2**10, "mb": 2**20, "gb": 2**30}


class NotReadable(ValueError):
    """`str(error)`: what was expected."""


def read(name: str, value: str) -> Expression:
    """The condition `name:value`. Raises: NotReadable."""
    return NAMES[name](value)


def _numbers(number: Number, read_one: Callable[[str], float]) -> Callable[[str], Expression]:
    def read_range(value: str) -> Expression:
        for sign, build in _COMPARISONS.items():
            if value.startswith(sign):
                return build(number, read_one(value.removeprefix(sign)))
        low, dots, high = value.partition("..")
        if dots:
            if not (low or high):
                raise NotReadable("a number on one side of .. at least, such as 5..10, ..10 or 10..")
            bounds = (read_one(low) if low else None, read_one(high) if high else None)
            if bounds[0] is not None and bounds[1] is not None and bounds[0] > bounds[1]:
                raise NotReadable(f"the smaller number first: {high}..{low}")
            return Range(number, *bounds)
        if "," in value:
            return Values(number, tuple(sorted({read_one(one) for one in value.split(",")})))
        one = read_one(value)
        return Range(number, one, one)

    return read_range


_COMPARISONS: dict[str, Callable[[Number, float], Range]] = {
    ">=": lambda number, bound: Range(number, bound, None),
    "<=": lambda number, bound: Range(number, None, bound),
    ">": lambda number, bound: Range(number, bound, None, low_included=False),
    "<": lambda number, bound: Range(number, None, bound, high_included=False),
}


def _whole(text: str) -> float:
    if not _WHOLE.fullmatch(text):
        raise NotReadable("a whole number, >=10, >10, <=10, <10, 5..10, ..10, 10.. or 1,2,3")
    return int(text)


def _decimal(text: str) -> float:
    if not _DECIMAL.fullmatch(text):
        raise NotReadable("a number such as 1.5, >=1.5, <1.5, 0.5..2 or 1,2")
    return float(text)


def _ratio(text: str) -> float:
    sides = _RATIO.fullmatch(text)
    if sides is None:
        return _decimal(text)
    if not float(sides["height"]):
        raise NotReadable("a height that is not 0")
    return float(sides["width"]) / float(sides["height"])


def _bytes(text: str) -> float:
    size = _SIZE.fullmatch(text)
    if size is None:
        raise NotReadable("a size such as 300kb, >=1mb or 100kb..2mb")
    unit = _UNITS[size["unit"].lower()]
    return int(size["number"]) * unit if size["number"].isdecimal() else int(float(size["number"]) * unit)


def _ratings(value: str) -> Expression:
    names = value.lower().split(",")
    if not all(name and name in RATING_CODES for name in names):
        raise NotReadable("g, s, q, e (general, sensitive, questionable, explicit), or several: g,s")
    return Rating(tuple(sorted({RATING_CODES[name] for name in names})))


def _file_types(value: str) -> Expression:
    endings = tuple(sorted({ending.lower().removeprefix(".") for ending in value.split(",")}))
    if any(not ending or "." in ending for ending in endings):
        raise NotReadable("an ending such as png, or several: png,webp")
    return FileType(endings)


def _sources(value: str) -> Expression:
    prefixes = tuple(sorted({prefix if prefix.endswith("/") else f"{prefix}/" for prefix in value.split(",")}))
    if "/" in prefixes:
        raise NotReadable("a source's prefix such as danbooru, or several: danbooru,e621")
    return Source(prefixes)


def _has(value: str) -> Expression:
    present: dict[str, Presence] = {"tags": "tags", "caption": "caption", "image": "image"}
    if value not in present:
        raise NotReadable("tags, caption or image")
    return Has(present[value])


NAMES: dict[str, Callable[[str], Expression]] = {
    "id": _numbers("id", _whole),
    "score": _numbers("score", _whole),
    "favcount": _numbers("favcount", _whole),
    "width": _numbers("width", _whole),
    "height": _numbers("height", _whole),
    "tagcount": _numbers("tagcount", _whole),
    "mpixels": _numbers("mpixels", _decimal),
    "ratio": _numbers("ratio", _ratio),
    "filesize": _numbers("filesize", _bytes),
    "rating": _ratings,
    "filetype": _file_types,
    "source": _sources,
    "has": _has,
}
