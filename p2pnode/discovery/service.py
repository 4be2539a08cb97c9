"""Finds peers, keeps the links worth keeping, and answers who is where: the discovery of record, wired together.

Sources of peers are mDNS, the owner's lists, the book on disk and the hash table. Pure machines decide (`peers.book`, `links`,
`kademlia`, `roles`, `gossip`); the services below this one give them links and answers; this one holds the timer they share.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any, Final, Protocol

import trio

from p2pnode.crypto.keys import Identity
from p2pnode.discovery.dht.asker import Asker
from p2pnode.discovery.dht.asks import LookupOutcome
from p2pnode.discovery.dht.own_records import OwnRecords
from p2pnode.discovery.dht.publishing import Publication
from p2pnode.discovery.dht.service import CONTACT_ADDRESSES_MAX, DhtService, contact_of
from p2pnode.discovery.dht.service import REQUESTS as DHT_REQUESTS
from p2pnode.discovery.gossip.events import Compare
from p2pnode.discovery.gossip.gossip import REQUESTS as GOSSIP_REQUESTS
from p2pnode.discovery.gossip.gossip import OfferGossip
from p2pnode.discovery.gossip.items import Check
from p2pnode.discovery.gossip.service import GossipService
from p2pnode.discovery.gossip.settings import GossipSettings
from p2pnode.discovery.known_peers import KnownPeers
from p2pnode.discovery.peers.dial_back import DialBackService
from p2pnode.discovery.peers.entry import SOURCE_BOOTSTRAP, SOURCE_MDNS, SOURCE_STATIC, Heard
from p2pnode.discovery.peers.introductions import Introductions
from p2pnode.discovery.peers.link_keeper import LinkKeeper
from p2pnode.discovery.peers.mdns import Announcement, MdnsService, Sighting, reachable_addresses
from p2pnode.discovery.peers.roles import Roles, RoleSettings
from p2pnode.discovery.peers.view import PeerView, view_of
from p2pnode.discovery.reaching import Reaching
from p2pnode.discovery.records.address_record import ADDRESS_SALT, encode_addresses
from p2pnode.discovery.settings import DiscoverySettings, KademliaSettings
from p2pnode.environment import Environment
from p2pnode.ids import NodeId
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.transport.link import Link
from p2pnode.transport.requests import Incoming
from p2pnode.transport.service import TransportService
from p2pnode.wire.messages.discovery import Contact, DialBack, Introduction, WhoAreYou
from p2pnode.wire.registry import Message
from p2pnode.wire.version import PROTOCOL_VERSION

REQUESTS: Final[tuple[type[Message], ...]] = (WhoAreYou, DialBack, *DHT_REQUESTS, *GOSSIP_REQUESTS)
ROLE_SERVER: Final = "server"
ROLE_CLIENT: Final = "client"
# A node's address record can wait until the network has settled down after whatever made it join.
ADDRESS_DELAY_SECONDS: Final = 30.0
# How long a pause between two turns of the timer is at least.
TURN_SECONDS: Final = 0.001


class Mdns(Protocol):
    """A source of sightings; the simulation has none."""

    status: Any
    identity_elsewhere: str

    async def run(
        self, sightings: trio.MemorySendChannel[Sighting], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Report sightings until cancelled."""
        ...


class _Timed(Protocol):
    """A part of discovery that wants a turn at certain times, in seconds of Unix time."""

    @property
    def deadline(self) -> float:
        """When `tick` should run next."""
        ...

    def tick(self) -> None:
        """Do what is due; cheap when nothing is."""
        ...


class _Part(Protocol):
    """A part of discovery that works in this service's nursery."""

    def start(self, nursery: trio.Nursery | None) -> None:
        """Work in this nursery from now on; None ends that."""
        ...


MdnsFactory = Callable[[Announcement, DiscoverySettings, Metrics], Mdns]


