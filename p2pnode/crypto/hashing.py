"""Every hash of p2pnode, and every domain tag, on one page.

blake3-256 hashes bulk data (tensors, blobs, Merkle trees): 4-10 GB/s on one core. BLAKE2b-256, from the standard library,
hashes ids and documents. A signature never covers a bare body: it covers a tag that says what the body is, then the
network, so that bytes signed for one purpose or network mean nothing in another.
"""

import hashlib
from typing import Final

from blake3 import blake3

from p2pnode.environment import Buffer

HASH_SIZE: Final = 32
TAG_SIZE: Final = 32

# What each tag is for. A name is never given a second meaning; a changed meaning gets a new name.
_PURPOSES: Final = (
    "session-static",  # an identity owns an X25519 static key (Noise handshake payload)
    "identity-static",  # deriving a static key for an identity that was made from a seed alone
    "identity-puzzle",  # the key puzzle over a node id
    "offer",
    "listing",  # an offer in short, as gossip spreads it
    "quote",
    "order",
    "agreement",
    "receipt",
    "cheque",
    "chain",  # one step of a client's hash chain
    "record",  # a value in the hash table
    "withdrawal",  # an offer taken back
    "suspicion",  # a monitor's word that a provider does not answer
    "audit-log",  # one entry of the log of documents a node has signed
)


def _tag(purpose: str) -> bytes:
    """Give a purpose's tag: 32 bytes, zero-padded, so that no tag is a prefix of another."""
    tag = b"p2pnode/1 " + purpose.encode()
    if len(tag) > TAG_SIZE:
        raise ValueError(f"the domain name {purpose!r} is longer than {TAG_SIZE - 10} bytes")
    return tag.ljust(TAG_SIZE, b"\0")


DOMAINS: Final[dict[str, bytes]] = {purpose: _tag(purpose) for purpose in _PURPOSES}


def blake3_256(*parts: Buffer) -> bytes:
    """Give the 32-byte blake3 hash of the parts, one after another. Parts may be views; nothing is copied."""
    hasher = blake3()
    for part in parts:
        hasher.update(part)
    return hasher.digest()


def document_hash(body: Buffer) -> bytes:
    """Give the 32-byte BLAKE2b hash of a document's body: its id."""
    return hashlib.blake2b(body, digest_size=HASH_SIZE).digest()


def tagged_hash(domain: str, *parts: Buffer) -> bytes:
    """Give the 32-byte BLAKE2b hash of a domain's tag and the parts. Raises KeyError for a domain not on this page."""
    hasher = hashlib.blake2b(DOMAINS[domain], digest_size=HASH_SIZE)
    for part in parts:
        hasher.update(part)
    return hasher.digest()


def signing_input(domain: str, network_id: bytes, body: Buffer) -> bytes:
    """Give the bytes that a signature covers: tag (32 bytes), network id, BLAKE2b-256 of the body (32 bytes).

    Both ends have a fixed size, so no two (domain, network, body) give the same bytes. Raises KeyError for a domain that
    is not on this page.
    """
    return DOMAINS[domain] + network_id + hashlib.blake2b(body, digest_size=HASH_SIZE).digest()
