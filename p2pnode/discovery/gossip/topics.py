"""Offers in a network too large to tell everybody everything: adverts under topics, spread over all distances from the topic.

After TopDisc (ethereum/devp2p, discv5-theory.md). A topic is a coarse class of capability (`topics_of`); its hash is a point of
the key space. Adverts lie not with the few nodes nearest to it, who would be overrun and could be surrounded, but with a few
registrars in every distance bucket; searchers ask some of each bucket, far ones first. An exact price needs a quote anyway, so
price is only a topic by powers of two. `OfferSource` is the interface that this shares with gossip.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from math import ceil, inf
from typing import Final

from p2pnode.discovery.diversity import contact_group
from p2pnode.discovery.gossip.events import (
    Arrived,
    Connect,
    Effect,
    Event,
    Failed,
    Found,
    Learned,
    LinkDown,
    LinkUp,
    NotReached,
    Replied,
    Tell,
    Violated,
)  # fmt: skip
from p2pnode.discovery.gossip.items import Check, Item, Kind
from p2pnode.discovery.gossip.registrar import Registrar
from p2pnode.errors import ProtocolViolation, Refused
from p2pnode.reasons import Reason
from p2pnode.wire.messages.discovery import Contact
from p2pnode.wire.messages.gossip import ADVERT_CONTACTS_MAX, Advertise, Advertised, Adverts, FindAdverts
from p2pnode.wire.registry import Message

BUCKETS: Final = 20
CONTACTS_PER_BUCKET: Final = 10
REGISTRARS_PER_BUCKET: Final = 3
# A searcher asks this many registrars of a bucket before it goes nearer.
ASKED_PER_BUCKET: Final = 5
ASKED_AT_ONCE: Final = 3
# Of each bucket a registrar names so many nodes that are nearer than itself.
CONTACTS_NAMED_PER_BUCKET: Final = 3
ENOUGH: Final = 32
TELL_SECONDS: Final = 5.0
SEARCH_SECONDS: Final = 20.0
RETRY_SECONDS: Final = 60.0
# Where everybody wants to be, in the buckets next to a popular topic, who is turned away comes back ever more rarely.
PATIENCE_SECONDS: Final = 5.0
TOPICS_MAX: Final = 16
SEARCHES_MAX: Final = 16
_GIB: Final = 1 << 30


def topic(label: str) -> bytes:
    """Give the point of the key space that stands for a label such as `cpu` or `gpu>=8g`."""
    return blake2b(b"p2pnode topic " + label.encode(), digest_size=32).digest()


def topic_labels(models: Iterable[bytes], gpu_memory_bytes: int, price: int) -> list[str]:
    """Give the labels that an offer is advertised under, bounded: what it has, steps of GPU memory, price by powers of two.

    price: micro-credits per 10^9 operations.
    """
    labels = ["cpu"] if not gpu_memory_bytes else ["gpu"]
    labels += [f"gpu>={step}g" for step in (8, 16, 24, 48, 80) if gpu_memory_bytes >= step * _GIB * 0.95]
    labels.append(f"{labels[0]} price<2^{price.bit_length()}")
    return (labels + [f"model:{model.hex()}" for model in models])[:TOPICS_MAX]


def bucket_of(node_id: bytes, place: bytes) -> int:
    """Give how many leading bits two points share, at most BUCKETS - 1."""
    distance = int.from_bytes(node_id, "big") ^ int.from_bytes(place, "big")
    return min(256 - distance.bit_length(), BUCKETS - 1)


@dataclass(slots=True)
class _Placing:
    """One registrar of ours for one topic. at: when to come again; ticket: what to bring; refused: how often not yet."""

    at: float
    refused: int = 0
    ticket: bytes = b""
    is_asked: bool = False


@dataclass(slots=True)
class _Own:
    """An own topic. registrars: by node id; per_bucket: how many."""

    data: bytes
    registrars: dict[bytes, _Placing] = field(default_factory=dict)
    per_bucket: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Search:
    topics: tuple[bytes, ...]
    deadline: float
    found: dict[bytes, Item] = field(default_factory=dict)
    asked: dict[bytes, None] = field(default_factory=dict)
    per_bucket: dict[int, int] = field(default_factory=dict)
    in_flight: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class _Asked:
    node_id: bytes
    message: Advertise | FindAdverts
    search_id: int = 0


class TopicAdverts:
    """The topic machine of one node: registrar, advertiser and searcher.

    known: gives contacts from the routing table, those that share more bits with a point than this node does first; the machine
    also uses those that registrars name. Links are opened by `Connect` where none stands.
    """

    def __init__(
        self, own: Contact, registrar: Registrar, check: Check, uniform: Callable[[], float],
        known: Callable[[bytes], Iterable[Contact]],
    ) -> None:  # fmt: skip
        self.own = own
        self.registrar = registrar
        self._check = check
        self._uniform = uniform
        self._known = known
        self._linked: dict[bytes, Contact] = {}
        self._tables: dict[bytes, dict[int, dict[bytes, Contact]]] = {}
        self._topics: dict[bytes, _Own] = {}
        self._searches: dict[int, _Search] = {}
        self._asked: dict[int, _Asked] = {}
        self._waiting: dict[bytes, list[tuple[Advertise | FindAdverts, int]]] = {}
        self._next_id = 0
        self._next_placing = inf

    @property
    def deadline(self) -> float:
        """When `tick` should run next."""
        return min(self._next_placing, min((search.deadline for search in self._searches.values()), default=inf))

    def publish(self, data: bytes, now: float, topics: Sequence[bytes] = ()) -> list[Effect]:
        """Advertise an offer under these topics, or take it back: a withdrawal goes to whoever holds the offer."""
        item = self._check(data, round(now * 1000))
        effects: list[Effect] = []
        if item.kind is Kind.WITHDRAWAL:
            for place, own in self._topics.items():
                for node_id, placing in own.registrars.items():
                    if not placing.ticket:
                        effects += self._ask(node_id, Advertise(place, data), 0)
            self._topics.clear()
            self._next_placing = inf
            return effects
        for place in topics[:TOPICS_MAX]:
            own = self._topics.setdefault(place, _Own(data))
            own.data = data
            for placing in own.registrars.values():
                placing.at = now if not placing.ticket else placing.at
            self._learn(place, self._known(place))
        for place in [each for each in self._topics if each not in topics]:
            del self._topics[place]
        self._next_placing = now
        return self.tick(now)

    def search(self, topics: Sequence[bytes], now: float) -> tuple[int, list[Effect]]:
        """Look for offers under the first of these topics: name the rarest first; the query decides about the others.

        Ends with Found. Raises Refused(BUSY) beyond the limit of searches at once.
        """
        if len(self._searches) >= SEARCHES_MAX:
            raise Refused(Reason.BUSY, "too many searches at once")
        self._next_id += 1
        search = self._searches[self._next_id] = _Search(tuple(topics[:1]), now + SEARCH_SECONDS)
        for place in search.topics:
            self._learn(place, self._known(place))
        return self._next_id, self._go_on(self._next_id, now)

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event."""
        match event:
            case LinkUp(contact):
                self._linked[contact.node_id] = contact
                waiting = self._waiting.pop(contact.node_id, [])
                return [self._tell(contact.node_id, message, search_id) for message, search_id in waiting]
            case LinkDown(node_id):
                self._linked.pop(node_id, None)
            case NotReached(node_id):
                effects: list[Effect] = []
                for message, search_id in self._waiting.pop(node_id, []):
                    effects += self._lost(_Asked(node_id, message, search_id), now)
                return effects
            case Replied(ask_id, message):
                asked = self._asked.pop(ask_id, None)
                return [] if asked is None else self._on_replied(asked, message, now)
            case Failed(ask_id):
                asked = self._asked.pop(ask_id, None)
                return [] if asked is None else self._lost(asked, now)
            case Learned(contacts):
                for place in self._tables:
                    self._learn(place, contacts)
        return []

    def tick(self, now: float) -> list[Effect]:
        """Go on with adverts that are due, and end searches that took too long."""
        effects: list[Effect] = []
        if now >= self._next_placing:
            self._next_placing = inf
            for place, own in self._topics.items():
                effects += self._place(place, own, now)
        for search_id in [each for each, search in self._searches.items() if search.deadline <= now]:
            effects.append(self._end(search_id, is_complete=False))
        return effects

    def answer(self, asker: bytes, message: Message, now: float) -> tuple[Message, list[Effect]]:
        """Answer as registrar. Raises Refused, ProtocolViolation."""
        match message:
            case Advertise(place, document, ticket):
                contact = self._linked.get(asker)
                network = contact_group(contact) if contact is not None else ""
                admission = self.registrar.register(place, document, ticket, network, now)
                return Advertised(
                    admission.held_seconds, admission.wait_seconds, admission.ticket, self._nearer(place, asker)
                ), []  # fmt: skip
            case FindAdverts(place):
                return Adverts(self.registrar.sample(place, now), self._nearer(place, asker)), []
        raise Refused(Reason.UNKNOWN_MESSAGE, "no message of topics")

    # --- advertising --------------------------------------------------------------------------------------------------

    def _place(self, place: bytes, own: _Own, now: float) -> list[Effect]:
        for bucket, contacts in sorted(self._tables.get(place, {}).items()):
            missing = REGISTRARS_PER_BUCKET - own.per_bucket.get(bucket, 0)
            if missing <= 0:
                continue
            fresh = [node_id for node_id in contacts if node_id not in own.registrars]
            while fresh and missing > 0:
                chosen = fresh.pop(min(int(self._uniform() * len(fresh)), len(fresh) - 1))
                own.registrars[chosen] = _Placing(now)
                own.per_bucket[bucket] = own.per_bucket.get(bucket, 0) + 1
                missing -= 1
        effects: list[Effect] = []
        for node_id, placing in own.registrars.items():
            if placing.is_asked:
                continue
            if placing.at <= now:
                placing.is_asked = True
                effects += self._ask(node_id, Advertise(place, own.data, placing.ticket), 0)
            else:
                self._next_placing = min(self._next_placing, ceil(placing.at))
        return effects

    def _on_advertised(self, asked: _Asked, message: Advertise, reply: Advertised, now: float) -> list[Effect]:
        is_wider = self._learn(message.topic, reply.contacts)
        own = self._topics.get(message.topic)
        placing = own.registrars.get(asked.node_id) if own is not None else None
        if own is None or placing is None:
            return []
        placing.is_asked = False
        placing.ticket = reply.ticket
        placing.refused = 0 if reply.held_seconds else placing.refused + 1
        patience = PATIENCE_SECONDS * 2.0 ** min(placing.refused, 6) * (0.5 + self._uniform())
        placing.at = now + (reply.held_seconds or max(float(reply.wait_seconds), patience))
        # Whole seconds: a node with adverts at forty registrars is not woken forty times.
        self._next_placing = min(self._next_placing, ceil(now if is_wider else placing.at))
        return []

    # --- searching ----------------------------------------------------------------------------------------------------

    def _go_on(self, search_id: int, now: float) -> list[Effect]:
        search = self._searches.get(search_id)
        if search is None:
            return []
        effects: list[Effect] = []
        place = search.topics[0] if search.topics else b""
        for bucket, contacts in sorted(self._tables.get(place, {}).items()):
            fresh = [node_id for node_id in contacts if node_id not in search.asked and node_id != self.own.node_id]
            while (
                fresh
                and search.in_flight < ASKED_AT_ONCE
                and search.per_bucket.get(bucket, 0) < ASKED_PER_BUCKET
                and len(search.found) < ENOUGH
            ):
                chosen = fresh.pop(min(int(self._uniform() * len(fresh)), len(fresh) - 1))
                search.asked[chosen] = None
                search.per_bucket[bucket] = search.per_bucket.get(bucket, 0) + 1
                search.in_flight += 1
                effects += self._ask(chosen, FindAdverts(place), search_id)
        if search.in_flight == 0:
            effects.append(self._end(search_id, is_complete=True))
        return effects

    def _on_adverts(self, asked: _Asked, message: FindAdverts, reply: Adverts, now: float) -> list[Effect]:
        self._learn(message.topic, reply.contacts)
        search = self._searches.get(asked.search_id)
        if search is None:
            return []
        search.in_flight -= 1
        effects: list[Effect] = []
        for data in reply.documents:
            try:
                item = self._check(data, round(now * 1000))
            except ProtocolViolation as error:
                if error.reason not in (Reason.EXPIRED, Reason.NOT_YET_VALID):
                    effects.append(Violated(asked.node_id, error.reason))
                    break
                continue
            known = search.found.get(item.publisher)
            if item.kind is Kind.OFFER and (known is None or known.sequence < item.sequence):
                search.found[item.publisher] = item
                effects.append(Arrived(item))
        return effects + self._go_on(asked.search_id, now)

    def _end(self, search_id: int, *, is_complete: bool) -> Found:
        search = self._searches.pop(search_id)
        return Found(search_id, tuple(search.found.values()), is_complete and not search.failed)

    # --- asking -------------------------------------------------------------------------------------------------------

    def _ask(self, node_id: bytes, message: Advertise | FindAdverts, search_id: int) -> list[Effect]:
        if node_id in self._linked:
            return [self._tell(node_id, message, search_id)]
        waiting = self._waiting.setdefault(node_id, [])
        waiting.append((message, search_id))
        contact = self._tables.get(message.topic, {}).get(bucket_of(node_id, message.topic), {}).get(node_id)
        return [Connect(node_id, contact.addresses if contact is not None else ())] if len(waiting) == 1 else []

    def _tell(self, node_id: bytes, message: Advertise | FindAdverts, search_id: int) -> Tell:
        self._next_id += 1
        self._asked[self._next_id] = _Asked(node_id, message, search_id)
        return Tell(self._next_id, node_id, message, TELL_SECONDS)

    def _on_replied(self, asked: _Asked, reply: Message, now: float) -> list[Effect]:
        if isinstance(asked.message, Advertise) and isinstance(reply, Advertised):
            return self._on_advertised(asked, asked.message, reply, now)
        if isinstance(asked.message, FindAdverts) and isinstance(reply, Adverts):
            return self._on_adverts(asked, asked.message, reply, now)
        return [Violated(asked.node_id, Reason.WRONG_TYPE), *self._lost(asked, now)]

    def _lost(self, asked: _Asked, now: float) -> list[Effect]:
        """A registrar did not answer: it leaves the table, and another of its bucket takes its place."""
        place = asked.message.topic
        self._tables.get(place, {}).get(bucket_of(asked.node_id, place), {}).pop(asked.node_id, None)
        search = self._searches.get(asked.search_id)
        if search is not None:
            search.in_flight -= 1
            search.failed += 1
            return self._go_on(asked.search_id, now)
        own = self._topics.get(place)
        if own is None:
            return []
        if own.registrars.pop(asked.node_id, None) is not None:
            own.per_bucket[bucket_of(asked.node_id, place)] -= 1
        self._next_placing = min(self._next_placing, now + RETRY_SECONDS * self._uniform())
        return []

    # --- the service table --------------------------------------------------------------------------------------------

    def _learn(self, place: bytes, contacts: Iterable[Contact]) -> bool:
        """Put contacts into a topic's table; True if any was new."""
        is_wider = False
        table = self._tables.setdefault(place, {})
        for contact in contacts:
            if contact.node_id == self.own.node_id or not contact.addresses:
                continue
            bucket = table.setdefault(bucket_of(contact.node_id, place), {})
            if len(bucket) < CONTACTS_PER_BUCKET and contact.node_id not in bucket:
                bucket[contact.node_id] = contact
                is_wider = True
        if len(self._tables) > TOPICS_MAX + SEARCHES_MAX:
            # Tables of topics that are neither ours nor searched for now can be filled again.
            used = {*self._topics, *(each for search in self._searches.values() for each in search.topics), place}
            for old in [each for each in self._tables if each not in used]:
                del self._tables[old]
        return is_wider

    def _nearer(self, place: bytes, asker: bytes) -> tuple[Contact, ...]:
        """Give contacts of ours that are nearer to the topic than this node, one or two of each bucket."""
        here = bucket_of(self.own.node_id, place)
        chosen: list[Contact] = []
        per_bucket: dict[int, int] = {}
        for contact in self._known(place):
            bucket = bucket_of(contact.node_id, place)
            if bucket <= here or len(chosen) >= ADVERT_CONTACTS_MAX:
                break
            if contact.node_id != asker and per_bucket.get(bucket, 0) < CONTACTS_NAMED_PER_BUCKET:
                per_bucket[bucket] = per_bucket.get(bucket, 0) + 1
                chosen.append(contact)
        return tuple(chosen)
