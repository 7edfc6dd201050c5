"""Flow: fine-tune SDXL on cached latents."""

from prefect import flow

from flows.resuming import resuming
from sdxl_core.config import TrainConfig
from sdxl_core.refs import CheckpointRef
from tasks.training import train


@flow(name="finetune", description=TrainConfig.__doc__)
@resuming
def finetune(config: TrainConfig) -> CheckpointRef:
    return train(config)
