"""What a query can say, as values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

Number = Literal["id", "score", "favcount", "width", "height", "mpixels", "ratio", "filesize", "tagcount"]
SIZES = ("width", "height", "mpixels", "ratio")
Presence = Literal["tags", "caption", "image"]


@dataclass(frozen=True, slots=True)
class Expression:
    """`start`, `stop`: where it stands in the query's text. Equal expressions may stand in several places."""

    start: int = field(default=0, compare=False, kw_only=True)
    stop: int = field(default=0, compare=False, kw_only=True)


@dataclass(frozen=True, slots=True)
class Everything(Expression):
    """No condition at all."""


@dataclass(frozen=True, slots=True)
class Tag(Expression):
    """Has this tag. `name`: normalised."""

    name: str


@dataclass(frozen=True, slots=True)
class Wildcard(Expression):
    """Has a tag of this pattern. `pattern`: normalised, `*` for any text."""

    pattern: str


@dataclass(frozen=True, slots=True)
class Range(Expression):
    """A number between bounds, None for no bound. A record without the number is never in it."""

    number: Number
    low: float | None
    high: float | None
    low_included: bool = True
    high_included: bool = True


@dataclass(frozen=True, slots=True)
class Values(Expression):
    """A number that is one of these."""

    number: Number
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Rating(Expression):
    """`codes`: positions in `schema.RATINGS`."""

    codes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FileType(Expression):
    """The picture's file ends in one of these, lower case without the dot."""

    endings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Source(Expression):
    """The key begins with one of these prefixes of sources."""

    prefixes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Has(Expression):
    """Something is there, be it empty."""

    what: Presence


@dataclass(frozen=True, slots=True)
class Not(Expression):
    part: Expression


@dataclass(frozen=True, slots=True)
class And(Expression):
    parts: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Or(Expression):
    parts: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Query:
    """`limit`: the first so many matches.   `random`: so many of the matches, drawn by `seed` and key."""

    text: str
    where: Expression
    limit: int | None = None
    random: int | None = None
    seed: int = 0


def walk(expression: Expression) -> Iterator[Expression]:
    """The expression and everything in it, outermost first, left to right."""
    yield expression
    if isinstance(expression, Not):
        yield from walk(expression.part)
    elif isinstance(expression, And | Or):
        for part in expression.parts:
            yield from walk(part)


def asks_for_size(expression: Expression) -> bool:
    """Whether it is itself a term about a picture's width and height."""
    return isinstance(expression, Range | Values) and expression.number in SIZES


def whatever_sizes(expression: Expression, *, hopeful: bool = True) -> Expression:
    """What is true wherever the expression may be, once sizes are known. `hopeful`: False within a negation."""
    if asks_for_size(expression):
        return Everything() if hopeful else Not(Everything())
    if isinstance(expression, Not):
        return replace(expression, part=whatever_sizes(expression.part, hopeful=not hopeful))
    if isinstance(expression, And | Or):
        return replace(expression, parts=tuple(whatever_sizes(part, hopeful=hopeful) for part in expression.parts))
    return expression
