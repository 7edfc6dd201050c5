"""Ray clusters on one machine, each node with Ray's processes of its own."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sdxl_core.ray_slots import LOOPBACK, OBJECT_STORE_BYTES, SETTINGS


@contextmanager
def two_nodes(*, num_cpus: int = 2, num_gpus: int = 0) -> Iterator[str]:
    """A head and another node; `ray_address = "auto"` finds them. Yields the head's address."""
    os.environ |= SETTINGS | LOOPBACK | {"RAY_worker_niceness": "0"}  # Ray's 15 is a standstill beside others
    from ray.cluster_utils import Cluster

    node: dict[str, Any] = {
        "num_cpus": num_cpus, "num_gpus": num_gpus, "object_store_memory": OBJECT_STORE_BYTES,
        "include_dashboard": False, "wait": False,
    }  # fmt: skip
    cluster = Cluster(initialize_head=True, head_node_args=node)
    before = os.environ.get("RAY_ADDRESS")
    try:
        cluster.add_node(**node)
        cluster.wait_for_nodes(timeout=180)
        os.environ["RAY_ADDRESS"] = cluster.address
        yield cluster.address
    finally:
        if before is None:
            os.environ.pop("RAY_ADDRESS", None)
        else:
            os.environ["RAY_ADDRESS"] = before
        cluster.shutdown()
