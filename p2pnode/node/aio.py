"""The real database: one side thread with its own asyncio loop owns aiosqlite; nothing else of asyncio enters p2pnode.

A trio task hands a transaction over and sleeps; the side thread collects what has piled up meanwhile and runs it as one
group under one fsync (`store.database.commit_group`); all replies return in a single `run_sync_soon`. Writes go to one
connection, reads to a second one, which sees the last commit and never waits for a writer's fsync.

An `asyncio.SelectorEventLoop` is made explicitly and lives in its own thread; `trio_asyncio` is never imported, because its
import patches asyncio for the whole process.
"""

import asyncio  # noqa: TID251 - the one place where aiosqlite's loop lives
import sqlite3
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import aiosqlite
import outcome
import trio

from p2pnode.errors import StoreError
from p2pnode.metrics import Metrics
from p2pnode.store.database import (
    Transaction,
    backup_to_file,
    check_integrity,
    commit_group,
    locked,
    migrate,
    open_file,
    read_group,
    translated,
)

Result = TypeVar("Result")

GROUP_MAX: Final = 256
_CLOSED: Final = "the database is closed"


@asynccontextmanager
async def open_database(path: Path, metrics: Metrics | None = None) -> AsyncIterator["SideThreadDatabase"]:
    """Lock, open, check and migrate a database file, and serve it for the block.

    Raises ConfigError when another process holds it, StoreError when it is damaged or newer than this program. However the
    block ends, transactions that were handed over are finished, then files and threads are closed.
    """
    with locked(path):
        database = SideThreadDatabase(path, metrics)
        try:
            await database.open()
            yield database
        finally:
            await database.close()


class _Intent:
    """A transaction and the trio task that sleeps until its outcome is there."""

    __slots__ = ("task", "transaction")

    def __init__(self, transaction: Transaction, task: trio.lowlevel.Task) -> None:
        self.transaction = transaction
        self.task = task


class _Lane:
    """One aiosqlite connection and the intents that wait for it. Everything but `pending` belongs to the side thread."""

    def __init__(self, run_group: Callable[[sqlite3.Connection, Sequence[Transaction]], list[outcome.Outcome[Any]]]) -> None:
        self.run_group = run_group
        self.pending: deque[_Intent] = deque()
        self.is_signalled = False
        self.drainer: asyncio.Task[None] | None = None
        self.connection: aiosqlite.Connection | None = None


