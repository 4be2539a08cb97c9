"""Who is where: what peers tell each other about addresses, places in the hash table, records and reachability."""

from typing import Annotated

from msgspec import Meta, Struct

from p2pnode.wire.messages.fields import Address, Addresses, Count, Hash32, Label, Nonce, TimeMs
from p2pnode.wire.registry import message

# Three times k: what a lookup asks for when it must see past addresses that crowd around one key.
CONTACTS_MAX = 48
PROVIDERS_MAX = 20
RECORD_VALUE_BYTES_MAX = 1000
RECORD_BYTES_MAX = 1400
ContactCount = Annotated[int, Meta(ge=1, le=CONTACTS_MAX)]
RecordBytes = Annotated[bytes, Meta(max_length=RECORD_BYTES_MAX)]


class Contact(Struct, frozen=True):
    """A node and where it may be reached; a hint until its handshake has proven who answers there."""

    node_id: Hash32
    addresses: Annotated[tuple[Address, ...], Meta(max_length=4)]


Contacts = Annotated[tuple[Contact, ...], Meta(max_length=CONTACTS_MAX)]


@message(20)
class WhoAreYou(Struct, frozen=True):
    """Ask a peer about itself. Answered by Introduction."""


@message(21)
class Introduction(Struct, frozen=True):
    """A peer's own word about itself and the address it sees us at.

    role: `server` or `client`. time_ms: Unix milliseconds on its clock, 0 from peers that do not say.
    """

    node_id: Hash32
    addresses: Addresses
    seen_address: Label
    role: Label
    time_ms: TimeMs = 0


@message(22)
class FindNode(Struct, frozen=True):
    """Ask for the contacts nearest to a target. is_server: the asker's own role. Answered by Closest."""

    target: Hash32
    is_server: bool
    count: ContactCount = 16


@message(23)
class Closest(Struct, frozen=True):
    """The nearest contacts that have answered the sender itself, nearest first. is_server: the sender's own role."""

    contacts: Contacts
    is_server: bool


@message(24)
class FindRecord(Struct, frozen=True):
    """Ask for the record under a key, and for the contacts nearest to it. Answered by FoundRecord."""

    key: Hash32
    is_server: bool
    count: ContactCount = 16


@message(25)
class FoundRecord(Struct, frozen=True):
    """record: the encoded envelope of a Record; empty when the sender has none under that key."""

    record: RecordBytes
    contacts: Contacts
    is_server: bool


@message(26)
class StoreRecord(Struct, frozen=True):
    """Ask a server to hold a record: the encoded envelope of a Record. Answered by Done.

    replaces: unless 0, a record that is held already must have this sequence.
    """

    record: RecordBytes
    is_server: bool
    replaces: Count = 0


@message(27)
class FindProviders(Struct, frozen=True):
    """Ask who provides what a key names, and for the contacts nearest to it. Answered by FoundProviders."""

    key: Hash32
    is_server: bool
    count: ContactCount = 16


@message(28)
class FoundProviders(Struct, frozen=True):
    """A random sample of those who said, on their own connection, that they provide it."""

    providers: Annotated[tuple[Contact, ...], Meta(max_length=PROVIDERS_MAX)]
    contacts: Contacts
    is_server: bool


@message(29)
class StoreProvider(Struct, frozen=True):
    """The sender itself provides what a key names, at these addresses. Answered by Done."""

    key: Hash32
    addresses: Annotated[tuple[Address, ...], Meta(max_length=4)]
    is_server: bool


@message(30)
class Record(Struct, frozen=True):
    """A signed, expiring value under BLAKE2b-256(signer's node id ‖ salt), after BEP 44. The higher sequence wins.

    sequence: Unix milliseconds of the signing, or one more than the last where that is higher.
    """

    salt: Annotated[bytes, Meta(max_length=64)]
    sequence: Count
    expires_ms: TimeMs
    value: Annotated[bytes, Meta(max_length=RECORD_VALUE_BYTES_MAX)]


@message(36)
class DialBack(Struct, frozen=True):
    """Ask a peer to connect to one of these addresses, on the host it sees us at, and to prove it there with the nonce.

    After AutoNAT v2. Answered by DialBackResult.
    """

    addresses: Annotated[tuple[Address, ...], Meta(max_length=4)]
    nonce: Nonce


@message(37)
class DialBackResult(Struct, frozen=True):
    """address: the one that was tried. outcome: `reached`, `unreachable` or `refused`."""

    address: Label
    outcome: Label


@message(38)
class DialBackProof(Struct, frozen=True):
    """On the new connection: the nonce of the DialBack that asked for it. Answered by Done."""

    nonce: Nonce
