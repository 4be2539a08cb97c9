"""A world of real nodes on virtual time: alice, bob and the others of tests and simulations.

    async def scenario(world):
        alice = await world.start("alice", {"provide.price": "1"})
        bob = await world.start("bob", knows=["alice"])
        ...
    run_world(scenario, seed=1)

The same seed gives the same run: virtual clock, seeded randomness, no threads, and trio's scheduler in its deterministic mode
(a private flag; trio's version is pinned and a test compares two runs).
"""

import random  # noqa: TID251 - only to seed trio's own scheduler
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import trio

from p2pnode.crypto.hashing import blake3_256
from p2pnode.crypto.keys import Identity
from p2pnode.metrics import Metrics
from p2pnode.node.config import NodeConfig, with_settings
from p2pnode.node.node import Node
from p2pnode.node.scopes import bare, running
from p2pnode.sim.clock import SimClock
from p2pnode.sim.database import InlineDatabase
from p2pnode.sim.machine import simulated_machine
from p2pnode.sim.network import MemoryNetwork
from p2pnode.sim.runtime import InlineRuntime

Result = TypeVar("Result")
PORT = 7470
# Simulated honest nodes get routable-looking addresses in distinct /24 networks and are never exempt from diversity rules.
_SETTINGS: Mapping[str, str] = {
    "network.mdns": "false",
    "network.diversity": "strict",
    "provide.cpus": "1",
    "provide.engines": "CPUExecutionProvider",
}


@dataclass(slots=True)
class Resident:
    """One machine of the world. node is None while it is switched off; its disk and key stay."""

    name: str
    address: str
    identity: Identity
    config: NodeConfig
    metrics: Metrics
    database: InlineDatabase
    node: Node | None = None
    stopped: trio.Event = field(default_factory=trio.Event)


class World:
    """Machines, their wires, and the nodes on them. Made by `run_world`; folder: where model files lie."""

    def __init__(self, seed: int, folder: Path, nursery: trio.Nursery, latency_seconds: float = 0.01) -> None:
        self.seed = seed
        self.network = MemoryNetwork(latency_seconds)
        self.residents: dict[str, Resident] = {}
        self._folder = folder
        self._nursery = nursery
        self._sessions: dict[bytes, Any] = {}

    async def start(
        self, name: str, settings: Mapping[str, str] | None = None, *, knows: Sequence[str] = (), skew_ms: int = 0
    ) -> Node:
        """Switch a machine on, a new one or one that was stopped or crashed, and give its node once it is ready.

        knows: machines whose addresses are its static peers.
        """
        resident = self.residents.get(name) or self._settle(name)
        peers = ",".join(f"{self.residents[each].address}" for each in knows)
        changes = {**_SETTINGS, "network.listen": resident.address, **({"network.static_peers": peers} if peers else {})}
        resident.config = with_settings(resident.config, {**changes, **(settings or {})})
        # It claims the level that real nodes demand; nothing is confined in a simulation, and only trusted models run there.
        runtime = InlineRuntime(level="full", sessions=self._sessions)
        host = self.network.host(resident.address.rpartition(":")[0])
        environment = simulated_machine(self.seed, name, host, resident.database, runtime, skew_ms)
        node = Node(resident.config, environment, resident.identity, metrics=resident.metrics, mdns=None, strict=True)
        resident.node, resident.stopped = node, trio.Event()
        await self._nursery.start(self._run, resident, node, runtime)
        return node

    async def stop(self, name: str) -> None:
        """Stop a node in order and wait until it has said its goodbyes."""
        resident = self.residents[name]
        if resident.node is not None:
            resident.node.stop()
            await resident.stopped.wait()

    async def settle(self, condition: Callable[[], object], seconds: float = 60.0) -> None:
        """Let virtual time pass until something is so. Raises trio.TooSlowError."""
        with trio.fail_after(seconds):
            while not condition():  # noqa: ASYNC110 - polled on virtual time, where it costs nothing
                await trio.sleep(0.01)

    async def _run(self, resident: Resident, node: Node, runtime: InlineRuntime, *, task_status: trio.TaskStatus[None]) -> None:
        try:
            async with running(runtime):
                await node.run(task_status=task_status)
        finally:
            resident.node = None
            resident.stopped.set()

    def _settle(self, name: str) -> Resident:
        number = len(self.residents) + 1
        folder = self._folder / name
        folder.mkdir()
        metrics = Metrics()
        resident = Resident(
            name=name,
            address=f"80.{number // 250}.{number % 250}.1:{PORT}",
            identity=Identity(blake3_256(b"simulated identity", f"{self.seed}/{name}".encode())),
            config=NodeConfig(folder / "config", folder / "data"),
            metrics=metrics,
            database=InlineDatabase(metrics),
        )
        self.residents[name] = resident
        return resident


def run_world(
    scenario: Callable[[World], Awaitable[Result]], seed: int = 1, folder: Path | None = None, latency_seconds: float = 0.01
) -> Result:
    """Run a scenario to its end on virtual time and give its result; the nodes that still run are stopped in order."""

    async def main(place: Path) -> Result:
        async with trio.open_nursery() as nursery:
            world = World(seed, place, nursery, latency_seconds)
            result = await scenario(world)
            for name in reversed(world.residents):
                await world.stop(name)
            nursery.cancel_scope.cancel()
        return result

    with _deterministic(seed), tempfile.TemporaryDirectory(prefix="p2pnode-world-") as temporary:
        try:
            return trio.run(main, folder or Path(temporary), clock=SimClock())
        except BaseExceptionGroup as group:
            raise bare(group) from group


class _deterministic:
    """Trio picks the order of runnable tasks by its own generator; for this block it is a seeded one.

    Threads are forbidden meanwhile: virtual time runs on while a thread works, so two runs would differ.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __enter__(self) -> None:
        import trio._core._run as scheduler

        self._scheduler: Any = scheduler
        self._former = scheduler._ALLOW_DETERMINISTIC_SCHEDULING, scheduler._r
        self._threads = trio.to_thread.run_sync
        trio.to_thread.run_sync = _no_threads  # type: ignore[assignment]
        scheduler._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc]
        scheduler._r = random.Random(self._seed)

    def __exit__(self, *_: object) -> None:
        trio.to_thread.run_sync = self._threads
        self._scheduler._ALLOW_DETERMINISTIC_SCHEDULING, self._scheduler._r = self._former


async def _no_threads(function: Any, *arguments: Any, **options: Any) -> Any:
    raise RuntimeError(f"a simulation has no threads; run {function} through environment.executor")
