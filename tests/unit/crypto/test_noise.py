"""Noise XX: published vectors, the PyPI package `noiseprotocol` in both roles, and what must be refused."""

import json
import os
from pathlib import Path

import pytest
from noise.connection import Keypair, NoiseConnection

from p2pnode.crypto import noise
from p2pnode.errors import ProtocolViolation
from p2pnode.reasons import Reason

VECTORS = Path(os.environ.get("P2PNODE_VECTORS", Path(__file__).parents[4] / "shared" / "vectors")) / "noise"
SUITES = [noise.AESGCM_SHA256, noise.CHACHAPOLY_SHA256]


def pair(suite: str, prologue: bytes = b"p") -> tuple[noise.HandshakeState, noise.HandshakeState]:
    alice = noise.HandshakeState(suite, True, prologue, b"\x01" * 32, b"\x02" * 32)
    bob = noise.HandshakeState(suite, False, prologue, b"\x03" * 32, b"\x04" * 32)
    return alice, bob


def shake(alice, bob) -> None:
    assert bob.read_message(alice.write_message(b"one")) == b"one"
    assert alice.read_message(bob.write_message(b"two")) == b"two"
    assert bob.read_message(alice.write_message(b"three")) == b"three"


def seal(cipher: noise.CipherState, plain: bytes) -> bytes:
    out = bytearray(len(plain) + 16)
    assert cipher.seal_into(plain, memoryview(out)) == len(out)
    return bytes(out)


def unseal(cipher: noise.CipherState, sealed: bytes) -> bytes:
    return bytes(cipher.open_in_place(memoryview(bytearray(sealed))))


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("name", ["cacophony.json", "snow.json"])
def test_published_vectors(suite, name) -> None:
    if not (VECTORS / name).exists():
        pytest.skip(f"no {name}: published vectors are not part of the repository; see docs of the test kit")
    vectors = json.loads((VECTORS / name).read_text())["vectors"]
    chosen = [vector for vector in vectors if (vector.get("protocol_name") or vector.get("name")) == suite]
    assert chosen
    for vector in chosen:
        keys = {key: bytes.fromhex(value) for key, value in vector.items() if isinstance(value, str) and key != "protocol_name"}
        alice = noise.HandshakeState(suite, True, keys["init_prologue"], keys["init_static"], keys["init_ephemeral"])
        bob = noise.HandshakeState(suite, False, keys["resp_prologue"], keys["resp_static"], keys["resp_ephemeral"])
        sides = [alice, bob]
        for index, message in enumerate(vector["messages"]):
            payload, expected = bytes.fromhex(message["payload"]), bytes.fromhex(message["ciphertext"])
            if index < 3:
                assert sides[0].write_message(payload) == expected
                assert sides[1].read_message(expected) == payload
            else:
                if index == 3:
                    ciphers = {id(side): side.split() for side in sides}
                assert seal(ciphers[id(sides[0])][0], payload) == expected
                assert unseal(ciphers[id(sides[1])][1], expected) == payload
            sides.reverse()
        assert alice.handshake_hash == bob.handshake_hash
        if "handshake_hash" in keys:
            assert alice.handshake_hash == keys["handshake_hash"]


def other_implementation(suite: str, initiator: bool) -> NoiseConnection:
    connection = NoiseConnection.from_name(suite.encode())
    connection.set_prologue(b"prologue")
    connection.set_keypair_from_private_bytes(Keypair.STATIC, b"\x07" * 32)
    if initiator:
        connection.set_as_initiator()
    else:
        connection.set_as_responder()
    connection.start_handshake()
    return connection


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("initiator", [True, False])
def test_interoperates_with_noiseprotocol(suite, initiator) -> None:
    ours = noise.HandshakeState(suite, initiator, b"prologue", b"\x05" * 32, b"\x06" * 32)
    theirs = other_implementation(suite, not initiator)
    for turn in range(3):
        if (turn % 2 == 0) == initiator:
            assert theirs.read_message(ours.write_message(b"payload %d" % turn)) == b"payload %d" % turn
        else:
            assert ours.read_message(bytes(theirs.write_message(b"payload %d" % turn))) == b"payload %d" % turn
    assert theirs.get_handshake_hash() == ours.handshake_hash
    send, receive = ours.split()
    for size in (0, 1, 4096, 65519):
        assert theirs.decrypt(seal(send, b"x" * size)) == b"x" * size
        assert unseal(receive, bytes(theirs.encrypt(b"y" * size))) == b"y" * size


@pytest.mark.parametrize("suite", SUITES)
def test_a_changed_bit_anywhere_is_refused(suite) -> None:
    alice, bob = pair(suite)
    shake(alice, bob)
    send, _ = alice.split()
    sealed = seal(send, b"hello")
    for position in range(len(sealed)):
        changed = bytearray(sealed)
        changed[position] ^= 1
        with pytest.raises(ProtocolViolation) as caught:
            unseal(bob.split()[1], bytes(changed))
        assert caught.value.reason is Reason.BAD_SIGNATURE
    assert unseal(bob.split()[1], sealed) == b"hello"


@pytest.mark.parametrize("suite", SUITES)
def test_a_replayed_record_is_refused(suite) -> None:
    alice, bob = pair(suite)
    shake(alice, bob)
    send, receive = alice.split()[0], bob.split()[1]
    sealed = seal(send, b"pay 1 credit")
    assert unseal(receive, sealed) == b"pay 1 credit"
    with pytest.raises(ProtocolViolation):
        unseal(receive, sealed)


@pytest.mark.parametrize("suite", SUITES)
def test_rekeying_both_sides_goes_on_and_one_side_does_not(suite) -> None:
    alice, bob = pair(suite)
    shake(alice, bob)
    send, receive = alice.split()[0], bob.split()[1]
    send.rekey()
    receive.rekey()
    assert unseal(receive, seal(send, b"after")) == b"after"
    send.rekey()
    with pytest.raises(ProtocolViolation):
        unseal(receive, seal(send, b"alone"))


def test_another_prologue_is_refused() -> None:
    alice = noise.HandshakeState(noise.AESGCM_SHA256, True, b"network a", b"\x01" * 32, b"\x02" * 32)
    bob = noise.HandshakeState(noise.AESGCM_SHA256, False, b"network b", b"\x03" * 32, b"\x04" * 32)
    bob.read_message(alice.write_message(b""))
    with pytest.raises(ProtocolViolation) as caught:
        alice.read_message(bob.write_message(b""))
    assert caught.value.reason is Reason.BAD_HANDSHAKE


@pytest.mark.parametrize("point", [bytes(32), b"\x01" + bytes(31)])
def test_low_order_points_are_refused(point) -> None:
    bob = pair(noise.AESGCM_SHA256)[1]
    bob.read_message(point)
    with pytest.raises(ProtocolViolation) as caught:
        bob.write_message(b"")
    assert caught.value.reason is Reason.BAD_HANDSHAKE


def test_short_and_untimely_messages_are_refused() -> None:
    alice, bob = pair(noise.AESGCM_SHA256)
    with pytest.raises(ProtocolViolation):
        alice.read_message(b"x" * 64)
    with pytest.raises(ProtocolViolation):
        bob.read_message(b"short")
    with pytest.raises(ValueError, match="turn"):
        bob.write_message(b"")
    with pytest.raises(ValueError, match="not finished"):
        bob.split()


def test_the_preferred_suite_is_listed() -> None:
    assert noise.preferred_suite() in noise.SUITES
