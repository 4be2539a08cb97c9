"""Two worlds with the same verbs: virtual time over memory, and real sockets on loopback."""

from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
import trio

from p2pnode.crypto.hashing import document_hash
from p2pnode.crypto.keys import Identity
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.sim.clock import SimClock, TrioClock
from p2pnode.sim.network import MemoryNetwork
from p2pnode.transport.limits import Limits
from p2pnode.transport.service import TransportService, TransportSettings
from p2pnode.transport.tcp import TcpNetwork
from p2pnode.wire.messages.session import Done

NETWORK_ID = document_hash(b"test network")


class SeededEntropy:
    """Bytes that are the same in every run."""

    def __init__(self, seed: bytes) -> None:
        self._state = seed

    def token(self, size: int) -> bytes:
        out = b""
        while len(out) < size:
            self._state = document_hash(self._state)
            out += self._state
        return out[:size]

    def uniform(self) -> float:
        return int.from_bytes(self.token(6), "big") / 2**48


class Party:
    """One node's transport, with everything its callbacks have seen."""

    def __init__(self, name: str, network, router=None, identity=None, network_id=NETWORK_ID, instance=b"", **settings) -> None:
        self.name = name
        self.metrics = Metrics()
        self.requests: list = []
        self.ups: list = []
        self.downs: list = []
        self.identity = identity or Identity(document_hash(name.encode()))
        environment = SimpleNamespace(clock=TrioClock(), entropy=SeededEntropy(name.encode() + instance), network=network)
        settings.setdefault("strict", True)
        self.service = TransportService(
            environment, self.identity, network_id, TransportSettings(**settings), self.metrics, router or self.answer
        )
        self.service.on_link_up = self.ups.append
        self.service.on_link_down = lambda link, reason: self.downs.append((link, reason))

    def answer(self, incoming) -> None:
        """Echo: Done with the message's note, and the attachment."""
        self.requests.append(incoming)
        incoming.receive(None, lambda view: incoming.reply(Done(note=incoming.message.note), [view]))

    @property
    def node_id(self):
        return self.identity.node_id

    @property
    def addresses(self):
        return self.service.bound_addresses

    def link_to(self, other: "Party"):
        return self.service.links().get(other.node_id)

    def hits(self) -> dict[str, float]:
        return self.metrics.labels("limit_hits_total")


class World:
    """Makes parties that can reach each other, and runs them."""

    def __init__(self, kind: str, latency_seconds: float = 0.001) -> None:
        self.kind = kind
        self.memory = MemoryNetwork(latency_seconds)
        self._hosts = 0

    def network(self, host: str | None = None):
        if self.kind == "tcp":
            return TcpNetwork()
        self._hosts += 1
        return self.memory.host(host or f"10.0.{self._hosts}.1")

    def listen_address(self) -> str:
        return "127.0.0.1:0" if self.kind == "tcp" else "host:0"

    def party(self, name: str, host: str | None = None, **options) -> Party:
        options.setdefault("listen", (self.listen_address(),))
        return Party(name, self.network(host), **options)

    @asynccontextmanager
    async def running(self, *parties: Party):
        async with trio.open_nursery() as nursery:
            for party in parties:
                await nursery.start(party.service.run)
            try:
                yield nursery
            finally:
                nursery.cancel_scope.cancel()


def run_world(kind: str, scenario: Callable[[World], Awaitable[None]], **options) -> None:
    """Run a scenario: with virtual time in memory, within ten real seconds over TCP."""

    async def main() -> None:
        with trio.fail_after(10 if kind == "tcp" else 100_000):
            await scenario(World(kind, **options))

    trio.run(main, clock=SimClock() if kind == "memory" else None)


async def eventually(condition: Callable[[], object], seconds: float = 5.0) -> None:
    """Wait until something is true; fails after a time."""
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 - any condition, not one that could set an event
            await trio.sleep(0.001)


@pytest.fixture
def kit():
    """The names above, for test modules, which cannot import from each other."""
    return SimpleNamespace(
        World=World, Party=Party, SeededEntropy=SeededEntropy, NETWORK_ID=NETWORK_ID, Limits=Limits, Reason=Reason,
        run=run_world, eventually=eventually,
    )  # fmt: skip


@pytest.fixture(params=["memory", "tcp"])
def run(request):
    """Run a scenario in one of the worlds: `run(scenario)`."""
    return lambda scenario, **options: run_world(request.param, scenario, **options)
