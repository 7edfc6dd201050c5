"""Latent sets in other forms, nothing encoded again: other layouts, sd-scripts' caches, tars, fewer files."""
