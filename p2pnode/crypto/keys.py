"""A node's identity: its Ed25519 key, its separate X25519 static key, the key puzzle and the key file.

The node id is BLAKE2b-256 of the Ed25519 public key. The X25519 key is used by the Noise handshake only and is bound to
the identity by a signature; two keys, because one key in two protocols has no security proof. The file at rest is a small
JSON text; with a passphrase its two secrets are sealed by XSalsa20-Poly1305 under a key from Argon2id (RFC 9106).
"""

import base64
import binascii
import hashlib
from collections.abc import Callable
from typing import Final

import msgspec
import nacl.bindings as sodium
from nacl.exceptions import CryptoError

from p2pnode.crypto.hashing import HASH_SIZE, signing_input, tagged_hash
from p2pnode.environment import Buffer, Entropy
from p2pnode.errors import ConfigError
from p2pnode.ids import NodeId, node_text

SEED_SIZE: Final = 32
KEY_FILE_VERSION: Final = 1
KEY_FILE_SIZE_MAX: Final = 4096
PUZZLE_BITS_MAX: Final = 32

# RFC 9106 section 4, second recommended option (64 MiB, three passes): 0.1-0.3 s on a laptop, possible on a small board.
_ARGON2_PASSES: Final = 3
_ARGON2_BYTES: Final = 64 * 2**20
_ARGON2_PASSES_MAX: Final = 16
_ARGON2_BYTES_MAX: Final = 2**30


class Identity:
    """An Ed25519 key pair, the node id it gives, and the X25519 static key that goes with it.

    seed: 32 secret bytes of Ed25519. static_private: 32 secret bytes of X25519; without it one is derived from the seed,
    which tests and simulations use. Real identities come from `generate_identity` or a key file and have both at random.
    """

    __slots__ = ("_secret", "_static", "node_id", "public_key", "seed", "static_public_key")

    def __init__(self, seed: bytes, static_private: bytes | None = None) -> None:
        if len(seed) != SEED_SIZE:
            raise ValueError(f"an identity's seed has {SEED_SIZE} bytes, not {len(seed)}")
        if static_private is None:
            static_private = tagged_hash("identity-static", seed)
        if len(static_private) != SEED_SIZE:
            raise ValueError(f"a static key has {SEED_SIZE} bytes, not {len(static_private)}")
        self.seed = bytes(seed)
        self.public_key, self._secret = sodium.crypto_sign_seed_keypair(self.seed)
        self.node_id = node_id_of(self.public_key)
        self._static = bytes(static_private)
        self.static_public_key: bytes = sodium.crypto_scalarmult_base(self._static)

    def sign(self, domain: str, network_id: bytes, body: Buffer) -> bytes:
        """Sign a body for one purpose and network. Gives 64 bytes. Raises KeyError for an unlisted domain."""
        signed: bytes = sodium.crypto_sign(signing_input(domain, network_id, body), self._secret)
        return signed[:64]

    def static_key(self) -> bytes:
        """Give the private X25519 key for the Noise handshake, 32 bytes."""
        return self._static

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and other.seed == self.seed and other._static == self._static

    def __hash__(self) -> int:
        return hash(self.node_id)

    def __repr__(self) -> str:
        """Show the public part only: a log line must not leak the key."""
        return f"Identity({node_text(self.node_id)})"


def node_id_of(public_key: bytes) -> NodeId:
    """Give the node id of an Ed25519 public key."""
    return NodeId(hashlib.blake2b(public_key, digest_size=HASH_SIZE).digest())


def check_puzzle(node_id: bytes, bits: int) -> bool:
    """Say whether a node id solves the key puzzle: BLAKE2b-256(tag, id) starts with this many zero bits.

    It makes an identity cost 2^bits key generations, so that ids near a chosen point of the id space are not free.
    """
    if bits <= 0:
        return True
    return int.from_bytes(tagged_hash("identity-puzzle", node_id), "big") >> (256 - bits) == 0


def generate_identity(entropy: Entropy, difficulty_bits: int = 0, is_stopped: Callable[[], bool] = lambda: False) -> Identity:
    """Make a new identity whose id solves the key puzzle.

    It takes 2^difficulty_bits attempts of about 20 µs on average (16 bits: 1-2 s); callers with an event loop run it on
    `environment.executor`. is_stopped is asked before each attempt. Raises ConfigError for a difficulty beyond 32 bits
    or when stopped.
    """
    if not 0 <= difficulty_bits <= PUZZLE_BITS_MAX:
        raise ConfigError(f"a key puzzle of {difficulty_bits} bits is outside 0 to {PUZZLE_BITS_MAX}")
    while not is_stopped():
        seed = entropy.token(SEED_SIZE)
        public_key, _ = sodium.crypto_sign_seed_keypair(seed)
        if check_puzzle(node_id_of(public_key), difficulty_bits):
            return Identity(seed, entropy.token(SEED_SIZE))
    raise ConfigError("making the identity was stopped before its key puzzle was solved")


