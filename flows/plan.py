"""Flow: the memory that a training run needs, before anything is loaded."""

from prefect import flow

from flows.resuming import resuming
from sdxl_core.config import PlanConfig
from sdxl_core.refs import MemoryPlan
from tasks.training import plan_memory


@flow(name="plan", description=PlanConfig.__doc__)
@resuming
def plan(config: PlanConfig) -> MemoryPlan:
    return plan_memory(config)
