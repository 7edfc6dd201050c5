"""The feed: a thread that reads groups in order, and threads that prepare their pictures ahead of the device."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from sdxl_core.images.decode import BadPicture
from sdxl_core.latents.engine.clock import Clock
from sdxl_core.latents.engine.prepare import Prepared
from sdxl_core.latents.engine.read import Reader, read_in_order
from sdxl_core.latents.engine.records import Picture

Group = tuple[int, Sequence[Picture]]
Outcome = Prepared | BadPicture
Item = tuple[Picture, Future[Prepared] | BadPicture]


class Feed:
    """Gives groups of prepared pictures in order; at most `ahead` pictures are read and not yet taken.

    prepare: a picture and its bytes to what the device takes; raises BadPicture.
    """

    def __init__(
        self,
        groups: Iterable[Group],
        prepare: Callable[[Picture, bytes], Prepared],
        *,
        threads: int,
        ahead: int,
        clock: Clock,
    ) -> None:
        self._prepare, self._clock = prepare, clock
        self._room = threading.Semaphore(ahead)
        self._items: queue.SimpleQueue[int | Item | BaseException | None] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._stopped = False
        self._thread = threading.Thread(target=self._read_all, args=(groups,), name="read", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped = True
        self._room.release()
        self._thread.join()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def groups(self) -> Iterator[tuple[int, Iterator[tuple[Picture, Outcome]]]]:
        """(number, its pictures with what became of them); a group's pictures are to be taken before the next group.

        Raises: whatever the groups' iterable raises.
        """
        while (number := self._next()) is not None:
            assert isinstance(number, int)
            yield number, self._pictures()

    def _pictures(self) -> Iterator[tuple[Picture, Outcome]]:
        while (item := self._next()) is not None:
            assert isinstance(item, tuple)
            picture, outcome = item
            if isinstance(outcome, Future):
                try:
                    yield picture, outcome.result()
                except BadPicture as error:
                    yield picture, error
            else:
                yield picture, outcome
            self._room.release()

    def _next(self) -> int | Item | None:
        item = self._items.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def _read_all(self, groups: Iterable[Group]) -> None:
        """Put a group's number, its pictures and None for each group, and None at the end."""
        try:
            with Reader() as reader:
                for number, pictures in groups:
                    self._items.put(number)
                    if not self._read_group(pictures, reader):
                        return
                    self._items.put(None)
                self._items.put(None)
        except BaseException as error:
            self._items.put(error)

    def _read_group(self, pictures: Sequence[Picture], reader: Reader) -> bool:
        """False where the feed was closed meanwhile."""
        places = read_in_order(pictures, reader)
        for _ in pictures:
            self._room.acquire()
            if self._stopped:
                return False
            with self._clock.working("read"):
                picture, data = next(places)
            job = data if isinstance(data, BadPicture) else self._pool.submit(self._prepare_one, picture, data)
            self._items.put((picture, job))
        return True

    def _prepare_one(self, picture: Picture, data: bytes) -> Prepared:
        with self._clock.working("decode"):
            return self._prepare(picture, data)
