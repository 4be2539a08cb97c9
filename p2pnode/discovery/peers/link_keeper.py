"""Drives the peer book: dials whom a link is to be kept with, pins those links, and keeps the book on disk."""

import logging
import math
from collections.abc import Callable
from typing import Any, Final

import trio

from p2pnode.discovery.addresses import claimed_addresses, parse_static_peer
from p2pnode.discovery.peers.book import PeerBook
from p2pnode.discovery.peers.entry import (
    SOURCE_ANCHOR,
    SOURCE_BOOTSTRAP,
    SOURCE_STATIC,
    Dial,
    DialFailed,
    Disconnect,
    Effect,
    Entry,
    Event,
    Forget,
    FoundAgain,
    LinkDown,
    LinkUp,
    Misbehaved,
    Save,
)  # fmt: skip
from p2pnode.discovery.peers.links import AnchorCandidate, LinkPlan, Why
from p2pnode.discovery.peers.view import entry_of, row_of
from p2pnode.discovery.settings import DiscoverySettings
from p2pnode.environment import Environment
from p2pnode.errors import PeerError
from p2pnode.ids import NodeId, short
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.store import peers as peer_rows
from p2pnode.transport.link import Link
from p2pnode.transport.service import TransportService

# The book is a convenience: what a crash loses of it costs a few dials. So news wait a moment for company.
SAVE_SECONDS: Final = 1.0
SAVE_SPACING_SECONDS: Final = 10.0
# What the disk says of a peer's last success may be so old.
STALE_SECONDS: Final = 300.0
REVIEW_SECONDS: Final = 30.0
ANCHOR_FAILURES_MAX: Final = 3
_log = logging.getLogger(__name__)


