"""Noise XX over X25519 and SHA-256 with two ciphers: AES-256-GCM and ChaCha20-Poly1305.

Source: The Noise Protocol Framework, revision 34 (https://noiseprotocol.org/noise.html); names follow it. AES-GCM goes
through `cryptography`, which seals from and opens into the caller's own buffers (9-18 GB/s where the processor has AES);
ChaCha20-Poly1305 goes through PyNaCl and is for processors that have not.
"""

import hashlib
import hmac
from typing import Final, Protocol

import nacl.bindings as sodium
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from nacl.exceptions import CryptoError, UnavailableError

from p2pnode.environment import Buffer
from p2pnode.errors import ProtocolViolation
from p2pnode.reasons import Reason

AESGCM_SHA256: Final = "Noise_XX_25519_AESGCM_SHA256"
CHACHAPOLY_SHA256: Final = "Noise_XX_25519_ChaChaPoly_SHA256"
SUITES: Final = {1: AESGCM_SHA256, 2: CHACHAPOLY_SHA256}

KEY_SIZE: Final = 32
TAG_SIZE: Final = 16
MESSAGE_SIZE_MAX: Final = 65535
# The last nonce belongs to rekeying (section 4.2); reaching it ends the session.
NONCE_MAX: Final = 2**64 - 1

# Section 7.5, the XX pattern: what each message carries, in order.
_PATTERN: Final = (("e",), ("e", "ee", "s", "es"), ("s", "se"))


class _Cipher(Protocol):
    """One AEAD under one key. `nonce` is the 64-bit counter; encodings differ between ciphers."""

    def seal(self, nonce: int, plain: Buffer, associated: bytes, out: memoryview) -> None: ...

    def open(self, nonce: int, sealed: memoryview, associated: bytes, out: memoryview) -> None: ...


class _AesGcm:
    __slots__ = ("_key",)

    def __init__(self, key: bytes) -> None:
        self._key = AESGCM(key)

    def seal(self, nonce: int, plain: Buffer, associated: bytes, out: memoryview) -> None:
        self._key.encrypt_into(nonce.to_bytes(12, "big"), plain, associated, out)

    def open(self, nonce: int, sealed: memoryview, associated: bytes, out: memoryview) -> None:
        self._key.decrypt_into(nonce.to_bytes(12, "big"), sealed, associated, out)


class _ChaChaPoly:
    __slots__ = ("_key",)

    def __init__(self, key: bytes) -> None:
        self._key = key

    def seal(self, nonce: int, plain: Buffer, associated: bytes, out: memoryview) -> None:
        full = b"\0\0\0\0" + nonce.to_bytes(8, "little")
        out[:] = sodium.crypto_aead_chacha20poly1305_ietf_encrypt(bytes(plain), associated, full, self._key)

    def open(self, nonce: int, sealed: memoryview, associated: bytes, out: memoryview) -> None:
        full = b"\0\0\0\0" + nonce.to_bytes(8, "little")
        out[:] = sodium.crypto_aead_chacha20poly1305_ietf_decrypt(bytes(sealed), associated, full, self._key)


_CIPHERS: Final[dict[str, type[_AesGcm] | type[_ChaChaPoly]]] = {
    AESGCM_SHA256: _AesGcm,
    CHACHAPOLY_SHA256: _ChaChaPoly,
}


def preferred_suite() -> int:
    """Give the number of the suite to dial with: 1 (AES-GCM) where the processor has AES instructions, else 2."""
    try:
        sodium.crypto_aead_aes256gcm_encrypt(b"", None, bytes(12), bytes(KEY_SIZE))
    except UnavailableError:
        return 2
    return 1


