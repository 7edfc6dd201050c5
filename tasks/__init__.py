"""One task wraps one core function: retry, cache, log, artifact. Importing this sets the project's Prefect settings."""

from tasks.settings import apply_settings

apply_settings()
