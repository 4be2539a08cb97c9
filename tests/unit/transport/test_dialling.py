"""Dialling a peer that has several addresses: on virtual time, so that not one needless millisecond is waited."""

import pytest
import trio

from p2pnode.crypto.hashing import document_hash
from p2pnode.crypto.keys import Identity
from p2pnode.errors import ProtocolViolation, Refused, Unreachable
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.transport.dialling import Dialler, Opened, dial_order
from p2pnode.transport.handshake import Handshake, Introduction, refusal
from p2pnode.transport.limits import ConnectionGate, Limits

NETWORK_ID = document_hash(b"test network")
ALICE, BOB, CAROL = (Identity(document_hash(name)) for name in (b"alice", b"bob", b"carol"))
ADDRESSES = ["10.0.0.1:1", "10.0.0.2:1", "10.0.0.3:1"]
NEVER = 1e6


class Wire:
    """A stream to a peer who answers each handshake message after a time."""

    def __init__(self, address: str, identity: Identity, answer_seconds: float) -> None:
        self.local_address, self.remote_address = "10.9.9.9:1", address
        introduction = Introduction(identity, NETWORK_ID, address)
        self.handshake = Handshake(introduction, initiator=False, ephemeral=b"\7" * 32, seen_address="")
        self.answers = [refusal(Reason.TOO_MANY_CONNECTIONS)] if answer_seconds < 0 else []
        self.answer_seconds = max(0.0, answer_seconds)
        self.is_closed = False

    def send_nowait(self, chunks) -> int:
        if not self.answers:
            self.answers.append(self.handshake.receive(b"".join(chunks)))
        return sum(map(len, chunks))

    async def wait_writable(self) -> None:
        await trio.lowlevel.checkpoint()

    async def receive_into(self, buffer) -> int:
        await trio.sleep(self.answer_seconds)
        data = self.answers.pop()
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.is_closed = True

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()


class Net:
    """A network where each address connects after its own time to its own peer, or fails after it."""

    def __init__(self) -> None:
        self.places: dict[str, tuple[float, Identity | None, float]] = {}
        self.dialled: list[tuple[float, str]] = []
        self.given_up: list[str] = []
        self.wires: list[Wire] = []

    def at(self, address: str, seconds: float, identity: Identity | None = BOB, answer_seconds: float = 0.0) -> None:
        self.places[address] = seconds, identity, answer_seconds

    async def dial(self, address: str) -> Wire:
        self.dialled.append((round(trio.current_time() - self.started, 6), address))
        seconds, identity, answer_seconds = self.places[address]
        try:
            await trio.sleep(seconds)
        except trio.Cancelled:
            self.given_up.append(address)
            raise
        if identity is None:
            raise Unreachable(f"{address}: nobody")
        self.wires.append(Wire(address, identity, answer_seconds))
        return self.wires[-1]


class Bench:
    """A dialler on such a network, with what it counts."""

    def __init__(self, **limits) -> None:
        self.net, self.metrics = Net(), Metrics()
        self.limits = Limits(**limits)
        self.gate = ConnectionGate(self.limits, self.metrics, False, 0.0)
        self.dialler = Dialler(self.net, self.gate, self.limits, self.metrics, self.handshake)

    @staticmethod
    def handshake(stream, initiator, expected) -> Handshake:
        introduction = Introduction(ALICE, NETWORK_ID, "alice")
        return Handshake(introduction, initiator=initiator, ephemeral=b"\5" * 32, seen_address="", expected=expected)

    async def open(self, addresses=ADDRESSES, expected=BOB.node_id, **options) -> tuple[Opened | None, float]:
        self.net.started = started = trio.current_time()
        opened = await self.dialler.open(addresses, expected, **options)
        return opened, trio.current_time() - started

    def check_only(self, opened: Opened | None) -> None:
        """Nothing else stayed open, and exactly its place is taken."""
        assert [wire for wire in self.net.wires if not wire.is_closed] == ([] if opened is None else [opened.stream])
        assert self.gate.outbound == (opened is not None)


