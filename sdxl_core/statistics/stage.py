"""The statistics stage: what the pictures that a query picks are made of, as tables and one page."""

from __future__ import annotations

from pathlib import Path

from sdxl_core.catalog.records import Catalog, is_catalog
from sdxl_core.catalog.sizes import can_keep_sizes, read_sizes
from sdxl_core.config import StatisticsConfig
from sdxl_core.errors import ConfigError
from sdxl_core.files import sha256_file, write_atomic
from sdxl_core.progress import Progress, no_progress
from sdxl_core.query.expressions import Tag, walk
from sdxl_core.query.grammar import parse
from sdxl_core.query.names import TagNames
from sdxl_core.refs import StatisticsRef
from sdxl_core.statistics.collect import collect_statistics
from sdxl_core.statistics.page import write_page
from sdxl_core.statistics.tables import markdown
from sdxl_core.subset.stage import select, with_sizes


def statistics(config: StatisticsConfig, *, progress: Progress = no_progress) -> StatisticsRef:
    """Count over a catalog, or what a query picks of it; write `statistics.html` and `statistics.md` into `out`.

    Raises: ConfigError: no catalog, a wrong query.   DataError: the query matches nothing.   DiskFullError.
    """
    if config.source.exists() and not is_catalog(config.source):
        raise ConfigError(
            f"source = {config.source}: not a catalog. `sdxl-flows catalog --sources {config.source} --out DIR` makes "
            f"one."
        )
    catalog = Catalog.open(config.source)
    query = parse(config.query)
    names = TagNames.of(catalog.vocabulary)
    asked = {part.name: names.ids_of(part) for part in walk(query.where) if isinstance(part, Tag)}
    catalog = with_sizes(catalog, query, progress=progress)
    records = select(catalog, query).records if config.query.strip() else None
    if can_keep_sizes(catalog):
        catalog = read_sizes(catalog, records, progress=progress)
    counted = collect_statistics(
        catalog,
        records,
        query=config.query,
        query_tags={name: ids for name, ids in asked.items() if len(ids)},
        progress=progress,
    )
    page = write_page(counted, config.out / "statistics.html")
    tables = config.out / "statistics.md"
    text = markdown(counted).encode("utf-8", "replace")
    if not (tables.exists() and tables.read_bytes() == text):
        write_atomic(tables, text)
    return StatisticsRef(
        path=page,
        sha256=sha256_file(page),
        tables=tables,
        query=config.query,
        num_seen=catalog.num_records,
        num_kept=counted.num_records,
        parents=(catalog.digest,),
    )


def read_tables(ref: StatisticsRef) -> str:
    """The tables as markdown."""
    return Path(ref.tables).read_text("utf-8")
