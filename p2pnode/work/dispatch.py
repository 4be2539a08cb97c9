"""From a submitted call to a worker and back, without waiting anywhere: the hot path and the queue behind it.

With a warm idle worker a call goes straight through: admission, worker, shared memory. Otherwise it waits in its model's and
owner's backlog; whatever changes (a run ends, a worker has started, memory is released) calls `dispatch`, which serves the
backlogs by priority and then age, within the processor's cap. Nothing here is a task and nothing sleeps.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np

from p2pnode.environment import Clock, Slot, WorkerOutcome
from p2pnode.errors import ProtocolViolation, Refused
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.wire import tensors
from p2pnode.wire.messages.work import ValueHeader
from p2pnode.work import batching
from p2pnode.work.admission import Admission
from p2pnode.work.batching import Batcher
from p2pnode.work.calls import OnDone, WorkOutcome, WorkRequest, WorkTicket
from p2pnode.work.facts import ModelFacts
from p2pnode.work.pool import LOCAL, SHARED, Handle, Pool
from p2pnode.work.settings import WorkSettings

_ATTEMPTS_MAX: Final = 2
_REMEMBERED_MAX: Final = 256
_REASONS: Final = {reason.value: reason for reason in Reason}

BacklogKey = tuple[bytes, bytes]


@dataclass(slots=True, eq=False)
class _Batch:
    """Several calls in one run."""

    tickets: list[WorkTicket]
    rows: list[int]


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
        self._backlogs: dict[BacklogKey, Batcher[WorkTicket]] = {}
        self._queued_by_owner: Counter[bytes] = Counter()
        self._queued_bytes = 0
        self._reserved: dict[int, tuple[Handle, Slot]] = {}
        self._headers: dict[bytes, tuple[ValueHeader, ...]] = {}
        self._number = 0
        self._is_dispatching = False
        self.settings = settings
        self.batchable: dict[bytes, ModelFacts] = {}
        self.engine = ""
        self.queued = 0
        self.live = 0
        self.on_quiet: Callable[[], None] = _nothing
        self.on_wait: Callable[[], None] = _nothing

    def owner_key(self, owner: bytes, share: bool) -> bytes:
        """Give whose worker a call may use: the shared ones, or its owner's alone."""
        return SHARED if share and self.settings.share_workers else owner or LOCAL

    def reserve(self, model_id: bytes, size: int, owner: bytes, share: bool) -> memoryview | None:
        """Give room in a warm worker's memory for an input, or None; see `WorkService.reserve`."""
        handle = self._pick(model_id, self.owner_key(owner, share))
        slot = handle.worker.reserve(size) if handle is not None and size else None
        if handle is None or slot is None:
            return None
        handle.reserved += 1
        view = slot.view[:size]
        self._reserved[id(view)] = (handle, Slot(slot.offset, view))
        return view

    def unreserve(self, view: memoryview) -> None:
        """Give back what `reserve` gave, when it will not be submitted. Idempotent."""
        found = self._reservation(view)
        if found is not None:
            self._free(*found)
            self._use_room()

    def submit(self, request: WorkRequest, on_done: OnDone) -> WorkTicket:
        """Start a call or put it in the queue; see `WorkService.submit`."""
        now = self._clock.monotonic()
        payload = request.payload
        reserved = self._reservation(payload) if self._reserved else None
        reason = self._admission.check(request.owner, request.model_id, now)
        if reason is None and self.settings.bandwidth_bytes_per_second:
            reason = self._admission.take_bandwidth(len(payload), now)
        if reason is not None:
            self._refuse(reason, reserved)
        self._number += 1
        ticket = WorkTicket(self, self._number, request, self.owner_key(request.owner, request.share), on_done)
        limit = self.settings.call_seconds_max
        timeout = request.timeout_seconds
        ticket.deadline = now + (timeout if 0 < timeout < limit else limit)
        ticket.encoded_headers = tensors.headers_bytes(request.headers)
        ticket.queued_at = now
        if reserved is not None:
            ticket.handle, ticket.slot = reserved
        if not self.queued:
            handle = ticket.handle or self._pick(request.model_id, ticket.key)
            if (
                handle is not None
                and len(handle.running) < self._room(request.model_id, handle)
                and self._pool.may_run(handle)
                and self._run_single(ticket, handle, now)
            ):
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
        if self._is_dispatching:
            return
        self._is_dispatching = True
        try:
            now = self._clock.monotonic()
            blocked: set[BacklogKey] = set()
            while self.queued:
                best = self._first(now, blocked)
                if best is None or not self._place(best, now, blocked):
                    break
            for model_id, key in blocked:
                backlog = self._backlogs.get((model_id, key))
                if backlog is not None and self._pool.wants_worker(model_id, key, len(backlog)):
                    self._need_worker(model_id, key)
        finally:
            self._is_dispatching = False
        self._metrics.set("calls_queued", self.queued)

    def expire(self, now: float) -> None:
        """End the queued calls whose deadline has passed."""
        for backlog in list(self._backlogs.values()):
            for ticket in backlog.items():
                if now >= ticket.deadline and self._take_out(ticket):
                    self._admission.count(Reason.DEADLINE)
                    self._finish(ticket, WorkOutcome(reason=Reason.DEADLINE, detail="it waited in the queue until its deadline"))

    def fail(self, reason: Reason, detail: str, keys: Iterable[BacklogKey] | None = None) -> None:
        """End all queued calls, or those of some backlogs."""
        for key in list(self._backlogs) if keys is None else list(keys):
            backlog = self._backlogs.get(key)
            for ticket in backlog.items() if backlog else ():
                if self._take_out(ticket):
                    self._finish(ticket, WorkOutcome(reason=reason, detail=detail))

    def backlogs(self) -> list[tuple[bytes, bytes, int]]:
        """Give (model, owner key, calls) of every backlog."""
        return [(model_id, key, len(backlog)) for (model_id, key), backlog in self._backlogs.items()]

    def deadline(self, now: float) -> float:
        """When `expire` or `dispatch` has something to do by time alone."""
        first = min((t.deadline for backlog in self._backlogs.values() for t in backlog.items()), default=float("inf"))
        batch = min((backlog.deadline for backlog in self._backlogs.values()), default=float("inf"))
        # A batch that is due but has no worker is woken by the worker's next completion, not by the clock.
        return min(first, batch) if batch > now else first

    def _refuse(self, reason: Reason, reserved: tuple[Handle, Slot] | None) -> None:
        if reserved is not None:
            self._free(*reserved)
        raise Refused(reason)

    def _enqueue(self, ticket: WorkTicket, now: float) -> None:
        request = ticket.request
        reason = self._admission.check_queue(self.queued, self._queued_by_owner[ticket.key], self._queued_bytes)
        if reason is not None:
            self._refuse(reason, (ticket.handle, ticket.slot) if ticket.handle and ticket.slot else None)
        ticket.batch_key = self._batch_key(request)
        if ticket.batch_key is not None:
            ticket.rows = batching.rows_of(request.headers)
        self.live += 1
        self._put(ticket, now)
        self.dispatch()
        if not ticket.is_done and ticket.run_id == 0:
            self.on_wait()

    def _put(self, ticket: WorkTicket, now: float) -> None:
        key = (ticket.request.model_id, ticket.key)
        backlog = self._backlogs.get(key)
        if backlog is None:
            backlog = self._backlogs[key] = Batcher(self.settings)
        size = len(ticket.request.payload)
        backlog.add(ticket.batch_key, ticket, ticket.rows, size, (ticket.request.priority, ticket.call_id), now)
        ticket.run_id = 0
        self._count_in(ticket, 1)

    def _take_out(self, ticket: WorkTicket) -> bool:
        key = (ticket.request.model_id, ticket.key)
        backlog = self._backlogs.get(key)
        if backlog is None or not backlog.remove(ticket.batch_key, ticket):
            return False
        if not len(backlog):
            del self._backlogs[key]
        self._count_in(ticket, -1)
        self._drop_slot(ticket)
        return True

    def _count_in(self, ticket: WorkTicket, sign: int) -> None:
        self.queued += sign
        self._queued_by_owner[ticket.key] += sign
        if ticket.slot is None:
            self._queued_bytes += sign * len(ticket.request.payload)
        if not self._queued_by_owner[ticket.key]:
            del self._queued_by_owner[ticket.key]

    def _first(self, now: float, blocked: set[BacklogKey]) -> BacklogKey | None:
        best, best_rank = None, (10, 0)
        for key, backlog in self._backlogs.items():
            if key in blocked:
                continue
            head = backlog.head(now, idle=self._is_idle(key))
            if head is None:
                blocked.add(key)
            elif head[0] < best_rank:
                best, best_rank = key, head[0]
        return best

    def _is_idle(self, key: BacklogKey) -> bool:
        return not any(handle.running for handle in self._pool.of_owner(*key))

    def _place(self, key: BacklogKey, now: float, blocked: set[BacklogKey]) -> bool:
        """Start the first call of a backlog. False when the processor's cap says to wait; adds to `blocked` otherwise."""
        backlog = self._backlogs[key]
        idle = self._is_idle(key)
        head = backlog.head(now, idle=idle)
        handle = self._pick(*key)
        if handle is None or head is None:
            blocked.add(key)
            return True
        preferred = head[1].handle
        if preferred is not None and preferred.worker.alive and len(preferred.running) <= len(handle.running):
            handle = preferred
        if len(handle.running) >= self._room(key[0], handle):
            blocked.add(key)
            return True
        if not self._pool.may_run(handle):
            return False
        tickets = backlog.take(now, idle=idle)
        if not len(backlog):
            del self._backlogs[key]
        for ticket in tickets:
            self._count_in(ticket, -1)
        started = self._run_single(tickets[0], handle, now) if len(tickets) == 1 else self._run_batch(tickets, handle, now)
        if not started:
            for ticket in tickets:
                self._put(ticket, ticket.queued_at)
            blocked.add(key)
        return True

    def _pick(self, model_id: bytes, key: bytes) -> Handle | None:
        handle = self._pool.pick(model_id, key)
        while handle is not None and not handle.worker.alive:
            self._pool.remove(handle)
            handle = self._pool.pick(model_id, key)
        return handle

    def _room(self, model_id: bytes, handle: Handle) -> int:
        # Calls that can be joined wait in the backlog, where they meet others, not in the worker.
        if model_id in self.batchable:
            return 1
        return self._pool.depth(model_id)

    def _batch_key(self, request: WorkRequest) -> batching.Key | None:
        facts = self.batchable.get(request.model_id)
        if facts is None or request.exact or not (facts.batch_exact or request.tolerance):
            return None
        if 2 * len(request.payload) > self.settings.batch_bytes_max or facts.fault(request.headers, request.outputs):
            return None
        try:
            if tensors.check_headers(request.headers) != len(request.payload):
                return None
        except ProtocolViolation:
            return None
        return batching.batch_key(request.headers, request.outputs, request.tolerance)

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
        if now > ticket.queued_at:
            self._metrics.observe("queue_seconds", now - ticket.queued_at)
        worker.submit(
            run_id, slot, ticket.encoded_headers, request.outputs, max(ticket.deadline - now, 0.001),
            partial(self._single_done, handle, ticket),
        )  # fmt: skip
        return True

    def _run_batch(self, tickets: list[WorkTicket], handle: Handle, now: float) -> bool:
        headers = batching.joined_headers([ticket.request.headers for ticket in tickets])
        slot = handle.worker.reserve(tensors.values_size(headers))
        if slot is None:
            return False
        batching.join_into(slot.view, [(ticket.request.headers, ticket.request.payload) for ticket in tickets])
        batch = _Batch(tickets, [ticket.rows for ticket in tickets])
        run_id = self._begin(handle, batch)
        for ticket in tickets:
            self._drop_slot(ticket)
            ticket.handle, ticket.run_id = handle, run_id
            self._metrics.observe("queue_seconds", now - ticket.queued_at)
        self._metrics.add("batches_total")
        self._metrics.add("batch_items_total", amount=len(tickets))
        seconds = max(min(ticket.deadline for ticket in tickets) - now, 0.001)
        outputs = tickets[0].request.outputs
        done = partial(self._batch_done, handle, batch)
        handle.worker.submit(run_id, slot, tensors.headers_bytes(headers), outputs, seconds, done)
        return True

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
                self._put(ticket, ticket.queued_at)
                self.dispatch()
                return
            result = WorkOutcome((), memoryview(b""), outcome.seconds, self.engine, _reason(outcome), outcome.detail)
        else:
            self._pool.learn(handle.model_id, outcome.seconds)
            headers = self._parsed(outcome.headers)
            result = WorkOutcome(headers, outcome.payload, outcome.seconds, self.engine)
        if self.queued:
            self.dispatch()
        self._finish(ticket, result)

    def _batch_done(self, handle: Handle, batch: _Batch, outcome: WorkerOutcome) -> None:
        self._ended(handle, outcome)
        parts = None
        if not outcome.reason:
            parts = batching.part(self._parsed(outcome.headers), outcome.payload, batch.rows)
            handle.worker.release(outcome.call_id)
            if parts is None:
                # It passed the proof and breaks its promise on real inputs: never again.
                self.batchable.pop(handle.model_id, None)
            else:
                self._pool.learn(handle.model_id, outcome.seconds / sum(batch.rows))
        finished = []
        for index, ticket in enumerate(batch.tickets):
            if ticket.is_done:
                continue
            ticket.handle = None
            if parts is not None:
                headers, payload = parts[index]
                share = outcome.seconds * batch.rows[index] / sum(batch.rows)
                finished.append((ticket, WorkOutcome(headers, payload, share, self.engine)))
            else:
                # One call's input may have failed the whole batch, so each gets a run of its own.
                ticket.batch_key, ticket.attempts = None, ticket.attempts + 1
                self._put(ticket, ticket.queued_at)
        if self.queued:
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

    def _reservation(self, payload: memoryview) -> tuple[Handle, Slot] | None:
        """Recognise a reserved view, also when it comes back as another view of the same bytes; forgets it."""
        found = self._reserved.pop(id(payload), None)
        if found is not None or not len(payload):
            return found
        address = _address(payload)
        for number, (handle, slot) in self._reserved.items():
            if slot.view.obj is payload.obj and _address(slot.view) == address:
                del self._reserved[number]
                return handle, Slot(slot.offset, payload)
        return None

    def _drop_slot(self, ticket: WorkTicket) -> None:
        slot, ticket.slot = ticket.slot, None
        if slot is not None and ticket.handle is not None:
            self._free(ticket.handle, slot)
            ticket.handle = None

    def _free(self, handle: Handle, slot: Slot) -> None:
        handle.reserved -= 1
        if handle.worker.alive:
            handle.worker.free(slot)

    def _use_room(self) -> None:
        if self.queued:
            self.dispatch()


def _reason(outcome: WorkerOutcome) -> Reason:
    return _REASONS.get(outcome.reason, Reason.RUN_FAILED)


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])


def _nothing() -> None:
    """Stands in for a callback that nobody has set."""
