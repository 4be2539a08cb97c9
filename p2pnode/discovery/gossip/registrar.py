"""The registrar's half of topic adverts: a bounded cache that newcomers enter by waiting.

After TopDisc (ethereum/devp2p, discv5-theory.md). The wait grows with how full the cache is, with how much of it the topic
has, and with how much the asker's network has: so a popular topic fills no cache, a flood of identities from one network gets in
slowly, and a rare topic gets in at once. Nothing is kept for those who wait: a ticket, sealed by this registrar, says since when.
"""

import hmac
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from math import ceil
from typing import Final

from p2pnode.discovery.gossip.items import Check, Item, Kind
from p2pnode.wire.messages.gossip import ADVERTS_MAX

_TICKET_TIME_BYTES: Final = 8
# A ticket counts when it comes back between the end of its wait and this much later; else waiting begins again. So nobody can
# gather tickets for a rainy day, and an advertiser that is turned away may double its patience.
TICKET_WINDOW_SECONDS: Final = 900.0
# Shorter waits are waived, so that a rare topic costs one message; who must wait is not asked back sooner than the other.
WAIT_SECONDS_MIN: Final = 1.0
WAIT_SECONDS_AGAIN: Final = 10


@dataclass(frozen=True, slots=True)
class RegistrarSettings:
    """adverts_max: the cache's size C. held_seconds: an advert's life E. The wait is
    E / (1 - c/C)^occupancy_power x (c(topic)/C + c(network)/C + floor), c being the adverts held.
    """

    adverts_max: int = 1000
    held_seconds: float = 900.0
    occupancy_power: float = 4.0
    floor: float = 1e-4


@dataclass(slots=True)
class _Advert:
    item: Item
    network: str
    until: float


@dataclass(frozen=True, slots=True)
class Admission:
    """held_seconds: how long the advert is held, 0 for not yet: then come again with `ticket` in wait_seconds."""

    held_seconds: int = 0
    wait_seconds: int = 0
    ticket: bytes = b""


class Registrar:
    """One node's cache of adverts. secret: 32 bytes that seal its tickets. uniform: floats in [0, 1)."""

    def __init__(self, settings: RegistrarSettings, check: Check, secret: bytes, uniform: Callable[[], float]) -> None:
        self._settings = settings
        self._check = check
        self._secret = secret
        self._uniform = uniform
        self._adverts: dict[tuple[bytes, bytes], _Advert] = {}
        self._topics: dict[bytes, dict[bytes, None]] = {}
        self._networks: dict[str, int] = {}
        self._next_expiry = 0.0

    def __len__(self) -> int:
        return len(self._adverts)

    def register(self, topic: bytes, data: bytes, ticket: bytes, network: str, now: float) -> Admission:
        """Hold an advert, or say how long to wait. network: the asker's. Raises ProtocolViolation for a false document."""
        item = self._check(data, round(now * 1000))
        self._expire(now)
        key = (topic, item.publisher)
        known = self._adverts.get(key)
        if known is not None:
            # News of an advert that is in: its word changes at once, its time does not.
            if item.sequence > known.item.sequence:
                known.item = item
            return Admission(held_seconds=max(1, ceil(known.until - now)))
        if item.kind is not Kind.OFFER:
            return Admission()
        wait = self.wait(topic, network)
        since = self._since(topic, item.publisher, ticket, now)
        remaining = wait - (now - since)
        if remaining > WAIT_SECONDS_MIN or len(self._adverts) >= self._settings.adverts_max:
            # A little more than is due now: others come in meanwhile, and coming back in vain costs both sides.
            seconds = min(max(WAIT_SECONDS_AGAIN, ceil(remaining * 1.25)), ceil(self._settings.held_seconds))
            return Admission(wait_seconds=seconds, ticket=self._ticket(topic, item.publisher, since, now + seconds))
        until = min(now + self._settings.held_seconds, item.expires_ms / 1000)
        self._adverts[key] = _Advert(item, network, until)
        self._topics.setdefault(topic, {})[item.publisher] = None
        self._networks[network] = self._networks.get(network, 0) + 1
        self._next_expiry = min(self._next_expiry, until)
        return Admission(held_seconds=max(1, ceil(until - now)))

    def wait(self, topic: bytes, network: str) -> float:
        """Give the seconds that an advert of this topic from this network must wait now."""
        held, settings = len(self._adverts), self._settings
        if held >= settings.adverts_max:
            return settings.held_seconds
        # Private addresses share no network that could be counted.
        same_network = self._networks.get(network, 0) if network else 0
        # Shares of the whole cache, not of what is in it: the first topic of an empty cache must not have to wait for a second.
        shares = settings.floor + (len(self._topics.get(topic, ())) + same_network) / settings.adverts_max
        occupancy: float = (1.0 - held / settings.adverts_max) ** settings.occupancy_power
        return settings.held_seconds * shares / occupancy

    def sample(self, topic: bytes, now: float) -> tuple[bytes, ...]:
        """Give a few of the adverts under a topic, at random."""
        self._expire(now)
        publishers = list(self._topics.get(topic, ()))
        documents: list[bytes] = []
        while publishers and len(documents) < ADVERTS_MAX:
            chosen = publishers.pop(min(int(self._uniform() * len(publishers)), len(publishers) - 1))
            item = self._adverts[topic, chosen].item
            if item.kind is Kind.OFFER and item.expires_ms > now * 1000:
                documents.append(item.data)
        return tuple(documents)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _expire(self, now: float) -> None:
        if now < self._next_expiry:
            return
        self._next_expiry = float("inf")
        for (topic, publisher), advert in list(self._adverts.items()):
            if advert.until > now:
                self._next_expiry = min(self._next_expiry, advert.until)
                continue
            del self._adverts[topic, publisher]
            del self._topics[topic][publisher]
            if not self._topics[topic]:
                del self._topics[topic]
            self._networks[advert.network] -= 1
            if not self._networks[advert.network]:
                del self._networks[advert.network]

    def _seal(self, topic: bytes, publisher: bytes, times: bytes) -> bytes:
        return blake2b(topic + publisher + times, key=self._secret, digest_size=16).digest()

    def _ticket(self, topic: bytes, publisher: bytes, since: float, due: float) -> bytes:
        times = b"".join(round(each * 1000).to_bytes(_TICKET_TIME_BYTES, "big") for each in (since, due))
        return times + self._seal(topic, publisher, times)

    def _since(self, topic: bytes, publisher: bytes, ticket: bytes, now: float) -> float:
        """Give since when the publisher has waited: now, unless its ticket is ours and back in time."""
        times, seal = ticket[: 2 * _TICKET_TIME_BYTES], ticket[2 * _TICKET_TIME_BYTES :]
        if not hmac.compare_digest(seal, self._seal(topic, publisher, times)):
            return now
        since, due = (int.from_bytes(part, "big") / 1000 for part in (times[:_TICKET_TIME_BYTES], times[_TICKET_TIME_BYTES:]))
        return since if due - 1.0 <= now <= due + TICKET_WINDOW_SECONDS else now
