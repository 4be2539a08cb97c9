"""One map, carried out: lanes opened and replaced, items read, sent, stored and assembled; resumable after SIGKILL.

An item passes these durable steps: its row says `placed` (agreement and call number) before the call is sent; its part is
in place by an atomic rename before its row says `done`; only then is the call confirmed, so that no cheque covers an
output which could still be lost. After a crash a placed item is asked for again under the same number, which the provider
answers from what it kept, without a new charge.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import trio

from p2pnode.environment import Environment
from p2pnode.errors import InputError, P2PNodeError, PeerError, Refused, StoreError, TooSlow, Unreachable
from p2pnode.jobs.batches import (
    Answered,
    CallFailed,
    CancelCopy,
    Effect,
    Event,
    Finished,
    GaveUp,
    LaneClosed,
    LaneOpened,
    MapMachine,
    Place,
    Stopped,
)  # fmt: skip
from p2pnode.jobs.budget import Budget
from p2pnode.jobs.datasets import Dataset
from p2pnode.jobs.outputs import Part, assemble, part_path, read_part, remove_parts, write_part
from p2pnode.jobs.progress import MapProgress
from p2pnode.jobs.sessions import Local, order_within
from p2pnode.jobs.settings import JobSettings
from p2pnode.jobs.spec import MapSpec
from p2pnode.jobs.suppliers import Shapes, Suppliers, Supply, input_shapes, larger_shapes, no_provider
from p2pnode.reasons import EndReason, Reason
from p2pnode.store import jobs as rows

_LOCAL_LANE = b"local"
_LANE_ENDS = frozenset({Reason.BUDGET, Reason.AGREEMENT_ENDED, Reason.UNKNOWN_AGREEMENT, Reason.SHAPE_OVER_QUOTE})
_PASSING = frozenset({Reason.BUSY, Reason.RATE, Reason.TOO_MANY_REQUESTS, Reason.MEMORY})


class MapRun:
    """A running map. budget: holds what earlier attempts spent. spec: with its outputs named and its paths absolute."""

    def __init__(
        self, environment: Environment, settings: JobSettings, suppliers: Suppliers, job: bytes, spec: MapSpec, model_id: bytes,
        dataset: Dataset, kind: str, budget: Budget, local: Local | None,
    ) -> None:  # fmt: skip
        self._environment = environment
        self._settings = settings
        self._suppliers = suppliers
        self.job = job
        self.spec = spec
        self.model_id = model_id
        self._names = spec.outputs
        self._dataset = dataset
        self._kind = kind
        self._output = Path(spec.output)
        self.budget = budget
        self._local = local
        self._wanted = spec.terms.providers or settings.providers_max
        self._machine = MapMachine(settings, dataset.items)
        self._lanes: dict[bytes, Supply | None] = {}
        self._retired: set[bytes] = set()
        self._cut: set[bytes] = set()
        self._tickets: dict[tuple[int, bytes], trio.CancelScope] = {}
        self._shapes: Shapes = ()
        self._send, self._receive = trio.open_memory_channel[Event](1 << 16)
        self._nursery: trio.Nursery | None = None
        self._opening = False
        self._open_again_at = 0.0
        self._idle_since: float | None = None
        self._started = environment.clock.monotonic()
        self._done_before = 0
        self.waits_for: Reason | None = None
        self.finished: Finished | None = None
        self.changed = trio.Event()
        self.ended = trio.Event()

    def stop(self, end: EndReason = EndReason.CANCELLED, reason: Reason = Reason.CANCELLED) -> None:
        """End after what is in flight."""
        self._post(Stopped(end, reason))

    def progress(self) -> MapProgress:
        """Give how far it is now."""
        machine, now = self._machine, self._environment.clock.monotonic()
        fresh, seconds = machine.done - self._done_before, now - self._started
        rate = fresh / seconds if fresh and seconds > 0 else 0.0
        left = machine.count - machine.done - machine.failed
        spent = self.budget.spent + sum(supply.charged for supply in self._lanes.values() if supply is not None)
        return MapProgress(
            state="ended" if self.finished else "running",
            done=machine.done,
            failed=machine.failed,
            total=machine.count,
            rows=self._dataset.rows,
            in_flight=machine.in_flight,
            providers=len(self._active),
            rate=rate,
            spent=spent,
            reserved=self.budget.reserved,
            expected_total=round(spent / fresh * (fresh + left)) if fresh else None,
            eta_seconds=left / rate if rate else None,
            waits_for=self.waits_for.value if self.waits_for else "",
            end_reason=self.finished.end.value if self.finished else "",
            detail=self.finished.detail if self.finished else "",
        )

    async def run(self) -> Finished:
        """Carry it out and give how it ended. Cancelled, it leaves every item in a state that a restart continues from."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._finish_when_cancelled)
                placed = await self._restore()
                await self._adopt(placed)
                if self.spec.terms.deadline_seconds is not None:
                    nursery.start_soon(self._expire, self.spec.terms.deadline_seconds)
                finished = await self._loop()
                nursery.cancel_scope.cancel()
        finally:
            with trio.move_on_after(self._settings.close_seconds, shield=True):
                await self._close_lanes()
        if finished.end is EndReason.COMPLETED:
            try:
                await self._environment.executor.run(assemble, self._output, self._kind, self._parts)
            except InputError as error:
                finished = Finished(EndReason.FAILED, Reason.WRONG_SHAPE, f"{error} (the parts are kept)")
            else:
                await self._environment.executor.run(remove_parts, self._output)
        self.finished = finished
        self.tell()
        return finished

    async def _finish_when_cancelled(self) -> None:
        """When the node stops, let what is in flight land: it will be paid, so it had better be stored."""
        try:
            await trio.sleep_forever()
        finally:
            deadline = trio.current_time() + self._settings.close_seconds / 2
            for scope in self._tickets.values():
                scope.deadline = min(scope.deadline, deadline)

    async def _loop(self) -> Finished:
        event: Event | None = None
        while True:
            now = self._environment.clock.monotonic()
            effects = self._machine.handle(event, now) if event is not None else self._machine.tick(now)
            for effect in effects:
                if isinstance(effect, Finished):
                    return effect
                await self._perform(effect)
            self._tend_lanes()
            self.tell()
            event = None
            with trio.move_on_at(trio.current_time() + min(self._machine.deadline(now) - now, 1.0)):
                event = await self._receive.receive()

    async def _perform(self, effect: Effect) -> None:
        assert self._nursery is not None
        match effect:
            case Place(position, key):
                self._nursery.start_soon(self._item, position, key, None)
            case CancelCopy(position, key):
                if (scope := self._tickets.get((position, key))) is not None:
                    scope.cancel()
            case GaveUp(position, reason, detail):
                await self._save(rows.ItemRow(self.job, position, "failed", reason=reason.value, changed_ms=self._now_ms()))
                await self._event("item-failed", f"item {position}: {reason.value}: {detail}"[:1000])

    async def _item(self, position: int, key: bytes, number: int | None) -> None:
        """One copy of one item, from reading it to its durable end."""
        if (position, key) in self._tickets:
            return
        scope = self._tickets[position, key] = trio.CancelScope(shield=True)
        event: Event = CallFailed(position, key, Refused(Reason.CANCELLED), 0.0)
        try:
            with scope:
                event = await self._try_item(position, key, number)
        except StoreError as error:
            event = Stopped(EndReason.FAILED, Reason.DISK)
            await self._event("store-failed", str(error))
        except P2PNodeError as error:
            event = self._judge(position, key, error)
        finally:
            del self._tickets[position, key]
        if scope.cancelled_caught and scope.deadline < float("inf"):
            # Cut off by the node's stop: the agreement stays open, so that a restart can fetch this answer.
            self._cut.add(key)
        self._post(event)
        if isinstance(event, Stopped):
            self._post(CallFailed(position, key, Refused(Reason.CANCELLED), 0.0))

    async def _try_item(self, position: int, key: bytes, number: int | None) -> Event:
        environment, supply = self._environment, self._lanes.get(key)
        values = await environment.executor.run(self._dataset.read, position)
        started = environment.clock.monotonic()
        if key == _LOCAL_LANE:
            assert self._local is not None
            outputs, amount = await self._local(values, self._names), 0
            await self._store(position, outputs, None)
            return Answered(position, key, amount, environment.clock.monotonic() - started)
        if supply is None:
            return CallFailed(position, key, Refused(Reason.AGREEMENT_ENDED), 0.0)
        shapes = input_shapes(values)
        if not supply.covers(shapes):
            self._shapes = larger_shapes(self._shapes, shapes)
            raise Refused(Reason.SHAPE_OVER_QUOTE, "this item is larger than the quote covers")
        if number is not None:
            supply.agreement.recall(number, values)
            await self._is_back(supply)
        else:
            number = supply.next_number()
            await self._save(self._row(position, "placed", supply, number))
        is_stored = False
        try:
            answer = await self._answer(supply, values, number)
            await self._store(position, answer.outputs, supply, answer.amount, number)
            is_stored = True
        finally:
            (supply.agreement.confirm if is_stored else supply.agreement.give_up)(number)
        seconds = environment.clock.monotonic() - started
        self._suppliers.succeeded(supply.peer, self.model_id, seconds)
        return Answered(position, key, answer.amount, seconds)

    async def _answer(self, supply: Supply, values: Mapping[str, Any], number: int) -> Any:
        """Make a call. After a lost link it is repeated under its number, so that what was executed is not paid twice."""
        for attempt in range(self._settings.attempts_max):
            with trio.move_on_after(self._settings.run_seconds + self._settings.return_seconds):
                try:
                    return await self._suppliers.call(supply, values, self._names, self.spec.terms, number)
                except Unreachable:
                    if attempt + 1 == self._settings.attempts_max or not await self._is_back(supply):
                        raise
                    continue
            break
        raise TooSlow("the provider did not answer in time")

    async def _is_back(self, supply: Supply) -> bool:
        """Wait, within the match deadline, until an agreement has its provider again, and say whether it has."""
        with trio.move_on_after(self._settings.match_seconds):
            while supply.usable:
                if supply.agreement.is_connected:
                    return True
                await trio.sleep(0.02)
        return False

    async def _store(
        self, position: int, outputs: Mapping[str, Any], supply: Supply | None, amount: int = 0, number: int = -1
    ) -> None:
        path = part_path(self._output, position)
        await self._environment.executor.run(write_part, path, {name: outputs[name] for name in self._names})
        await self._save(replace(self._row(position, "done", supply, number), output=path.name, amount=amount))

    def _row(self, position: int, state: rows.ItemState, supply: Supply | None, number: int) -> rows.ItemRow:
        peer, agreement = (supply.peer, supply.id) if supply is not None else (b"", b"")
        return rows.ItemRow(self.job, position, state, provider=peer, agreement=agreement, call=number, changed_ms=self._now_ms())

    def _judge(self, position: int, key: bytes, error: P2PNodeError) -> Event:
        """Say what an item's failure means for its lane."""
        supply, reason = self._lanes.get(key), getattr(error, "reason", None)
        if reason in _LANE_ENDS:
            self._retire(key)
            return CallFailed(position, key, Refused(Reason.CANCELLED), 0.0)
        if supply is not None and reason not in _PASSING and isinstance(error, PeerError):
            self._suppliers.failed(supply.peer, self.model_id, error)
            if self._suppliers.is_banned(supply.peer):
                self._retire(key)
        return CallFailed(position, key, error, self._environment.entropy.uniform())

    def _retire(self, key: bytes) -> None:
        if key not in self._retired and key in self._lanes:
            self._retired.add(key)
            self._open_again_at = 0.0
            self._post(LaneOpened(key, 0))

    def _tend_lanes(self) -> None:
        assert self._nursery is not None
        for key in [key for key in self._retired if not self._machine.holds(key)]:
            self._retired.discard(key)
            self._nursery.start_soon(self._close_lane, key)
        active = len(self._active)
        if not self._machine.wants_lanes or active >= self._wanted or self._opening or _LOCAL_LANE in self._lanes:
            return
        if not active or self._environment.clock.monotonic() >= self._open_again_at:
            self._opening = True
            self._nursery.start_soon(self._open_lanes, self._wanted - active)

    @property
    def _active(self) -> list[bytes]:
        return [key for key in self._lanes if key not in self._retired]

    async def _open_lanes(self, count: int) -> None:
        try:
            if not self._shapes:
                self._shapes = input_shapes(await self._environment.executor.run(self._dataset.read, 0))
            active = [supply for key in self._active if (supply := self._lanes[key]) is not None]
            taken = frozenset(supply.peer for supply in active)
            placement = await self._suppliers.place(self.model_id, self._shapes, self.spec.terms, taken)
            shares = min(self._wanted, len(active) + len(placement.ranked))
            opened, error = 0, no_provider(placement, self.spec.terms)
            for item in placement.ranked[:count]:
                try:
                    supply = await order_within(
                        self.budget, self._suppliers, item.candidate, self.spec.terms, shares, self.job, self._shapes
                    )
                except PeerError as refusal:
                    error = refusal if isinstance(refusal, Refused) else Refused(Reason.TOO_SLOW, str(refusal))
                    continue
                self._open(supply)
                opened += 1
            if opened:
                self._idle_since, self.waits_for = None, None
            else:
                await self._nobody(error)
        except InputError as error:
            self._post(Stopped(EndReason.FAILED, Reason.WRONG_SHAPE))
            await self._event("data-failed", str(error))
        finally:
            self._opening = False

    def _open(self, supply: Supply) -> None:
        self._lanes[supply.id] = supply
        self._post(LaneOpened(supply.id, self._settings.in_flight_per_provider))

    async def _nobody(self, error: Refused) -> None:
        """Nobody could be added: go on with who is there, run here, wait, or give up."""
        if self._active:
            self._open_again_at = self._environment.clock.monotonic() + self._settings.ban_fault_seconds
            return
        if error.reason is Reason.BUDGET:
            self._post(Stopped(EndReason.BUDGET, Reason.BUDGET))
            return
        if self._local is not None:
            self._lanes[_LOCAL_LANE] = None
            self._post(LaneOpened(_LOCAL_LANE, 1))
            return
        now = self._environment.clock.monotonic()
        self._idle_since = now if self._idle_since is None else self._idle_since
        if self.waits_for is not error.reason:
            self.waits_for = error.reason
            await self._environment.database.write(
                lambda connection: rows.set_job_state(connection, self.job, "running", error.reason.value)
            )
            await self._event("waits", str(error))
        if now - self._idle_since > self._settings.retry_total_seconds:
            self._post(Stopped(EndReason.REFUSED, error.reason))
            return
        await trio.sleep(min(1.0, self._settings.backoff_max_seconds) * (0.5 + self._environment.entropy.uniform()))

    async def _close_lane(self, key: bytes) -> None:
        supply = self._lanes.pop(key, None)
        self._post(LaneClosed(key))
        if supply is not None:
            paid = await self._suppliers.close(supply, EndReason.COMPLETED)
            self.budget.settle(supply.id, min(paid, self.budget.reserved_for(supply.id)))

    async def _close_lanes(self) -> None:
        async with trio.open_nursery() as nursery:
            for key in [key for key in self._lanes if key not in self._cut]:
                nursery.start_soon(self._close_lane, key)

    async def _restore(self) -> list[rows.ItemRow]:
        """Read the items' durable states: those done need their part, those placed are given back."""
        done: list[int] = []
        placed: list[rows.ItemRow] = []
        after = -1
        while True:
            page = await self._environment.database.read(
                lambda connection, after=after: rows.list_items(connection, self.job, after=after)  # type: ignore[misc]
            )
            if not page:
                break
            after = page[-1].position
            stored = [row for row in page if part_path(self._output, row.position).exists()]
            done += [row.position for row in stored]
            # The crash came between the part's rename and its row: the part is whole, so the item is done.
            late = [replace(row, state="done") for row in stored if row.state != "done"]
            if late:
                await self._environment.database.write(lambda connection, late=late: rows.save_items(connection, late))  # type: ignore[misc]
            placed += [row for row in page if row.state == "placed" and row not in stored]
        self._machine = MapMachine(self._settings, self._dataset.items, done)
        self._done_before = len(done)
        return placed

    async def _adopt(self, placed: Sequence[rows.ItemRow]) -> None:
        """Fetch what was under way when the process died, from the same agreements where they still stand."""
        assert self._nursery is not None
        now = self._environment.clock.monotonic()
        for agreement in self.budget.holders():
            supply = await self._suppliers.adopt(agreement)
            if supply is None:
                continue
            self._lanes[supply.id] = supply
            self._machine.handle(LaneOpened(supply.id, 0), now)
            # It takes no new items: what an earlier process charged on it is known to its own task only.
            self._retire(supply.id)
            supply.agreement.expect(row.call for row in placed if row.agreement == agreement)
            for row in placed:
                if row.agreement == agreement:
                    self._machine.adopt(row.position, supply.id, now)
                    self._nursery.start_soon(self._item, row.position, supply.id, row.call)

    async def _expire(self, seconds: float) -> None:
        await trio.sleep(seconds)
        self._post(Stopped(EndReason.EXPIRED, Reason.DEADLINE))

    def _parts(self) -> Iterator[Part]:
        for position in range(self._dataset.items):
            name = self._dataset.names[position] if self._dataset.names else ""
            yield Part(name, self._dataset.rows_of(position), read_part(part_path(self._output, position)))

    def _post(self, event: Event) -> None:
        # The channel holds more events than there can be copies in flight, so this never overflows.
        self._send.send_nowait(event)

    def tell(self) -> None:
        """Wake whoever follows the progress."""
        self.changed.set()
        self.changed = trio.Event()

    async def _save(self, row: rows.ItemRow) -> None:
        await self._environment.database.write(lambda connection: rows.save_items(connection, [row]))

    async def _event(self, kind: str, detail: str) -> None:
        now_ms = self._now_ms()
        await self._environment.database.write(lambda connection: rows.append_event(connection, self.job, now_ms, kind, detail))

    def _now_ms(self) -> int:
        return self._environment.clock.wall_ms()
