"""Who this node gossips with: a few neighbours it is connected to, and a reserve of peers it could connect to.

After HyParView (Leitão, Pereira, Rodrigues 2007): a small active view, symmetric because both ends must agree, repaired at once
from a larger passive view that is kept fresh by exchanging samples. Only peers that can be dialled enter the passive view;
a node that nobody can dial has its neighbours among those, which is why they take in more of such nodes.

Samples are strangers' words: they only say whom to try, a handshake says who is there. At most two neighbours are of one
network (/24), so that one operator cannot surround a node cheaply.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf
from typing import Final, TypeVar

from p2pnode.discovery.diversity import contact_group
from p2pnode.discovery.gossip.events import Connect, Disconnect
from p2pnode.discovery.gossip.settings import GossipSettings
from p2pnode.wire.messages.discovery import Contact
from p2pnode.wire.messages.gossip import SAMPLE_MAX, Neighbour, Neighbours

JOIN: Final = "join"
URGENT: Final = "urgent"
LEAVE: Final = "leave"
SHUFFLE: Final = "shuffle"
PER_GROUP_MAX: Final = 2
# Below this a node is badly connected and tries a new peer every second instead of every ten.
COMFORT: Final = 3
TRY_SECONDS: Final = 1.0
TRY_AT_EASE_SECONDS: Final = 10.0
AGAIN_SECONDS: Final = 60.0
Element = TypeVar("Element")


@dataclass(frozen=True, slots=True)
class Wish:
    """Effect: send a Neighbour message on the open link to this peer; its end is `answered` or `unanswered`."""

    node_id: bytes
    message: Neighbour


@dataclass(frozen=True, slots=True)
class Joined:
    """Effect: this peer is a neighbour now. by_us: whether this node asked for it."""

    node_id: bytes
    by_us: bool


@dataclass(frozen=True, slots=True)
class Left:
    """Effect: this peer is a neighbour no longer."""

    node_id: bytes


ViewEffect = Connect | Disconnect | Wish | Joined | Left


class Views:
    """The two views of one node. active: neighbours. passive: others that could be dialled. linked: every open link.

    own: this node and where it can be dialled; is_server: whether it can.
    """

    def __init__(self, own: Contact, settings: GossipSettings, uniform: Callable[[], float], now: float) -> None:
        self.own = own
        self.is_server = bool(own.addresses)
        self.active: dict[bytes, Contact] = {}
        self.passive: dict[bytes, Contact] = {}
        self.linked: dict[bytes, Contact] = {}
        self._settings = settings
        self._uniform = uniform
        self._trying: dict[bytes, float] = {}
        self._turned_down: dict[bytes, float] = {}
        self._next_try = now
        self._next_shuffle = now + settings.shuffle_seconds * uniform()

    @property
    def deadline(self) -> float:
        """When `tick` should run next."""
        due = self._next_shuffle if self.active else inf
        if self._trying:
            return min(due, *self._trying.values())
        if self._next_try < due and self._is_short() and (self.passive or len(self.linked) > len(self.active)):
            due = self._next_try
        return due

    def learn(self, contacts: Iterable[Contact]) -> None:
        """Take hints of peers that can be dialled; when the view is full, a random older hint gives way."""
        for contact in contacts:
            node_id = contact.node_id
            if not contact.addresses or node_id == self.own.node_id or node_id in self.active:
                continue
            if node_id not in self.passive and len(self.passive) >= self._settings.passive_max:
                del self.passive[self._pick(list(self.passive))]
            self.passive[node_id] = contact

    def link_up(self, contact: Contact, now: float) -> list[ViewEffect]:
        """A link stands; if it was wanted, ask for neighbourhood."""
        node_id = contact.node_id
        self.linked[node_id] = contact
        self.learn((contact,))
        if node_id in self._trying:
            return [self._ask(node_id, now)]
        if not self.active:
            self._next_try = min(self._next_try, now)
        return []

    def link_down(self, node_id: bytes, now: float) -> list[ViewEffect]:
        """A link is gone, and with it a neighbour."""
        self.linked.pop(node_id, None)
        self._trying.pop(node_id, None)
        return self._lose(node_id, now)

    def not_reached(self, node_id: bytes) -> list[ViewEffect]:
        """A dial failed: the hint was worth nothing."""
        self._trying.pop(node_id, None)
        self.passive.pop(node_id, None)
        return []

    def answered(self, node_id: bytes, wish: str, reply: Neighbours, now: float) -> list[ViewEffect]:
        """Take a peer's answer to a wish."""
        self.learn(reply.sample[:SAMPLE_MAX])
        if wish == LEAVE:
            return []
        if wish == SHUFFLE:
            return [] if reply.is_neighbour else self._lose(node_id, now)
        self._trying.pop(node_id, None)
        if reply.is_neighbour and node_id in self.linked and node_id not in self.active:
            return self._join(node_id, by_us=True)
        if node_id not in self.active:
            self._turned_down[node_id] = now + AGAIN_SECONDS
            return [] if reply.is_neighbour else [Disconnect(node_id)]
        return []

    def unanswered(self, node_id: bytes, now: float) -> list[ViewEffect]:
        """A wish had no answer: the peer is too slow or too old for this, so look for another."""
        self._trying.pop(node_id, None)
        self.passive.pop(node_id, None)
        self._turned_down[node_id] = now + AGAIN_SECONDS
        return self._lose(node_id, now)

    def stranger(self, node_id: bytes, now: float) -> list[ViewEffect]:
        """A neighbour says that it is none: its goodbye was lost."""
        return self._lose(node_id, now)

    def adopt(self, node_id: bytes, now: float) -> list[ViewEffect]:
        """Make a linked peer a neighbour in somebody's place: it leads to a part that the present neighbours do not know."""
        if node_id in self.active or node_id not in self.linked or node_id in self._trying:
            return []
        effects: list[ViewEffect] = []
        if len(self.active) >= self._settings.active_max:
            effects += self._dismiss(self._pick(list(self.active)))
        self._trying[node_id] = now + self._settings.connect_seconds
        return [*effects, Wish(node_id, Neighbour(URGENT, self.is_server))]

    def asked(self, node_id: bytes, message: Neighbour, now: float) -> tuple[Neighbours, list[ViewEffect]]:
        """Answer a peer's wish."""
        self.learn(message.sample[:SAMPLE_MAX])
        effects: list[ViewEffect] = []
        if message.wish == LEAVE:
            return Neighbours(), self._lose(node_id, now)
        if message.wish in (JOIN, URGENT) and node_id in self.linked and node_id not in self.active:
            limit = self._settings.active_max if message.is_server else self._settings.active_clients_max
            if len(self.active) >= limit and message.wish == URGENT:
                effects += self._dismiss(self._pick(list(self.active)))
            if len(self.active) < limit and self._is_welcome(self.linked[node_id]):
                effects += self._join(node_id, by_us=False)
        is_neighbour = node_id in self.active
        sample = self._sample(node_id) if message.wish == SHUFFLE or not is_neighbour else ()
        return Neighbours(is_neighbour, sample), effects

    def tick(self, now: float) -> list[ViewEffect]:
        """Look for a neighbour if there are too few, and exchange samples when it is time."""
        effects: list[ViewEffect] = []
        for node_id in [each for each, deadline in self._trying.items() if deadline <= now]:
            effects += self.not_reached(node_id)
        if now >= self._next_shuffle and self.active:
            self._next_shuffle = now + self._settings.shuffle_seconds * (0.75 + self._uniform() / 2)
            partner = self._pick(list(self.active))
            effects.append(Wish(partner, Neighbour(SHUFFLE, self.is_server, self._sample(partner))))
        if self._is_short() and now >= self._next_try and not self._trying:
            effects += self._try_one(now)
        return effects

    # --- inside -------------------------------------------------------------------------------------------------------

    def _is_short(self) -> bool:
        return len(self.active) < self._settings.active_wanted

    def _try_one(self, now: float) -> list[ViewEffect]:
        at_ease = len(self.active) >= COMFORT
        self._next_try = now + (TRY_AT_EASE_SECONDS if at_ease else TRY_SECONDS) * (0.5 + self._uniform())
        self._turned_down = {node_id: until for node_id, until in self._turned_down.items() if until > now}
        known = dict.fromkeys([*self.passive, *self.linked])
        candidates = [
            node_id
            for node_id in known
            if node_id not in self.active
            and node_id not in self._turned_down
            and self._is_welcome(self.linked.get(node_id) or self.passive[node_id])
        ]
        if not candidates:
            return []
        chosen = self._pick(candidates)
        self._trying[chosen] = now + self._settings.connect_seconds
        if chosen in self.linked:
            return [self._ask(chosen, now)]
        return [Connect(chosen, tuple(self.passive[chosen].addresses))]

    def _ask(self, node_id: bytes, now: float) -> ViewEffect:
        self._trying[node_id] = now + self._settings.connect_seconds
        return Wish(node_id, Neighbour(JOIN if self.active else URGENT, self.is_server))

    def _join(self, node_id: bytes, by_us: bool) -> list[ViewEffect]:
        self._trying.pop(node_id, None)
        self.active[node_id] = self.linked[node_id]
        self.passive.pop(node_id, None)
        return [Joined(node_id, by_us)]

    def _lose(self, node_id: bytes, now: float) -> list[ViewEffect]:
        contact = self.active.pop(node_id, None)
        if contact is None:
            return []
        self.learn((contact,))
        self._turned_down[node_id] = now + AGAIN_SECONDS / 2
        self._next_try = min(self._next_try, now + TRY_SECONDS * self._uniform())
        return [Left(node_id)]

    def _dismiss(self, node_id: bytes) -> list[ViewEffect]:
        contact = self.active.pop(node_id)
        self.learn((contact,))
        return [Left(node_id), Wish(node_id, Neighbour(LEAVE)), Disconnect(node_id)]

    def _is_welcome(self, contact: Contact) -> bool:
        """Two neighbours of one network at most; private addresses and peers without an address are not told apart."""
        group = contact_group(contact)
        return not group or sum(contact_group(other) == group for other in self.active.values()) < PER_GROUP_MAX

    def _sample(self, partner: bytes) -> tuple[Contact, ...]:
        """Give a few dialable peers at random, this node first if it is one."""
        known = [contact for contact in (*self.active.values(), *self.passive.values()) if contact.addresses]
        known = [contact for contact in known if contact.node_id != partner]
        sample = [self.own] if self.is_server and self.own.addresses else []
        while known and len(sample) < SAMPLE_MAX:
            chosen = self._pick(known)
            known.remove(chosen)
            sample.append(chosen)
        return tuple(sample)

    def _pick(self, elements: list[Element]) -> Element:
        return elements[min(int(self._uniform() * len(elements)), len(elements) - 1)]
