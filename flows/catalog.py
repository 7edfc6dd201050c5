"""Flow: describe a collection of pictures, from any number of sources, in one memory-mapped table."""

from prefect import flow

from flows.fan_out import gather
from flows.resuming import resuming
from sdxl_core.catalog.build import finished_part
from sdxl_core.catalog.config import CatalogConfig
from sdxl_core.refs import CatalogRef
from tasks.catalog import build_part, join_catalog, plan_catalog

PARTS_AT_ONCE = 8


@flow(name="catalog", description=CatalogConfig.__doc__)
@resuming
def catalog(config: CatalogConfig) -> CatalogRef:
    plans = plan_catalog(config)
    parts = gather(
        lambda plan: build_part.with_options(refresh_cache=finished_part(plan, config) is None).submit(plan, config),
        plans,
        limit=PARTS_AT_ONCE,
    )
    return join_catalog(config, parts)
