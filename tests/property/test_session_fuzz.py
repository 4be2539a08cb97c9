"""Whatever bytes a stranger sends, in whatever pieces and order: a ProtocolViolation or a meaning, never anything else.

The session is fuzzed behind a cipher without secrecy, so that mutations reach the frames instead of dying at the tag.
"""

import struct
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2pnode.crypto.hashing import document_hash
from p2pnode.crypto.keys import Identity
from p2pnode.errors import ProtocolViolation, Refused
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.transport import events, frames
from p2pnode.transport.handshake import Handshake, Introduction
from p2pnode.transport.limits import BufferBudget, Limits
from p2pnode.transport.session import Session

LIMITS = Limits(
    message_bytes_max=2000, attachment_bytes_max=300_000, window_initial_bytes=5000, window_bytes_max=40_000,
    requests_in_flight_max=8, buffer_bytes_max=30_000, inline_bytes_max=1000, send_queue_bytes_max=50_000, rekey_records=50,
)  # fmt: skip
NETWORK = document_hash(b"fuzz")
ALICE, BOB = Identity(b"a" * 32), Identity(b"b" * 32)
RELAXED = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


class PlainCipher:
    """Tags of sixteen bytes and no secrecy."""

    def __init__(self) -> None:
        self.records = 0

    def seal_into(self, plain, out) -> int:
        out[: len(plain)] = plain
        out[len(plain) : len(plain) + 16] = bytes(16)
        return len(plain) + 16

    def open_into(self, sealed, out) -> int:
        if len(sealed) < 16:
            raise ProtocolViolation(Reason.TRUNCATED)
        self.records += 1
        out[: len(sealed) - 16] = bytes(sealed[:-16])
        return len(sealed) - 16

    def rekey(self) -> None:
        self.records = 0


def make_session(initiator: bool) -> Session:
    metrics = Metrics()
    budget = BufferBudget(LIMITS.buffer_bytes_max, metrics)
    return Session(PlainCipher(), PlainCipher(), initiator, LIMITS, metrics, budget, 0.0)


class Driver:
    """Handles a session's events as a link with an erratic owner would, following a row of choices."""

    def __init__(self, session: Session, choices: list[int]) -> None:
        self.session = session
        self.choices = choices
        self.space = memoryview(bytearray(70_000))
        self.open: list[int] = []
        self.now = 0.0

    def choose(self) -> int:
        return self.choices.pop() if self.choices else 0

    def receive(self, data: bytes) -> None:
        view = memoryview(bytearray(data))
        while used := self.session.receive(view, self.now):
            view = view[used:]
            while self.session.events:
                self.handle(self.session.events.pop(0))
        self.act()

    def handle(self, event) -> None:
        if isinstance(event, events.RequestArrived | events.ReplyArrived) and event.attachment is None:
            if self.choose() % 3:
                self.session.accept(event.number, memoryview(bytearray(event.attachment_size)))
            if isinstance(event, events.RequestArrived):
                self.open.append(event.number)
        elif isinstance(event, events.RequestArrived):
            self.open.append(event.number)

    def act(self) -> None:
        session, choice = self.session, self.choose()
        try:
            if choice % 7 == 1:
                session.send_request("t", b"m" * choice, [bytes(choice * 97)])
            elif choice % 7 == 2 and self.open:
                session.send_reply(self.open.pop(), b"r", [bytes(choice * 97)])
            elif choice % 7 == 3 and self.open:
                session.send_refusal(self.open.pop(), Reason.BUSY, "x" * choice)
            elif choice % 7 == 4 and session.waiting:
                session.send_cancel(next(iter(session.waiting)))
            elif choice % 7 == 5:
                self.now += choice / 10
                session.tick(self.now)
        except Refused:
            pass

    def output(self) -> bytes:
        out = b""
        while size := self.session.output(self.space):
            out += self.space[:size]
        return out


def record(plain: bytes) -> bytes:
    return (len(plain) + 16).to_bytes(2, "big") + plain + bytes(16)