@pytest.mark.parametrize("count", [1, 3])
async def test_success_returns_at_once(autojump_clock, count):
    bench = Bench()
    for address in ADDRESSES:
        bench.net.at(address, 0.003)
    opened, seconds = await bench.open(ADDRESSES[:count])
    assert seconds == pytest.approx(0.003)
    assert bench.net.dialled == [(0.0, ADDRESSES[0])]
    assert opened.established.peer.node_id == BOB.node_id
    bench.check_only(opened)


async def test_the_next_address_starts_after_the_stagger_and_the_losers_are_cancelled(autojump_clock):
    bench = Bench(dial_stagger_seconds=0.25)
    bench.net.at(ADDRESSES[0], NEVER)
    bench.net.at(ADDRESSES[1], NEVER)
    bench.net.at(ADDRESSES[2], 0.01)
    opened, seconds = await bench.open()
    assert bench.net.dialled == [(0.0, ADDRESSES[0]), (0.25, ADDRESSES[1]), (0.5, ADDRESSES[2])]
    assert seconds == pytest.approx(0.51)
    assert sorted(bench.net.given_up) == ADDRESSES[:2]
    bench.check_only(opened)


async def test_a_failure_starts_the_next_at_once(autojump_clock):
    bench = Bench()
    bench.net.at(ADDRESSES[0], 0.002, None)
    bench.net.at(ADDRESSES[1], 0.003)
    opened, seconds = await bench.open(ADDRESSES[:2])
    assert seconds == pytest.approx(0.005)
    bench.check_only(opened)


async def test_an_early_address_that_is_slow_still_wins_over_a_slower_late_one(autojump_clock):
    bench = Bench()
    bench.net.at(ADDRESSES[0], 0.3)
    bench.net.at(ADDRESSES[1], NEVER)
    opened, seconds = await bench.open(ADDRESSES[:2])
    assert seconds == pytest.approx(0.3)
    assert opened.stream.remote_address == ADDRESSES[0]
    bench.check_only(opened)


async def test_the_race_goes_through_the_handshake(autojump_clock):
    """An address that connects and then says nothing, and one where somebody else answers, both lose."""
    bench = Bench()
    bench.net.at(ADDRESSES[0], 0.0, BOB, NEVER)
    bench.net.at(ADDRESSES[1], 0.0, CAROL)
    bench.net.at(ADDRESSES[2], 0.01)
    opened, seconds = await bench.open()
    assert opened.established.peer.node_id == BOB.node_id
    assert seconds == pytest.approx(0.26)
    assert bench.metrics.labels("handshakes_failed_total") == {"wrong-peer": 1}
    bench.check_only(opened)


async def test_two_that_open_in_one_tick_leave_one_session(autojump_clock):
    bench = Bench()
    bench.net.at(ADDRESSES[0], 0.3)
    bench.net.at(ADDRESSES[1], 0.05)
    opened, _ = await bench.open(ADDRESSES[:2])
    assert len(bench.net.wires) == 2
    bench.check_only(opened)


async def test_when_nothing_opens_the_error_says_most(autojump_clock):
    bench = Bench()
    bench.net.at(ADDRESSES[0], 0.0, None)
    bench.net.at(ADDRESSES[1], 0.0, None)
    with pytest.raises(Unreachable, match=r"10\.0\.0\.1:1: nobody; 10\.0\.0\.2:1: nobody"):
        await bench.open(ADDRESSES[:2])
    bench.net.at(ADDRESSES[0], 0.0, BOB, -1.0)
    with pytest.raises(ProtocolViolation, match="too-many-connections"):
        await bench.open(ADDRESSES[:2])
    with pytest.raises(Unreachable, match="no address is known"):
        await bench.open([])
    bench.check_only(None)


