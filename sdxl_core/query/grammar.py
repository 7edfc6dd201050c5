"""The query language, read by recursive descent.

    query  = any
    any    = all { "or" all }
    all    = { [ "and" ] term }            ~a ~b within it: at least one of them
    term   = [ "-" | "~" ] ( "(" any ")" | '"' tag '"' | name ":" value | tag )

A bracket groups where it stands alone (or behind "-"), since tags have brackets of their own: astolfo_(fate), :(
A word whose beginning is no field is a tag: re:zero. What stands in quotes is an exact tag: "id:invaded", "or", "*_*".
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, replace
from typing import NamedTuple, NoReturn

from sdxl_core.dataset.text import normalise_tag
from sdxl_core.errors import ConfigError
from sdxl_core.query import values
from sdxl_core.query.expressions import And, Everything, Expression, Not, Or, Query, Tag, Wildcard

_WORD = re.compile(r'(?P<sign>[-~]?+)(?:"(?P<quoted>[^"]*)"(?=\s|$)|(?P<plain>\S*))')
_LOST_OPENING = re.compile(r"\(\w")
_LOST_CLOSING = re.compile(r".*\w\)")
SETTINGS = ("limit", "random", "seed")


class Word(NamedTuple):
    """`kind`: ( ) or and quoted plain end.   `text`: without sign and quotes."""

    kind: str
    sign: str
    text: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class _Optional(Expression):
    """A term marked ~, until its group is closed."""

    part: Expression


def parse(text: str) -> Query:
    """Read a query. An empty one matches everything.

    Raises: ConfigError: what cannot be read, with its place and what was expected there.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _refused(
            text.encode("utf-8", "replace").decode(), error.start, error.start + 1, "this is no character", "UTF-8"
        ) from error
    reader = _Reader(text)
    where = reader.any()
    if reader.next.kind == ")":
        reader.fail("this bracket closes nothing", "a term, or nothing more")
    return Query(text, where, **{name: number for name, (number, _) in reader.settings.items()})


