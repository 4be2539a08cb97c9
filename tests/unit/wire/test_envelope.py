"""Signed documents."""

import msgpack
import msgspec
import pytest

from p2pnode.crypto.keys import Identity
from p2pnode.errors import ProtocolViolation
from p2pnode.reasons import Reason
from p2pnode.wire.codec import encode
from p2pnode.wire.envelope import (
    BODY_BYTES_MAX,
    decode_envelope,
    document_id,
    encode_envelope,
    open_envelope,
    seal,
)
from p2pnode.wire.messages.market import Agreement, Cheque, Offer, Order, Quote, Receipt
from p2pnode.wire.messages.session import Done, Envelope

ALICE, BOB = Identity(b"a" * 32), Identity(b"b" * 32)
AGREEMENT = Agreement(b"o" * 32, b"c" * 32, 1_700_000_000_000)
NETWORK = b"test-network"


def refusal(envelope: Envelope, cls: type = Agreement, network: bytes = NETWORK, signer: bytes | None = None) -> Reason:
    with pytest.raises(ProtocolViolation) as caught:
        open_envelope(envelope, cls, network, signer)
    return caught.value.reason


def test_a_sealed_document_opens() -> None:
    envelope = decode_envelope(encode_envelope(seal(AGREEMENT, ALICE, NETWORK)))
    assert open_envelope(envelope, Agreement, NETWORK) == AGREEMENT
    assert open_envelope(envelope, Agreement, NETWORK, ALICE.public_key) == AGREEMENT
    assert envelope.signer == ALICE.public_key


def test_the_id_is_that_of_the_body() -> None:
    envelope = seal(AGREEMENT, ALICE, NETWORK)
    assert document_id(envelope) == document_id(encode(AGREEMENT)) == document_id(seal(AGREEMENT, BOB, NETWORK))


def test_what_is_not_as_signed_is_refused() -> None:
    envelope = seal(AGREEMENT, ALICE, NETWORK)
    replace = msgspec.structs.replace
    assert refusal(envelope, network=b"another-network") is Reason.BAD_SIGNATURE
    assert refusal(envelope, signer=BOB.public_key) is Reason.WRONG_SIGNER
    assert refusal(replace(envelope, signer=BOB.public_key)) is Reason.BAD_SIGNATURE
    assert refusal(envelope, cls=Cheque) is Reason.WRONG_TYPE
    assert refusal(replace(envelope, kind=45), cls=Cheque) is Reason.BAD_SIGNATURE
    assert refusal(replace(envelope, body=envelope.body[:-1] + b"\x01")) is Reason.BAD_SIGNATURE
    assert refusal(replace(envelope, body=bytes(BODY_BYTES_MAX + 1))) is Reason.TOO_LARGE


def test_a_signed_body_of_a_newer_version_keeps_its_bytes() -> None:
    body = msgpack.packb({**msgpack.unpackb(encode(AGREEMENT)), "arbiter": b"x"})
    envelope = Envelope(43, body, ALICE.public_key, ALICE.sign("agreement", NETWORK, body))
    stored = encode_envelope(envelope)
    assert open_envelope(decode_envelope(stored), Agreement, NETWORK) == AGREEMENT
    assert decode_envelope(stored).body == body
    assert document_id(envelope) != document_id(encode(AGREEMENT))


def test_a_well_signed_body_is_still_decoded_strictly() -> None:
    body = encode(AGREEMENT) + b"\xc0"
    envelope = Envelope(43, body, ALICE.public_key, ALICE.sign("agreement", NETWORK, body))
    assert refusal(envelope) is Reason.TRAILING_BYTES


@pytest.mark.parametrize("cls", [Offer, Quote, Order, Agreement, Receipt, Cheque])
def test_every_document_has_a_domain(cls: type) -> None:
    assert refusal(Envelope(0, b"", b"k" * 32, b"s" * 64), cls) is Reason.WRONG_TYPE


def test_what_is_no_document_cannot_be_sealed() -> None:
    with pytest.raises(KeyError, match="no document"):
        seal(Done(), ALICE, NETWORK)


def test_an_oversized_envelope_is_refused_before_decoding() -> None:
    with pytest.raises(ProtocolViolation) as caught:
        decode_envelope(bytes(BODY_BYTES_MAX + 1000))
    assert caught.value.reason is Reason.TOO_LARGE
    largest = Envelope(2**53, bytes(BODY_BYTES_MAX), b"k" * 32, b"s" * 64)
    assert decode_envelope(encode_envelope(largest)) == largest
