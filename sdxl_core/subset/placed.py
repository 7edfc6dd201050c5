"""A folder of placed files that can be taken up again, and that are told apart from files of others."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import orjson

from sdxl_core.errors import ConfigError, DataError
from sdxl_core.files import digest_of_all, disk_errors, remove_stale_partials, sha256_file, write_atomic
from sdxl_core.subset.methods import PlacingFailed, place, try_link
from sdxl_core.subset.wanted import FileState, Wanted, WantedGroup

LEDGER_FILE = ".subset.json"
ITEMS_A_PIECE = 4_096
UNREADABLE: FileState = (-1, -1)


@dataclass(slots=True)
class Placed:
    """The placed files below `out`, remembered in `out/.subset.json`.

    `written`: name -> the states (size, time) in which a file is known to be ours. Before the first file is placed it
    names everything that will be, so after a crash our own files are still known as ours; afterwards it names what is
    there. `marks`: by what a placed file is known besides: SHA-256 of a verified copy, inode of a hard link, path in a
    symbolic link. Copies are not synced one by one: a copy that a power cut tore has its time but another size, or,
    having no mark yet, is read and compared; it is made again.
    About 1 kB a file is held.
    """

    out: Path
    how: str
    settings: dict[str, str]
    written: dict[str, tuple[FileState, ...]] = field(default_factory=dict)
    marks: dict[str, str] = field(default_factory=dict)
    finished: bool = True
    planned: dict[str, FileState] = field(default_factory=dict)
    _there: dict[str, set[str]] = field(default_factory=dict)  # names by folder below `out`
    _tried: set[int] = field(default_factory=set)  # file systems that links were tried from
    _news: bool = False  # marks that the ledger has not

    @classmethod
    def open(cls, out: Path, *, how: str, settings: dict[str, str]) -> Placed:
        """Take up what an earlier run left. Raises: ConfigError: `out` belongs to other settings.   DataError."""
        stored = read_ledger(out, settings={**settings, "how": how})
        if stored is None:
            return cls(out, how, settings)
        try:
            written = {name: tuple((size, time) for size, time in states) for name, states in stored["files"].items()}
            return cls(out, how, settings, written, dict(stored.get("marks", {})), bool(stored["finished"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _not_understood(out) from error

    def begin(self, groups: Iterable[WantedGroup]) -> None:
        """Say which files there shall be: refuse to start if one is in the way, remove ours of others.

        Raises: DataError: a file that is not ours, with another content.   ConfigError: links are not possible.
        Nothing was changed then.
        """
        for group in groups:
            for wanted in group.files:
                self._plan(wanted)
        stale = self._stale()
        remove_stale_partials(self.out, name="*", recursive=not self.finished)
        for name in self.written.keys() - self.planned.keys() - set(stale):
            del self.written[name]  # gone already: whoever puts a file there now has it to himself
        if stale or any(state not in self.written.get(name, ()) for name, state in self.planned.items()):
            for name, state in self.planned.items():
                self.written[name] = (*self.written.get(name, ()), state)
            self._remember(self.written.items(), finished=False)
        with disk_errors(self.out):
            for name in stale:
                (self.out / name).unlink(missing_ok=True)

    def place(self, group: WantedGroup) -> None:
        """Place the files of a group in their order; what is already there is left as it is.

        Raises: PlacingFailed: one of them cannot be read; then none of them is there.   DiskFullError, DataError.
        """
        try:
            for wanted in group.files:
                self._place(wanted)
        except PlacingFailed:
            for wanted in group.files:
                self._take_back(wanted.name)
            raise

    def finish(self) -> None:
        """Remember what is there; written only if that is news."""
        is_told = self.written.keys() == self.planned.keys() and all(
            self.written[name] == (state,) for name, state in self.planned.items()
        )
        if not self.finished or self._news or not is_told:
            self._remember(((name, (state,)) for name, state in self.planned.items()), finished=True)

    def digest(self) -> str:
        """Identity of the files: names, sizes and times."""
        return digest_of_all(f"{name}|{size}|{time}" for name, (size, time) in self.planned.items())

    def _plan(self, wanted: Wanted) -> None:
        if wanted.offset >= 0 and self.how != "copy":
            raise ConfigError(
                f"how = {self.how}: {wanted.name} lies inside {wanted.path}, which has no file of its own to link. "
                f"Choose how = copy (takes it out of the tar), or manifest (says where it is; nothing is copied)."
            )
        try:
            status = os.stat(wanted.path)
            state = wanted.state(status)
            if status.st_dev not in self._tried and wanted.text is None:
                self._tried.add(status.st_dev)
                try_link(self.how, wanted.path, self.out)
        except OSError:
            state = UNREADABLE  # place() meets the same failure
        self.planned[wanted.name] = state
        if not self._may_write(wanted, state):
            source = wanted.path if wanted.is_whole_file else f"what {wanted.path} has for it"
            raise DataError(
                f"{self.out / wanted.name} exists with another content than {source}; it is not overwritten. "
                f"Remove it, or choose another out folder."
            )

    def _stale(self) -> list[str]:
        """Our files that nobody wants any more. Raises: DataError: one of them is no longer as we left it."""
        gone = [name for name in self.written if name not in self.planned and os.path.lexists(self.out / name)]
        for name in gone:
            if not self._is_ours(name):
                raise DataError(
                    f"{self.out / name} belongs to a picture that the query no longer picks, but was changed since it "
                    f"was copied; it is not removed. Remove it, or choose another out folder."
                )
        return gone

    def _is_ours(self, name: str) -> bool:
        path = self.out / name
        mark = self.marks.get(name)
        if path.is_symlink():
            return self.how == "symlink" and (mark is None or os.readlink(path) == mark)
        return (self.how == "hardlink" and str(path.stat().st_ino) == mark) or _state(path) in self.written[name]

    def _may_write(self, wanted: Wanted, state: FileState) -> bool:
        """Whether nothing is at the file's place, or one of ours, whole or torn, or the same content."""
        folder, _, base = wanted.name.rpartition("/")
        if base not in self._names_in(folder):
            return True
        target = self.out / wanted.name
        if target.is_symlink() and os.readlink(target) in (wanted.path, self.marks.get(wanted.name)):
            return True
        if not target.is_file():
            return False
        there = _state(target)
        for size, time in self.written.get(wanted.name, ()):
            if time == there[1] and there[0] <= size:  # ours: whole, or torn by a power cut
                return True
        return self._same_file(wanted) or (there[0] == state[0] and self._same_content(wanted))

    def _names_in(self, folder: str) -> set[str]:
        """Names in a folder below `out`, looked at once. Raises: DataError: there is a file in the folder's place."""
        if folder not in self._there:
            try:
                self._there[folder] = set(os.listdir(self.out / folder))
            except FileNotFoundError:
                self._there[folder] = set()
            except NotADirectoryError as error:
                raise DataError(
                    f"{self.out / folder} exists and is no folder, but files of the subset belong into it. "
                    f"Remove it, or choose another out folder."
                ) from error
        return self._there[folder]

    def _same_file(self, wanted: Wanted) -> bool:
        try:
            return wanted.is_whole_file and os.path.samefile(wanted.path, self.out / wanted.name)
        except OSError:
            return False

    def _same_content(self, wanted: Wanted) -> bool:
        target = self.out / wanted.name
        try:
            if wanted.text is not None:
                return target.read_bytes() == wanted.text
            if wanted.offset < 0:
                return filecmp.cmp(wanted.path, target, shallow=False)
            with open(wanted.path, "rb") as tar:
                tar.seek(wanted.offset)
                return target.read_bytes() == tar.read(wanted.num_bytes)
        except OSError:
            return False

    def _place(self, wanted: Wanted) -> None:
        name = wanted.name
        folder, _, base = name.rpartition("/")
        there = self._there[folder]
        if base in there and self._is_placed(wanted):
            return
        if not there:
            with disk_errors(self.out / folder):
                (self.out / folder).mkdir(parents=True, exist_ok=True)
        self.planned[name], mark = place(self.how, wanted, f"{self.out}/{name}")
        there.add(base)
        if mark:
            self._mark(name, mark)

    def _is_placed(self, wanted: Wanted) -> bool:
        """Whether the file stands as planned. A copy without a mark is compared with its source and gets one."""
        name, target = wanted.name, self.out / wanted.name
        if self.how == "symlink" and wanted.text is None:
            return target.is_symlink() and os.readlink(target) == wanted.path and target.exists()
        if self.how == "hardlink" and wanted.text is None:
            return self._same_file(wanted)
        try:
            if _state(target) != self.planned[name]:
                return False
        except FileNotFoundError:
            return False
        if name not in self.marks:
            if not self._same_content(wanted):
                return False
            self._mark(name, sha256_file(target))
        return True

    def _mark(self, name: str, mark: str) -> None:
        self.marks[name], self._news = mark, True

    def _take_back(self, name: str) -> None:
        path = self.out / name
        with suppress(FileNotFoundError):
            if path.is_symlink() or _state(path) in [*self.written.get(name, ()), self.planned[name]]:
                path.unlink()
        self._there[name.rpartition("/")[0]].discard(path.name)
        self.marks.pop(name, None)
        del self.planned[name]

    def _remember(self, files: Iterable[tuple[str, tuple[FileState, ...]]], *, finished: bool) -> None:
        """Write the ledger as it comes, so that it is not held a second time."""
        names = self.written if not finished else self.planned
        head = orjson.dumps({"settings": {**self.settings, "how": self.how}, "finished": finished})
        marks = ((name, mark) for name, mark in self.marks.items() if name in names)
        pieces = chain([head[:-1], b',"files":{'], _items(files), [b'},"marks":{'], _items(marks), [b"}}"])
        write_atomic(self.out / LEDGER_FILE, pieces)
        self.finished = finished


