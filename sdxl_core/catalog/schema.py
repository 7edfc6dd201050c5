"""What a catalog stores of every picture, and the words for it.

A catalog is a folder:
    catalog.json                 which parts, in which order; written last
    parts/DIGEST.rows.arrow      one row a picture of one source (Arrow IPC, uncompressed, memory-mapped), immutable
    parts/DIGEST.left_out.rows.arrow   keys of the rows that `ratings` leave out, where there are any
    parts/DIGEST.vocab.arrow     the tags of that part: `rows.tags` are positions in it
    parts/DIGEST.sizes.arrow     sizes of its pictures, as far as they were asked for and read from the headers
    joined/DIGEST.*.arrow        all tags with category and count; part tag -> tag; and which rows make up each picture,
                                 where several sources describe it or a source names one twice
    rejected.jsonl
"""

from __future__ import annotations

import pyarrow as pa

from sdxl_core.catalog.words import CATEGORIES as CATEGORIES
from sdxl_core.catalog.words import CATEGORY_CODES as CATEGORY_CODES
from sdxl_core.catalog.words import RATING_CODES as RATING_CODES
from sdxl_core.catalog.words import RATINGS as RATINGS

FORMAT = 1
PART_ROWS = 65_536  # at most, in a part

TAGS = pa.list_(pa.uint32())

ROWS = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),  # POSIX path below the source without extension, after prefix
        # the picture's bytes; null: this source has no picture of that key
        pa.field("image", pa.string()),  # path below the source, or member name in the tar
        pa.field("tar", pa.string()),  # path of the tar below the source; null: a plain file
        pa.field("offset", pa.int64()),  # of the first data byte in the tar
        pa.field("num_bytes", pa.int64()),
        # facts
        pa.field("id", pa.int64()),
        pa.field("width", pa.int32()),  # px
        pa.field("height", pa.int32()),
        pa.field("rating", pa.uint8()),  # position in RATINGS; null: unknown
        pa.field("score", pa.int32()),
        pa.field("fav_count", pa.int32()),
        # words
        pa.field("tags", TAGS),  # in the source's order, categories in the order of CATEGORIES; null: no tags known
        pa.field("raw_tags", pa.string()),  # the tags' text as it stands, where ", ".join(tags) is another
        pa.field("caption", pa.string()),
        pa.field("key_hash", pa.uint64(), nullable=False),
    ]
)
VOCABULARY = pa.schema(
    [
        pa.field("tag", pa.string(), nullable=False),  # as the source spells it
        pa.field("category", pa.uint8(), nullable=False),  # position in CATEGORIES
        pa.field("count", pa.int64(), nullable=False),  # pictures (in a part: rows) that have it
    ]
)
SIZES = pa.schema(  # px, upright; NOT_READ or UNREADABLE in both where no size is known
    [pa.field("width", pa.int32(), nullable=False), pa.field("height", pa.int32(), nullable=False)]
)
NOT_READ, UNREADABLE = -1, 0

IMAGE_COLUMNS = ("image", "tar", "offset", "num_bytes")
FACT_COLUMNS = ("id", "width", "height", "rating", "score", "fav_count")
TAG_COLUMNS = ("tags", "raw_tags")
CAPTION_COLUMNS = ("caption",)
COLUMNS_OF_USE = {
    "images": IMAGE_COLUMNS,
    "facts": FACT_COLUMNS,
    "tags": TAG_COLUMNS,
    "captions": CAPTION_COLUMNS,
}
