"""Prefect settings that belong to the project, as environment defaults: what the user sets always wins."""

import os

SETTINGS = {
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # the first start migrates a database: 20 s is short
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",  # never pickle
    "PREFECT_CLIENT_MAX_RETRIES": "30",  # a server that restarts does not end a run of days
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
}


def apply_settings() -> None:
    """Set every setting that the environment leaves open. Call before `import prefect`."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
