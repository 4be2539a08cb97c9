"""What goes into the gossip machine and what comes out of it. Everything is a frozen value; peers are node ids.

A driver performs the effects in order. `Tell` is a request on an open link: its end is reported as `Replied` or `Failed`.
`Connect` wants a link, whoever opens it: its end is `LinkUp` (which is reported for every link, wanted or not) or
`NotReached`. The other effects need no answer.
"""

from dataclasses import dataclass

from p2pnode.discovery.gossip.items import Item
from p2pnode.reasons import Reason
from p2pnode.wire.messages.discovery import Contact
from p2pnode.wire.registry import Message

# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LinkUp:
    """A verified link to this peer stands."""

    contact: Contact


@dataclass(frozen=True, slots=True)
class LinkDown:
    """The link to this peer is gone."""

    node_id: bytes


@dataclass(frozen=True, slots=True)
class NotReached:
    """A `Connect` came to nothing."""

    node_id: bytes


@dataclass(frozen=True, slots=True)
class Replied:
    """The reply to a `Tell`."""

    ask_id: int
    message: Message


@dataclass(frozen=True, slots=True)
class Failed:
    """A `Tell` had no reply in time, was refused, or its link broke. reason: of a refusal, if it was one."""

    ask_id: int
    reason: Reason | None = None


@dataclass(frozen=True, slots=True)
class Learned:
    """Peers that can probably be dialled, from the routing table or the peer book: candidates for neighbours."""

    contacts: tuple[Contact, ...]


@dataclass(frozen=True, slots=True)
class Compare:
    """Compare books with this linked peer now: it had been lost, so the two may have lived in different parts."""

    node_id: bytes


Event = LinkUp | LinkDown | NotReached | Replied | Failed | Learned | Compare

# --- effects ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tell:
    """Send this request on the open link to this peer."""

    ask_id: int
    node_id: bytes
    message: Message
    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class Connect:
    """Have a link to this peer: an open one, else dial these addresses."""

    node_id: bytes
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Gossip needs the link to this peer no longer; whoever keeps links may close it when nobody else uses it."""

    node_id: bytes


@dataclass(frozen=True, slots=True)
class Arrived:
    """A checked item is held now: new, or newer than what was held under its key."""

    item: Item


@dataclass(frozen=True, slots=True)
class Gone:
    """An item is held no longer: its time is over, or what it spoke of has been replaced."""

    item: Item


@dataclass(frozen=True, slots=True)
class Suspect:
    """This node is a monitor of the publisher and could not reach it: sign a Suspicion of its offer up to `sequence`, valid
    until `expires_ms`, and hand it to `OfferGossip.publish`.
    """

    publisher: bytes
    sequence: int
    expires_ms: int


@dataclass(frozen=True, slots=True)
class Republish:
    """The network holds something about this node's own offer that only a higher sequence answers: sign one above `above`."""

    above: int


@dataclass(frozen=True, slots=True)
class Violated:
    """This peer sent what no honest peer sends. It is counted and the peer's score lowered."""

    node_id: bytes
    reason: Reason


@dataclass(frozen=True, slots=True)
class Found:
    """The end of a `search`: what this source has for the topics. is_complete: False when some peer did not answer."""

    search_id: int
    items: tuple[Item, ...]
    is_complete: bool = True


Effect = Tell | Connect | Disconnect | Arrived | Gone | Suspect | Republish | Violated | Found
