"""SDXL's components: configs, key names, loading, saving, tokenizer and conditioning. No model hub anywhere."""

from sdxl_core.models.conditioning import encode_prompts, time_ids
from sdxl_core.models.load import (
    SdxlModels,
    base_prediction,
    check_base_model,
    dated_fingerprint,
    load_models,
    load_vae,
    model_fingerprint,
    vae_fingerprint,
)
from sdxl_core.models.prediction import Prediction, check_prediction
from sdxl_core.models.presets import component_config
from sdxl_core.models.single_file import modelspec_metadata, save_diffusers_folder, save_single_file
from sdxl_core.models.tokenizer import TokenIds, count_tokens, tokenize

__all__ = [
    "Prediction",
    "SdxlModels",
    "TokenIds",
    "base_prediction",
    "check_base_model",
    "check_prediction",
    "component_config",
    "count_tokens",
    "dated_fingerprint",
    "encode_prompts",
    "load_models",
    "load_vae",
    "model_fingerprint",
    "modelspec_metadata",
    "save_diffusers_folder",
    "save_single_file",
    "time_ids",
    "tokenize",
    "vae_fingerprint",
]
