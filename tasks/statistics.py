"""What a set of pictures is made of."""

from prefect import task
from prefect.artifacts import create_markdown_artifact

from sdxl_core.config import StatisticsConfig
from sdxl_core.refs import StatisticsRef
from sdxl_core.statistics import stage as core
from tasks.artifacts import ProgressArtifact, never_failing, show_result
from tasks.policies import ONCE, RETRIED


@task(name="collect-statistics", task_run_name="statistics {config.query}", **ONCE, **RETRIED)
def collect_statistics(config: StatisticsConfig) -> StatisticsRef:
    """Count, and show the tables."""
    ref = core.statistics(config, progress=ProgressArtifact("statistics-progress", "pictures counted"))
    with never_failing("the tables"):
        create_markdown_artifact(key="statistics-tables", markdown=core.read_tables(ref), description="Statistics")
    show_result(ref, key="statistics", title="Statistics")
    return ref
