"""The record in which a node publishes where it can be reached, so that its id alone is enough to find it. Pure.

A server is also found as a contact near its own id. A node behind NAT answers no lookups and is in nobody's table:
this record is the only way from its id to its addresses.
"""

from typing import Final

import msgspec

from p2pnode.discovery.addresses import is_address, is_global
from p2pnode.discovery.records.record import CheckedRecord, record_key
from p2pnode.errors import ProtocolViolation
from p2pnode.reasons import Reason
from p2pnode.wire.codec import decode, encode
from p2pnode.wire.messages.discovery import RECORD_VALUE_BYTES_MAX, Contact
from p2pnode.wire.messages.fields import Addresses, Label

ADDRESS_SALT: Final = b"addresses"
CONTACT_ADDRESSES_MAX: Final = 4
SERVER: Final = "server"
CLIENT: Final = "client"


class AddressValue(msgspec.Struct, frozen=True):
    """The value of an address record: a msgpack map. addresses: best first. role: `server` or `client`."""

    addresses: Addresses
    role: Label


def address_key(node_id: bytes) -> bytes:
    """Give the key under which a node's addresses lie."""
    return record_key(node_id, ADDRESS_SALT)


def encode_addresses(addresses: tuple[str, ...], is_server: bool, is_public: bool) -> bytes:
    """Give the value that publishes these addresses, best first: at most four, fewer where four are too long.

    is_public: leave out what only the local network can reach; it would mislead everybody else and tell them about it.
    """
    usable = [address for address in dict.fromkeys(addresses) if is_address(address) and (is_global(address) or not is_public)]
    del usable[CONTACT_ADDRESSES_MAX:]
    while len(value := encode(AddressValue(tuple(usable), SERVER if is_server else CLIENT))) > RECORD_VALUE_BYTES_MAX:
        usable.pop()
    return value


def decode_addresses(record: CheckedRecord, node_id: bytes) -> Contact:
    """Give where a node says it is; addresses that are not well formed are left out.

    Raises ProtocolViolation with WRONG_SIGNER for another node's record or another salt, or a reason of `codec.decode`.
    """
    if record.publisher != node_id or record.salt != ADDRESS_SALT:
        raise ProtocolViolation(Reason.WRONG_SIGNER, "not the address record of this node")
    value = decode(AddressValue, record.value, RECORD_VALUE_BYTES_MAX)
    usable = [address for address in dict.fromkeys(value.addresses) if is_address(address)]
    return Contact(node_id, tuple(usable[:CONTACT_ADDRESSES_MAX]))
