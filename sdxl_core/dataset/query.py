"""The tag query: exact tags, AND by space, -tag for NOT."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from sdxl_core.dataset.text import normalise_tag
from sdxl_core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TagQuery:
    """`wanted`: normalised tags that must all be there; `unwanted`: tags none of which may be there."""

    wanted: tuple[str, ...]
    unwanted: tuple[str, ...]

    @classmethod
    def parse(cls, query: str) -> TagQuery:
        """Read a query such as `astolfo_(fate) -comic "long hair"`. An empty one matches everything.

        Raises: ConfigError: an open quote, a lone "-", or a tag that is both wanted and unwanted.
        """
        lexer = shlex.shlex(query, posix=False, punctuation_chars=False)
        lexer.whitespace_split, lexer.commenters, lexer.quotes = True, "", '"'
        try:
            words = list(lexer)
        except ValueError:
            raise ConfigError(f'query {query!r}: a quote is not closed. Write "long hair", or long_hair.') from None
        wanted: dict[str, None] = {}
        unwanted: dict[str, None] = {}
        for word in words:
            negated = word.startswith("-")
            tag = normalise_tag(word[negated:].strip('"'))
            if not tag:
                raise ConfigError(f'query {query!r}: {word!r} names no tag. Write -tag for "not tag".')
            (unwanted if negated else wanted)[tag] = None
        both = wanted.keys() & unwanted.keys()
        if both:
            raise ConfigError(f"query {query!r}: {min(both)} is both wanted and unwanted, so nothing can match.")
        return cls(tuple(wanted), tuple(unwanted))

    def matches(self, tags: set[str]) -> bool:
        """Whether a picture with these normalised tags is picked."""
        return tags.issuperset(self.wanted) and tags.isdisjoint(self.unwanted)
