"""From a checkpoint back to the pictures, tags, settings and code that made it."""

from sdxl_core.lineage.record import lineage_metadata
from sdxl_core.lineage.trace import Lineage, trace

__all__ = ["Lineage", "lineage_metadata", "trace"]
