"""Order of the whole suite, and no deadlines: how long something takes is the machine's."""

import pytest
from hypothesis import settings

FIRST = ("packaging", "training", "latents")  # long files, so that no process works on the last of them alone
LAST = ("core", "flows")  # Prefect's and Ray's threads stay, draw from `random` and change what forks end with
ORDER = (*FIRST, "", *LAST)

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For `--dist loadfile --no-loadscope-reorder`, which hands out files in this order."""
    items.sort(key=lambda item: ORDER.index(name if (name := item.path.parent.name) in ORDER else ""))
