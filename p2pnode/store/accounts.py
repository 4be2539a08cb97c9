"""The double-entry ledger in integer micro-credits.

A posting is a journal: a source document, and entries (account, amount) that sum to zero; a positive amount is a debit. It
is keyed by the document that caused it, so posting the same receipt or cheque again changes nothing. The tables' triggers
refuse unbalanced journals and every later change, whatever code runs; `check_balanced` proves it afterwards.

Accounts: `receivable:<node>` what a peer owes us, `payable:<node>` what we owe a peer (a negative balance), `income`
(negative), `spend` (positive), `outside` (settled by other means, such as cash).
"""

import json
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from p2pnode.errors import LedgerError
from p2pnode.ids import node_text
from p2pnode.store.database import columns, numbered

INCOME: Final = "income"
SPEND: Final = "spend"
OUTSIDE: Final = "outside"
AMOUNT_MAX: Final = 2**62

Entries = Sequence[tuple[str, int]]


@dataclass(frozen=True, slots=True)
class Balance:
    """An account and its balance in micro-credits, debits positive."""

    account: str
    amount: int


@dataclass(frozen=True, slots=True)
class PeerBalance:
    """What stands between us and a peer, micro-credits. owes: it owes us. owed: we owe it. net: owes - owed."""

    owes: int
    owed: int

    @property
    def net(self) -> int:
        """Positive when the peer owes us more than we owe it."""
        return self.owes - self.owed


@dataclass(frozen=True, slots=True)
class ExportRow:
    """One entry with its journal, for `ledger export`."""

    journal: int
    posted_ms: int
    kind: str
    source: bytes
    agreement: bytes | None
    account: str
    amount: int
    note: str


def receivable(peer: bytes) -> str:
    """Name the account of what a peer owes us."""
    return f"receivable:{node_text(peer)}"


def payable(peer: bytes) -> str:
    """Name the account of what we owe a peer."""
    return f"payable:{node_text(peer)}"


def earned(peer: bytes, amount: int) -> Entries:
    """Give the entries for work that a peer acknowledged by cheque."""
    return ((receivable(peer), amount), (INCOME, -amount))


def spent(peer: bytes, amount: int) -> Entries:
    """Give the entries for work that we acknowledged to a peer by cheque."""
    return ((SPEND, amount), (payable(peer), -amount))


def netted(peer: bytes, amount: int) -> Entries:
    """Give the entries that set off what a peer owes us against what we owe it."""
    return ((payable(peer), amount), (receivable(peer), -amount))


def settled_by_peer(peer: bytes, amount: int) -> Entries:
    """Give the entries for a peer that paid us outside p2pnode."""
    return ((OUTSIDE, amount), (receivable(peer), -amount))


def settled_by_us(peer: bytes, amount: int) -> Entries:
    """Give the entries for what we paid a peer outside p2pnode."""
    return ((payable(peer), amount), (OUTSIDE, -amount))


def post(
    connection: sqlite3.Connection,
    source: bytes,
    kind: str,
    entries: Entries,
    now_ms: int,
    *,
    agreement: bytes | None = None,
    note: str = "",
) -> bool:
    """Post a journal and give True; give False, changing nothing, when this source was posted with the same entries before.

    source: 32 bytes, the id of the document that causes it. kind: `receipt`, `cheque`, `settlement`, `correction` …
    Raises LedgerError for entries that do not sum to zero, and for a source that was posted with other entries.
    """
    if len(entries) < 2 or any(not name or not amount or abs(amount) > AMOUNT_MAX for name, amount in entries):
        raise LedgerError("a posting needs two entries or more, each with an account and an amount other than zero")
    if sum(amount for _, amount in entries):
        raise LedgerError(f"the entries of a {kind} posting do not sum to zero")
    text = json.dumps([[name, int(amount)] for name, amount in entries], separators=(",", ":"))
    known = connection.execute("SELECT kind, entries FROM journals WHERE source = ?", (source,)).fetchone()
    if known is not None:
        if known != (kind, text):
            raise LedgerError(f"document {source.hex()} was posted before with other entries")
        return False
    connection.execute(
        "INSERT INTO journals (source, kind, agreement, posted_ms, note, entries) VALUES (?, ?, ?, ?, ?, ?)",
        (source, kind, agreement, now_ms, note, text),
    )
    return True


