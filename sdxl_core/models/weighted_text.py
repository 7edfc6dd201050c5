"""Weighted captions, `(tag:1.2)`, in the syntax that A1111's web UI made common. Pure text, no tokens."""

from __future__ import annotations

import re
from collections.abc import Callable

UP, DOWN = 1.1, 1 / 1.1
_PIECES = re.compile(r"\\[()\[\]\\]|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[()\[\]:\\]|[^()\[\]:\\]+")


def weighted_parts(text: str) -> list[tuple[str, float]]:
    """A text as parts with their weights, neighbours of equal weight joined.

    `(x:1.2)` weighs 1.2, `(x)` 1.1, `[x]` 1 / 1.1, and they multiply where they are nested; a bracket that is not
    closed counts to the end. `\\(` and the like are brackets as text. Source: the wiki of AUTOMATIC1111's
    stable-diffusion-webui, "Attention/emphasis".
    """
    parts: list[list[str | float]] = []
    opened: list[tuple[str, int]] = []

    def close(bracket: str, factor: float) -> bool:
        if not opened or opened[-1][0] != bracket:
            return False
        _, start = opened.pop()
        for part in parts[start:]:
            part[1] = float(part[1]) * factor
        return True

    for match in _PIECES.finditer(text):
        piece, weight = match[0], match[1]
        if piece in "([":
            opened.append((piece, len(parts)))
        elif not _closes(piece, weight, close):
            parts.append([piece[1:] if len(piece) == 2 and piece[0] == "\\" else piece, 1.0])
    while opened:
        close(opened[-1][0], UP if opened[-1][0] == "(" else DOWN)
    return _joined([(str(piece), float(weight)) for piece, weight in parts])


def _closes(piece: str, weight: str | None, close: Callable[[str, float], bool]) -> bool:
    if weight is not None:
        return close("(", float(weight))
    return (piece == ")" and close("(", UP)) or (piece == "]" and close("[", DOWN))


def _joined(parts: list[tuple[str, float]]) -> list[tuple[str, float]]:
    result: list[tuple[str, float]] = []
    for piece, weight in parts:
        if result and result[-1][1] == weight:
            result[-1] = (result[-1][0] + piece, weight)
        else:
            result.append((piece, weight))
    return result
