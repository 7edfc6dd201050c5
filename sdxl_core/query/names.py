"""Which tags of a catalog a name or a pattern means, and which names are near one that is not there."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdxl_core.dataset.text import normalise_tag
from sdxl_core.query.expressions import Tag, Wildcard

Ints = np.ndarray[Any, np.dtype[Any]]
MAX_NAMES_COMPARED = 500  # near misses are looked for among this many names that share most pieces with the wrong one


@dataclass(frozen=True)
class TagNames:
    """All normalised names of a vocabulary, ascending (by UTF-8 bytes).

    Name i means the tags `ids[starts[i]:starts[i + 1]]`; `counts[i]`: the sum of their counts.
    """

    names: pa.StringArray
    starts: Ints
    ids: Ints
    counts: Ints

    @classmethod
    def of(cls, vocabulary: pa.RecordBatch) -> Self:
        """Normalise and sort the tags of a catalog's vocabulary."""
        encoded = normalised(vocabulary["tag"]).dictionary_encode()
        order = pc.array_sort_indices(encoded.dictionary).to_numpy()
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        place = rank[np.asarray(encoded.indices)] if len(vocabulary) else np.zeros(0, np.int64)
        starts = np.zeros(len(order) + 1, np.int64)
        np.cumsum(np.bincount(place, minlength=len(order)), out=starts[1:])
        counts = np.zeros(len(order), np.int64)
        np.add.at(counts, place, vocabulary["count"].to_numpy())
        return cls(encoded.dictionary.take(pa.array(order)), starts, np.argsort(place, kind="stable"), counts)

    def ids_of(self, term: Tag | Wildcard) -> Ints:
        """Ids of the tags that a term means (int64), none where no such tag is there."""
        places = self._exact(term.name) if isinstance(term, Tag) else self.places_of(term)
        pieces = [self.ids[self.starts[place] : self.starts[place + 1]] for place in places]
        return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)

    def places_of(self, term: Wildcard) -> Sequence[int]:
        """Places of the names that a pattern covers."""
        prefix, *pieces = term.pattern.split("*")
        begin = self._bisect(prefix)
        end = self._bisect(prefix + "\U0010ffff") if prefix else len(self.names)
        if pieces == [""]:
            return range(begin, end)
        names = self.names.slice(begin, end - begin)
        covered = np.asarray(pc.ends_with(names, pieces[-1])) if pieces[-1] else np.ones(len(names), bool)
        for piece in filter(None, pieces[:-1]):
            covered &= np.asarray(pc.match_substring(names, piece))
        places = np.flatnonzero(covered)
        if prefix or len(pieces) > 2 or (pieces[0] and pieces[-1]):  # their order, and that they do not overlap
            pattern = ".*".join(re.escape(piece) for piece in term.pattern.split("*"))
            exact = pc.match_substring_regex(names.take(pa.array(places)), f"(?s)^{pattern}$")
            places = places[np.asarray(exact)]
        return (places + begin).tolist()

    def near(self, name: str, *, most: int = 3) -> list[tuple[str, int]]:
        """Names that someone may have meant, with their counts, the likeliest first."""
        begin, end = self._bisect(name), self._bisect(name + "\U0010ffff")
        longer = np.arange(begin, end)
        alike = self._sharing_pieces(name)
        candidates = self.names.take(pa.array(alike)).to_pylist()
        close = difflib.get_close_matches(name, candidates, n=most, cutoff=0.75)
        found = {candidate: int(self.counts[alike[candidates.index(candidate)]]) for candidate in close}
        for place in longer[np.argsort(-self.counts[longer], kind="stable")][:most]:
            found.setdefault(self.names[int(place)].as_py(), int(self.counts[place]))
        return list(found.items())[:most]

    def _sharing_pieces(self, name: str) -> Ints:
        """Places of the names of a like length that share most runs of two or three characters, then most frequent."""
        lengths = np.asarray(pc.utf8_length(self.names))
        alike = np.flatnonzero(np.abs(lengths - len(name)) <= max(1, len(name) // 4))
        names = self.names.take(pa.array(alike))
        size = 3 if len(name) > 5 else 2
        shared = np.zeros(len(alike), np.int64)
        for piece in {name[start : start + size] for start in range(max(1, len(name) - size + 1))}:
            shared += np.asarray(pc.match_substring(names, piece))
        best = np.lexsort((-self.counts[alike], -shared))[:MAX_NAMES_COMPARED]
        places: Ints = alike[best[shared[best] > 0]]
        return places

    def _exact(self, name: str) -> Sequence[int]:
        place = self._bisect(name)
        return [place] if place < len(self.names) and self.names[place].as_py() == name else []

    def _bisect(self, name: str) -> int:
        """Place of the first name that is not below `name`."""
        wanted, low, high = name.encode("utf-8", "surrogatepass"), 0, len(self.names)
        while low < high:
            middle = (low + high) // 2
            if self.names[middle].as_py().encode() < wanted:
                low = middle + 1
            else:
                high = middle
        return low


def normalised(tags: pa.Array) -> pa.Array:
    """`normalise_tag` of a column; only what is not ASCII goes through Python."""
    plain = pc.string_is_ascii(tags)
    quick = pc.replace_substring_regex(pc.ascii_lower(tags), r"\\([()\[\]{}])", r"\1")
    quick = pc.utf8_trim(pc.replace_substring_regex(quick, r"[_\s\x0b\x1c-\x1f]+", "_"), "_")
    odd = pc.invert(plain)
    if not pc.any(odd).as_py():
        return quick
    slow = pa.array([normalise_tag(tag) for tag in tags.filter(odd).to_pylist()], pa.string())
    return pc.replace_with_mask(quick, odd, slow)
