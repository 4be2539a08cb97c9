"""The simulated database keeps the real one's promises and loses exactly the uncommitted at a crash."""

import pytest
import trio

from p2pnode.errors import StoreError
from p2pnode.sim.database import InlineDatabase
from p2pnode.store.database import recall, remember


async def test_writes_are_isolated_and_reads_cannot_write():
    database = InlineDatabase()
    await database.write(lambda c: remember(c, "k", b"1"))

    def fails(connection):
        remember(connection, "k", b"2")
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        await database.write(fails)
    with pytest.raises(StoreError, match="readonly"):
        await database.read(lambda c: remember(c, "k", b"3"))
    assert await database.read(lambda c: recall(c, "k")) == b"1"
    assert database.write_now(lambda c: recall(c, "k")) == b"1"


async def test_a_crash_loses_exactly_what_was_not_committed(autojump_clock):
    database = InlineDatabase(commit_seconds=1)
    outcomes = []

    async def writer(key, start_seconds):
        await trio.sleep(start_seconds)
        try:
            await database.write(lambda c: remember(c, key, b"x"))
            outcomes.append((key, "durable"))
        except StoreError:
            outcomes.append((key, "lost"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer, "early", 0)
        nursery.start_soon(writer, "late", 1)
        await trio.sleep(1.5)
        disk = database.crash()
    assert outcomes == [("early", "durable"), ("late", "lost")]
    restarted = InlineDatabase(disk=disk)
    assert await restarted.read(lambda c: (recall(c, "early"), recall(c, "late"))) == (b"x", None)
    with pytest.raises(StoreError, match="crashed"):
        await database.read(lambda c: None)


async def test_a_cancelled_write_still_happens(autojump_clock):
    database = InlineDatabase(commit_seconds=1)
    with trio.move_on_after(0.5) as scope:
        await database.write(lambda c: remember(c, "k", b"x"))
    assert trio.current_time() >= 1
    assert await database.read(lambda c: recall(c, "k")) == b"x"
    assert scope.cancel_called
