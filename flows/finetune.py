"""Flow: fine-tune SDXL on cached latents."""

from prefect import flow

from sdxl_core.config import TrainConfig
from sdxl_core.refs import CheckpointRef
from tasks.training import train


@flow(name="finetune", description=TrainConfig.__doc__)
def finetune(config: TrainConfig) -> CheckpointRef:
    return train(config)
