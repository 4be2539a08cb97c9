"""The gossip of offers on the real transport: performs what `gossip.OfferGossip` asks for and keeps links to its neighbours.

What documents mean is not known here: the market gives the check, and hears of what has come and gone.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import trio

from p2pnode.discovery.dht.asker import Answer, Asker
from p2pnode.discovery.dht.service import contact_of
from p2pnode.discovery.gossip.events import (
    Arrived,
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
from p2pnode.discovery.gossip.gossip import REQUESTS, OfferGossip
from p2pnode.discovery.peers.link_keeper import LinkKeeper
from p2pnode.discovery.peers.links import Why
from p2pnode.errors import PeerError
from p2pnode.ids import NodeId
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.transport.link import Link
from p2pnode.transport.requests import Incoming
from p2pnode.transport.service import TransportService
from p2pnode.wire.messages.discovery import Contact
from p2pnode.wire.messages.gossip import Announce, Differences, Neighbour, Neighbours, Reconcile, Wanted
from p2pnode.wire.registry import Message

ANSWERS: Final[dict[type[Message], type[Message]]] = {Neighbour: Neighbours, Announce: Wanted, Reconcile: Differences}
DIALS_MAX: Final = 8
# Neighbours are looked for among what the routing table knows; it is asked again when fewer than wanted are linked.
LEARN_SECONDS: Final = 10.0
LEARN_SECONDS_MAX: Final = 300.0
ALONE_SECONDS: Final = 1.0
# Who joins before its role is known is taken for a node that nobody can dial, of which neighbours take more.
PATIENCE_SECONDS: Final = 5.0
News = Arrived | Gone | Suspect | Republish | Found


class GossipService:
    """Drives one OfferGossip.

    learnable: gives peers that can probably be dialled, for the views. now: seconds of Unix time that never jump. on_news:
    told of `Arrived`, `Gone`, `Suspect`, `Republish` and `Found`, in order; it must not wait.
    """

    def __init__(
        self,
        gossip: OfferGossip,
        asker: Asker,
        keeper: LinkKeeper,
        transport: TransportService,
        metrics: Metrics,
        now: Callable[[], float],
        learnable: Callable[[], Sequence[Contact]],
        misbehaved: Callable[[bytes, Reason], None],
        on_deadline: Callable[[float], None],
    ) -> None:
        self.gossip = gossip
        self.on_news: Callable[[News], None] = lambda news: None
        self._asker = asker
        self._keeper = keeper
        self._transport = transport
        self._links = transport.links()
        self._metrics = metrics
        self._now = now
        self._learnable = learnable
        self._misbehaved = misbehaved
        self._on_deadline = on_deadline
        self._effects: deque[Effect] = deque()
        self._is_performing = False
        self._dials = 0
        self._next_learn = 0.0
        self._learn_wait = LEARN_SECONDS
        self._kept: dict[NodeId, None] = {}
        self._reported: dict[NodeId, None] = {}
        self._begins_at = math.inf
        self._nursery: trio.Nursery | None = None

    def start(self, nursery: trio.Nursery | None) -> None:
        """Dial in this nursery from now on; None ends that, with a goodbye to the neighbours."""
        if nursery is None and self._nursery is not None:
            self.perform(self.gossip.bye(self._now()))
        self._nursery = nursery

    @property
    def deadline(self) -> float:
        """When `tick` should run next."""
        return self._begins_at if self._is_waiting else min(self.gossip.deadline, self._next_learn)

    @property
    def _is_waiting(self) -> bool:
        return self._begins_at > -math.inf and self._now() < self._begins_at

    def begin(self) -> None:
        """Whether this node can be dialled is known: look for neighbours, who make room by that."""
        if self._is_waiting:
            self._begins_at = self._next_learn = self._now()
            for link in list(self._links.values()):
                self._report(link)
            self._on_deadline(self._begins_at)

    def tick(self) -> None:
        """Do what is due."""
        now = self._now()
        if self._nursery is None or self._is_waiting:
            return
        self._begins_at = -math.inf
        if len(self._reported) < len(self._links):
            for link in list(self._links.values()):
                self._report(link)
        if now >= self._next_learn:
            has_enough = len(self.gossip.views.active) >= self.gossip.settings.active_wanted
            self._learn_wait = min(self._learn_wait * 2, LEARN_SECONDS_MAX) if has_enough else LEARN_SECONDS
            self._next_learn = now + self._learn_wait
            contacts = tuple(self._learnable())
            if contacts:
                self.feed(Learned(contacts))
        if now >= self.gossip.deadline:
            self.perform(self.gossip.tick(now))

    def publish(self, document: bytes) -> None:
        """Spread a document that this node has signed. Raises ProtocolViolation when nobody would take it."""
        self.perform(self.gossip.publish(document, self._now()))

    def link_up(self, link: Link) -> None:
        """A verified link stands."""
        self._begins_at = min(self._begins_at, self._now() + PATIENCE_SECONDS)
        if self._is_waiting:
            self._on_deadline(self._begins_at)
            return
        self._report(link)
        if not self.gossip.views.active:
            self._next_learn = min(self._next_learn, self._now() + ALONE_SECONDS)

    def link_down(self, link: Link) -> None:
        """A link is gone."""
        if link.peer.node_id not in self._reported:
            return
        del self._reported[link.peer.node_id]
        self.feed(LinkDown(link.peer.node_id))

    def handle(self, incoming: Incoming) -> bool:
        """Answer one of gossip's requests at once. Raises Refused or ProtocolViolation for the router to answer."""
        if not isinstance(incoming.message, REQUESTS):
            return False
        self._report(incoming.link)
        answer, effects = self.gossip.answer(incoming.link.peer.node_id, incoming.message, self._now())
        incoming.reply(answer)
        self._count("received", incoming.message)
        self._count("sent", answer)
        self.perform(effects)
        return True

    def _report(self, link: Link) -> None:
        node_id = link.peer.node_id
        if node_id not in self._reported and node_id in self._links:
            self._reported[node_id] = None
            self.feed(LinkUp(contact_of(link)))

    def feed(self, event: Event) -> None:
        """Give the machine an event and perform what it wants."""
        self.perform(self.gossip.handle(event, self._now()))

    def perform(self, effects: Sequence[Effect]) -> None:
        """Perform effects in order; those that come of performing follow after them."""
        self._effects.extend(effects)
        if self._is_performing:
            return
        self._is_performing = True
        try:
            while self._effects:
                self._perform(self._effects.popleft())
        finally:
            self._is_performing = False
        self._keep_neighbours()
        self._on_deadline(self.deadline)

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Tell():
                self._tell(effect)
            case Connect():
                self._connect(effect)
            case Violated(node_id, reason):
                self._metrics.add("violations_total", reason.value)
                self._misbehaved(node_id, reason)
            case Disconnect():
                pass  # which links are kept follows from the neighbours there are, below
            case _:
                self.on_news(effect)

    def _tell(self, tell: Tell) -> None:
        def on_answer(answer: Answer) -> None:
            if answer.message is not None:
                self._count("received", answer.message)
                self.feed(Replied(tell.ask_id, answer.message))
            else:
                self.feed(Failed(tell.ask_id, answer.reason if answer.is_refusal else None))

        self._count("sent", tell.message)
        expected = ANSWERS[type(tell.message)]
        self._asker.ask(NodeId(tell.node_id), (), tell.message, expected, tell.timeout_seconds, on_answer)

    def _connect(self, connect: Connect) -> None:
        link = self._links.get(NodeId(connect.node_id))
        if link is not None:
            self.feed(LinkUp(contact_of(link)))
        elif self._nursery is None or self._dials >= DIALS_MAX or not connect.addresses:
            self.feed(NotReached(connect.node_id))
        else:
            self._dials += 1
            self._nursery.start_soon(self._dial, connect)

    async def _dial(self, connect: Connect) -> None:
        node_id = NodeId(connect.node_id)
        try:
            with trio.move_on_after(self.gossip.settings.connect_seconds):
                try:
                    await self._transport.connect(connect.addresses, node_id)
                except PeerError as error:
                    self._keeper.dial_failed(node_id, connect.addresses[0], getattr(error, "reason", None))
        finally:
            self._dials -= 1
        if node_id not in self._links:
            self.feed(NotReached(connect.node_id))

    def _keep_neighbours(self) -> None:
        """Keep a link with exactly those that are neighbours now."""
        active = self.gossip.views.active
        if active.keys() == self._kept.keys():
            return
        for node_id in [each for each in self._kept if each not in active]:
            del self._kept[node_id]
            self._keeper.release(node_id, Why.GOSSIP)
        for peer in active:
            if NodeId(peer) not in self._kept:
                self._kept[NodeId(peer)] = None
                self._keeper.keep(NodeId(peer), Why.GOSSIP)

    def _count(self, way: str, message: Message) -> None:
        self._metrics.add("gossip_bytes_total", way, _size(message))


def _size(message: Any) -> int:
    """Give the bytes of a message's packed parts, which are nearly all of it; encoding it twice to know would cost more."""
    size = 8
    for name in message.__struct_fields__:
        value = getattr(message, name)
        if isinstance(value, bytes):
            size += len(value)
        elif name == "documents":
            size += sum(map(len, value))
        elif name == "sample":
            size += sum(48 + sum(map(len, contact.addresses)) for contact in value)
    return size
