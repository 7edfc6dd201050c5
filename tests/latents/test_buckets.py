"""The bucket table and choice: sd-scripts' answers, all 4,500 of them, and what must hold for any picture."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_core.buckets import BucketTable, TooSmallForBuckets, crop_ltrb
from sdxl_core.config import BucketOptions

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("buckets_*.jsonl.gz"))
sides_px = st.integers(1, 20_000)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_every_choice_equals_sd_scripts(path: Path) -> None:
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    assert len(rows) == 1500
    tables: dict[tuple, BucketTable] = {}
    for row in rows:
        if "error" in row:  # sd-scripts divides by zero; we reject the picture
            with pytest.raises(TooSmallForBuckets):
                next(iter(tables.values())).choose(width_px=row["w"], height_px=row["h"])
            continue
        settings = (row["max_reso"][0], row["min"], row["max"], row["steps"], row["no_upscale"])
        assert row["max_reso"][0] == row["max_reso"][1]
        names = ("resolution_px", "min_bucket_px", "max_bucket_px", "bucket_step_px", "no_upscale")
        options = BucketOptions(**dict(zip(names, settings, strict=True)))
        table = tables.setdefault(settings, BucketTable.from_options(options))
        width_px, height_px = row["w"], row["h"]
        if 0 in row["reso"]:  # sd-scripts makes a bucket without width; we reject the picture
            with pytest.raises(TooSmallForBuckets):
                table.choose(width_px=width_px, height_px=height_px)
            continue
        choice = table.choose(width_px=width_px, height_px=height_px)
        assert [choice.bucket.width_px, choice.bucket.height_px] == row["reso"], row
        assert [choice.resized_width_px, choice.resized_height_px] == row["resized"], row
        assert choice.ar_error == row["ar_error"], row
        assert list(crop_ltrb(choice.bucket, width_px=width_px, height_px=height_px)) == row["crop_ltrb"], row


@pytest.mark.parametrize(("max_bucket_px", "num_buckets"), [(1024, 25), (2048, 41)])
def test_the_table_has_as_many_buckets_as_sd_scripts(max_bucket_px: int, num_buckets: int) -> None:
    assert len(BucketTable.from_options(BucketOptions(max_bucket_px=max_bucket_px)).buckets) == num_buckets


@given(width_px=sides_px, height_px=sides_px)
def test_the_resized_picture_covers_its_bucket_and_the_bucket_fits_the_area(width_px: int, height_px: int) -> None:
    choice = BucketTable.from_options(BucketOptions()).choose(width_px=width_px, height_px=height_px)
    assert choice.resized_width_px >= choice.bucket.width_px and choice.resized_height_px >= choice.bucket.height_px
    assert choice.bucket.width_px * choice.bucket.height_px <= 1024 * 1024
    assert choice.crop_left_px + choice.bucket.width_px <= choice.resized_width_px
    assert choice.crop_top_px + choice.bucket.height_px <= choice.resized_height_px
    assert 0 <= choice.cropped_share < 1


@given(width_px=sides_px, height_px=sides_px)
def test_without_upscaling_nothing_grows(width_px: int, height_px: int) -> None:
    table = BucketTable.from_options(BucketOptions(no_upscale=True))
    try:
        choice = table.choose(width_px=width_px, height_px=height_px)
    except TooSmallForBuckets:
        assert min(width_px, height_px) < 64 or max(width_px, height_px) / min(width_px, height_px) > 100
        return
    assert choice.bucket.width_px <= width_px + 1 and choice.bucket.height_px <= height_px + 1
    assert choice.bucket.width_px % 64 == choice.bucket.height_px % 64 == 0
