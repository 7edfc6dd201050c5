"""Launch and watch the trainer."""

from prefect import task

from sdxl_core.config import TrainConfig
from sdxl_core.refs import CheckpointRef
from sdxl_core.training import launch as core
from tasks.artifacts import ProgressArtifact, show_checkpoint, show_result
from tasks.curves import show_curves
from tasks.policies import ONCE, RETRIED


@task(name="train", **ONCE, **RETRIED)
def train(config: TrainConfig) -> CheckpointRef:
    """`accelerate launch` the trainer and wait. A killed trainer is retried and continues from its last state."""
    show_curves(config)
    ref = core.launch_training(config, progress=ProgressArtifact("train-progress", "steps"))
    show_result(ref, key="train", title="Training")
    show_checkpoint(ref)
    return ref
