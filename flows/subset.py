"""Flow: pick pictures by tags and copy them."""

from prefect import flow

from flows.resuming import resuming
from sdxl_core.config import SubsetConfig
from sdxl_core.refs import SubsetRef
from tasks.subset import subset_pictures


@flow(name="subset", description=SubsetConfig.__doc__)
@resuming
def subset(config: SubsetConfig) -> SubsetRef:
    return subset_pictures(config)
