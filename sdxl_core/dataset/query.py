"""The tag query: exact tags, AND by space, -tag for NOT."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sdxl_core.dataset.text import normalise_tag
from sdxl_core.errors import ConfigError

_TERM = re.compile(r'(?P<sign>-?+)(?:"(?P<quoted>[^"]*)"(?!\S)|(?P<plain>[^"\s]\S*))')


@dataclass(frozen=True, slots=True)
class TagQuery:
    """`wanted`: normalised tags that must all be there; `unwanted`: tags none of which may be there."""

    wanted: tuple[str, ...]
    unwanted: tuple[str, ...]

    @classmethod
    def parse(cls, query: str) -> TagQuery:
        """Read a query such as `astolfo_(fate) -comic "long hair" -"short hair"`. An empty one matches everything.

        A tag that begins with "-" is written in quotes: `"-_-"`.
        Raises: ConfigError: an open quote, a lone "-", or a tag that is both wanted and unwanted.
        """
        terms: dict[bool, dict[str, None]] = {True: {}, False: {}}
        rest = query.strip()
        while rest:
            term = _TERM.match(rest)
            if term is None:
                raise ConfigError(
                    f'query {query!r}: cannot read {rest!r}. Write tag, -tag for "not tag", "long hair" or '
                    f'-"long hair" with both quotes; long_hair is the same as "long hair".'
                )
            tag = normalise_tag(term["plain"] if term["quoted"] is None else term["quoted"])
            if not tag:
                raise ConfigError(f'query {query!r}: {term[0]!r} names no tag. Write -tag for "not tag".')
            terms[not term["sign"]][tag] = None
            rest = rest[term.end() :].lstrip()
        both = terms[True].keys() & terms[False].keys()
        if both:
            raise ConfigError(f"query {query!r}: {min(both)} is both wanted and unwanted, so nothing can match.")
        return cls(tuple(terms[True]), tuple(terms[False]))

    def matches(self, tags: set[str]) -> bool:
        """Whether a picture with these normalised tags is picked."""
        return tags.issuperset(self.wanted) and tags.isdisjoint(self.unwanted)