async def test_no_more_attempts_at_once_than_there_are_places(autojump_clock):
    bench = Bench(connections_max=2)
    bench.net.at(ADDRESSES[0], 0.4, None)
    bench.net.at(ADDRESSES[1], NEVER)
    bench.net.at(ADDRESSES[2], 0.1)
    opened, seconds = await bench.open()
    assert bench.net.dialled == [(0.0, ADDRESSES[0]), (0.25, ADDRESSES[1]), (0.4 + 0.1, ADDRESSES[2])]
    assert seconds == pytest.approx(0.6)
    bench.check_only(opened)
    bench.gate.dial()
    with pytest.raises(Refused, match="connections_max"):
        await bench.open()


async def test_only_the_first_attempt_may_cost_another_peer_its_session(autojump_clock):
    bench = Bench(connections_max=1)
    asked = []

    def make_room(only_inbound) -> bool:
        asked.append(round(trio.current_time(), 6))
        bench.gate.hang_up()
        return True

    bench.gate.make_room = make_room
    bench.gate.dial()
    for address in ADDRESSES:
        bench.net.at(address, 0.6, None)
    started = trio.current_time()
    with pytest.raises(Unreachable):
        await bench.open()
    assert asked == [started]
    assert [address for _, address in bench.net.dialled] == ADDRESSES
    bench.check_only(None)


async def test_an_opening_that_became_moot_ends_and_gives_nothing(autojump_clock):
    bench = Bench()
    bench.net.at(ADDRESSES[0], NEVER)
    bench.net.at(ADDRESSES[1], 0.01, None)
    bench.net.at(ADDRESSES[2], NEVER)
    opened, seconds = await bench.open(is_moot=lambda: trio.current_time() - bench.net.started > 0.255)
    assert opened is None
    assert seconds == pytest.approx(0.26)
    bench.check_only(None)


@pytest.mark.parametrize("after", [0.1, 0.3, 0.36])
async def test_cancelled_nothing_stays_open(autojump_clock, after):
    bench = Bench()
    bench.net.at(ADDRESSES[0], 0.0, BOB, NEVER)
    bench.net.at(ADDRESSES[1], 0.05, BOB, 0.05)
    with trio.move_on_after(after) as scope:
        await bench.open(ADDRESSES[:2])
    if scope.cancelled_caught:
        bench.check_only(None)
    assert scope.cancelled_caught == (after < 0.35)


async def test_cancelled_at_the_moment_of_success_nothing_stays_open(autojump_clock):
    bench = Bench()
    bench.net.at(ADDRESSES[0], 0.05)
    bench.net.at(ADDRESSES[1], NEVER)
    with trio.CancelScope() as scope:

        class LastWord(Handshake):
            def receive(self, data) -> bytes:
                scope.cancel()
                return super().receive(data)

        def handshake(stream, initiator, expected) -> Handshake:
            return LastWord(Introduction(ALICE, NETWORK_ID, "alice"), initiator=True, ephemeral=b"\5" * 32, seen_address="")

        bench.dialler._make_handshake = handshake
        await bench.open(ADDRESSES[:2])
    assert scope.cancelled_caught
    bench.check_only(None)


@pytest.mark.parametrize(
    ("addresses", "order"),
    [
        ([], []),
        (["10.0.0.1:1", "10.0.0.1:1"], ["10.0.0.1:1"]),
        (["10.0.0.1:1", "10.0.0.2:1", "[2001:db8::1]:1", "[2001:db8::2]:1"],
         ["10.0.0.1:1", "[2001:db8::1]:1", "10.0.0.2:1", "[2001:db8::2]:1"]),
        (["[2001:db8::1]:1", "[2001:db8::2]:1", "10.0.0.1:1"], ["[2001:db8::1]:1", "10.0.0.1:1", "[2001:db8::2]:1"]),
        (["a.example:1", "b.example:1", "[fe80::1%eth0]:1"], ["a.example:1", "[fe80::1%eth0]:1", "b.example:1"]),
    ],
)  # fmt: skip
def test_the_first_stays_first_and_the_families_take_turns(addresses, order):
    assert dial_order(addresses) == order
