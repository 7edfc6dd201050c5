"""What a step minimises. docs/training.md has the formulas and their sources.

objective.py   one prediction type from noise to loss, as the trainer uses it
schedule.py    how much of the picture is left at each timestep; SNR     pure
noise.py       noise and timesteps of a sample in an epoch               pure
losses.py      distance of prediction and target, and its weight         pure
sampling.py    diffusers' scheduler that draws pictures from such a model
"""

from sdxl_core.training.objectives.noise import NoiseDraw
from sdxl_core.training.objectives.objective import Objective

__all__ = ["NoiseDraw", "Objective"]
