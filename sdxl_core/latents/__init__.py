"""The latent cache: plan, encode in shards, commit, resume, read back."""

from sdxl_core.latents.npz import LatentRecord, read_npz, write_npz
from sdxl_core.latents.store import LatentStore

__all__ = ["LatentRecord", "LatentStore", "read_npz", "write_npz"]
