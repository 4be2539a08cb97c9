"""Published vectors for the primitives: Wycheproof and the RFCs' own, through the code that the node runs."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nacl.bindings as sodium
import pytest
from nacl.exceptions import CryptoError

from p2pnode.crypto import noise
from p2pnode.crypto.keys import Identity
from p2pnode.crypto.signing import verify_exact
from p2pnode.errors import ProtocolViolation

VECTORS = Path(os.environ.get("P2PNODE_VECTORS", Path(__file__).parents[3] / "shared" / "vectors"))


def text_of(folder: str, name: str) -> str:
    file = VECTORS / folder / name
    if not file.exists():
        pytest.skip(f"no {name}: published vectors are not part of the repository; P2PNODE_VECTORS names their folder")
    return file.read_text()


def wycheproof(name: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for group in json.loads(text_of("wycheproof", name))["testGroups"]:
        for case in group["tests"]:
            yield group, case


def rfc_records(name: str) -> list[dict[str, str]]:
    blocks = re.split(r"\n\s*\n(?=COUNT)|\n(?=COUNT)", text_of("rfc", name))
    records = [dict(re.findall(r"^(\w+)\s*=[ ]*(.*)$", block, re.MULTILINE)) for block in blocks]
    return [record for record in records if "COUNT" in record]


def is_valid(message: bytes, public_key: bytes, signature: bytes) -> bool:
    try:
        verify_exact(message, public_key, signature)
    except ProtocolViolation:
        return False
    return True


def test_ed25519_wycheproof() -> None:
    results = set()
    for group, case in wycheproof("ed25519_test.json"):
        key = bytes.fromhex(group["publicKey"]["pk"])
        valid = is_valid(bytes.fromhex(case["msg"]), key, bytes.fromhex(case["sig"]))
        assert valid == (case["result"] == "valid"), case
        results.add(valid)
    assert results == {True, False}


def test_ed25519_rfc_8032() -> None:
    lines = text_of("rfc", "ed25519_djb_sign_first128.txt").splitlines()
    assert len(lines) == 128
    for line in lines:
        secret, public, message, signed = (bytes.fromhex(part) for part in line.split(":")[:4])
        identity = Identity(secret[:32])
        assert identity.public_key == public
        assert sodium.crypto_sign(message, secret) == signed
        assert is_valid(message, public, signed[:64])
        assert not is_valid(message + b"x", public, signed[:64])


def test_x25519_wycheproof() -> None:
    low_order = 0
    for _, case in wycheproof("x25519_test.json"):
        private, public, shared = (bytes.fromhex(case[name]) for name in ("private", "public", "shared"))
        if shared == bytes(32):
            low_order += 1
            refuses_as_ephemeral(public)
        else:
            assert sodium.crypto_scalarmult(private, public) == shared, case
    assert low_order > 0


def refuses_as_ephemeral(public: bytes) -> None:
    """A key of low order gives a shared secret that everybody knows: the handshake must end."""
    responder = noise.HandshakeState(noise.CHACHAPOLY_SHA256, False, b"", b"s" * 32, b"e" * 32)
    responder.read_message(public)
    with pytest.raises(ProtocolViolation):
        responder.write_message(b"")


def test_x25519_rfc_7748() -> None:
    records = rfc_records("rfc7748_x25519.txt")
    assert len(records) >= 2
    for record in records[:2]:
        scalar, u, expected = (bytes.fromhex(record[name]) for name in ("INPUT_SCALAR", "INPUT_U", "OUTPUT_U"))
        assert sodium.crypto_scalarmult(scalar, u) == expected


def open_chacha(key: bytes, nonce: bytes, associated: bytes, sealed: bytes) -> bytes | None:
    """Open through the Noise cipher where it can make this nonce, else through the function beneath it."""
    try:
        if nonce[:4] != bytes(4):
            plain: bytes = sodium.crypto_aead_chacha20poly1305_ietf_decrypt(sealed, associated, nonce, key)
            return plain
        out = bytearray(len(sealed) - noise.TAG_SIZE)
        cipher = noise._CIPHERS[noise.CHACHAPOLY_SHA256](key)
        cipher.open(int.from_bytes(nonce[4:], "little"), memoryview(sealed), associated, memoryview(out))
        return bytes(out)
    except CryptoError:
        return None


def test_chacha20_poly1305_wycheproof() -> None:
    results = set()
    for group, case in wycheproof("chacha20_poly1305_test.json"):
        if group["ivSize"] != 96:
            continue
        key, nonce, associated, message, ciphertext, tag = (
            bytes.fromhex(case[name]) for name in ("key", "iv", "aad", "msg", "ct", "tag")
        )
        opened = open_chacha(key, nonce, associated, ciphertext + tag)
        assert opened == (message if case["result"] == "valid" else None), case
        if opened is not None:
            assert sodium.crypto_aead_chacha20poly1305_ietf_encrypt(message, associated, nonce, key) == ciphertext + tag
        results.add(case["result"])
    assert results == {"valid", "invalid"}


def value_of(text: str) -> bytes:
    return text[1:-1].encode() if text.startswith('"') else bytes.fromhex(text)


def test_chacha20_poly1305_rfc_8439() -> None:
    checked = 0
    for record in rfc_records("chacha20poly1305_boringssl.txt"):
        key, nonce, plain, associated, ciphertext, tag = (
            value_of(record.get(name, "")) for name in ("KEY", "NONCE", "IN", "AD", "CT", "TAG")
        )
        if len(tag) == noise.TAG_SIZE and "NO_SEAL" not in record:
            assert open_chacha(key, nonce, associated, ciphertext + tag) == plain
            checked += 1
    assert checked > 50


def two_outputs(salt: bytes, material: bytes) -> bytes:
    """Give the 64 bytes of the Noise key derivation, which is RFC 5869 with an empty info."""
    state = noise._SymmetricState(noise.CHACHAPOLY_SHA256)
    state.chaining_key = salt
    return b"".join(state._derive(material))


def test_hkdf_rfc_5869() -> None:
    plain = [record for record in rfc_records("rfc5869_hkdf_sha256.txt") if not record.get("info")]
    assert plain
    for record in plain:
        okm = bytes.fromhex(record["OKM"])
        assert two_outputs(bytes.fromhex(record.get("salt", "")), bytes.fromhex(record["IKM"]))[: len(okm)] == okm


def test_hkdf_wycheproof() -> None:
    checked = 0
    for _, case in wycheproof("hkdf_sha256_test.json"):
        if case["info"] == "" and case["size"] <= 64 and case["result"] == "valid":
            okm = two_outputs(bytes.fromhex(case["salt"]), bytes.fromhex(case["ikm"]))[: case["size"]]
            assert okm.hex() == case["okm"], case
            checked += 1
    assert checked > 5
