"""Sample pictures for the demo, drawn here: small scenes with tags, and a few of the defects real collections have."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw

from sdxl_core.config import JobConfig
from sdxl_core.files import atomic_writer, write_atomic

Draw = Callable[[ImageDraw.ImageDraw, float, float, float, str], None]

SKIES = {"day": ("#9fd3f2", "#eaf6fb"), "sunset": ("#f7a072", "#fde2c4"), "night": ("#141a3a", "#3b4470")}
GROUNDS = {"meadow": "#78b159", "beach": "#ecd9a0", "sea": "#5aa9c9", "snow": "#f3f7fa"}
COLOURS = {"red": "#d1495b", "blue": "#274690", "yellow": "#edae49", "white": "#fbfbf8", "purple": "#7b5ea7"}
SIZES_PX = ((640, 480), (480, 640), (512, 512), (800, 450), (420, 700), (600, 400), (384, 576), (900, 380))
NUM_SCENES = 48
OVERSAMPLING = 2


def draw_samples(folder: Path) -> bool:
    """Draw the demo's 51 picture files into `folder`. Returns false where they are there already.

    48 scenes as .png, .jpg and .webp with tags and some captions, among them a transparent one, a palette one and one
    that is rotated by EXIF; and three defects: a cut .jpg, one without text, one of 12 pixels.
    """
    finished = folder / "drawn.ok"
    if finished.exists():
        return False
    for number in range(NUM_SCENES):
        _draw_scene(folder, number)
    _draw_defects(folder)
    write_atomic(finished, b"48 scenes and 3 defects\n")
    return True


def demo_job(*, source: Path, out: Path) -> JobConfig:
    """The demo's job: everything as in real work, with the tiny preset and small pictures."""
    return JobConfig.model_validate(
        {
            "out": out,
            "source": {"path": source},
            "subset": {"query": "scenery -night"},
            "merge": {"num_shards": 2},
            "latents": {
                "vae": "tiny",
                "resolution_px": 256,
                "min_bucket_px": 128,
                "max_bucket_px": 512,
                "shard_size": 20,
                "devices": "cpu",
            },
            "train": {
                "base_model": "tiny",
                "max_train_steps": 40,
                "train_batch_size": 4,
                "learning_rate": 2e-4,
                "learning_rate_te1": 5e-5,
                "learning_rate_te2": 5e-5,
                "lr_scheduler": "constant_with_warmup",
                "lr_warmup_steps": 5,
                "shuffle_caption": True,
                "keep_tokens": 1,
                "caption_dropout_rate": 0.1,
                "save_every_steps": 20,
                "sample_prompts": ["scenery, house, red, day, meadow", "scenery, boat, blue, sunset, sea"],
                "sample_size_px": 256,
                "log_prefix": "demo_",
                "use_cpu": True,
            },
        }
    )


def _draw_scene(folder: Path, number: int) -> None:
    rng = random.Random(number)
    subject = list(SUBJECTS)[number % len(SUBJECTS)]
    sky = rng.choice(["day", "day", "sunset", "night"])
    ground = "sea" if subject in ("boat", "fish") else rng.choice(["meadow", "beach", "snow"])
    colour = rng.choice(list(COLOURS))
    width_px, height_px = SIZES_PX[number % len(SIZES_PX)]
    picture = _paint(rng, subject, sky, ground, colour, width_px=width_px, height_px=height_px)
    stem = f"scene_{number:02d}"
    if number % 12 == 5:
        _save(_cut_out(picture), folder / f"{stem}.png")
    elif number % 12 == 7:
        _save(picture.quantize(64), folder / f"{stem}.png")
    elif number % 12 == 9:
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was held upright: viewers turn the stored picture clockwise
        _save(picture.rotate(90, expand=True), folder / f"{stem}.jpg", exif=exif)
    else:
        _save(picture, folder / f"{stem}{('.png', '.jpg', '.webp')[number % 3]}")
    write_atomic(folder / f"{stem}.txt", f"scenery, {subject}, {colour}, {sky}, {ground}".encode(), sync=False)
    if number % 4 == 0:
        caption = f"A drawing of a {colour} {subject} by {sky}."
        write_atomic(folder / f"{stem}.caption", caption.encode(), sync=False)


