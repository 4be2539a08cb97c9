"""The durable steps of a map's items, so that it can be killed between any two of them.

An item's row says `placed`, with agreement, call number, input hash and price, before its call leaves. Its part is in place,
by an atomic rename, before its row says `done`. Only then may its call be confirmed, so that no cheque covers an output that
could still be lost. Rows written at the same time share a commit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from p2pnode.environment import Environment
from p2pnode.jobs.outputs import part_path, write_part
from p2pnode.reasons import Reason
from p2pnode.store import jobs as rows


class ItemBook:
    """One map's items on disk. output: the file or folder to be; names: the outputs that are kept."""

    def __init__(self, environment: Environment, job: bytes, output: Path, names: Sequence[str]) -> None:
        self._environment = environment
        self.job = job
        self.output = output
        self.names = names

    async def placed(self, position: int, provider: bytes, agreement: bytes, number: int, input_hash: bytes, amount: int) -> None:
        """Say under which number an item's call will be sent. Cancelled: it may be so written."""
        await self._save(
            rows.ItemRow(
                self.job, position, "placed", input_hash=input_hash, provider=provider, agreement=agreement, call=number,
                amount=amount, changed_ms=self._now_ms(),
            )
        )  # fmt: skip

    async def done(
        self, position: int, outputs: Mapping[str, Any], provider: bytes = b"", agreement: bytes = b"", number: int = -1,
        amount: int = 0,
    ) -> None:  # fmt: skip
        """Store an item's outputs, then say so. Raises StoreError."""
        path = part_path(self.output, position)
        await self._environment.executor.run(write_part, path, {name: outputs[name] for name in self.names})
        await self._save(
            rows.ItemRow(
                self.job, position, "done", output=path.name, provider=provider, agreement=agreement, call=number,
                amount=amount, changed_ms=self._now_ms(),
            )
        )  # fmt: skip

    async def found(self, row: rows.ItemRow) -> bool:
        """Say whether an item's part is in place; then its row says so too: a crash came between the two."""
        path = part_path(self.output, row.position)
        if not await self._environment.executor.run(path.exists):
            return False
        await self._save(replace(row, state="done", output=path.name, changed_ms=self._now_ms()))
        return True

    async def waits(self, row: rows.ItemRow, reason: str) -> None:
        """Say that an item's call came to nothing: it may be placed again."""
        await self._save(rows.rewind_item(row, reason, self._now_ms()))

    async def failed(self, position: int, reason: Reason) -> None:
        """Say that an item has failed for good."""
        await self._save(rows.ItemRow(self.job, position, "failed", reason=reason.value, changed_ms=self._now_ms()))

    async def restore(self) -> list[int]:
        """Give the positions whose outputs are stored."""
        done: list[int] = []
        lost, after = 0, -1
        while True:
            page = await self._environment.database.read(
                lambda connection, after=after: rows.list_items(connection, self.job, after=after)  # type: ignore[misc]
            )
            if not page:
                break
            after = page[-1].position
            stored = [row for row in page if part_path(self.output, row.position).exists()]
            done += [row.position for row in stored]
            lost += sum(row.state == "done" for row in page) - sum(row.state == "done" for row in stored)
            # The crash came between the part's rename and its row: the part is whole, so the item is done.
            late = [replace(row, state="done") for row in stored if row.state != "done"]
            if late:
                await self._environment.database.write(lambda connection, late=late: rows.save_items(connection, late))  # type: ignore[misc]
        if lost:
            await self.event("parts-gone", f"{lost} results that were stored are gone; they are computed, and paid for, again")
        return done

    async def event(self, kind: str, detail: str) -> None:
        """Add a line to the job's history."""
        now_ms = self._now_ms()
        await self._environment.database.write(
            lambda connection: rows.append_event(connection, self.job, now_ms, kind, detail[:1000])
        )

    async def _save(self, row: rows.ItemRow) -> None:
        await self._environment.database.write(lambda connection: rows.save_items(connection, [row]))

    def _now_ms(self) -> int:
        return self._environment.clock.wall_ms()
