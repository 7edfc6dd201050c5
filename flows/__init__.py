"""The order of steps and the fan-out; no arithmetic, no file formats."""

import tasks  # noqa: F401  (sets the project's Prefect settings before Prefect is imported)
