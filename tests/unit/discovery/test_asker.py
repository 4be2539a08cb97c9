"""Requests with a deadline: over open links, over links dialled for them, and never without an end."""

import math

import pytest
import trio

from p2pnode.discovery.dht.asker import ASKS_MAX, Answer, Asker
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.sim.network import MemoryNetwork
from p2pnode.wire.messages.discovery import Introduction, WhoAreYou
from p2pnode.wire.messages.session import Done


class Desk:
    """An asker on a machine, with its timer."""

    def __init__(self, machine, nursery, dials_max=2):
        self.failed_dials, self.wrong, self.answers = [], [], []
        self.metrics = Metrics()
        self.asker = Asker(
            trio.current_time, machine.transport, self.metrics, dials_max,
            lambda node_id, address, reason: self.failed_dials.append((node_id, reason)),
            lambda node_id, reason: self.wrong.append((node_id, reason)),
            lambda deadline: None,
        )  # fmt: skip
        self.asker.start(nursery)
        nursery.start_soon(self._tick)

    async def _tick(self):
        while True:
            await trio.sleep(0.01)
            self.asker.tick()

    def ask(self, node_id, address, seconds=3.0, expected=Introduction):
        self.asker.ask(node_id, (address,) if address else (), WhoAreYou(), expected, seconds, self.answers.append)


async def test_it_dials_asks_and_uses_the_open_link_afterwards(autojump_clock, nursery, Machine, until):
    wires = MemoryNetwork(0.01)
    alice, bob = Machine(1, wires), Machine(2, wires)
    async with alice.running(), bob.running():
        desk = Desk(bob, nursery)
        desk.ask(alice.node_id, alice.address)
        await until(lambda: desk.answers)
        assert isinstance(desk.answers[0].message, Introduction)
        assert desk.answers[0].address == alice.address
        desk.ask(alice.node_id, "")
        await until(lambda: len(desk.answers) == 2)
        assert bob.metrics.value("connections_total", "outbound") >= 1
        assert desk.metrics.value("asks_total", "answered") == 2
        assert desk.asker.deadline == math.inf, "nothing is left of what was answered"


@pytest.mark.parametrize(
    ("address", "expected", "reason"),
    [("10.0.0.1:9", Introduction, Reason.CONNECTION_LOST), ("10.0.0.1:7000", Done, Reason.WRONG_TYPE)],
)
async def test_what_comes_to_nothing_is_reported_once(autojump_clock, nursery, Machine, until, address, expected, reason):
    wires = MemoryNetwork(0.01)
    alice, bob = Machine(1, wires), Machine(2, wires)
    async with alice.running(), bob.running():
        desk = Desk(bob, nursery)
        desk.ask(alice.node_id, address, expected=expected)
        await trio.sleep(10)
        assert [answer.reason for answer in desk.answers] == [reason]
        if reason is Reason.WRONG_TYPE:
            assert desk.wrong == [(alice.node_id, Reason.WRONG_TYPE)]
        else:
            assert [node_id for node_id, _ in desk.failed_dials] == [alice.node_id]


async def test_silence_ends_at_the_deadline(autojump_clock, nursery, Machine, until):
    wires = MemoryNetwork(0.01)
    alice, bob = Machine(1, wires), Machine(2, wires)
    async with alice.running(), bob.running():
        await bob.transport.connect((alice.address,), alice.node_id)
        alice.discovery.handle = lambda incoming: True
        desk = Desk(bob, nursery)
        desk.ask(alice.node_id, "", seconds=1.5)
        await trio.sleep(1.4)
        assert desk.answers == []
        await trio.sleep(0.2)
        assert desk.answers == [Answer(None, Reason.TOO_SLOW)]
        assert desk.asker.deadline == math.inf


async def test_without_a_link_and_an_address_it_is_our_own_failure(autojump_clock, nursery, Machine, until):
    wires = MemoryNetwork(0.01)
    alice, bob = Machine(1, wires), Machine(2, wires)
    async with bob.running():
        desk = Desk(bob, nursery)
        desk.ask(alice.node_id, "")
        assert desk.answers == [], "never from within `ask`"
        await until(lambda: desk.answers)
        assert desk.answers[0].is_ours


@pytest.mark.slow
async def test_dials_at_once_and_asks_are_bounded(autojump_clock, nursery, Machine, until):
    wires = MemoryNetwork(0.01)
    bob = Machine(2, wires)
    async with bob.running():
        desk = Desk(bob, nursery, dials_max=2)
        bob.transport.connect = _never
        for number in range(ASKS_MAX + 5):
            desk.ask(number.to_bytes(32, "big"), "10.0.0.9:7000", seconds=1.0)
        assert _never_count() == 0
        await trio.sleep(0.5)
        assert _never_count() == 2, "the others wait for their turn"
        assert [answer.reason for answer in desk.answers] == [Reason.BUSY] * 5
        assert desk.metrics.value("limit_hits_total", "asks_max") == 5
        await trio.sleep(ASKS_MAX)
        assert len(desk.answers) == ASKS_MAX + 5, "every ask ends"


_dialling: list[int] = []


def _never_count():
    return len(_dialling)


async def _never(addresses, node_id):
    _dialling.append(1)
    try:
        await trio.sleep_forever()
    finally:
        _dialling.pop()
