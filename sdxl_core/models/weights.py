"""Reading weights from safetensors, one tensor at a time, and refusing what is not a whole safetensors file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdxl_core.errors import CheckpointError, ConfigError
from sdxl_core.files import digest_of, sha256_file
from sdxl_core.models.presets import MODEL_COMPONENTS

MAX_HEADER_BYTES = 100_000_000
END_BYTES = 2048  # of a tensor, at each end; the end of one and the beginning of the next lie side by side
_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


class Weights(Mapping[str, Tensor]):
    """Tensors by name. `shapes` is known without reading a tensor."""

    shapes: dict[str, tuple[int, ...]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class WeightFile(Weights):
    """A safetensors file; a tensor is read from disk when it is asked for.

    Raises: ConfigError: no such file.   CheckpointError: not safetensors, or cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _refuse_foreign(path)
        try:
            self._file: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: not a whole .safetensors file ({error}). A download or copy was probably cut short "
                f"({path.stat().st_size} bytes are here); fetch it again."
            ) from error
        header = orjson.loads(_header(path))
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self.shapes = {key: tuple(entry["shape"]) for key, entry in header.items()}

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.shapes:
            raise KeyError(key)
        tensor: Tensor = self._file.get_tensor(key)
        return tensor


class WeightFiles(Weights):
    """Several safetensors files (a component of a diffusers folder, perhaps sharded) as one mapping."""

    def __init__(self, files: list[WeightFile]) -> None:
        self._owner = {key: file for file in files for key in file}
        self.shapes = {key: file.shapes[key] for key, file in self._owner.items()}

    def __getitem__(self, key: str) -> Tensor:
        return self._owner[key][key]


def component_files(folder: Path) -> list[Path]:
    """The weight files of one component's folder: full precision before the fp16 variant, whole or sharded.

    Raises: CheckpointError: there is none, or a shard is missing.
    """
    for stem in ("diffusion_pytorch_model", "model"):
        for variant in ("", ".fp16"):
            whole = folder / f"{stem}{variant}.safetensors"
            if whole.exists():
                return [whole]
            for index in (f"{stem}.safetensors{variant}.index.json", f"{stem}.safetensors.index{variant}.json"):
                if (folder / index).exists():
                    return _sharded_files(folder / index)
    raise CheckpointError(
        f"{folder}: there are no .safetensors weights in it (.bin files are pickles, which can run code when they are "
        f"opened, and are not read). Save the model again with safe_serialization=True."
    )


def _sharded_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(orjson.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not the index of a sharded model ({error!r}). Fetch it again.") from error
    missing = [name for name in names if not (index.parent / name).exists()]
    if missing:
        raise CheckpointError(f"{index}: names {missing[0]}, which is not there. Copy it into the folder, too.")
    return [index.parent / name for name in names]


def content_digest(path: Path) -> str:
    """SHA-256 over a safetensors header, the file's size and both ends of every tensor: the same for every copy.

    Reads some 10 MB of a full checkpoint in the order of the file. Training moves whole tensors, so two models that
    differ have other ends somewhere; a flipped byte in the middle of one is not what this is for.
    Raises: as `WeightFile`.
    """
    WeightFile(path)
    header = _header(path)
    digest = hashlib.sha256(header)
    entries = orjson.loads(header)
    entries.pop("__metadata__", None)
    start = 8 + len(header)
    with open(path, "rb", buffering=0) as file:
        digest.update(file.seek(0, os.SEEK_END).to_bytes(8, "little"))
        for first, last in sorted(entry["data_offsets"] for entry in entries.values()):
            for begin, end in _ends(first, last):
                file.seek(start + begin)
                digest.update(file.read(end - begin))
    return digest.hexdigest()


def _ends(first: int, last: int) -> list[tuple[int, int]]:
    if last - first <= 2 * END_BYTES:
        return [(first, last)]
    return [(first, first + END_BYTES), (last - END_BYTES, last)]


def dated_digest(path: Path) -> str:
    """What version 0.1 knew a weight file by: header, size and modification time. Raises: as `WeightFile`."""
    WeightFile(path)
    status = path.stat()
    return digest_of(hashlib.sha256(_header(path)).digest(), status.st_size, status.st_mtime_ns)


def folder_digest(folder: Path) -> str:
    """The digest that `save_diffusers_folder` returns, from the files that are there; "" where one is missing."""
    try:
        files = [file for part in MODEL_COMPONENTS for file in component_files(folder / part)]
    except CheckpointError:
        return ""
    return digest_of(*(sha256_file(file) for file in files))


def raw_bytes(tensor: Tensor) -> memoryview:
    """A CPU tensor's bytes in row-major order, as safetensors stores them; not copied if it lies like that already."""
    flat: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def _header(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def _refuse_foreign(path: Path) -> None:
    if not path.exists():
        raise ConfigError(
            f"{path}: there is no such file or folder. Name a .safetensors file, a diffusers folder, or tiny; nothing "
            f"is downloaded."
        )
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}). Check what it is and its permissions."
        ) from error
    if not head:
        raise CheckpointError(f"{path}: the file is empty. Fetch it again.")
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER_BYTES:
        return
    if head.startswith((b"PK\x03\x04", b"\x80")) or path.suffix.lower() in _PICKLES:
        raise CheckpointError(
            f"{path}: a pickle, which can run code when it is opened, so it is not read. Convert it to .safetensors "
            f"first (the checkpoint merger of any user interface can save as safetensors)."
        )
    raise CheckpointError(f"{path}: not a .safetensors file. Name a .safetensors file, a diffusers folder, or tiny.")
