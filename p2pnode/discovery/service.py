"""Finds peers and keeps a link to each: drives the peer book from mDNS, the owner's list and the transport's news.

The DHT joins here as one more source of `Heard` events; nothing else has to change for it.
"""

import ipaddress
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Final, Protocol

import trio

from p2pnode.crypto.keys import Identity
from p2pnode.discovery.interfaces import choose_interfaces
from p2pnode.discovery.mdns import Announcement, MdnsService, Sighting, system_adapters
from p2pnode.discovery.peer_book import (
    SOURCE_BOOK,
    SOURCE_MDNS,
    SOURCE_STATIC,
    Dial,
    DialFailed,
    Disconnect,
    Effect,
    Entry,
    Event,
    Forget,
    Heard,
    LinkDown,
    LinkUp,
    Misbehaved,
    PeerBook,
    Save,
)  # fmt: skip
from p2pnode.discovery.settings import DiscoverySettings
from p2pnode.environment import Environment
from p2pnode.errors import ConfigError, PeerError
from p2pnode.ids import NODE, NodeId, node_text, parse_id, short
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.store import peers as peer_rows
from p2pnode.transport.link import Link
from p2pnode.transport.requests import Incoming
from p2pnode.transport.service import TransportService
from p2pnode.wire.messages.discovery import Introduction, WhoAreYou
from p2pnode.wire.version import PROTOCOL_VERSION

ROLE_SERVER: Final = "server"
SAVE_SECONDS: Final = 1.0
INTRODUCTION_SECONDS: Final = 20.0
SEEN_ADDRESSES_MAX: Final = 16
_STORED_SCORE: Final = 10
_log = logging.getLogger(__name__)


