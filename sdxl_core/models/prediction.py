"""What a model predicts: the noise, v or a flow; where files say so, and how it is written into them.

Single files: the marker keys `v_pred` and `ztsnr` (empty tensors, which ComfyUI and reForge look for) and
`modelspec.prediction_type`. Diffusers folders: `scheduler/scheduler_config.json`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl_core.config.train.objective import ObjectiveOptions, PredictionType
from sdxl_core.errors import ConfigError

V_KEY, ZERO_SNR_KEY = "v_pred", "ztsnr"


@dataclass(frozen=True, slots=True)
class Prediction:
    """`zero_terminal_snr`: the model was trained down to timesteps of pure noise (v_prediction only)."""

    type: PredictionType = "epsilon"
    zero_terminal_snr: bool = False

    def __str__(self) -> str:
        return self.type + (" with zero terminal SNR" if self.zero_terminal_snr else "")

    def marker_keys(self) -> dict[str, Tensor]:
        """The empty tensors that a single file is marked with; none for epsilon and flows."""
        keys = [V_KEY] if self.type == "v_prediction" else []
        keys += [ZERO_SNR_KEY] if self.zero_terminal_snr else []
        return {key: torch.empty(0) for key in keys}

    def modelspec(self) -> dict[str, str]:
        """The metadata of a single file: ModelSpec knows epsilon and v."""
        return {"modelspec.prediction_type": "v" if self.type == "v_prediction" else self.type}

    def scheduler_config(self) -> dict[str, Any]:
        """What differs from SDXL's own scheduler_config.json in a diffusers folder."""
        if self.type == "rectified_flow":
            return {"_class_name": "FlowMatchEulerDiscreteScheduler", "prediction_type": self.type}
        trailing = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if self.zero_terminal_snr else {}
        return {"prediction_type": self.type, **trailing}


EPSILON = Prediction()


def prediction_of_file(keys: Collection[str], metadata: Mapping[str, str]) -> Prediction:
    """What a single file says of itself; epsilon where it says nothing, as SDXL base 1.0."""
    said = metadata.get("modelspec.prediction_type", "")
    if V_KEY in keys or said.startswith("v"):
        return Prediction("v_prediction", ZERO_SNR_KEY in keys)
    return Prediction("rectified_flow") if said == "rectified_flow" else EPSILON


def prediction_of_scheduler(config: Mapping[str, Any]) -> Prediction:
    """What a diffusers folder's scheduler_config.json says."""
    if str(config.get("_class_name", "")).startswith("FlowMatch"):
        return Prediction("rectified_flow")
    if config.get("prediction_type") == "v_prediction":
        return Prediction("v_prediction", bool(config.get("rescale_betas_zero_snr")))
    return EPSILON


def check_prediction(base_model: str, base: Prediction, options: ObjectiveOptions) -> str | None:
    """Whether a run's objective is the base model's. Returns a warning, None where they agree.

    Raises: ConfigError: the base model predicts something else than noise, and the run would train it on noise.
    """
    wanted = Prediction(options.prediction_type, options.zero_terminal_snr)
    if wanted == base:
        return None
    if wanted.type == "epsilon":
        flag = ", zero_terminal_snr = true" if base.zero_terminal_snr else ""
        raise ConfigError(
            f"{Path(base_model).name}: a model of {base}; prediction_type = epsilon would unlearn that. Set "
            f'prediction_type = "{base.type}"{flag}, or name a base model that predicts noise, such as SDXL base 1.0.'
        )
    return (
        f"{Path(base_model).name} is a model of {base}, this run trains {wanted}: it has to learn that anew, which "
        f"takes thousands of steps at a high rate. If that is not meant, set prediction_type and zero_terminal_snr as "
        f"the base model has them."
    )
