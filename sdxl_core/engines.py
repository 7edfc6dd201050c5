"""Where shards are worked on: in processes of this machine, or in those of a Ray cluster. The same calls either way."""

from __future__ import annotations

from sdxl_core.config import CacheLatentsConfig, LatentsOptions
from sdxl_core.devices import Slots, resolve_devices
from sdxl_core.lock import LOCK_NAME


def open_slots(config: CacheLatentsConfig) -> Slots:
    """The slots that `engine` and `devices` ask for; nothing is started before they are entered.

    Raises: ConfigError: a device that is not here, or Ray is not installed.
    """
    if config.engine == "ray":
        from sdxl_core.ray_slots import RaySlots

        return RaySlots(config.devices, address=config.ray_address, witness=config.out / "latents" / LOCK_NAME)
    return Slots(resolve_devices(config.devices))


def works_here(config: LatentsOptions) -> bool:
    """Whether no process of its own is wanted."""
    return config.engine == "processes" and config.devices.strip() == "cpu"


def check_devices(options: LatentsOptions) -> None:
    """What can be told before anything is started. Raises: as `open_slots`."""
    if options.engine == "ray":
        from sdxl_core.ray_slots import check_ray, ray_devices

        check_ray()
        ray_devices(options.devices)
    else:
        resolve_devices(options.devices)
