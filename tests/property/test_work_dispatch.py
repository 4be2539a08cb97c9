"""Every order of submits, ends, deaths, cancels and releases: each call ends exactly once, nothing leaks and nothing stalls."""

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from p2pnode.environment import Slot, WorkerOutcome
from p2pnode.errors import Refused
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.wire import tensors
from p2pnode.work.admission import Admission
from p2pnode.work.calls import WorkOutcome, WorkRequest, WorkTicket
from p2pnode.work.dispatch import Dispatcher
from p2pnode.work.facts import ModelFacts, ValueFact
from p2pnode.work.pool import Handle, Pool
from p2pnode.work.settings import WorkSettings

MODELS, OWNERS = (b"m" * 32, b"n" * 32), (b"a" * 32, b"b" * 32)
SETTINGS = WorkSettings(
    cores=2, queue_max=8, queue_per_owner_max=6, batch_size_max=4, batch_delay_seconds=0.0, worker_calls_max=3, arena_bytes=40
)
# Of the arena, what the inputs of several calls may take: two to five of them.
INPUTS_BYTES = 20


class ScriptedWorker:
    """A worker whose calls end when the test says so; it doubles its input."""

    def __init__(self) -> None:
        self.alive = True
        self.slots: dict[int, int] = {}
        self.outputs: set[int] = set()
        self.queue: list[tuple[int, Slot, bytes, Callable[[WorkerOutcome], None]]] = []
        self.offset = 0

    def reserve(self, size: int) -> Slot | None:
        if not self.alive or (self.slots and sum(self.slots.values()) + size > INPUTS_BYTES):
            return None
        self.offset += 64
        self.slots[self.offset] = size
        return Slot(self.offset, memoryview(bytearray(size)))

    def free(self, slot: Slot) -> None:
        del self.slots[slot.offset]

    def submit(self, call_id: int, slot: Slot, headers: bytes, outputs: Any, deadline: float, on_done: Any) -> None:
        assert self.alive
        self.queue.append((call_id, slot, headers, on_done))

    def end_first(self, reason: str = "") -> None:
        call_id, slot, headers, on_done = self.queue.pop(0)
        del self.slots[slot.offset]
        if reason:
            on_done(WorkerOutcome(call_id, reason=reason))
            return
        self.outputs.add(call_id)
        values = tensors.decode_values(tensors.parse_headers(headers), slot.view)
        encoded, chunks, _ = tensors.encode_values({"y": values["x"] * 2})
        on_done(WorkerOutcome(call_id, tensors.headers_bytes(encoded), memoryview(b"".join(bytes(c) for c in chunks)), 0.001))

    def release(self, call_id: int) -> None:
        self.outputs.discard(call_id)

    def cancel(self, call_id: int) -> None:
        for index, entry in enumerate(self.queue):
            if entry[0] == call_id:
                self.queue.insert(0, self.queue.pop(index))
                self.end_first(Reason.CANCELLED.value)
                return

    def die(self) -> None:
        self.alive = False
        while self.queue:
            self.end_first(Reason.WORKER_DIED.value)

    kill = die


class StepClock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def wall_ms(self) -> int:
        return 0


async def _no_count(shapes: Any) -> int:
    return 1


class DispatchMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.clock = StepClock()
        self.pool = Pool(SETTINGS)
        self.wanted: list[tuple[bytes, bytes]] = []
        admission = Admission(SETTINGS, "full")
        self.dispatcher = Dispatcher(self.clock, SETTINGS, self.pool, admission, Metrics(), self.want)
        x = ValueFact("x", "tensor", 1, "tensor(float)", ("N", 1))
        facts = ModelFacts(
            MODELS[0], "m", (x,), (x,), {}, {}, (), False, 0, True, {}, _no_count, batchable=True, batch_exact=True
        )
        self.dispatcher.batchable[MODELS[0]] = facts
        self.workers: list[ScriptedWorker] = []
        self.live: dict[int, WorkTicket] = {}
        self.done: list[tuple[WorkTicket, WorkOutcome]] = []
        self.views: list[tuple[bytes, bytes, memoryview]] = []
        self.ended: set[int] = set()
        self.number = 0

    def want(self, model: bytes, owner: bytes) -> None:
        if (model, owner) not in self.wanted:
            self.wanted.append((model, owner))

    @rule(model=st.sampled_from(MODELS), owner=st.sampled_from(OWNERS), priority=st.integers(0, 2), rows=st.integers(1, 3))
    def submit(self, model: bytes, owner: bytes, priority: int, rows: int) -> None:
        x = np.full((rows, 1), self.number, np.float32)
        self.send(model, owner, priority, x, memoryview(x.tobytes()))

    @precondition(lambda self: self.views)
    @rule(rows=st.integers(1, 3))
    def submit_reserved(self, rows: int) -> None:
        model, owner, view = self.views.pop(0)
        x = np.full((len(view) // 4, 1), self.number, np.float32)
        view[:] = x.tobytes()
        self.send(model, owner, 1, x, view)

    def send(self, model: bytes, owner: bytes, priority: int, x: Any, payload: memoryview) -> None:
        number, headers = self.number, tensors.encode_values({"x": x})[0]
        self.number += 1

        def on_done(outcome: WorkOutcome) -> None:
            assert number not in self.ended, "a call ended twice"
            self.ended.add(number)
            if outcome.reason is None:
                answer = tensors.decode_values(outcome.headers, outcome.payload)["y"]
                assert np.array_equal(answer, np.full(x.shape, 2 * number, np.float32)), "another call's answer"
            ticket = self.live.pop(number, None)
            if ticket is not None:
                self.done.append((ticket, outcome))

        request = WorkRequest(model, headers, payload, (), priority, 10.0, owner)
        queued = self.dispatcher.queued
        try:
            ticket = self.dispatcher.submit(request, on_done)
        except Refused:
            assert queued >= SETTINGS.queue_per_owner_max
            return
        if number not in self.ended:
            self.live[number] = ticket

    @rule(model=st.sampled_from(MODELS), owner=st.sampled_from(OWNERS), size=st.sampled_from([4, 8, 12]))
    def reserve(self, model: bytes, owner: bytes, size: int) -> None:
        view = self.dispatcher.reserve(model, size, owner, False)
        if view is not None:
            self.views.append((model, owner, view))

    @rule(model=st.sampled_from(MODELS), owner=st.sampled_from(OWNERS), size=st.sampled_from([4, 8, 12]), kept=st.integers(0, 2))
    def crowd(self, model: bytes, owner: bytes, size: int, kept: int) -> None:
        """A worker's memory fills with inputs before a call comes that has no room any more; then most of them are submitted."""
        for _ in range(5):
            self.reserve(model, owner, size)
        self.submit(model, owner, 1, 3)
        while len(self.views) > kept:
            self.submit_reserved(1)

    @precondition(lambda self: self.views)
    @rule()
    def give_back(self) -> None:
        self.dispatcher.unreserve(self.views.pop()[2])

    @precondition(lambda self: self.wanted)
    @rule()
    def worker_starts(self) -> None:
        model, owner = self.wanted.pop(0)
        self.workers.append(ScriptedWorker())
        self.pool.add(Handle(self.workers[-1], model, 1, self.clock.now, owner))
        self.dispatcher.dispatch()

    @rule(index=st.integers(0, 9), fails=st.booleans())
    def call_ends(self, index: int, fails: bool) -> None:
        busy = [worker for worker in self.workers if worker.queue]
        if busy:
            busy[index % len(busy)].end_first(Reason.RUN_FAILED.value if fails else "")

    @rule(index=st.integers(0, 9))
    def worker_dies(self, index: int) -> None:
        if self.workers:
            self.workers[index % len(self.workers)].die()
            self.dispatcher.dispatch()

    @rule(index=st.integers(0, 9))
    def cancel(self, index: int) -> None:
        if self.live:
            list(self.live.values())[index % len(self.live)].cancel()

    @rule()
    def release(self) -> None:
        for ticket, _ in self.done:
            ticket.release()
        self.done.clear()

    @rule(seconds=st.sampled_from([0.1, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds
        self.dispatcher.expire(self.clock.now)
        self.dispatcher.dispatch()

    @invariant()
    def books_agree(self) -> None:
        handles = list(self.pool)
        assert self.pool.busy == sum(bool(handle.running) for handle in handles)
        assert self.pool.busy <= SETTINGS.workers_max
        assert self.dispatcher.live == len(self.live)
        assert self.dispatcher.queued <= SETTINGS.queue_max + len(self.live)
        for handle in handles:
            assert len(handle.running) == len(handle.worker.queue)  # type: ignore[attr-defined]
            assert handle.reserved >= 0

    @invariant()
    def nothing_stalls(self) -> None:
        """A call waits for a running one, for the processor, or for an input that the network is still filling."""
        for model, owner, _ in self.dispatcher.backlogs():
            for handle in self.pool.of_owner(model, owner):
                in_place = sum(ticket.slot is not None and ticket.handle is handle for ticket in self.live.values())
                is_free = handle.worker.alive and not handle.running and self.pool.may_run(handle)
                assert not is_free or handle.reserved > in_place

    def teardown(self) -> None:
        """When everything has ended and was given back, nothing is held anywhere."""
        for _, _, view in self.views:
            self.dispatcher.unreserve(view)
        for _ in range(200):
            while self.wanted:
                self.worker_starts()
            for worker in self.workers:
                if worker.queue:
                    worker.end_first()
            self.release()
            self.dispatcher.dispatch()
            if not self.live:
                break
        assert not self.live
        assert self.dispatcher.queued == 0
        for handle in self.pool:
            assert handle.reserved == 0
            if handle.worker.alive:
                assert not handle.worker.slots  # type: ignore[attr-defined]
                assert not handle.worker.outputs  # type: ignore[attr-defined]


DispatchMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestDispatch = DispatchMachine.TestCase
