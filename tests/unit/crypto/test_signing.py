"""Signatures bind purpose, network, body and key."""

import pytest

from p2pnode.crypto.keys import Identity
from p2pnode.crypto.signing import verify
from p2pnode.errors import ProtocolViolation
from p2pnode.reasons import Reason

ALICE, BOB = Identity(b"a" * 32), Identity(b"b" * 32)
SIGNATURE = ALICE.sign("offer", b"net", b"body")


def test_the_right_signature_passes() -> None:
    verify("offer", b"net", memoryview(b"body"), ALICE.public_key, SIGNATURE)


@pytest.mark.parametrize(
    ("domain", "network", "body", "key", "signature"),
    [
        ("quote", b"net", b"body", ALICE.public_key, SIGNATURE),
        ("offer", b"other", b"body", ALICE.public_key, SIGNATURE),
        ("offer", b"net", b"bodY", ALICE.public_key, SIGNATURE),
        ("offer", b"net", b"body", BOB.public_key, SIGNATURE),
        ("offer", b"net", b"body", ALICE.public_key, SIGNATURE[:-1] + bytes([SIGNATURE[-1] ^ 1])),
        ("offer", b"net", b"body", ALICE.public_key, SIGNATURE[:-1]),
        ("offer", b"net", b"body", ALICE.public_key, b""),
        ("offer", b"net", b"body", b"", SIGNATURE),
        ("offer", b"net", b"body", bytes(32), bytes(64)),
    ],
    ids=["domain", "network", "body", "key", "bit", "short", "no-signature", "no-key", "zero-key"],
)
def test_any_other_is_refused(domain: str, network: bytes, body: bytes, key: bytes, signature: bytes) -> None:
    with pytest.raises(ProtocolViolation) as caught:
        verify(domain, network, body, key, signature)
    assert caught.value.reason is Reason.BAD_SIGNATURE
