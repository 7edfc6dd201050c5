"""Join metadata JSONs (the shards of a `meta_lat.json`, or of anything else of that shape) into one.

The entries' bytes are checked and copied, not made into objects: unknown fields stay, memory does not grow with the
files, and what `json.dumps(indent=2)` wrote in shards comes out as it would have written the whole.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from glob import escape
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import msgspec
import numpy as np

from sdxl_core.config import MergeJsonConfig
from sdxl_core.dataset import forked
from sdxl_core.errors import ConfigError, DataError
from sdxl_core.files import atomic_writer, remove_stale_partials, start_writing
from sdxl_core.merge.shards import refuse_foreign
from sdxl_core.progress import Progress, no_progress
from sdxl_core.refs import MetadataRef
from sdxl_core.rejected import Rejected, update_rejected

STAGE = "merge-json"
BLOCK_BYTES = 1 << 19  # fits a core's own cache: blocks of 4 MiB take 1.6 times the cpu time
MIN_HASHED_BYTES = 1 << 16  # handing less to the other thread costs more than hashing it
HASHED_BEHIND = 16  # as many blocks may be written and not hashed yet
_ENTRY = re.compile(rb'(?m:^)  "')  # where an entry begins, in the layout of json.dumps(indent=2)


class _Entry(msgspec.Struct, gc=False):
    """Any JSON object; what is in it is looked through and let go."""


_decoder = msgspec.json.Decoder(dict[str, _Entry])


@dataclass(frozen=True, slots=True)
class _Checked:
    """A source that was read once. `hashes`: int64 of its keys, as bytes, in ascending order.

    `laid_out`: as `json.dumps(indent=2)` writes it, each key once; then its bytes can be copied.
    """

    path: Path
    hashes: bytes
    laid_out: bool

    @property
    def num_entries(self) -> int:
        return len(self.hashes) // 8


def merge_jsons(config: MergeJsonConfig, *, progress: Progress = no_progress) -> MetadataRef:
    """Join the entries of all sources, in order, into `config.out`. Of entries of one key the first is used.

    Raises: ConfigError: a source is not there.   DataError: a source is not metadata, or was cut short.
    DiskFullError.
    """
    if config.out.is_dir():
        raise ConfigError(f"out = {config.out}: this is a folder; name the JSON file to write in it.")
    refuse_foreign(config.out)
    remove_stale_partials(config.out.parent, name=escape(config.out.name))
    count = forked.num_processes(len(config.sources))
    checked: list[_Checked] = []

    def checks() -> Iterator[_Checked]:
        for source in results:
            checked.append(source)
            progress(STAGE, len(checked), len(config.sources))
            yield source
        if doubled := _doubled(checked):
            raise _KeyComesAgain(doubled)

    results = forked.map_forked(_check, config.sources, count=count, caller_works=False)
    with closing(results):
        try:  # written while the next are checked
            joiner = _write(config.out, checks(), _Joiner(set()))
        except _KeyComesAgain as again:
            joiner = _write(config.out, checked, _Joiner(again.hashes))
    num_seen = sum(source.num_entries for source in checked)
    rejected = config.out.parent / "rejected.jsonl"
    update_rejected(rejected, STAGE, joiner.rejected)
    return MetadataRef(
        path=config.out,
        sha256=joiner.digest.hexdigest(),
        num_seen=num_seen,
        num_kept=num_seen - len(joiner.rejected),
        num_rejected=len(joiner.rejected),
        num_empty=0,
        missing={},
        rejected=rejected,
        parents=tuple(str(path) for path in config.sources),
    )


def _write(out: Path, sources: Iterable[_Checked], joiner: _Joiner) -> _Joiner:
    """Raises: DataError: there is no entry in any source.   What `sources` raises; then nothing is written."""
    some: list[bytes | memoryview] = []
    num_bytes, hashed = 0, deque[Future[None]]()
    with atomic_writer(out) as file, ThreadPoolExecutor(1) as hashing, ThreadPoolExecutor(1) as syncing:
        for piece in joiner.pieces(_each_then_to_disk(sources, file, syncing)):
            some.append(piece)
            num_bytes += len(piece)
            file.write(piece)
            if num_bytes >= MIN_HASHED_BYTES:
                hashed.append(hashing.submit(joiner.hash, some))
                some, num_bytes = [], 0
                if len(hashed) > HASHED_BEHIND:
                    hashed.popleft().result()
        if joiner.is_empty:
            raise DataError(f"{joiner.first}: there is no picture in it, nor in the others.")
        hashing.submit(joiner.hash, some)
    return joiner


def _each_then_to_disk(sources: Iterable[_Checked], file: BinaryIO, syncing: ThreadPoolExecutor) -> Iterator[_Checked]:
    for source in sources:
        yield source
        syncing.submit(start_writing, file)


class _KeyComesAgain(Exception):
    """Keys whose hashes occur more than once: entries can no longer be copied without looking at them."""

    def __init__(self, hashes: set[int]) -> None:
        self.hashes = hashes


def _doubled(sources: Sequence[_Checked]) -> set[int]:
    hashes = np.concatenate([np.frombuffer(source.hashes, np.int64) for source in sources])
    hashes.sort(kind="stable")  # of parts in order
    return set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())


class _Joiner:
    """The bytes of the joined JSON, and what was left out of it. `doubled`: hashes of keys that may occur twice."""

    def __init__(self, doubled: set[int]) -> None:
        self._doubled = doubled
        self._seen: set[str] = set()
        self.digest = hashlib.sha256()
        self.rejected: list[Rejected] = []
        self.first: Path | None = None
        self.is_empty = True

    def hash(self, pieces: Iterable[bytes | memoryview]) -> None:
        for piece in pieces:
            self.digest.update(piece)

    def pieces(self, sources: Iterable[_Checked]) -> Iterator[bytes | memoryview]:
        yield b"{\n"
        between = b""
        for source in sources:
            self.first = self.first or source.path
            for piece in self._pieces_of(source):
                self.is_empty = False
                yield between
                yield piece
                between = b",\n"
        yield b"\n}"

    def _pieces_of(self, source: _Checked) -> Iterator[bytes | memoryview]:
        if not source.laid_out:
            for key, value in _whole(source.path).items():
                if self._is_first(key, source.path):
                    yield json.dumps({key: value}, indent=2).encode()[2:-2]
            return
        doubled = np.fromiter(self._doubled, np.int64)
        has_doubled = len(doubled) > 0 and np.isin(np.frombuffer(source.hashes, np.int64), doubled).any()
        data = _mapped(source.path)
        for start, end in _blocks(data):
            if has_doubled:
                if kept := self._without_doubled(data[start:end], source.path):
                    yield kept
            else:
                yield memoryview(data)[start:end]

    def _without_doubled(self, block: bytes, path: Path) -> bytes:
        starts = [match.start() for match in _ENTRY.finditer(block)]
        entries = [block[start:end].rstrip(b",\n") for start, end in pairwise([*starts, len(block)])]
        keys = list(_decoder.decode(b"{%s}" % block))
        return b",\n".join(entry for key, entry in zip(keys, entries, strict=True) if self._is_first(key, path))

    def _is_first(self, key: str, path: Path) -> bool:
        if hash(key) not in self._doubled:
            return True
        if key in self._seen:
            detail = f"{path} has it too; the entry of the first file is used"
            self.rejected.append(Rejected(stage=STAGE, key=key, reason="duplicate_key", detail=detail))
            return False
        self._seen.add(key)
        return True


def _check(path: Path) -> _Checked:
    """Read every byte of a file: is it metadata, and which keys has it?"""
    pieces: list[np.ndarray[Any, Any]] = []
    scratch = _Scratch()
    data = _mapped(path)
    for start, end in _blocks(data):
        scratch.fill(memoryview(data)[start:end])
        keys = _keys(path, scratch.text)
        if len(keys) != scratch.num_starts() + 1:  # a key that occurs twice, or it only looked like that layout
            pieces.clear()
            break
        pieces.append(_hashes(keys))
    hashes = np.concatenate(pieces) if pieces else _hashes(list(_whole(path)))
    hashes.sort()
    return _Checked(path, hashes.tobytes(), laid_out=bool(pieces))


class _Scratch:
    """Where one block after the other is looked at: memory asked of the system for each costs as much as looking."""

    def __init__(self) -> None:
        self._grow(2 * BLOCK_BYTES)

    def _grow(self, num_bytes: int) -> None:
        self._data = np.empty(num_bytes, np.uint8)
        self._found, self._next = np.empty((2, num_bytes), bool)
        self.text = self._data[:0].data

    def fill(self, block: memoryview) -> None:
        """Take a block; `text` is it between braces."""
        if len(self._data) < len(block) + 2:
            self._grow(2 * len(block))
        self.text = self._data[: len(block) + 2].data
        self.text[0], self.text[1:-1], self.text[-1] = ord("{"), block, ord("}")

    def num_starts(self) -> int:
        """How often a line break, two spaces and a quote follow each other."""
        num_places = len(self.text) - 3
        found, following = self._found[:num_places], self._next[:num_places]
        np.equal(self._data[:num_places], ord("\n"), out=found)
        for place, character in enumerate(b'  "', 1):
            found &= np.equal(self._data[place : place + num_places], character, out=following)
        return int(np.count_nonzero(found))


def _hashes(keys: list[str]) -> np.ndarray[Any, Any]:
    """Python's own hash of each key, the same in forked processes."""
    return np.fromiter(map(hash, keys), np.int64, len(keys))