def _items(items: Iterable[tuple[str, Any]]) -> Iterator[bytes]:
    """The inside of a JSON object, in pieces."""
    rest, between = iter(items), b""
    while some := dict(islice(rest, ITEMS_A_PIECE)):
        yield between + orjson.dumps(some)[1:-1]
        between = b","


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


def read_ledger(out: Path, *, settings: dict[str, str]) -> dict[str, Any] | None:
    """What `out/.subset.json` says, None where there is none.

    Raises: ConfigError: it was made with other settings.   DataError: it cannot be understood.
    """
    path = out / LEDGER_FILE
    if not path.exists():
        return None
    try:
        stored: dict[str, Any] = orjson.loads(path.read_bytes())
        previous = {"how": "copy", **stored["settings"]}
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise _not_understood(out) from error
    for name, value in settings.items():
        if previous.get(name) != value:
            raise ConfigError(
                f"{out} holds a subset made with {name} = {previous.get(name)!r}; now it is {value!r}. "
                f"Choose another out folder, or delete this one."
            )
    return stored


def _not_understood(out: Path) -> DataError:
    return DataError(
        f"{out / LEDGER_FILE}: cannot be understood, so it is unknown whose files these are. Choose another out folder."
    )


def _state(path: Path) -> FileState:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns
