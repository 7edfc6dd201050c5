"""Plan the memory of a training run; launch and watch the trainer."""

from prefect import task

from sdxl_core.config import PlanConfig, TrainConfig
from sdxl_core.refs import CheckpointRef, MemoryPlan
from sdxl_core.training import launch as core
from tasks.artifacts import ProgressArtifact, show_checkpoint, show_memory, show_result
from tasks.curves import curves_text, show_curves
from tasks.policies import ONCE, RETRIED


@task(name="train", **ONCE, **RETRIED)
def train(config: TrainConfig) -> CheckpointRef:
    """`accelerate launch` the trainer and wait. A killed trainer is retried and continues from its last state."""
    show_curves(config)
    ref = core.launch_training(config, progress=ProgressArtifact("train-progress", "steps"))
    show_result(ref, key="train", title="Training")
    show_checkpoint(ref, curves=curves_text(ref.tensorboard))
    return ref


@task(name="plan-memory", **ONCE)
def plan_memory(config: PlanConfig) -> MemoryPlan:
    """Show what the run needs, and refuse what does not fit the card."""
    from sdxl_core.training.memory_plan import check_planned, planned  # imports torch, which deploying need not

    plan = planned(config)
    show_memory(plan)
    check_planned(plan, config)
    return plan
