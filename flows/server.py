"""Prefect's server, on SQLite with writes that wait for each other instead of being refused.

SQLite refuses a write at once ("database is locked", whatever its busy timeout) in a transaction that began with a
read, when another one has written since: https://www.sqlite.org/rescode.html#busy_snapshot. Prefect's own clients ask
again; a browser says "Oops. Something went wrong", and the job is not submitted (benchmarks/server_locks.md). A
transaction that takes the write lock as it begins waits instead. PostgreSQL is not concerned.

    python -m flows.server start [the options of `prefect server start`]
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from prefect.server.database.configurations import SQLITE_BEGIN_MODE, AioSqliteConfiguration

if TYPE_CHECKING:
    from fastapi import FastAPI
    from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction


@asynccontextmanager
async def begin_immediate(
    self: AioSqliteConfiguration, session: AsyncSession, with_for_update: bool = False
) -> AsyncIterator[AsyncSessionTransaction]:
    """In place of AioSqliteConfiguration.begin_transaction; sessions opened inside begin as they did."""
    token = SQLITE_BEGIN_MODE.set("IMMEDIATE")
    try:
        async with session.begin() as transaction:
            await session.connection()  # begins now
            SQLITE_BEGIN_MODE.set("IMMEDIATE" if with_for_update else "DEFERRED")
            yield transaction
    finally:
        SQLITE_BEGIN_MODE.reset(token)


def let_writes_wait() -> None:
    """Have the server of this process begin its transactions so."""
    AioSqliteConfiguration.begin_transaction = begin_immediate  # type: ignore[method-assign]


def create_app() -> FastAPI:
    """For uvicorn's --factory."""
    from prefect.server.api.server import create_app

    let_writes_wait()
    return create_app()


def main() -> None:
    from prefect.cli import app

    let_writes_wait()
    sys.argv.insert(1, "server")
    app()


if __name__ == "__main__":
    main()
