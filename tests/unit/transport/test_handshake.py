"""The handshake machine: two of them joined by their bytes, and everything they must refuse."""

import dataclasses

import pytest

from p2pnode.crypto.hashing import document_hash
from p2pnode.crypto.keys import Identity, check_puzzle
from p2pnode.crypto.noise import SUITES, HandshakeState
from p2pnode.errors import ProtocolViolation
from p2pnode.reasons import Reason
from p2pnode.transport.handshake import DOMAIN, Handshake, Introduction, network_tag, refusal
from p2pnode.wire.codec import encode
from p2pnode.wire.messages.session import HandshakePayload
from p2pnode.wire.version import VersionRange

NETWORK = document_hash(b"network")
ALICE, BOB = Identity(b"a" * 32), Identity(b"b" * 32)


def introduction(identity: Identity, **changes) -> Introduction:
    name = "alice" if identity is ALICE else "bob"
    base = Introduction(identity, NETWORK, f"instance of {name}", features=("x",), agent=name, addresses=(f"{name}:1",))
    return dataclasses.replace(base, **changes)


def dialler(suite: int = 1, expected=None, **changes) -> Handshake:
    return Handshake(
        introduction(ALICE, **changes), initiator=True, ephemeral=b"\x11" * 32, seen_address="b:1", suite=suite, expected=expected
    )


def answerer(identity: Identity = BOB, **changes) -> Handshake:
    return Handshake(introduction(identity, **changes), initiator=False, ephemeral=b"\x22" * 32, seen_address="a:9")


def shake(alice: Handshake, bob: Handshake, piece: int = 10_000) -> None:
    there = alice.start()
    while there:
        back = b"".join(bob.receive(there[start : start + piece]) for start in range(0, len(there), piece))
        there = b"".join(alice.receive(back[start : start + piece]) for start in range(0, len(back), piece))


def refused(function, *arguments) -> Reason:
    with pytest.raises(ProtocolViolation) as caught:
        function(*arguments)
    return caught.value.reason


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("piece", [1, 7, 10_000])
def test_both_sides_learn_who_the_other_is(suite, piece) -> None:
    alice, bob = dialler(suite, expected=BOB.node_id), answerer()
    shake(alice, bob, piece)
    assert alice.established is not None
    assert bob.established is not None
    seen_by_alice, seen_by_bob = alice.established.peer, bob.established.peer
    assert (seen_by_alice.node_id, seen_by_alice.public_key) == (BOB.node_id, BOB.public_key)
    assert (seen_by_bob.node_id, seen_by_bob.agent, seen_by_bob.features) == (ALICE.node_id, "alice", ("x",))
    assert (seen_by_alice.inbound, seen_by_bob.inbound) == (False, True)
    assert (seen_by_alice.seen_address, seen_by_alice.addresses) == ("b:1", ("bob:1",))
    sealed = bytearray(21)
    alice.established.sender.seal_into(b"hello", memoryview(sealed))
    assert bob.established.receiver.open_in_place(memoryview(sealed)) == b"hello"


def test_bytes_behind_the_handshake_are_kept_for_the_session() -> None:
    alice, bob = dialler(), answerer()
    third = alice.receive(bob.receive(alice.start()))
    bob.receive(third + b"the first record")
    assert bob.leftover == b"the first record"


@pytest.mark.parametrize("position", range(8))
def test_every_byte_of_the_preamble_is_hashed_into_the_handshake(position) -> None:
    start = bytearray(dialler(versions=VersionRange(1, 3)).start())
    start[position] ^= 3
    bob = answerer(versions=VersionRange(1, 3))
    alice = dialler(versions=VersionRange(1, 3))
    alice.start()
    with pytest.raises(ProtocolViolation):
        alice.receive(bob.receive(start))


def test_another_network_is_named_even_when_the_short_tag_collides() -> None:
    bob = answerer(network_id=b"\x01" * 32)
    assert refused(bob.receive, dialler().start()) is Reason.WRONG_NETWORK
    assert bob.is_in_the_clear
    start = dialler().start()
    forged = start[:4] + network_tag(b"\x01" * 32) + start[8:]
    alice = dialler()
    alice.start()
    answer = answerer(network_id=b"\x01" * 32).receive(forged)
    assert refused(alice.receive, answer) is Reason.BAD_HANDSHAKE


@pytest.mark.parametrize(
    ("own", "theirs", "chosen"),
    [
        ((1, 1), (1, 1), 1),
        ((1, 2), (1, 1), 1),
        ((1, 1), (1, 2), 1),
        ((1, 2), (2, 3), 2),
        ((2, 3), (1, 2), 2),
        ((6, 7), (6, 7), 7),
    ],
)
def test_neighbouring_versions_interoperate(own, theirs, chosen) -> None:
    alice, bob = dialler(versions=VersionRange(*own)), answerer(versions=VersionRange(*theirs))
    shake(alice, bob)
    assert alice.established.peer.version == bob.established.peer.version == chosen


