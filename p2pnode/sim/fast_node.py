"""One node of the fast driver: the real discovery machines and what keeps them going, without trio, sessions or a disk.

What a `DiscoveryService` does around the machines is done here again in the plain: entering the network, entering it again,
trying lost peers, publishing own records. The machines themselves are the very same objects.
"""

import math
from collections.abc import Callable
from typing import Any, Final

from p2pnode.crypto.keys import Identity
from p2pnode.discovery.dht.asks import Effect
from p2pnode.discovery.dht.kademlia import Kademlia
from p2pnode.discovery.dht.republishing import RepublishSchedule, RepublishSettings
from p2pnode.discovery.gossip.gossip import OfferGossip
from p2pnode.discovery.records.record import make_record
from p2pnode.sim.driver import NodeOptions
from p2pnode.store.records import OwnRecordRow
from p2pnode.wire.messages.discovery import Contact, Record

# The role is found out by dial-back, which takes some round trips after the first contact.
ROLE_SECONDS: Final = 1.0
JOIN_SECONDS: Final = 2.0
JOIN_SECONDS_MAX: Final = 120.0
# One peer that was lost is tried every so often, so that a healed partition is noticed; entering by it is spaced.
PROBE_SECONDS: Final = 30.0
AGAIN_SECONDS: Final = 5.0
# Peers that answered once and are remembered across crashes; of these, those that answer no longer.
BOOK_MAX: Final = 64
LOST_MAX: Final = 32
ENTRY_POINTS_MAX: Final = 12
# How often the gossip machine is told of servers in the routing table.
LEARN_SECONDS: Final = 30.0
LEARNED_MAX: Final = 8
# An offer lives for half an hour and is signed anew at half of it.
OFFER_SECONDS: Final = 1800.0

UP: Final = 0
CRASHED: Final = 1
LEFT: Final = 2


class Link:
    """An open connection between two nodes. used_at: when something passed last."""

    __slots__ = ("used_at",)

    def __init__(self, used_at: float) -> None:
        self.used_at = used_at


