"""Links that make first contact beyond the local network: who, where, in which network, with a checksum. Pure.

    p2pnode://mf2gs3dj…

The text behind `p2pnode://` is lower-case base32 of a small map and a checksum: nothing in it means something to a shell or a
chat program, and a letter lost on the way is noticed. A link is no secret and proves nothing: whoever answers at the
addresses must prove the node id in the handshake. Its expiry only keeps people from old addresses.
"""

import base64
import binascii
import hashlib
from typing import Annotated, Final

import msgspec

from p2pnode.discovery.addresses import is_address
from p2pnode.errors import ConfigError, InputError, ProtocolViolation
from p2pnode.ids import NodeId
from p2pnode.wire.codec import decode, encode
from p2pnode.wire.messages.fields import Address, Hash32, Label, TimeMs

SCHEME: Final = "p2pnode://"
VERSION: Final = 1
ADDRESSES_MAX: Final = 4
LINK_LENGTH_MAX: Final = 4096
_CHECKSUM_SIZE: Final = 4


class Invitation(msgspec.Struct, frozen=True):
    """What a link says. network: its name, as in `network.id`. expires_ms: Unix milliseconds, 0 for never."""

    version: int
    node_id: Hash32
    addresses: Annotated[tuple[Address, ...], msgspec.Meta(min_length=1, max_length=ADDRESSES_MAX)]
    network: Label
    expires_ms: TimeMs = 0

    def entries(self) -> tuple[str, ...]:
        """Give it as entries of `network.bootstrap`."""
        from p2pnode.ids import node_text

        return tuple(f"{node_text(self.node_id)}@{address}" for address in self.addresses)


def make_link(node_id: NodeId, addresses: tuple[str, ...], network: str, expires_ms: int = 0) -> str:
    """Give the link that invites to a node. addresses: best first, of which four fit. Raises InputError without any."""
    usable = tuple(dict.fromkeys(address for address in addresses if is_address(address)))[:ADDRESSES_MAX]
    if not usable:
        raise InputError("this node has no address to invite to; name one with --address HOST:PORT or in network.announce")
    body = encode(Invitation(VERSION, node_id, usable, network, expires_ms))
    return SCHEME + base64.b32encode(body + _checksum(body)).decode().lower().rstrip("=")


def parse_link(text: str) -> Invitation:
    """Give what a link says. Spaces and line breaks from copying are passed over. Raises InputError with what is wrong."""
    link = "".join(text.split()).strip("<>\"'")
    if not link.lower().startswith(SCHEME):
        raise InputError(f"an invitation starts with {SCHEME}; copy the whole line that `p2pnode net invite` printed")
    if len(link) > LINK_LENGTH_MAX:
        raise InputError(f"an invitation has at most {LINK_LENGTH_MAX} characters, not {len(link)}; copy only the link")
    letters = link[len(SCHEME) :].strip("/").upper()
    try:
        raw = base64.b32decode(letters + "=" * (-len(letters) % 8))
    except (binascii.Error, ValueError):
        raise InputError("the invitation has a character or a length that no link has; copy the whole link again") from None
    body, checksum = raw[:-_CHECKSUM_SIZE], raw[-_CHECKSUM_SIZE:]
    if checksum != _checksum(body):
        raise InputError("the invitation was changed or cut off on its way: its checksum does not match; copy it again")
    try:
        invitation = decode(Invitation, body, LINK_LENGTH_MAX)
    except ProtocolViolation as error:
        raise InputError(f"the invitation cannot be read: {error}; it may come from a newer p2pnode") from error
    if invitation.version != VERSION:
        raise InputError(f"the invitation has version {invitation.version} and this p2pnode knows {VERSION}; update p2pnode")
    if not all(is_address(address) for address in invitation.addresses):
        raise InputError("the invitation names an address that is none; ask for a new one")
    return invitation


def check_invitation(invitation: Invitation, own_id: NodeId, network: str, now_ms: int) -> None:
    """Check that a link is for this node's network, still valid, and for another node. Raises ConfigError, InputError."""
    if invitation.network != network:
        raise ConfigError(
            f"the invitation is for the network {invitation.network!r} and this node is in {network!r}; "
            f"to change over: p2pnode config set network.id {invitation.network}"
        )
    if invitation.node_id == own_id:
        raise InputError("the invitation is this node's own; use it on another machine")
    if invitation.expires_ms and invitation.expires_ms < now_ms:
        minutes = (now_ms - invitation.expires_ms) // 60_000
        raise InputError(f"the invitation expired {minutes} minutes ago; ask for a new one (or check this machine's clock)")


def _checksum(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_CHECKSUM_SIZE, person=b"p2pnode invite").digest()
