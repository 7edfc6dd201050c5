"""The work behind sdxl-flows: datasets, buckets, latents, models, training. Never imports Prefect."""

import logging
import os

__version__ = "0.1.0"

# bitsandbytes tells every process that an optional kernel package of 4-bit inference is missing; nothing here uses it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# pyarrow's own allocator is no faster here than the C library's, and keeps some 40 MB more in each process.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
