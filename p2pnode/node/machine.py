"""The real environment: this machine's clock, randomness, network, database, threads and worker processes.

Its twin is `sim/machine.py`. Every direct call that lint bans elsewhere is allowed here, because here is the door.
"""

import os
import random  # noqa: TID251 - jitter only; secrets come from os.urandom below
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import trio

from p2pnode.environment import Environment, ModelRuntime
from p2pnode.metrics import Metrics
from p2pnode.node.aio import open_database
from p2pnode.transport.tcp import TcpNetwork

Result = TypeVar("Result")
THREADS_MAX: Final = 4


class SystemClock:
    """Trio's clock for durations, the system's for documents. Made inside the run of trio in which it is used."""

    def __init__(self) -> None:
        # Seconds on trio's clock. Its own method, because a call asks for the time a dozen times.
        self.monotonic: Callable[[], float] = trio.lowlevel.current_clock().current_time

    def wall_ms(self) -> int:
        """Unix time in milliseconds."""
        return time.time_ns() // 1_000_000


class SystemEntropy:
    """The kernel's randomness for secrets; a seeded generator for jitter."""

    def __init__(self) -> None:
        self._jitter = random.Random(os.urandom(16))  # noqa: TID251 - the door

    def token(self, size: int) -> bytes:
        """Bytes fit for keys and nonces."""
        return os.urandom(size)  # noqa: TID251 - the door

    def uniform(self) -> float:
        """A float in [0, 1) for jitter."""
        return self._jitter.random()


class ThreadExecutor:
    """A few threads for work of more than 5 ms. The functions are ours: hashing, encoding, file copies."""

    def __init__(self, threads: int = THREADS_MAX) -> None:
        self._limiter = trio.CapacityLimiter(threads)

    async def run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Run a plain function in a thread; a cancelled caller still waits for its end."""
        return await trio.to_thread.run_sync(function, *arguments, limiter=self._limiter)


@asynccontextmanager
async def open_machine(database_file: Path, runtime: ModelRuntime, metrics: Metrics) -> AsyncIterator[Environment]:
    """Open this machine's environment around a database file for the block; the folder's lock is held as long.

    Raises ConfigError when another process holds the folder, StoreError when the database is damaged or newer.
    """
    database_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    async with open_database(database_file, metrics) as database:
        yield Environment(
            clock=SystemClock(),
            entropy=SystemEntropy(),
            network=TcpNetwork(),
            database=database,
            executor=ThreadExecutor(),
            runtime=runtime,
        )
