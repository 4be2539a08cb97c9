"""A world of real nodes on virtual time: alice, bob and the others of tests and simulations.

    async def scenario(world):
        alice = await world.start("alice", {"provide.price": "1"})
        bob = await world.start("bob", knows=["alice"])
        ...
    run_world(scenario, seed=1)

The same seed and options give the same run: virtual clock, seeded randomness, no threads, and trio's scheduler in its
deterministic mode (`determinism`). What happened is in `world.trace`, whose digest two runs must agree on.
"""

import random  # noqa: TID251 - seeded: what a scenario draws
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import trio

from p2pnode.crypto.hashing import blake3_256
from p2pnode.crypto.keys import Identity
from p2pnode.environment import Environment
from p2pnode.errors import P2PNodeError
from p2pnode.metrics import Metrics
from p2pnode.node.config import NodeConfig, with_settings
from p2pnode.node.node import Node
from p2pnode.node.scopes import bare, running
from p2pnode.sim.clock import SimClock, TrioClock
from p2pnode.sim.database import InlineDatabase
from p2pnode.sim.determinism import deterministic
from p2pnode.sim.latency import latency_model
from p2pnode.sim.machine import simulated_machine
from p2pnode.sim.nat import Nat, drawn_kind
from p2pnode.sim.network import MemoryHost, MemoryNetwork
from p2pnode.sim.options import WorldOptions
from p2pnode.sim.plain_handshake import SimulatedHandshakes
from p2pnode.sim.runtime import InlineRuntime
from p2pnode.sim.trace import Trace
from p2pnode.transport.requests import Router
from p2pnode.transport.service import TransportService, TransportSettings

Result = TypeVar("Result")
PORT = 7470
# How often a long run tells how far it is, in virtual seconds.
PROGRESS_SECONDS = 10.0
# Simulated honest nodes get routable-looking addresses in distinct /24 networks and are never exempt from diversity rules.
# A node keeps at most 32 sessions, so that a thousand nodes fit into two gigabytes.
_SETTINGS: Mapping[str, str] = {
    "network.mdns": "false",
    "network.diversity": "strict",
    "limits.connections_max": "32",
    "limits.inbound_max": "24",
    "limits.outbound_reserved": "8",
    "provide.cpus": "1",
    "provide.engines": "CPUExecutionProvider",
}


@dataclass(slots=True)
class Resident:
    """One machine of the world. node is None while it is switched off; its disk, key and settings stay.

    address: where it listens, `host:port`; behind a translator others cannot dial it. starts: how often it was switched on.
    """

    name: str
    address: str
    identity: Identity
    config: NodeConfig
    metrics: Metrics
    database: InlineDatabase
    host: MemoryHost
    clock: TrioClock
    node: Node | None = None
    is_crashed: bool = False
    starts: int = 0
    stopped: trio.Event = field(default_factory=trio.Event)


@dataclass(frozen=True, slots=True)
class Outsider:
    """A machine with a transport and nothing else on it: what adversaries are made of."""

    name: str
    address: str
    identity: Identity
    environment: Environment
    transport: TransportService


