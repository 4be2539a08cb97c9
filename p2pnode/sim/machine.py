"""The simulated environment, twin of `node/machine.py`: virtual time, seeded randomness, memory for wires and disk.

Nothing here may differ between two runs of one seed: no threads, no wall clock, no system randomness.
"""

import hashlib
import random  # noqa: TID251 - seeded: the simulation's only source of randomness
from collections.abc import Callable
from typing import Any, TypeVar

import trio

from p2pnode.environment import Database, Environment, ModelRuntime
from p2pnode.sim.clock import TrioClock
from p2pnode.sim.network import MemoryHost

Result = TypeVar("Result")


class SeededEntropy:
    """Randomness that depends on the world's seed and the machine's name alone."""

    def __init__(self, seed: int, name: str) -> None:
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
        self._random = random.Random(digest)

    def token(self, size: int) -> bytes:
        """Bytes that are different for each machine and the same in each run."""
        return self._random.randbytes(size)

    def uniform(self) -> float:
        """A float in [0, 1)."""
        return self._random.random()


class InlineExecutor:
    """Runs the function at once: a thread would make two runs differ."""

    async def run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Run a plain function here."""
        await trio.lowlevel.checkpoint()
        return function(*arguments)


def simulated_machine(
    seed: int, name: str, host: MemoryHost, database: Database, runtime: ModelRuntime, clock: TrioClock | None = None
) -> Environment:
    """Give the environment of one simulated machine. name: what its randomness depends on, beside the seed."""
    return Environment(
        clock=clock or TrioClock(),
        entropy=SeededEntropy(seed, name),
        network=host,
        database=database,
        executor=InlineExecutor(),
        runtime=runtime,
    )
