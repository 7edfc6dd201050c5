"""The work behind sdxl-flows: datasets, buckets, latents, models, training. Never imports Prefect."""

import logging

__version__ = "0.1.0"

# bitsandbytes tells every process that an optional kernel package of 4-bit inference is missing; nothing here uses it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