def _draw_defects(folder: Path) -> None:
    whole = (folder / "scene_01.jpg").read_bytes()
    write_atomic(folder / "zz_cut.jpg", whole[: len(whole) // 3], sync=False)
    write_atomic(folder / "zz_cut.txt", b"scenery, tree, day", sync=False)
    _save(Image.new("RGB", (300, 300), "#888888"), folder / "zz_no_text.png")
    _save(Image.new("RGB", (12, 12), "#888888"), folder / "zz_small.png")
    write_atomic(folder / "zz_small.txt", b"scenery, day", sync=False)


def _save(picture: Image.Image, path: Path, **options: object) -> None:
    formats = {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP"}
    with atomic_writer(path, sync=False) as file:
        picture.save(file, formats[path.suffix], **options)


def _paint(
    rng: random.Random, subject: str, sky: str, ground: str, colour: str, *, width_px: int, height_px: int
) -> Image.Image:
    width, height = width_px * OVERSAMPLING, height_px * OVERSAMPLING
    top, bottom = SKIES[sky]
    gradient = Image.linear_gradient("L").resize((width, height))
    picture = Image.composite(
        Image.new("RGB", (width, height), bottom), Image.new("RGB", (width, height), top), gradient
    )
    draw = ImageDraw.Draw(picture)
    radius = 0.07 * min(width, height)
    _disc(draw, rng.uniform(0.15, 0.85) * width, rng.uniform(0.12, 0.25) * height, radius,
          "#f6f1d5" if sky == "night" else "#ffd966")  # fmt: skip
    horizon = rng.uniform(0.6, 0.7) * height
    draw.rectangle((0, horizon, width, height), fill=GROUNDS[ground])
    size = 0.42 * min(width, height)
    SUBJECTS[subject](draw, rng.uniform(0.35, 0.65) * width, horizon + 0.12 * height, size, COLOURS[colour])
    return picture.resize((width_px, height_px), Image.Resampling.LANCZOS)


def _cut_out(picture: Image.Image) -> Image.Image:
    """The picture with a transparent surround, as cut-outs on the web have it."""
    mask = Image.new("L", picture.size, 0)
    ImageDraw.Draw(mask).ellipse((8, 8, picture.width - 8, picture.height - 8), fill=255)
    result = picture.convert("RGBA")
    result.putalpha(mask)
    return result


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, colour: str) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _house(draw: ImageDraw.ImageDraw, x: float, y: float, size: float, colour: str) -> None:
    half = size / 2
    draw.rectangle((x - half, y - 0.6 * size, x + half, y), fill=colour)
    draw.polygon([(x - 0.6 * size, y - 0.6 * size), (x, y - size), (x + 0.6 * size, y - 0.6 * size)], fill="#6b3e26")
    draw.rectangle((x - 0.1 * size, y - 0.3 * size, x + 0.1 * size, y), fill="#4a2c1a")
    for side in (-1, 1):
        centre = x + side * 0.3 * size
        draw.rectangle((centre - 0.09 * size, y - 0.48 * size, centre + 0.09 * size, y - 0.3 * size), fill="#fff3b0")


def _tree(draw: ImageDraw.ImageDraw, x: float, y: float, size: float, colour: str) -> None:
    draw.rectangle((x - 0.06 * size, y - 0.45 * size, x + 0.06 * size, y), fill="#6b3e26")
    for dx, dy, radius in ((-0.2, -0.55, 0.22), (0.2, -0.55, 0.22), (0, -0.75, 0.27)):
        _disc(draw, x + dx * size, y + dy * size, radius * size, "#3f7d4e")
    for turn in range(6):
        angle = turn * math.tau / 6
        _disc(
            draw, x + 0.24 * size * math.cos(angle), y - 0.64 * size + 0.2 * size * math.sin(angle), 0.04 * size, colour
        )


def _boat(draw: ImageDraw.ImageDraw, x: float, y: float, size: float, colour: str) -> None:
    hull = [(-0.55, -0.2), (0.55, -0.2), (0.35, 0.05), (-0.35, 0.05)]
    draw.polygon([(x + dx * size, y + dy * size) for dx, dy in hull], fill=colour)
    draw.line((x, y - 0.2 * size, x, y - size), fill="#4a2c1a", width=max(2, round(0.025 * size)))
    sail = [(0.04, -0.95), (0.45, -0.3), (0.04, -0.3)]
    draw.polygon([(x + dx * size, y + dy * size) for dx, dy in sail], fill="#fdfdf6")


def _fish(draw: ImageDraw.ImageDraw, x: float, y: float, size: float, colour: str) -> None:
    draw.ellipse((x - 0.5 * size, y - 0.3 * size, x + 0.35 * size, y + 0.2 * size), fill=colour)
    tail = [(0.25, -0.05), (0.6, -0.3), (0.6, 0.2)]
    draw.polygon([(x + dx * size, y + dy * size) for dx, dy in tail], fill=colour)
    _disc(draw, x - 0.3 * size, y - 0.1 * size, 0.05 * size, "#ffffff")
    _disc(draw, x - 0.31 * size, y - 0.1 * size, 0.025 * size, "#111111")


def _flower(draw: ImageDraw.ImageDraw, x: float, y: float, size: float, colour: str) -> None:
    draw.line((x, y, x, y - 0.6 * size), fill="#3f7d4e", width=max(2, round(0.04 * size)))
    for turn in range(7):
        angle = turn * math.tau / 7
        _disc(
            draw, x + 0.17 * size * math.cos(angle), y - 0.7 * size + 0.17 * size * math.sin(angle), 0.1 * size, colour
        )
    _disc(draw, x, y - 0.7 * size, 0.09 * size, "#8a5a00")


SUBJECTS: dict[str, Draw] = {"house": _house, "tree": _tree, "boat": _boat, "fish": _fish, "flower": _flower}
