"""Jobs of this node as a client: their items, their budget and their history.

The budget is a hard stop kept by the table itself: `spent + reserved` can never exceed `budget_max`. An order reserves its
largest amount under its own id; cheques turn the reservation into spending; the end of the order gives the rest back.
"""

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Literal

from p2pnode.errors import LedgerError
from p2pnode.ids import JOB, id_range
from p2pnode.store.database import columns, numbered, placeholders

JobKind = Literal["run", "map", "session"]
JobState = Literal["running", "stopping", "ended"]
ItemState = Literal["waiting", "placed", "done", "failed"]


@dataclass(frozen=True, slots=True)
class JobRow:
    """One job. spec: its description as the jobs layer encodes it. Amounts in micro-credits. items: how many it has.

    waits_for: text of the Reason it waits for, empty when it does not. end_reason: text of an EndReason, only when ended.
    """

    id: bytes
    kind: JobKind
    name: str
    model_id: bytes
    spec: bytes
    state: JobState
    budget_max: int
    created_ms: int
    deadline_ms: int = 0
    items: int = 0
    spent: int = 0
    reserved: int = 0
    waits_for: str = ""
    ended_ms: int = 0
    end_reason: str = ""
    end_detail: str = ""


@dataclass(frozen=True, slots=True)
class ItemRow:
    """One item of a job. output: where its result is kept.

    call: its number in `agreement`, -1 before it was placed; from then on with the input's hash and the call's price.
    """

    job: bytes
    position: int
    state: ItemState = "waiting"
    attempts: int = 0
    input_hash: bytes = b""
    output_hash: bytes = b""
    output: str = ""
    provider: bytes = b""
    agreement: bytes = b""
    call: int = -1
    amount: int = 0
    reason: str = ""
    changed_ms: int = 0


@dataclass(frozen=True, slots=True)
class JobEvent:
    """One line of a job's history."""

    job: bytes
    sequence: int
    at_ms: int
    kind: str
    detail: str


def save_job(connection: sqlite3.Connection, row: JobRow) -> bool:
    """Keep a new job. Gives False, and changes nothing, when it is there already."""
    cursor = connection.execute(
        f"INSERT INTO jobs ({columns(JobRow)}) VALUES ({placeholders(JobRow)}) ON CONFLICT (id) DO NOTHING", astuple(row)
    )
    return cursor.rowcount == 1


def get_job(connection: sqlite3.Connection, job: bytes) -> JobRow | None:
    """Give a job by id."""
    row = connection.execute(f"SELECT {columns(JobRow)} FROM jobs WHERE id = ?", (job,)).fetchone()
    return None if row is None else JobRow(*row)


def find_jobs(connection: sqlite3.Connection, typed: str, limit: int = 10) -> list[JobRow]:
    """Give jobs whose id text starts with what a person typed. Raises ValueError, in words."""
    rows = connection.execute(
        f"SELECT {columns(JobRow)} FROM jobs WHERE id BETWEEN ? AND ? ORDER BY id LIMIT ?", (*id_range(JOB, typed), limit)
    )
    return [JobRow(*row) for row in rows]


def list_jobs(connection: sqlite3.Connection, *, is_ended: bool | None = None, limit: int = 100) -> list[JobRow]:
    """Give jobs, newest first."""
    condition = {None: "1", True: "state = 'ended'", False: "state <> 'ended'"}[is_ended]
    rows = connection.execute(
        f"SELECT {columns(JobRow)} FROM jobs WHERE {condition} ORDER BY created_ms DESC, id LIMIT ?", (limit,)
    )
    return [JobRow(*row) for row in rows]


def set_job_state(connection: sqlite3.Connection, job: bytes, state: JobState, waits_for: str = "") -> None:
    """Move a job that has not ended to `running` or `stopping`, and say what it waits for."""
    connection.execute("UPDATE jobs SET state = ?, waits_for = ? WHERE id = ? AND state <> 'ended'", (state, waits_for, job))


