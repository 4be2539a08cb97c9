"""Checking signatures. Making them is `keys.Identity.sign`.

libsodium's Ed25519 refuses public keys of small order, non-canonical keys and S values beyond the group order, so a
signature cannot be altered into a second valid one.
"""

from functools import lru_cache
from typing import Final

import nacl.bindings as sodium
from nacl.exceptions import CryptoError

from p2pnode.crypto.hashing import signing_input
from p2pnode.environment import Buffer
from p2pnode.errors import ProtocolViolation
from p2pnode.reasons import Reason

SIGNATURE_SIZE: Final = 64
PUBLIC_KEY_SIZE: Final = 32
# Gossip brings the same document from several neighbours, and a simulated network has all its readers in one process. Only
# good signatures are remembered, so that forgeries cannot push them out; 8192 of them take 3 MB.
REMEMBERED_MAX: Final = 8192


def verify(domain: str, network_id: bytes, body: Buffer, public_key: bytes, signature: bytes) -> None:
    """Return if the signature is the key's, over this body for this purpose and network.

    Raises ProtocolViolation(BAD_SIGNATURE) otherwise; KeyError for a domain that is not listed in `hashing`.
    """
    verify_exact(signing_input(domain, network_id, body), public_key, signature)


def verify_exact(message: bytes, public_key: bytes, signature: bytes) -> None:
    """Return if the signature is the key's over exactly these bytes; `verify` is what protocols use.

    Raises ProtocolViolation(BAD_SIGNATURE).
    """
    if len(public_key) != PUBLIC_KEY_SIZE or len(signature) != SIGNATURE_SIZE:
        raise ProtocolViolation(Reason.BAD_SIGNATURE, "wrong size of key or signature")
    try:
        _open(bytes(signature), bytes(message), bytes(public_key))
    except CryptoError as error:
        raise ProtocolViolation(Reason.BAD_SIGNATURE) from error


@lru_cache(maxsize=REMEMBERED_MAX)
def _open(signature: bytes, message: bytes, public_key: bytes) -> None:
    """Return if the signature is good. An exception is not remembered."""
    sodium.crypto_sign_open(signature + message, public_key)
