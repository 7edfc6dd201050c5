"""The encoder engine: pictures in, latents out. It knows nothing of shards, ledgers or files' names."""

from sdxl_core.latents.engine.engine import Engine
from sdxl_core.latents.engine.records import EncodedGroup, EncodedPicture, EngineReport, Picture

__all__ = ["EncodedGroup", "EncodedPicture", "Engine", "EngineReport", "Picture"]