class Mdns(Protocol):
    """A source of sightings; the simulation has none."""

    status: Any
    identity_elsewhere: str

    async def run(
        self, sightings: trio.MemorySendChannel[Sighting], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Report sightings until cancelled."""
        ...


MdnsFactory = Callable[[Announcement, DiscoverySettings, Metrics], Mdns]


@dataclass(frozen=True, slots=True)
class PeerView:
    """One known peer as `net peers` shows it. *_seconds_ago are None for never; score is in [-100, 100]."""

    node_id: NodeId
    connected: bool
    inbound: bool
    addresses: tuple[str, ...]
    sources: tuple[str, ...]
    agent: str
    version: int
    seen_seconds_ago: float
    connected_seconds_ago: float | None
    failures: int
    score: float
    banned_seconds: float
    banned_for: str

    def as_json(self) -> dict[str, Any]:
        """Give it as JSON."""
        return {**asdict(self), "node_id": node_text(self.node_id)}


class DiscoveryService:
    """Keeps the peer book, the links to known peers, and the word about ourselves.

    mdns: None where there is no local network.
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
    ) -> None:
        self._environment = environment
        self._settings = settings
        self._network_id = network_id
        self._identity = identity
        self._transport = transport
        self._metrics = metrics
        self._mdns_factory = mdns
        self._mdns: Mdns | None = None
        self._book = PeerBook(identity.node_id, settings, environment.entropy.uniform)
        self._dirty: dict[NodeId, Entry | None] = {}
        self._wake = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._started_at = 0.0
        self._started_wall = 0.0
        self._own_seen: Counter[str] = Counter()
        self._keys: dict[NodeId, tuple[bytes, str]] = {}
        self.duplicate_identity = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Load the book, then find and dial peers until cancelled; that saves the book and leaves links to the transport."""
        self._started_at = self._environment.clock.monotonic()
        self._started_wall = self._environment.clock.wall_ms() / 1000
        limit = self._settings.peers_max
        rows = await self._environment.database.read(lambda connection: peer_rows.list_peers(connection, limit))
        self._book = PeerBook(
            self._identity.node_id, self._settings, self._environment.entropy.uniform, [self._entry(row) for row in rows]
        )
        self._add_statics(self._settings)
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                await self._start_mdns(nursery)
                task_status.started()
                await self._dial_and_save(nursery)
        finally:
            self._nursery = None
            with trio.move_on_after(2, shield=True):
                await self._save()

    def link_up(self, link: Link) -> None:
        """Take the transport's news of a verified link; one with a banned peer is closed."""
        if self.is_banned(link.peer.node_id):
            link.close(Reason.BANNED)
            return
        address = "" if link.peer.inbound else link.peer.seen_address
        self._keys[link.peer.node_id] = (link.peer.public_key, link.peer.agent)
        self._handle(LinkUp(link.peer.node_id, address, claimed_addresses(link.peer.addresses, link.peer.seen_address)))
        link.pinned = True
        if self._nursery is not None:
            self._nursery.start_soon(self._introduce, link)

    def link_down(self, link: Link, reason: Reason) -> None:
        """Take the transport's news of a link's end."""
        self._keys.pop(link.peer.node_id, None)
        if link.closed is Reason.DUPLICATE_IDENTITY:
            # The peer said goodbye so: it met this identity in another process. (When the *peer* was restarted, the
            # transport reports its old link before closing it.)
            self._found_duplicate(f"{short(link.peer.node_id)} met it in another process")
        self._handle(LinkDown(link.peer.node_id, reason))

    def misbehaved(self, node_id: bytes, reason: Reason) -> None:
        """Lower a peer's score for a violation; some causes ban it for a while and close the link."""
        self._handle(Misbehaved(NodeId(node_id), reason))

    def is_banned(self, node_id: bytes) -> bool:
        """Say whether a peer is banned now."""
        return self._book.is_banned(node_id, self._now())

    def unban(self, node_id: bytes) -> None:
        """Lift a ban by the owner's wish."""
        self._perform(self._book.unban(node_id))

    def add_peer(self, text: str) -> None:
        """Remember `host:port` or `node-…@host:port` as a static peer until the next start. Raises ConfigError."""
        address, node_id = parse_static_peer(text)
        self._perform(self._book.add_static(address, node_id, self._now()))
        self._wake.set()

    def handle(self, incoming: Incoming) -> bool:
        """Answer discovery's own requests; False for any other message."""
        if not isinstance(incoming.message, WhoAreYou):
            return False
        incoming.reply(
            Introduction(
                node_id=self._identity.node_id,
                addresses=self.own_addresses()[:8],
                seen_address=incoming.link.peer.seen_address[:64],
                role=ROLE_SERVER,
            )
        )
        return True

    def own_addresses(self) -> tuple[str, ...]:
        """Give the addresses others may reach this node at; a wildcard stands for every real interface."""
        found: dict[str, None] = {}
        for address in self._transport.addresses:
            host, _, port = address.rpartition(":")
            if host not in ("0.0.0.0", "[::]", ""):
                found[address] = None
                continue
            with suppress(ConfigError):
                for each in choose_interfaces(system_adapters(), self._settings, (host,)).addresses:
                    found[f"{each}:{port}"] = None
        return tuple(found)

    def apply(self, settings: DiscoverySettings) -> None:
        """Use new limits and static peers from now on; mDNS and interface choices take effect at the next start."""
        self._settings = settings
        self._book.apply(settings)
        self._add_statics(settings)
        self._wake.set()

    def peers(self) -> list[PeerView]:
        """Give every known peer, most recently reached first."""
        links, now = self._transport.links(), self._now()
        return [self._view(entry, links.get(entry.node_id), now) for entry in self._book.entries()]

    def status(self) -> dict[str, Any]:
        """Give how finding peers goes, with the reason and what to do where it does not."""
        mdns = asdict(self._mdns.status) if self._mdns is not None else {"state": "off", "reason": "", "advice": ""}
        return {
            "mdns": mdns,
            "peers_known": len(self._book.entries()),
            "peers_connected": len(self._transport.links()),
            "own_addresses": list(self.own_addresses()),
            "seen_as": [address for address, _ in self._own_seen.most_common(3)],
            "duplicate_identity": self.duplicate_identity or (self._mdns is not None and bool(self._mdns.identity_elsewhere)),
        }

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
                self._handle(Heard(sighting.node_id, sighting.addresses, SOURCE_MDNS))

    async def _dial_and_save(self, nursery: trio.Nursery) -> None:
        while True:
            self._wake = trio.Event()
            for effect in self._book.tick(self._now()):
                if isinstance(effect, Dial):
                    nursery.start_soon(self._dial, effect)
                else:
                    self._perform([effect])
            self._metrics.set("peers_known", len(self._book.entries()))
            await self._save()
            wait = self._book.deadline - self._now()
            with trio.move_on_after(max(wait, 0.05) if math.isfinite(wait) else math.inf):
                await self._wake.wait()

    async def _dial(self, effect: Dial) -> None:
        failure: Reason | None = Reason.TOO_SLOW
        with trio.move_on_after(self._settings.dial_seconds):
            try:
                link = await self._transport.connect(effect.addresses, effect.node_id)
            except PeerError as error:
                failure = getattr(error, "reason", None)
                if failure is Reason.DUPLICATE_IDENTITY:
                    self._found_duplicate(f"{effect.addresses[0]} answers with it")
            else:
                self._dialled(effect, link)
                return
        self._handle(DialFailed(effect.node_id, effect.addresses[0], failure))

    def _dialled(self, effect: Dial, link: Link) -> None:
        """End the dial in the book even where the transport gave a link that already stood."""
        reached = "" if link.peer.inbound else link.peer.seen_address
        address = effect.addresses[0] if effect.node_id is None else reached
        self._handle(LinkUp(link.peer.node_id, address, claimed_addresses(link.peer.addresses, link.peer.seen_address)))

    def _found_duplicate(self, how: str) -> None:
        if not self.duplicate_identity:
            _log.error("another node uses this identity (%s); give one of the two a new one", how)
        self.duplicate_identity = True

    async def _introduce(self, link: Link) -> None:
        with trio.move_on_after(INTRODUCTION_SECONDS):
            try:
                answer = (await link.request(WhoAreYou())).message
            except PeerError:
                return
            if not isinstance(answer, Introduction) or answer.node_id != link.peer.node_id:
                self.misbehaved(link.peer.node_id, Reason.WRONG_PEER)
                return
            self._saw_us_at(answer.seen_address)
            claimed = claimed_addresses(answer.addresses, link.peer.seen_address)
            self._handle(Heard(link.peer.node_id, claimed, SOURCE_BOOK))

    def _saw_us_at(self, address: str) -> None:
        if _is_address(address) and (address in self._own_seen or len(self._own_seen) < SEEN_ADDRESSES_MAX):
            self._own_seen[address] += 1

    def _handle(self, event: Event) -> None:
        self._perform(self._book.handle(event, self._now()))
        self._wake.set()

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Save(entry):
                    self._dirty[entry.node_id] = entry
                case Forget(node_id):
                    self._dirty[node_id] = None
                case Disconnect(node_id, reason):
                    link = self._transport.links().get(node_id)
                    if link is not None:
                        link.close(reason)
                case Dial():
                    pass

    async def _save(self) -> None:
        """Write what changed in one transaction. The book is a convenience: a lost second of it costs nothing."""
        if not self._dirty:
            return
        changes = [(node_id, None if entry is None else self._row(entry)) for node_id, entry in self._dirty.items()]
        self._dirty = {}

        def transaction(connection: Any) -> None:
            for node_id, row in changes:
                if row is None:
                    peer_rows.delete_peer(connection, node_id)
                else:
                    peer_rows.put_peer(connection, row)

        await self._environment.database.write(transaction)

    def _add_statics(self, settings: DiscoverySettings) -> None:
        for text in settings.static_peers:
            address, node_id = parse_static_peer(text)
            self._perform(self._book.add_static(address, node_id, self._now()))

    def _now(self) -> float:
        """Seconds of Unix time that never jump: the wall clock at the start plus what passed since."""
        return self._started_wall + self._environment.clock.monotonic() - self._started_at

    def _row(self, entry: Entry) -> peer_rows.PeerRow:
        key, agent = self._keys.get(entry.node_id, (b"", ""))
        return peer_rows.PeerRow(
            node_id=entry.node_id,
            public_key=key,
            addresses=entry.addresses,
            source=SOURCE_STATIC if SOURCE_STATIC in entry.sources else entry.sources[0],
            agent=agent,
            first_seen_ms=round(entry.first_seen * 1000),
            last_seen_ms=round(entry.last_seen * 1000),
            last_connected_ms=round(entry.last_success * 1000),
            failures=entry.failures,
            score=round(entry.score * _STORED_SCORE),
            banned_until_ms=round(entry.banned_until * 1000),
            ban_reason=entry.banned_for,
        )

    def _entry(self, row: peer_rows.PeerRow) -> Entry:
        """Give a stored peer. A static one that the owner removed from the list since is an ordinary one now."""
        return Entry(
            node_id=NodeId(row.node_id),
            addresses=row.addresses,
            sources=(SOURCE_BOOK if row.source == SOURCE_STATIC else row.source,),
            first_seen=row.first_seen_ms / 1000,
            last_seen=row.last_seen_ms / 1000,
            last_success=row.last_connected_ms / 1000,
            failures=0,
            next_dial=max(self._now(), row.banned_until_ms / 1000),
            score=row.score / _STORED_SCORE,
            score_at=row.last_seen_ms / 1000,
            bans=1 if row.banned_until_ms else 0,
            banned_until=row.banned_until_ms / 1000,
            banned_for=row.ban_reason,
        )

    def _view(self, entry: Entry, link: Link | None, now: float) -> PeerView:
        return PeerView(
            node_id=entry.node_id,
            connected=link is not None,
            inbound=link is not None and link.peer.inbound,
            addresses=entry.addresses,
            sources=entry.sources,
            agent=link.peer.agent if link else "",
            version=link.peer.version if link else 0,
            seen_seconds_ago=0.0 if link else max(0.0, round(now - entry.last_seen, 1)),
            connected_seconds_ago=max(0.0, round(now - entry.last_success, 1)) if entry.last_success else None,
            failures=entry.failures,
            score=round(self._book.score(entry.node_id, now), 1),
            banned_seconds=max(0.0, round(entry.banned_until - now, 1)),
            banned_for=entry.banned_for if entry.banned_until > now else "",
        )