class SideThreadDatabase:
    """`environment.Database` on a file. Made by `open_database`."""

    def __init__(self, path: Path, metrics: Metrics | None = None) -> None:
        self._path = path
        self._metrics = metrics or Metrics()
        self._writes = _Lane(commit_group)
        self._reads = _Lane(read_group)
        self._loop: asyncio.SelectorEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._token: trio.lowlevel.TrioToken | None = None

    async def write(self, transaction: Callable[[sqlite3.Connection], Result]) -> Result:
        """Run a transaction and wait until it is on disk. It neither begins nor commits, and runs once.

        A cancellation before the hand-over takes effect; after it the wait goes on until the outcome is known. Raises
        StoreError, LedgerError from the ledger's triggers, or what the transaction itself raised; it is then undone.
        """
        return await self._hand_over(self._writes, transaction)  # type: ignore[no-any-return]

    async def read(self, query: Callable[[sqlite3.Connection], Result]) -> Result:
        """Run a function that only reads, on one consistent view of the last commit. Raises StoreError."""
        return await self._hand_over(self._reads, query)  # type: ignore[no-any-return]

    async def open(self) -> None:
        """Start the side thread, open both connections, check and migrate. Raises StoreError."""
        self._token = trio.lowlevel.current_trio_token()
        self._loop = asyncio.SelectorEventLoop()
        self._thread = threading.Thread(target=self._run_loop, name="p2pnode-database", daemon=True)
        self._thread.start()
        await self._on_loop(self._open_connections())

    async def close(self) -> None:
        """Finish what was handed over, close the connections and join the thread. Idempotent; never cancelled half-way."""
        if self._thread is None or self._loop is None:
            return
        thread, self._thread = self._thread, None
        await self._on_loop(self._close_connections())
        self._loop.call_soon_threadsafe(self._loop.stop)
        thread.join()  # at most microseconds: the loop has nothing left to do
        self._loop = None

    async def _hand_over(self, lane: _Lane, transaction: Transaction) -> Any:
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._thread is None or self._loop is None:
            raise StoreError(_CLOSED)
        lane.pending.append(_Intent(transaction, trio.lowlevel.current_task()))
        if not lane.is_signalled:
            lane.is_signalled = True
            self._loop.call_soon_threadsafe(self._signal, lane)
        return await trio.lowlevel.wait_task_rescheduled(_never_abort)

    async def _on_loop(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine on the side thread's loop and wait, uncancellably, for its outcome."""
        task, token, loop = trio.lowlevel.current_task(), self._token, self._loop
        if token is None or loop is None:
            raise StoreError(_CLOSED)

        async def run() -> None:
            try:
                result: outcome.Outcome[Result] = outcome.Value(await coroutine)
            except BaseException as error:  # the caller in the other thread hears of it
                result = outcome.Error(error)
            token.run_sync_soon(trio.lowlevel.reschedule, task, result)

        keep: list[asyncio.Task[None]] = []
        loop.call_soon_threadsafe(lambda: keep.append(loop.create_task(run())))
        return await trio.lowlevel.wait_task_rescheduled(_never_abort)  # type: ignore[no-any-return]

    # ---- below: on the side thread

    def _run_loop(self) -> None:
        assert self._loop is not None
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    async def _open_connections(self) -> None:
        self._writes.connection = await _connect(lambda: open_file(self._path))
        await on_connection_thread(self._writes.connection, self._prepare)
        self._reads.connection = await _connect(lambda: open_file(self._path, read_only=True))

    def _prepare(self, connection: sqlite3.Connection) -> None:
        check_integrity(connection)
        migrate(connection, backup_to_file(self._path))

    async def _close_connections(self) -> None:
        for lane in (self._writes, self._reads):
            await self._signal(lane)
            if lane.connection is not None:
                await lane.connection.close()
                _join(lane.connection)
                lane.connection = None

    def _signal(self, lane: _Lane) -> "asyncio.Task[None]":
        """Make sure that a drainer runs; gives it."""
        if lane.drainer is None or lane.drainer.done():
            lane.drainer = asyncio.get_running_loop().create_task(self._drain(lane))
        return lane.drainer

    async def _drain(self, lane: _Lane) -> None:
        """Run groups until nothing is pending. While one group waits for its fsync, the next one gathers."""
        while True:
            # Cleared before the queue is emptied: an intent that comes later either is seen here or signals again.
            lane.is_signalled = False
            group = [lane.pending.popleft() for _ in range(min(len(lane.pending), GROUP_MAX))]
            if not group:
                return
            await self._run_group(lane, group)

    async def _run_group(self, lane: _Lane, group: list[_Intent]) -> None:
        transactions = [intent.transaction for intent in group]
        try:
            if lane.connection is None:
                raise StoreError(_CLOSED)
            outcomes = await on_connection_thread(lane.connection, lane.run_group, transactions)
        except Exception as error:  # every caller of the group hears of it
            outcomes = [outcome.Error(_copy(error)) for _ in group]
        try:
            if self._token is not None:
                self._token.run_sync_soon(self._deliver, lane, group, outcomes)
        except trio.RunFinishedError:
            pass  # nobody is left to hear it; what was committed stays committed

    # ---- on the trio thread again

    def _deliver(self, lane: _Lane, group: list[_Intent], outcomes: list[outcome.Outcome[Any]]) -> None:
        if lane is self._writes:
            self._metrics.add("store_commits_total")
            self._metrics.add("store_transactions_total", amount=sum(isinstance(result, outcome.Value) for result in outcomes))
        for intent, result in zip(group, outcomes, strict=True):
            trio.lowlevel.reschedule(intent.task, result)


async def on_connection_thread(connection: aiosqlite.Connection, function: Callable[..., Result], *arguments: Any) -> Result:
    """Run `function(sqlite3 connection, *arguments)` on aiosqlite's own thread and give its result.

    aiosqlite has no public way to run more than one statement without a hop each, so this uses `_execute` and `_conn` of
    0.22 (the dependency is pinned; tests/unit/node/test_aio.py fails when they change).
    """
    result: Result = await connection._execute(function, connection._conn, *arguments)  # type: ignore[no-untyped-call]
    return result


async def _connect(connector: Callable[[], sqlite3.Connection]) -> aiosqlite.Connection:
    connection = aiosqlite.Connection(connector, 64)
    # Of 0.22 as well: a thread that is no daemon would keep a process alive, and its lock held, after a crash of trio itself.
    connection._thread.daemon = True
    try:
        return await connection
    except BaseException:  # whatever it was: the thread must be gone before the loop that it answers to closes
        _join(connection)
        raise


def _join(connection: aiosqlite.Connection) -> None:
    """Wait for a stopped connection's thread: it answers its last request a moment before it ends."""
    connection._thread.join()


def _copy(error: Exception) -> Exception:
    """Give each task its own exception: one instance raised in many tasks would mix up their tracebacks."""
    result = translated(error)
    return result if isinstance(error, sqlite3.Error) else StoreError(f"the database failed: {error}")


def _never_abort(_: Callable[[], None]) -> trio.lowlevel.Abort:
    """Refuse to stop waiting: the transaction runs anyway, and its author must learn what became of it."""
    return trio.lowlevel.Abort.FAILED
