"""Signed documents: an Envelope holds the exact bytes of a body, who signed it, and the signature.

The body is never encoded again: hashing, checking and storing use the bytes as received, so a document from a newer peer
keeps the fields that this version does not know. The domain tag follows from the document's class, the network id
is the reader's own, so a document of another kind or network does not verify.
"""

from typing import Final, TypeVar

import msgspec

from p2pnode.crypto.hashing import DOMAINS, document_hash
from p2pnode.crypto.keys import Identity
from p2pnode.crypto.signing import verify
from p2pnode.environment import Buffer
from p2pnode.errors import ProtocolViolation
from p2pnode.ids import DocumentId
from p2pnode.reasons import Reason
from p2pnode.wire.codec import decode, encode
from p2pnode.wire.messages.session import Envelope
from p2pnode.wire.registry import Message, number_of

BODY_BYTES_MAX: Final = 65_536
# What an encoded envelope adds to its body: four field names, two keys, sizes.
ENVELOPE_BYTES_MAX: Final = BODY_BYTES_MAX + 256

DocumentT = TypeVar("DocumentT", bound=msgspec.Struct)

_domains: Final[dict[type[Message], tuple[int, str]]] = {}


def seal(document: Message, identity: Identity, network_id: bytes) -> Envelope:
    """Sign a document as this identity. Raises KeyError for a class that has no number or no domain in `hashing.DOMAINS`."""
    kind, domain = _kind_and_domain(type(document))
    body = encode(document)
    return Envelope(kind, body, identity.public_key, identity.sign(domain, network_id, body))


def open_envelope(envelope: Envelope, expected_cls: type[DocumentT], network_id: bytes, signer: bytes | None = None) -> DocumentT:
    """Give the document in an envelope after checking its kind, its signer and its signature.

    signer: the public key it must be signed with, if the caller knows it.
    Raises ProtocolViolation with WRONG_TYPE, WRONG_SIGNER, BAD_SIGNATURE, TOO_LARGE or a reason of `codec.decode`.
    """
    kind, domain = _kind_and_domain(expected_cls)
    if envelope.kind != kind:
        raise ProtocolViolation(Reason.WRONG_TYPE, f"a document of kind {envelope.kind} where {kind} was expected")
    if signer is not None and envelope.signer != signer:
        raise ProtocolViolation(Reason.WRONG_SIGNER, expected_cls.__name__)
    if len(envelope.body) > BODY_BYTES_MAX:
        raise ProtocolViolation(Reason.TOO_LARGE, f"a document of {len(envelope.body)} bytes")
    verify(domain, network_id, envelope.body, envelope.signer, envelope.signature)
    return decode(expected_cls, envelope.body, BODY_BYTES_MAX)


def encode_envelope(envelope: Envelope) -> bytes:
    """Give an envelope's bytes, as they travel and are stored."""
    return encode(envelope)


def decode_envelope(data: Buffer) -> Envelope:
    """Give the envelope in `data`; its signature is not checked yet. Raises ProtocolViolation."""
    return decode(Envelope, data, ENVELOPE_BYTES_MAX)


def document_id(document: Envelope | Buffer) -> DocumentId:
    """Give the id of a document, from its envelope or its body: BLAKE2b-256 of the body."""
    return DocumentId(document_hash(document.body if isinstance(document, Envelope) else document))


def _kind_and_domain(cls: type[Message]) -> tuple[int, str]:
    known = _domains.get(cls)
    if known is None:
        domain = cls.__name__.lower()
        if domain not in DOMAINS:
            raise KeyError(f"{cls.__name__} is no document: it has no domain in crypto/hashing.py")
        known = _domains[cls] = (number_of(cls), domain)
    return known