class World:
    """Machines, their wires, and the nodes on them. Made by `run_world`; folder: where model files lie.

    random: the scenario's own draws; draws: the world's and its faults'. network: every fault of the wires, at any time.
    residents: by name, in order of arrival.
    """

    def __init__(self, options: WorldOptions, folder: Path, nursery: trio.Nursery, clock: SimClock, trace: Trace) -> None:
        self.options = options
        self.seed = options.seed
        self.trace = trace
        self.clock = clock
        model = latency_model(options.latency, options.latency_seconds)
        self.network = MemoryNetwork(seed=options.seed, model=model, trace=trace)
        self.network.loss = options.loss
        self.network.syn_loss = options.loss
        self.network.duplication = options.duplication
        self.network.reordering = options.reordering
        self.network.bandwidth_bytes_per_second = options.bandwidth_bytes_per_second
        self.handshakes = SimulatedHandshakes(self.network, is_plain=options.is_plain)
        self.residents: dict[str, Resident] = {}
        self.random = random.Random(f"{options.seed}/scenario")
        self._folder = folder
        self._nursery = nursery
        self._sessions: dict[bytes, Any] = {}
        self.draws = random.Random(f"{options.seed}/world")
        self._subnets: dict[str, int] = {}
        trace.head([f"world {options}", f"cipher {self.handshakes.cipher}"])

    @property
    def now(self) -> float:
        """Virtual seconds since the start."""
        return self.clock.current_time()

    @property
    def running(self) -> list[str]:
        """The names of the machines whose nodes run, in order of arrival."""
        return [resident.name for resident in self.residents.values() if resident.node is not None]

    def info(self) -> dict[str, Any]:
        """Give what a result must say of the world it came from: seed, cipher, network."""
        options = self.options
        return {
            "seed": options.seed,
            "cipher": self.handshakes.cipher,
            "latency": self.network.model.name,
            "loss": options.loss,
            "nat": dict(options.nat),
            "grain_seconds": options.grain,
            "commit_seconds": options.commit_seconds,
            "clock_skew_ms": options.clock_skew_ms,
        }

    def say(self, text: str) -> None:
        """Put a line of the scenario's own into the trace."""
        self.trace.add(self.now, "s", "-", "-", text)

    def call_at(self, when: float, action: Callable[[], None]) -> None:
        """Run a plain function at a virtual time, between tasks; it must not raise."""
        self.clock.call_at(when, action)

    def spawn(self, function: Callable[..., Awaitable[object]], *arguments: object) -> None:
        """Start a task that lives until the world ends, from plain code; its error ends the world."""
        self._nursery.start_soon(function, *arguments)

    # --- machines ----------------------------------------------------------------------------------------------------

    async def start(
        self,
        name: str,
        settings: Mapping[str, str] | None = None,
        *,
        knows: Sequence[str] = (),
        skew_ms: int | None = None,
        nat: str | None = None,
        subnet: str | None = None,
    ) -> Node:
        """Switch a machine on, a new one or one that was stopped or crashed, and give its node once it is ready.

        knows: machines whose addresses are its static peers. skew_ms: how far its wall clock is ahead; nat: a kind of `sim.nat`;
        both are drawn by the world's options when left out. subnet: the first three bytes of its address, such as `185.1.2`.
        """
        resident = self.residents.get(name) or self._settle(name, nat, subnet)
        if resident.node is not None:
            raise RuntimeError(f"{name} runs already")
        if skew_ms is not None:
            resident.clock.skew_ms = skew_ms
        peers = ",".join(f"{self.residents[each].address}" for each in knows)
        changes = {**({"network.static_peers": peers} if peers else {}), **(settings or {})}
        if changes:
            resident.config = with_settings(resident.config, changes)
        resident.host.power_on()
        resident.starts += 1
        resident.is_crashed = False
        # It claims the level that real nodes demand; nothing is confined in a simulation, and only trusted models run there.
        runtime = InlineRuntime(self.options.seconds_of, level="full", sessions=self._sessions)
        environment = simulated_machine(
            self.seed, f"{name}/{resident.starts}", resident.host, resident.database, runtime, resident.clock
        )
        node = Node(
            resident.config, environment, resident.identity, metrics=resident.metrics, mdns=None, strict=True,
            handshakes=self.handshakes, watch=False,
        )  # fmt: skip
        resident.node, resident.stopped = node, trio.Event()
        self.trace.add(self.now, "+", name)
        await self._nursery.start(self._run, resident, node, runtime)
        return node

    async def stop(self, name: str) -> None:
        """Stop a node in order and wait until it has said its goodbyes."""
        resident = self.residents[name]
        if resident.node is not None:
            self.trace.add(self.now, "-", name)
            resident.node.stop()
            await resident.stopped.wait()

    async def crash(self, *names: str, silent: bool = False) -> None:
        """Take machines down at this very moment: whatever was not committed is lost, nothing is said.

        silent: a power cut, after which peers hear nothing; otherwise only the process died, and its kernel resets connections.
        """
        fallen = [resident for name in names if (resident := self.residents[name]).node is not None]
        for resident in fallen:
            self.trace.add(self.now, "x", resident.name, "-", "silent" if silent else "reset")
            resident.is_crashed = True
            disk = resident.database.crash()
            resident.host.power_off(silent=silent)
            if resident.node is not None:
                resident.node.abandon()
            resident.database = InlineDatabase(resident.metrics, self.options.commit_seconds, disk)
        for resident in fallen:
            await resident.stopped.wait()

    async def restart(self, name: str) -> Node:
        """Switch a machine on again, with its disk, key and settings; one that still runs is stopped first."""
        await self.stop(name)
        return await self.start(name)

    async def kill(self, share: float, *, silent: bool = False, spare: Iterable[str] = ()) -> list[str]:
        """Crash a share of the running machines at once, drawn by the seed; gives their names."""
        spared = frozenset(spare)
        candidates = [name for name in self.running if name not in spared]
        names = self.draws.sample(candidates, round(share * len(candidates)))
        await self.crash(*names, silent=silent)
        return names

    async def join(
        self, name: str, router: Router, *, subnet: str | None = None, identity: Identity | None = None, nat: str | None = None
    ) -> Outsider:
        """Put a bare transport on the network, with every request given to `router`; it runs until the world ends."""
        host = self._new_host(name, nat, subnet)
        identity = identity or self._identity(name)
        self.network.labels[identity.node_id] = name
        runtime = InlineRuntime(level="full", sessions=self._sessions)
        environment = simulated_machine(self.seed, name, host, InlineDatabase(), runtime)
        settings = TransportSettings(listen=(f"{host.name}:{PORT}",), exempt_private=False)
        network_id = NodeConfig(self._folder, self._folder).network.network_id
        transport = TransportService(environment, identity, network_id, settings, Metrics(), router, self.handshakes)
        await self._nursery.start(transport.run)
        return Outsider(name, f"{host.name}:{PORT}", identity, environment, transport)

    # --- faults ------------------------------------------------------------------------------------------------------

    def partition(self, *groups: Iterable[str]) -> None:
        """Let nothing pass between machines of different groups; those in no group form one of their own."""
        named = [list(group) for group in groups]
        self._fault("partition", *(f"{len(group)}" for group in named))
        self.network.partition([self._hosts(group) for group in named])

    def cut(self, sources: Iterable[str], targets: Iterable[str]) -> None:
        """Let nothing pass from some machines to others; the other direction stays open."""
        here, there = list(sources), list(targets)
        self._fault("cut", *here[:3], "to", *there[:3])
        self.network.cut(self._hosts(here), self._hosts(there))

    def heal(self) -> None:
        """End every partition, cut and clog."""
        self._fault("heal")
        self.network.heal()

    def clog(self, source: str, target: str, seconds: float) -> None:
        """Let nothing arrive from one machine at another for so long; then everything at once."""
        self._fault("clog", source, target, f"{seconds:g}")
        self.network.clog(self.residents[source].host.name, self.residents[target].host.name, seconds)

    def worsen(self, loss: float, reordering: float = 0.0, duplication: float = 0.0) -> None:
        """Let the network lose, reorder and double so much from now on; 0 of everything makes it good again."""
        self._fault("wires", f"{loss:g}", f"{reordering:g}", f"{duplication:g}")
        network = self.network
        network.loss = network.syn_loss = loss
        network.reordering, network.duplication = reordering, duplication

    def slow(self, name: str, seconds: float) -> None:
        """Make a machine late by so much with everything that reaches or leaves it; 0 makes it quick again."""
        self._fault("slow", name, f"{seconds:g}")
        self.residents[name].host.delay_seconds = seconds

    def skew(self, name: str, milliseconds: int) -> None:
        """Set a machine's wall clock so far ahead."""
        self._fault("skew", name, str(milliseconds))
        self.residents[name].clock.skew_ms = milliseconds

    async def settle(self, condition: Callable[[], object], seconds: float = 60.0) -> None:
        """Let virtual time pass until something is so. Raises trio.TooSlowError."""
        with trio.fail_after(seconds):
            while not condition():  # noqa: ASYNC110 - polled on virtual time, where it costs nothing
                await trio.sleep(0.01)

    # --- within ------------------------------------------------------------------------------------------------------

    async def _run(self, resident: Resident, node: Node, runtime: InlineRuntime, *, task_status: trio.TaskStatus[None]) -> None:
        try:
            async with running(runtime):
                await node.run(task_status=task_status)
        except (P2PNodeError, ExceptionGroup) as error:
            # On a machine that has lost its disk and wires everything fails; anywhere else it is a bug.
            if not resident.is_crashed or not isinstance(bare(error), P2PNodeError):
                raise
        finally:
            resident.node = None
            resident.stopped.set()

    def _settle(self, name: str, nat: str | None, subnet: str | None) -> Resident:
        options = self.options
        host = self._new_host(name, nat, subnet)
        folder = self._folder / name
        folder.mkdir()
        address = f"{host.name}:{PORT}"
        settings = {**_SETTINGS, "network.listen": address, **options.settings}
        metrics = Metrics()
        identity = self._identity(name)
        self.network.labels[identity.node_id] = name
        resident = self.residents[name] = Resident(
            name=name,
            address=address,
            identity=identity,
            config=with_settings(NodeConfig(folder / "config", folder / "data"), settings),
            metrics=metrics,
            database=InlineDatabase(metrics, options.commit_seconds),
            host=host,
            clock=TrioClock(round((2 * self.draws.random() - 1) * options.clock_skew_ms), self.clock.current_time),
        )
        return resident

    def _new_host(self, name: str, nat: str | None, subnet: str | None) -> MemoryHost:
        kind = nat or drawn_kind(self.options.nat, self.draws.random())
        number = len(self.network.hosts) + 1
        outside = f"80.{number // 250}.{number % 250}.1"
        if subnet is not None:
            place = self._subnets[subnet] = self._subnets.get(subnet, 0) + 1
            outside = f"{subnet}.{place}"
        way = Nat(kind, outside, self.seed)
        inside = f"10.{number // 250}.{number % 250}.2" if way.is_translating else outside
        return self.network.host(inside, nat=way, label=name)

    def _identity(self, name: str) -> Identity:
        return Identity(blake3_256(b"simulated identity", f"{self.seed}/{name}".encode()))

    def _hosts(self, names: Iterable[str]) -> list[str]:
        return [self.residents[name].host.name for name in names]

    def _fault(self, *words: str) -> None:
        self.trace.add(self.now, "f", "-", "-", " ".join(words))


