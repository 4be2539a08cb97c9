"""One map, carried out: lanes opened and replaced, items read, sent, stored and assembled; resumable after SIGKILL.

`item_book` makes the items' steps durable, `recalls` decides the calls that an earlier process had under way. A call whose fate
is open is asked for again under its number, and its item is placed nowhere else before that is decided.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import trio

from p2pnode.environment import Environment
from p2pnode.errors import InputError, P2PNodeError, PeerError, Refused, StoreError, TooSlow, Unreachable
from p2pnode.jobs.back_pressure import PASSING_REASONS
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
from p2pnode.jobs.former_agreements import FormerAgreements
from p2pnode.jobs.item_book import ItemBook
from p2pnode.jobs.outputs import Part, assemble, part_path, read_part
from p2pnode.jobs.progress import MapProgress, running_progress
from p2pnode.jobs.recalls import Recalls
from p2pnode.jobs.sessions import Local
from p2pnode.jobs.settings import JobSettings
from p2pnode.jobs.shapes import Shapes, input_shapes, larger_shapes
from p2pnode.jobs.spec import MapSpec
from p2pnode.jobs.suppliers import Suppliers, no_provider, order_within
from p2pnode.jobs.supply import Supply
from p2pnode.reasons import EndReason, Reason
from p2pnode.store import jobs as rows

_LOCAL_LANE = b"local"
_LANE_ENDS = frozenset({Reason.BUDGET, Reason.AGREEMENT_ENDED, Reason.UNKNOWN_AGREEMENT, Reason.SHAPE_OVER_QUOTE})


class MapRun:
    """A running map. budget: holds what earlier attempts spent. spec: with its outputs named and its paths absolute.

    recalls: what an earlier process had under way, None for nothing.
    """

    def __init__(
        self, environment: Environment, settings: JobSettings, suppliers: Suppliers, items: ItemBook, spec: MapSpec,
        model_id: bytes, dataset: Dataset, kind: str, budget: Budget, local: Local | None, recalls: Recalls | None = None,
    ) -> None:  # fmt: skip
        self._environment = environment
        self._settings = settings
        self._suppliers = suppliers
        self.job = items.job
        self.items = items
        self.spec = spec
        self.model_id = model_id
        self._names = spec.outputs
        self._dataset = dataset
        self._kind = kind
        self._recalls = recalls
        self.budget = budget
        self._local = local
        self._wanted = spec.terms.providers or settings.providers_max
        self._machine = MapMachine(settings, dataset.items)
        self._lanes: dict[bytes, Supply | None] = {}
        self._retired: set[bytes] = set()
        self._cut: set[bytes] = set()
        self._former = FormerAgreements(environment, suppliers, budget)
        self._is_stopping = False
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
        spent = self.budget.spent + self._former.charged
        spent += sum(supply.charged for supply in self._lanes.values() if supply is not None)
        return running_progress(
            self._machine, self._dataset.rows, self._done_before, self._environment.clock.monotonic() - self._started,
            len(self._active), spent, self.budget.reserved, self.waits_for, self.finished,
        )  # fmt: skip

    async def run(self) -> Finished:
        """Carry it out and give how it ended. Cancelled, it leaves every item in a state that a restart continues from.

        The parts stay: before the caller has saved the end, a restart goes on from them.
        """
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._finish_when_cancelled)
                undecided = self._recalls.undecided() if self._recalls is not None else []
                self._begin(await self.items.restore(), undecided)
                nursery.start_soon(self._former.run)
                if self.spec.terms.deadline_seconds is not None:
                    nursery.start_soon(self._expire, self.spec.terms.deadline_seconds)
                finished = await self._loop()
                with trio.move_on_after(self._settings.close_seconds):
                    await self._former.closed()
                nursery.cancel_scope.cancel()
        finally:
            with trio.move_on_after(self._settings.close_seconds, shield=True):
                await self._close_lanes()
        if finished.end is EndReason.COMPLETED:
            try:
                await self._environment.executor.run(assemble, self.items.output, self._kind, self._parts)
            except InputError as error:
                finished = Finished(EndReason.FAILED, Reason.WRONG_SHAPE, f"{error} (the parts are kept)")
        self.finished = finished
        self.tell()
        return finished

    async def _finish_when_cancelled(self) -> None:
        """When the node stops, let what is in flight land: it will be paid, so it had better be stored."""
        try:
            await trio.sleep_forever()
        finally:
            self._is_stopping = True
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
        match effect:
            case Place(position, key):
                assert self._nursery is not None
                self._nursery.start_soon(self._item, position, key)
            case CancelCopy(position, key):
                if (scope := self._tickets.get((position, key))) is not None:
                    scope.cancel()
            case GaveUp(position, reason, detail):
                await self.items.failed(position, reason)
                await self.items.event("item-failed", f"item {position}: {reason.value}: {detail}")

    async def _item(self, position: int, key: bytes) -> None:
        """One copy of one item, from reading it to its durable end."""
        if (position, key) in self._tickets:
            return
        scope = self._tickets[position, key] = trio.CancelScope(shield=True)
        event: Event = CallFailed(position, key, Refused(Reason.CANCELLED), 0.0)
        try:
            with scope:
                event = await self._try_item(position, key)
        except StoreError as error:
            event = Stopped(EndReason.FAILED, Reason.DISK)
            await self.items.event("store-failed", str(error))
        except P2PNodeError as error:
            event = self._judge(position, key, error)
        finally:
            del self._tickets[position, key]
        self._post(event)
        if isinstance(event, Stopped):
            self._post(CallFailed(position, key, Refused(Reason.CANCELLED), 0.0))

    async def _try_item(self, position: int, key: bytes) -> Event:
        environment, supply = self._environment, self._lanes.get(key)
        values = await environment.executor.run(self._dataset.read, position)
        started = environment.clock.monotonic()
        if key == _LOCAL_LANE:
            assert self._local is not None
            await self.items.done(position, await self._local(values, self._names))
            return Answered(position, key, 0, environment.clock.monotonic() - started)
        if supply is None:
            return CallFailed(position, key, Refused(Reason.AGREEMENT_ENDED), 0.0)
        shapes = input_shapes(values)
        if not supply.covers(shapes):
            self._shapes = larger_shapes(self._shapes, shapes)
            raise Refused(Reason.SHAPE_OVER_QUOTE, "this item is larger than the quote covers")
        number = supply.next_number()
        input_hash, amount = supply.agreement.described(values)
        await self.items.placed(position, supply.peer, supply.id, number, input_hash, amount)
        is_stored = is_lost = False
        try:
            answer = await self._answer(supply, values, number)
            await self.items.done(position, answer.outputs, supply.peer, supply.id, number, answer.amount)
            is_stored = True
        except Unreachable:
            is_lost = True
            raise
        finally:
            if is_stored:
                supply.agreement.confirm(number)
            elif self._is_stopping:
                self._cut.add(key)  # the agreement stays open, and the next start recalls the call
            elif is_lost:
                supply.agreement.withdraw(number)  # its answer may be on the way for ever; the item is done elsewhere
            else:
                supply.agreement.give_up(number)
        seconds = environment.clock.monotonic() - started
        self._suppliers.succeeded(supply.peer, self.model_id, seconds)
        return Answered(position, key, answer.amount, seconds)

    async def _answer(self, supply: Supply, values: Mapping[str, Any], number: int) -> Any:
        """Make a call. After a lost link it is repeated under its number, so that what was executed is not paid twice."""
        settings = self._settings
        with trio.move_on_after(settings.run_seconds + settings.return_seconds + settings.retry_total_seconds):
            while True:
                try:
                    return await self._suppliers.call(supply, values, self._names, self.spec.terms, number)
                except Unreachable:
                    if not await self._is_back(supply):
                        raise
        raise TooSlow("the provider did not answer in time")

    async def _is_back(self, supply: Supply) -> bool:
        """Wait until an agreement has its provider again, and say whether it has; after a while its lane gets nothing new."""
        clock, settings = self._environment.clock, self._settings
        started = clock.monotonic()
        while supply.agreement.end_reason is None and clock.monotonic() < started + settings.retry_total_seconds:
            await trio.sleep(0.02)
            if supply.agreement.is_connected:
                return True
            if clock.monotonic() >= started + settings.match_seconds:
                self._retire(supply.id)
        return False

    def _judge(self, position: int, key: bytes, error: P2PNodeError) -> Event:
        """Say what an item's failure means for its lane."""
        supply, reason = self._lanes.get(key), getattr(error, "reason", None)
        if reason in _LANE_ENDS:
            self._retire(key)
            return CallFailed(position, key, Refused(Reason.CANCELLED), 0.0)
        if supply is not None and reason not in PASSING_REASONS and isinstance(error, PeerError):
            self._suppliers.failed(supply.peer, self.model_id, error)
            if self._suppliers.is_banned(supply.peer, self.model_id):
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
            await self.items.event("data-failed", str(error))
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
        if error.reason is Reason.BUDGET and not self._former.open:
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
            await self.items.event("waits", str(error))
        if now - self._idle_since > self._settings.retry_total_seconds:
            self._post(Stopped(EndReason.BUDGET if error.reason is Reason.BUDGET else EndReason.REFUSED, error.reason))
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

    # --- what an earlier process left ---------------------------------------------------------------------------------

    def _begin(self, done: list[int], undecided: list[rows.ItemRow]) -> None:
        """Start from what is stored; items whose calls are not decided yet wait in lanes that take nothing else."""
        assert self._nursery is not None
        self._machine = MapMachine(self._settings, self._dataset.items, done)
        self._done_before = len(done)
        now, stored = self._environment.clock.monotonic(), set(done)
        for row in undecided:
            if row.position in stored:
                continue
            if row.agreement not in self._lanes:
                self._lanes[row.agreement] = None
                self._machine.handle(LaneOpened(row.agreement, 0), now)
                self._retired.add(row.agreement)
            self._machine.adopt(row.position, row.agreement, now)
            self._nursery.start_soon(self._recalled, row.position, row.agreement)

    async def _recalled(self, position: int, key: bytes) -> None:
        """Wait for what becomes of a call from before; for a provider that stays away not for ever."""
        assert self._recalls is not None
        is_stored = False
        with trio.move_on_after(self._settings.retry_total_seconds) as patience:
            is_stored = await self._recalls.decision(position)
        if patience.cancelled_caught:
            self._recalls.place_again(position)
            is_stored = await self._recalls.decision(position)
        if is_stored:
            self._post(Answered(position, key, 0, None))
        else:
            self._post(CallFailed(position, key, Refused(Reason.CANCELLED), 0.0))

    async def _expire(self, seconds: float) -> None:
        await trio.sleep(seconds)
        self._post(Stopped(EndReason.EXPIRED, Reason.DEADLINE))

    def _parts(self) -> Iterator[Part]:
        for position in range(self._dataset.items):
            name = self._dataset.names[position] if self._dataset.names else ""
            yield Part(name, self._dataset.rows_of(position), read_part(part_path(self.items.output, position)))

    def _post(self, event: Event) -> None:
        # The channel holds more events than there can be copies in flight, so this never overflows.
        self._send.send_nowait(event)

    def tell(self) -> None:
        """Wake whoever follows the progress."""
        self.changed.set()
        self.changed = trio.Event()
