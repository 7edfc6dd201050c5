"""Flow: what the pictures that a query picks are made of, as tables and one page."""

from prefect import flow

from flows.resuming import resuming
from sdxl_core.config import StatisticsConfig
from sdxl_core.refs import StatisticsRef
from tasks.statistics import collect_statistics


@flow(name="statistics", description=StatisticsConfig.__doc__)
@resuming
def statistics(config: StatisticsConfig) -> StatisticsRef:
    return collect_statistics(config)