def run_world(
    scenario: Callable[[World], Awaitable[Result]],
    seed: int = 1,
    folder: Path | None = None,
    latency_seconds: float = 0.01,
    *,
    options: WorldOptions | None = None,
    trace: Trace | None = None,
    progress: Callable[[World], None] | None = None,
) -> Result:
    """Run a scenario to its end on virtual time and give its result; the nodes that still run are stopped in order.

    options: everything about the world; without them a flat network of the seed and latency given. progress: called every ten
    virtual seconds. The trace is closed when this returns.
    """
    chosen = options or WorldOptions(seed=seed, latency_seconds=latency_seconds)
    events = trace or Trace(chosen.trace)
    clock = SimClock(chosen.grain)

    async def main(place: Path) -> Result:
        async with trio.open_nursery() as nursery:
            world = World(chosen, place, nursery, clock, events)
            if progress is not None:
                nursery.start_soon(_report, world, progress)
            result = await scenario(world)
            for name in reversed(world.residents):
                await world.stop(name)
            nursery.cancel_scope.cancel()
        return result

    with deterministic(chosen.seed), tempfile.TemporaryDirectory(prefix="p2pnode-world-") as temporary:
        try:
            return trio.run(main, folder or Path(temporary), clock=clock)
        except BaseExceptionGroup as group:
            raise bare(group) from group
        finally:
            events.close()


async def _report(world: World, progress: Callable[[World], None]) -> None:
    while True:
        progress(world)
        await trio.sleep(PROGRESS_SECONDS)
