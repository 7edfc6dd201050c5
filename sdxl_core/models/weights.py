"""Reading weights from safetensors, one tensor at a time, with errors that say what the file is instead."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdxl_core.errors import CheckpointError, ConfigError

KINDS = "a .safetensors file, a diffusers folder, or tiny"
MAX_HEADER_BYTES = 100_000_000
_ARCHITECTURES = (
    ("Stable Diffusion 1.x", ("cond_stage_model.transformer.",)),
    ("Stable Diffusion 2.x", ("cond_stage_model.model.",)),
    ("Stable Diffusion 3", ("model.diffusion_model.joint_blocks.", "joint_blocks.")),
    ("Flux", ("model.diffusion_model.double_blocks.", "double_blocks.")),
    ("a LoRA", ("lora_unet_", "lora_te", "unet.down_blocks.0.attentions")),
    ("a diffusers U-Net without the rest (name its whole folder)", ("down_blocks.", "unet.down_blocks.")),
)


class WeightFile(Mapping[str, Tensor]):
    """A safetensors file as a read-only mapping; a tensor is read from disk when it is asked for.

    Raises: ConfigError: no such file.   CheckpointError: not safetensors, or cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _refuse_foreign(path)
        try:
            file: Any = safe_open(path, framework="pt")
            self._file, self._keys = file, set(file.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: not a whole .safetensors file ({error}). A download or copy was probably cut short "
                f"({path.stat().st_size} bytes are here); fetch it again."
            ) from error

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        tensor: Tensor = self._file.get_tensor(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def shape(self, key: str) -> tuple[int, ...]:
        """A tensor's shape without reading it, () where there is no such key."""
        if key not in self._keys:
            return ()
        part: Any = self._file.get_slice(key)
        return tuple(part.get_shape())

    def describe(self) -> str:
        """What the file seems to be, from its keys."""
        for name, prefixes in _ARCHITECTURES:
            if any(key.startswith(prefixes) for key in self._keys):
                return name
        heads = sorted({key.split(".")[0] for key in self._keys})
        if set(heads) <= {"encoder", "decoder", "quant_conv", "post_quant_conv", "first_stage_model"}:
            return "a VAE without the rest"
        if heads == ["model"]:
            return "a U-Net without text encoders and VAE"
        return f"something else (its {len(self._keys)} keys begin with {', '.join(heads[:5])})"


class WeightFiles(Mapping[str, Tensor]):
    """Several safetensors files (a sharded component of a diffusers folder) as one mapping."""

    def __init__(self, files: list[WeightFile]) -> None:
        self._owner = {key: file for file in files for key in file}

    def __getitem__(self, key: str) -> Tensor:
        return self._owner[key][key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._owner)

    def __len__(self) -> int:
        return len(self._owner)


def component_files(folder: Path) -> list[Path]:
    """The weight files of one component's folder: single, fp16 variant or sharded; the full-precision one is preferred.

    Raises: CheckpointError: there is none, or a shard is missing.
    """
    for stem in ("diffusion_pytorch_model", "model"):
        index = folder / f"{stem}.safetensors.index.json"
        if index.exists():
            names = sorted(set(orjson.loads(index.read_bytes())["weight_map"].values()))
            missing = [name for name in names if not (folder / name).exists()]
            if missing:
                raise CheckpointError(f"{folder}: {missing[0]} is named in {index.name} but is not there; copy it too.")
            return [folder / name for name in names]
        for variant in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
            if (folder / variant).exists():
                return [folder / variant]
    raise CheckpointError(
        f"{folder}: there are no .safetensors weights in it (only .safetensors is read; .bin files are pickles and can "
        f"run code). Save the model again with safe_serialization=True."
    )


def header_digest(path: Path) -> str:
    """SHA-256 over a safetensors header with the file's size and modification time: a cheap identity."""
    WeightFile(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
    status = path.stat()
    digest = hashlib.sha256(header)
    digest.update(f"{status.st_size}|{status.st_mtime_ns}".encode())
    return digest.hexdigest()


def _refuse_foreign(path: Path) -> None:
    if not path.exists():
        raise ConfigError(
            f"{path}: there is no such file or folder. Name a .safetensors file, a diffusers folder or tiny."
        )
    with open(path, "rb") as file:
        head = file.read(9)
    if not head:
        raise CheckpointError(f"{path}: the file is empty. Fetch it again.")
    if head.startswith((b"PK\x03\x04", b"\x80")) or path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise CheckpointError(
            f"{path}: a pickle, which can run code when opened, so it is not read. Convert it to .safetensors first "
            f"(any user interface's checkpoint merger can save as safetensors)."
        )
    if len(head) < 9 or head[8:9] != b"{" or int.from_bytes(head[:8], "little") > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: not a .safetensors file. Name {KINDS}.")
