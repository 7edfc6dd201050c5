"""What is remembered of a folder of placed files: a ledger a shard, and one file that says what the folder holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import orjson

from sdxl_core.errors import ConfigError, DataError
from sdxl_core.files import write_atomic
from sdxl_core.subset.wanted import FileState

HEAD_FILE = ".subset.json"
WORK_FOLDER = ".subset"
LEDGER_SUFFIX = ".ledger"
ITEMS_A_PIECE = 4_096


@dataclass(slots=True)
class Ledger:
    """The files of one shard. It is named by the shard's digest.

    `written`: name -> the states (size, time) in which a file is known to be ours. Before the first file is placed it
    names everything that will be, so after a crash our own files are still known as ours; of a finished shard it names
    what is there, in the shard's order.   `marks`: by what a placed file is known besides: SHA-256 of a verified copy,
    inode of a hard link, path in a symbolic link.   `num_kept`: placed pictures.   `failed`: key and reason of pictures
    that could not be placed; the next run tries them again.
    """

    path: Path
    written: dict[str, tuple[FileState, ...]] = field(default_factory=dict)
    marks: dict[str, str] = field(default_factory=dict)
    finished: bool = False
    num_kept: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Ledger:
        """What a file says; nothing where there is none. Raises: DataError: it cannot be understood."""
        try:
            return cls.of(path, orjson.loads(path.read_bytes()))
        except FileNotFoundError:
            return cls(path)
        except orjson.JSONDecodeError as error:
            raise not_understood(path) from error

    @classmethod
    def of(cls, path: Path, stored: dict[str, Any]) -> Ledger:
        """Raises: DataError: it cannot be understood."""
        try:
            return cls(
                path,
                {name: tuple((size, time) for size, time in states) for name, states in stored["files"].items()},
                dict(stored.get("marks", {})),
                bool(stored["finished"]),
                int(stored.get("num_kept", 0)),
                [(key, detail) for key, detail in stored.get("failed", [])],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise not_understood(path) from error

    def write(self) -> None:
        """Write it as it comes, so that it is not held a second time. Raises: DiskFullError, DataError."""
        head = orjson.dumps({"finished": self.finished, "num_kept": self.num_kept, "failed": self.failed})
        pieces = [head[:-1], b',"files":{'], _items(self.written), [b'},"marks":{'], _items(self.marks), [b"}}"]
        write_atomic(self.path, chain.from_iterable(pieces))


def _items(items: Mapping[str, Any]) -> Iterator[bytes]:
    """The inside of a JSON object, in pieces."""
    rest, between = iter(items.items()), b""
    while some := dict(islice(rest, ITEMS_A_PIECE)):
        yield between + orjson.dumps(some)[1:-1]
        between = b","


def work_folder(out: Path) -> Path:
    return out / WORK_FOLDER


def ledger_path(out: Path, digest: str) -> Path:
    return work_folder(out) / f"{digest[:32]}{LEDGER_SUFFIX}"


def check_out(out: Path, sources: Iterable[Path]) -> None:
    """Refuse folders that hold each other. Raises: ConfigError."""
    there = out.resolve()
    for path in sources:
        source = path.resolve()
        if there == source or source in there.parents:
            raise ConfigError(f"out = {out} lies inside source = {path}: a later run would see the copies.")
        if there in source.parents:
            raise ConfigError(
                f"source = {path} lies inside out = {out}: whoever reads the subset would see all of the source too. "
                f"Choose another out folder."
            )
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out = {out}: this is a file; name a folder for the subset.")


def read_head(out: Path, *, settings: dict[str, str]) -> dict[str, Any] | None:
    """What `out/.subset.json` says, None where there is none.

    Raises: ConfigError: it was made with other settings.   DataError: it cannot be understood.
    """
    path = out / HEAD_FILE
    if not path.exists():
        return None
    try:
        stored: dict[str, Any] = orjson.loads(path.read_bytes())
        previous = {"how": "copy", **stored["settings"]}
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise not_understood(path) from error
    for name, value in settings.items():
        if previous.get(name) != value:
            raise ConfigError(
                f"{out} holds a subset made with {name} = {previous.get(name)!r}; now it is {value!r}. "
                f"Choose another out folder, or delete this one."
            )
    return stored


def not_understood(path: Path) -> DataError:
    return DataError(
        f"{path}: cannot be understood, so it is unknown whose files these are. Choose another out folder."
    )
