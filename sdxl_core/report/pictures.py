"""The pictures of a run, small enough to travel inside a text: thumbnails as JPEG data URLs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

MAX_PREVIEWS = 16


def thumbnail_url(picture: bytes | Path, *, max_side_px: int) -> str:
    """A picture as a `data:image/jpeg` URL, its longer side at most `max_side_px`. Raises: OSError: not a picture."""
    with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as opened:
        small = opened.convert("RGB")
    small.thumbnail((max_side_px, max_side_px))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def previews_markdown(paths: Sequence[Path], *, max_side_px: int = 320) -> list[str]:
    """Markdown lines that show the newest previews that are there, each with its step and prompt."""
    lines: list[str] = []
    for path in [path for path in paths if path.is_file()][-MAX_PREVIEWS:]:
        step, prompt = preview_text(path)
        lines += [f"![{path.name}]({thumbnail_url(path, max_side_px=max_side_px)})", ""]
        lines += ["{}: `{}`".format(step, prompt.replace("`", "'")) if step else f"`{path.name}`", ""]
    return lines


def preview_text(path: Path) -> tuple[str, str]:
    """("step 40", its prompt) as the trainer left them in a preview; ("", "") where it did not."""
    with Image.open(path) as opened:
        text = {name: value for name, value in opened.info.items() if isinstance(value, str)}
    return (f"step {text['step']}", text["prompt"] or "(no words)") if {"step", "prompt"} <= text.keys() else ("", "")
