"""The asks that are under way, and how long to wait for each: p95 of the latest answers, twice over. Pure.

A fixed time-out is either too long for the dead nodes, which every lookup meets, or too short for those far away.
"""

from array import array
from typing import Final, Generic, TypeVar

from p2pnode.discovery.dht.asks import Ask
from p2pnode.discovery.settings import KademliaSettings
from p2pnode.wire.messages.discovery import Contact
from p2pnode.wire.registry import Message

ROUND_TRIPS_MAX: Final = 32
# Until so many answers were timed, and after so many failures in a row, the wait is the cautious one.
ROUND_TRIPS_MIN: Final = 5
FAILURES_MAX: Final = 6
# After p95 of the latest answers, a lookup looks elsewhere while it goes on waiting.
PATIENCE_SECONDS_MIN: Final = 0.2
# A driver that loses an ask must not hold its place for ever.
LOST_FACTOR: Final = 4.0

Owner = TypeVar("Owner")


class RoundTrips:
    """Answer times of this node's own asks, all peers together: which peer answers next is not known when it is asked.

    patience_seconds: after so long most answers that will come have come.
    """

    __slots__ = ("_count", "_failures", "_high", "_low", "_samples", "_timeout", "patience_seconds")

    def __init__(self, settings: KademliaSettings) -> None:
        self._low = settings.timeout_seconds_min
        self._high = settings.timeout_seconds_max
        self._samples = array("f")
        self._count = 0
        self._failures = 0
        self._timeout = self._high
        self.patience_seconds = self._high

    @property
    def timeout_seconds(self) -> float:
        """How long the next ask may take."""
        return self._high if self._failures >= FAILURES_MAX else self._timeout

    def answered(self, seconds: float) -> None:
        """An answer took so long."""
        self._failures = 0
        if len(self._samples) < ROUND_TRIPS_MAX:
            self._samples.append(seconds)
        else:
            self._samples[self._count % ROUND_TRIPS_MAX] = seconds
        self._count += 1
        if len(self._samples) >= ROUND_TRIPS_MIN and (self._count % 4 == 0 or self._count == ROUND_TRIPS_MIN):
            p95 = sorted(self._samples)[int(0.95 * (len(self._samples) - 1) + 0.5)]
            self.patience_seconds = max(PATIENCE_SECONDS_MIN, p95)
            self._timeout = min(self._high, max(self._low, 2 * p95))

    def failed(self) -> None:
        """An ask came to nothing. Many in a row may mean that everything has become slower than we wait."""
        self._failures += 1


class Pending(Generic[Owner]):
    """An ask under way. owner: whom the answer concerns. wanted: contacts asked for."""

    __slots__ = ("contact", "owner", "sent_at", "timeout_seconds", "wanted")

    def __init__(self, contact: Contact, owner: Owner, wanted: int, sent_at: float, timeout_seconds: float) -> None:
        self.contact = contact
        self.owner = owner
        self.wanted = wanted
        self.sent_at = sent_at
        self.timeout_seconds = timeout_seconds


class AskBook(Generic[Owner]):
    """Counts asks and matches answers to them."""

    __slots__ = ("_last_id", "_peers", "_pending", "round_trips")

    def __init__(self, settings: KademliaSettings) -> None:
        self.round_trips = RoundTrips(settings)
        self._pending: dict[int, Pending[Owner]] = {}
        self._peers: dict[bytes, int] = {}
        self._last_id = 0

    def __len__(self) -> int:
        return len(self._pending)

    def is_asking(self, node_id: bytes) -> bool:
        """Say whether an ask to this node is under way."""
        return node_id in self._peers

    def ask(self, contact: Contact, message: Message, owner: Owner, wanted: int, now: float) -> Ask:
        """Note a new ask and give the effect that sends it."""
        self._last_id += 1
        timeout = self.round_trips.timeout_seconds
        self._pending[self._last_id] = Pending(contact, owner, wanted, now, timeout)
        self._peers[contact.node_id] = self._peers.get(contact.node_id, 0) + 1
        return Ask(self._last_id, contact, message, timeout)

    def take(self, ask_id: int) -> Pending[Owner] | None:
        """Give an ask whose end was reported, once; None for an id that is not under way."""
        pending = self._pending.pop(ask_id, None)
        if pending is not None:
            node_id = pending.contact.node_id
            left = self._peers[node_id] - 1
            if left:
                self._peers[node_id] = left
            else:
                del self._peers[node_id]
        return pending

    def lost(self, now: float) -> list[int]:
        """Give the ids of asks whose end should have been reported long ago."""
        found = []
        for ask_id, pending in self._pending.items():
            if now - pending.sent_at > LOST_FACTOR * pending.timeout_seconds + LOST_FACTOR:
                found.append(ask_id)
        return found