def set_budget(connection: sqlite3.Connection, job: bytes, budget_max: int) -> bool:
    """Change a job's largest total. Gives False when more than that is spent or reserved already."""
    cursor = connection.execute(
        "UPDATE jobs SET budget_max = ?1 WHERE id = ?2 AND spent + reserved <= ?1 AND state <> 'ended'",
        numbered(budget_max, job),
    )
    return cursor.rowcount == 1


def end_job(connection: sqlite3.Connection, job: bytes, reason: str, now_ms: int, detail: str = "") -> bool:
    """End a job. Gives False, keeping the first reason, when it had ended. Reservations stay until their orders end."""
    cursor = connection.execute(
        "UPDATE jobs SET state = 'ended', waits_for = '', end_reason = ?, end_detail = ?, ended_ms = ?"
        " WHERE id = ? AND state <> 'ended'",
        (reason, detail, now_ms, job),
    )
    return cursor.rowcount == 1


def reserve(connection: sqlite3.Connection, job: bytes, holder: bytes, amount: int) -> bool:
    """Set aside budget for an order before it is sent. Gives False when it does not fit; repeating it is harmless.

    holder: the order's id. Raises LedgerError when the holder has reserved another amount.
    """
    known = connection.execute("SELECT amount FROM reservations WHERE job = ? AND holder = ?", (job, holder)).fetchone()
    if known is not None:
        if known[0] != amount:
            raise LedgerError("an order has reserved another amount before")
        return True
    cursor = connection.execute(
        "UPDATE jobs SET reserved = reserved + ?1 WHERE id = ?2 AND spent + reserved + ?1 <= budget_max AND state = 'running'",
        numbered(amount, job),
    )
    if cursor.rowcount != 1:
        return False
    connection.execute("INSERT INTO reservations (job, holder, amount) VALUES (?, ?, ?)", (job, holder, amount))
    return True


def spend(connection: sqlite3.Connection, job: bytes, holder: bytes, amount: int) -> None:
    """Turn part of a reservation into spending. Call it only where the cheque's posting was new (`accounts.post`).

    Raises LedgerError when the order has not reserved that much.
    """
    cursor = connection.execute(
        "UPDATE reservations SET amount = amount - ?1 WHERE job = ?2 AND holder = ?3 AND amount >= ?1",
        numbered(amount, job, holder),
    )
    if cursor.rowcount != 1:
        raise LedgerError("an order spends more than it reserved")
    connection.execute("UPDATE jobs SET reserved = reserved - ?1, spent = spent + ?1 WHERE id = ?2", numbered(amount, job))


def release(connection: sqlite3.Connection, job: bytes, holder: bytes) -> int:
    """Give back what is left of an order's reservation; gives the amount, 0 when there is none."""
    row = connection.execute("DELETE FROM reservations WHERE job = ? AND holder = ? RETURNING amount", (job, holder)).fetchone()
    if row is None:
        return 0
    connection.execute("UPDATE jobs SET reserved = reserved - ? WHERE id = ?", (row[0], job))
    return int(row[0])


def placed_calls(connection: sqlite3.Connection, job: bytes, agreement: bytes) -> list[tuple[int, bytes, int]]:
    """Give (number, input hash, amount) of the calls under an agreement whose outputs an unfinished map lacks.

    Somebody has to decide about each of them before it may be paid: recall its output, or give it up.
    """
    rows = connection.execute(
        """SELECT call, input_hash, amount FROM items
           WHERE job = ?1 AND state = 'placed' AND agreement = ?2 AND call >= 0 AND length(input_hash) = 32
           AND EXISTS (SELECT 1 FROM jobs WHERE id = ?1 AND kind = 'map' AND state <> 'ended') ORDER BY call""",
        numbered(job, agreement),
    )
    return [(number, input_hash, amount) for number, input_hash, amount in rows]


def list_reservations(connection: sqlite3.Connection, job: bytes) -> dict[bytes, int]:
    """Give holder -> amount of a job's reservations."""
    return dict(connection.execute("SELECT holder, amount FROM reservations WHERE job = ? ORDER BY holder", (job,)))