small = st.integers(0, 12)
body = st.one_of(
    st.binary(max_size=40),
    st.builds(
        lambda m, w, a, rest: frames.OPENING.pack(m, w, a) + rest,
        st.integers(0, 60), st.sampled_from([0, 1000, 5000, 5001, 2**32 - 1]),
        st.sampled_from([0, 10, 5000, 250_000, 2**64 - 1]), st.binary(max_size=70),
    ),
    st.builds(lambda m, a: frames.OPENING.pack(len(m), 5000, len(a)) + m + a, st.binary(max_size=30), st.binary(max_size=30)),
    st.builds(lambda m: frames.OPENING.pack(len(m), 5000, 250_000) + m, st.binary(max_size=30)),
    st.builds(lambda n: struct.pack(">I", n), st.sampled_from([0, 1, 10, 3000, 5000, 2**32 - 1])),
    st.builds(lambda n: struct.pack(">Q", n), st.integers(0, 2**64 - 1)),
)  # fmt: skip
frame = st.builds(
    lambda kind, flags, number, data: frames.HEADER.pack(kind, flags, len(data), number) + data,
    st.one_of(st.integers(1, 12), st.integers(0, 255)), st.sampled_from([0, 255]), small, body,
)  # fmt: skip
plain = st.one_of(st.lists(frame, max_size=4).map(b"".join), st.binary(max_size=100), st.integers(0, 5000).map(bytes))
choices = st.lists(st.integers(0, 255), max_size=60)


def is_named(violation: ProtocolViolation) -> None:
    """A violation carries one of the closed list's reasons."""
    assert isinstance(violation.reason, Reason)


def is_sound(session: Session) -> None:
    """What must hold at any time, whatever came: budgets and counts within their limits."""
    assert 0 <= session.inbox._budget.used <= LIMITS.buffer_bytes_max
    assert len(session.open_requests) <= LIMITS.requests_in_flight_max
    assert session.inbox.window <= LIMITS.window_bytes_max
    for stream in session.inbox.streams.values():
        assert stream.received <= stream.announced <= stream.granted <= stream.size


@pytest.mark.slow
@given(st.booleans(), st.lists(plain, max_size=30), choices)
@settings(parent=RELAXED, max_examples=400)
def test_any_frames_in_any_order(initiator, plains, row) -> None:
    driver = Driver(make_session(initiator), row)
    try:
        driver.session.send_request("t", b"m", [bytes(9000)])
        for piece in plains:
            driver.receive(record(piece))
            is_sound(driver.session)
            driver.output()
    except ProtocolViolation as violation:
        is_named(violation)
    driver.session.close()
    assert driver.session.inbox._budget.used == 0


@given(st.binary(max_size=400), choices)
@RELAXED
def test_any_bytes(data, row) -> None:
    driver = Driver(make_session(False), row)
    try:
        driver.receive(data)
    except ProtocolViolation as violation:
        is_named(violation)


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 40_000)), min_size=1, max_size=25), choices, choices)
@RELAXED
def test_two_honest_sessions_always_finish(orders, left, right) -> None:
    """Requests and replies of any size, cancelled and refused at any time: in the end nothing is in flight, nothing is held."""
    alice, bob = Driver(make_session(True), left), Driver(make_session(False), right)
    for kind, size in orders:
        driver = alice if kind & 1 else bob
        try:
            driver.session.send_request("t", b"m" * (kind & 15), [bytes(size)])
        except Refused:
            continue
        settle(alice, bob, 3)
    for _ in range(400):
        settle(alice, bob, 2)
        for driver in (alice, bob):
            for number in list(driver.session.inbox.streams):
                stream = driver.session.inbox.streams[number]
                if stream.sink is None:
                    driver.session.accept(number, memoryview(bytearray(stream.size)))
                    driver.session.events.clear()
            for number in list(driver.session.open_requests):
                driver.session.send_reply(number, b"finally")
        if alice.session.is_quiet and bob.session.is_quiet:
            break
    assert alice.session.is_quiet
    assert bob.session.is_quiet
    assert alice.session.inbox._budget.used == bob.session.inbox._budget.used == 0


