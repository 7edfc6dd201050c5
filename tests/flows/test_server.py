"""What the server does with writes that come at once, on SQLite."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from prefect.server.database.configurations import AioSqliteConfiguration

from flows.server import begin_immediate

AT_ONCE = 8


def count_at_once(folder: Path, begin_transaction: Any) -> int:
    """What a number is after so many transactions read it, take their time, and write one more."""

    async def count_one(config: AioSqliteConfiguration) -> None:
        session = await config.session(await config.engine())
        async with session, begin_transaction(config, session):
            number = (await session.execute(sa.text("SELECT number FROM numbers"))).scalar_one()
            await asyncio.sleep(0.1)
            await session.execute(sa.text("UPDATE numbers SET number = :number"), {"number": number + 1})

    async def count() -> int:
        config = AioSqliteConfiguration(connection_url=f"sqlite+aiosqlite:///{folder / 'a.db'}")
        engine = await config.engine()
        async with engine.begin() as connection:
            await connection.execute(sa.text("CREATE TABLE numbers (number INTEGER)"))
            await connection.execute(sa.text("INSERT INTO numbers VALUES (0)"))
        await asyncio.gather(*(count_one(config) for _ in range(AT_ONCE)))
        async with engine.connect() as connection:
            return int((await connection.execute(sa.text("SELECT number FROM numbers"))).scalar_one())

    return asyncio.run(count())


def test_writes_that_come_at_once_wait_for_each_other(tmp_path: Path) -> None:
    assert count_at_once(tmp_path, begin_immediate) == AT_ONCE


def test_prefect_still_refuses_them(tmp_path: Path) -> None:
    """Where it does not any more, flows/server.py has served its time."""
    with pytest.raises(sa.exc.OperationalError, match="database is locked"):
        count_at_once(tmp_path, AioSqliteConfiguration.begin_transaction)


def test_a_session_opened_inside_can_read(tmp_path: Path) -> None:
    """It would wait for the one that it is opened in, if it began with a write, too."""

    async def read_inside() -> int:
        config = AioSqliteConfiguration(connection_url=f"sqlite+aiosqlite:///{tmp_path / 'a.db'}")
        outer, inner = [await config.session(await config.engine()) for _ in range(2)]
        async with outer, begin_immediate(config, outer), inner, inner.begin():
            return int((await inner.execute(sa.text("SELECT 7"))).scalar_one())

    assert asyncio.run(asyncio.wait_for(read_inside(), timeout=20)) == 7


def test_a_failed_transaction_leaves_nothing_and_lets_the_next_one_write(tmp_path: Path) -> None:
    async def fail_then_write() -> list[int]:
        config = AioSqliteConfiguration(connection_url=f"sqlite+aiosqlite:///{tmp_path / 'a.db'}")
        engine = await config.engine()
        async with engine.begin() as connection:
            await connection.execute(sa.text("CREATE TABLE numbers (number INTEGER)"))
        for number in (1, 2):
            session = await config.session(engine)
            try:
                async with session, begin_immediate(config, session):
                    await session.execute(sa.text("INSERT INTO numbers VALUES (:number)"), {"number": number})
                    if number == 1:
                        raise RuntimeError("undone")
            except RuntimeError:
                continue
        async with engine.connect() as connection:
            return list((await connection.execute(sa.text("SELECT number FROM numbers"))).scalars())

    assert asyncio.run(fail_then_write()) == [2]
