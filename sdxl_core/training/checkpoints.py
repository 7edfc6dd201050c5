"""Which model files a run has written, with sizes and digests."""

from __future__ import annotations

from pathlib import Path

import orjson

from sdxl_core.files import sha256_file, write_atomic
from sdxl_core.refs import FileRef


def list_checkpoints(model: Path, state: Path) -> list[FileRef]:
    """The single-file models in `model`, oldest first.

    Digests are kept in `state/checkpoints.json` by name, size and time: gigabytes are not read twice.
    """
    path = state / "checkpoints.json"
    try:
        known: dict[str, str] = orjson.loads(path.read_bytes())
    except (FileNotFoundError, orjson.JSONDecodeError):
        known = {}
    files = sorted(model.glob("*.safetensors"), key=lambda file: (file.stat().st_mtime_ns, file.name))
    digests: dict[str, str] = {}
    found = []
    for file in files:
        stat = file.stat()
        identity = f"{file.name} {stat.st_size} {stat.st_mtime_ns}"
        digests[identity] = known.get(identity) or sha256_file(file)
        found.append(FileRef(path=file, sha256=digests[identity], num_bytes=stat.st_size))
    if digests != known:
        write_atomic(path, orjson.dumps(digests))
    return found
