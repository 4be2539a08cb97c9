"""What the tests of this folder share: a machine with a transport and discovery on it and nothing else, on virtual time."""

from contextlib import asynccontextmanager

import pytest
import trio

from p2pnode.crypto.keys import Identity
from p2pnode.discovery.service import DiscoveryService
from p2pnode.discovery.settings import DiscoverySettings
from p2pnode.environment import Environment
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.sim.clock import TrioClock
from p2pnode.sim.database import InlineDatabase
from p2pnode.sim.machine import InlineExecutor, SeededEntropy
from p2pnode.transport.service import TransportService, TransportSettings

NETWORK = bytes(32)


class DiscoveryMachine:
    """number: sets its address and key. answers: replies of its own, by class of request, in place of honest ones."""

    def __init__(
        self, number, wires, *, static=(), mdns=None, database=None, identity=None, host=None, skew_ms=0, answers=None, **settings
    ):
        host = host or f"10.0.0.{number}"
        self.address = f"{host}:7000"
        self.identity = identity or Identity(bytes([number]) * 32)
        self.database = database or InlineDatabase()
        self.metrics = Metrics()
        self.answers = answers or {}
        environment = Environment(
            clock=TrioClock(skew_ms), entropy=SeededEntropy(1, str(number)), network=wires.host(host),
            database=self.database, executor=InlineExecutor(), runtime=None,
        )  # fmt: skip
        transport = TransportSettings(listen=(self.address,), strict=True, suite=2)
        self.transport = TransportService(environment, self.identity, NETWORK, transport, self.metrics, self.route)
        self.discovery = DiscoveryService(
            environment, DiscoverySettings(static_peers=tuple(static), **settings), NETWORK, self.identity, self.transport,
            self.metrics, mdns,
        )  # fmt: skip
        self.transport.on_link_up = self.discovery.link_up
        self.transport.on_link_down = self.discovery.link_down
        self.transport.on_violation = self.discovery.misbehaved

    @property
    def node_id(self):
        return self.identity.node_id

    def route(self, incoming):
        answer = self.answers.get(type(incoming.message))
        if answer is not None:
            incoming.reply(answer(incoming.message))
        elif not self.discovery.handle(incoming):
            incoming.refuse(Reason.UNKNOWN_MESSAGE)

    def is_linked_with(self, other):
        return other.identity.node_id in self.transport.links()

    @asynccontextmanager
    async def running(self):
        async with trio.open_nursery() as outer:
            await outer.start(self.transport.run)
            async with trio.open_nursery() as inner:
                await inner.start(self.discovery.run)
                yield self
                inner.cancel_scope.cancel()
            outer.cancel_scope.cancel()


async def wait_until(condition, seconds=60.0):
    """Let virtual time pass until something is so."""
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 - polled on virtual time
            await trio.sleep(0.1)


@pytest.fixture
def Machine():
    """The class, for tests that build several."""
    return DiscoveryMachine


@pytest.fixture
def until():
    """Wait, on virtual time, until something is so."""
    return wait_until
