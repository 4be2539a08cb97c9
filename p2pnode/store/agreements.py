"""Agreements, the calls of their slices, receipts and cheques.

The rows hold what a restarted node needs to go on: terms, counters and the position in the client's hash chain. The signed
documents themselves are in `documents`. Every function that moves a counter checks that it moves by one step, so a repeated
or reordered document cannot count twice.
"""

import sqlite3
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from typing import Literal

from p2pnode.errors import LedgerError
from p2pnode.ids import DOCUMENT, id_range
from p2pnode.store.database import columns, numbered, placeholders

Role = Literal["provider", "client"]
AgreementState = Literal["ordered", "open", "closing", "ended"]
CallState = Literal["sent", "answered", "receipted", "void"]


@dataclass(frozen=True, slots=True)
class AgreementRow:
    """One agreement as one side keeps it.

    id: hash of the order. peer: the other side's node id. state: `ordered` (client: sent, no countersignature yet), `open`,
    `closing` (no new calls; last receipt or cheque outstanding), `ended`. Amounts in micro-credits: total by receipts, paid
    by cheques. slices, slices_paid: how many receipts and cheques exist. chain_seed: the client's secret start of the hash
    chain, None on the provider's side. chain_tip: the last preimage opened (the anchor at first). next_call: the next call
    number the client has not handed out. end_reason: text of an EndReason, only when ended.
    """

    id: bytes
    role: Role
    peer: bytes
    model_id: bytes
    quote: bytes
    job: bytes | None
    state: AgreementState
    amount_max: int
    slice_amount: int
    chain_anchor: bytes
    chain_length: int
    chain_seed: bytes | None
    opened_ms: int
    deadline_ms: int
    chain_tip: bytes
    total: int = 0
    paid: int = 0
    slices: int = 0
    slices_paid: int = 0
    next_call: int = 0
    ended_ms: int = 0
    end_reason: str = ""

    @property
    def unpaid(self) -> int:
        """Receipted and not yet covered by a cheque, micro-credits."""
        return self.total - self.paid


@dataclass(frozen=True, slots=True)
class CallRow:
    """One call, and once receipted one leaf of the slice's Merkle tree. output_hash is empty until answered."""

    agreement: bytes
    number: int
    slice: int
    position: int
    input_hash: bytes
    output_hash: bytes
    probe_hash: bytes
    amount: int
    state: CallState


@dataclass(frozen=True, slots=True)
class ReceiptRow:
    """One slice's receipt. total includes all slices up to this one."""

    agreement: bytes
    slice: int
    document: bytes
    calls: int
    root: bytes
    operations: int
    amount: int
    total: int
    engine: str
    ended_ms: int


@dataclass(frozen=True, slots=True)
class ChequeRow:
    """The cheque that answers a slice's receipt. total is cumulative."""

    agreement: bytes
    slice: int
    document: bytes
    receipt: bytes
    total: int
    preimage: bytes
    issued_ms: int


def save_agreement(connection: sqlite3.Connection, row: AgreementRow) -> bool:
    """Keep a new agreement. Gives False, and changes nothing, when it is there already."""
    cursor = connection.execute(
        f"INSERT INTO agreements ({columns(AgreementRow)}) VALUES ({placeholders(AgreementRow)}) ON CONFLICT (id) DO NOTHING",
        astuple(row),
    )
    return cursor.rowcount == 1


def get_agreement(connection: sqlite3.Connection, agreement: bytes) -> AgreementRow | None:
    """Give an agreement by id."""
    row = connection.execute(f"SELECT {columns(AgreementRow)} FROM agreements WHERE id = ?", (agreement,)).fetchone()
    return None if row is None else AgreementRow(*row)


def find_agreements(connection: sqlite3.Connection, typed: str, limit: int = 10) -> list[AgreementRow]:
    """Give agreements whose id text starts with what a person typed. Raises ValueError, in words."""
    rows = connection.execute(
        f"SELECT {columns(AgreementRow)} FROM agreements WHERE id BETWEEN ? AND ? ORDER BY id LIMIT ?",
        (*id_range(DOCUMENT, typed), limit),
    )
    return [AgreementRow(*row) for row in rows]


