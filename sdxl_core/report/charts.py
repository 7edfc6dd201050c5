"""Charts as inline SVG: no plotting library, nothing to fetch, sharp at any size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 760, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 34, 40
Spread = tuple[float, float]  # mean, deviation
COLOURS = ("#30638e", "#c8553d", "#edae49", "#7b5ea7")


def nice_ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten) that span [low, high]."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next((factor for factor in (1, 2, 5, 10) if factor * power >= raw), 10)
    first = math.floor(low / step)
    return [step * number for number in range(first, math.ceil(high / step - 1e-9) + 1)]


def line_chart(series: Mapping[str, Sequence[tuple[float, float]]], *, x_label: str, y_label: str) -> str:
    """Lines over shared axes. series: name -> (x, y) points; non-finite points are left out. Returns an <svg>."""
    lines = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in series.items()}
    points = [point for line in lines.values() for point in line]
    if not points:
        return "<p>no values yet</p>"
    x_ticks = nice_ticks(min(x for x, _ in points), max(x for x, _ in points))
    y_ticks = nice_ticks(min(y for _, y in points), max(y for _, y in points))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [_frame(f"{y_label} over {x_label}")]
    for tick in y_ticks:
        _, y = place(x_ticks[0], tick)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dde3e8"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in x_ticks:
        text = f"{tick:.6g}"
        x = min(place(tick, y_ticks[0])[0], WIDTH - 4 * len(text))  # a long one at the end is not cut off
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{text}</text>')
    room = (WIDTH - LEFT - RIGHT) // len(lines)
    for number, (name, line) in enumerate(lines.items()):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
        stroke = f'stroke="{COLOURS[number % len(COLOURS)]}" stroke-width="2"'
        # Lines may lie on each other: each later one has wider gaps, through which those below are seen.
        stroke += f' stroke-dasharray="8 {4 * number}"' if number else ""
        parts.append(f'<polyline points="{path}" fill="none" {stroke}/>')
        if len(line) == 1:
            x, y = place(*line[0])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" {stroke}/>')
        at = LEFT + room * number
        parts.append(f'<line x1="{at}" x2="{at + 22}" y1="15" y2="15" {stroke}/>')
        parts.append(f'<text x="{at + 28}" y="19">{escape(_cut(name, room - 40))}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts) + "</svg>"


def bar_chart(bars: Mapping[str, int], *, label_px: int = 112, total: int = 0) -> str:
    """Horizontal bars with their numbers, in the order given. Returns an <svg>.

    Args:   label_px: room for the names; longer ones are cut, and whole in their tooltip.   total: shares of it are
            written behind the numbers; 0: no shares.
    """
    row, most = 22, max([*bars.values(), 1])
    height = row * len(bars) + 10
    room = WIDTH - label_px - (136 if total else 78)
    parts = [_frame("histogram", height)]
    for number, (name, count) in enumerate(bars.items()):
        y = 6 + row * number
        width = max(1.0, room * count / most) if count else 0.0
        share = f" ({count / total:.1%})" if total else ""
        parts.append(
            f'<text x="{label_px}" y="{y + 14}" text-anchor="end">{escape(_cut(name, label_px))}'
            f"<title>{escape(name)}</title></text>"
        )
        parts.append(
            f'<rect x="{label_px + 8}" y="{y + 2}" width="{width:.1f}" height="{row - 6}" fill="{COLOURS[0]}" rx="2"/>'
        )
        parts.append(f'<text x="{label_px + 14 + width:.1f}" y="{y + 14}">{count:,}{share}</text>')
    return "".join(parts) + "</svg>"


def range_chart(ranges: Mapping[str, tuple[Spread, Spread]], *, names: tuple[str, str]) -> str:
    """Two bars a row, from mean - deviation to mean + deviation, with a mark at the mean. Returns an <svg>.

    Args:   ranges: by row, one for each of the two `names`.
    """
    row, left, bottom = 40, 112, 30
    ends = [mean + sign * deviation for pair in ranges.values() for mean, deviation in pair for sign in (-1, 1)]
    ticks = nice_ticks(min(ends), max(ends), count=8)
    height = TOP + row * len(ranges) + bottom

    def place(value: float) -> float:
        return left + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (WIDTH - left - RIGHT)

    parts = [_frame("means and deviations", height)]
    for tick in ticks:
        x = place(tick)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 6}" y2="{height - bottom}" stroke="#dde3e8"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - bottom + 18}" text-anchor="middle">{tick:.4g}</text>')
    for number, name in enumerate(names):
        at = left + 130 * number
        parts.append(f'<rect x="{at}" y="10" width="22" height="9" fill="{COLOURS[number]}" rx="2"/>')
        parts.append(f'<text x="{at + 28}" y="19">{escape(name)}</text>')
    for number, (name, pair) in enumerate(ranges.items()):
        top = TOP + row * number
        parts.append(f'<text x="{left - 8}" y="{top + 20}" text-anchor="end">{escape(name)}</text>')
        for which, (mean, deviation) in enumerate(pair):
            x, y = place(mean - deviation), top + 3 + 14 * which
            wide = max(1.0, place(mean + deviation) - x)
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="11" fill="{COLOURS[which]}" rx="2"/>'
                f'<rect x="{place(mean) - 1:.1f}" y="{y - 1}" width="2" height="13" fill="#22303a"/>'
            )
    return "".join(parts) + "</svg>"


def column_chart(counts: Sequence[int], *, step: int, marks: Sequence[int] = (), x_label: str, y_label: str) -> str:
    """Columns side by side: counts[i] things are between i * step and (i + 1) * step. Returns an <svg>.

    Args:   marks: places on the x axis that get a dashed line and their number.
    """
    end = step * len(counts)
    y_ticks = nice_ticks(0, max([*counts, 1]))
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    parts = [_frame(f"{y_label} by {x_label}")]
    for tick in y_ticks:
        y = HEIGHT - BOTTOM - high * tick / y_ticks[-1]
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dde3e8"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:,.6g}</text>')
    for tick in nice_ticks(0, end, count=8):
        if tick <= end:
            x = LEFT + wide * tick / end
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:g}</text>')
    width = wide / len(counts)
    for number, count in enumerate(counts):
        tall = high * count / y_ticks[-1]
        parts.append(
            f'<rect x="{LEFT + number * width + 0.5:.1f}" y="{HEIGHT - BOTTOM - tall:.1f}" '
            f'width="{max(width - 1, 0.6):.1f}" height="{tall:.1f}" fill="{COLOURS[0]}">'
            f"<title>{number * step} to {(number + 1) * step - 1}: {count:,}</title></rect>"
        )
    for mark in marks:
        if mark < end:
            x = LEFT + wide * mark / end
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{HEIGHT - BOTTOM}" stroke="{COLOURS[1]}" '
                f'stroke-dasharray="4 3"/><text x="{x:.1f}" y="{TOP - 14}" text-anchor="middle" '
                f'fill="{COLOURS[1]}">{mark}</text>'
            )
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts) + "</svg>"


def _cut(name: str, room_px: int) -> str:
    most = max(4, room_px // 7)
    return name if len(name) <= most else name[: most - 1] + "\u2026"


def _frame(label: str, height: int = HEIGHT) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img" '
        f'aria-label="{escape(label)}" font-family="system-ui, sans-serif" font-size="12" fill="#33404a">'
    )
