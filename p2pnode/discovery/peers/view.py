"""One peer of the book as people see it (`net peers`) and as the disk keeps it."""

from dataclasses import asdict, dataclass
from typing import Any, Final

from p2pnode.discovery.peers.entry import SOURCE_ANCHOR, SOURCE_BOOK, SOURCE_BOOTSTRAP, SOURCE_STATIC, Entry
from p2pnode.ids import NodeId, node_text
from p2pnode.store.peers import PeerRow
from p2pnode.transport.link import Link

_STORED_SCORE: Final = 10


@dataclass(frozen=True, slots=True)
class PeerView:
    """One known peer as `net peers` shows it. *_seconds_ago are None for never; score is in [-100, 100].

    kept_for: why its link is kept; empty for a link that is closed when idle. table: why it is in the routing table or not.
    """

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
    kept_for: tuple[str, ...]
    table: str

    def as_json(self) -> dict[str, Any]:
        """Give it as JSON."""
        return {**asdict(self), "node_id": node_text(self.node_id)}


def view_of(entry: Entry, link: Link | None, score: float, kept_for: tuple[str, ...], table: str, now: float) -> PeerView:
    """Give how a peer is shown. link: the open one, if there is one; score: as it is now."""
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
        score=round(score, 1),
        banned_seconds=max(0.0, round(entry.banned_until - now, 1)),
        banned_for=entry.banned_for if entry.banned_until > now else "",
        kept_for=kept_for,
        table=table,
    )


def row_of(entry: Entry, public_key: bytes, agent: str, is_anchor: bool) -> PeerRow:
    """Give an entry as the disk keeps it."""
    source = SOURCE_ANCHOR if is_anchor else entry.sources[0] if entry.sources else SOURCE_BOOK
    return PeerRow(
        node_id=entry.node_id,
        public_key=public_key,
        addresses=entry.addresses,
        source=SOURCE_STATIC if SOURCE_STATIC in entry.sources else source,
        agent=agent,
        first_seen_ms=round(entry.first_seen * 1000),
        last_seen_ms=round(entry.last_seen * 1000),
        last_connected_ms=round(entry.last_success * 1000),
        failures=entry.failures,
        score=round(entry.score * _STORED_SCORE),
        banned_until_ms=round(entry.banned_until * 1000),
        ban_reason=entry.banned_for,
    )


def entry_of(row: PeerRow, now: float) -> Entry:
    """Give a stored peer. One that the owner had listed is an ordinary one until the list says so again."""
    named = row.source in (SOURCE_STATIC, SOURCE_BOOTSTRAP, SOURCE_ANCHOR)
    return Entry(
        node_id=NodeId(row.node_id),
        addresses=row.addresses,
        sources=(SOURCE_BOOK if named else row.source,),
        first_seen=row.first_seen_ms / 1000,
        last_seen=row.last_seen_ms / 1000,
        last_success=row.last_connected_ms / 1000,
        failures=0,
        next_dial=max(now, row.banned_until_ms / 1000),
        score=row.score / _STORED_SCORE,
        score_at=row.last_seen_ms / 1000,
        bans=1 if row.banned_until_ms else 0,
        banned_until=row.banned_until_ms / 1000,
        banned_for=row.ban_reason,
    )
