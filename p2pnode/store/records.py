"""Own records: what this node publishes in the hash table, so that a restart neither loses one nor reuses a sequence."""

import sqlite3
from dataclasses import dataclass

from p2pnode.store.database import columns, placeholders


@dataclass(frozen=True, slots=True)
class OwnRecordRow:
    """One record that this node publishes. envelope: the exact signed bytes of the newest sequence.

    life_ms: how long each signed version lives. stored_ms: when enough holders last acknowledged it, 0 for never.
    acks, asked: of the last publication that ended.
    """

    salt: bytes
    value: bytes
    life_ms: int
    sequence: int
    expires_ms: int
    envelope: bytes
    stored_ms: int = 0
    acks: int = 0
    asked: int = 0


def save_own_record(connection: sqlite3.Connection, row: OwnRecordRow) -> None:
    """Keep a record under its salt; a row with a higher sequence stays, so that saves may arrive in any order."""
    connection.execute(
        f"""INSERT INTO own_records ({columns(OwnRecordRow)}) VALUES ({placeholders(OwnRecordRow)})
            ON CONFLICT (salt) DO UPDATE SET value = excluded.value, life_ms = excluded.life_ms, sequence = excluded.sequence,
                expires_ms = excluded.expires_ms, envelope = excluded.envelope, stored_ms = excluded.stored_ms,
                acks = excluded.acks, asked = excluded.asked
            WHERE excluded.sequence >= own_records.sequence""",
        (
            row.salt, row.value, row.life_ms, row.sequence, row.expires_ms, row.envelope, row.stored_ms, row.acks, row.asked,
        ),
    )  # fmt: skip


def remove_own_record(connection: sqlite3.Connection, salt: bytes) -> None:
    """Forget a record; its holders forget it when it expires."""
    connection.execute("DELETE FROM own_records WHERE salt = ?", (salt,))


def list_own_records(connection: sqlite3.Connection) -> list[OwnRecordRow]:
    """Give all own records, by salt."""
    rows = connection.execute(f"SELECT {columns(OwnRecordRow)} FROM own_records ORDER BY salt")
    return [OwnRecordRow(*row) for row in rows]
