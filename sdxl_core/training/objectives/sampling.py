"""diffusers' scheduler that draws pictures from a model of an objective."""

from __future__ import annotations

from typing import Any

from sdxl_core.config.train.objective import ObjectiveOptions
from sdxl_core.training.objectives.schedule import BETA_END, BETA_START, NUM_TIMESTEPS


def sampling_scheduler(options: ObjectiveOptions, num_steps: int) -> Any:
    """DDIM, for rectified flow Euler's method, with its `timesteps` set. Both start from plain normal noise.

    With a zero-SNR end timesteps are spaced `trailing`, so that sampling begins at the last (arXiv:2305.08891 sec 3.3).
    """
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    if options.prediction_type == "rectified_flow":
        scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=options.flow_shift)
    else:
        zero = options.zero_terminal_snr
        scheduler = DDIMScheduler(
            num_train_timesteps=NUM_TIMESTEPS, beta_start=BETA_START, beta_end=BETA_END, beta_schedule="scaled_linear",
            clip_sample=False, set_alpha_to_one=False, steps_offset=0 if zero else 1,
            prediction_type=options.prediction_type, rescale_betas_zero_snr=zero,
            timestep_spacing="trailing" if zero else "leading",
        )  # fmt: skip
    scheduler.set_timesteps(num_steps)
    return scheduler
