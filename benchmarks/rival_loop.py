"""The loop that people ran: decode, resize, encode, gc.collect(), np.savez, one picture after another."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from sdxl_core.buckets import BucketTable, crop_ltrb

Encode = Callable[[torch.Tensor], torch.Tensor]  # uint8 [1, h, w, 3] to latents [1, 4, h / 8, w / 8]


def rival_loop(paths: Iterable[Path], table: BucketTable, encode: Encode, out: Path) -> None:
    for path in paths:
        image = np.array(Image.open(path).convert("RGB"))
        height, width = image.shape[:2]
        choice = table.choose(width_px=width, height_px=height)
        size = choice.resized_width_px, choice.resized_height_px
        if width >= size[0] and height >= size[1]:
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        else:
            image = np.array(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
        top, left = choice.crop_top_px, choice.crop_left_px
        image = image[top : top + choice.bucket.height_px, left : left + choice.bucket.width_px]
        latents = encode(torch.from_numpy(np.ascontiguousarray(image))[None])
        gc.collect()
        np.savez(
            out / f"{path.stem}.npz",
            latents=latents[0].float().cpu().numpy(),
            original_size=np.array([width, height]),
            crop_ltrb=np.array(crop_ltrb(choice.bucket, width_px=width, height_px=height)),
        )