class CipherState:
    """A key and a counting nonce: one direction of a session (section 5.1).

    Sealing and opening never wait and never allocate the payload; both raise ProtocolViolation and then the state must
    not be used again. records: how many were sealed or opened under the present key.
    """

    __slots__ = ("_cipher", "_key", "_nonce", "_suite", "records")

    def __init__(self, suite: str, key: bytes) -> None:
        self._suite = suite
        self._key = key
        self._cipher: _Cipher = _CIPHERS[suite](key)
        self._nonce = 0
        self.records = 0

    def seal_into(self, plain: Buffer, out: memoryview, associated: bytes = b"") -> int:
        """Encrypt `plain` to the start of `out` and give the size written: that of the plaintext plus 16."""
        nonce = self._advance()
        size = len(plain) + TAG_SIZE
        self._cipher.seal(nonce, plain, associated, out[:size])
        return size

    def open_into(self, sealed: memoryview, out: memoryview, associated: bytes = b"") -> int:
        """Decrypt to the start of `out`, which may be `sealed` itself, and give the plaintext's size.

        Raises ProtocolViolation(BAD_SIGNATURE) if the bytes are not what the peer sealed; `out` is then garbage.
        """
        size = len(sealed) - TAG_SIZE
        if size < 0:
            raise ProtocolViolation(Reason.TRUNCATED, "a sealed record is shorter than its tag")
        nonce = self._advance()
        try:
            self._cipher.open(nonce, sealed, associated, out[:size])
        except (InvalidTag, CryptoError) as error:
            raise ProtocolViolation(Reason.BAD_SIGNATURE, "a record was not sealed by the peer") from error
        return size

    def open_in_place(self, sealed: memoryview, associated: bytes = b"") -> memoryview:
        """Decrypt over the ciphertext and give the view of the plaintext."""
        size = self.open_into(sealed, sealed, associated)
        return sealed[:size]

    def rekey(self) -> None:
        """Replace the key by a one-way function of itself (section 4.2); the nonce goes on counting."""
        out = bytearray(KEY_SIZE + TAG_SIZE)
        self._cipher.seal(NONCE_MAX, bytes(KEY_SIZE), b"", memoryview(out))
        self._key = bytes(out[:KEY_SIZE])
        self._cipher = _CIPHERS[self._suite](self._key)
        self.records = 0

    def _advance(self) -> int:
        nonce = self._nonce
        if nonce >= NONCE_MAX:
            raise ProtocolViolation(Reason.EXPIRED, "the session used up its nonces")
        self._nonce = nonce + 1
        self.records += 1
        return nonce


class _SymmetricState:
    """The running hash and key of a handshake (section 5.2)."""

    def __init__(self, suite: str) -> None:
        name = suite.encode()
        self.suite = suite
        self.hash = name.ljust(32, b"\0") if len(name) <= 32 else hashlib.sha256(name).digest()
        self.chaining_key = self.hash
        self.cipher: CipherState | None = None

    def mix_key(self, material: bytes) -> None:
        self.chaining_key, key = self._derive(material)
        self.cipher = CipherState(self.suite, key)

    def mix_hash(self, data: Buffer) -> None:
        self.hash = hashlib.sha256(self.hash + data).digest()

    def encrypt_and_hash(self, plain: bytes) -> bytes:
        if self.cipher is None:
            sealed = plain
        else:
            out = bytearray(len(plain) + TAG_SIZE)
            self.cipher.seal_into(plain, memoryview(out), self.hash)
            sealed = bytes(out)
        self.mix_hash(sealed)
        return sealed

    def decrypt_and_hash(self, sealed: bytes) -> bytes:
        plain = sealed
        if self.cipher is not None:
            plain = bytes(self.cipher.open_in_place(memoryview(bytearray(sealed)), self.hash))
        self.mix_hash(sealed)
        return plain

    def split(self) -> tuple[CipherState, CipherState]:
        first, second = self._derive(b"")
        return CipherState(self.suite, first), CipherState(self.suite, second)

    def _derive(self, material: bytes) -> tuple[bytes, bytes]:
        """HKDF with two outputs (section 4.3)."""
        temporary = hmac.digest(self.chaining_key, material, "sha256")
        first = hmac.digest(temporary, b"\x01", "sha256")
        return first, hmac.digest(temporary, first + b"\x02", "sha256")


