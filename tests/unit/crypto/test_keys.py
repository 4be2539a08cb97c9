"""Identities, the key puzzle and the key file."""

import hashlib
import json

import nacl.bindings as sodium
import pytest

from p2pnode.crypto.hashing import tagged_hash
from p2pnode.crypto.keys import (
    Identity,
    check_puzzle,
    decode_key_file,
    encode_key_file,
    generate_identity,
    is_key_file_sealed,
    node_id_of,
)
from p2pnode.crypto.signing import verify
from p2pnode.errors import ConfigError


class CountingEntropy:
    """Every token is another hash of a counter."""

    def __init__(self) -> None:
        self.count = 0

    def token(self, size: int) -> bytes:
        self.count += 1
        return hashlib.shake_128(self.count.to_bytes(8, "big")).digest(size)

    def uniform(self) -> float:
        return 0.5


@pytest.fixture
def identity() -> Identity:
    return Identity(b"s" * 32, b"x" * 32)


def test_node_id_is_the_hash_of_the_public_key(identity: Identity) -> None:
    assert identity.node_id == node_id_of(identity.public_key) == hashlib.blake2b(identity.public_key, digest_size=32).digest()


def test_signature_verifies(identity: Identity) -> None:
    signature = identity.sign("offer", b"net", b"body")
    assert len(signature) == 64
    verify("offer", b"net", b"body", identity.public_key, signature)


def test_static_key_is_a_key_of_its_own(identity: Identity) -> None:
    assert identity.static_key() == b"x" * 32
    assert identity.static_public_key == sodium.crypto_scalarmult_base(b"x" * 32)
    assert Identity(b"s" * 32).static_key() not in (b"s" * 32, identity.static_key())


def test_repr_shows_no_secret(identity: Identity) -> None:
    assert identity.seed.hex() not in repr(identity)
    assert repr(identity).startswith("Identity(node-")


@pytest.mark.parametrize("size", [0, 31, 33])
def test_secrets_of_another_size_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        Identity(bytes(size))
    with pytest.raises(ValueError, match="32 bytes"):
        Identity(bytes(32), bytes(size))


def test_puzzle_counts_leading_zero_bits() -> None:
    node_id = bytes(32)
    zero_bits = 256 - int.from_bytes(tagged_hash("identity-puzzle", node_id), "big").bit_length()
    assert check_puzzle(node_id, zero_bits)
    assert not check_puzzle(node_id, zero_bits + 1)
    assert check_puzzle(node_id, 0)


def test_generated_identity_solves_the_puzzle() -> None:
    entropy = CountingEntropy()
    identity = generate_identity(entropy, 6)
    assert check_puzzle(identity.node_id, 6)
    assert entropy.count > 2, "the first key solved it: the test shows nothing"
    assert identity.static_key() != Identity(identity.seed).static_key()


def test_generation_can_be_stopped_and_bounded() -> None:
    with pytest.raises(ConfigError, match="stopped"):
        generate_identity(CountingEntropy(), 32, is_stopped=iter([False, False, True]).__next__)
    with pytest.raises(ConfigError, match="outside"):
        generate_identity(CountingEntropy(), 33)


def test_key_file_without_passphrase(identity: Identity) -> None:
    data = encode_key_file(identity, None, CountingEntropy())
    assert not is_key_file_sealed(data)
    assert decode_key_file(data, None) == identity
    with pytest.raises(ConfigError, match="no passphrase"):
        decode_key_file(data, "secret")


@pytest.fixture(scope="module")
def sealed() -> bytes:
    return encode_key_file(Identity(b"s" * 32, b"x" * 32), "correct horse", CountingEntropy())


def test_key_file_with_passphrase(sealed: bytes, identity: Identity) -> None:
    assert is_key_file_sealed(sealed)
    assert decode_key_file(sealed, "correct horse") == identity
    assert "c3Nzc3Nz" not in sealed.decode(), "the seed stands in the file"


def test_wrong_or_missing_passphrase_is_a_clear_error(sealed: bytes) -> None:
    with pytest.raises(ConfigError, match="wrong passphrase"):
        decode_key_file(sealed, "wrong")
    with pytest.raises(ConfigError, match="give its passphrase"):
        decode_key_file(sealed, None)


def test_empty_passphrase_is_refused(identity: Identity) -> None:
    with pytest.raises(ConfigError, match="empty"):
        encode_key_file(identity, "", CountingEntropy())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("p2pnode_identity", 2),
        ("p2pnode_identity", "1"),
        ("node_id", "node-other"),
        ("secrets", "AAAA"),
        ("secrets", "?"),
        ("salt", "AAAA"),
        ("argon2_bytes", 2**40),
        ("argon2_passes", 0),
        ("nonce", ""),
    ],
)
def test_a_damaged_file_is_a_clear_error(sealed: bytes, field: str, value: object) -> None:
    fields = json.loads(sealed)
    fields[field] = value
    with pytest.raises(ConfigError):
        decode_key_file(json.dumps(fields).encode(), "correct horse")


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"\xff\xfe", b"[1]", b"x" * 5000, b'{"p2pnode_identity": 1, "node_id": "", "secrets": ""}']
)
def test_what_is_no_key_file_is_a_clear_error(data: bytes) -> None:
    with pytest.raises(ConfigError):
        decode_key_file(data, None)
