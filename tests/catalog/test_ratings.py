"""What `ratings` leave out of a dump is no picture of the catalog, whichever source has its file or its words."""

import json
import random
from itertools import permutations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdxl_core.catalog.build import build_catalog
from sdxl_core.catalog.config import CatalogConfig, CatalogSource
from sdxl_core.catalog.parts import key_hash
from sdxl_core.catalog.records import Catalog
from sdxl_core.catalog.sources import jsonl, parquet
from sdxl_core.errors import DataError
from sdxl_core.refs import CatalogRef
from sdxl_core.summary import describe

Rows = list[dict[str, Any]]


def build(out: Path, *sources: CatalogSource) -> CatalogRef:
    return build_catalog(CatalogConfig(sources=sources, out=out, index=False, processes=1))


def keys(out: Path) -> list[str]:
    return [key for chunk in Catalog.open(out).chunks(["key"]) for key in chunk.table["key"].to_pylist()]


def lines(path: Path, rows: Rows) -> CatalogSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return CatalogSource(path=path)


@pytest.fixture
def sources(tmp_path: Path) -> tuple[CatalogSource, ...]:
    """Pictures d/0 to d/11 in a folder, words about some of them, and a dump that rates 0 to 9 and knows 20 and 21."""
    (tmp_path / "pix").mkdir()
    for number in range(12):
        (tmp_path / "pix" / f"{number}.png").write_bytes(b"x")
        (tmp_path / "pix" / f"{number}.txt").write_text(f"t{number}")
    captions = lines(tmp_path / "words.jsonl", [{"key": f"d/{number}", "caption": "words"} for number in range(4)])
    ids, ratings = [*range(10), 20, 21], ["g", "q", "s", "e", "g", None, "s", "g", "g", "g", "g", "e"]
    dump = pa.table({"id": pa.array(ids), "rating": pa.array(ratings), "tag_string": pa.array(["a b"] * 12)})
    pq.write_table(dump, tmp_path / "dump.parquet")
    return (
        CatalogSource(path=tmp_path / "pix", prefix="d/"),
        captions,
        CatalogSource(path=tmp_path / "dump.parquet", prefix="d/", ratings=("g", "s")),
    )


def test_a_picture_of_another_rating_leaves_the_catalog_in_whatever_order_the_sources_are(
    tmp_path: Path, sources: tuple[CatalogSource, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "PART_ROWS", 5)
    monkeypatch.setattr(parquet, "BATCH", 3)
    for number, order in enumerate(permutations(sources)):
        ref = build(tmp_path / f"c{number}", *order)
        assert set(keys(ref.path)) == {f"d/{name}" for name in (0, 2, 4, 6, 7, 8, 9, 10, 11, 20)}
        # of the dump 1, 3, 5 (rating unknown) and 21; of the folder and the words all that is told of 1, 3 and 5
        assert (ref.num_seen, ref.num_filtered, ref.num_taken_out, ref.num_rejected) == (28, 4 + 3 + 2, 3, 0)
        assert ref.missing["image"] == 1 and ref.missing["facts"] == 2
        assert "9 of other ratings (with them 3 pictures of other sources)" in describe(ref)
        counts = {row["tag"]: row["count"] for row in Catalog.open(ref.path).vocabulary.to_pylist()}
        assert not counts["t1"] and (counts["t0"] or counts["a"])


def test_a_dump_with_ratings_that_is_added_later_takes_out_what_was_there(
    tmp_path: Path, sources: tuple[CatalogSource, ...]
) -> None:
    before = build(tmp_path / "c", *sources[:2])
    assert (before.num_records, before.num_filtered) == (12, 0)
    after = build(tmp_path / "c", *sources)
    assert after.num_records == 10 and "d/1" not in keys(tmp_path / "c")
    assert build(tmp_path / "c", *sources) == after
    for path in (tmp_path / "c" / "parts").glob("*.left_out.rows.arrow"):
        path.unlink()  # a lost file is made again, not taken for an empty one
    (tmp_path / "c" / "catalog.json").unlink()
    assert build(tmp_path / "c", *sources) == after
    assert build(tmp_path / "c", *sources[:2]) == before


@pytest.mark.parametrize("with_folder", [True, False])
def test_ratings_that_leave_nothing_say_so(
    tmp_path: Path, sources: tuple[CatalogSource, ...], with_folder: bool
) -> None:
    dump = lines(tmp_path / "all.jsonl", [{"key": f"d/{number}", "rating": "e"} for number in range(12)])
    dump = dump.model_copy(update={"ratings": ("g",)})
    with pytest.raises(DataError, match=r"ratings.*[Nn]ame more"):
        build(tmp_path / "c", *sources[:1] * with_folder, dump)
    assert not (tmp_path / "c" / "catalog.json").exists()


def test_another_key_of_the_same_hash_stays(tmp_path: Path) -> None:
    """Thue-Morse words of 1,024 letters have one polynomial hash modulo 2**64, whatever its base."""
    one = "".join("ab"[number.bit_count() % 2] for number in range(1024))
    other = one.translate(str.maketrans("ab", "ba"))
    assert key_hash(one) == key_hash(other)
    first = lines(tmp_path / "a.jsonl", [{"key": one, "caption": "a"}, {"key": other, "caption": "b"}])
    for rated, kept in (([one], [other]), ([other], [one]), ([one[:-1] + "c"], [one, other])):
        dump = lines(tmp_path / "b.jsonl", [{"key": key, "rating": "e"} for key in rated])
        ref = build(tmp_path / "c", first, dump.model_copy(update={"ratings": ("g",)}))
        assert keys(tmp_path / "c") == kept and ref.num_taken_out == 2 - len(kept)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    told=st.lists(
        st.tuples(
            st.dictionaries(st.sampled_from("abcdefgh"), st.sampled_from([None, "g", "e"]), min_size=1), st.booleans()
        ),
        min_size=1,
        max_size=4,
    ),
    seed=st.integers(0, 9),
)
def test_any_rows_of_any_sources_follow_the_rule(
    tmp_path_factory: pytest.TempPathFactory, told: list[tuple[dict[str, str | None], bool]], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("ratings")
    sources, rows = [], []
    for number, (entries, filters) in enumerate(told):
        some = random.Random(seed + number).sample(list(entries.items()), len(entries))
        source = lines(folder / f"{number}.jsonl", [{"key": key, "rating": word, "caption": "c"} for key, word in some])
        sources.append(source.model_copy(update={"ratings": ("g",)}) if filters else source)
        rows += [(key, filters and word != "g") for key, word in some]
    out = {key for key, filtered in rows if filtered}
    kept = [key for key, filtered in rows if key not in out]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "PIECE_BYTES", 60)
        if not kept:
            with pytest.raises(DataError, match="ratings"):
                build(folder / "c", *sources)
            return
        ref = build(folder / "c", *sources)
    assert keys(folder / "c") == list(dict.fromkeys(kept))
    assert ref.num_seen == len(rows) == len(kept) + ref.num_filtered + ref.num_rejected
    assert ref.num_taken_out == len(out & {key for key, filtered in rows if not filtered})
