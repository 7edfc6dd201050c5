"""Several datasets under prefixes, with tags from here and captions from there, to one meta_cap_dd.json."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from support.tars import write_tar

from sdxl_core.catalog.build import build_catalog
from sdxl_core.catalog.config import CatalogConfig, CatalogSource
from sdxl_core.catalog.records import Catalog
from sdxl_core.config import MergeTagsConfig
from sdxl_core.merge.plan import merge_tags
from sdxl_core.query.grammar import parse
from sdxl_core.query.select import select_by_scan
from sdxl_core.rejected import read_rejected
from sdxl_core.summary import describe


def two_boorus(folder: Path) -> tuple[CatalogSource, ...]:
    """danbooru: pictures in tars, a dump, captions in JSONL.   e621: a folder with tags, which the JSONL knows too."""
    write_tar(folder / "dan" / "0000.tar", {"1.webp": b"p1", "2.webp": b"p2", "4.webp": b"p4"})
    write_tar(folder / "dan" / "0001.tar", {"3.webp": b"p3", "3.txt": b"from_the_tar"})
    dump = {
        "id": [3, 1, 2, 5],
        "rating": ["s", "g", "e", "g"],
        "tag_string_artist": ["ann", "bob", "x", "y"],
        "tag_string_character": ["astolfo_(fate)", "", "x", "y"],
        "tag_string_general": ["long_hair ^_^", "1girl long_hair", "x", "y"],
        "tag_string_meta": ["highres", "highres", "x", "y"],
    }
    pq.write_table(pa.table(dump), folder / "dan.parquet")
    for name in ("1", "7", "8"):
        (folder / "e6").mkdir(exist_ok=True)
        (folder / "e6" / f"{name}.png").write_bytes(b"p")
    (folder / "e6" / "1.txt").write_text("fox, long_hair, Long Hair, rating:s")
    (folder / "e6" / "8.caption").write_text("a fox\nat sea")
    lines = [{"key": "danbooru/1", "caption": "a girl"}, {"key": "e621/1", "caption": "a fox", "tags": "fox, other"}]
    (folder / "words.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return (
        CatalogSource(path=folder / "dan", prefix="danbooru/"),
        CatalogSource(path=folder / "dan.parquet", prefix="danbooru/", ratings=("g", "s")),
        CatalogSource(path=folder / "e6", prefix="e621/"),
        CatalogSource(path=folder / "words.jsonl"),
    )


def test_two_boorus_become_one_json_and_what_is_missing_is_counted_by_kind(tmp_path: Path) -> None:
    ref = build_catalog(CatalogConfig(sources=two_boorus(tmp_path / "in"), out=tmp_path / "c"))
    # danbooru/2 has a picture, and the dump's row of it is left out, so it is no picture of the catalog
    assert (ref.num_filtered, ref.num_taken_out, ref.num_records) == (2, 1, 7)
    assert ref.missing == {"image": 1, "facts": 4, "tags": 3, "caption": 4}
    assert ref.conflicts == {"image": 0, "facts": 0, "tags": 2, "caption": 0}
    merged = merge_tags(MergeTagsConfig(source=tmp_path / "c", out=tmp_path / "m" / "meta_cap_dd.json"))
    assert json.loads(merged.path.read_bytes()) == {
        "danbooru/1": {"caption": "a girl", "tags": "bob, 1girl, long_hair, highres"},
        "danbooru/3": {"tags": "from_the_tar"},  # of two sources that tell it, the one listed first
        "e621/1": {"caption": "a fox", "tags": "fox, long_hair, Long Hair, rating:s"},
        "e621/8": {"caption": "a fox\nat sea"},
    }
    reasons = {row.key: row.reason for row in read_rejected(merged.rejected)}
    assert reasons == {
        "danbooru/4": "no_caption", "danbooru/5": "no_image", "e621/7": "no_caption",
    }  # fmt: skip
    assert merged.num_seen == merged.num_kept + merged.num_rejected == 7
    words = describe(ref)
    for said in (
        "1 no image",
        "3 no tags",
        "4 no caption",
        "2 tags",
        "2 of other ratings (with them 1 pictures of other sources)",
    ):
        assert said in words, words


def test_order_dropping_and_cleaning_are_asked_for_by_name(tmp_path: Path) -> None:
    sources = two_boorus(tmp_path / "in")[1:3]
    build_catalog(CatalogConfig(sources=sources, out=tmp_path / "c"))
    options = {
        "category_order": ("character", "general", "artist"),
        "drop_categories": ("meta",),
        "clean": ("underscores", "repeated", "rating"),
    }
    # the dump alone has no pictures, so its rows are left out beside a folder that has; e621/1 shows the cleaning
    merged = merge_tags(MergeTagsConfig(source=tmp_path / "c", out=tmp_path / "m.json", **options))
    assert json.loads(merged.path.read_bytes())["e621/1"] == {"tags": "fox, long hair"}
    build_catalog(CatalogConfig(sources=sources[:1], out=tmp_path / "dan"))
    merged = merge_tags(MergeTagsConfig(source=tmp_path / "dan", out=tmp_path / "dan.json", **options))
    assert json.loads(merged.path.read_bytes()) == {
        "danbooru/3": {"tags": "astolfo (fate), long hair, ^_^, ann"},
        "danbooru/1": {"tags": "1girl, long hair, bob"},
        "danbooru/5": {"tags": "y"},
    }
    catalog = Catalog.open(tmp_path / "dan")
    assert select_by_scan(catalog, parse("rating:g long_hair source:danbooru")).num_matched == 1


MERGE = """
import sys
from sdxl_core.config import MergeTagsConfig
from sdxl_core.merge.plan import merge_tags
print("go", flush=True)
merge_tags(MergeTagsConfig.model_validate_json(sys.argv[1]))
"""


def test_a_merge_of_a_catalog_killed_anywhere_is_finished_by_the_next(tmp_path: Path) -> None:
    count = 9_000
    dump = {"id": list(range(count)), "tag_string_general": [f"tag_{n} 1girl tag_{n % 77}" for n in range(count)]}
    pq.write_table(pa.table(dump), tmp_path / "d.parquet")
    build_catalog(CatalogConfig(sources=(CatalogSource(path=tmp_path / "d.parquet"),), out=tmp_path / "c"))
    expected = json.dumps({str(n): {"tags": f"tag_{n}, 1girl" + f", tag_{n % 77}" * (n >= 77)} for n in range(count)},
                          indent=2)  # fmt: skip
    for number, num_shards in enumerate((1, 7, 30)):  # neither the shards nor their processes change a byte
        out = tmp_path / str(number) / "m.json"
        merge_tags(MergeTagsConfig(source=tmp_path / "c", out=out, num_shards=num_shards))
        assert out.read_text() == expected
    config = MergeTagsConfig(source=tmp_path / "c", out=tmp_path / "killed" / "m.json", num_shards=30)
    rng, whole = random.Random(3), 0
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    for attempt in range(6):
        command = [sys.executable, "-c", MERGE, config.model_dump_json()]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, start_new_session=True) as process:
            assert process.stdout is not None and process.stdout.readline() == b"go\n"
            time.sleep(attempt * rng.uniform(0, 0.1))  # the first before anything can be whole
            os.killpg(process.pid, signal.SIGKILL)
        if config.out.exists():
            assert config.out.read_text() == expected
            whole += 1
    merge_tags(config)
    assert config.out.read_text() == expected
    assert whole < 6, "every run ended before it was killed"
    names = {path.name for path in config.out.parent.iterdir()}
    assert names == {"m.json", ".m.json.work", "rejected.jsonl", "tag_categories.json"}
