"""Describe a collection in one memory-mapped table."""

from prefect import task

from sdxl_core.catalog import build as core
from sdxl_core.catalog.config import CatalogConfig
from sdxl_core.refs import CatalogPartRef, CatalogPlanRef, CatalogRef
from tasks.artifacts import ProgressArtifact, show_result
from tasks.policies import CACHED, ONCE, RETRIED


@task(name="plan-catalog", **ONCE, **RETRIED)
def plan_catalog(config: CatalogConfig) -> list[CatalogPlanRef]:
    """See what each source holds and cut it into parts."""
    return core.plan_catalog(config)


@task(name="build-part", task_run_name="build-part-{plan.index}", **CACHED, **RETRIED)
def build_part(plan: CatalogPlanRef, config: CatalogConfig) -> CatalogPartRef:
    """Read one part of a source."""
    return core.build_part(plan, config)


@task(name="join-catalog", **ONCE, **RETRIED)
def join_catalog(config: CatalogConfig, parts: list[CatalogPartRef]) -> CatalogRef:
    """Make one catalog of the parts."""
    ref = core.join_catalog(config, parts, progress=ProgressArtifact("catalog-progress", "pictures indexed"))
    show_result(ref, key="catalog", title="Catalog")
    return ref
