"""Pictures that take the process down with them: found by decoding the suspects in processes of their own.

A shard notes which groups it has under way. Where the process that noted it died twice and nothing was committed
between, the pictures of those groups are decoded in a child: whichever it dies at, and dies at again alone, is rejected
as `kills_decoder`, and the shard goes on without it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import orjson

from sdxl_core.catalog.images import ImagePlace
from sdxl_core.config import CacheLatentsConfig
from sdxl_core.files import write_atomic
from sdxl_core.latents.ledger import OPEN, Rejection, ShardLedger
from sdxl_core.latents.rows import ShardRows, shard_file

DEATHS_TOLERATED = 2
SECONDS_A_PICTURE = 120
ENDING = ".attempt.json"


class Attempts:
    """What a shard's processes were at when they died. One file beside the shard's ledger while it is under way."""

    def __init__(self, rows: Path) -> None:
        self._path = shard_file(rows, ENDING)
        self._under_way: list[int] = []
        self._guard = threading.Lock()
        self.num_deaths = 0
        with suppress(FileNotFoundError, orjson.JSONDecodeError, KeyError, TypeError):
            told = orjson.loads(self._path.read_bytes())
            self._under_way, self.num_deaths = list(told["groups"]), int(told["deaths"]) + 1

    def killers(
        self, rows: ShardRows, ledger: ShardLedger, config: CacheLatentsConfig
    ) -> Iterator[tuple[int, Rejection]]:
        """Rows whose pictures kill a process that decodes them; looked for where processes keep dying."""
        if self.num_deaths < DEATHS_TOLERATED:
            return
        for number in self._under_way:
            first = number * rows.commit_size
            suspects = np.arange(first, min(first + rows.commit_size, rows.num_rows))
            suspects = suspects[ledger.columns["state"][suspects] == OPEN]
            for position in killers(rows.places(suspects, config.source), config):
                detail = "the process that decodes it dies (a fault of the decoder); it was decoded alone to be sure"
                yield int(suspects[position]), Rejection("kills_decoder", detail, self.num_deaths)

    @contextmanager
    def running(self) -> Iterator[None]:
        """The groups that are under way are noted while the block runs; an error is no death."""
        self._under_way = []
        self._write()
        try:
            yield
        finally:
            self._path.unlink(missing_ok=True)

    def reached(self, number: int) -> None:
        """A group is about to be read."""
        with self._guard:
            self._under_way.append(number)
            self._write()

    def committed(self, number: int) -> None:
        """A group is safe: whatever kills processes, it is none of its pictures."""
        with self._guard:
            with suppress(ValueError):
                self._under_way.remove(number)
            self.num_deaths = 0
            self._write()

    def forget(self) -> None:
        self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        told = {"groups": self._under_way, "deaths": self.num_deaths}
        write_atomic(self._path, orjson.dumps(told), sync=False)


def killers(places: Sequence[ImagePlace], config: CacheLatentsConfig) -> list[int]:
    """Positions of the pictures that kill a process which decodes them, even alone."""
    found: list[int] = []
    start = 0
    while start < len(places):
        died_at = _decode_in_child(places[start:], config)
        if died_at is None:
            break
        if _decode_in_child(places[start + died_at : start + died_at + 1], config) is not None:
            found.append(start + died_at)
        start += died_at + 1
    return found


def _decode_in_child(places: Sequence[ImagePlace], config: CacheLatentsConfig) -> int | None:
    """Decode pictures one after the other in a fresh process. Returns the position it died at, None if it lived."""
    wanted = [[str(p.path), p.name, p.offset, p.num_bytes, p.in_tar] for p in places]
    body = orjson.dumps({"config": config.model_dump(mode="json"), "places": wanted})
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))}
    with subprocess.Popen(
        [sys.executable, "-m", "sdxl_core.latents.quarantine"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
    ) as child:  # fmt: skip
        try:
            out, _ = child.communicate(body, timeout=60 + SECONDS_A_PICTURE * len(places))
        except subprocess.TimeoutExpired:
            child.kill()
            out, _ = child.communicate()
    num_begun = out.count(b"\n")
    return None if child.returncode == 0 else max(0, num_begun - 1)


def main() -> None:
    """The child: says a line before each picture, decodes it, forgets it."""
    from sdxl_core.buckets import BucketTable
    from sdxl_core.images.decode import BadPicture
    from sdxl_core.latents.engine.prepare import prepare
    from sdxl_core.latents.engine.read import Reader
    from sdxl_core.latents.engine.records import Picture

    told = orjson.loads(sys.stdin.buffer.read())
    config = CacheLatentsConfig.model_validate(told["config"])
    table = BucketTable.from_options(config)
    with Reader() as reader:
        for path, *rest in told["places"]:
            place = ImagePlace(Path(path), *rest)
            os.write(1, b"next\n")
            with suppress(BadPicture):
                prepare(Picture("", place), reader.read(place), table, config)


if __name__ == "__main__":
    main()
