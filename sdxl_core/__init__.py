"""The work behind sdxl-flows: datasets, buckets, latents, models, training. Never imports Prefect."""

__version__ = "0.1.0"