def list_agreements(
    connection: sqlite3.Connection,
    *,
    role: Role | None = None,
    peer: bytes | None = None,
    job: bytes | None = None,
    is_ended: bool | None = None,
    limit: int = 1000,
) -> list[AgreementRow]:
    """Give agreements that fit every filter, newest first."""
    filters, values = ["1"], list[object]()
    for column, value in (("role", role), ("peer", peer), ("job", job)):
        if value is not None:
            filters.append(f"{column} = ?")
            values.append(value)
    if is_ended is not None:
        filters.append("state = 'ended'" if is_ended else "state <> 'ended'")
    rows = connection.execute(
        f"SELECT {columns(AgreementRow)} FROM agreements WHERE {' AND '.join(filters)} ORDER BY opened_ms DESC, id LIMIT ?",
        (*values, limit),
    )
    return [AgreementRow(*row) for row in rows]


def set_agreement_state(connection: sqlite3.Connection, agreement: bytes, state: AgreementState) -> None:
    """Move an agreement that has not ended to `open` or `closing`."""
    connection.execute("UPDATE agreements SET state = ? WHERE id = ? AND state <> 'ended'", (state, agreement))


def end_agreement(connection: sqlite3.Connection, agreement: bytes, reason: str, now_ms: int) -> bool:
    """End an agreement. Gives False, keeping the first reason, when it had ended."""
    cursor = connection.execute(
        "UPDATE agreements SET state = 'ended', end_reason = ?, ended_ms = ? WHERE id = ? AND state <> 'ended'",
        (reason, now_ms, agreement),
    )
    return cursor.rowcount == 1


def take_call_numbers(connection: sqlite3.Connection, agreement: bytes, count: int) -> int:
    """Set aside `count` call numbers and give the first; none of them is handed out again, after a crash neither."""
    row = connection.execute(
        "UPDATE agreements SET next_call = next_call + ? WHERE id = ? RETURNING next_call", (count, agreement)
    ).fetchone()
    if row is None:
        raise LedgerError("call numbers were asked for an agreement that does not exist")
    return int(row[0]) - count


def save_calls(connection: sqlite3.Connection, rows: Iterable[CallRow]) -> None:
    """Keep calls; a known (agreement, number) is brought up to date."""
    names = [field.name for field in fields(CallRow)][2:]
    updates = ", ".join(f"{name} = excluded.{name}" for name in names)
    connection.executemany(
        f"INSERT INTO calls ({columns(CallRow)}) VALUES ({placeholders(CallRow)})"
        f" ON CONFLICT (agreement, number) DO UPDATE SET {updates}",
        [astuple(row) for row in rows],
    )


def list_calls(
    connection: sqlite3.Connection, agreement: bytes, *, slice_number: int | None = None, state: CallState | None = None
) -> list[CallRow]:
    """Give an agreement's calls by slice and position."""
    condition, values = "agreement = ?", list[object]([agreement])
    for column, value in (("slice", slice_number), ("state", state)):
        if value is not None:
            condition += f" AND {column} = ?"
            values.append(value)
    rows = connection.execute(f"SELECT {columns(CallRow)} FROM calls WHERE {condition} ORDER BY slice, position, number", values)
    return [CallRow(*row) for row in rows]


def get_call(connection: sqlite3.Connection, agreement: bytes, number: int) -> CallRow | None:
    """Give one call."""
    row = connection.execute(
        f"SELECT {columns(CallRow)} FROM calls WHERE agreement = ? AND number = ?", (agreement, number)
    ).fetchone()
    return None if row is None else CallRow(*row)


def save_receipt(connection: sqlite3.Connection, row: ReceiptRow) -> bool:
    """Keep the next receipt, mark its calls and move the agreement's totals. Gives False when it is there already.

    Raises LedgerError for a gap, another receipt for a known slice, or totals that do not follow from the last ones.
    """
    known = get_receipt(connection, row.agreement, row.slice)
    if known is not None:
        if known != row:
            raise LedgerError(f"slice {row.slice} has two different receipts")
        return False
    agreement = get_agreement(connection, row.agreement)
    if agreement is None or row.slice != agreement.slices or row.total != agreement.total + row.amount:
        raise LedgerError(f"the receipt for slice {row.slice} does not follow the one before")
    if row.total > agreement.amount_max:
        raise LedgerError("the receipt exceeds the agreement's largest amount")
    connection.execute(f"INSERT INTO receipts ({columns(ReceiptRow)}) VALUES ({placeholders(ReceiptRow)})", astuple(row))
    connection.execute("UPDATE agreements SET slices = slices + 1, total = ? WHERE id = ?", (row.total, row.agreement))
    connection.execute(
        "UPDATE calls SET state = 'receipted' WHERE agreement = ? AND slice = ? AND state = 'answered'",
        (row.agreement, row.slice),
    )
    return True