class LinkKeeper:
    """The book, the plan of links, and the transport between them.

    on_kept: told of a kept link that has just come up. on_found_again: told of a lost peer that answers again.
    is_server: says whether a peer is in the routing table; only such peers become anchors. is_held: whether somebody else
    keeps a link. on_review: called every half minute.
    """

    def __init__(
        self,
        own_id: NodeId,
        environment: Environment,
        settings: DiscoverySettings,
        transport: TransportService,
        metrics: Metrics,
        now: Callable[[], float],
        on_deadline: Callable[[float], None],
    ) -> None:
        self.plan = LinkPlan(settings.local_links_max, settings.anchors_max)
        self.book = PeerBook(own_id, settings, environment.entropy.uniform, (), self.plan)
        self.duplicate_identity = False
        self.on_kept: Callable[[Link], None] = lambda link: None
        self.on_found_again: Callable[[NodeId], None] = lambda node_id: None
        self.is_server: Callable[[NodeId], bool] = lambda node_id: False
        self.on_review: Callable[[], None] = lambda: None
        self.is_held: Callable[[Link], bool] = lambda link: False
        self._own_id = own_id
        self._environment = environment
        self._settings = settings
        self._transport = transport
        self._links = transport.links()
        self._metrics = metrics
        self._now = now
        self._on_deadline = on_deadline
        self._dirty: dict[NodeId, Entry | None] = {}
        self._saved: dict[NodeId, Entry] = {}
        self._keys: dict[NodeId, tuple[bytes, str]] = {}
        self._up_since: dict[NodeId, float] = {}
        self._next_save = math.inf
        self._saved_at = -math.inf
        self._is_saving = False
        self._next_tick = 0.0
        self._next_review = 0.0
        self._nursery: trio.Nursery | None = None

    async def load(self) -> None:
        """Read the book from disk; peers that were anchors are dialled first. The owner's lists come on top."""
        limit = self._settings.peers_max
        rows = await self._environment.database.read(lambda connection: peer_rows.list_peers(connection, limit))
        entries = [entry_of(row, self._now()) for row in rows]
        self.book = PeerBook(self._own_id, self._settings, self._environment.entropy.uniform, entries, self.plan)
        for row in rows:
            if row.source == SOURCE_ANCHOR:
                self.plan.want(NodeId(row.node_id), Why.ANCHOR)
        self._add_listed()

    def start(self, nursery: trio.Nursery | None) -> None:
        """Dial and save in this nursery from now on; None ends that."""
        self._nursery = nursery

    def apply(self, settings: DiscoverySettings) -> None:
        """Use new limits and lists from now on."""
        self._settings = settings
        self.book.apply(settings)
        self.plan.limit(Why.LOCAL, settings.local_links_max)
        self.plan.limit(Why.ANCHOR, settings.anchors_max)
        self._add_listed()
        self._changed()

    def add(self, text: str, source: str = SOURCE_STATIC) -> None:
        """Remember `host:port` or `node-…@host:port` until the next start. Raises ConfigError."""
        address, node_id = parse_static_peer(text)
        self._perform(self.book.add_static(address, node_id, self._now(), source))
        self._changed()

    @property
    def deadline(self) -> float:
        """When `tick` should run next."""
        return min(self._next_tick, self._next_review, self._next_save)

    def tick(self) -> None:
        """Dial who is due, save what changed, and look over the anchors."""
        now, nursery = self._now(), self._nursery
        if nursery is None:
            return
        if now >= self._next_review:
            self._next_review = now + REVIEW_SECONDS
            self._review(now)
            self.on_review()
        if now >= self._next_tick:
            self._perform(self.book.tick(now))
            self._metrics.set("peers_known", len(self.book))
            self._next_tick = max(self.book.deadline, now + 0.05)
        if now >= self._next_save and not self._is_saving:
            self._next_save, self._is_saving = math.inf, True
            nursery.start_soon(self.save)

    def handle(self, event: Event) -> None:
        """Give the book an event."""
        self._perform(self.book.handle(event, self._now()))
        if event.node_id is None or self.book.may_dial(event.node_id):
            self._changed()
        elif self._next_save < math.inf:
            self._on_deadline(self._next_save)

    # --- links -------------------------------------------------------------------------------------------------------

    def link_up(self, link: Link) -> bool:
        """Take the transport's news of a verified link; False when its peer is banned, which closes it."""
        node_id = link.peer.node_id
        if self.book.is_banned(node_id, self._now()):
            link.close(Reason.BANNED)
            return False
        address = "" if link.peer.inbound else link.peer.seen_address
        self._keys[node_id] = (link.peer.public_key, link.peer.agent)
        self._up_since[node_id] = self._now()
        self.handle(LinkUp(node_id, address, claimed_addresses(link.peer.addresses, link.peer.seen_address)))
        self._pin(link)
        return True

    def link_down(self, link: Link, reason: Reason) -> None:
        """Take the transport's news of a link's end."""
        self._up_since.pop(link.peer.node_id, None)
        if link.closed is Reason.DUPLICATE_IDENTITY:
            # The peer said goodbye so: it met this identity in another process. (When the *peer* was restarted, the
            # transport reports its old link before closing it.)
            self._found_duplicate(f"{short(link.peer.node_id)} met it in another process")
        self.handle(LinkDown(link.peer.node_id, reason))

    def keep(self, node_id: NodeId, why: Why) -> None:
        """Keep a link with a peer from now on, an open one or one to be dialled."""
        if not self.plan.want(node_id, why):
            return
        link = self._links.get(node_id)
        if link is not None:
            self._pin(link)
        self._changed()

    def release(self, node_id: NodeId, why: Why) -> None:
        """One reason to keep a link is gone; it closes when idle if that was the last."""
        self.plan.release(node_id, why)
        link = self._links.get(node_id)
        if link is not None and not self.plan.is_kept(node_id) and not self.is_held(link):
            link.pinned = False

    def need_entry(self, is_needed: bool) -> None:
        """Dial bootstrap nodes, or need them no longer."""
        self.plan.needs_entry = is_needed
        if not is_needed:
            for node_id in self.plan.kept_for(Why.ENTRY):
                self.release(node_id, Why.ENTRY)
        self._changed()

    def dial_failed(self, node_id: NodeId, address: str, reason: Reason | None) -> None:
        """Somebody else's dial of a peer came to nothing."""
        if self.book.entry(node_id) is not None:
            self.handle(DialFailed(node_id, address, reason))

    def _pin(self, link: Link) -> None:
        if self.plan.is_kept(link.peer.node_id):
            link.pinned = True
            self.on_kept(link)

    def _review(self, now: float) -> None:
        """Choose anchors, give up dead ones, and put right whatever pins an event missed."""
        for node_id in self.plan.kept_for(Why.ANCHOR):
            entry = self.book.entry(node_id)
            if entry is None or entry.failures >= ANCHOR_FAILURES_MAX:
                self.plan.release(node_id, Why.ANCHOR)
        if self.plan.has_room(Why.ANCHOR):
            for node_id in self.plan.add_anchors(self._anchor_candidates(now)):
                entry = self.book.entry(node_id)
                if entry is not None:
                    self._saved.pop(node_id, None)
                    self._perform([Save(entry)])
        for node_id, link in self._links.items():
            if link.pinned != (is_wanted := self.plan.is_kept(node_id) or self.is_held(link)):
                link.pinned = is_wanted

    def _anchor_candidates(self, now: float) -> list[AnchorCandidate]:
        found = []
        for node_id, link in self._links.items():
            entry = self.book.entry(node_id)
            if entry is not None and not link.peer.inbound and self.is_server(node_id):
                age = now - self._up_since.get(node_id, now)
                found.append(AnchorCandidate(node_id, link.peer.seen_address, entry.first_seen, age))
        return found

    # --- dialling ----------------------------------------------------------------------------------------------------

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
        self.handle(DialFailed(effect.node_id, effect.addresses[0], failure))

    def _dialled(self, effect: Dial, link: Link) -> None:
        """End the dial in the book even where the transport gave a link that already stood."""
        reached = "" if link.peer.inbound else link.peer.seen_address
        address = effect.addresses[0] if effect.node_id is None else reached
        if self._links.get(link.peer.node_id) is not link:
            # It has ended again before this task came round.
            self.handle(DialFailed(effect.node_id, effect.addresses[0], link.closed))
            return
        self.handle(LinkUp(link.peer.node_id, address, claimed_addresses(link.peer.addresses, link.peer.seen_address)))
        self._pin(link)

    def _found_duplicate(self, how: str) -> None:
        if not self.duplicate_identity:
            _log.error("another node uses this identity (%s); give one of the two a new one", how)
        self.duplicate_identity = True

    # --- the book's wishes -------------------------------------------------------------------------------------------

    def misbehaved(self, node_id: NodeId, reason: Reason) -> None:
        """Lower a peer's score for a violation; some causes ban it for a while and close the link."""
        self.handle(Misbehaved(node_id, reason))

    def unban(self, node_id: NodeId) -> None:
        """Lift a ban by the owner's wish."""
        self._perform(self.book.unban(node_id))

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Save(entry):
                    if self._is_news(entry):
                        self._dirty[entry.node_id] = entry
                case Forget(node_id):
                    self._dirty[node_id] = None
                    self._saved.pop(node_id, None)
                    self._keys.pop(node_id, None)
                case Disconnect(node_id, reason):
                    link = self._links.get(node_id)
                    if link is not None:
                        link.close(reason)
                case FoundAgain(node_id):
                    self.on_found_again(node_id)
                case Dial():
                    if self._nursery is not None:
                        self._nursery.start_soon(self._dial, effect)
        if self._dirty and self._next_save == math.inf and not self._is_saving:
            self._next_save = max(self._now() + SAVE_SECONDS, self._saved_at + SAVE_SPACING_SECONDS)

    def _is_news(self, entry: Entry) -> bool:
        """Say whether the disk should hear of it: a link that came and went, of which there are many, is none."""
        saved = self._saved.get(entry.node_id)
        if saved is not None and entry.node_id not in self._dirty:
            is_old = entry.last_success > saved.last_success + STALE_SECONDS
            if not is_old and (saved.addresses, saved.banned_until) == (entry.addresses, entry.banned_until):
                return False
        self._saved[entry.node_id] = entry
        return True

    def _changed(self) -> None:
        self._next_tick = min(self._next_tick, self.book.deadline)
        self._on_deadline(self.deadline)

    async def save(self) -> None:
        """Write what changed in one transaction."""
        changes = [(node_id, self._row(node_id, entry)) for node_id, entry in self._dirty.items()]
        self._dirty = {}

        def transaction(connection: Any) -> None:
            for node_id, row in changes:
                if row is None:
                    peer_rows.delete_peer(connection, node_id)
                else:
                    peer_rows.put_peer(connection, row)

        try:
            if changes:
                await self._environment.database.write(transaction)
        finally:
            self._is_saving = False
            self._saved_at = self._now()
            self._perform([])

    def _row(self, node_id: NodeId, entry: Entry | None) -> peer_rows.PeerRow | None:
        if entry is None:
            return None
        key, agent = self._keys.get(node_id, (b"", ""))
        return row_of(entry, key, agent, Why.ANCHOR in self.plan.reasons(node_id))

    def _add_listed(self) -> None:
        for texts, source in ((self._settings.static_peers, SOURCE_STATIC), (self._settings.bootstrap, SOURCE_BOOTSTRAP)):
            for text in texts:
                address, node_id = parse_static_peer(text)
                self._perform(self.book.add_static(address, node_id, self._now(), source))
