"""What a step minimises: prediction type, noise, timesteps, loss and weights. docs/training.md has the formulas."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from sdxl_core.sections import Section

PredictionType = Literal["epsilon", "v_prediction", "rectified_flow"]
_SNR_WEIGHTS = ("min_snr_gamma", "scale_v_pred_loss_like_noise_pred", "v_pred_like_loss", "debiased_estimation_loss")


class ObjectiveOptions(Section):
    prediction_type: PredictionType = Field(
        "epsilon", description="what the U-Net predicts: the noise (SDXL's own), v, or the flow from picture to noise"
    )
    zero_terminal_snr: bool = Field(
        False, description="v_prediction: the last timestep is pure noise (arXiv:2305.08891), so black can be black"
    )
    flow_shift: float = Field(
        1.0, gt=0, le=100, description="rectified_flow: shifts timesteps towards noise; larger for larger pictures"
    )
    flow_sampling: Literal["logit_normal", "uniform"] = Field(
        "logit_normal", description="rectified_flow: which timesteps are trained on"
    )
    flow_logit_mean: float = Field(0.0, ge=-10, le=10, description="logit_normal: mean of the logit")
    flow_logit_std: float = Field(1.0, gt=0, le=10, description="logit_normal: standard deviation of the logit")
    min_timestep: int = Field(0, ge=0, le=999, description="first timestep that is trained on")
    max_timestep: int = Field(1000, ge=1, le=1000, description="one behind the last timestep that is trained on")

    noise_offset: float = Field(0.0, ge=0, le=1, description="adds this times one normal value a channel to the noise")
    noise_offset_random_strength: bool = Field(
        False, description="noise_offset is at most this: between 0 and it, anew for each picture"
    )
    adaptive_noise_scale: float = Field(
        0.0, ge=-10, le=10, description="added to noise_offset: this times the absolute mean of the latents' channel"
    )
    multires_noise_iterations: int = Field(
        0, ge=0, le=20, description="adds noise of this many coarser and coarser sizes; 0 is off, 6 to 10 is usual"
    )
    multires_noise_discount: float = Field(0.3, gt=0, le=1, description="each coarser size weighs this much less")
    ip_noise_gamma: float = Field(
        0.0, ge=0, le=1, description="input perturbation (arXiv:2301.11706): noise that the target does not know; 0.1"
    )
    ip_noise_gamma_random_strength: bool = Field(
        False, description="ip_noise_gamma is at most this: between 0 and it, anew for each picture"
    )

    loss_type: Literal["l2", "l1", "huber", "smooth_l1"] = Field("l2", description="distance of prediction and target")
    huber_schedule: Literal["snr", "exponential", "constant"] = Field(
        "snr", description="huber and smooth_l1: how the threshold follows the timestep"
    )
    huber_c: float = Field(0.1, gt=0, le=1, description="huber and smooth_l1: the threshold")
    huber_scale: float = Field(1.0, gt=0, description="exponential and constant: times huber_c")
    min_snr_gamma: float | None = Field(None, gt=0, description="min-SNR loss weighting (arXiv:2303.09556); 5 is usual")
    debiased_estimation_loss: bool = Field(False, description="weight 1 / sqrt(SNR) (arXiv:2310.08442)")
    scale_v_pred_loss_like_noise_pred: bool = Field(False, description="v_prediction: weight SNR / (SNR + 1)")
    v_pred_like_loss: float = Field(
        0.0, ge=0, le=10, description="epsilon: this times the loss that v prediction would have is added"
    )
    masked_loss: bool = Field(
        False, description="only what is opaque counts, by the masks that cache-latents --alpha-mask kept"
    )

    @model_validator(mode="after")
    def objective_fits_together(self) -> ObjectiveOptions:
        if self.min_timestep >= self.max_timestep:
            raise ValueError(
                f"min_timestep = {self.min_timestep} must be below max_timestep = {self.max_timestep} (not included)"
            )
        if self.zero_terminal_snr and self.prediction_type != "v_prediction":
            raise ValueError(
                f"zero_terminal_snr needs prediction_type = v_prediction: where nothing but noise is left, "
                f"{self.prediction_type} has nothing to learn from it"
            )
        given = [name for name in _SNR_WEIGHTS if getattr(self, name)]
        if given and self.prediction_type == "rectified_flow":
            raise ValueError(f"{given[0]} weighs by SNR, which rectified_flow does not: leave it out")
        if self.scale_v_pred_loss_like_noise_pred and self.prediction_type != "v_prediction":
            raise ValueError("scale_v_pred_loss_like_noise_pred needs prediction_type = v_prediction")
        if self.v_pred_like_loss and self.prediction_type != "epsilon":
            raise ValueError("v_pred_like_loss needs prediction_type = epsilon")
        return self