def _keys(path: Path, text: memoryview) -> list[str]:
    try:
        return list(_decoder.decode(text))
    except msgspec.ValidationError as error:
        raise _not_metadata(path, error) from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise _not_json(path, error) from error


def _not_metadata(path: Path, problem: Exception | str) -> DataError:
    return DataError(f"{path}: not a metadata file, which is one object: picture key -> object ({problem}).")


def _not_json(path: Path, problem: Exception) -> DataError:
    return DataError(
        f"{path}: not valid JSON ({problem}). It may have been cut short while it was written; make it again. Nothing "
        f"was written."
    )


def _blocks(data: mmap.mmap) -> Iterator[tuple[int, int]]:
    """Ranges of whole entries, about BLOCK_BYTES each, without the comma behind the last.

    In the layout of `json.dumps(indent=2)` a line that begins with two spaces and a quote begins an entry: texts have
    no raw line break. A file of another layout has no range.
    """
    end = len(data)
    while end and data[end - 1 : end].isspace():
        end -= 1
    if data[:5] != b'{\n  "' or data[end - 2 : end] != b"\n}":
        return
    start, end = 2, end - 2
    while start < end:
        found = data.find(b',\n  "', min(start + BLOCK_BYTES, end))
        stop = found if 0 <= found < end else end
        yield start, stop
        start = stop + 2


def _mapped(path: Path) -> mmap.mmap:
    """The bytes of a file, mapped as long as anything looks at them. Raises: ConfigError, DataError."""
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise ConfigError(f"source = {path}: there is no such file.") from error
    except IsADirectoryError as error:
        raise ConfigError(f"source = {path}: this is a folder; name the metadata JSON in it.") from error
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}). Change its permissions, or leave it out."
        ) from error
    except ValueError as error:
        raise DataError(f"{path}: the file is empty. Make it again, or leave it out.") from error


def _whole(path: Path) -> dict[str, Any]:
    """A metadata JSON of any layout, read at once."""
    try:
        data = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise _not_json(path, error) from error
    if not isinstance(data, dict):
        raise _not_metadata(path, f"it holds a {type(data).__name__}")
    for key, entry in data.items():
        if not isinstance(entry, dict):
            raise _not_metadata(path, f"the entry of {key!r} is a {type(entry).__name__}")
    return data


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
