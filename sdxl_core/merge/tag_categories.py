"""Which category each tag of a catalog has, beside the merged metadata: training can drop tags by it."""

from __future__ import annotations

from pathlib import Path

import orjson
import pyarrow.compute as pc

from sdxl_core.catalog.records import Catalog, is_catalog
from sdxl_core.catalog.words import CATEGORIES
from sdxl_core.config import MergeTagsConfig
from sdxl_core.dataset.metadata import TAG_CATEGORIES
from sdxl_core.dataset.text import normalise_tag
from sdxl_core.files import remove_stale_partials, write_atomic


def write_tag_categories(config: MergeTagsConfig) -> Path | None:
    """Write {category: [tags in normalised form]}; nothing where the source is a folder, or told no category.

    Raises: DiskFullError, DataError (no permission).
    """
    if not is_catalog(config.source):
        return None
    vocabulary = Catalog.open(config.source).vocabulary
    categories = {}
    for code, name in enumerate(CATEGORIES):
        tags = vocabulary["tag"].filter(pc.equal(vocabulary["category"], code)).to_pylist() if name else []
        if tags:
            categories[name] = sorted({normalise_tag(tag) for tag in tags})
    if not categories:
        return None
    path = config.out.with_name(TAG_CATEGORIES)
    remove_stale_partials(path.parent, name=path.name)
    write_atomic(path, orjson.dumps(categories))
    return path
