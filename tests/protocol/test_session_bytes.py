"""Frozen bytes of version 1: a handshake with fixed keys, and one of every frame. A later version must still take them."""

import json
from pathlib import Path

import pytest

from p2pnode.crypto.hashing import document_hash
from p2pnode.crypto.keys import Identity
from p2pnode.errors import ProtocolViolation
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.transport import frames
from p2pnode.transport.handshake import Handshake, Introduction
from p2pnode.transport.limits import BufferBudget, Limits
from p2pnode.transport.session import Session
from p2pnode.wire.version import VersionRange

FROZEN = json.loads((Path(__file__).parent / "session_v1.json").read_text())
NETWORK = document_hash(b"frozen network")
ALICE, BOB = Identity(b"\x01" * 32, b"\x03" * 32), Identity(b"\x02" * 32, b"\x04" * 32)


def introduction(identity: Identity, versions: VersionRange) -> Introduction:
    name = "alice" if identity is ALICE else "bob"
    return Introduction(identity, NETWORK, f"{name} 1", versions, ("relay",), f"{name}/0.1", (f"{name}.example:4001",))


def initiator(suite: int, versions: VersionRange) -> Handshake:
    return Handshake(introduction(ALICE, versions), initiator=True, ephemeral=b"\x05" * 32, seen_address="", suite=suite)


def responder(versions: VersionRange) -> Handshake:
    return Handshake(introduction(BOB, versions), initiator=False, ephemeral=b"\x06" * 32, seen_address="")


@pytest.mark.parametrize("suite", [1, 2])
def test_version_1_still_speaks_the_same_bytes(suite) -> None:
    alice, bob = initiator(suite, VersionRange(1, 1)), responder(VersionRange(1, 1))
    first = alice.start()
    second = bob.receive(first)
    third = alice.receive(second)
    bob.receive(third)
    assert [part.hex() for part in (first, second, third)] == FROZEN["handshake"][str(suite)]
    assert bob.established is not None


@pytest.mark.parametrize("suite", [1, 2])
def test_the_next_version_takes_the_frozen_bytes_of_version_1(suite) -> None:
    first = bytes.fromhex(FROZEN["handshake"][str(suite)][0])
    bob = responder(VersionRange(1, 2))
    # The answer names version 2, so it is not frozen; an initiator of version 1 takes it and goes on.
    alice = initiator(suite, VersionRange(1, 1))
    assert alice.start() == first
    bob.receive(alice.receive(bob.receive(first)))
    assert bob.established is not None
    assert alice.established is not None
    assert bob.established.peer.version == alice.established.peer.version == 1


@pytest.mark.parametrize("suite", [1, 2])
def test_the_version_after_next_does_not(suite) -> None:
    with pytest.raises(ProtocolViolation) as caught:
        responder(VersionRange(2, 3)).receive(bytes.fromhex(FROZEN["handshake"][str(suite)][0]))
    assert caught.value.reason is Reason.WRONG_VERSION


class PlainCipher:
    """No cipher: the frames themselves are frozen, not what encrypts them."""

    records = 0

    def seal_into(self, plain, out) -> int:
        out[: len(plain)] = plain
        out[len(plain) : len(plain) + 16] = bytes(16)
        return len(plain) + 16

    def open_into(self, sealed, out) -> int:
        return len(sealed) - 16

    def rekey(self) -> None:
        """Nothing to replace."""


def make_session(initiates: bool) -> Session:
    metrics = Metrics()
    limits = Limits(inline_bytes_max=64)
    return Session(PlainCipher(), PlainCipher(), initiates, limits, metrics, BufferBudget(1 << 20, metrics), 0.0)


def conversation() -> list[str]:
    """One of everything a version 1 session says: each flight as it stands on the wire."""
    alice, bob = make_session(True), make_session(False)
    space = memoryview(bytearray(Limits().send_buffer_bytes))
    flights = []

    def carry(source: Session, target: Session) -> None:
        data = bytes(space[: source.output(space)])
        flights.append(data.hex())
        view = memoryview(bytearray(data))
        while used := target.receive(view, 0.0):
            view = view[used:]
        target.events.clear()

    alice.send_ping(0.0)
    inline = alice.send_request("a", b"\x00\x05\x80", [b"inline"])
    streamed = alice.send_request("b", b"\x00\x05\x80", [b"s" * 100])
    cancelled = alice.send_request("c", b"\x00\x05\x80")
    alice.send_cancel(cancelled)
    carry(alice, bob)
    bob.accept(streamed, memoryview(bytearray(100)))
    bob.send_reply(inline, b"\x00\x05\x80", [b"back"])
    bob.send_refusal(streamed, Reason.BUSY, "later")
    bob.send_goodbye(Reason.SHUTTING_DOWN)
    carry(bob, alice)
    return flights


def test_every_frame_of_version_1_keeps_its_bytes() -> None:
    assert conversation() == FROZEN["frames"]
    kinds = (frames.REQUEST, frames.REPLY, frames.REFUSAL, frames.CANCEL, frames.MORE, frames.DATA, frames.CREDIT)
    assert kinds == (1, 2, 3, 4, 5, 6, 7)
    assert (frames.WINDOW, frames.PING, frames.PONG, frames.GOODBYE, frames.REKEY) == (8, 9, 10, 11, 12)
