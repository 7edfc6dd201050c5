"""What can be known to be wrong before a job of days begins."""

from __future__ import annotations

import os
from pathlib import Path

from sdxl_core.config import JobConfig
from sdxl_core.engines import check_devices
from sdxl_core.errors import ConfigError
from sdxl_core.query.grammar import parse
from sdxl_core.training.preflight import check_prompts


def check_job(job: JobConfig) -> None:
    """Refuse a job whose paths, query or devices cannot be right; opens no picture and loads no model.

    Raises: ConfigError: the key, the value and what to do.
    """
    if not job.source.path.is_dir():
        kind = "is a file, not a folder" if job.source.path.exists() else "does not exist"
        raise ConfigError(f"source.path = {job.source.path}: {kind}. Name the folder that holds the pictures.")
    if job.out.exists() and not job.out.is_dir():
        raise ConfigError(f"out = {job.out}: this is a file. Name a folder; it is made where it does not exist.")
    if Path(os.path.realpath(job.out)).is_relative_to(os.path.realpath(job.source.path)):
        raise ConfigError(
            f"out = {job.out}: lies inside source.path = {job.source.path}; what the job makes would be taken for "
            f"pictures. Choose a folder outside of it."
        )
    parse(job.subset.query)
    for key, value in (("latents.vae", job.latents.vae), ("train.base_model", job.train.base_model)):
        if value not in ("", "tiny") and not Path(value).exists():
            raise ConfigError(
                f"{key} = {value}: there is no such file or folder. Name a .safetensors file, a diffusers folder, "
                f"or tiny."
            )
    check_prompts(job.train_config())
    if job.train.base_model != "tiny":
        from sdxl_core.models import base_prediction, check_base_model, check_prediction  # imports torch

        check_base_model(job.train.base_model)
        check_prediction(job.train.base_model, base_prediction(job.train.base_model), job.train)
    check_devices(job.latents)