class HandshakeState:
    """One side of Noise XX: three messages, written and read in turn, then `split`.

    suite: one of `SUITES`' names. static_private, ephemeral_private: 32 bytes each; the ephemeral one must be fresh.
    After the last message `remote_static` is the peer's proven X25519 public key and `handshake_hash` names the session.
    """

    def __init__(self, suite: str, initiator: bool, prologue: bytes, static_private: bytes, ephemeral_private: bytes) -> None:
        self._state = _SymmetricState(suite)
        self._state.mix_hash(prologue)
        self._initiator = initiator
        self._turn = 0
        self._static = static_private
        self._ephemeral = ephemeral_private
        self._remote_ephemeral = b""
        self.remote_static = b""

    @property
    def finished(self) -> bool:
        """True once all three messages have passed."""
        return self._turn == len(_PATTERN)

    @property
    def handshake_hash(self) -> bytes:
        """The hash over the whole transcript, 32 bytes: equal on both sides and unique to the session."""
        return self._state.hash

    def write_message(self, payload: bytes) -> bytes:
        """Give the next handshake message. Raises ValueError out of turn, ProtocolViolation for a worthless peer key."""
        if self.finished or (self._turn % 2 == 0) != self._initiator:
            raise ValueError("it is not this side's turn in the handshake")
        parts = []
        for token in _PATTERN[self._turn]:
            if token == "e":
                public: bytes = sodium.crypto_scalarmult_base(self._ephemeral)
                self._state.mix_hash(public)
                parts.append(public)
            elif token == "s":
                parts.append(self._state.encrypt_and_hash(sodium.crypto_scalarmult_base(self._static)))
            else:
                self._mix_shared(token)
        parts.append(self._state.encrypt_and_hash(payload))
        self._turn += 1
        return b"".join(parts)

    def read_message(self, message: Buffer) -> bytes:
        """Take the peer's next handshake message and give its payload.

        Raises ProtocolViolation(BAD_HANDSHAKE) for anything that is not that message; the handshake is then over.
        """
        if self.finished or (self._turn % 2 == 0) == self._initiator:
            raise ProtocolViolation(Reason.BAD_HANDSHAKE, "a handshake message out of turn")
        rest = bytes(message)
        try:
            for token in _PATTERN[self._turn]:
                if token == "e":
                    self._remote_ephemeral, rest = _take(rest, KEY_SIZE)
                    self._state.mix_hash(self._remote_ephemeral)
                elif token == "s":
                    sealed, rest = _take(rest, KEY_SIZE + TAG_SIZE)
                    self.remote_static = self._state.decrypt_and_hash(sealed)
                else:
                    self._mix_shared(token)
            payload = self._state.decrypt_and_hash(rest)
        except ProtocolViolation as error:
            raise ProtocolViolation(Reason.BAD_HANDSHAKE, error.detail or "the handshake does not fit") from error
        self._turn += 1
        return payload

    def split(self) -> tuple[CipherState, CipherState]:
        """Give the ciphers for sending and for receiving. Raises ValueError before the last message."""
        if not self.finished:
            raise ValueError("the handshake is not finished")
        first, second = self._state.split()
        return (first, second) if self._initiator else (second, first)

    def _mix_shared(self, token: str) -> None:
        """Mix in one Diffie-Hellman result. `es` is initiator's ephemeral with responder's static; `se` the reverse."""
        own_static = token != "ee" and (token == "se") == self._initiator
        remote_static = token != "ee" and not own_static
        private = self._static if own_static else self._ephemeral
        public = self.remote_static if remote_static else self._remote_ephemeral
        try:
            shared: bytes = sodium.crypto_scalarmult(private, public)
        except (CryptoError, RuntimeError) as error:
            # libsodium refuses points of low order, whose shared secret everybody knows.
            raise ProtocolViolation(Reason.BAD_HANDSHAKE, "the peer's key has low order") from error
        self._state.mix_key(shared)


def _take(data: bytes, size: int) -> tuple[bytes, bytes]:
    if len(data) < size:
        raise ProtocolViolation(Reason.BAD_HANDSHAKE, "a handshake message is too short")
    return data[:size], data[size:]
