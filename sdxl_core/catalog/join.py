"""Which rows make up each picture: rows of one key are one picture, whichever sources they come from.

The rule: a picture's bytes, its facts, its tags and its caption each come from the first source, in the order listed,
that has them, and within it from its first row that has them: so the text of a picture may stand in another tar of the
source. A further row of a key that adds nothing to what its source has told is rejected as `duplicate_key`.

What any source's `ratings` leave out is no picture at all: none of its rows is used, in whatever order the sources are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdxl_core.catalog.parts import Part
from sdxl_core.catalog.schema import CAPTION_COLUMNS, FACT_COLUMNS, IMAGE_COLUMNS, TAG_COLUMNS

Ints = np.ndarray[Any, np.dtype[Any]]

_NONE = np.int32(np.iinfo(np.int32).max)

# The columns that are taken together from one row, and how a row shows that it has them.
GROUPS = {"image": IMAGE_COLUMNS, "facts": FACT_COLUMNS, "tags": TAG_COLUMNS, "caption": CAPTION_COLUMNS}


@dataclass(frozen=True, slots=True)
class Joined:
    """`first` and each of `GROUPS`: row number for every picture, -1 for none (int32 [num_records], in order of first).

    `pointers` is None where row i is picture i. `duplicates`: rows left out. `num_conflicts`: by group, pictures for
    which more than one source had it. `num_taken_out`: pictures that a source's `ratings` leave out; they had
    `num_rows_taken_out` rows.
    """

    num_records: int
    pointers: dict[str, Ints] | None
    duplicates: Ints
    num_conflicts: dict[str, int]
    num_taken_out: int = 0
    num_rows_taken_out: int = 0


def join_rows(parts: Sequence[Part], sources: Sequence[int], left_out: Sequence[Part] = ()) -> Joined:
    """Group the rows of all parts by key.

    Args:   sources: position of the source of each part; ascending.   left_out: keys of what is taken out.
    About 40 bytes a row are held meanwhile, where any key occurs twice (70: within one source); 9 where none does.
    A key of `left_out` counts as a row where a row has it.
    """
    starts = part_starts(parts)
    hashes = _of_all(parts, lambda part: part.rows["key_hash"].to_numpy(), np.uint64)
    hashes.sort()
    taking_out, their_hashes = _met(left_out, hashes)
    if not len(taking_out) and not (hashes[1:] == hashes[:-1]).any():
        return Joined(len(hashes), None, np.zeros(0, np.int64), dict.fromkeys(GROUPS, 0))
    hashes = _of_all(parts, lambda part: part.rows["key_hash"].to_numpy(), np.uint64)  # in their order
    num_rows = len(hashes)
    all_parts = [*parts, *left_out]
    all_starts = part_starts(all_parts)

    def names(rows: Ints) -> list[str]:
        rows, behind = rows.astype(np.int64), rows >= num_rows
        rows[behind] = taking_out[rows[behind] - num_rows] + num_rows
        return keys_of(all_parts, all_starts, rows)

    if len(taking_out):
        hashes = np.concatenate([hashes, their_hashes])
    order, group_starts = group_equal(hashes, names)
    del hashes
    taken = (0, 0)
    if len(taking_out):
        order, group_starts, taken = _without_taken_out(order, group_starts, num_rows)
    source_of = np.repeat(np.asarray(sources, np.int16), np.diff(starts))
    joined = _joined(order, group_starts, source_of, _flags(parts))
    return replace(joined, num_taken_out=taken[0], num_rows_taken_out=taken[1])


def _met(left_out: Sequence[Part], hashes: Ints) -> tuple[Ints, Ints]:
    """The rows of `left_out`, by number, whose hash is among these sorted ones, and their hashes."""
    found, values = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
    for part, start in zip(left_out, part_starts(left_out), strict=False):
        own = part.rows["key_hash"].to_numpy()
        order = np.argsort(own)  # a search in order is many times quicker
        own = own[order]
        places = np.minimum(np.searchsorted(hashes, own), len(hashes) - 1)
        there = hashes[places] == own
        found.append(order[there] + start)
        values.append(own[there])
        part.forget()
    return np.concatenate(found), np.concatenate(values)


def _without_taken_out(order: Ints, group_starts: Ints, num_rows: int) -> tuple[Ints, Ints, tuple[int, int]]:
    """The groups that no row from `num_rows` on belongs to; and how many others there are, of how many rows."""
    sizes = np.diff(group_starts, append=len(order))
    is_out = np.logical_or.reduceat(order >= num_rows, group_starts)
    stays = np.repeat(~is_out, sizes)
    num_rows_out = int(np.count_nonzero(order[~stays] < num_rows))
    num_out = int(np.count_nonzero(order[group_starts[is_out]] < num_rows))  # ascending within a group
    ends = np.cumsum(sizes[~is_out])
    return order[stays], ends - sizes[~is_out], (num_out, num_rows_out)


def group_equal(hashes: Ints, keys: Callable[[Ints], list[str]]) -> tuple[Ints, Ints]:
    """Rows ordered so that equal keys stand together, ascending within, and where each group begins.

    Args:   keys: the keys of given rows; asked only for rows whose hash another row shares.
    """
    order = np.argsort(hashes, kind="stable").astype(np.int32)
    ordered = hashes[order]
    new = np.ones(len(order), bool)
    new[1:] = ordered[1:] != ordered[:-1]
    shared = np.flatnonzero(~new)
    shared = np.union1d(shared, shared - 1)
    for block in np.array_split(shared, len(shared) // 65_536 + 1):
        block = np.union1d(block, block[:1] - 1) if len(block) and not new[block[0]] else block
        names = keys(order[block])
        for before, here in zip(range(len(block) - 1), range(1, len(block)), strict=True):
            if not new[block[here]] and names[before] != names[here]:
                _split_collision(order, new, ordered, int(block[here]), keys)
    return order, np.flatnonzero(new)


def _split_collision(
    order: Ints, new: np.ndarray[Any, Any], ordered: Ints, place: int, keys: Callable[[Ints], list[str]]
) -> None:
    """Put the rows of one hash in order of key and row, and begin a group at each key."""
    begin, end = np.searchsorted(ordered, ordered[place]), np.searchsorted(ordered, ordered[place], "right")
    rows = order[begin:end]
    pairs = sorted(zip(keys(rows), rows.tolist(), strict=True))
    order[begin:end] = [row for _, row in pairs]
    new[begin:end] = [i == 0 or pairs[i][0] != pairs[i - 1][0] for i in range(len(pairs))]


def _joined(order: Ints, group_starts: Ints, source_of: Ints, flags: dict[str, np.ndarray[Any, Any]]) -> Joined:
    sources = source_of[order]
    new = np.zeros(len(order), bool)  # where another key, or another source of the same, begins
    new[group_starts] = True
    new[1:] |= sources[1:] != sources[:-1]
    del sources
    told = None if new.all() else np.flatnonzero(new)  # None: no source names a key twice, which takes less memory
    adds_nothing = ~new
    first = order[group_starts]
    by_first = np.argsort(first)
    pointers, conflicts = {"first": first[by_first]}, {}
    for name, has in flags.items():
        rows = np.where(has[order], order, _NONE)
        one_a_source = (rows != _NONE).view(np.int8)
        if told is not None:
            of_source = np.minimum.reduceat(rows, told)
            adds_nothing &= order != np.repeat(of_source, np.diff(told, append=len(order)))
            one_a_source[:] = 0
            one_a_source[told] = of_source != _NONE
        conflicts[name] = int((np.add.reduceat(one_a_source, group_starts, dtype=np.int32) > 1).sum())
        rows = np.minimum.reduceat(rows, group_starts)
        rows[rows == _NONE] = -1
        pointers[name] = rows[by_first]
    return Joined(len(first), pointers, np.sort(order[adds_nothing]), conflicts)


def _flags(parts: Sequence[Part]) -> dict[str, np.ndarray[Any, Any]]:
    """Which rows have something of each group."""
    shown_by = {**GROUPS, "image": ("image",), "tags": ("tags",)}
    return {group: _of_all(parts, partial(_any_valid, columns=columns), bool) for group, columns in shown_by.items()}


def _any_valid(part: Part, columns: Sequence[str]) -> np.ndarray[Any, Any]:
    valid: np.ndarray[Any, Any] = np.logical_or.reduce(
        [pc.is_valid(part.rows[column]).to_numpy(zero_copy_only=False) for column in columns]
    )
    return valid


def part_starts(parts: Sequence[Part]) -> Ints:
    """Number of the first row of each part, and behind the last the number of rows (int64 [num_parts + 1])."""
    return np.concatenate([[0], np.cumsum([part.rows.num_rows for part in parts], dtype=np.int64)])


def keys_of(parts: Sequence[Part], starts: Ints, rows: Ints) -> list[str]:
    """The keys of rows, given by number, in any order."""
    keys: list[str] = gather(parts, starts, rows, lambda part: part.rows["key"]).to_pylist()
    return keys


def gather(parts: Sequence[Part], starts: Ints, rows: Ints, column: Callable[[Part], pa.Array]) -> pa.Array:
    """Values of a column for rows given by number, in any order; null for row -1."""
    if not len(rows):
        return column(parts[0]).slice(0, 0)
    owner = np.searchsorted(starts, rows, "right") - 1  # -1 for row -1
    changes = np.flatnonzero(np.diff(owner)) + 1
    if len(changes) < 64:
        bounds, order = np.concatenate([[0], changes, [len(rows)]]), None
    else:
        order = np.argsort(owner, kind="stable")
        owner, rows = owner[order], rows[order]
        bounds = np.concatenate([[0], np.flatnonzero(np.diff(owner)) + 1, [len(rows)]])
    pieces = []
    for begin, end in pairwise(bounds):
        number = int(owner[begin])
        if number < 0:
            pieces.append(pa.nulls(end - begin, column(parts[0]).type))
        else:
            pieces.append(column(parts[number]).take(pa.array(rows[begin:end] - starts[number])))
    merged = pa.concat_arrays(pieces)
    if order is None:
        return merged
    inverse = np.empty(len(order), np.int64)
    inverse[order] = np.arange(len(order))
    return merged.take(pa.array(inverse))


def _of_all(parts: Sequence[Part], column: Callable[[Part], np.ndarray[Any, Any]], dtype: Any) -> np.ndarray[Any, Any]:
    """A column of all rows. The pages of one part are in memory at a time."""
    starts = part_starts(parts)
    whole = np.empty(int(starts[-1]), dtype)
    for part, begin, end in zip(parts, starts, starts[1:], strict=False):
        whole[begin:end] = column(part)
        part.forget()
    return whole