def replace_receipts(connection: sqlite3.Connection, rows: Iterable[ReceiptRow]) -> None:
    """Put receipts that charge less in the places of those that have no cheque, to the last one, and set the total.

    Raises LedgerError for one that is paid, that charges more, or whose total does not follow from the one before.
    """
    for row in rows:
        agreement, known = get_agreement(connection, row.agreement), get_receipt(connection, row.agreement, row.slice)
        before = get_receipt(connection, row.agreement, row.slice - 1) if row.slice else None
        if agreement is None or known is None or row.slice < agreement.slices_paid or row.amount > known.amount:
            raise LedgerError(f"the receipt for slice {row.slice} cannot be replaced by this one")
        if row.total != (before.total if before else 0) + row.amount:
            raise LedgerError(f"the receipt for slice {row.slice} does not follow the one before")
        connection.execute(
            "UPDATE receipts SET document = ?, root = ?, amount = ?, total = ? WHERE agreement = ? AND slice = ?",
            (row.document, row.root, row.amount, row.total, row.agreement, row.slice),
        )
        if row.slice == agreement.slices - 1:
            connection.execute("UPDATE agreements SET total = ? WHERE id = ?", (row.total, row.agreement))


def save_cheque(connection: sqlite3.Connection, row: ChequeRow) -> int:
    """Keep the cheque for the next unpaid slice and give what it adds, micro-credits; 0 when it is there already.

    Raises LedgerError for a gap, a second cheque that differs, or a total other than the receipt's.
    """
    known = get_cheque(connection, row.agreement, row.slice)
    if known is not None:
        if known != row:
            raise LedgerError(f"slice {row.slice} has two different cheques")
        return 0
    agreement = get_agreement(connection, row.agreement)
    receipt = get_receipt(connection, row.agreement, row.slice)
    if agreement is None or receipt is None or row.slice != agreement.slices_paid:
        raise LedgerError(f"the cheque for slice {row.slice} does not follow the one before")
    if (row.total, row.receipt) != (receipt.total, receipt.document):
        raise LedgerError(f"the cheque for slice {row.slice} does not match its receipt")
    connection.execute(f"INSERT INTO cheques ({columns(ChequeRow)}) VALUES ({placeholders(ChequeRow)})", astuple(row))
    connection.execute(
        "UPDATE agreements SET slices_paid = slices_paid + 1, paid = ?, chain_tip = ? WHERE id = ?",
        (row.total, row.preimage, row.agreement),
    )
    return row.total - agreement.paid


def get_receipt(connection: sqlite3.Connection, agreement: bytes, slice_number: int) -> ReceiptRow | None:
    """Give one slice's receipt."""
    row = connection.execute(
        f"SELECT {columns(ReceiptRow)} FROM receipts WHERE agreement = ? AND slice = ?", (agreement, slice_number)
    ).fetchone()
    return None if row is None else ReceiptRow(*row)


def get_cheque(connection: sqlite3.Connection, agreement: bytes, slice_number: int) -> ChequeRow | None:
    """Give one slice's cheque."""
    row = connection.execute(
        f"SELECT {columns(ChequeRow)} FROM cheques WHERE agreement = ? AND slice = ?", (agreement, slice_number)
    ).fetchone()
    return None if row is None else ChequeRow(*row)


def list_receipts(connection: sqlite3.Connection, agreement: bytes | None = None, limit: int = 1000) -> list[ReceiptRow]:
    """Give receipts of one agreement, or of all, newest first."""
    rows = connection.execute(
        f"""SELECT {columns(ReceiptRow)} FROM receipts WHERE ?1 IS NULL OR agreement = ?1
            ORDER BY ended_ms DESC, agreement, slice DESC LIMIT ?2""",
        numbered(agreement, limit),
    )
    return [ReceiptRow(*row) for row in rows]


def list_cheques(connection: sqlite3.Connection, agreement: bytes | None = None, limit: int = 1000) -> list[ChequeRow]:
    """Give cheques of one agreement, or of all, newest first."""
    rows = connection.execute(
        f"""SELECT {columns(ChequeRow)} FROM cheques WHERE ?1 IS NULL OR agreement = ?1
            ORDER BY issued_ms DESC, agreement, slice DESC LIMIT ?2""",
        numbered(agreement, limit),
    )
    return [ChequeRow(*row) for row in rows]
