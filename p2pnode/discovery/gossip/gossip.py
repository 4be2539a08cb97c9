"""The gossip of offers: every node keeps every offer, by news along a tree, comparison of books, and watch over publishers.

A pure machine made of others: `views` (whom to gossip with), `spreading` (news), `anti_entropy` (what was lost), `monitoring`
(who is gone) and `items` (the book). What a document means is the business of the `check` it is given.

How it is driven: perform the effects of every call in order; answer requests 31, 33 and 35 with `answer`; call `tick` when
`deadline` has come; report every link that comes up or goes down, whoever opened it. Hand signed documents of this node to
`publish`. `Arrived` and `Gone` keep the market's book of offers; `Suspect` and `Republish` ask the market for a signature, and
what it signs comes back through `publish`. `Learned` with servers from the routing table or the peer book fills the views.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Final

from p2pnode.discovery.gossip.anti_entropy import Answering, Comparison
from p2pnode.discovery.gossip.events import (
    Compare,
    Connect,
    Disconnect,
    Effect,
    Event,
    Failed,
    Found,
    Gone,
    Learned,
    LinkDown,
    LinkUp,
    NotReached,
    Replied,
    Republish,
    Suspect,
    Tell,
    Violated,
)  # fmt: skip
from p2pnode.discovery.gossip.intake import Intake
from p2pnode.discovery.gossip.items import Check, Item, ItemStore, Kind, Outcome, split_entries, split_prefixes
from p2pnode.discovery.gossip.monitoring import Accuse, Attend, MonitorEffect, Monitoring, Try
from p2pnode.discovery.gossip.settings import GossipSettings
from p2pnode.discovery.gossip.spreading import Spreading, wanted_items
from p2pnode.discovery.gossip.views import LEAVE, Joined, Left, ViewEffect, Views, Wish
from p2pnode.errors import ProtocolViolation, Refused
from p2pnode.reasons import Reason
from p2pnode.wire.messages.discovery import Contact
from p2pnode.wire.messages.gossip import (
    Announce,
    Differences,
    Neighbour,
    Neighbours,
    Reconcile,
    Wanted,
)  # fmt: skip
from p2pnode.wire.registry import Message

REQUESTS: Final = (Neighbour, Announce, Reconcile)
# A peer counts as alive for so long after its last word, whatever monitors say.
SEEN_SECONDS: Final = 30.0
# A comparison with a stranger that brought or gave so much shows that the two belong to parts that had lost each other.
STRANGE_DOCUMENTS: Final = 16


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a `Tell` was for. comparison: it is a step of; publisher: whose life it is to show."""

    node_id: bytes
    message: Message
    comparison: Comparison | None = None
    publisher: bytes = b""


