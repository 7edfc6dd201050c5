"""The writer: a thread that commits finished groups while the next are encoded."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from sdxl_core.latents.engine.clock import Clock
from sdxl_core.latents.engine.records import EncodedGroup


class Writer:
    """Commits groups in the order they were put. Leaving the block waits for all of them."""

    def __init__(self, commit: Callable[[EncodedGroup], None], clock: Clock) -> None:
        self.num_encoded = self.num_rejected = 0
        self._commit, self._clock = commit, clock
        self._groups: queue.Queue[EncodedGroup | None] = queue.Queue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._write_all, name="write", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._groups.put(None)
        self._thread.join()
        if self._error is not None and kind is None:
            raise self._error

    def put(self, group: EncodedGroup) -> None:
        """Hand a group over once the one before it is committed, so that a crash costs that one and no more.

        Raises: what a commit before it raised.
        """
        self._groups.join()
        if self._error is not None:
            raise self._error
        self._groups.put(group)

    def _write_all(self) -> None:
        while (group := self._groups.get()) is not None:
            try:
                with self._clock.working("write"):
                    self._commit(group)
            except BaseException as error:
                self._error = error
            else:
                self.num_encoded += len(group.pictures)
                self.num_rejected += len(group.rejected)
            finally:
                self._groups.task_done()
