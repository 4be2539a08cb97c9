"""What the peer book holds of a peer, what it is told, and what it asks for."""

from dataclasses import dataclass
from typing import Final

from msgspec import Struct

from p2pnode.ids import NodeId
from p2pnode.reasons import Reason

SOURCE_STATIC: Final = "static"
SOURCE_BOOTSTRAP: Final = "bootstrap"
SOURCE_MDNS: Final = "mdns"
SOURCE_INBOUND: Final = "inbound"
SOURCE_BOOK: Final = "book"
# Only on disk: a peer that was an anchor when it was last written.
SOURCE_ANCHOR: Final = "anchor"


class Entry(Struct, frozen=True, gc=False):
    """What is known of one peer. Times are seconds on the machine's clock; 0 means never.

    A struct, because every link that comes or goes makes a changed one: that takes a tenth of a dataclass's time.

    bans: how many so far, which sets the length of the next. banned_for: the cause's text, empty when not banned.
    is_lost: a link broke or a dial failed since the peer was last reached; such peers are probed.
    """

    node_id: NodeId
    addresses: tuple[str, ...]
    sources: tuple[str, ...]
    first_seen: float
    last_seen: float
    last_success: float = 0.0
    last_failure: float = 0.0
    failures: int = 0
    next_dial: float = 0.0
    score: float = 0.0
    score_at: float = 0.0
    bans: int = 0
    banned_until: float = 0.0
    banned_for: str = ""
    is_lost: bool = False


@dataclass(frozen=True, slots=True)
class Heard:
    """Somebody says that a peer is at these addresses."""

    node_id: NodeId
    addresses: tuple[str, ...]
    source: str


@dataclass(frozen=True, slots=True)
class LinkUp:
    """A verified link to a peer stands. address: where we reached it, empty for inbound links."""

    node_id: NodeId
    address: str
    claimed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LinkDown:
    """The link to a peer ended."""

    node_id: NodeId
    reason: Reason


@dataclass(frozen=True, slots=True)
class DialFailed:
    """An attempt that a `Dial` asked for came to nothing."""

    node_id: NodeId | None
    address: str
    reason: Reason | None = None


@dataclass(frozen=True, slots=True)
class Misbehaved:
    """The peer broke the protocol."""

    node_id: NodeId
    reason: Reason


Event = Heard | LinkUp | LinkDown | DialFailed | Misbehaved


@dataclass(frozen=True, slots=True)
class Save:
    """Keep this entry on disk."""

    entry: Entry


@dataclass(frozen=True, slots=True)
class Forget:
    """Remove this peer from disk."""

    node_id: NodeId


@dataclass(frozen=True, slots=True)
class Dial:
    """Try to link to a peer at these addresses. node_id is None for a static address whose owner is not known yet."""

    node_id: NodeId | None
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Close the link to a peer that is banned now."""

    node_id: NodeId
    reason: Reason


@dataclass(frozen=True, slots=True)
class FoundAgain:
    """A lost peer answers again: perhaps a partition has healed."""

    node_id: NodeId


Effect = Save | Forget | Dial | Disconnect | FoundAgain
