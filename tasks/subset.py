"""Pick pictures by their tags."""

from prefect import task

from sdxl_core.config import SubsetConfig
from sdxl_core.refs import SubsetRef
from sdxl_core.subset import stage as core
from tasks.artifacts import ProgressArtifact, show_result
from tasks.policies import ONCE, RETRIED


@task(name="subset-pictures", task_run_name="subset {config.query}", **ONCE, **RETRIED)
def subset_pictures(config: SubsetConfig) -> SubsetRef:
    """Copy the pictures that the query picks. A second run finds its copies and copies nothing."""
    ref = core.subset(config, progress=ProgressArtifact("subset-progress", "pictures looked at"))
    show_result(ref, key="subset", title="Subset")
    return ref