def claimed_addresses(claimed: Iterable[str], seen_address: str) -> tuple[str, ...]:
    """Give the usable ones of a peer's own addresses; a wildcard host is replaced by where its bytes come from."""
    seen_host = seen_address.rpartition(":")[0]
    usable: dict[str, None] = {}
    for address in claimed:
        host, _, port = address.rpartition(":")
        whole = f"{seen_host}:{port}" if host in ("0.0.0.0", "[::]", "") else address
        if _is_address(whole) and not whole.endswith(":0"):
            usable[whole] = None
    return tuple(usable)


def parse_static_peer(text: str) -> tuple[str, NodeId | None]:
    """Give the address and, where stated, the id in `host:port` or `node-…@host:port`. Raises ConfigError."""
    id_part, _, address = text.strip().rpartition("@")
    if not _is_address(address):
        raise ConfigError(f"{text!r} is not a peer: write HOST:PORT or node-…@HOST:PORT")
    try:
        return address, NodeId(parse_id(NODE, id_part)) if id_part else None
    except ValueError as error:
        raise ConfigError(f"{text!r} is not a peer: {error}") from error


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536) or len(text) > 262:
        return False
    if host.startswith("["):
        try:
            return host.endswith("]") and ipaddress.ip_address(host[1:-1]).version == 6
        except ValueError:
            return False
    return bool(host) and all(character.isalnum() or character in "-._" for character in host)
