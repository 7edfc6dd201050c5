"""How many pictures a batch has where the settings leave it open (`batch_size = 0`): tried once, then kept."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from sdxl_core.config import CacheLatentsConfig
from sdxl_core.errors import DataError
from sdxl_core.files import write_atomic
from sdxl_core.latents.vae import EncodeFunction, LoadFunction

ON_CPU = 4  # more gains nothing there
MOST = 64
WORTH_IT = 1.05  # a batch of twice the size is taken where it encodes this many times as many pictures a second
FILE = Path("latents") / ".ledger" / "batch_size"


def settled_batch_size(config: CacheLatentsConfig, device: torch.device, load: LoadFunction) -> int:
    """`batch_size`, or what was found when this output was begun, or what is found now and kept for every later run.

    The results depend on it, so it is found once: processes that try at the same time all take what the first one kept.
    Raises: DataError: what was kept is no number.   ConfigError, CheckpointError: no such VAE.
    """
    if config.batch_size:
        return config.batch_size
    path = config.out / FILE
    if not path.exists():
        found = find_batch_size(config, device, load)
        mine = path.with_name(f"{path.name}.{os.getpid()}")
        write_atomic(mine, str(found).encode())
        try:
            os.link(mine, path)
        except FileExistsError:
            pass  # another process was first
        finally:
            mine.unlink()
    kept = path.read_bytes()
    if not kept.isdigit() or not 1 <= int(kept) <= MOST:
        raise DataError(
            f"{path}: holds no batch size, so it is not known in which batches these latents were made. Set batch_size "
            f"to the number they were made with, or encode into another folder."
        )
    return int(kept)


def find_batch_size(config: CacheLatentsConfig, device: torch.device, load: LoadFunction) -> int:
    """The largest batch of resolution_px squared that fits and still gains; a power of two, 1 to 64."""
    if device.type == "cpu":
        return ON_CPU
    encode = load(config.vae, config.dtype, device)
    best, best_rate = 1, 0.0
    size = 1
    while size <= MOST:
        try:
            rate = size / _seconds(encode, size, config, device)
        except torch.OutOfMemoryError:
            break
        if rate < best_rate * WORTH_IT:
            break
        best, best_rate, size = size, rate, size * 2
    torch.cuda.empty_cache()
    return best


@torch.inference_mode()
def _seconds(encode: EncodeFunction, size: int, config: CacheLatentsConfig, device: torch.device) -> float:
    """A batch's time, the second time it is encoded."""
    side = config.resolution_px // 8 * 8
    pixels = torch.zeros((size, side, side, 3), dtype=torch.uint8, device=device)
    started = 0.0
    for _ in range(2):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        encode(pixels)
    torch.cuda.synchronize(device)
    return time.perf_counter() - started
