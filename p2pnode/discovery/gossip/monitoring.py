"""Who watches whom, and when a publisher counts as gone: suspicion before eviction, by few, signed, and refutable.

The monitors of a publisher are the dialable publishers nearest to BLAKE2b(publisher ‖ epoch): everybody who holds about the
same offers computes about the same ones, nobody chooses whom it watches, and the choice changes every hour. The nearest three
try the publisher every twenty seconds; when one of them is suspected itself the next takes its
place. Who fails three times signs.

What a liar can do, and what bounds it: its word counts only where it is among the nearest twelve; two such words are needed;
they hide an offer from the default search, never delete it; and the publisher, who hears them like everybody else, voids them by
signing a newer sequence. A monitor that was refuted so three times within the hour is not listened to for an hour.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from math import inf
from typing import Final

from p2pnode.discovery.gossip.items import Item, ItemStore, Kind
from p2pnode.discovery.gossip.settings import GossipSettings

# How often a node looks whether it has become a monitor, or whether its own monitors have changed.
DUTIES_SECONDS: Final = 10.0
# How often it looks at all publishers, because epochs end; in between only changes make it look.
ALL_DUTIES_SECONDS: Final = 60.0
# A node this many times farther from a publisher's place than the monitors should be need not compute its exact rank.
FAR_FACTOR: Final = 4
REFUTATIONS_MAX: Final = 3
# Only a refutation this soon shows that the publisher was there all the time.
REFUTED_SECONDS: Final = 90.0
SILENCED_MAX: Final = 4096
_SPACE: Final = 1 << 256


class Roll:
    """Dialable publishers in order of id, for finding those nearest to a place by XOR."""

    def __init__(self) -> None:
        self._ids: list[int] = []

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, node_id: bytes) -> bool:
        """Put an id in; False when it was there."""
        number = int.from_bytes(node_id, "big")
        at = bisect_left(self._ids, number)
        if at == len(self._ids) or self._ids[at] != number:
            insort(self._ids, number)
            return True
        return False

    def discard(self, node_id: bytes) -> bool:
        """Take an id out; False when it was not there."""
        number = int.from_bytes(node_id, "big")
        at = bisect_left(self._ids, number)
        if at < len(self._ids) and self._ids[at] == number:
            del self._ids[at]
            return True
        return False

    def nearest(self, place: int, count: int, leave_out: bytes) -> list[bytes]:
        """Give the `count` ids nearest to a place, nearest first."""
        out = int.from_bytes(leave_out, "big")
        # Ids that share a prefix with the place lie side by side: widen the prefix until enough do.
        low, high = 0, len(self._ids)
        for shared in range(1, 257):
            start = place >> (256 - shared) << (256 - shared)
            near_low = bisect_left(self._ids, start, low, high)
            near_high = bisect_left(self._ids, start + (_SPACE >> shared), near_low, high)
            if near_high - near_low <= count:
                break
            low, high = near_low, near_high
        chosen = sorted((number ^ place, number) for number in self._ids[low:high] if number != out)
        return [number.to_bytes(32, "big") for _, number in chosen[:count]]


@dataclass(slots=True)
class _Duty:
    """One publisher that this node watches. asked: a trial is under way. seen: it has answered since the duty began."""

    next_try: float
    failures: int = 0
    asked: bool = False
    seen: bool = False


@dataclass(frozen=True, slots=True)
class Try:
    """Effect: ask this publisher for a sign of life; its end is `tried`. No addresses: only over an open link."""

    publisher: bytes
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Accuse:
    """Effect: three trials failed; sign a suspicion of this offer."""

    offer: Item


@dataclass(frozen=True, slots=True)
class Attend:
    """Effect: keep a link to this monitor of ours, because it cannot dial this node."""

    node_id: bytes
    addresses: tuple[str, ...]


MonitorEffect = Try | Accuse | Attend


@dataclass(slots=True)
class _Record:
    """How often a monitor was refuted since `since`; silenced until `until`."""

    since: float
    refuted: int = 0
    until: float = 0.0


@dataclass(slots=True)
class Monitoring:
    """The watch of one node: its duties, and whose word it counts. own: its node id."""

    own: bytes
    store: ItemStore
    settings: GossipSettings
    roll: Roll = field(default_factory=Roll)
    _duties: dict[bytes, _Duty] = field(default_factory=dict)
    _attended: dict[bytes, None] = field(default_factory=dict)
    _records: dict[bytes, _Record] = field(default_factory=dict)
    _hidden: dict[bytes, None] = field(default_factory=dict)
    _heard: dict[bytes, float] = field(default_factory=dict)
    _next_duties: float = 0.0
    _next_all: float = 0.0
    # When a trial is due, or a little earlier.
    _next_try: float = inf
    _changed: bool = True

    @property
    def deadline(self) -> float:
        """When `tick` should run next."""
        if not len(self.store):
            return inf
        return min(self._next_try, self._next_duties)

    def watched(self) -> Iterable[bytes]:
        """Give the publishers that this node watches now."""
        return self._duties

    def attended(self) -> Iterable[bytes]:
        """Give the monitors this node keeps links to."""
        return self._attended

    # --- words --------------------------------------------------------------------------------------------------------

    def is_assigned(self, monitor: bytes, publisher: bytes, now: float) -> bool:
        """Say whether this node would believe that the monitor watches the publisher, now or shortly ago."""
        count = self.settings.monitors_trusted
        edge = self.settings.probe_seconds * 6
        places = dict.fromkeys(
            (self._place(publisher, now), self._place(publisher, now - edge), self._place(publisher, now + edge))
        )
        return any(monitor in self.roll.nearest(place, count, publisher) for place in places)

    def counted(self, publisher: bytes, now: float) -> int:
        """Give how many monitors that are listened to suspect the publisher's present offer."""
        return sum(1 for voice in self.store.voices(publisher) if not self._is_silenced(voice.publisher, now))

    def is_suspected(self, publisher: bytes, now: float) -> bool:
        """Say whether enough monitors agree that nobody reaches the publisher. Where only one can watch, one is enough."""
        voices = self.counted(publisher, now)
        return voices > 0 and voices >= min(self.settings.voices_needed, max(1, self._possible(publisher)))

    def arrived(self, item: Item, replaced: Iterable[Item], now: float) -> None:
        """Take the news that an item is held now, and which ones it replaced."""
        if item.kind is Kind.SUSPICION:
            self._heard[item.key] = now
            if self.is_suspected(item.subject, now):
                self._hidden[item.subject] = None
                self.roll.discard(item.subject)
            self._changed = True
            return
        for old in replaced:
            heard = self._heard.pop(old.key, None)
            if old.kind is Kind.SUSPICION and heard is not None and item.kind is Kind.OFFER and now - heard < REFUTED_SECONDS:
                self._refuted(old.publisher, now)
        self._hidden.pop(item.publisher, None)
        is_listed = item.kind is Kind.OFFER and bool(item.addresses)
        is_news = self.roll.add(item.publisher) if is_listed else self.roll.discard(item.publisher)
        self._changed = self._changed or is_news or bool(item.publisher == self.own)
        if item.kind is Kind.WITHDRAWAL:
            self._duties.pop(item.publisher, None)

    def gone(self, item: Item) -> None:
        """Take the news that an item is held no longer, and none in its place."""
        if item.kind is Kind.SUSPICION:
            self._heard.pop(item.key, None)
            return
        self._changed = self.roll.discard(item.publisher) or self._changed
        self._hidden.pop(item.publisher, None)
        self._duties.pop(item.publisher, None)

    # --- duties -------------------------------------------------------------------------------------------------------

    def seen(self, publisher: bytes, now: float) -> None:
        """Take a sign of life that came by itself."""
        duty = self._duties.get(publisher)
        if duty is not None:
            duty.failures, duty.seen = 0, True
            duty.next_try = max(duty.next_try, now + self.settings.probe_seconds)

    def tried(self, publisher: bytes, is_alive: bool, now: float) -> list[MonitorEffect]:
        """Take the end of a trial."""
        duty = self._duties.get(publisher)
        offer = self.store.get(publisher)
        if duty is None or offer is None or offer.kind is not Kind.OFFER:
            return []
        duty.asked = False
        if is_alive:
            duty.failures, duty.seen = 0, True
            duty.next_try = now + self.settings.probe_seconds
            self._next_try = min(self._next_try, duty.next_try)
            return []
        duty.failures += 1
        duty.next_try = now + self.settings.retry_seconds
        self._next_try = min(self._next_try, duty.next_try)
        if duty.failures < self.settings.tries:
            return []
        duty.failures, duty.next_try = 0, now + self.settings.probe_seconds
        if any(voice.publisher == self.own for voice in self.store.voices(publisher)):
            return []
        if not offer.addresses and not duty.seen:
            # A node that nobody can dial comes to its monitors; one that never came may just not know of this one.
            return []
        return [Accuse(offer)]

    def tick(self, now: float) -> list[MonitorEffect]:
        """Give the trials that are due, and from time to time look who is to be watched."""
        effects: list[MonitorEffect] = []
        if now >= self._next_duties:
            self._next_duties = now + DUTIES_SECONDS
            effects += self._assign(now)
        if now < self._next_try:
            return effects
        self._next_try = inf
        for publisher, duty in self._duties.items():
            if duty.asked:
                continue
            if duty.next_try <= now:
                duty.asked = True
                offer = self.store.get(publisher)
                effects.append(Try(publisher, offer.addresses if offer is not None else ()))
            else:
                self._next_try = min(self._next_try, duty.next_try)
        return effects

    # --- inside -------------------------------------------------------------------------------------------------------

    def _place(self, publisher: bytes, now: float) -> int:
        # Publishers change their monitors at different times, so that no moment moves all of them.
        offset = int.from_bytes(publisher[:2], "big") / 65536
        epoch = int(now / self.settings.epoch_seconds + offset)
        return int.from_bytes(blake2b(publisher + epoch.to_bytes(8, "big"), digest_size=32).digest(), "big")

    def _possible(self, publisher: bytes) -> int:
        own = self.store.get(publisher)
        listed = own is not None and bool(own.addresses) and publisher not in self._hidden
        return len(self.roll) - listed

    def _acting(self, publisher: bytes, place: int) -> list[bytes]:
        """Give the monitors that should try the publisher now: the nearest three whom nobody suspects."""
        ranked = self.roll.nearest(place, self.settings.monitors, publisher)
        return [monitor for monitor in ranked if not self.store.voices(monitor)][: self.settings.monitors_acting]

    def _assign(self, now: float) -> list[MonitorEffect]:
        if self._changed or now >= self._next_all:
            self._changed, self._next_all = False, now + ALL_DUTIES_SECONDS
            self._duties = self._find_duties(now)
            self._next_try = now
            own_offer = self.store.get(self.own)
            self._attended = {}
            if own_offer is not None and own_offer.kind is Kind.OFFER and not own_offer.addresses:
                self._attended = dict.fromkeys(self._acting(self.own, self._place(self.own, now)))
        monitors = [self.store.get(monitor) for monitor in self._attended]
        return [Attend(monitor.publisher, monitor.addresses) for monitor in monitors if monitor is not None]

    def _find_duties(self, now: float) -> dict[bytes, _Duty]:
        own_offer = self.store.get(self.own)
        if own_offer is None or own_offer.kind is not Kind.OFFER or not own_offer.addresses:
            return {}
        duties: dict[bytes, _Duty] = {}
        own = int.from_bytes(self.own, "big")
        near = _SPACE // max(1, len(self.roll)) * self.settings.monitors * FAR_FACTOR
        for offer in self.store.offers():
            publisher = offer.publisher
            if publisher == self.own:
                continue
            place = self._place(publisher, now)
            if own ^ place < near and self.own in self._acting(publisher, place):
                first = now + self.settings.probe_seconds * (place & 0xFFFF) / 65536
                duties[publisher] = self._duties.get(publisher) or _Duty(first)
        return duties

    def _refuted(self, monitor: bytes, now: float) -> None:
        record = self._records.get(monitor)
        if record is None or now - record.since > self.settings.epoch_seconds:
            if len(self._records) >= SILENCED_MAX:
                del self._records[next(iter(self._records))]
            record = self._records[monitor] = _Record(now)
        record.refuted += 1
        if record.refuted >= REFUTATIONS_MAX:
            record.until = now + self.settings.epoch_seconds

    def _is_silenced(self, monitor: bytes, now: float) -> bool:
        record = self._records.get(monitor)
        return record is not None and record.until > now
