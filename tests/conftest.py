"""Order of the whole suite."""

import pytest

FIRST = ("flows", "packaging", "training", "latents", "core")  # files that start processes: two run beside each other


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files begin first, so that no process works on the last of them alone (`--dist loadfile`)."""
    items.sort(key=lambda item: FIRST.index(name) if (name := item.path.parent.name) in FIRST else len(FIRST))
