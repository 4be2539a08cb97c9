"""The protocol's version and which versions understand each other.

A node speaks its own version and the one before (N and N-1): nodes are updated one at a time. Within a version, messages
only gain fields with defaults, which older readers ignore.
"""

from dataclasses import dataclass
from typing import Final

from p2pnode.errors import ProtocolViolation
from p2pnode.reasons import Reason

PROTOCOL_VERSION: Final = 1
OLDEST_VERSION: Final = max(1, PROTOCOL_VERSION - 1)


@dataclass(frozen=True, slots=True)
class VersionRange:
    """The versions a node speaks, both ends included; each fits one byte. Sent in the preamble of a session."""

    oldest: int
    newest: int


SPOKEN: Final = VersionRange(OLDEST_VERSION, PROTOCOL_VERSION)


def agree(own: VersionRange, peer: VersionRange) -> int:
    """Give the newest version that both speak. Raises ProtocolViolation(WRONG_VERSION) if there is none."""
    chosen = min(own.newest, peer.newest)
    if peer.oldest > peer.newest or chosen < max(own.oldest, peer.oldest):
        raise ProtocolViolation(
            Reason.WRONG_VERSION,
            f"this node speaks versions {own.oldest} to {own.newest}, the peer {peer.oldest} to {peer.newest}",
        )
    return chosen
