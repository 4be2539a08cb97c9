"""What the two ends of a session say about the session itself."""

from msgspec import Struct

from p2pnode.wire.messages.fields import Addresses, Count, Label, Labels, LongText, PublicKey, ShortText, Signature
from p2pnode.wire.registry import message


@message(1)
class HandshakePayload(Struct, frozen=True):
    """Inside Noise XX messages 2 and 3: who the owner of the X25519 static key is.

    signature: Ed25519 over the static key with the domain tag `session-static`.
    """

    identity: PublicKey
    signature: Signature
    version: Count
    features: Labels
    agent: Label
    addresses: Addresses
    instance: Label


@message(2)
class Refusal(Struct, frozen=True):
    """The answer to a request that was refused. reason: the text of a `reasons.Reason`."""

    reason: Label
    detail: LongText


@message(3)
class Goodbye(Struct, frozen=True):
    """The sender closes the session. reason: the text of a `reasons.Reason`."""

    reason: Label


@message(4)
class Envelope(Struct, frozen=True):
    """A signed document: the exact bytes of its body, kept as received.

    kind: the message number of the body's class. The signature covers domain tag, network id and BLAKE2b-256 of the body.
    """

    kind: Count
    body: bytes
    signer: PublicKey
    signature: Signature


@message(5)
class Done(Struct, frozen=True):
    """The answer to a request that needs no other."""

    note: ShortText = ""