def settle(alice: Driver, bob: Driver, rounds: int) -> None:
    for _ in range(rounds):
        bob.receive(alice.output())
        alice.receive(bob.output())


@given(
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=6),
    st.integers(1, 300),
    st.booleans(),
)
@RELAXED
def test_a_mutated_handshake_is_a_violation_or_waits_for_more(mutations, piece, cut) -> None:
    def introduce(identity: Identity, name: str) -> Introduction:
        return Introduction(identity, NETWORK, name)

    alice = Handshake(introduce(ALICE, "a"), initiator=True, ephemeral=b"\x11" * 32, seen_address="")
    bob = Handshake(introduce(BOB, "b"), initiator=False, ephemeral=b"\x22" * 32, seen_address="")
    wire = SimpleNamespace(seen=0)

    def mutate(data: bytes) -> bytes:
        changed = bytearray(data)
        for position, value in mutations:
            if wire.seen <= position % 700 < wire.seen + len(changed):
                changed[position % 700 - wire.seen] ^= value
        wire.seen += len(data)
        return bytes(changed[: len(changed) // 2]) if cut else bytes(changed)

    honest = all(value == 0 for _, value in mutations) and not cut
    try:
        there = alice.start()
        for _ in range(3):
            there = mutate(there)
            back = b"".join(bob.receive(there[start : start + piece]) for start in range(0, len(there), piece))
            back = mutate(back)
            there = b"".join(alice.receive(back[start : start + piece]) for start in range(0, len(back), piece))
    except ProtocolViolation as violation:
        is_named(violation)
        if honest:
            raise AssertionError("an honest handshake failed") from violation
        return
    if bob.established is not None:
        assert bob.established.peer.node_id == ALICE.node_id
    if honest:
        assert alice.established is not None
        assert bob.established is not None


@given(st.booleans(), st.lists(st.binary(max_size=200), max_size=8))
@RELAXED
def test_strangers_at_the_handshake(initiator, pieces) -> None:
    handshake = Handshake(Introduction(BOB, NETWORK, "b"), initiator=initiator, ephemeral=b"\x22" * 32, seen_address="")
    handshake.start()
    try:
        for data in pieces:
            handshake.receive(data)
    except ProtocolViolation as violation:
        is_named(violation)
    assert handshake.established is None


@pytest.mark.slow
@given(
    st.lists(st.tuples(st.integers(0, 255), st.integers(0, 20_000)), min_size=1, max_size=12),
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 100_000), st.integers(0, 7)), max_size=4),
    choices,
    choices,
)
@settings(parent=RELAXED, max_examples=300)
def test_honest_traffic_with_a_few_bits_flipped(orders, flips, left, right) -> None:
    """Mutations deep inside a running session, sizes and tags included."""
    alice, bob = Driver(make_session(True), left), Driver(make_session(False), right)
    flights = 0

    def carry(source: Driver, target: Driver) -> None:
        nonlocal flights
        data = bytearray(source.output())
        for flight, position, bit in flips:
            if flight == flights and data:
                # Half of the positions fall on the first bytes, where headers are.
                place = position % len(data) if position & 1 else position % min(len(data), 40)
                data[place] ^= 1 << bit
        flights += 1
        target.receive(bytes(data))
        is_sound(target.session)

    try:
        for kind, size in orders:
            driver = alice if kind & 1 else bob
            try:
                driver.session.send_request("t", b"m" * (kind & 15), [bytes(size)])
            except Refused:
                continue
            carry(alice, bob)
            carry(bob, alice)
        for _ in range(20):
            carry(alice, bob)
            carry(bob, alice)
    except ProtocolViolation as violation:
        is_named(violation)
    for driver in (alice, bob):
        driver.session.close()
        assert driver.session.inbox._budget.used == 0
