"""Pictures from prompts, with classifier-free guidance and fixed seeds. Training neither sees nor feels them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from sdxl_core.config import TrainConfig
from sdxl_core.files import atomic_writer
from sdxl_core.models import encode_prompts, load_models, time_ids, tokenize
from sdxl_core.training.denoiser import Denoiser
from sdxl_core.training.objectives.sampling import sampling_scheduler
from sdxl_core.training.prompts import Prompt, prompts_of
from sdxl_core.training.randomness import torch_generator


def preview_steps(config: TrainConfig, num_steps: int, *, steps_per_epoch: int) -> list[int]:
    """After which optimizer steps previews are made: every so many steps and epochs, at the end, and perhaps before the

    first (0).
    """
    if not prompts_of(config):
        return []
    periods = [config.sample_every_steps, config.sample_every_epochs * steps_per_epoch]
    found = {step for every in periods if every for step in range(every, num_steps + 1, every)}
    return sorted(found | {num_steps} | ({0} if config.sample_at_first else set()))


def preview_paths(config: TrainConfig, step: int) -> list[Path]:
    """`samples/<output_name>_<step>_<number>_<seed>.png` of each prompt."""
    return [
        config.out / "samples" / f"{config.output_name}_{step:06d}_{number:02d}_{prompt.seed}.png"
        for number, prompt in enumerate(prompts_of(config))
    ]


@torch.no_grad()
def write_previews(
    denoiser: Denoiser, config: TrainConfig, *, step: int, keep: bool = True, leave: Callable[[], bool] = lambda: False
) -> None:
    """One picture a prompt. The base model's VAE is loaded for this and let go again.

    Args:   keep: they are written.   leave: asked before each picture; true: the others are left out.
    """
    if leave():
        return
    device = next(denoiser.parameters()).device
    vae: Any = load_models(config.base_model, parts=("vae",), dtype=torch.float32).vae
    vae.to(device)
    paths = preview_paths(config, step)
    for number, (prompt, path) in enumerate(zip(prompts_of(config), paths, strict=True)):
        latents = _denoise(
            denoiser, config, prompt, number=number, factor=2 ** (len(vae.config.block_out_channels) - 1)
        )
        pixels = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0][0]
        if keep:
            _save(pixels, path, prompt=prompt.text, step=step)
        if number + 1 < len(paths) and leave():
            return


def _denoise(denoiser: Denoiser, config: TrainConfig, prompt: Prompt, *, number: int, factor: int) -> Tensor:
    """Latents of one picture, scaled, float32 [1, 4, h, w]. Guidance: negative + scale * (prompt - negative)."""
    device, dtype = next(denoiser.parameters()).device, denoiser.unet.dtype
    texts = [prompt.negative, prompt.text]
    tokens = tokenize(texts, max_token_length=config.max_token_length, weighted=config.weighted_captions).to(device)
    prompt_embeds, pooled = encode_prompts(denoiser.text_encoder, denoiser.text_encoder_2, tokens)
    prompt_embeds, pooled = prompt_embeds.to(device), pooled.to(device)  # the encoders may be elsewhere
    size = torch.tensor([[prompt.height_px, prompt.width_px]] * 2, device=device)  # of the negative and of this one
    ids = time_ids(original_size=size, crop_top_left=torch.zeros_like(size), target_size=size)
    generator = torch_generator("preview", prompt.seed, number)
    shape = (1, 4, prompt.height_px // factor, prompt.width_px // factor)
    latents = torch.randn(shape, generator=generator).to(device)
    scheduler = sampling_scheduler(config, prompt.num_steps)
    for timestep in scheduler.timesteps:
        both = latents.expand(2, -1, -1, -1).to(dtype)
        conditions = {"text_embeds": pooled.to(dtype), "time_ids": ids}
        noise = denoiser.unet(
            both, timestep, encoder_hidden_states=prompt_embeds.to(dtype), added_cond_kwargs=conditions
        ).sample.float()
        unconditional, conditional = noise.chunk(2)
        guided = unconditional + prompt.guidance_scale * (conditional - unconditional)
        latents = scheduler.step(guided, timestep, latents).prev_sample
    return latents


def _save(pixels: Tensor, path: Path, *, prompt: str, step: int) -> None:
    """pixels: [3, H, W] in [-1, 1]. The file says in its text fields what was asked for, and after which step."""
    about = PngInfo()
    about.add_text("prompt", prompt)
    about.add_text("step", str(step))
    levels = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    with atomic_writer(path, sync=False) as file:
        Image.fromarray(levels.permute(1, 2, 0).cpu().numpy()).save(file, "PNG", pnginfo=about)
