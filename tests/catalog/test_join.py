"""Rows of one key are one picture; what each source says of it is taken in the order listed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.rows import catalog_of

from sdxl_core.catalog.join import group_equal
from sdxl_core.catalog.parts import key_hashes
from sdxl_core.catalog.records import Catalog
from sdxl_core.rejected import read_rejected

KEYS = ["a", "b", "c/d", "é", "e" * 40, "f"]
artists = st.lists(st.sampled_from("xyz"), max_size=3)
row = st.fixed_dictionaries(
    {
        "key": st.sampled_from(KEYS),
        "image": st.none() | st.just("i.png"),
        "rating": st.none() | st.integers(1, 4),
        "score": st.none() | st.integers(-5, 5),
        "tags": st.none()
        | st.dictionaries(st.just("artist"), st.lists(st.sampled_from("xyz"), max_size=3), min_size=1),
        "caption": st.none() | st.sampled_from(["", "words"]),
    }
)


def naive(sources: list[list[dict[str, Any]]]) -> tuple[list[dict[str, Any]], int]:
    """The rule, row by row. Returns the records and how many rows repeat a key of their source."""
    records: dict[str, dict[str, Any]] = {}
    repeated = 0
    for number, rows in enumerate(sources):
        told: dict[str, set[str]] = {}
        for row in rows:
            has = {group for group in ("image", "tags", "caption") if row[group] is not None}
            has |= {"facts"} if row["rating"] is not None or row["score"] is not None else set()
            if row["key"] in told and has <= told[row["key"]]:
                repeated += 1
                continue
            told[row["key"]] = told.get(row["key"], set()) | has
            record = records.setdefault(
                row["key"],
                {"key": row["key"], "image": None, "facts": None, "tags": None, "caption": None, "source": number},
            )
            if record["image"] is None and row["image"] is not None:
                record["image"], record["source"] = f"{number}", number
            if record["facts"] is None and (row["rating"] is not None or row["score"] is not None):
                record["facts"] = (row["rating"], row["score"])
            if record["tags"] is None and row["tags"] is not None:
                record["tags"] = list(dict.fromkeys(row["tags"]["artist"]))
            if record["caption"] is None:
                record["caption"] = row["caption"]
    return list(records.values()), repeated


def key_tells(rows: list[dict[str, Any]], key: str, group: str) -> bool:
    columns = ("rating", "score") if group == "facts" else (group,)
    return any(row["key"] == key and any(row[column] is not None for column in columns) for row in rows)


def as_told(catalog: Catalog, records: np.ndarray[Any, Any] | None = None) -> list[dict[str, Any]]:
    columns = ["key", "image", "rating", "score", "tags", "caption", "source"]
    if records is None:
        rows = [row for chunk in catalog.chunks(columns) for row in chunk.table.to_pylist()]
    else:
        rows = catalog.take(records, columns).to_pylist()
    names = catalog.vocabulary["tag"].to_pylist()
    return [
        {
            "key": row["key"],
            "image": None if row["image"] is None else str(row["source"]),
            "facts": None if row["rating"] is None and row["score"] is None else (row["rating"], row["score"]),
            "tags": None if row["tags"] is None else [names[tag] for tag in row["tags"]],
            "caption": row["caption"],
            "source": row["source"],
        }
        for row in rows
    ]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sources=st.lists(st.lists(row, min_size=1, max_size=8), min_size=1, max_size=3),
    part_rows=st.integers(1, 5),
    data=st.data(),
)
def test_records_follow_the_rule(
    tmp_path_factory: pytest.TempPathFactory, sources: list[list[dict[str, Any]]], part_rows: int, data: st.DataObject
) -> None:
    catalog = catalog_of(tmp_path_factory.mktemp("join"), sources, part_rows=part_rows)
    expected, repeated = naive(sources)
    assert as_told(catalog) == expected
    assert catalog.num_records == len(expected)
    rejected = read_rejected(catalog.path / "rejected.jsonl")
    assert [row.reason for row in rejected] == ["duplicate_key"] * repeated
    stored = json.loads((catalog.path / "catalog.json").read_bytes())
    assert stored["conflicts"] == {
        group: sum(sum(key_tells(rows, key, group) for rows in sources) > 1 for key in KEYS)
        for group in ("image", "facts", "tags", "caption")
    }
    picked = data.draw(st.lists(st.integers(0, len(expected) - 1), max_size=200))
    assert as_told(catalog, np.asarray(picked, np.int64)) == [expected[number] for number in picked]
    counts = dict(zip(catalog.vocabulary["tag"].to_pylist(), catalog.vocabulary["count"].to_pylist(), strict=True))
    for tag in "xyz":
        assert counts.get(tag, 0) == sum(tag in (record["tags"] or ()) for record in expected)


@settings(deadline=None)
@given(
    keys=st.lists(st.sampled_from([f"k{number}" for number in range(6)]), min_size=1, max_size=40),
    num_hashes=st.integers(1, 6),
)
def test_keys_of_one_hash_are_still_told_apart(keys: list[str], num_hashes: int) -> None:
    hashes = np.asarray([int(key[1:]) % num_hashes for key in keys], np.uint64)
    order, starts = group_equal(hashes, lambda rows: [keys[row] for row in rows])
    groups = [order[begin:end].tolist() for begin, end in zip(starts, [*starts[1:], len(keys)], strict=True)]
    expected: dict[str, list[int]] = {}
    for number, key in enumerate(keys):
        expected.setdefault(key, []).append(number)
    assert sorted(groups) == sorted(expected.values())


@settings(deadline=None)
@given(st.lists(st.text(max_size=20), max_size=30), st.integers(0, 5))
def test_a_hash_depends_on_the_key_alone(keys: list[str], start: int) -> None:
    import pyarrow as pa

    array = pa.array(keys, pa.string())
    alone = [key_hashes(pa.array([key], pa.string()))[0].as_py() for key in keys]
    assert key_hashes(array).to_pylist() == alone
    assert key_hashes(array.slice(start)).to_pylist() == alone[start:]
    assert len(set(alone)) == len(set(keys))


def test_a_damaged_part_is_told(tmp_path: Path) -> None:
    catalog = catalog_of(tmp_path, [[{"key": "a", "tags": {"": ["x"]}}]])
    next((catalog.path / "parts").glob("*.rows.arrow")).write_bytes(b"ARROW1")
    from sdxl_core.errors import DataError

    with pytest.raises(DataError, match=r"missing or damaged.*sdxl-flows catalog"):
        _ = Catalog.open(catalog.path).take(np.array([0]), ["key"])
