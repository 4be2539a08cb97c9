"""Steps topic machines alone from a heap, with routing tables filled from what the swarm knows.

For questions about adverts by topic in networks of ten thousand nodes and more: how many a search finds, what it costs, how the
load lies on registrars. Links cost nothing here; documents are the stand-ins of `gossip_swarm`.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain

from p2pnode.discovery.gossip.events import Connect, Effect, Failed, Found, LinkUp, NotReached, Replied, Tell, Violated
from p2pnode.discovery.gossip.items import Kind
from p2pnode.discovery.gossip.registrar import Registrar, RegistrarSettings
from p2pnode.discovery.gossip.topics import TopicAdverts
from p2pnode.errors import ProtocolViolation, Refused
from p2pnode.sim.chance import seeded
from p2pnode.sim.gossip_swarm import MESSAGE_OVERHEAD, plain_check, plain_document
from p2pnode.wire.codec import encode
from p2pnode.wire.messages.discovery import Contact


@dataclass(slots=True)
class TopicNode:
    """One node: its machine, its routing table by shared bits with its own id, what it has sent and answered."""

    index: int
    contact: Contact
    table: tuple[tuple[Contact, ...], ...] = ()
    machine: TopicAdverts = field(init=False)
    is_up: bool = True
    next_tick: float = float("inf")
    sent_bytes: int = 0
    answered: int = 0
    violations: int = 0
    sequence: int = 0


class TopicSwarm:
    """N nodes with full tables. latency_seconds: one way, for all."""

    def __init__(
        self, nodes: int, seed: int, settings: RegistrarSettings | None = None, latency_seconds: float = 0.05, k: int = 16
    ) -> None:
        self.now = 1_790_000_000.0
        self.random = seeded(seed, "topics")
        self.latency_seconds = latency_seconds
        self.found: dict[tuple[int, int], Found] = {}
        self._check = plain_check()
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self.nodes = [self._node(seed, index) for index in range(nodes)]
        self._index_of = {node.contact.node_id: node.index for node in self.nodes}
        self._fill_tables(k)
        for node in self.nodes:
            secret = blake2b(node.contact.node_id, digest_size=32).digest()
            registrar = Registrar(settings or RegistrarSettings(), self._check, secret, self.random.random)
            node.machine = TopicAdverts(node.contact, registrar, self._check, self.random.random, self._known(node))

    def _node(self, seed: int, index: int) -> TopicNode:
        node_id = blake2b(f"{seed}/{index}".encode(), digest_size=32).digest()
        address = f"{20 + index // 65536 % 60}.{index // 256 % 256}.{index % 256}.7:9470"
        return TopicNode(index, Contact(node_id, (address,)))

    def _fill_tables(self, k: int) -> None:
        """Give every node k random contacts of each of its buckets, as a long calm would."""
        ordered = sorted(self.nodes, key=lambda node: node.contact.node_id)
        for node in ordered:
            own = int.from_bytes(node.contact.node_id, "big")
            low, high = 0, len(ordered)
            table: list[tuple[Contact, ...]] = []
            for bit in range(255, -1, -1):
                if high - low <= 1:
                    break
                middle = self._first_with(ordered, low, high, (own >> bit | 1) << bit)
                mine, other = ((middle, high), (low, middle)) if own >> bit & 1 else ((low, middle), (middle, high))
                size = other[1] - other[0]
                chosen = range(*other) if size <= k else self.random.sample(range(*other), k)
                table.append(tuple(ordered[index].contact for index in chosen))
                low, high = mine
            node.table = tuple(table)

    @staticmethod
    def _first_with(ordered: Sequence[TopicNode], low: int, high: int, least: int) -> int:
        while low < high:
            middle = (low + high) // 2
            if int.from_bytes(ordered[middle].contact.node_id, "big") < least:
                low = middle + 1
            else:
                high = middle
        return low

    @staticmethod
    def _known(node: TopicNode) -> Callable[[bytes], Iterable[Contact]]:
        own = int.from_bytes(node.contact.node_id, "big")

        def known(place: bytes) -> Iterable[Contact]:
            # All of the bucket that the point is in are nearer to it than this node; all deeper ones exactly as near.
            here = min(256 - (own ^ int.from_bytes(place, "big")).bit_length(), len(node.table))
            return chain.from_iterable((*node.table[here:], *reversed(node.table[:here])))

        return known

    # --- what nodes do ------------------------------------------------------------------------------------------------

    def publish(self, index: int, topics: Sequence[bytes], *, is_withdrawal: bool = False) -> None:
        """Let a node advertise, or take its offer back."""
        node = self.nodes[index]
        node.sequence += 1
        kind = Kind.WITHDRAWAL if is_withdrawal else Kind.OFFER
        node_id, expires_ms = node.contact.node_id, round((self.now + 1800) * 1000)
        data = plain_document(kind, node_id, node_id, node.sequence, node.sequence, expires_ms, node.contact.addresses[0])
        self._perform(node, node.machine.publish(data, self.now, topics))

    def begin_search(self, index: int, topics: Sequence[bytes]) -> tuple[int, int]:
        """Let a node search; gives the key under which `found` will have what comes."""
        node = self.nodes[index]
        search_id, effects = node.machine.search(topics, self.now)
        self._perform(node, effects)
        return index, search_id

    def search(self, index: int, topics: Sequence[bytes], seconds: float = 25.0) -> Found:
        """Let a node search, let so much time pass, and give what it found."""
        key = self.begin_search(index, topics)
        self.run(seconds)
        return self.found[key]

    def run(self, seconds: float) -> None:
        """Let so much time pass."""
        end = self.now + seconds
        while self._heap and self._heap[0][0] <= end:
            self.now, _, action = heapq.heappop(self._heap)
            action()
        self.now = end

    def schedule(self, seconds: float, action: Callable[[], None]) -> None:
        """Do something so many seconds from now."""
        self._count += 1
        heapq.heappush(self._heap, (self.now + seconds, self._count, action))

    def load(self) -> Counter[int]:
        """Give node index -> adverts held."""
        return Counter({node.index: len(node.machine.registrar) for node in self.nodes})

    # --- inside -------------------------------------------------------------------------------------------------------

    def _perform(self, node: TopicNode, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case Tell():
                    self._send(node, effect)
                case Connect(node_id):
                    self._connect(node, self.nodes[self._index_of[node_id]])
                case Found(search_id):
                    self.found[node.index, search_id] = effect
                case Violated():
                    node.violations += 1
        deadline = max(node.machine.deadline, self.now)
        if deadline < node.next_tick:
            node.next_tick = deadline
            self.schedule(deadline - self.now, lambda: self._tick(node))

    def _tick(self, node: TopicNode) -> None:
        if node.next_tick <= self.now and node.is_up:
            node.next_tick = float("inf")
            self._perform(node, node.machine.tick(self.now))

    def _connect(self, node: TopicNode, peer: TopicNode) -> None:
        def done() -> None:
            if not peer.is_up:
                self._perform(node, node.machine.handle(NotReached(peer.contact.node_id), self.now))
                return
            peer.machine.handle(LinkUp(node.contact), self.now)
            self._perform(node, node.machine.handle(LinkUp(peer.contact), self.now))

        self.schedule(3 * self.latency_seconds if peer.is_up else 4.0, done)

    def _send(self, node: TopicNode, tell: Tell) -> None:
        peer = self.nodes[self._index_of[tell.node_id]]
        node.sent_bytes += MESSAGE_OVERHEAD + len(encode(tell.message))

        def arrive() -> None:
            if not peer.is_up:
                self.schedule(
                    tell.timeout_seconds, lambda: self._perform(node, node.machine.handle(Failed(tell.ask_id), self.now))
                )
                return
            peer.answered += 1
            try:
                reply, effects = peer.machine.answer(node.contact.node_id, tell.message, self.now)
            except (Refused, ProtocolViolation) as error:
                failed = Failed(tell.ask_id, error.reason)
                self.schedule(self.latency_seconds, lambda: self._perform(node, node.machine.handle(failed, self.now)))
                return
            peer.sent_bytes += MESSAGE_OVERHEAD + len(encode(reply))
            replied = Replied(tell.ask_id, reply)
            self.schedule(self.latency_seconds, lambda: self._perform(node, node.machine.handle(replied, self.now)))
            self._perform(peer, effects)

        self.schedule(self.latency_seconds, arrive)