@pytest.mark.parametrize(("own", "theirs"), [((1, 1), (2, 3)), ((3, 4), (1, 2))])
def test_distant_versions_part_with_a_reason(own, theirs) -> None:
    bob = answerer(versions=VersionRange(*theirs))
    assert refused(bob.receive, dialler(versions=VersionRange(*own)).start()) is Reason.WRONG_VERSION
    alice = dialler()
    alice.start()
    assert refused(alice.receive, refusal(Reason.WRONG_VERSION)) is Reason.WRONG_VERSION


def test_only_the_expected_peer_will_do() -> None:
    alice = dialler(expected=ALICE.node_id[::-1])
    assert refused(alice.receive, answerer().receive(alice.start())) is Reason.WRONG_PEER


def test_self_dial_and_duplicate_identity_are_told_apart() -> None:
    for instance, reason in (("instance of alice", Reason.SELF_DIAL), ("another", Reason.DUPLICATE_IDENTITY)):
        alice = dialler()
        assert refused(alice.receive, answerer(ALICE, instance=instance).receive(alice.start())) is reason


def test_identities_must_solve_the_networks_puzzle() -> None:
    bits = next(bits for bits in range(1, 33) if not check_puzzle(BOB.node_id, bits))
    alice = dialler(puzzle_bits=bits)
    assert refused(alice.receive, answerer().receive(alice.start())) is Reason.BAD_HANDSHAKE


def forged_answer(**changes) -> bytes:
    """A responder that completes Noise honestly but puts something else into its payload."""
    alice = dialler()
    start = alice.start()
    state = HandshakeState(SUITES[1], False, b"p2pnode session" + start[:8] + NETWORK, BOB.static_key(), b"\x22" * 32)
    state.read_message(start[10:])
    honest = HandshakePayload(
        identity=BOB.public_key,
        signature=BOB.sign(DOMAIN, NETWORK, BOB.static_public_key),
        version=1,
        features=(),
        agent="",
        addresses=(),
        instance="i",
    )
    fields = {name: changes.pop(name, getattr(honest, name)) for name in honest.__struct_fields__}
    message = state.write_message(changes.pop("payload", None) or encode(HandshakePayload(**fields)))
    return len(message).to_bytes(2, "big") + message


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"identity": ALICE.public_key}, Reason.BAD_SIGNATURE),
        ({"signature": bytes(64)}, Reason.BAD_SIGNATURE),
        ({"signature": BOB.sign(DOMAIN, b"\x01" * 32, BOB.static_public_key)}, Reason.BAD_SIGNATURE),
        ({"signature": BOB.sign("offer", NETWORK, BOB.static_public_key)}, Reason.BAD_SIGNATURE),
        ({"signature": BOB.sign(DOMAIN, NETWORK, ALICE.static_public_key)}, Reason.BAD_SIGNATURE),
        ({"version": 0}, Reason.WRONG_VERSION),
        ({"version": 9}, Reason.WRONG_VERSION),
        ({"payload": b"\x80"}, Reason.WRONG_TYPE),
        ({"payload": b"\xc1"}, Reason.RESERVED_BYTE),
    ],
)
def test_a_payload_that_proves_nothing_is_refused(changes, reason) -> None:
    alice = dialler()
    alice.start()
    assert refused(alice.receive, forged_answer(**changes)) is reason
    assert alice.established is None


def test_an_honest_forged_answer_would_pass() -> None:
    alice = dialler()
    alice.start()
    alice.receive(forged_answer())
    assert alice.established is not None


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", Reason.BAD_HANDSHAKE),
        (b"\x03" + bytes(50), Reason.BAD_HANDSHAKE),
        (b"\x01\x01\x01\x00" + network_tag(NETWORK) + b"\x00\x00", Reason.BAD_HANDSHAKE),
        (b"\x01\x01\x01\x00" + network_tag(NETWORK) + b"\xff\xff", Reason.TOO_LARGE),
        (b"\x01\x01\x01\x00" + network_tag(NETWORK) + b"\x00\x01x", Reason.BAD_HANDSHAKE),
        (b"\x01\x01\x01\x00" + network_tag(NETWORK) + b"\x00\x20" + bytes(32), Reason.BAD_HANDSHAKE),
        (b"\x01\x01\x01\x00" + network_tag(NETWORK) + b"\x00\x22" + b"\x05" * 34, Reason.BAD_HANDSHAKE),
    ],
)
def test_strangers_bytes_are_refused(data, reason) -> None:
    assert refused(answerer().receive, data) is reason


def test_a_clear_refusal_names_its_reason_or_none() -> None:
    for data, reason in (
        (refusal(Reason.TOO_MANY_CONNECTIONS), Reason.TOO_MANY_CONNECTIONS),
        (b"\0\0\x05hello", Reason.BAD_HANDSHAKE),
        (b"\0\0\xff" + b"\xff" * 255, Reason.BAD_HANDSHAKE),
    ):
        alice = dialler()
        alice.start()
        for byte in data[:-1]:
            assert alice.receive(bytes((byte,))) == b""
        assert refused(alice.receive, data[-1:]) is reason