def add_items(connection: sqlite3.Connection, job: bytes, input_hashes: Sequence[bytes]) -> int:
    """Append items to a job and give the position of the first."""
    row = connection.execute(
        "UPDATE jobs SET items = items + ? WHERE id = ? RETURNING items", (len(input_hashes), job)
    ).fetchone()
    if row is None:
        raise LedgerError("items were added to a job that does not exist")
    first = int(row[0]) - len(input_hashes)
    connection.executemany(
        "INSERT INTO items (job, position, state, input_hash) VALUES (?, ?, 'waiting', ?)",
        [(job, first + index, input_hash) for index, input_hash in enumerate(input_hashes)],
    )
    return first


def save_items(connection: sqlite3.Connection, rows: Iterable[ItemRow]) -> None:
    """Bring items up to date. An item that is done stays as it is: its result was stored and paid for."""
    connection.executemany(
        """UPDATE items SET state = ?, attempts = ?, input_hash = ?, output_hash = ?, output = ?, provider = ?, agreement = ?,
           call = ?, amount = ?, reason = ?, changed_ms = ? WHERE job = ? AND position = ? AND state <> 'done'""",
        [(*astuple(row)[2:], row.job, row.position) for row in rows],
    )


def list_items(
    connection: sqlite3.Connection, job: bytes, *, state: ItemState | None = None, after: int = -1, limit: int = 10_000
) -> list[ItemRow]:
    """Give a job's items with a position above `after`, in order."""
    rows = connection.execute(
        f"""SELECT {columns(ItemRow)} FROM items WHERE job = ?1 AND position > ?2 AND (?3 IS NULL OR state = ?3)
            ORDER BY position LIMIT ?4""",
        numbered(job, after, state, limit),
    )
    return [ItemRow(*row) for row in rows]


def count_items(connection: sqlite3.Connection, job: bytes) -> dict[str, int]:
    """Give state -> number of items; states without items are left out."""
    return dict(connection.execute("SELECT state, count(*) FROM items WHERE job = ? GROUP BY state ORDER BY state", (job,)))


def restart_items(connection: sqlite3.Connection, job: bytes) -> list[ItemRow]:
    """Give the items that were placed when the node stopped: their calls may be fetched again by number and input hash."""
    return list_items(connection, job, state="placed", limit=1_000_000)


def rewind_item(row: ItemRow, reason: str, now_ms: int) -> ItemRow:
    """Give an item ready to be placed again after a failed attempt."""
    return replace(row, state="waiting", provider=b"", agreement=b"", call=-1, reason=reason, changed_ms=now_ms)


def append_event(connection: sqlite3.Connection, job: bytes, now_ms: int, kind: str, detail: str = "") -> None:
    """Add a line to a job's history."""
    connection.execute(
        """INSERT INTO job_events (job, sequence, at_ms, kind, detail)
           VALUES (?1, (SELECT coalesce(max(sequence), 0) + 1 FROM job_events WHERE job = ?1), ?2, ?3, ?4)""",
        numbered(job, now_ms, kind, detail),
    )


def list_events(connection: sqlite3.Connection, job: bytes, after: int = 0, limit: int = 1000) -> list[JobEvent]:
    """Give a job's history after a sequence number, oldest first."""
    rows = connection.execute(
        f"SELECT {columns(JobEvent)} FROM job_events WHERE job = ? AND sequence > ? ORDER BY sequence LIMIT ?",
        (job, after, limit),
    )
    return [JobEvent(*row) for row in rows]


def remove_jobs(connection: sqlite3.Connection, ended_before_ms: int) -> int:
    """Remove jobs that ended before a time and hold no reservation, with items and history; gives their number."""
    doomed = [
        row[0]
        for row in connection.execute(
            "SELECT id FROM jobs WHERE state = 'ended' AND ended_ms < ? AND reserved = 0", (ended_before_ms,)
        )
    ]
    for job in doomed:
        for table in ("items", "job_events", "reservations"):
            connection.execute(f"DELETE FROM {table} WHERE job = ?", (job,))
        connection.execute("DELETE FROM jobs WHERE id = ?", (job,))
    return len(doomed)
