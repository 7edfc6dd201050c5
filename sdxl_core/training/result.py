"""What makes two runs the same run, and the record that one is finished. Light: read by the launching process too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
from pydantic import TypeAdapter

from sdxl_core.config import TrainConfig
from sdxl_core.files import sha256_file, write_atomic
from sdxl_core.refs import CheckpointRef, FileRef, to_json
from sdxl_core.training.caption_rules import categories_path
from sdxl_core.training.training_set import TrainingSet

# How long, how fast, how watched, where, under which name: not what the weights become. Everything else is.
NOT_SHAPING = {
    "max_train_steps", "max_train_epochs", "output_name", "save_every_steps", "save_precision", "log_prefix",
    "sample_prompts", "sample_prompts_file", "sample_every_steps", "sample_every_epochs", "sample_at_first",
    "heldout_every_steps", "heldout_bins", "save_model_as", "modelspec",
    "sample_inference_steps", "sample_guidance_scale", "sample_size_px",
    "num_processes", "use_cpu", "gradient_checkpointing", "metadata", "latents", "out", "base_model",
    "train_batch_size", "parallel", "torch_compile", "save_every_epochs", "save_every_minutes",
    "keep_states", "save_model_every_steps", "save_model_every_epochs", "keep_models", "snapshot_every_steps",
    "max_bad_steps", "tag_categories",
}  # fmt: skip


def run_settings(config: TrainConfig, training_set: TrainingSet) -> dict[str, Any]:
    """Everything that shapes the weights of a run, JSON-ready; states of other settings are never mixed into it."""
    from sdxl_core.models import model_fingerprint  # imports torch

    return {
        **config.model_dump(mode="json", exclude=NOT_SHAPING),
        "global_batch_size": config.train_batch_size * config.num_processes,
        "base_model": model_fingerprint(config.base_model),
        "dataset": training_set.digest,
        **({"tag_categories": sha256_file(categories_path(config))} if config.tag_dropout_by_category else {}),
    }


def former_settings(config: TrainConfig) -> dict[str, Any]:
    """What version 0.1 wrote down otherwise: it knew a base model by its modification time."""
    from sdxl_core.models import dated_fingerprint  # imports torch

    return {"base_model": dated_fingerprint(config.base_model)}


def write_result(config: TrainConfig, settings: dict[str, Any], ref: CheckpointRef) -> None:
    """The last file of a run. `settings`: `run_settings`."""
    record = {"config": config.model_dump(mode="json"), "settings": settings, "ref": to_json(ref)}
    write_atomic(_path(config), orjson.dumps(record, option=orjson.OPT_INDENT_2))


def read_result(config: TrainConfig) -> CheckpointRef | None:
    """What the last finished run of exactly this config left, None where there is none."""
    try:
        record = orjson.loads(_path(config).read_bytes())
        ref: CheckpointRef = TypeAdapter(CheckpointRef).validate_python(record["ref"])
        return ref if record["config"] == config.model_dump(mode="json") else None
    except (FileNotFoundError, orjson.JSONDecodeError, KeyError, ValueError):
        return None


def finished_result(config: TrainConfig, training_set: TrainingSet) -> CheckpointRef | None:
    """`read_result`, if base model and training set are the same still and what it made is unaltered."""
    ref = read_result(config)
    if ref is None or orjson.loads(_path(config).read_bytes())["settings"] != run_settings(config, training_set):
        return None
    return ref if _is_unaltered(ref.file) and all(sample.exists() for sample in ref.samples) else None


def _is_unaltered(ref: FileRef) -> bool:
    """Whether a model is what was written: a file by its digest, a diffusers folder by that of its weights."""
    if ref.path.is_dir():
        from sdxl_core.models.weights import folder_digest  # imports torch

        return folder_digest(ref.path) == ref.sha256
    return ref.path.exists() and ref.path.stat().st_size == ref.num_bytes and sha256_file(ref.path) == ref.sha256


def _path(config: TrainConfig) -> Path:
    return config.out / "state" / "result.json"
