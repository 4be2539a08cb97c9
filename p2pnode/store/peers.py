"""The peer book: who was seen where, how they behaved, who is banned until when."""

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from p2pnode.ids import NODE, id_range
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


def saw_peer(connection: sqlite3.Connection, node_id: bytes, addresses: Sequence[str], source: str, now_ms: int) -> None:
    """Note that a peer was heard of at these addresses; new ones go first, the eight most recent are kept."""
    known = get_peer(connection, node_id)
    merged = tuple(dict.fromkeys((*addresses, *(known.addresses if known else ()))))[:ADDRESSES_MAX]
    connection.execute(
        """INSERT INTO peers (node_id, addresses, source, first_seen_ms, last_seen_ms) VALUES (?1, ?2, ?3, ?4, ?4)
           ON CONFLICT (node_id) DO UPDATE SET addresses = ?2, last_seen_ms = max(last_seen_ms, ?4)""",
        numbered(node_id, json.dumps(merged), source, now_ms),
    )


def connected_peer(
    connection: sqlite3.Connection, node_id: bytes, public_key: bytes, address: str, agent: str, now_ms: int
) -> None:
    """Note a verified session. address: where it was reached, first from now on; empty when the peer came to us."""
    saw_peer(connection, node_id, (address,) if address else (), "peer", now_ms)
    connection.execute(
        "UPDATE peers SET public_key = ?, agent = ?, last_connected_ms = ?, failures = 0 WHERE node_id = ?",
        (public_key, agent, now_ms, node_id),
    )


def failed_peer(connection: sqlite3.Connection, node_id: bytes) -> None:
    """Note that no connection could be made."""
    connection.execute("UPDATE peers SET failures = failures + 1 WHERE node_id = ?", (node_id,))


def adjust_score(connection: sqlite3.Connection, node_id: bytes, change: int) -> None:
    """Raise or lower a known peer's score, within -1000 to 1000."""
    connection.execute(
        "UPDATE peers SET score = max(-?1, min(?1, score + ?2)) WHERE node_id = ?3", numbered(SCORE_MAX, change, node_id)
    )


def ban_peer(connection: sqlite3.Connection, node_id: bytes, reason: str, now_ms: int, until_ms: int) -> None:
    """Ban a peer until a time. A longer ban in force stays."""
    connection.execute(
        """INSERT INTO peers (node_id, first_seen_ms, last_seen_ms, banned_until_ms, ban_reason) VALUES (?1, ?2, ?2, ?3, ?4)
           ON CONFLICT (node_id) DO UPDATE SET banned_until_ms = ?3, ban_reason = ?4 WHERE banned_until_ms < ?3""",
        numbered(node_id, now_ms, until_ms, reason),
    )


def unban_peer(connection: sqlite3.Connection, node_id: bytes) -> bool:
    """Lift a ban. Gives False when there was none."""
    cursor = connection.execute(
        "UPDATE peers SET banned_until_ms = 0, ban_reason = '' WHERE node_id = ? AND banned_until_ms > 0", (node_id,)
    )
    return cursor.rowcount == 1


def is_banned(connection: sqlite3.Connection, node_id: bytes, now_ms: int) -> bool:
    """Say whether a peer is banned now."""
    row = connection.execute("SELECT banned_until_ms FROM peers WHERE node_id = ?", (node_id,)).fetchone()
    return row is not None and row[0] > now_ms


def get_peer(connection: sqlite3.Connection, node_id: bytes) -> PeerRow | None:
    """Give a peer by id."""
    row = connection.execute(f"SELECT {columns(PeerRow)} FROM peers WHERE node_id = ?", (node_id,)).fetchone()
    return None if row is None else _peer(row)


def find_peers(connection: sqlite3.Connection, typed: str, limit: int = 10) -> list[PeerRow]:
    """Give peers whose id text starts with what a person typed. Raises ValueError, in words."""
    rows = connection.execute(
        f"SELECT {columns(PeerRow)} FROM peers WHERE node_id BETWEEN ? AND ? ORDER BY node_id LIMIT ?",
        (*id_range(NODE, typed), limit),
    )
    return [_peer(row) for row in rows]


def list_peers(connection: sqlite3.Connection, limit: int = 1000) -> list[PeerRow]:
    """Give peers, most recently seen first, banned ones included."""
    rows = connection.execute(f"SELECT {columns(PeerRow)} FROM peers ORDER BY last_seen_ms DESC, node_id LIMIT ?", (limit,))
    return [_peer(row) for row in rows]


def forget_peers(connection: sqlite3.Connection, keep_max: int, now_ms: int) -> int:
    """Remove the longest unseen peers beyond `keep_max`, but never a banned or static one; gives their number."""
    return connection.execute(
        """DELETE FROM peers WHERE banned_until_ms <= ?1 AND source <> 'static' AND node_id NOT IN
           (SELECT node_id FROM peers ORDER BY last_seen_ms DESC, node_id LIMIT ?2)""",
        numbered(now_ms, keep_max),
    ).rowcount


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
