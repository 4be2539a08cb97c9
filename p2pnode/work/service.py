"""The work service: models in, calls in, outputs out. It starts and ends workers; the calls themselves flow through `dispatch`.

Nothing here knows peers or money: an owner is a byte string, a refusal a reason. `run` must be running for any of it.
"""

from collections import OrderedDict
from functools import cache
from importlib.metadata import version
from typing import Any, Final

import trio

from p2pnode.environment import Environment, Slot, Worker, WorkerLimits, WorkerOutcome
from p2pnode.errors import Refused, WorkError
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.wire import tensors
from p2pnode.work.admission import Admission
from p2pnode.work.calls import OnDone, WorkOutcome, WorkRequest, WorkTicket
from p2pnode.work.dispatch import Dispatcher
from p2pnode.work.facts import ModelFacts, Shapes, parse_facts
from p2pnode.work.manifest import size_of
from p2pnode.work.measuring import Measured, measure
from p2pnode.work.models import ModelStore
from p2pnode.work.pool import LOCAL, SHARED, Handle, Pool
from p2pnode.work.settings import WorkSettings

__all__ = ["ModelFacts", "WorkOutcome", "WorkRequest", "WorkService", "WorkTicket"]

_COSTS_MAX: Final = 1024
_FACTS_MAX: Final = 256
# How long a model that could not be loaded is not tried again.
_BROKEN_SECONDS: Final = 60.0
_PREPARING: Final = b"preparing"


@cache
def _engine_name() -> str:
    """Read once: finding a package's version parses its whole description."""
    return f"onnxruntime {version('onnxruntime')}"


