"""The peer book: who was seen where, how they behaved, who is banned until when."""

import json
import sqlite3
from dataclasses import dataclass
from typing import Final

from p2pnode.store.database import columns, numbered

ADDRESSES_MAX: Final = 8
SCORE_MAX: Final = 1000


@dataclass(frozen=True, slots=True)
class PeerRow:
    """One peer. addresses: `host:port`, most recently useful first. source: `mdns`, `static`, `invite` or `peer`.

    failures: connection attempts that failed since the last success. score: -1000 to 1000, 0 for a stranger.
    banned_until_ms: 0 when it is not banned.
    """

    node_id: bytes
    public_key: bytes
    addresses: tuple[str, ...]
    source: str
    agent: str
    first_seen_ms: int
    last_seen_ms: int
    last_connected_ms: int
    failures: int
    score: int
    banned_until_ms: int
    ban_reason: str


def list_peers(connection: sqlite3.Connection, limit: int = 1000) -> list[PeerRow]:
    """Give peers, most recently seen first, banned ones included."""
    rows = connection.execute(f"SELECT {columns(PeerRow)} FROM peers ORDER BY last_seen_ms DESC, node_id LIMIT ?", (limit,))
    return [_peer(row) for row in rows]


def _peer(row: tuple[object, ...]) -> PeerRow:
    return PeerRow(row[0], row[1], tuple(json.loads(str(row[2]))), *row[3:])  # type: ignore[arg-type]


def put_peer(connection: sqlite3.Connection, row: PeerRow) -> None:
    """Keep what the peer book knows of a peer. An empty key or agent leaves the stored one."""
    connection.execute(
        """INSERT INTO peers (node_id, public_key, addresses, source, agent, first_seen_ms, last_seen_ms, last_connected_ms,
           failures, score, banned_until_ms, ban_reason) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)
           ON CONFLICT (node_id) DO UPDATE SET addresses = ?3, source = ?4, last_seen_ms = ?7, last_connected_ms = ?8,
           failures = ?9, score = ?10, banned_until_ms = ?11, ban_reason = ?12,
           public_key = CASE WHEN length(?2) THEN ?2 ELSE public_key END, agent = CASE WHEN length(?5) THEN ?5 ELSE agent END""",
        numbered(
            row.node_id, row.public_key, json.dumps(row.addresses[:ADDRESSES_MAX]), row.source, row.agent, row.first_seen_ms,
            row.last_seen_ms, row.last_connected_ms, row.failures, max(-SCORE_MAX, min(SCORE_MAX, row.score)),
            row.banned_until_ms, row.ban_reason,
        ),
    )  # fmt: skip


def delete_peer(connection: sqlite3.Connection, node_id: bytes) -> None:
    """Forget a peer."""
    connection.execute("DELETE FROM peers WHERE node_id = ?", (node_id,))