class _KeyFile(msgspec.Struct, frozen=True, omit_defaults=True):
    """The key file's fields. `secrets` holds seed and static key, 64 bytes, sealed when `salt` is not empty."""

    p2pnode_identity: int
    node_id: str
    secrets: str
    salt: str = ""
    nonce: str = ""
    argon2_passes: int = 0
    argon2_bytes: int = 0


def encode_key_file(identity: Identity, passphrase: str | None, entropy: Entropy) -> bytes:
    """Give the text of an identity's key file; the caller writes it with mode 0600.

    With a passphrase this computes Argon2id (0.1-0.3 s). Raises ConfigError for an empty passphrase.
    """
    secrets = identity.seed + identity.static_key()
    fields = {"p2pnode_identity": KEY_FILE_VERSION, "node_id": node_text(identity.node_id)}
    if passphrase is None:
        file = _KeyFile(**fields, secrets=_base64(secrets))  # type: ignore[arg-type]
    else:
        salt = entropy.token(sodium.crypto_pwhash_SALTBYTES)
        nonce = entropy.token(sodium.crypto_secretbox_NONCEBYTES)
        key = _passphrase_key(passphrase, salt, _ARGON2_PASSES, _ARGON2_BYTES)
        file = _KeyFile(
            **fields,  # type: ignore[arg-type]
            secrets=_base64(sodium.crypto_secretbox(secrets, nonce, key)),
            salt=_base64(salt),
            nonce=_base64(nonce),
            argon2_passes=_ARGON2_PASSES,
            argon2_bytes=_ARGON2_BYTES,
        )
    return msgspec.json.format(msgspec.json.encode(file), indent=2) + b"\n"


def is_key_file_sealed(data: bytes) -> bool:
    """Say whether a key file needs a passphrase. Raises ConfigError if it is no key file."""
    return bool(_parse(data).salt)


def decode_key_file(data: bytes, passphrase: str | None) -> Identity:
    """Give the identity in a key file. Raises ConfigError, in words, for anything wrong with file or passphrase."""
    file = _parse(data)
    secrets = _bytes(file.secrets)
    if file.salt:
        if passphrase is None:
            raise ConfigError("the identity's key file is protected: give its passphrase")
        secrets = _unseal(file, secrets, passphrase)
    elif passphrase is not None:
        raise ConfigError("the identity's key file has no passphrase, but one was given: leave it out")
    if len(secrets) != 2 * SEED_SIZE:
        raise ConfigError("the identity's key file is damaged: its secrets have the wrong size; restore a backup")
    identity = Identity(secrets[:SEED_SIZE], secrets[SEED_SIZE:])
    if node_text(identity.node_id) != file.node_id:
        raise ConfigError("the identity's key file is damaged: its key does not give its node id; restore a backup")
    return identity


def _parse(data: bytes) -> _KeyFile:
    if len(data) > KEY_FILE_SIZE_MAX:
        raise ConfigError("this file is too large to be an identity's key file")
    try:
        file = msgspec.json.decode(data, type=_KeyFile)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError("this file is not an identity's key file of p2pnode, or it is damaged") from error
    if file.p2pnode_identity != KEY_FILE_VERSION:
        raise ConfigError(f"this key file has version {file.p2pnode_identity}; this p2pnode reads version {KEY_FILE_VERSION}")
    return file


def _unseal(file: _KeyFile, sealed: bytes, passphrase: str) -> bytes:
    salt, nonce = _bytes(file.salt), _bytes(file.nonce)
    if (
        len(salt) != sodium.crypto_pwhash_SALTBYTES
        or len(nonce) != sodium.crypto_secretbox_NONCEBYTES
        or not 1 <= file.argon2_passes <= _ARGON2_PASSES_MAX
        or not 8192 <= file.argon2_bytes <= _ARGON2_BYTES_MAX
    ):
        raise ConfigError("the identity's key file is damaged: its passphrase settings are out of range; restore a backup")
    key = _passphrase_key(passphrase, salt, file.argon2_passes, file.argon2_bytes)
    try:
        secrets: bytes = sodium.crypto_secretbox_open(sealed, nonce, key)
    except (CryptoError, ValueError) as error:
        raise ConfigError("wrong passphrase for the identity's key file") from error
    return secrets


def _passphrase_key(passphrase: str, salt: bytes, passes: int, memory_bytes: int) -> bytes:
    if not passphrase:
        raise ConfigError("the passphrase is empty: give at least one character, or none at all")
    key: bytes = sodium.crypto_pwhash_alg(
        sodium.crypto_secretbox_KEYBYTES,
        passphrase.encode(),
        salt,
        passes,
        memory_bytes,
        sodium.crypto_pwhash_ALG_ARGON2ID13,
    )
    return key


def _base64(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ConfigError("the identity's key file is damaged: a field is not base64; restore a backup") from error
