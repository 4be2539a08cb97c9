"""What the hash table's machines say to each other and to whoever drives them: requests to send, and how they went.

Ids of asks and of operations are counted by `kademlia.Kademlia`, one series each, so that an answer can never be taken for
another's. A driver (the service, or the heap of a simulation) turns every `Ask` into exactly one `Answered` or `Failed`.
"""

from dataclasses import dataclass

from p2pnode.discovery.dht.publishing import Publication
from p2pnode.reasons import Reason
from p2pnode.wire.messages.discovery import Contact
from p2pnode.wire.registry import Message


@dataclass(frozen=True, slots=True)
class Ask:
    """Effect: send this request and report `Answered` or `Failed`. timeout_seconds: dial, handshake and answer together."""

    ask_id: int
    contact: Contact
    message: Message
    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class LookupOutcome:
    """How a lookup ended.

    target: the key or id that was looked for. contacts: those that answered and pass the limits on addresses, nearest
    first (in a region lookup everyone found there). record: the best record's envelope, empty when none was found.
    hops: how many asks after another it took to learn of the nearest node found; 1 when our own table knew it.
    """

    target: bytes
    contacts: tuple[Contact, ...]
    record: bytes = b""
    providers: tuple[Contact, ...] = ()
    hops: int = 0
    asked: int = 0
    failed: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Ended:
    """Effect: an operation that the caller began is over."""

    operation_id: int
    outcome: LookupOutcome | Publication


@dataclass(frozen=True, slots=True)
class NeedContacts:
    """Effect: too few live entries are left; give entry points to `Kademlia.bootstrap`, from more than one source."""

    live: int


@dataclass(frozen=True, slots=True)
class Answered:
    """Event: the answer to an ask. address: where it was reached, if known; it is believed over what others said of it."""

    ask_id: int
    message: Message
    address: str = ""


@dataclass(frozen=True, slots=True)
class Failed:
    """Event: no answer in time, no connection, or a refusal."""

    ask_id: int
    reason: Reason | None = None


@dataclass(frozen=True, slots=True)
class Met:
    """Event: a peer whose handshake was verified spoke to us. It becomes at most a candidate for a check.

    is_server: the role it claims; None when the message did not say.
    """

    contact: Contact
    is_server: bool | None = None


Event = Answered | Failed | Met
Effect = Ask | Ended | NeedContacts