class FastNode:
    """The state of one node. epoch: grows with every start, so that answers to an earlier life are dropped.

    wall: what to add to virtual seconds to get this node's Unix time. book: lives on over crashes, like rows: its disk.
    """

    __slots__ = (
        "book", "callbacks", "contact", "dht", "entry_points", "entry_wait", "epoch", "gossip", "group", "hidden",
        "identity_seed", "index", "last_again", "last_entry", "links", "lost", "name", "next_entry", "next_learn", "next_offer",
        "next_probe", "offer_bytes", "offer_sequence", "options", "place", "role_at", "rows", "schedule", "state", "tick_at",
        "wall", "wants_entry",
    )  # fmt: skip

    def __init__(self, index: int, options: NodeOptions, contact: Contact, identity_seed: bytes, place: Any, wall: float) -> None:
        self.index = index
        self.name = f"n{index}"
        self.options = options
        self.contact = contact
        # A node that nobody can connect to has an address all the same; it only leads nowhere.
        self.hidden = Contact(contact.node_id, ())
        self.identity_seed = identity_seed
        self.place = place
        self.wall = wall + options.skew_seconds
        self.state = LEFT
        self.epoch = 0
        self.group = 0
        self.links: dict[int, Link] = {}
        self.entry_points: tuple[Contact, ...] = ()
        self.book: dict[bytes, Contact] = {}
        self.lost: dict[bytes, Contact] = {}
        self.rows: list[OwnRecordRow] = []
        self.offer_bytes = options.offer_bytes
        self.offer_sequence = 0
        self.dht: Kademlia
        self.gossip: OfferGossip | None = None
        self.schedule: RepublishSchedule | None = None
        self.callbacks: dict[int, Callable[[Any], None]] = {}
        self.reset()

    def reset(self) -> None:
        """Forget what a crash loses."""
        self.callbacks.clear()
        self.links.clear()
        self.schedule = None
        self.gossip = None
        self.tick_at = math.inf
        self.wants_entry = False
        self.entry_wait = JOIN_SECONDS
        self.last_entry = self.last_again = -math.inf
        self.next_entry = self.next_probe = self.next_learn = self.next_offer = self.role_at = math.inf

    @property
    def is_server(self) -> bool:
        """Whether this node serves the hash table."""
        return self.state == UP and self.dht.is_server

    def deadline(self) -> float:
        """When something is due, virtual seconds."""
        due = min(self.dht.deadline - self.wall, self.next_probe, self.role_at)
        if self.wants_entry and self.next_entry < due:
            due = self.next_entry
        if self.schedule is not None:
            due = min(due, self.schedule.deadline - self.wall)
        if self.gossip is not None:
            due = min(due, self.gossip.deadline - self.wall, self.next_learn, self.next_offer)
        return due

    # --- the hash table -----------------------------------------------------------------------------------------------

    def met(self, contact: Contact) -> None:
        """A node answered: remember it as a way back, the latest last."""
        node_id = contact.node_id
        self.lost.pop(node_id, None)
        book = self.book
        if book.pop(node_id, None) is None and len(book) >= BOOK_MAX:
            del book[next(iter(book))]
        book[node_id] = contact

    def missed(self, contact: Contact) -> None:
        """A node that answered once does so no longer: it may be back one day, or on the other side of a cut."""
        if contact.node_id in self.book and contact.node_id not in self.lost:
            if len(self.lost) >= LOST_MAX:
                del self.lost[next(iter(self.lost))]
            self.lost[contact.node_id] = contact

    def lost_peer(self, uniform: float) -> Contact | None:
        """Give one of those by chance."""
        lost = list(self.lost.values())
        return lost[int(uniform * len(lost))] if lost else None

    def ways_in(self) -> list[Contact]:
        """Give contacts to enter the network by: remembered peers, newest first, and the configured ones."""
        remembered = list(self.book.values())[: -ENTRY_POINTS_MAX // 2 : -1]
        known = dict.fromkeys(contact.node_id for contact in remembered)
        return [*remembered, *(contact for contact in self.entry_points if contact.node_id not in known)][:ENTRY_POINTS_MAX]

    def need_entry(self, now: float) -> None:
        """Too few contacts are left: enter, spaced so that a network that is gone costs little."""
        if not self.wants_entry:
            self.wants_entry = True
            self.next_entry = max(self.last_entry + JOIN_SECONDS, now)

    def enter(self, now: float) -> list[Effect]:
        """Enter the network if that is still needed."""
        if not self.dht.needs_bootstrap:
            self.wants_entry, self.entry_wait = False, JOIN_SECONDS
            return []
        self.last_entry = now
        self.next_entry = now + self.entry_wait
        self.entry_wait = min(JOIN_SECONDS_MAX, self.entry_wait * 2)
        return self.dht.bootstrap(self.ways_in(), now + self.wall)

    def role_is_known(self, now: float) -> list[Effect]:
        """Dial-back has shown whether others can reach this node."""
        self.role_at = math.inf
        was = self.dht.is_server
        self.dht.is_server = self.options.is_reachable
        if self.gossip is not None:
            self.gossip.moved(self.shown, is_server=self.options.is_reachable)
        if self.wants_entry:
            self.next_entry = max(self.last_entry + JOIN_SECONDS, now)
            return []
        if self.dht.is_server and not was:
            return self.dht.find_node(self.contact.node_id, now + self.wall)[1]
        return []

    @property
    def shown(self) -> Contact:
        """What others learn of this node: without addresses if it cannot be reached."""
        return self.contact if self.options.is_reachable else self.hidden

    # --- own records --------------------------------------------------------------------------------------------------

    def records(self, uniform: Callable[[], float], network_id: bytes, life_seconds: float, now: float) -> RepublishSchedule:
        """Give the schedule that keeps this node's records published; made when the first one is put."""
        if self.schedule is None:
            identity = Identity(self.identity_seed)

            def sign(record: Record) -> bytes:
                return make_record(identity, network_id, record).data

            settings = RepublishSettings(life_seconds=life_seconds)
            self.schedule = RepublishSchedule(sign, settings, uniform, self.rows, now + self.wall)
        return self.schedule

    def save(self, row: OwnRecordRow) -> None:
        """Put a row on disk."""
        self.rows = [*(other for other in self.rows if other.salt != row.salt), row]