class WorkService:
    """Runs models for whoever may ask. Construct, then keep `run` running; everything else is called from the same loop."""

    def __init__(self, environment: Environment, settings: WorkSettings, models: ModelStore, metrics: Metrics) -> None:
        self._environment = environment
        self._settings = settings
        self._models = models
        self._clock = environment.clock
        self._pool = Pool(settings)
        self.admission = Admission(settings, environment.runtime.level)
        self._dispatcher = Dispatcher(environment.clock, settings, self._pool, self.admission, metrics, self._need_worker)
        self._dispatcher.engine = _engine_name()
        self._dispatcher.on_wait = self._wake_by
        self._dispatcher.on_quiet = self._tell_quiet
        self._nursery: trio.Nursery | None = None
        self._facts: OrderedDict[bytes, ModelFacts] = OrderedDict()
        self._raw: OrderedDict[bytes, ModelFacts] = OrderedDict()
        self._costs: OrderedDict[tuple[bytes, Any], int] = OrderedDict()
        self._broken: dict[bytes, tuple[float, Reason, str]] = {}
        self._preparing: dict[bytes, trio.Lock] = {}
        self._wake = trio.Event()
        self._wake_at = float("inf")
        self._quiet = trio.Event()
        models.in_use = self._pool.models

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled. Then waiting calls end with SHUTTING_DOWN and all workers are killed."""
        self.admission.level = self._environment.runtime.level
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                await self._keep_time()
        finally:
            self._nursery = None
            self._dispatcher.fail(Reason.SHUTTING_DOWN, "the node is stopping")
            for handle in list(self._pool):
                self._end_worker(handle)

    def check(self, client: bytes, model_id: bytes) -> None:
        """Say early whether this client may run this model now. Raises Refused, counted, with the owner's reason."""
        reason = self.admission.check(client, model_id, self._clock.monotonic())
        if reason is not None:
            raise Refused(reason)

    def reserve(self, model_id: bytes, size: int, owner: bytes = b"", share: bool = False) -> memoryview | None:
        """Give `size` bytes in a warm worker's memory, to receive a call's input in place; None when there is no such room.

        owner and share as in the WorkRequest that follows: another owner's worker must never see the input. Submit the view as
        the payload, or give it back with `unreserve`.
        """
        return self._dispatcher.reserve(model_id, size, owner, share)

    def poll(self) -> None:
        """Wait a moment, a tenth of a millisecond at most, for the only call under way if its model is a quick one."""
        self._dispatcher.poll()

    def unreserve(self, view: memoryview) -> None:
        """Give back a view from `reserve` that will not be submitted. Idempotent."""
        self._dispatcher.unreserve(view)

    def submit(self, request: WorkRequest, on_done: OnDone) -> WorkTicket:
        """Run a call; `on_done` runs once, in this loop, and not before `submit` has returned unless the call failed at once.

        With an idle warm worker this hands the call over directly, in about ten microseconds. Raises Refused, and then a
        reserved payload is given back: PAUSED, DRAINING, DENIED, MODEL_DENIED, SANDBOX_LEVEL, TOO_LARGE, BANDWIDTH, BUSY,
        UNKNOWN_MODEL, SHUTTING_DOWN, or why the model could not be loaded a moment ago. A payload that is not a reserved view
        must stay as it is until `on_done`.
        """
        model_id = request.model_id
        if model_id not in self._facts or self._nursery is None:
            unready = self._unready(model_id)
            if unready is not None:
                self._dispatcher.unreserve(request.payload)
                self.admission.count(unready[0])
                raise Refused(*unready)
        return self._dispatcher.submit(request, on_done)

    async def execute(self, request: WorkRequest) -> WorkOutcome:
        """Run a call and wait for it; the outcome's payload is a copy, nothing is to be released. Cancelled, so is the call.

        Raises Refused as `submit` does. A call that failed gives an outcome with a reason.
        """
        done = trio.Event()
        outcomes: list[WorkOutcome] = []

        def keep(outcome: WorkOutcome) -> None:
            outcome.payload = memoryview(bytes(outcome.payload))
            outcomes.append(outcome)
            done.set()

        ticket = self.submit(request, keep)
        try:
            await done.wait()
        except trio.Cancelled:
            ticket.cancel()
            raise
        finally:
            ticket.release()
        return outcomes[0]

    async def prepare(self, model_id: bytes) -> ModelFacts:
        """Inspect, load and measure a stored model, once; give its facts. A worker is warm afterwards.

        Raises WorkError with what is wrong with the model, UNKNOWN_MODEL, or MEMORY. Cancelled, nothing is left behind.
        """
        lock = self._preparing.setdefault(model_id, trio.Lock())
        async with lock:
            try:
                known = self._facts.get(model_id)
                return known if known is not None else await self._prepare(model_id)
            finally:
                if not lock.statistics().tasks_waiting:
                    self._preparing.pop(model_id, None)
                # Its memory, or the new worker, may be what a waiting call needs.
                self._dispatcher.dispatch()

    async def _prepare(self, model_id: bytes) -> ModelFacts:
        facts = await self._measure(await self._inspect(model_id))
        self._facts[model_id] = facts
        if facts.batchable:
            self._dispatcher.batchable[model_id] = facts
        while len(self._facts) > _FACTS_MAX:
            self._dispatcher.batchable.pop(self._facts.popitem(last=False)[0], None)
        return facts

    def facts(self, model_id: bytes) -> ModelFacts | None:
        """Give what `prepare` found, or None when it has not run."""
        return self._facts.get(model_id)

    async def inspect(self, model_id: bytes) -> ModelFacts:
        """Give a stored model's facts without running it. Raises WorkError."""
        return self._facts.get(model_id) or await self._inspect(model_id)

    async def operations(self, model_id: bytes, shapes: Shapes) -> int:
        """Count the operations of one call at these input shapes (see `graph_cost`), in a confined child, cached.

        Raises WorkError for an unknown or unsound model.
        """
        key = (bytes(model_id), tuple(sorted((name, tuple(dims)) for name, dims in shapes.items())))
        known = self._costs.get(key)
        if known is not None:
            self._costs.move_to_end(key)
            return known
        graph = self._models.read_blob(model_id, 0, 0, self._models.manifest(model_id).blobs[0].size)
        arguments = {"shapes": {name: list(dims) for name, dims in shapes.items()}}
        result, _ = await self._environment.runtime.confined("cost", arguments, graph, 0, self._settings.inspect_seconds)
        found = result.get("operations")
        if not isinstance(found, int) or found < 1:
            raise WorkError(Reason.BAD_MODEL, "its operations could not be counted")
        self._costs[key] = found
        while len(self._costs) > _COSTS_MAX:
            self._costs.popitem(last=False)
        return found

    def apply(self, settings: WorkSettings) -> None:
        """Let new settings count from now on; workers beyond a smaller budget are ended as they become idle."""
        self._settings = self._pool.settings = self._models.settings = settings
        self.admission.apply(settings)
        self._dispatcher.apply(settings)
        self._tidy(self._clock.monotonic())

    def pause(self, seconds: float | None = None) -> None:
        """Take no calls for a time or until `resume`; those that wait are refused, those that run end."""
        self.admission.pause(self._clock.monotonic(), seconds)
        self._dispatcher.fail(Reason.PAUSED, "the owner paused this machine")

    def resume(self) -> None:
        """End a pause or a drain."""
        self.admission.resume()

    def drain(self) -> None:
        """Take no more calls; finish all that are here. `wait_quiet` tells when."""
        self.admission.drain()

    async def wait_quiet(self) -> None:
        """Wait until no call is running or waiting."""
        while self._dispatcher.live:
            self._quiet = trio.Event()
            await self._quiet.wait()

    def why(self) -> list[tuple[Reason, int, str]]:
        """Give why there is no work, as `Admission.why`."""
        return self.admission.why(self._clock.monotonic())

    def status(self) -> dict[str, Any]:
        """Give what goes on, in plain values, for people and the control API. Times in seconds, sizes in bytes."""
        now = self._clock.monotonic()
        until = self.admission.paused_until
        paused = self.admission.is_paused(now)
        return {
            "sandbox_level": self.admission.level,
            "is_paused": paused,
            "paused_for_seconds": None if not paused or until is None or until == float("inf") else until - now,
            "is_draining": self.admission.is_draining,
            "calls_running": self._dispatcher.live - self._dispatcher.queued,
            "calls_queued": self._dispatcher.queued,
            "queue_max": self._settings.queue_max,
            "models_warm": sorted(model_id.hex() for model_id in self._pool.models()),
            "workers": [self._describe(handle, now) for handle in self._pool],
            "workers_busy": self._pool.busy,
            "workers_busy_max": self._settings.workers_max,
            "memory_bytes": self._pool.memory_bytes,
            "memory_bytes_max": self._settings.memory_bytes,
            "refusals": self.admission.refusals(),
            "batchable_models": sorted(model_id.hex() for model_id in self._dispatcher.batchable),
        }

    def _describe(self, handle: Handle, now: float) -> dict[str, Any]:
        owner = handle.owner
        return {
            "model_id": handle.model_id.hex(),
            "owner": "nobody" if owner is None else owner.decode() if owner in (SHARED, LOCAL) else owner.hex(),
            "calls": len(handle.running),
            "idle_seconds": 0.0 if handle.running else now - handle.used_at,
            "memory_bytes": handle.memory_bytes,
        }

    def _unready(self, model_id: bytes) -> tuple[Reason, str] | None:
        """Say why a call for a model without measured facts is refused; None when it may wait for them."""
        if self._nursery is None:
            return Reason.SHUTTING_DOWN, "the node is not serving"
        broken = self._broken.get(model_id)
        if broken is not None and self._clock.monotonic() < broken[0]:
            return broken[1], broken[2]
        self._broken.pop(model_id, None)
        return None if self._models.has(model_id) else (Reason.UNKNOWN_MODEL, "the model is not here")

    def _need_worker(self, model_id: bytes, key: bytes) -> None:
        """Start a worker in the background if memory allows; otherwise the calls wait for memory or fail."""
        if self._nursery is None:
            return
        try:
            size = self._worker_bytes(model_id)
        except WorkError as unknown:
            self._nursery.start_soon(self._fail_later, model_id, key, unknown)
            return
        victims = self._pool.begin_start(model_id, key, size)
        if victims is None:
            if size > self._settings.memory_bytes:
                error = WorkError(Reason.MEMORY, "the memory cap leaves no room for the model")
                self._nursery.start_soon(self._fail_later, model_id, key, error)
            return
        for victim in victims:
            self._end_worker(victim)
        self._nursery.start_soon(self._start_worker, model_id, key, size)

    async def _start_worker(self, model_id: bytes, key: bytes, size: int) -> None:
        try:
            if model_id not in self._facts:
                # Nothing of a stranger's model is loaded that was not inspected.
                await self._inspect(model_id)
            worker = await self._environment.runtime.start_worker(self._models.worker_model(model_id), self._limits())
        except WorkError as error:
            await self._fail_later(model_id, key, error)
            return
        finally:
            self._pool.end_start(model_id, key)
        self._pool.add(Handle(worker, bytes(model_id), size, self._clock.monotonic(), key))
        self._dispatcher.dispatch()

    async def _fail_later(self, model_id: bytes, key: bytes, error: WorkError) -> None:
        self._broken[model_id] = (self._clock.monotonic() + _BROKEN_SECONDS, error.reason, error.detail)
        while len(self._broken) > _FACTS_MAX:
            del self._broken[next(iter(self._broken))]
        self.admission.count(error.reason)
        self._dispatcher.fail(error.reason, error.detail, [(model_id, key)])

    async def _inspect(self, model_id: bytes) -> ModelFacts:
        known = self._raw.get(model_id)
        if known is not None:
            return known
        manifest = self._models.manifest(model_id)
        blob_size = manifest.blobs[1].size if len(manifest.blobs) > 1 else 0
        graph = self._models.read_blob(model_id, 0, 0, manifest.blobs[0].size)
        raw = await self._models.inspect(graph, blob_size, manifest.initializers)
        facts = parse_facts(bytes(model_id), manifest.name, size_of(manifest), raw, self._counter(bytes(model_id)))
        self._raw[model_id] = facts
        while len(self._raw) > _FACTS_MAX:
            self._raw.popitem(last=False)
        return facts

    def _counter(self, model_id: bytes) -> Any:
        async def count(shapes: Shapes) -> int:
            return await self.operations(model_id, shapes)

        return count

    async def _measure(self, facts: ModelFacts) -> ModelFacts:
        """Load a model in a worker that belongs to nobody yet and make its first runs."""
        model_id, size = facts.model_id, self._worker_bytes(facts.model_id)
        victims = self._pool.begin_start(model_id, _PREPARING, size)
        if victims is None:
            raise WorkError(Reason.MEMORY, "the memory cap leaves no room for the model")
        try:
            for victim in victims:
                self._end_worker(victim)
            worker = await self._environment.runtime.start_worker(self._models.worker_model(model_id), self._limits())
            handle = Handle(worker, model_id, size, self._clock.monotonic())
            try:
                measured = await measure(facts, self._settings, _Runner(worker, self._settings.call_seconds_max).run)
                if worker.alive:
                    self._pool.add(handle)
            finally:
                if handle not in self._pool:
                    worker.kill()
        finally:
            self._pool.end_start(model_id, _PREPARING)
        if measured.seconds_per_call:
            self._pool.learn(model_id, measured.seconds_per_call)
        return measured

    def _worker_bytes(self, model_id: bytes) -> int:
        return self._pool.worker_bytes(size_of(self._models.manifest(model_id)))

    def _limits(self) -> WorkerLimits:
        settings = self._settings
        return WorkerLimits(
            memory_bytes=settings.worker_memory_bytes,
            load_seconds=settings.load_seconds,
            call_seconds=settings.call_seconds_max,
            arena_bytes=settings.arena_bytes,
            threads=settings.threads_per_worker,
        )

    def _end_worker(self, handle: Handle) -> None:
        self._pool.remove(handle)
        handle.worker.kill()

    def _wake_by(self, deadline: float) -> None:
        if deadline < self._wake_at:
            self._wake.set()

    def _tell_quiet(self) -> None:
        self._quiet.set()

    async def _keep_time(self) -> None:
        """Do what time alone causes: expire queued calls, send part-filled batches, end idle workers."""
        while True:
            now = self._clock.monotonic()
            self._tidy(now)
            # A worker that becomes idle meanwhile is noticed at the latest after the idle time again.
            latest = now + self._settings.worker_idle_seconds
            self._wake_at = min(self._dispatcher.deadline(now), self._pool.next_surplus(), latest)
            with trio.move_on_at(self._wake_at):
                await self._wake.wait()
            self._wake = trio.Event()

    def _tidy(self, now: float) -> None:
        self._dispatcher.expire(now)
        for handle in self._pool.surplus(now):
            self._end_worker(handle)
        self._dispatcher.dispatch()


class _Runner:
    """Runs made-up inputs on a worker that is in no pool yet."""

    def __init__(self, worker: Worker, seconds: float) -> None:
        self._worker = worker
        self._seconds = seconds
        self._number = 0

    async def run(self, inputs: dict[str, Any]) -> Measured:
        """Give (outputs, seconds), None when the model fails on these inputs. Cancelled, the caller kills the worker."""
        headers, chunks, size = tensors.encode_values(inputs)
        slot = self._worker.reserve(max(size, 1)) if self._worker.alive else None
        if slot is None:
            return None
        position = 0
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            slot.view[position : position + len(view)] = view
            position += len(view)
        self._number -= 1
        done, outcomes = trio.Event(), list[WorkerOutcome]()

        def keep(outcome: WorkerOutcome) -> None:
            outcomes.append(outcome)
            done.set()

        encoded = tensors.headers_bytes(headers)
        self._worker.submit(self._number, Slot(slot.offset, slot.view[:size]), encoded, (), self._seconds, keep)
        await done.wait()
        outcome = outcomes[0]
        if outcome.reason:
            return None
        payload = bytes(outcome.payload)
        self._worker.release(self._number)
        return tensors.decode_values(tensors.parse_headers(outcome.headers), payload), outcome.seconds
