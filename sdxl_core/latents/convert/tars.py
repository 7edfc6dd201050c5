"""Per-image files into tars beside JSON indexes, as large collections share pictures and latents ("1ktar").

`0000.tar … 0999.tar`: a picture called by a number is in tar number modulo 1000, any other in one picked by its name's
hash. Beside each `0000.json`: {"filesize", "hash", "hash_lfs", "files": {"ID.npz": {"offset", "size", "sha256"}}},
where `offset` is that of the first data byte, `hash_lfs` the tar's SHA-256 and `hash` the Git object name of a pointer
to it.
"""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import orjson

from sdxl_core.catalog.parts import key_hash
from sdxl_core.config import PackTarsConfig
from sdxl_core.errors import ConfigError, DataError, ShardError
from sdxl_core.files import atomic_writer, write_atomic
from sdxl_core.latents.bare import BareCache
from sdxl_core.latents.formats import crc32, inspect_per_image
from sdxl_core.latents.index import LatentIndex
from sdxl_core.lock import output_lock
from sdxl_core.progress import Progress, no_progress
from sdxl_core.refs import LatentFilesRef

BLOCK, END_BLOCKS = 512, 20
_RECORD_BYTES = BLOCK * END_BLOCKS


class Member(NamedTuple):
    """A file of latents. crc32: of its bytes, -1 where no index knows it."""

    name: str
    crc32: int


def pack_tars(config: PackTarsConfig, *, progress: Progress = no_progress) -> LatentFilesRef:
    """Write the tars that are not there yet. Every file is read and checked; the bytes in the tar are the file's.

    Raises: ConfigError: a packed set.   DataError: no files.   ShardError: a file is damaged (its name).
    """
    folder = config.path / "latents" if (config.path / "latents").is_dir() else config.path
    members = _members(folder)
    if not members:
        raise DataError(f"{folder}: holds no .npz files of latents.")
    tars: dict[int, list[Member]] = {}
    for member in members:
        tars.setdefault(tar_of(member.name, config.num_tars), []).append(member)
    digits = max(4, len(str(config.num_tars - 1)))
    num_bytes = 0
    with output_lock(config.out, purpose="pack-tars"):
        for done, (number, some) in enumerate(sorted(tars.items())):
            path = config.out / f"{number:0{digits}}.tar"
            if not _is_packed(path, some):
                _pack(path, folder, sorted(some))
            num_bytes += path.stat().st_size
            progress("pack", done + 1, len(tars))
    return LatentFilesRef(
        what="pack-tars", path=config.out, num_rows=len(members), num_files=len(tars), num_bytes=num_bytes
    )


def tar_of(name: str, num_tars: int) -> int:
    """Which tar a file goes into."""
    stem = Path(name).name.split(".")[0].split("_")[0]
    return (int(stem) if stem.isdecimal() else key_hash(name)) % num_tars


def _members(folder: Path) -> list[Member]:
    """The files that the index names, else all. Raises: ConfigError: packed files."""
    if not LatentIndex.exists(folder):
        files = BareCache(folder).files()
        return [Member(path.removeprefix(f"{folder}/"), -1) for _, path in files]
    index = LatentIndex.open(folder)
    members = []
    for batch in index.chunks(["file", "row", "crc32"]):
        if (batch["row"].to_numpy() >= 0).any():
            raise ConfigError(
                f"{folder}: holds packed files. Convert the set first: sdxl-flows convert-latents --layout per_image."
            )
        names = index.files(batch["file"].to_numpy().astype(np.int64))["path"].to_pylist()
        members += [Member(*one) for one in zip(names, batch["crc32"].to_pylist(), strict=True)]
    return members


def _pack(path: Path, folder: Path, members: list[Member]) -> None:
    """Write a tar, then its index. Raises: ShardError: a file is damaged, or another than the index says."""
    files: dict[str, Any] = {}
    with atomic_writer(path) as file:
        out = _Hashed(file)
        for member in members:
            _, written = inspect_per_image(folder / member.name)
            data = (folder / member.name).read_bytes()
            if member.crc32 not in (-1, written.crc32) or crc32(data) != written.crc32:
                raise ShardError(
                    f"{folder / member.name}: holds other bytes than were committed. Run `sdxl-flows verify` on the "
                    f"set."
                )
            info = tarfile.TarInfo(member.name)
            info.size = len(data)
            out.write(info.tobuf(tarfile.PAX_FORMAT))
            files[member.name] = {
                "offset": out.position, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()
            }  # fmt: skip
            out.write(data)
            out.write(bytes(-len(data) % BLOCK))
        out.write(bytes(2 * BLOCK))
        out.write(bytes(-out.position % _RECORD_BYTES))
    sha256 = out.digest.hexdigest()
    index = {
        "filesize": out.position, "hash": _pointer_hash(sha256, out.position), "hash_lfs": sha256, "files": files
    }  # fmt: skip
    write_atomic(path.with_suffix(".json"), orjson.dumps(index))


def _is_packed(path: Path, members: list[Member]) -> bool:
    """Whether a tar is there with its index, whole, and of these files."""
    try:
        index = orjson.loads(path.with_suffix(".json").read_bytes())
        names, size, sha256 = set(index["files"]), index["filesize"], index["hash_lfs"]
        if names != {member.name for member in members} or path.stat().st_size != size:
            return False
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256  # type: ignore[no-any-return]
    except (FileNotFoundError, orjson.JSONDecodeError, KeyError, TypeError):
        return False


def _pointer_hash(sha256: str, num_bytes: int) -> str:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {num_bytes}\n".encode()
    return hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()


class _Hashed:
    """A file that counts and hashes what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.position, self.digest = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self.position += len(data)
        self.digest.update(data)
