"""The jobs' rows: made, found, summed up and ended. Every job has exactly one end reason, set once.

A map is known by what it does (model, data, output, batch), so the same command finds it again after a crash.
"""

import hashlib
import sqlite3
from pathlib import Path
from typing import Any

from p2pnode.environment import Environment
from p2pnode.errors import InputError
from p2pnode.ids import DOCUMENT, JOB, MODEL, id_text
from p2pnode.jobs.datasets import fingerprint
from p2pnode.jobs.spec import MapSpec, Terms, decode_map_spec
from p2pnode.reasons import EndReason
from p2pnode.store import agreements
from p2pnode.store import jobs as rows

# The table keeps a number; this one stands for "no limit" and is beyond all money there will be.
NO_LIMIT = 2**62
# Far more attempts at one map than anybody makes.
_ATTEMPTS_MAX = 1000


class JobBook:
    """This node's jobs on disk."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment

    async def new(self, kind: rows.JobKind, name: str, model_id: bytes, terms: Terms, items: int = 0) -> bytes:
        """Save a new job and give its id."""
        job = self._environment.entropy.token(32)
        now_ms = self._environment.clock.wall_ms()
        row = rows.JobRow(
            id=job, kind=kind, name=Path(name).name[:256], model_id=model_id, spec=b"", state="running",
            budget_max=NO_LIMIT if terms.max_total is None else terms.max_total, created_ms=now_ms,
            deadline_ms=now_ms + round(terms.deadline_seconds * 1000) if terms.deadline_seconds else 0, items=items,
        )  # fmt: skip
        await self._environment.database.write(lambda connection: rows.save_job(connection, row))
        return job

    async def end(self, job: bytes, end: EndReason, detail: str) -> None:
        """End a job; the first reason stays."""
        now_ms = self._environment.clock.wall_ms()
        await self._environment.database.write(lambda connection: rows.end_job(connection, job, end.value, now_ms, detail[:1000]))

    async def newest(self, limit: int = 100) -> list[dict[str, Any]]:
        """Give jobs, newest first."""
        return await self._environment.database.read(
            lambda connection: [self.summary(connection, row) for row in rows.list_jobs(connection, limit=limit)]
        )

    async def find(self, typed: str) -> bytes:
        """Give the one job whose id starts with what a person typed. Raises InputError for none or several."""
        try:
            found = await self._environment.database.read(lambda connection: rows.find_jobs(connection, typed))
        except ValueError as error:
            raise InputError(str(error)) from error
        if len(found) != 1:
            raise InputError(f"{len(found) or 'no'} jobs start with {typed!r}; `p2pnode job list` shows them")
        return found[0].id

    async def describe(self, job: bytes) -> dict[str, Any]:
        """Give a job's summary, items by state and history. Raises InputError for an unknown one."""

        def query(connection: sqlite3.Connection) -> dict[str, Any]:
            row = rows.get_job(connection, job)
            if row is None:
                raise InputError("there is no such job")
            history = rows.list_events(connection, job, limit=200)
            return self.summary(connection, row) | {
                "items_by_state": rows.count_items(connection, job),
                "history": [{"at_ms": event.at_ms, "kind": event.kind, "detail": event.detail} for event in history],
            }

        return await self._environment.database.read(query)

    async def receipts(self, job: bytes) -> tuple[str, ...]:
        """Give the ids of the receipts that cover a job's calls, oldest first."""

        def query(connection: sqlite3.Connection) -> tuple[str, ...]:
            found = [
                receipt.document
                for agreement in agreements.list_agreements(connection, role="client", job=job)
                for receipt in agreements.list_receipts(connection, agreement=agreement.id)
            ]
            return tuple(id_text(DOCUMENT, document) for document in reversed(found))

        return await self._environment.database.read(query)

    async def money(self, job: bytes) -> tuple[int, dict[bytes, int]]:
        """Give what a job has spent on agreements that ended, and what each open one may still cost."""
        return await self._environment.database.read(lambda connection: job_money(connection, job))

    async def unfinished(self) -> list[rows.JobRow]:
        """Give the jobs that have not ended."""
        return await self._environment.database.read(lambda connection: rows.list_jobs(connection, is_ended=False, limit=10_000))

    async def placed(self, job: bytes) -> list[rows.ItemRow]:
        """Give the items whose calls were under way when the process ended."""
        return await self._environment.database.read(lambda connection: rows.restart_items(connection, job))

    async def map_row(
        self, spec: MapSpec, model_id: bytes, key: bytes, items: int, running: frozenset[bytes], output_stands: bool
    ) -> tuple[bytes, rows.JobRow, int]:
        """Give the job of this map: the one under way, the complete one, or a new one; and what earlier attempts spent."""
        now_ms = self._environment.clock.wall_ms()

        def transaction(connection: sqlite3.Connection) -> tuple[bytes, rows.JobRow, int]:
            spent = attempt = 0
            while (row := rows.get_job(connection, job := attempt_id(key, attempt))) is not None:
                if job in running or row.state != "ended":
                    return job, row, spent
                if row.end_reason == EndReason.COMPLETED.value:
                    if output_stands:
                        return job, row, spent
                    spent = 0
                else:
                    past, promised = job_money(connection, job)
                    spent += past + sum(promised.values())
                attempt += 1
            limit = spec.terms.max_total
            row = rows.JobRow(
                id=job, kind="map", name=Path(spec.data).name[:256], model_id=model_id, spec=spec.encoded(), state="running",
                budget_max=NO_LIMIT if limit is None else max(limit - spent, 0), created_ms=now_ms,
            )  # fmt: skip
            rows.save_job(connection, row)
            rows.add_items(connection, job, [b""] * items)
            return job, row, spent

        return await self._environment.database.write(transaction)

    async def repair(self) -> None:
        """End what a crash left open: runs and sessions died with their process; maps wait to be started again."""
        await self._environment.database.write(self._repair)

    def _repair(self, connection: sqlite3.Connection) -> None:
        now_ms = self._environment.clock.wall_ms()
        for row in rows.list_jobs(connection, is_ended=False, limit=10_000):
            if row.kind != "map":
                rows.end_job(connection, row.id, EndReason.FAILED.value, now_ms, "the node stopped while it ran")
            else:
                rows.set_job_state(connection, row.id, "running", "restart")

    @staticmethod
    def summary(connection: sqlite3.Connection, row: rows.JobRow) -> dict[str, Any]:
        """Give a job as `job list --json` shows it."""
        limited = row.budget_max < NO_LIMIT
        found = agreements.list_agreements(connection, role="client", job=row.id, limit=1_000_000)
        spent = sum(agreement.paid for agreement in found)
        promised = sum(agreement.amount_max - agreement.paid for agreement in found if agreement.state != "ended")
        summary: dict[str, Any] = {
            "id": id_text(JOB, row.id),
            "kind": row.kind,
            "name": row.name,
            "model": id_text(MODEL, row.model_id),
            "state": row.state,
            "items": row.items,
            "spent_microcredits": spent,
            "promised_microcredits": promised,
            "limit_microcredits": row.budget_max if limited else None,
            "created_ms": row.created_ms,
            "ended_ms": row.ended_ms or None,
            "end_reason": row.end_reason,
            "end_detail": row.end_detail,
            "waits_for": row.waits_for,
        }
        if row.kind == "map":
            spec = decode_map_spec(row.spec)
            summary |= {"data": spec.data, "output": spec.output}
        return summary


