"""The simulated database: the same transactions, inline on in-memory SQLite, with what a crash leaves behind.

It keeps the real one's promises (a write is uncancellable once handed over, durable when it returns, alone in failing) and
adds the one thing a test needs: `crash()` loses exactly the writes that had not been committed. No threads, no real time,
so the same seed gives the same run.
"""

import sqlite3
from collections.abc import Callable
from typing import Any, Final, TypeVar

import trio

from p2pnode.errors import StoreError
from p2pnode.metrics import Metrics
from p2pnode.store.database import Transaction, commit_group, memory, read_group

Result = TypeVar("Result")

_CRASHED: Final = "the machine of this database has crashed"


class InlineDatabase:
    """`environment.Database` in memory.

    commit_seconds: virtual time until a write is durable, 0 by default; a crash within it loses the write. disk: a database
    that survived a crash, from `crash()`; a fresh one when left out.
    """

    def __init__(
        self, metrics: Metrics | None = None, commit_seconds: float = 0.0, disk: sqlite3.Connection | None = None
    ) -> None:
        self._disk: sqlite3.Connection | None = disk or memory()
        self._metrics = metrics or Metrics()
        self._commit_seconds = commit_seconds
        # Any number of writes may wait for the virtual disk; a crash ends all their waits at once.
        self._waiting: dict[int, trio.CancelScope] = {}
        self._next_wait = 0

    async def write(self, transaction: Callable[[sqlite3.Connection], Result]) -> Result:
        """Run a transaction; durable when it returns. Raises StoreError, LedgerError or what the transaction raised."""
        await trio.lowlevel.checkpoint_if_cancelled()
        await self._wait_for_disk()
        result = self.write_now(transaction)
        # The reply takes a step of its own: a node may crash after the commit and before it knows of it.
        await trio.lowlevel.cancel_shielded_checkpoint()
        return result

    async def read(self, query: Callable[[sqlite3.Connection], Result]) -> Result:
        """Run a function that only reads; a write in it fails. Raises StoreError."""
        await trio.lowlevel.checkpoint()
        return self._run(query, is_read=True)  # type: ignore[no-any-return]

    def write_now(self, transaction: Callable[[sqlite3.Connection], Result]) -> Result:
        """Run a transaction at once, for tests and checkers outside trio."""
        result: Result = self._run(transaction, is_read=False)
        return result

    def crash(self) -> sqlite3.Connection:
        """Cut the power: waiting writes are lost, this handle is dead; gives the disk for the restarted node's handle."""
        disk = self._alive()
        self._disk = None
        for scope in self._waiting.values():
            scope.cancel()
        return disk

    async def _wait_for_disk(self) -> None:
        if self._commit_seconds <= 0:
            await trio.lowlevel.cancel_shielded_checkpoint()
            return
        self._next_wait += 1
        key = self._next_wait
        try:
            with trio.CancelScope(shield=True) as scope:
                self._waiting[key] = scope
                await trio.sleep(self._commit_seconds)
        finally:
            del self._waiting[key]

    def _run(self, transaction: Transaction, *, is_read: bool) -> Any:
        disk = self._alive()
        if not is_read:
            (result,) = commit_group(disk, [transaction])
            self._metrics.add("store_commits_total")
            self._metrics.add("store_transactions_total")
            return result.unwrap()
        disk.execute("PRAGMA query_only=ON")
        try:
            (result,) = read_group(disk, [transaction])
        finally:
            disk.execute("PRAGMA query_only=OFF")
        return result.unwrap()

    def _alive(self) -> sqlite3.Connection:
        if self._disk is None:
            raise StoreError(_CRASHED)
        return self._disk
