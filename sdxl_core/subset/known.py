"""What earlier picks left in a subset's folder, in a database on disk: memory does not grow with their files."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from sdxl_core.errors import DataError, DiskFullError
from sdxl_core.files import disk_errors, partial_path
from sdxl_core.subset.ledger import Ledger, work_folder
from sdxl_core.subset.placed import is_ours
from sdxl_core.subset.wanted import FileState

_CACHE_KIB = 8_192
_NEW = f"""
PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA locking_mode = EXCLUSIVE; PRAGMA cache_size = -{_CACHE_KIB};
CREATE TABLE files (name TEXT PRIMARY KEY, states TEXT, mark TEXT, is_wanted INTEGER DEFAULT 0) WITHOUT ROWID;
"""
_ADD = """
INSERT INTO files (name, states, mark) VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE
SET states = states || ' ' || excluded.states, mark = coalesce(excluded.mark, mark)
"""


class KnownFiles:
    """Files that are ours by ledgers whose shards are no more. Made by `known_files`."""

    def __init__(self, out: Path, database: sqlite3.Connection) -> None:
        self._out, self._database = out, database
        self.is_empty = True

    def add(self, ledger: Ledger) -> None:
        self.is_empty = self.is_empty and not ledger.written
        rows = ((name, _text(states), ledger.marks.get(name)) for name, states in ledger.written.items())
        self._database.executemany(_ADD, rows)

    def give(self, ledger: Ledger, names: Iterable[str]) -> bool:
        """Tell a shard's ledger what is known of its names. Returns whether anything was."""
        find = "SELECT states, mark FROM files WHERE name = ?"
        found = []
        for name in names:
            row = self._database.execute(find, (name,)).fetchone()
            if row is None:
                continue
            found.append((name,))
            states = (*ledger.written.get(name, ()), *_states(row[0]))
            ledger.written[name] = tuple(dict.fromkeys(states))
            if row[1] is not None:
                ledger.marks[name] = row[1]
        self._database.executemany("UPDATE files SET is_wanted = 1 WHERE name = ?", found)
        return bool(found)

    def check_unwanted(self) -> None:
        """Raises: DataError: a file of ours that nobody wants any more is no longer as we left it."""
        for name, states, mark in self._unwanted():
            path = self._out / name
            if os.path.lexists(path) and not is_ours(path, _states(states), mark):
                raise DataError(
                    f"{path} belongs to a picture that the query no longer picks, but was changed since it "
                    f"was copied; it is not removed. Remove it, or choose another out folder."
                )

    def remove_unwanted(self) -> None:
        """Remove our files that nobody was given. Raises: DataError: no permission."""
        with disk_errors(self._out):
            for name, *_ in self._unwanted():
                (self._out / name).unlink(missing_ok=True)

    def _unwanted(self) -> Iterator[tuple[str, str, str | None]]:
        yield from self._database.execute("SELECT name, states, mark FROM files WHERE NOT is_wanted")


@contextmanager
def known_files(out: Path, ledgers: Iterable[Ledger]) -> Iterator[KnownFiles]:
    """What the ledgers say, as long as the block lasts: 0.1 to 0.2 kB a file beside the ledgers on disk.

    Raises: DiskFullError, DataError (no permission).
    """
    path = Path(partial_path(work_folder(out).absolute() / "known"))
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?nolock=1", uri=True, isolation_level=None)) as database:
            database.executescript(_NEW)
            database.execute("BEGIN")
            known = KnownFiles(out, database)
            for ledger in ledgers:
                known.add(ledger)
            yield known
    except sqlite3.OperationalError as error:
        raise DiskFullError(
            f"{path}: what is known of the subset's files cannot be kept there ({error}). Free some space, about 200 "
            f"bytes a file, and run the same command again."
        ) from error
    finally:
        with suppress(FileNotFoundError):
            path.unlink()


def _text(states: Iterable[FileState]) -> str:
    return " ".join(f"{size} {time}" for size, time in states)


def _states(text: str) -> tuple[FileState, ...]:
    numbers = list(map(int, text.split()))
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))