def job_money(connection: sqlite3.Connection, job: bytes) -> tuple[int, dict[bytes, int]]:
    """Give (spent, open agreement -> the most it may cost). An order is stored with its limit before it is sent.

    So these rows are the job's reservations: nothing can be spent that is not in them, whatever a crash interrupted.
    """
    found = agreements.list_agreements(connection, role="client", job=job, limit=1_000_000)
    promised = {row.id: row.amount_max for row in found if row.state != "ended"}
    return sum(row.paid for row in found if row.state == "ended"), promised


def map_key(spec: MapSpec, model_id: bytes, data: bytes) -> bytes:
    """Give 32 bytes that are equal for the same work: model, data, output place, batch. Prices and limits may change."""
    parts = (model_id, data, spec.data.encode(), spec.output.encode(), "\0".join(spec.outputs).encode(), str(spec.batch).encode())
    digest = hashlib.blake2b(digest_size=32, person=b"p2pnode-map-key")
    for part in parts:
        digest.update(len(part).to_bytes(4, "big") + part)
    return digest.digest()


def attempt_id(key: bytes, attempt: int) -> bytes:
    """Give the job id of the n-th attempt at a piece of work."""
    return hashlib.blake2b(key + attempt.to_bytes(4, "big"), digest_size=32, person=b"p2pnode-attempt").digest()


def stored_key(spec: MapSpec, model_id: bytes, job: bytes) -> bytes | None:
    """Give the key of a stored map, or None when its data is gone or has changed, so that no command will go on with it."""
    try:
        key = map_key(spec, model_id, fingerprint(Path(spec.data)))
    except OSError:
        return None
    return key if any(attempt_id(key, attempt) == job for attempt in range(_ATTEMPTS_MAX)) else None
