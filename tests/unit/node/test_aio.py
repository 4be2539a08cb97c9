"""The real database: group commit, isolation, cancellation, and what survives kill -9."""

import os
import signal
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path

import pytest
import trio

import p2pnode
from p2pnode.errors import ConfigError, LedgerError, StoreError
from p2pnode.metrics import Metrics
from p2pnode.node import aio
from p2pnode.node.aio import open_database
from p2pnode.store.accounts import balance, check_balanced, post
from p2pnode.store.database import recall, remember


@pytest.fixture
async def database(tmp_path):
    async with open_database(tmp_path / "node.db") as database:
        yield database


async def test_a_write_is_read_back_and_kept(tmp_path):
    path = tmp_path / "node.db"
    before = set(threading.enumerate())
    async with open_database(path) as database:
        assert await database.write(lambda c: remember(c, "k", b"v") or 7) == 7
        assert await database.read(lambda c: recall(c, "k")) == b"v"
    async with open_database(path) as database:
        assert await database.read(lambda c: recall(c, "k")) == b"v"
    with pytest.raises(StoreError, match="closed"):
        await database.write(lambda c: None)
    assert set(threading.enumerate()) <= before


async def test_writers_share_commits_and_each_gets_its_own_answer(tmp_path):
    metrics = Metrics()
    answers = {}
    async with open_database(tmp_path / "node.db", metrics) as database:

        async def writer(number):
            answers[number] = await database.write(lambda c: remember(c, str(number), b"x") or number * 2)

        async with trio.open_nursery() as nursery:
            for number in range(64):
                nursery.start_soon(writer, number)
    assert answers == {number: number * 2 for number in range(64)}
    assert metrics.value("store_transactions_total") == 64
    assert metrics.value("store_commits_total") < 20


async def test_a_failing_intent_in_a_group_harms_nobody(database):
    failures = []

    async def fails(error):
        def transaction(connection):
            remember(connection, "lost", b"x")
            raise error

        with pytest.raises(type(error)) as caught:
            await database.write(transaction)
        failures.append(caught.value)

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(database.write, lambda c, number=number: remember(c, str(number), b"x"))
            nursery.start_soon(fails, ValueError(str(number)))
    assert len(failures) == 20
    assert await database.read(lambda c: c.execute("SELECT count(*) FROM remembered").fetchone()) == (20,)


async def test_errors_are_translated(database):
    with pytest.raises(StoreError, match="no such table"):
        await database.write(lambda c: c.execute("SELECT * FROM absent"))
    with pytest.raises(StoreError, match="readonly"):
        await database.read(lambda c: remember(c, "k", b"v"))
    with pytest.raises(LedgerError):
        await database.write(lambda c: post(c, b"d" * 32, "x", (("a", 1), ("b", 1)), 0))


async def test_a_full_disk_is_a_store_error(database):
    await database.write(lambda c: c.execute("PRAGMA max_page_count=60").fetchone())
    with pytest.raises(StoreError, match="full"):
        await database.write(lambda c: remember(c, "k", bytes(1_000_000)))
    assert await database.read(lambda c: recall(c, "k")) is None


async def test_a_cancelled_writer_still_waits_and_its_write_is_whole(database):
    started = threading.Event()
    release = threading.Event()

    def slow(connection):
        started.set()
        release.wait(5)
        remember(connection, "k", b"v")
        return "done"

    results = []
    with trio.CancelScope() as scope:

        async def writer():
            results.append(await database.write(slow))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer)
            await trio.to_thread.run_sync(started.wait)
            scope.cancel()
            release.set()
    assert results == ["done"]
    assert await database.read(lambda c: recall(c, "k")) == b"v"
    with trio.CancelScope() as scope:
        scope.cancel()
        await database.write(lambda c: remember(c, "never", b"x"))
    assert await database.read(lambda c: recall(c, "never")) is None


async def test_reads_do_not_wait_for_a_slow_writer(database):
    release = threading.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(database.write, lambda c: release.wait(5) and remember(c, "k", b"v"))
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(4):
            assert await database.read(lambda c: recall(c, "k")) is None
        release.set()
    assert await database.read(lambda c: recall(c, "k")) == b"v"


async def test_leaving_finishes_what_was_handed_over(tmp_path):
    path = tmp_path / "node.db"
    with trio.CancelScope() as scope:
        async with open_database(path) as database, trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(database.write, lambda c, number=number: remember(c, str(number), b"x"))
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    async with open_database(path) as database:
        assert await database.read(lambda c: c.execute("SELECT count(*) FROM remembered").fetchone()) == (10,)


async def test_only_one_process_may_hold_a_folder(tmp_path):
    async with open_database(tmp_path / "node.db"):
        with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
            async with open_database(tmp_path / "node.db"):
                pass


async def test_a_database_that_cannot_open_leaves_no_thread_and_no_lock(tmp_path):
    path = tmp_path / "node.db"
    path.write_bytes(b"this is no database, not at all" * 100)
    with pytest.raises(StoreError):
        async with open_database(path):
            pass
    path.unlink()
    async with open_database(path):
        pass


async def test_the_private_parts_of_aiosqlite_are_as_expected(database):
    assert version("aiosqlite").startswith("0.22.")
    seen = []
    await database.write(lambda c: seen.append((threading.current_thread(), type(c).__module__, c.in_transaction)))
    thread, module, in_transaction = seen[0]
    assert thread is database._writes.connection._thread
    assert thread.daemon
    assert (module, in_transaction) == ("sqlite3", True)
    assert aio.asyncio.get_event_loop_policy().__class__.__module__.startswith("asyncio"), "trio_asyncio was imported"


CRASHING = """
import sys, trio
from pathlib import Path
from p2pnode.node.aio import open_database
from p2pnode.store.accounts import post
async def main():
    async with open_database(Path(sys.argv[1])) as database:
        async def writer(number):
            for step in range(10_000):
                source = number.to_bytes(16, "big") + step.to_bytes(16, "big")
                await database.write(lambda c: post(c, source, "x", (("a", 1), ("b", -1)), 0))
                sys.stdout.write(source.hex() + "\\n"); sys.stdout.flush()
        async with trio.open_nursery() as nursery:
            for number in range(8): nursery.start_soon(writer, number)
trio.run(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("acknowledged_min", [1, 60, 333])
async def test_every_acknowledged_write_survives_kill_9(tmp_path, acknowledged_min):
    path = tmp_path / "node.db"
    environment = {**os.environ, "PYTHONPATH": str(Path(p2pnode.__file__).parents[1])}
    with subprocess.Popen(  # noqa: ASYNC220 - nothing else runs in this test
        [sys.executable, "-c", CRASHING, str(path)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        lines = [process.stdout.readline() for _ in range(acknowledged_min)]
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.readlines()
    acknowledged = {bytes.fromhex(line) for line in lines if len(line) == 65}
    assert len(acknowledged) >= acknowledged_min
    async with open_database(path) as database:
        stored = await database.read(lambda c: {row[0] for row in c.execute("SELECT source FROM journals")})
        assert acknowledged <= stored
        await database.read(check_balanced)
        assert await database.read(lambda c: balance(c, "a")) == len(stored)
