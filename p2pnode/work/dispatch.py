"""From a submitted call to a worker and back, without waiting anywhere: the hot path and what serves the queue.

With a warm idle worker a call goes straight through: admission, worker, shared memory. Otherwise it waits in its model's and
owner's backlog; whatever changes (a run ends, a worker has started, memory is released) calls `dispatch`, which serves the
backlogs by priority and then age, within the processor's cap. Nothing here is a task and nothing sleeps.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from p2pnode.environment import Clock, Slot, WorkerOutcome
from p2pnode.errors import Refused
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.wire import tensors
from p2pnode.wire.messages.work import ValueHeader
from p2pnode.work import batching, reservations
from p2pnode.work.admission import Admission
from p2pnode.work.backlogs import BacklogKey, Backlogs
from p2pnode.work.calls import NOTHING, OnDone, WorkOutcome, WorkRequest, WorkTicket
from p2pnode.work.facts import ModelFacts
from p2pnode.work.pool import LOCAL, SHARED, Handle, Pool
from p2pnode.work.reservations import Reservations
from p2pnode.work.settings import WorkSettings

# Once in a batch that failed, once behind a call that killed the worker, once more.
_ATTEMPTS_MAX: Final = 3
_REMEMBERED_MAX: Final = 256
_SECONDS_MIN: Final = 0.001
_REASONS: Final = {reason.value: reason for reason in Reason}


@dataclass(slots=True, eq=False)
class _Batch:
    """Several calls in one run."""

    tickets: list[WorkTicket]


class Dispatcher:
    """All live calls of one node. The service gives it workers and wakes it at `deadline`."""

    def __init__(
        self,
        clock: Clock,
        settings: WorkSettings,
        pool: Pool,
        admission: Admission,
        metrics: Metrics,
        need_worker: Callable[[bytes, bytes], None],
    ) -> None:
        self._clock = clock
        self._pool = pool
        self._admission = admission
        self._metrics = metrics
        self._need_worker = need_worker
        self._backlogs = Backlogs(settings)
        self._reservations = Reservations()
        self._headers: dict[bytes, tuple[ValueHeader, ...]] = {}
        self._number = 0
        self._is_dispatching = False
        self._blocked: set[BacklogKey] = set()
        self._latest: Handle | None = None
        self.settings = settings
        self.batchable: dict[bytes, ModelFacts] = {}
        self.engine = ""
        self.live = 0
        # Called when no call is left, and with the time by which `expire` and `dispatch` must be called.
        self.on_quiet: Callable[[], None] = _nothing
        self.on_wait: Callable[[float], None] = _nothing

    @property
    def queued(self) -> int:
        """Calls that wait for a worker."""
        return self._backlogs.queued

    def apply(self, settings: WorkSettings) -> None:
        """Let new settings count from now on; batches are cut by the old ones until their backlog is empty once."""
        self.settings = self._backlogs.settings = settings
        self.dispatch()

    def owner_key(self, owner: bytes, share: bool) -> bytes:
        """Give whose worker a call may use: the shared ones, or its owner's alone."""
        return SHARED if share and self.settings.share_workers else owner or LOCAL

    def reserve(self, model_id: bytes, size: int, owner: bytes, share: bool) -> memoryview | None:
        """Give room in a warm worker's memory for an input, or None; see `WorkService.reserve`."""
        handle = self._pool.pick(model_id, self.owner_key(owner, share)) if size else None
        return None if handle is None else self._reservations.make(handle, size)

    def poll(self) -> None:
        """Wait a moment for the only call there is, if its worker is a quick one."""
        if self.live == 1 and self._latest is not None:
            self._latest.worker.poll()

    def unreserve(self, view: memoryview) -> None:
        """Give back what `reserve` gave, when it will not be submitted. Idempotent."""
        found = self._reservations.take(view)
        if found is not None:
            self._give_back(*found)

    def submit(self, request: WorkRequest, on_done: OnDone) -> WorkTicket:
        """Start a call or put it in the queue; see `WorkService.submit`."""
        now = self._clock.monotonic()
        reserved = self._reservations.take(request.payload) if len(self._reservations) else None
        reason = self._admission.check(request.owner, request.model_id, now)
        if reason is None and len(request.payload) > self.settings.arena_bytes:
            # No worker could ever take it.
            reason = Reason.TOO_LARGE
            self._admission.count(reason)
        if reason is None and self.settings.bandwidth_bytes_per_second:
            reason = self._admission.take_bandwidth(len(request.payload), now)
        if reason is not None:
            self._refuse(reason, reserved)
        self._number += 1
        ticket = WorkTicket(self, self._number, request, self.owner_key(request.owner, request.share), on_done)
        ticket.deadline = now + (request.timeout_seconds or self.settings.call_seconds_max)
        ticket.encoded_headers = tensors.headers_bytes(request.headers)
        ticket.queued_at = now
        if reserved is not None:
            ticket.handle, ticket.slot = reserved
        if not self._backlogs.queued:
            handle = ticket.handle
            if handle is None or not handle.worker.alive:
                handle = self._pool.pick(request.model_id, ticket.key)
            if handle is not None and self._may_take(handle) and self._run_single(ticket, handle, now):
                self.live += 1
                return ticket
        self._enqueue(ticket, now)
        return ticket

    def cancel(self, ticket: WorkTicket) -> None:
        """End a call early; see `WorkTicket.cancel`."""
        if ticket.is_done:
            return
        if self._take_out(ticket):
            self._finish(ticket, WorkOutcome(reason=Reason.CANCELLED))
            self._use_room()
            return
        handle = ticket.handle
        record = handle.running.get(ticket.run_id) if handle is not None else None
        if isinstance(record, _Batch):
            # The others in the batch go on; this one's part of the result is thrown away.
            ticket.handle = None
            self._finish(ticket, WorkOutcome(reason=Reason.CANCELLED))
        elif handle is not None:
            handle.worker.cancel(ticket.run_id)

    def release(self, handle: Handle, run_id: int) -> None:
        """Give a finished run's output memory back and use it for what waits."""
        handle.worker.release(run_id)
        self._use_room()

    def dispatch(self) -> None:
        """Start whatever can start now."""
        blocked = self._blocked
        # Also inside a dispatch: what its caller has just changed may help a backlog that was found blocked before.
        blocked.clear()
        if self._is_dispatching:
            return
        self._is_dispatching = True
        try:
            now = self._clock.monotonic()
            while self._backlogs.queued:
                best = self._backlogs.first(now, blocked, self._is_idle)
                if best is None or not self._place(best, now, blocked):
                    break
            for key in tuple(blocked):
                if self._pool.wants_worker(*key, self._backlogs.length(key)):
                    self._need_worker(*key)
        finally:
            self._is_dispatching = False
        self._metrics.set("calls_queued", self._backlogs.queued)

    def expire(self, now: float) -> None:
        """End the queued calls whose deadline has passed."""
        for ticket in self._backlogs.tickets():
            if now >= ticket.deadline:
                self._expire(ticket)

    def fail(self, reason: Reason, detail: str, keys: Iterable[BacklogKey] | None = None) -> None:
        """End all queued calls, or those of some backlogs."""
        for key in self._backlogs.names() if keys is None else keys:
            for ticket in self._backlogs.tickets(key):
                if self._take_out(ticket):
                    self._finish(ticket, WorkOutcome(reason=reason, detail=detail))

    def backlogs(self) -> list[tuple[bytes, bytes, int]]:
        """Give (model, owner key, calls) of every backlog."""
        return [(*key, self._backlogs.length(key)) for key in self._backlogs.names()]

    def deadline(self, now: float) -> float:
        """When `expire` or `dispatch` has something to do by time alone."""
        return self._backlogs.deadline(now)

    def _refuse(self, reason: Reason, reserved: tuple[Handle, Slot] | None) -> None:
        if reserved is not None:
            self._give_back(*reserved)
        raise Refused(reason)

    def _enqueue(self, ticket: WorkTicket, now: float) -> None:
        request, backlogs = ticket.request, self._backlogs
        reason = self._admission.check_queue(backlogs.queued, backlogs.of_owner(ticket.key), backlogs.queued_bytes)
        if reason is not None:
            self._refuse(reason, (ticket.handle, ticket.slot) if ticket.handle and ticket.slot else None)
        facts = self.batchable.get(request.model_id)
        ticket.batch_key = batching.key_of_request(request, facts, self.settings.batch_bytes_max) if facts else None
        if ticket.batch_key is not None:
            ticket.rows = batching.rows_of(request.headers)
        self.live += 1
        backlogs.add(ticket, now)
        self.dispatch()
        if not ticket.is_done and not ticket.run_id:
            batch_due = now + self.settings.batch_delay_seconds if ticket.batch_key is not None else ticket.deadline
            self.on_wait(min(ticket.deadline, batch_due))

    def _expire(self, ticket: WorkTicket) -> None:
        if self._take_out(ticket):
            self._admission.count(Reason.DEADLINE)
            self._finish(ticket, WorkOutcome(reason=Reason.DEADLINE, detail="it waited in the queue until its deadline"))

    def _take_out(self, ticket: WorkTicket) -> bool:
        if not self._backlogs.remove(ticket):
            return False
        self._reservations.end_want(ticket)
        self._drop_slot(ticket)
        return True

    def _is_idle(self, key: BacklogKey) -> bool:
        return not any(handle.running for handle in self._pool.of_owner(*key))

    def _place(self, key: BacklogKey, now: float, blocked: set[BacklogKey]) -> bool:
        """Start the first call of a backlog. False when the processor's cap says to wait; adds to `blocked` otherwise."""
        idle = self._is_idle(key)
        first = self._backlogs.head(key, now, idle=idle)
        handle = self._pool.pick(*key)
        if first is not None and now >= first.deadline:
            self._expire(first)
            return True
        if handle is None or first is None:
            blocked.add(key)
            return True
        preferred = first.handle
        if preferred is not None and preferred.worker.alive and len(preferred.running) <= len(handle.running):
            handle = preferred
        if len(handle.running) >= self._room(key[0]):
            blocked.add(key)
            return True
        if not self._pool.may_run(handle):
            return False
        others = [other for other in self._pool.of_owner(*key) if other is not handle and self._may_take(other)]
        if not any(self._run_head(key, each, now, idle=idle) for each in (handle, *others)) and not self._run_in_place(key, now):
            blocked.add(key)
        return True

    def _run_head(self, key: BacklogKey, handle: Handle, now: float, *, idle: bool) -> bool:
        """Run the first call of a backlog and what can be joined with it, or it alone; False when its worker lacks the room."""
        tickets = self._backlogs.take(key, now, idle=idle)
        first = tickets.pop(0)
        if tickets and self._run_batch([first, *tickets], handle, now):
            return True
        for ticket in tickets:
            self._backlogs.add(ticket, ticket.queued_at)
        if self._run_single(first, handle, now):
            return True
        self._backlogs.add(first, first.queued_at)
        self._reservations.want(handle, first)
        return False

    def _run_in_place(self, key: BacklogKey, now: float) -> bool:
        """Run the first call of a backlog whose input lies in a worker that can take it; False when there is none.

        The first of all waits for room that such inputs hold: if they waited for it in turn, nothing would ever be freed.
        """
        for ticket in self._backlogs.in_place(key):
            if now >= ticket.deadline:
                self._expire(ticket)
                return True
            if ticket.handle is not None and self._may_take(ticket.handle) and self._backlogs.remove(ticket):
                return self._run_single(ticket, ticket.handle, now)
        return False

    def _may_take(self, handle: Handle) -> bool:
        alive, running = handle.worker.alive, len(handle.running)
        return alive and running < self._room(handle.model_id) and self._pool.may_run(handle)

    def _room(self, model_id: bytes) -> int:
        # Calls that can be joined wait in the backlog, where they meet others, not in the worker.
        if model_id in self.batchable:
            return 1
        return self._pool.depth(model_id)

    def _run_single(self, ticket: WorkTicket, handle: Handle, now: float) -> bool:
        request, worker = ticket.request, handle.worker
        if ticket.slot is not None and ticket.handle is handle:
            slot, ticket.slot = ticket.slot, None
            handle.reserved -= 1
        else:
            reserved = worker.reserve(len(request.payload))
            if reserved is None:
                return False
            slot = reserved
            if len(request.payload):
                slot.view[: len(request.payload)] = request.payload
            self._drop_slot(ticket)
        run_id = self._begin(handle, ticket)
        ticket.handle, ticket.run_id = handle, run_id
        self._reservations.end_want(ticket)
        self._latest = handle
        if now > ticket.queued_at:
            self._metrics.observe("queue_seconds", now - ticket.queued_at)
        worker.submit(
            run_id, slot, ticket.encoded_headers, request.outputs, self._run_seconds(ticket.deadline - now),
            partial(self._single_done, handle, ticket),
        )  # fmt: skip
        return True

    def _run_batch(self, tickets: list[WorkTicket], handle: Handle, now: float) -> bool:
        headers = batching.joined_headers([ticket.request.headers for ticket in tickets])
        slot = handle.worker.reserve(tensors.values_size(headers))
        if slot is None:
            return False
        batching.join_into(slot.view, [(ticket.request.headers, ticket.request.payload) for ticket in tickets])
        batch = _Batch(tickets)
        run_id = self._begin(handle, batch)
        for ticket in tickets:
            self._drop_slot(ticket)
            self._reservations.end_want(ticket)
            ticket.handle, ticket.run_id = handle, run_id
            self._metrics.observe("queue_seconds", now - ticket.queued_at)
        self._metrics.add("batches_total")
        self._metrics.add("batch_items_total", amount=len(tickets))
        seconds = self._run_seconds(min(ticket.deadline for ticket in tickets) - now)
        outputs = tickets[0].request.outputs
        done = partial(self._batch_done, handle, batch)
        handle.worker.submit(run_id, slot, tensors.headers_bytes(headers), outputs, seconds, done)
        return True

    def _run_seconds(self, left: float) -> float:
        """How long a run may take: what its deadline leaves, within the owner's limit, and enough to start at all."""
        return min(max(left, _SECONDS_MIN), self.settings.call_seconds_max)

    def _begin(self, handle: Handle, record: Any) -> int:
        self._number += 1
        self._pool.begin(handle, self._number, record)
        return self._number

    def _single_done(self, handle: Handle, ticket: WorkTicket, outcome: WorkerOutcome) -> None:
        innocent = self._ended(handle, outcome)
        if outcome.reason:
            ticket.handle = None
            if innocent and ticket.attempts + 1 < _ATTEMPTS_MAX:
                ticket.attempts += 1
                self._backlogs.add(ticket, ticket.queued_at)
                self.dispatch()
                return
            result = WorkOutcome((), NOTHING, outcome.seconds, self.engine, _reason(outcome), outcome.detail)
        else:
            self._pool.learn(handle.model_id, outcome.seconds)
            headers = self._parsed(outcome.headers)
            result = WorkOutcome(headers, outcome.payload, outcome.seconds, self.engine)
        if self._backlogs.queued:
            self.dispatch()
        self._finish(ticket, result)

    def _batch_done(self, handle: Handle, batch: _Batch, outcome: WorkerOutcome) -> None:
        self._ended(handle, outcome)
        parts, rows = None, [ticket.rows for ticket in batch.tickets]
        if not outcome.reason:
            parts = batching.part(self._parsed(outcome.headers), outcome.payload, rows)
            handle.worker.release(outcome.call_id)
            if parts is None:
                # It passed the proof and breaks its promise on real inputs: never again.
                self.batchable.pop(handle.model_id, None)
            else:
                self._pool.learn(handle.model_id, outcome.seconds / sum(rows))
        finished = []
        for index, ticket in enumerate(batch.tickets):
            if ticket.is_done:
                continue
            ticket.handle = None
            if parts is not None:
                headers, payload = parts[index]
                share = outcome.seconds * rows[index] / sum(rows)
                finished.append((ticket, WorkOutcome(headers, payload, share, self.engine)))
            else:
                # One call's input may have failed the whole batch, so each gets a run of its own.
                ticket.batch_key, ticket.attempts = None, ticket.attempts + 1
                self._backlogs.add(ticket, ticket.queued_at)
        if self._backlogs.queued:
            self.dispatch()
        for ticket, result in finished:
            self._finish(ticket, result)

    def _ended(self, handle: Handle, outcome: WorkerOutcome) -> bool:
        """Note a run's end; True when its worker died of another run, so that this one may be tried again."""
        if outcome.reason and not handle.worker.alive:
            if handle.guilty is None:
                # A worker takes its runs in order: the first that ends was the one that ran.
                handle.guilty = outcome.call_id
                self._metrics.add("workers_died_total", outcome.reason)
            self._pool.remove(handle)
        self._pool.end(handle, outcome.call_id, self._clock.monotonic())
        return outcome.reason == Reason.WORKER_DIED.value and handle.guilty not in (None, outcome.call_id)

    def _finish(self, ticket: WorkTicket, outcome: WorkOutcome) -> None:
        ticket.is_done = True
        self.live -= 1
        self._metrics.add("calls_total", "completed" if outcome.reason is None else outcome.reason.value)
        if outcome.reason is None:
            self._metrics.observe("call_seconds", outcome.seconds)
            if self.settings.bandwidth_bytes_per_second:
                self._admission.spend_bandwidth(len(outcome.payload))
        ticket.on_done(outcome)
        if not self.live:
            self.on_quiet()

    def _parsed(self, encoded: bytes) -> tuple[ValueHeader, ...]:
        headers = self._headers.get(encoded)
        if headers is None:
            if len(self._headers) >= _REMEMBERED_MAX:
                self._headers.clear()
            headers = self._headers[encoded] = tensors.parse_headers(encoded)
        return headers

    def _drop_slot(self, ticket: WorkTicket) -> None:
        slot, ticket.slot = ticket.slot, None
        if slot is not None and ticket.handle is not None:
            reservations.free(ticket.handle, slot)
            ticket.handle = None

    def _give_back(self, handle: Handle, slot: Slot) -> None:
        reservations.free(handle, slot)
        self._use_room()

    def _use_room(self) -> None:
        if self._backlogs.queued:
            self.dispatch()


def _reason(outcome: WorkerOutcome) -> Reason:
    return _REASONS.get(outcome.reason, Reason.RUN_FAILED)


def _nothing(wake_by: float = 0.0) -> None:
    """Stands in for a callback that nobody has set."""
