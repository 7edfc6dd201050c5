"""What can be known to be wrong before a training process starts, each told in one paragraph, in seconds."""

from __future__ import annotations

import os
import tempfile

import numpy as np

from sdxl_core.config import TrainConfig
from sdxl_core.dataset.tokens import count_tokens
from sdxl_core.errors import ConfigError, DataError
from sdxl_core.files import disk_errors
from sdxl_core.latents import LatentRecord, LatentStore
from sdxl_core.training.prompts import prompts_of
from sdxl_core.training.training_set import Sample, TrainingSet

NUM_LOOKED_AT = 16
LEAST_DEVIATION, MOST_DEVIATION = 2.0, 40.0  # SDXL's VAE gives about 7; times its scaling factor 1


def check_training(config: TrainConfig, training_set: TrainingSet) -> None:
    """Refuse a base model, latents or prompts that cannot be right.

    Raises: ConfigError, CheckpointError: the base model, as `load_models` says it; a prompt that is too long.
            DataError: latents of another size, shape or scale.
    """
    check_prompts(config)
    if config.base_model != "tiny":
        from sdxl_core.models import check_base_model  # imports torch

        check_base_model(config.base_model)
    check_latents(config, training_set)


def check_prompts(config: TrainConfig) -> None:
    """Raises: ConfigError: a preview prompt that is wrong, or has more tokens than the text encoders are given."""
    for number, prompt in enumerate(prompts_of(config), 1):
        for what, text in (("prompt", prompt.text), ("the negative of prompt", prompt.negative)):
            count = _num_tokens(text, config)
            if count > config.max_token_length:
                raise ConfigError(
                    f"sample_prompts: {what} {number} ({text[:40]!r}…) has {count} tokens, and max_token_length = "
                    f"{config.max_token_length} of them are seen: its end would silently be left out. Shorten it, or "
                    f"raise max_token_length (75, 150 or 225)."
                )


def _num_tokens(text: str, config: TrainConfig) -> int:
    if not config.weighted_captions:
        return count_tokens(text)
    from sdxl_core.models.tokenizer import weighted_tokens  # imports torch

    return len(weighted_tokens(text)[0])  # brackets and weights are no tokens


def check_writable(config: TrainConfig) -> None:
    """Raises: DataError: nothing can be written into `out`.   ConfigError: it is a file."""
    try:
        if config.out.exists() and not config.out.is_dir():
            raise ConfigError(f"out = {config.out}: this is a file. Name a folder; it is made where it does not exist.")
        with disk_errors(config.out):
            config.out.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".writable-", dir=config.out)
            os.close(handle)
            os.unlink(name)
    except OSError as error:  # a name that is too long, a file where a folder should be, a place like /proc
        raise DataError(f"out = {config.out}: cannot be made ({error.strerror}). Choose another folder.") from error


def check_latents(config: TrainConfig, training_set: TrainingSet) -> None:
    """Look at a few latents, spread over the whole set: shape, bucket and scale.

    Raises: DataError: names the picture, and what its latents are instead.   ConfigError: masked_loss without masks.
    """
    store = LatentStore(config.latents)
    numbers = np.unique(np.linspace(0, training_set.num_samples - 1, NUM_LOOKED_AT).astype(np.int32))
    deviations, has_masks = [], False
    for sample in training_set.take(numbers):
        record = store.read(sample.key)
        check_record(config, sample, record)
        has_masks |= record.alpha_mask is not None
        latents = record.latents[np.isfinite(record.latents)]  # what is not is the trainer's to name
        deviations += [float(latents.astype(np.float32).std())] if latents.size else []
    if config.masked_loss and not has_masks:
        raise ConfigError(
            f"masked_loss: {config.latents} holds no masks (none of {len(numbers)} pictures looked at has one). Run "
            f"cache-latents with alpha_mask into another folder, or train without masked_loss."
        )
    deviation = float(np.median(deviations)) if deviations else LEAST_DEVIATION
    if not LEAST_DEVIATION <= deviation <= MOST_DEVIATION:
        raise DataError(
            f"{config.latents}: the latents have a standard deviation of {deviation:.2f}; those of SDXL's VAE have one "
            f"of about 7. They were made with another VAE, or are already multiplied by its scaling factor (0.13025), "
            f"which training does itself. Run cache-latents with SDXL's VAE into another folder."
        )


def check_record(config: TrainConfig, sample: Sample, record: LatentRecord) -> None:
    """Raises: DataError: latents that are not those of a picture of `sample`'s bucket."""
    if record.bucket != (sample.width_px, sample.height_px):
        raise DataError(
            f"{config.latents}: the latents of {sample.key!r} are {record.latents.shape}, those of a picture of "
            f"{record.bucket[0]}x{record.bucket[1]} px, but {config.metadata.name} says its bucket is "
            f"{sample.width_px}x{sample.height_px}. They were made with another size or another VAE: run cache-latents "
            f"again into another folder."
        )
