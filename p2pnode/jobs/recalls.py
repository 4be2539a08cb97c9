"""The calls that a map had under way when its process ended, decided one by one, whether or not the map goes on.

Nothing of them is paid before it is decided, so this runs as soon as the node does: a provider waits half a minute for a cheque,
its owner may wait for days before typing the command again. The provider answers by number alone from what it kept; the output
becomes the item's part, and only then is the call confirmed. A call that it never executed costs nothing and its item is free
to be placed again. No item is placed anywhere else before its old call is decided, so none is paid twice.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import trio

from p2pnode.environment import Environment
from p2pnode.errors import InputError, PeerError, Refused, StoreError, TooSlow, Unreachable
from p2pnode.jobs.item_book import ItemBook
from p2pnode.jobs.settings import JobSettings
from p2pnode.reasons import EndReason, Reason
from p2pnode.store import jobs as rows

_FIRST_PAUSE_SECONDS = 0.02
_PAUSE_SECONDS_MAX = 0.5

Read = Callable[[int], Awaitable[Mapping[str, Any]]]


class Recalls:
    """What one map had placed. agreement: gives an open agreement by id, or None. read: gives an item's inputs.

    can_store: says whether outputs may still be written where the map's parts belong; otherwise all is given up.
    """

    def __init__(
        self, environment: Environment, settings: JobSettings, agreement: Callable[[bytes], Any], items: ItemBook,
        placed: Sequence[rows.ItemRow], read: Read, can_store: Callable[[], Awaitable[bool]],
    ) -> None:  # fmt: skip
        self.items = items
        self._environment = environment
        self._settings = settings
        self._agreement = agreement
        self._read = read
        self._can_store = can_store
        self._rows = {row.position: row for row in placed}
        self._scopes = {position: trio.CancelScope() for position in self._rows}
        self._decided = {position: trio.Event() for position in self._rows}
        self._stored: set[int] = set()
        self._withdrawn: set[int] = set()

    def undecided(self) -> list[rows.ItemRow]:
        """Give the items whose calls are not decided yet."""
        return [row for position, row in self._rows.items() if not self._decided[position].is_set()]

    async def decision(self, position: int) -> bool:
        """Wait until an item's call is decided. True: its output is stored; False: the item may be placed again."""
        await self._decided[position].wait()
        return position in self._stored

    def give_up(self, position: int) -> None:
        """Wait no longer for an item's provider. If that has answered the call before, it will be paid without its output."""
        self._scopes[position].cancel()

    def place_again(self, position: int) -> None:
        """Wait no longer for an item's provider, which stays away: the item is done elsewhere, and this call withdrawn."""
        self._withdrawn.add(position)
        self._scopes[position].cancel()

    async def stop(self) -> None:
        """Give up all that is not decided, because its output has no place any more."""
        for position, decided in self._decided.items():
            self.give_up(position)
            await decided.wait()

    async def run(self) -> None:
        """Decide everything, then end the agreements. Cancelled: the rest is decided after the next start."""
        if not await self._can_store():
            await self.items.event("recall-failed", "the map's data or its parts are gone; what was under way is given up")
            for position in self._rows:
                self.give_up(position)
        async with trio.open_nursery() as nursery:
            for agreement_id in sorted({row.agreement for row in self._rows.values()}):
                nursery.start_soon(self._decide_all, agreement_id)

    async def _decide_all(self, agreement_id: bytes) -> None:
        agreement = self._agreement(agreement_id)
        async with trio.open_nursery() as nursery:
            for row in self._rows.values():
                if row.agreement == agreement_id:
                    nursery.start_soon(self._decide, row, agreement)
        if agreement is not None:
            await agreement.close(EndReason.COMPLETED)

    async def _decide(self, row: rows.ItemRow, agreement: Any) -> None:
        is_stored = has_failed = False
        with self._scopes[row.position] as scope:
            try:
                is_stored = await self._recall(row, agreement)
            except (StoreError, InputError) as error:
                has_failed = True
                await self.items.event("recall-failed", f"item {row.position}: {error}")
        if scope.cancelled_caught and row.position in self._withdrawn and agreement is not None:
            agreement.withdraw(row.call)
        elif (scope.cancelled_caught or has_failed) and agreement is not None:
            agreement.give_up(row.call)
        if is_stored:
            self._stored.add(row.position)
        else:
            await self.items.waits(row, Reason.CANCELLED.value)
        self._decided[row.position].set()

    async def _recall(self, row: rows.ItemRow, agreement: Any) -> bool:
        if await self.items.found(row):
            if agreement is not None:
                agreement.give_up(row.call)  # its output is safe: it may be paid as the provider's leaf says
            return True
        pause, failures = _FIRST_PAUSE_SECONDS, 0
        while agreement is not None and agreement.end_reason is None and row.input_hash:
            if agreement.is_connected:
                try:
                    return await self._fetched(row, agreement)
                except (Unreachable, TooSlow):
                    pass  # its fate is still open: ask again
                except PeerError:
                    failures += 1
                    if failures >= self._settings.attempts_max:
                        agreement.confirm(row.call)  # charged, and it cannot give the answer: the agreement deals with that
                        return False
            await trio.sleep(pause)
            pause = min(pause * 2, _PAUSE_SECONDS_MAX)
        return False

    async def _fetched(self, row: rows.ItemRow, agreement: Any) -> bool:
        """Get a call's answer and store it, or False when it was not executed. Raises PeerError, StoreError, InputError."""
        try:
            answer = await agreement.fetch(row.call)
        except Refused as refusal:
            if refusal.reason is not Reason.OUTPUT_GONE:
                return False
            answer = await self._again(row, agreement)
        with trio.CancelScope(shield=True):  # half of it would be an item that is stored, paid, and placed again
            await self.items.done(row.position, answer.outputs, row.provider, row.agreement, row.call, answer.amount)
        agreement.confirm(row.call)
        return True

    async def _again(self, row: rows.ItemRow, agreement: Any) -> Any:
        """Have a call executed again whose answer the provider did not keep: the same number, so without charge."""
        values = await self._read(row.position)
        if agreement.described(values)[0] != row.input_hash:
            raise InputError("the data has changed since the call was made")
        return await agreement.call(values, self.items.names, timeout=self._settings.run_seconds, number=row.call, hold=True)
