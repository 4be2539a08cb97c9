"""Steps gossip machines alone from a heap: no sessions, no signatures, so that a thousand nodes fit into a test.

What a message costs is computed from its encoded size and what a session adds to it. Documents are plain bytes of a chosen
size, checked for shape alone; `check` may be replaced by the market's.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Final

from p2pnode.crypto.noise import TAG_SIZE
from p2pnode.discovery.gossip.events import (
    Arrived,
    Connect,
    Disconnect,
    Effect,
    Event,
    Failed,
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
from p2pnode.discovery.gossip.gossip import OfferGossip
from p2pnode.discovery.gossip.items import Check, Item, Kind, make_item
from p2pnode.discovery.gossip.settings import GossipSettings
from p2pnode.errors import ProtocolViolation, Refused
from p2pnode.reasons import Reason
from p2pnode.sim.chance import seeded
from p2pnode.transport.frames import OPEN_HEADER, RECORD_PREFIX
from p2pnode.wire.codec import NUMBER_SIZE, encode
from p2pnode.wire.messages.discovery import Contact
from p2pnode.wire.registry import Message

# What a session adds to a request or reply that leaves alone: a record's size and tag, a frame's header, the message number.
MESSAGE_OVERHEAD: Final = RECORD_PREFIX + TAG_SIZE + OPEN_HEADER.size + NUMBER_SIZE
# A Noise XX handshake with its payloads, both directions.
HANDSHAKE_BYTES: Final = 700
IDLE_SECONDS: Final = 60.0
DIAL_TIMEOUT_SECONDS: Final = 4.0
DOCUMENT_SIZE: Final = 400
_KINDS: Final = (Kind.OFFER, Kind.WITHDRAWAL, Kind.SUSPICION)
_HEAD_SIZE: Final = 1 + 32 + 32 + 8 + 8 + 8 + 1


def plain_document(
    kind: Kind, publisher: bytes, subject: bytes, sequence: int, about: int, expires_ms: int, address: str = "",
    size: int = DOCUMENT_SIZE,
) -> bytes:  # fmt: skip
    """Give an unsigned stand-in for a document of about this size in bytes."""
    text = address.encode()
    numbers = b"".join(number.to_bytes(8, "big") for number in (sequence, about, expires_ms))
    return (bytes((_KINDS.index(kind),)) + publisher + subject + numbers + bytes((len(text),)) + text).ljust(size, b"\0")


def plain_check() -> Check:
    """Give a check of stand-ins that remembers what it has seen, so that all nodes share one item."""
    known: dict[bytes, Item] = {}

    def check(data: bytes, now_ms: int) -> Item:
        item = known.get(data)
        if item is None:
            if len(data) < _HEAD_SIZE or data[0] >= len(_KINDS):
                raise ProtocolViolation(Reason.BAD_SIGNATURE, "no document")
            sequence, about, expires_ms = (int.from_bytes(data[at : at + 8], "big") for at in (65, 73, 81))
            address = data[90 : 90 + data[89]].decode()
            item = make_item(
                _KINDS[data[0]], data[1:33], data[33:65], sequence, about, expires_ms, data, (address,) if address else ()
            )  # fmt: skip
            known[data] = item
        if item.expires_ms <= now_ms:
            raise ProtocolViolation(Reason.EXPIRED, "the document")
        return item

    return check


@dataclass(slots=True)
class SwarmNode:
    """One node: its machine, its links (peer index -> last use), whether it is up, and what it has sent."""

    index: int
    contact: Contact
    machine: OfferGossip
    is_up: bool = True
    is_selling: bool = False
    sequence: int = 0
    links: dict[int, float] = field(default_factory=dict)
    next_tick: float = float("inf")
    asks: dict[int, int] = field(default_factory=dict)
    sent_bytes: int = 0
    handshake_bytes: int = 0
    messages: Counter[str] = field(default_factory=Counter)
    violations: int = 0


class GossipSwarm:
    """Nodes that only gossip. latency: gives seconds one way between two nodes; loss: chance that a message is lost."""

    def __init__(
        self,
        seed: int,
        settings: GossipSettings | None = None,
        latency: Callable[[int, int], float] | None = None,
        loss: float = 0.0,
        offer_seconds: float = 1800.0,
        check: Check | None = None,
        started_at: float = 1_790_000_000.0,
    ) -> None:
        self.now = started_at
        self.nodes: list[SwarmNode] = []
        self.loss = loss
        self.random = seeded(seed, "gossip")
        self.settings = settings or GossipSettings()
        self.offer_seconds = offer_seconds
        # Called for every effect that the market would care about: (node, effect).
        self.on_effect: Callable[[SwarmNode, Effect], None] = lambda node, effect: None
        self._latency = latency or (lambda one, other: 0.02 + 0.13 * ((one ^ other) * 2654435761 % 997) / 997)
        self._check = check or plain_check()
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._index_of: dict[bytes, int] = {}
        self._side: dict[int, int] = {}
        self._seed = seed

    # --- building -----------------------------------------------------------------------------------------------------

    def add(self, *, is_server: bool = True, is_selling: bool = True, known: Sequence[int] = ()) -> SwarmNode:
        """Add a node that knows these others; it publishes at once if it sells."""
        index = len(self.nodes)
        node_id = blake2b(f"{self._seed}/{index}".encode(), digest_size=32).digest()
        host = f"{20 + self.random.randrange(70)}.{self.random.randrange(256)}.{self.random.randrange(256)}.7"
        contact = Contact(node_id, (f"{host}:9470",) if is_server else ())
        node = SwarmNode(index, contact, self._machine(contact), is_selling=is_selling)
        self.nodes.append(node)
        self._index_of[node_id] = index
        self._start(node, known)
        return node

    def _machine(self, contact: Contact) -> OfferGossip:
        return OfferGossip(contact, self.settings, self.random.random, self._check, self.now)

    def _start(self, node: SwarmNode, known: Sequence[int]) -> None:
        contacts = tuple(self.nodes[index].contact for index in known)
        self._feed(node, Learned(contacts))
        self._later(0.01, lambda: self._tick(node))
        if node.is_selling:
            self.publish(node.index)
            # Offers are renewed at half-life; the first time at random, as if the nodes had not all started together.
            self._later(self.offer_seconds / 2 * self.random.random(), lambda: self._renew(node, node.machine))

    def _renew(self, node: SwarmNode, machine: OfferGossip) -> None:
        if node.is_up and node.is_selling and node.machine is machine:
            self.publish(node.index)
            self._later(self.offer_seconds / 2, lambda: self._renew(node, machine))

    def _republish(self, node: SwarmNode) -> None:
        if node.is_up and node.is_selling:
            self.publish(node.index)

    # --- what happens to nodes ----------------------------------------------------------------------------------------

    def publish(self, index: int) -> Item:
        """Let a node sign its offer again; gives the item."""
        return self._publish(index, Kind.OFFER)

    def withdraw(self, index: int) -> Item:
        """Let a node take its offer back; gives the item."""
        self.nodes[index].is_selling = False
        return self._publish(index, Kind.WITHDRAWAL)

    def _publish(self, index: int, kind: Kind) -> Item:
        node = self.nodes[index]
        node.sequence += 1
        expires_ms = round((self.now + self.offer_seconds) * 1000)
        address = node.contact.addresses[0] if node.contact.addresses and kind is Kind.OFFER else ""
        size = DOCUMENT_SIZE if kind is Kind.OFFER else 200
        node_id = node.contact.node_id
        data = plain_document(kind, node_id, node_id, node.sequence, node.sequence, expires_ms, address, size)
        self._perform(node, node.machine.publish(data, self.now))
        return self._check(data, round(self.now * 1000))

    def crash(self, index: int, notice_seconds: float = 0.1) -> None:
        """Stop a node at once; its peers notice after this time."""
        node = self.nodes[index]
        node.is_up = False
        for peer in list(node.links):
            self._later(notice_seconds, lambda peer=peer: self._unlink(index, peer))  # type: ignore[misc]

    def restart(self, index: int, known: Sequence[int] = ()) -> None:
        """Start a node again with nothing but its sequence."""
        node = self.nodes[index]
        for peer in list(node.links):
            self._unlink(index, peer)
        node.is_up, node.machine, node.next_tick = True, self._machine(node.contact), float("inf")
        node.asks.clear()
        self._start(node, known)

    def partition(self, sides: Sequence[Sequence[int]]) -> None:
        """Cut the network into these parts; links between them break after a few seconds."""
        self._side = {index: number for number, side in enumerate(sides) for index in side}
        for node in self.nodes:
            for peer in list(node.links):
                if not self._can_talk(node.index, peer):
                    self._later(5.0, lambda one=node.index, other=peer: self._unlink(one, other))  # type: ignore[misc]

    def heal(self) -> None:
        """Let everybody reach everybody again."""
        self._side = {}

    def connect(self, index: int, peer: int) -> None:
        """Link two nodes, whoever wants it."""
        self._dial(self.nodes[index], self.nodes[peer].contact.node_id)

    def feed(self, index: int, event: Event) -> None:
        """Give a node an event from outside."""
        self._feed(self.nodes[index], event)

    # --- running ------------------------------------------------------------------------------------------------------

    def run(self, seconds: float) -> None:
        """Let so much time pass."""
        end = self.now + seconds
        while self._heap and self._heap[0][0] <= end:
            self.now, _, action = heapq.heappop(self._heap)
            action()
        self.now = end

    def run_until(self, condition: Callable[[], bool], seconds: float, step: float = 0.25) -> float:
        """Run until the condition holds; gives the seconds it took, infinite if it took longer than `seconds`."""
        started = self.now
        while not condition():
            if self.now - started >= seconds:
                return float("inf")
            self.run(step)
        return self.now - started

    def holders(self, item: Item) -> int:
        """Give how many nodes that are up hold this item or a newer one at its place."""
        held = (node.machine.store.get(item.key) for node in self.nodes if node.is_up)
        return sum(1 for each in held if each is not None and each.sequence >= item.sequence)

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        """Do something after a while."""
        self._later(seconds, action)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._heap, (self.now + seconds, self._count, action))

    def _feed(self, node: SwarmNode, event: Event) -> None:
        if node.is_up:
            self._perform(node, node.machine.handle(event, self.now))

    def _tick(self, node: SwarmNode) -> None:
        if node.is_up and node.next_tick <= self.now:
            node.next_tick = float("inf")
            self._perform(node, node.machine.tick(self.now))
        elif node.is_up and node.next_tick == float("inf"):
            self._perform(node, node.machine.tick(self.now))

    def _perform(self, node: SwarmNode, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case Tell():
                    self._send(node, effect)
                case Connect(node_id):
                    self._dial(node, node_id)
                case Disconnect(node_id):
                    self._idle(node, self._index_of[node_id])
                case Suspect(publisher, sequence, expires_ms):
                    made = round(self.now * 1000)
                    data = plain_document(Kind.SUSPICION, node.contact.node_id, publisher, made, sequence, expires_ms, size=215)
                    self._perform(node, node.machine.publish(data, self.now))
                case Republish(above):
                    node.sequence = max(node.sequence, above)
                    if node.is_selling:
                        self._later(0.0, lambda: self._republish(node))
                case Violated():
                    node.violations += 1
                case Arrived() | Gone():
                    pass
            self.on_effect(node, effect)
        deadline = max(node.machine.deadline, self.now)
        if deadline < node.next_tick:
            node.next_tick = deadline
            self._later(deadline - self.now, lambda: self._tick(node))

    def _send(self, node: SwarmNode, tell: Tell) -> None:
        peer = self.nodes[self._index_of[tell.node_id]]
        node.sent_bytes += MESSAGE_OVERHEAD + len(encode(tell.message))
        node.messages[type(tell.message).__name__] += 1
        if peer.index not in node.links:
            self._later(0.0, lambda: self._feed(node, Failed(tell.ask_id)))
            return
        node.asks[tell.ask_id] = peer.index
        node.links[peer.index] = peer.links[node.index] = self.now
        self._later(tell.timeout_seconds, lambda: self._fail(node, tell.ask_id))
        if self.random.random() >= self.loss and self._can_talk(node.index, peer.index):
            self._later(self._delay(node.index, peer.index), lambda: self._deliver(node, peer, tell))

    def _deliver(self, node: SwarmNode, peer: SwarmNode, tell: Tell) -> None:
        if not peer.is_up or node.index not in peer.links:
            return
        reply: Message | Reason
        try:
            reply, effects = peer.machine.answer(node.contact.node_id, tell.message, self.now)
        except Refused as error:
            reply, effects = error.reason, []
        except ProtocolViolation as error:
            reply, effects, peer.violations = error.reason, [], peer.violations + 1
        peer.sent_bytes += MESSAGE_OVERHEAD + (20 if isinstance(reply, Reason) else len(encode(reply)))
        if self.random.random() >= self.loss:
            self._later(self._delay(node.index, peer.index), lambda: self._reply(node, tell.ask_id, reply))
        self._perform(peer, effects)

    def _reply(self, node: SwarmNode, ask_id: int, reply: Message | Reason) -> None:
        if node.asks.pop(ask_id, None) is not None:
            self._feed(node, Failed(ask_id, reply) if isinstance(reply, Reason) else Replied(ask_id, reply))

    def _fail(self, node: SwarmNode, ask_id: int) -> None:
        if node.asks.pop(ask_id, None) is not None:
            self._feed(node, Failed(ask_id))

    def _dial(self, node: SwarmNode, node_id: bytes) -> None:
        peer = self.nodes[self._index_of[node_id]]
        if peer.index in node.links:
            self._later(0.0, lambda: self._feed(node, LinkUp(peer.contact)))
            return

        def done() -> None:
            can_dial = bool(peer.contact.addresses) and peer.is_up and node.is_up
            if not can_dial or not self._can_talk(node.index, peer.index):
                self._later(DIAL_TIMEOUT_SECONDS, lambda: self._feed(node, NotReached(node_id)))
                return
            node.handshake_bytes += HANDSHAKE_BYTES
            is_new = peer.index not in node.links
            node.links[peer.index] = peer.links[node.index] = self.now
            if is_new:
                self._feed(peer, LinkUp(node.contact))
                self._watch_idle(node, peer)
            self._feed(node, LinkUp(peer.contact))

        self._later(3 * self._delay(node.index, peer.index), done)

    def _watch_idle(self, node: SwarmNode, peer: SwarmNode) -> None:
        """Close an unused link as the transport does; links between neighbours are pinned."""
        if peer.index not in node.links:
            return
        is_pinned = peer.contact.node_id in node.machine.views.active or node.contact.node_id in peer.machine.views.active
        if not is_pinned and self.now - node.links[peer.index] >= IDLE_SECONDS:
            self._unlink(node.index, peer.index)
        else:
            self._later(IDLE_SECONDS / 2, lambda: self._watch_idle(node, peer))

    def _idle(self, node: SwarmNode, peer: int) -> None:
        if peer in node.links:
            node.links[peer] = min(node.links[peer], self.now - IDLE_SECONDS / 2)

    def _unlink(self, one: int, other: int) -> None:
        for index, peer in ((one, other), (other, one)):
            node = self.nodes[index]
            if node.links.pop(peer, None) is None:
                continue
            self._feed(node, LinkDown(self.nodes[peer].contact.node_id))
            for ask_id in [each for each, asked in node.asks.items() if asked == peer]:
                self._fail(node, ask_id)

    def _can_talk(self, one: int, other: int) -> bool:
        return self._side.get(one, 0) == self._side.get(other, 0)

    def _delay(self, one: int, other: int) -> float:
        return self._latency(one, other) * (0.9 + 0.2 * self.random.random())
