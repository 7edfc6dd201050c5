"""The latent cache: plan, encode in shards, commit, resume, read back."""

from sdxl_core.latents.formats import LatentRecord, read_per_image, write_per_image
from sdxl_core.latents.store import LatentStore

__all__ = ["LatentRecord", "LatentStore", "read_per_image", "write_per_image"]
