"""Signed documents by id, and the log of what this node itself has signed.

Documents are kept as the exact bytes of their envelopes and never change. The audit log holds, for every document that this
node signed, the hash of the entry before, so that a later change or a missing entry shows.
"""

import sqlite3
from dataclasses import dataclass
from typing import Final

from p2pnode.crypto.hashing import tagged_hash
from p2pnode.errors import LedgerError
from p2pnode.ids import DOCUMENT, id_range
from p2pnode.store.database import columns, placeholders

LOG_START: Final = bytes(32)
LISTED_MAX: Final = 1000


@dataclass(frozen=True, slots=True)
class DocumentRow:
    """One stored document.

    id: BLAKE2b-256 of the body. kind: the body's message number. signer: Ed25519 public key. agreement: the id of the
    agreement it belongs to, if any. envelope: the encoded envelope, as received.
    """

    id: bytes
    kind: int
    signer: bytes
    agreement: bytes | None
    stored_ms: int
    envelope: bytes


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One entry of the audit log. hash covers previous, sequence, document, kind and time."""

    sequence: int
    document: bytes
    kind: int
    logged_ms: int
    previous: bytes
    hash: bytes


def save_document(connection: sqlite3.Connection, row: DocumentRow) -> bool:
    """Keep a document. Gives False, and changes nothing, when it is there already."""
    cursor = connection.execute(
        f"INSERT INTO documents ({columns(DocumentRow)}) VALUES ({placeholders(DocumentRow)}) ON CONFLICT (id) DO NOTHING",
        (row.id, row.kind, row.signer, row.agreement, row.stored_ms, row.envelope),
    )
    return cursor.rowcount == 1


def save_own_document(connection: sqlite3.Connection, row: DocumentRow) -> bool:
    """Keep a document that this node signed and log it. Gives False when it is there already."""
    if not save_document(connection, row):
        return False
    append_log(connection, row.id, row.kind, row.stored_ms)
    return True


def get_document(connection: sqlite3.Connection, document_id: bytes) -> DocumentRow | None:
    """Give a document by its id."""
    row = connection.execute(f"SELECT {columns(DocumentRow)} FROM documents WHERE id = ?", (document_id,)).fetchone()
    return None if row is None else DocumentRow(*row)


def find_documents(connection: sqlite3.Connection, typed: str, limit: int = 10) -> list[DocumentRow]:
    """Give documents whose id text starts with what a person typed. Raises ValueError, in words."""
    rows = connection.execute(
        f"SELECT {columns(DocumentRow)} FROM documents WHERE id BETWEEN ? AND ? ORDER BY id LIMIT ?",
        (*id_range(DOCUMENT, typed), limit),
    )
    return [DocumentRow(*row) for row in rows]


def list_documents(
    connection: sqlite3.Connection,
    *,
    kind: int | None = None,
    signer: bytes | None = None,
    agreement: bytes | None = None,
    since_ms: int = 0,
    limit: int = LISTED_MAX,
) -> list[DocumentRow]:
    """Give documents that fit every filter, in the order they were stored."""
    filters, values = ["stored_ms >= ?"], list[object]([since_ms])
    for column, value in (("kind", kind), ("signer", signer), ("agreement", agreement)):
        if value is not None:
            filters.append(f"{column} = ?")
            values.append(value)
    rows = connection.execute(
        f"SELECT {columns(DocumentRow)} FROM documents WHERE {' AND '.join(filters)} ORDER BY sequence LIMIT ?",
        (*values, limit),
    )
    return [DocumentRow(*row) for row in rows]


def remove_documents(connection: sqlite3.Connection, kind: int, before_ms: int) -> int:
    """Remove documents of one kind that belong to no agreement and were stored before a time; gives their number.

    For offers and unused quotes, which live for minutes. What belongs to an agreement is kept for ever.
    """
    return connection.execute(
        "DELETE FROM documents WHERE kind = ? AND agreement IS NULL AND stored_ms < ?", (kind, before_ms)
    ).rowcount


def attach_document(connection: sqlite3.Connection, document_id: bytes, agreement: bytes) -> None:
    """Say that a document (a quote, say) belongs to an agreement from now on, so that it is kept."""
    connection.execute("UPDATE documents SET agreement = ? WHERE id = ? AND agreement IS NULL", (agreement, document_id))


def append_log(connection: sqlite3.Connection, document_id: bytes, kind: int, now_ms: int) -> LogEntry:
    """Add one signed document to the audit log."""
    last = log_head(connection)
    sequence, previous = (1, LOG_START) if last is None else (last.sequence + 1, last.hash)
    digest = _entry_hash(previous, sequence, document_id, kind, now_ms)
    entry = LogEntry(sequence, document_id, kind, now_ms, previous, digest)
    connection.execute(
        f"INSERT INTO audit_log ({columns(LogEntry)}) VALUES ({placeholders(LogEntry)})",
        (entry.sequence, entry.document, entry.kind, entry.logged_ms, entry.previous, entry.hash),
    )
    return entry


def log_head(connection: sqlite3.Connection) -> LogEntry | None:
    """Give the newest entry of the audit log."""
    row = connection.execute(f"SELECT {columns(LogEntry)} FROM audit_log ORDER BY sequence DESC LIMIT 1").fetchone()
    return None if row is None else LogEntry(*row)


def read_log(connection: sqlite3.Connection, after: int = 0, limit: int = LISTED_MAX) -> list[LogEntry]:
    """Give entries of the audit log with a sequence above `after`, oldest first."""
    rows = connection.execute(
        f"SELECT {columns(LogEntry)} FROM audit_log WHERE sequence > ? ORDER BY sequence LIMIT ?", (after, limit)
    )
    return [LogEntry(*row) for row in rows]


def check_log(connection: sqlite3.Connection) -> int:
    """Recompute the whole audit log and give its length. Raises LedgerError at the first entry that does not fit."""
    expected, previous = 1, LOG_START
    for row in connection.execute(f"SELECT {columns(LogEntry)} FROM audit_log ORDER BY sequence"):
        entry = LogEntry(*row)
        digest = _entry_hash(previous, expected, entry.document, entry.kind, entry.logged_ms)
        if (entry.sequence, entry.previous, entry.hash) != (expected, previous, digest):
            raise LedgerError(f"entry {expected} of the audit log was changed or is missing")
        expected, previous = expected + 1, digest
    return expected - 1


def _entry_hash(previous: bytes, sequence: int, document: bytes, kind: int, logged_ms: int) -> bytes:
    numbers = sequence.to_bytes(8, "big") + kind.to_bytes(8, "big") + logged_ms.to_bytes(8, "big")
    return tagged_hash("audit-log", previous, document, numbers)