class OfferGossip:
    """The gossip machine of one node. own: its id and the addresses at which it can be dialled, none if it cannot.

    check: turns a document's bytes into an item or raises ProtocolViolation. uniform: floats in [0, 1).
    """

    def __init__(self, own: Contact, settings: GossipSettings, uniform: Callable[[], float], check: Check, now: float) -> None:
        self.settings = settings
        self.store = ItemStore(settings)
        self.views = Views(own, settings, uniform, now)
        self.watch = Monitoring(own.node_id, self.store, settings)
        self._uniform = uniform
        self._spreading = Spreading(settings)
        self._intake = Intake(own.node_id, self.store, self.watch, self._spreading, check)
        self._answering = Answering(self.store, settings)
        self._asked: dict[int, _Asked] = {}
        self._next_ask = 0
        self._trying: dict[bytes, None] = {}
        self._seen: dict[bytes, float] = {}
        self._next_sync = now + settings.sync_seconds * uniform()
        self._sync_with: dict[bytes, None] = {}
        self._comparing: bytes | None = None
        self._compare_when_linked: bytes | None = None
        self._own: Item | None = None
        self._next_own = inf
        self._next_search = 0

    # --- what the owner of the machine asks ---------------------------------------------------------------------------

    @property
    def own(self) -> Contact:
        """This node and where it can be dialled."""
        return self.views.own

    def moved(self, own: Contact, *, is_server: bool) -> None:
        """Use new addresses, or a new role, from now on."""
        self.views.own, self.views.is_server = own, is_server

    def publish(self, data: bytes, now: float, topics: Sequence[bytes] = ()) -> list[Effect]:
        """Spread a document that this node has signed. Too soon after the last, it leaves as soon as others would take it.

        Raises ProtocolViolation when the document would not pass the check of others.
        """
        item = self._intake.checked(data, now)
        effects: list[Effect] = []
        outcome = self._intake.take(effects, item, None, now)
        if item.kind is Kind.SUSPICION:
            return effects
        held = self.store.get(self.own.node_id)
        if outcome is Outcome.TOO_OFTEN:
            self._own, self._next_own = item, now + 1.0
        elif outcome is not Outcome.NEW and held is not None and held.data != data:
            # The network remembers more of this node than it does itself.
            effects.append(Republish(held.sequence))
        return effects

    def search(self, topics: Sequence[bytes], now: float) -> tuple[int, list[Effect]]:
        """Give every standing offer at once: here all are known, whatever the topics. See `topics.OfferSource`."""
        self._next_search += 1
        return self._next_search, [Found(self._next_search, tuple(self.store.offers()))]

    def is_suspected(self, publisher: bytes, now: float) -> bool:
        """Say whether a publisher counts as gone: enough monitors say so and this node has not heard from it itself."""
        return self._seen.get(publisher, -inf) < now - SEEN_SECONDS and self.watch.is_suspected(publisher, now)

    def bye(self, now: float) -> list[Effect]:
        """Say goodbye to the neighbours at once, with what they have not been told yet: an orderly stop."""
        effects: list[Effect] = []
        for node_id, announce in self._spreading.due(inf):
            effects.append(self._tell(node_id, announce))
        return effects + [self._tell(node_id, Neighbour(LEAVE)) for node_id in self.views.active]

    @property
    def deadline(self) -> float:
        """When `tick` should run next, seconds of Unix time."""
        sync = self._next_sync if self.views.active or self.views.passive else inf
        if self._sync_with and self._comparing is None:
            return -inf
        return min(
            sync, self.views.deadline, self._spreading.deadline, self.watch.deadline, self.store.next_expiry, self._next_own
        )  # fmt: skip

    # --- events -------------------------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event; gives what to do about it."""
        match event:
            case LinkUp(contact):
                effects = self._perform(self.views.link_up(contact, now), now)
                self._seen[contact.node_id] = now
                if contact.node_id in self._trying:
                    del self._trying[contact.node_id]
                    effects += self._perform(self.watch.tried(contact.node_id, True, now), now)
                if contact.node_id == self._compare_when_linked:
                    self._compare_when_linked = None
                    self._sync_with[contact.node_id] = None
                    effects += self._sync(now)
                return effects
            case LinkDown(node_id):
                self._seen.pop(node_id, None)
                self._intake.forget(node_id, now)
                self._answering.forget(node_id)
                return self._perform(self.views.link_down(node_id, now), now)
            case NotReached(node_id):
                effects = self._perform(self.views.not_reached(node_id), now)
                if self._trying.pop(node_id, True) is None:
                    effects += self._perform(self.watch.tried(node_id, False, now), now)
                return effects
            case Compare(node_id):
                self._sync_with[node_id] = None
                return self._sync(now)
            case Learned(contacts):
                self.views.learn(contacts)
                return []
            case Replied():
                return self._on_replied(event, now)
            case Failed():
                return self._on_failed(event, now)

    def tick(self, now: float) -> list[Effect]:
        """Do what is due."""
        effects: list[Effect] = []
        for item in self.store.expire(now):
            self.watch.gone(item)
            effects.append(Gone(item))
        if self._own is not None and now >= self._next_own:
            own, self._own, self._next_own = self._own, None, inf
            if self._intake.take(effects, own, None, now) is Outcome.TOO_OFTEN:
                self._own, self._next_own = own, now + 1.0
        effects += self._perform(self.views.tick(now), now)
        effects += self._perform(self.watch.tick(now), now)
        effects += [self._tell(node_id, announce) for node_id, announce in self._spreading.due(now)]
        effects += self._sync(now)
        return effects

    def answer(self, asker: bytes, message: Message, now: float) -> tuple[Message, list[Effect]]:
        """Answer a peer's request; gives the reply and what to do besides. Raises Refused, ProtocolViolation."""
        self._hear(asker, now)
        match message:
            case Neighbour():
                reply, view_effects = self.views.asked(asker, message, now)
                return reply, self._perform(view_effects, now)
            case Reconcile():
                return self._answering.answer(asker, message, now), []
            case Announce():
                return self._on_announce(asker, message, now)
        raise Refused(Reason.UNKNOWN_MESSAGE, "no message of gossip")

    # --- news ---------------------------------------------------------------------------------------------------------

    def _on_announce(self, asker: bytes, message: Announce, now: float) -> tuple[Wanted, list[Effect]]:
        effects: list[Effect] = []
        is_repeat = not self._intake.take_all(effects, message.documents, asker, now) and bool(message.documents)
        if is_repeat:
            self._spreading.prune(asker)
        wanted = self._intake.wanted(message.entries, asker, now)
        if wanted:
            self._spreading.graft(asker)
        return Wanted(b"".join(wanted), is_repeat, asker not in self.views.active), effects

    # --- answers to what was asked ------------------------------------------------------------------------------------

    def _on_replied(self, event: Replied, now: float) -> list[Effect]:
        asked = self._asked.pop(event.ask_id, None)
        if asked is None:
            return []
        node_id, message, reply = asked.node_id, asked.message, event.message
        self._hear(node_id, now)
        effects: list[Effect] = []
        try:
            if asked.publisher:
                effects += self._perform(self.watch.tried(asked.publisher, True, now), now)
            if asked.comparison is not None:
                effects += self._compare(asked.comparison, message, reply, now)
            elif isinstance(message, Neighbour) and isinstance(reply, Neighbours):
                effects += self._perform(self.views.answered(node_id, message.wish, reply, now), now)
            elif isinstance(message, Announce) and isinstance(reply, Wanted):
                effects += self._on_wanted(node_id, message, reply, now)
            else:
                raise ProtocolViolation(Reason.WRONG_TYPE, "an answer of another kind")
        except ProtocolViolation as error:
            if asked.comparison is not None:
                self._comparing = None
            effects.append(Violated(node_id, error.reason))
        return effects

    def _on_wanted(self, node_id: bytes, message: Announce, reply: Wanted, now: float) -> list[Effect]:
        if reply.is_repeat:
            self._spreading.prune(node_id)
        if reply.keys:
            self._spreading.graft(node_id)
            found = wanted_items([self.store.find(prefix) for prefix in split_prefixes(reply.keys)])
            self._spreading.push(node_id, found, now)
        is_news = bool(message.documents or message.entries)
        return self._perform(self.views.stranger(node_id, now), now) if reply.is_stranger and is_news else []

    def _on_failed(self, event: Failed, now: float) -> list[Effect]:
        asked = self._asked.pop(event.ask_id, None)
        if asked is None:
            return []
        effects: list[Effect] = []
        if asked.publisher:
            # A refusal is a sign of life, too.
            effects += self._perform(self.watch.tried(asked.publisher, event.reason is not None, now), now)
        if asked.comparison is not None:
            self._comparing = None
        elif isinstance(asked.message, Neighbour):
            if asked.message.wish != LEAVE:
                effects += self._perform(self.views.unanswered(asked.node_id, now), now)
        elif isinstance(asked.message, Announce) and event.reason is None:
            # The message or its answer was lost: say it again, as entries, which cost little if they did arrive.
            self._again(asked.node_id, asked.message, now)
        return effects

    def _again(self, node_id: bytes, message: Announce, now: float) -> None:
        self._spreading.prune(node_id)
        prefixes = [prefix for prefix, _ in split_entries(message.entries)]
        items = [self.store.find(prefix) for prefix in prefixes]
        for data in message.documents:
            try:
                items.append(self.store.get(self._intake.checked(data, now).key))
            except ProtocolViolation:
                continue  # It expired in the meantime.
        self._spreading.remind(node_id, [item for item in items if item is not None], now)

    # --- comparing books ----------------------------------------------------------------------------------------------

    def _sync(self, now: float) -> list[Effect]:
        if now >= self._next_sync:
            self._next_sync = now + self.settings.sync_seconds * (0.75 + self._uniform() / 2)
            # Every other time somebody who is no neighbour: the neighbours of a part that was cut off know only each other.
            choice = list(self.views.active if self._uniform() < 0.5 or not self.views.passive else self.views.passive)
            chosen = choice[min(int(self._uniform() * len(choice)), len(choice) - 1)] if choice else None
            if chosen in self.views.linked:
                self._sync_with[chosen] = None
            elif chosen is not None:
                self._compare_when_linked = chosen
                return [Connect(chosen, self.views.passive[chosen].addresses)]
        while self._sync_with and self._comparing is None:
            peer = next(iter(self._sync_with))
            del self._sync_with[peer]
            if peer in self.views.linked:
                comparison = Comparison(peer, self.store)
                self._comparing = peer
                return [self._tell(peer, comparison.first(), comparison)]
        return []

    def _compare(self, comparison: Comparison, question: Message, answer: Message, now: float) -> list[Effect]:
        effects: list[Effect] = []
        differences = answer if isinstance(answer, Differences) else None
        if isinstance(question, Announce):
            if not isinstance(answer, Wanted):
                raise ProtocolViolation(Reason.WRONG_TYPE, "an answer of another kind")
            following = comparison.next(question, None)
        elif isinstance(question, Reconcile) and differences is not None:
            self._intake.take_all(effects, differences.documents, comparison.peer, now)
            following = comparison.next(question, differences)
        else:
            raise ProtocolViolation(Reason.WRONG_TYPE, "an answer of another kind")
        if following is None or comparison.peer not in self.views.linked:
            self._comparing = None
            return effects + self._after(comparison, now) + self._sync(now)
        return [*effects, self._tell(comparison.peer, following, comparison)]

    def _after(self, comparison: Comparison, now: float) -> list[Effect]:
        peer = comparison.peer
        if peer in self.views.active or peer not in self.views.linked:
            return []
        if comparison.moved >= STRANGE_DOCUMENTS:
            return self._perform(self.views.adopt(peer, now), now)
        is_needed = peer in self.watch.watched() or peer in self.watch.attended()
        return [] if is_needed else [Disconnect(peer)]

    # --- effects of the parts -----------------------------------------------------------------------------------------

    def _perform(self, parts: Sequence[ViewEffect | MonitorEffect], now: float) -> list[Effect]:
        effects: list[Effect] = []
        for part in parts:
            match part:
                case Wish(node_id, message):
                    effects.append(self._tell(node_id, message))
                case Joined(node_id, by_us):
                    self._spreading.add(node_id)
                    if by_us:
                        # Whoever asked compares: after a partition or a restart the two books may have nothing in common.
                        self._sync_with[node_id] = None
                        effects += self._sync(now)
                case Left(node_id):
                    self._spreading.remove(node_id)
                    self._sync_with.pop(node_id, None)
                case Try(publisher, addresses):
                    effects += self._try(publisher, addresses, now)
                case Accuse(offer):
                    effects.append(Suspect(offer.publisher, offer.sequence, offer.expires_ms))
                case Attend(node_id, addresses):
                    if node_id not in self.views.linked:
                        effects.append(Connect(node_id, addresses))
                case _:
                    effects.append(part)
        return effects

    def _try(self, publisher: bytes, addresses: tuple[str, ...], now: float) -> list[Effect]:
        if publisher in self.views.linked:
            if self._seen.get(publisher, -inf) > now - self.settings.probe_seconds / 2:
                return self._perform(self.watch.tried(publisher, True, now), now)
            return [self._tell(publisher, Announce(), None, publisher)]
        if not addresses:
            return self._perform(self.watch.tried(publisher, False, now), now)
        self._trying[publisher] = None
        return [Connect(publisher, addresses)]

    def _tell(self, node_id: bytes, message: Message, comparison: Comparison | None = None, publisher: bytes = b"") -> Tell:
        self._next_ask += 1
        self._asked[self._next_ask] = _Asked(node_id, message, comparison, publisher)
        seconds = self.settings.probe_timeout_seconds if publisher else self.settings.tell_seconds
        return Tell(self._next_ask, node_id, message, seconds)

    def _hear(self, node_id: bytes, now: float) -> None:
        if node_id in self.views.linked:
            self._seen[node_id] = now
        self.watch.seen(node_id, now)
