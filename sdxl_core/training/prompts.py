"""Prompts of preview pictures, with the options that sd-scripts' prompt files have behind them.

1girl, pink hair --n lowres, bad hands --w 832 --h 1216 --d 7 --l 5.5 --s 28
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from sdxl_core.config import TrainConfig
from sdxl_core.errors import ConfigError

_OPTION = re.compile(r"(?:^|\s)--(\w+)(?=\s|$)")
_KINDS: dict[str, tuple[str, type]] = {
    "n": ("negative", str), "w": ("width_px", int), "h": ("height_px", int), "d": ("seed", int),
    "l": ("guidance_scale", float), "s": ("num_steps", int),
}  # fmt: skip
MAX_SIDE_PX, MAX_STEPS = 4096, 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What a preview shows. width_px, height_px: multiples of 8.   seed: of its noise, together with its number."""

    text: str
    negative: str
    width_px: int
    height_px: int
    seed: int
    guidance_scale: float
    num_steps: int


def prompts_of(config: TrainConfig) -> list[Prompt]:
    """Those of `sample_prompts`, then those of the file. Raises: ConfigError: names the prompt and what is wrong."""
    lines = [(f"sample_prompts: prompt {number}", text) for number, text in enumerate(config.sample_prompts, 1)]
    path = config.sample_prompts_file
    if path is not None:
        try:
            text = path.read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"sample_prompts_file = {path}: cannot be read ({error}).") from error
        lines += [(f"{path}: line {number}", line) for number, line in enumerate(text.splitlines(), 1)]
    return [
        parse_prompt(text.strip(), config, where=where)
        for where, text in lines
        if text.strip() and not text.lstrip().startswith("#")
    ]


def parse_prompt(text: str, config: TrainConfig, *, where: str) -> Prompt:
    """One prompt; what its options leave unsaid is as in `config`. Raises: ConfigError."""
    words, *parts = _OPTION.split(text)
    values: dict[str, Any] = {}
    for name, value in zip(parts[::2], parts[1::2], strict=True):
        field, kind = _KINDS.get(name.lower(), ("", str))
        if not field:
            raise ConfigError(f"{where}: there is no option --{name}; there are --{', --'.join(_KINDS)}.")
        try:
            values[field] = kind(value.strip())
        except ValueError as error:
            raise ConfigError(f"{where}: --{name} {value.strip()!r} is not a number.") from error
    plain = Prompt(
        text=words.strip(),
        negative="",
        width_px=config.sample_size_px,
        height_px=config.sample_size_px,
        seed=config.seed,
        guidance_scale=config.sample_guidance_scale,
        num_steps=config.sample_inference_steps,
    )
    prompt = replace(plain, **values)
    sides_fit = all(64 <= side <= MAX_SIDE_PX and side % 8 == 0 for side in (prompt.width_px, prompt.height_px))
    if not sides_fit or not 1 <= prompt.num_steps <= MAX_STEPS or prompt.guidance_scale < 1:
        raise ConfigError(
            f"{where}: sides must be multiples of 8 from 64 to {MAX_SIDE_PX} px, steps 1 to {MAX_STEPS}, guidance at "
            f"least 1; these are {prompt.width_px}x{prompt.height_px}, {prompt.num_steps}, {prompt.guidance_scale:g}."
        )
    return prompt