class DiscoveryService:
    """Knows peers, keeps links, stores and finds records, and spreads the word about ourselves.

    mdns: None where there is no local network. kademlia: the hash table's protocol numbers. address_hints: more addresses of a
    peer, from layers above.
    """

    def __init__(
        self,
        environment: Environment,
        settings: DiscoverySettings,
        network_id: bytes,
        identity: Identity,
        transport: TransportService,
        metrics: Metrics,
        mdns: MdnsFactory | None = MdnsService,
        kademlia: KademliaSettings | None = None,
        check_offer: Check | None = None,
    ) -> None:
        clock = environment.clock
        self.address_hints: Callable[[NodeId], Iterable[str]] = lambda node_id: ()
        self._environment = environment
        self._settings = settings
        self._network_id = network_id
        self._identity = identity
        self._transport = transport
        self._metrics = metrics
        self._mdns_factory = mdns
        self._mdns: Mdns | None = None
        self._monotonic = clock.monotonic
        self._clock_offset = clock.wall_ms() / 1000 - clock.monotonic()
        self._sleep = trio.CancelScope()
        self._wakes_at = -math.inf
        self._timed: list[_Timed] = []
        self._address_at = math.inf
        self._nursery: trio.Nursery | None = None
        self._build(kademlia or KademliaSettings())
        self.gossip: OfferGossip | None = None
        self.offers: GossipService | None = None
        if check_offer is not None:
            self._build_gossip(check_offer)

    def _build(self, kademlia: KademliaSettings) -> None:
        environment, settings, metrics, transport = self._environment, self._settings, self._metrics, self._transport
        self.keeper = LinkKeeper(
            self._identity.node_id, environment, settings, transport, metrics, self.now, self._deadline_is
        )  # fmt: skip
        self.roles = Roles(RoleSettings(confirmations=settings.confirmations), environment.entropy.uniform)
        self.asker = Asker(
            self.now, transport, metrics, settings.ask_dials_max, self.keeper.dial_failed, self.misbehaved, self._deadline_is
        )  # fmt: skip
        self.hash_table = DhtService(
            environment, self._identity, self._network_id, kademlia, self.asker, metrics, self.now,
            lambda: self._known.contacts(), self._deadline_is, self.keeper.need_entry,
        )  # fmt: skip
        self.dht = self.hash_table.dht
        self._known = KnownPeers(
            transport, self.dht, lambda: self.keeper.book, self.now, lambda node_id: self.address_hints(node_id)
        )  # fmt: skip
        self.own_records = OwnRecords(
            environment, self._identity, self._network_id, self.hash_table, metrics, self.now, self._deadline_is
        )  # fmt: skip
        self.introductions = Introductions(environment.clock, self.roles, self.now, self.keeper.handle, self.misbehaved)
        self.dial_back = DialBackService(
            environment, self.roles, transport, metrics,
            dials_private=settings.dials_private, now=self.now, candidates=self._known.candidates, meet=self._meet,
            misbehaved=self.misbehaved, on_role=self._role_is,
        )  # fmt: skip
        self._reaching = Reaching(
            self._network_id, transport, self.now, self._known.addresses, self.find_node, self.get_record
        )  # fmt: skip
        self.keeper.on_kept = self._introduce
        self.keeper.on_found_again = self._found_again
        self.keeper.on_review = self._review
        self.keeper.is_server = lambda node_id: node_id in self.dht.table

    def _build_gossip(self, check: Check) -> None:
        uniform = self._environment.entropy.uniform
        self.gossip = OfferGossip(Contact(self._identity.node_id, ()), GossipSettings(), uniform, check, self.now())
        self.offers = GossipService(
            self.gossip, self.asker, self.keeper, self._transport, self._metrics, self.now, self._known.servers,
            self.misbehaved, self._deadline_is,
        )  # fmt: skip

    # --- running -----------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Load the book, then find peers and serve them until cancelled; that saves the book and leaves links alone."""
        await self.keeper.load()
        await self.own_records.load()
        self.refresh_addresses()
        parts: list[_Part] = [self.keeper, self.asker, self.dial_back, self.own_records]
        if self.offers is not None:
            parts.append(self.offers)
        self._timed = [self.asker, self.keeper, self.dial_back, self.hash_table, self.own_records]
        if self.offers is not None:
            self._timed.append(self.offers)
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for part in parts:
                    part.start(nursery)
                await self._start_mdns(nursery)
                self.hash_table.enter()
                self.roles.peer_met(self.now())
                task_status.started()
                await self._keep_time()
        finally:
            self._nursery = None
            for part in parts:
                part.start(None)
            with trio.move_on_after(2, shield=True):
                await self.keeper.save()

    async def _keep_time(self) -> None:
        """The one timer of discovery: everything that is due, in a fixed order."""
        while True:
            self._wakes_at = -math.inf
            for part in self._timed:
                part.tick()
            self._publish_address()
            wakes_at = self._address_at
            for part in self._timed:
                wakes_at = min(wakes_at, part.deadline)
            self._wakes_at = wakes_at
            wait = max(wakes_at - self.now(), TURN_SECONDS)
            with trio.CancelScope(deadline=trio.current_time() + wait) as self._sleep:
                await trio.sleep_forever()

    def _deadline_is(self, deadline: float) -> None:
        """Some part wants its turn at this time: sleep no longer than that. Cheap, because nearly every ask says so."""
        if deadline < self._wakes_at:
            self._wakes_at = deadline
            self._sleep.deadline = trio.current_time() + max(deadline - self.now(), TURN_SECONDS)

    def now(self) -> float:
        """Give seconds of Unix time that never jump: the wall clock at the start plus what passed since."""
        return self._monotonic() + self._clock_offset

    async def _start_mdns(self, nursery: trio.Nursery) -> None:
        if self._mdns_factory is None:
            return
        announcement = Announcement(self._identity.node_id, self._network_id, PROTOCOL_VERSION, self._transport.bound_addresses)
        if not announcement.listen_addresses:
            return
        self._mdns = self._mdns_factory(announcement, self._settings, self._metrics)
        send, receive = trio.open_memory_channel[Sighting](self._settings.mdns_events_max)
        await nursery.start(self._mdns.run, send)
        nursery.start_soon(self._take_sightings, receive)

    async def _take_sightings(self, receive: trio.MemoryReceiveChannel[Sighting]) -> None:
        async with receive:
            async for sighting in receive:
                self.keeper.handle(Heard(sighting.node_id, sighting.addresses, SOURCE_MDNS))

    # --- nodes, records, providers -----------------------------------------------------------------------------------

    async def find_node(self, target: bytes) -> LookupOutcome:
        """Give the nodes nearest to a target that answer. target: 32 bytes, an id or a key."""
        return await self.hash_table.find_node(target)

    async def get_record(self, key: bytes) -> LookupOutcome:
        """Give the newest record under a key as `outcome.record`, a checked envelope; empty when nobody has one."""
        return await self.hash_table.find_record(key)

    async def publish(self, salt: bytes, value: bytes, life_seconds: float | None = None) -> Publication:
        """Publish a record of this node and keep it published, across restarts too; says how many nodes took it.

        Raises InputError for what no node takes. Cancelled: the record stays among those that are kept published.
        """
        return await self.own_records.publish(salt, value, life_seconds)

    async def provide(self, key: bytes) -> Publication:
        """Say near a key that this node provides what it names; holds for half an hour. Says how many nodes took it."""
        return await self.hash_table.provide(key)

    async def find_providers(self, key: bytes) -> LookupOutcome:
        """Give who says that they provide what a key names, as `outcome.providers`."""
        return await self.hash_table.find_providers(key)

    async def reach(self, node_id: NodeId) -> Link:
        """Give the open link with a node, or open one by what is known, a lookup, or its record. Raises Unreachable."""
        return await self._reaching.reach(node_id)

    # --- from the transport and the router ---------------------------------------------------------------------------

    def link_up(self, link: Link) -> None:
        """Take the transport's news of a verified link; one with a banned peer is closed."""
        if not self.keeper.link_up(link):
            return
        self.hash_table.link_up(link)
        if self.offers is not None:
            self.offers.link_up(link)
        self.roles.peer_met(self.now())
        self._deadline_is(self.dial_back.deadline)

    def link_down(self, link: Link, reason: Reason) -> None:
        """Take the transport's news of a link's end."""
        self.introductions.link_down(link.peer.node_id)
        self.keeper.link_down(link, reason)
        if self.offers is not None:
            self.offers.link_down(link)

    def misbehaved(self, node_id: bytes, reason: Reason) -> None:
        """Lower a peer's score for a violation; some causes ban it for a while and close the link."""
        self.keeper.misbehaved(NodeId(node_id), reason)

    def handle(self, incoming: Incoming) -> bool:
        """Answer one of `REQUESTS`; False for any other message. Raises Refused or ProtocolViolation for the router."""
        message = incoming.message
        if isinstance(message, WhoAreYou):
            incoming.reply(
                Introduction(
                    node_id=self._identity.node_id,
                    addresses=self.own_addresses()[:8],
                    seen_address=incoming.link.peer.seen_address[:64],
                    role=ROLE_SERVER if self.roles.is_server else ROLE_CLIENT,
                    time_ms=self._environment.clock.wall_ms(),
                )
            )
            return True
        if isinstance(message, DHT_REQUESTS):
            return self.hash_table.handle(incoming)
        if self.offers is not None and self.offers.handle(incoming):
            return True
        return self.dial_back.handle(incoming)

    # --- the owner's wishes ------------------------------------------------------------------------------------------

    def is_banned(self, node_id: bytes) -> bool:
        """Say whether a peer is banned now."""
        return self.keeper.book.is_banned(node_id, self.now())

    def unban(self, node_id: bytes) -> None:
        """Lift a ban by the owner's wish."""
        self.keeper.unban(NodeId(node_id))

    def add_peer(self, text: str, *, is_bootstrap: bool = False) -> None:
        """Remember `host:port` or `node-…@host:port` until the next start: to keep a link with, or to enter by when needed.

        Raises ConfigError.
        """
        self.keeper.add(text, SOURCE_BOOTSTRAP if is_bootstrap else SOURCE_STATIC)

    def apply(self, settings: DiscoverySettings) -> None:
        """Use new limits and peers from now on; mDNS and interface choices take effect at the next start."""
        self._settings = settings
        self.asker.dials_max = settings.ask_dials_max
        self.roles.apply(RoleSettings(confirmations=settings.confirmations))
        self.keeper.apply(settings)

    # --- what is known -----------------------------------------------------------------------------------------------

    @property
    def duplicate_identity(self) -> bool:
        """Whether another process was met that runs on this identity."""
        return self.keeper.duplicate_identity

    def own_addresses(self) -> tuple[str, ...]:
        """Give the addresses others may reach this node at; a wildcard stands for every real interface."""
        return reachable_addresses(self._transport.addresses, self._settings)

    def refresh_addresses(self) -> None:
        """Look again at where this node is, for its contact and for what peers are asked to try."""
        own = self.own_addresses()
        self.roles.set_addresses(own, self.now())
        best = dict.fromkeys((*self.roles.confirmed, *own))
        contact = Contact(self._identity.node_id, tuple(best)[:CONTACT_ADDRESSES_MAX])
        if contact != self.dht.own:
            self.dht.own = contact
            self._publish_address_soon()
        if self.gossip is not None:
            reachable = contact if self.roles.is_server else Contact(contact.node_id, ())
            self.gossip.moved(reachable, is_server=self.roles.is_server)

    def peers(self) -> list[PeerView]:
        """Give every known peer, most recently reached first."""
        book, links, now = self.keeper.book, self._transport.links(), self.now()
        return [
            view_of(
                entry, links.get(entry.node_id), book.score(entry.node_id, now),
                tuple(why.value for why in self.keeper.plan.reasons(entry.node_id)), self.dht.why(entry.node_id), now,
            )
            for entry in book.entries()
        ]  # fmt: skip

    def status(self) -> dict[str, Any]:
        """Give how finding peers goes, with the reason and what to do where it does not."""
        mdns = asdict(self._mdns.status) if self._mdns is not None else {"state": "off", "reason": "", "advice": ""}
        return {
            "mdns": mdns,
            "role": ROLE_SERVER if self.roles.is_server else ROLE_CLIENT,
            "peers_known": len(self.keeper.book),
            "peers_connected": len(self._transport.links()),
            "table_entries": len(self.dht.table),
            "network_size": round(self.dht.network_size()),
            "own_addresses": list(self.own_addresses()),
            "seen_as": list(self.roles.seen_addresses[:3]),
            "reached_at": list(self.roles.confirmed),
            "duplicate_identity": self.duplicate_identity or (self._mdns is not None and bool(self._mdns.identity_elsewhere)),
        }

    # --- within ------------------------------------------------------------------------------------------------------

    def _introduce(self, link: Link) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(self.introductions.ask, link)

    async def _meet(self, node_id: NodeId) -> Link:
        """Give an open link with a peer that has introduced itself. Raises PeerError."""
        link = await self._transport.connect(self._known.addresses(node_id), node_id)
        await self.introductions.ask(link)
        return link

    def _review(self) -> None:
        """Every half minute: this machine may have moved, and the gauges should be true."""
        was = self.roles.is_server
        self.refresh_addresses()
        if self.roles.is_server != was:
            self._role_is()
        self._metrics.set("table_entries", len(self.dht.table))
        self._metrics.set("network_size", self.dht.network_size())

    def _role_is(self) -> None:
        """The roles machine has decided, or changed its mind."""
        self._metrics.set("server_role", float(self.roles.is_server))
        self.refresh_addresses()
        self.hash_table.role_is(self.roles.is_server)
        if self.offers is not None:
            self.offers.begin()
        self._publish_address_soon()

    def _publish_address_soon(self) -> None:
        if self._settings.publish_address:
            wait = ADDRESS_DELAY_SECONDS * (0.5 + self._environment.entropy.uniform())
            self._address_at = min(self._address_at, self.now() + wait)

    def _found_again(self, node_id: NodeId) -> None:
        """A lost peer is back: whoever is on its side of a healed partition is asked where we are."""
        link = self._transport.links().get(node_id)
        if link is not None:
            self._metrics.add("peers_found_again_total")
            self.hash_table.enter_again(contact_of(link))
            if self.offers is not None:
                self.offers.feed(Compare(node_id))

    def _publish_address(self) -> None:
        if self.now() < self._address_at or self._nursery is None:
            return
        self._address_at = math.inf
        own = tuple(dict.fromkeys((*self.roles.confirmed, *self.own_addresses())))
        value = encode_addresses(own, self.roles.is_server, not self._settings.dials_private)
        self._nursery.start_soon(self.own_records.publish_quietly, ADDRESS_SALT, value)