class _Reader:
    def __init__(self, text: str) -> None:
        self._text = text
        self._words = _words(text)
        self._place = 0
        self._depth = 0
        self.settings: dict[str, tuple[int, int]] = {}

    @property
    def next(self) -> Word:
        return self._words[self._place]

    def any(self) -> Expression:
        start = self.next.start
        parts = [self.all()]
        while self.next.kind == "or":
            if isinstance(parts[-1], Everything):
                self.fail('"or" needs a term on its left', "a tag, or name:value")
            self._place += 1
            parts.append(self.all())
            if isinstance(parts[-1], Everything):
                self.fail('"or" needs a term on its right', "a tag, or name:value")
        return parts[0] if len(parts) == 1 else Or(tuple(parts), start=start, stop=parts[-1].stop)

    def all(self) -> Expression:
        required: list[Expression] = []
        optional: list[_Optional] = []
        while self.next.kind not in ("end", ")", "or"):
            if self.next.kind == "and":
                if not (required or optional):
                    self.fail('"and" needs a term on its left', "a tag, or name:value")
                self._place += 1
                if self.next.kind in ("end", ")", "or", "and"):
                    self.fail('"and" needs a term on its right', "a tag, or name:value")
            word = self.next
            term = self.term()
            if isinstance(term, _Optional):
                optional.append(term)
            elif term is not None:
                required.append(term)
                if (term.part if isinstance(term, Not) else Not(term)) in required:
                    self.fail("this term is both wanted and unwanted, so nothing can match", "one of the two", at=word)
        if optional:
            parts = tuple(term.part for term in optional)
            either = Or(parts, start=optional[0].start, stop=optional[-1].stop)
            required.append(either if len(parts) > 1 else replace(parts[0], start=either.start))
        if not required:
            return Everything(start=self.next.start, stop=self.next.start)
        if len(required) == 1:
            return required[0]
        start, stop = min(part.start for part in required), max(part.stop for part in required)
        return And(tuple(required), start=start, stop=stop)

    def term(self) -> Expression | None:
        """One term; None for a setting such as limit:10, which is kept aside."""
        word = self.next
        self._place += 1
        inner = self._group(word) if word.kind == "(" else self._plain(word)
        if inner is None:
            return None
        if word.sign == "-":
            return Not(inner, start=word.start, stop=inner.stop)
        return _Optional(inner, start=word.start, stop=inner.stop) if word.sign == "~" else inner

    def _group(self, opening: Word) -> Expression:
        self._depth += 1
        inner = self.any()
        if self.next.kind != ")":
            self.fail("this bracket is never closed", ") standing alone", at=opening)
        if isinstance(inner, Everything):
            self.fail("there is nothing between the brackets", "a term")
        stop = self.next.stop
        self._place += 1
        self._depth -= 1
        return replace(inner, start=opening.start + len(opening.sign), stop=stop)

    def _plain(self, word: Word) -> Expression | None:
        place = {"start": word.start + len(word.sign), "stop": word.stop}
        if word.kind == "plain":
            name, colon, value = word.text.partition(":")
            if colon and name.lower() in SETTINGS:
                self._setting(word, name.lower(), value)
                return None
            if colon and name.lower() in values.NAMES:
                return replace(self._value(word, name.lower(), value), **place)
            if colon and name.lower() == "order":
                expected = "no order: pictures keep the catalog's; limit:10 keeps the first, random:10 draws"
                self.fail("order: is not known", expected, at=word)
            self._check_brackets(word)
        tag = normalise_tag(word.text)
        if not tag:
            self.fail("this names no tag", 'a tag, -tag for "not tag", or "tag with spaces"', at=word)
        if word.kind == "plain" and "*" in tag:
            return Wildcard(re.sub(r"\*+", "*", tag), **place)
        return Tag(tag, **place)

    def _value(self, word: Word, name: str, value: str) -> Expression:
        try:
            return values.read(name, value)
        except values.NotReadable as problem:
            at = word._replace(start=word.stop - len(value)) if value else word
            self.fail(f"{name}: cannot be {value!r}" if value else f"{name}: has no value", str(problem), at=at)

    def _setting(self, word: Word, name: str, value: str) -> None:
        if self._depth or word.sign:
            self.fail(f"{name}: is about the whole query", "it outside of brackets, without - or ~", at=word)
        if name in self.settings:
            self.fail(f"{name}: is said twice", "it once", at=word)
        if not (value.isascii() and value.isdecimal()) or int(value) >= 2**63:
            self.fail(f"{name}: cannot be {value!r}", "a whole number", at=word)
        self.settings[name] = int(value), word.start

    def _check_brackets(self, word: Word) -> None:
        """A word such as (pink_hair or blonde_hair) was meant to group."""
        if word.text.count("(") == word.text.count(")"):
            return
        if _LOST_OPENING.match(word.text) or (_LOST_CLOSING.fullmatch(word.text) and "(" not in word.text):
            expected = f'blanks around a bracket that groups: ( a or b ); a tag of that name in quotes: "{word.text}"'
            self.fail("a bracket that is not closed within this word", expected, at=word)

    def fail(self, problem: str, expected: str, *, at: Word | None = None) -> NoReturn:
        word = at or self.next
        raise _refused(self._text, word.start, word.stop, problem, expected)


def _refused(text: str, start: int, stop: int, problem: str, expected: str) -> ConfigError:
    """The error, with marks below the characters [start, stop) where they stand on a terminal."""
    line = "".join(" " if char.isspace() else char for char in text)
    place, marks = " " * _columns(line[:start]), "^" * max(1, _columns(line[start:stop]))
    return ConfigError(f"query, character {start + 1}: {problem}. Expected {expected}.\n  {line}\n  {place}{marks}")


def _columns(text: str) -> int:
    """How many columns a terminal takes for a text."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def _words(text: str) -> list[Word]:
    words: list[Word] = []
    place = 0
    while place < len(text):
        if text[place].isspace():
            place += 1
            continue
        match = _WORD.match(text, place)
        assert match is not None  # any character that is no blank begins a word
        words.append(_word(match))
        place = match.end()
    words.append(Word("end", "", "", len(text), len(text)))
    return words


def _word(match: re.Match[str]) -> Word:
    start, stop = match.span()
    sign, quoted, plain = match["sign"], match["quoted"], match["plain"]
    if quoted is not None:
        return Word("quoted", sign, quoted, start, stop)
    if '"' in plain and plain.startswith('"'):
        expected = '"long hair" with both quotes and a blank behind; long_hair is the same'
        raise _refused(match.string, start, stop, "a quote that is not closed", expected)
    if plain in ("(", ")") and not (plain == ")" and sign):
        return Word(plain, sign, plain, start, stop)
    if not sign and plain.lower() in ("or", "and"):
        return Word(plain.lower(), "", plain, start, stop)
    return Word("plain", sign, plain, start, stop)