def is_posted(connection: sqlite3.Connection, source: bytes) -> bool:
    """Say whether a source document was posted."""
    return connection.execute("SELECT 1 FROM journals WHERE source = ?", (source,)).fetchone() is not None


def balance(connection: sqlite3.Connection, account: str) -> int:
    """Give an account's balance in micro-credits; 0 for an account that was never used."""
    row = connection.execute("SELECT amount FROM balances WHERE account = ?", (account,)).fetchone()
    return 0 if row is None else int(row[0])


def balances(connection: sqlite3.Connection, prefix: str = "") -> list[Balance]:
    """Give every account whose name starts with `prefix`, by name."""
    rows = connection.execute(
        f"SELECT {columns(Balance)} FROM balances WHERE substr(account, 1, ?) = ? ORDER BY account", (len(prefix), prefix)
    )
    return [Balance(*row) for row in rows]


def peer_balance(connection: sqlite3.Connection, peer: bytes) -> PeerBalance:
    """Give what a peer owes us and what we owe it."""
    return PeerBalance(balance(connection, receivable(peer)), -balance(connection, payable(peer)))


def peer_volume(connection: sqlite3.Connection, peer: bytes, since_ms: int = 0) -> PeerBalance:
    """Give what was earned from (owes) and spent at (owed) a peer since a time, settled or not."""
    row = connection.execute(
        """SELECT coalesce(sum(amount) FILTER (WHERE account = ?1 AND amount > 0), 0),
                  coalesce(-sum(amount) FILTER (WHERE account = ?2 AND amount < 0), 0)
           FROM entries JOIN journals ON journals.id = entries.journal
           WHERE account IN (?1, ?2) AND posted_ms >= ?3""",
        numbered(receivable(peer), payable(peer), since_ms),
    ).fetchone()
    return PeerBalance(row[0], row[1])


def account_total(connection: sqlite3.Connection, account: str, since_ms: int, until_ms: int) -> int:
    """Give the sum of an account's entries posted in [since_ms, until_ms): what was earned or spent in that time."""
    row = connection.execute(
        """SELECT coalesce(sum(amount), 0) FROM entries JOIN journals ON journals.id = entries.journal
           WHERE account = ? AND posted_ms >= ? AND posted_ms < ?""",
        (account, since_ms, until_ms),
    ).fetchone()
    return int(row[0])


def export_rows(connection: sqlite3.Connection, since_ms: int = 0, until_ms: int = 2**62) -> Iterator[ExportRow]:
    """Give every entry posted in [since_ms, until_ms), oldest first. Consume it inside the same transaction."""
    rows = connection.execute(
        """SELECT journals.id, posted_ms, kind, source, agreement, account, amount, note
           FROM journals JOIN entries ON entries.journal = journals.id
           WHERE posted_ms >= ? AND posted_ms < ? ORDER BY journals.id, position""",
        (since_ms, until_ms),
    )
    return (ExportRow(*row) for row in rows)


def check_balanced(connection: sqlite3.Connection) -> None:
    """Prove the books: every journal sums to zero, no entry is missing, every balance is its entries' sum.

    Raises LedgerError naming the first journal or account that does not fit.
    """
    for query, complaint in (
        ("SELECT journal FROM entries GROUP BY journal HAVING sum(amount) <> 0", "journal {} does not sum to zero"),
        (
            """SELECT id FROM journals WHERE json_array_length(entries) <>
               (SELECT count(*) FROM entries WHERE journal = id)""",
            "journal {} has lost or gained an entry",
        ),
        (
            """SELECT entries.journal FROM entries JOIN journals ON journals.id = entries.journal
               WHERE json_extract(journals.entries, '$[' || position || '][0]') IS NOT account
               OR json_extract(journals.entries, '$[' || position || '][1]') IS NOT amount""",
            "journal {} does not say what its entries say",
        ),
        (
            """SELECT account FROM (SELECT account, amount FROM entries
               UNION ALL SELECT account, -amount FROM balances) GROUP BY account HAVING sum(amount) <> 0""",
            "the balance of account {} is not the sum of its entries",
        ),
    ):
        row = connection.execute(f"{query} LIMIT 1").fetchone()
        if row is not None:
            raise LedgerError(complaint.format(row[0]))
