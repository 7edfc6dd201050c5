"""The writer: a thread that writes batches as they are encoded, and commits groups when they are whole."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from sdxl_core.latents.engine.clock import Clock
from sdxl_core.latents.engine.records import EncodedGroup, EncodedPicture

Commit = Callable[[EncodedGroup], None]
Write = Callable[[int, Sequence[EncodedPicture]], None]  # the group's number, a batch of it


class Writer:
    """Writes and commits in the order things were put; nothing after the first error. Leaving the block waits."""

    def __init__(self, commit: Commit, write: Write | None, clock: Clock) -> None:
        self.num_encoded = self.num_rejected = 0
        self._commit, self._write, self._clock = commit, write, clock
        self._queue: queue.Queue[EncodedGroup | tuple[int, Sequence[EncodedPicture]] | None] = queue.Queue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work_all, name="write", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.put(None)
        self._thread.join()
        if self._error is not None and kind is None:
            raise self._error

    def put_batch(self, number: int, pictures: Sequence[EncodedPicture]) -> None:
        """A batch of a group that is under way is encoded. Raises: what writing before it raised."""
        self._check()
        if self._write is not None and pictures:
            self._queue.put((number, pictures))

    def put(self, group: EncodedGroup) -> None:
        """A group is whole: all of its batches were put. Raises: what writing before it raised."""
        self._check()
        self._queue.put(group)

    def wait(self) -> None:
        """Until everything that was put is written and committed. Raises: what that raised."""
        self._queue.join()
        self._check()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _work_all(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                if self._error is None:
                    self._work(item)
            except BaseException as error:
                self._error = error
            finally:
                self._queue.task_done()

    def _work(self, item: EncodedGroup | tuple[int, Sequence[EncodedPicture]]) -> None:
        with self._clock.working("write"):
            if isinstance(item, EncodedGroup):
                self._commit(item)
                self.num_encoded += len(item.pictures)
                self.num_rejected += len(item.rejected)
            elif self._write is not None:
                self._write(*item)
