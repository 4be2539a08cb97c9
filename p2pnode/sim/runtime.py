"""A model runtime without processes, for simulations and tests: the same Protocol, the same ONNX Runtime, no sandbox.

Models run inline, in this process, so only trusted models may be given to it. With `seconds_of` a call takes that much virtual
time and is computed when it is over. A test can hold a worker's calls back or kill it, where the real one could be slow or
die. Results are those of the real engine.
"""

import os

# Before the import, or ONNX Runtime phones home.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnxruntime
import trio
from onnxruntime.capi import onnxruntime_pybind11_state as engine

from p2pnode.environment import Buffer, Slot, Worker, WorkerLimits, WorkerModel, WorkerOutcome
from p2pnode.errors import ProtocolViolation, WorkError
from p2pnode.reasons import Reason
from p2pnode.wire import tensors
from p2pnode.wire.messages.work import ValueHeader
from p2pnode.work import inspection

_ALIGNMENT: Final = 64
# What a session raises: its own classes, which share no base but Exception, and what Python and C++ exceptions become.
_ENGINE_ERRORS: Final[tuple[type[Exception], ...]] = (
    *(kind for kind in vars(engine).values() if isinstance(kind, type) and issubclass(kind, Exception)),
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
)
# (model id, input headers) -> virtual seconds in the worker.
SecondsOf = Callable[[bytes, Sequence[ValueHeader]], float]


@dataclass(slots=True)
class InlineCall:
    """One call in an inline worker, as a test may look at it."""

    call_id: int
    slot: Slot
    headers: bytes
    outputs: Sequence[str]
    deadline_seconds: float
    on_done: Callable[[WorkerOutcome], None]
    is_cancelled: bool = False


class InlineRuntime:
    """`environment.ModelRuntime` in this process. Workers live in `nursery`, or in that of `run`.

    seconds_of: modelled time of a call, 0 when left out. sessions: a cache of loaded models that the nodes of one simulation
    share, so that hundreds of them load a model once.
    """

    def __init__(
        self,
        seconds_of: SecondsOf | None = None,
        *,
        level: str = "simulated",
        load_seconds: float = 0.0,
        sessions: dict[bytes, Any] | None = None,
        nursery: trio.Nursery | None = None,
    ) -> None:
        self._seconds_of = seconds_of
        self._load_seconds = load_seconds
        self._sessions = {} if sessions is None else sessions
        self._nursery = nursery
        self.level = level
        self.workers: list[InlineWorker] = []

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the workers' virtual clocks until cancelled. Workers end with it."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None
            for worker in self.workers:
                worker.kill()

    async def confined(
        self, task: str, arguments: Mapping[str, Any], data: Buffer, output_bytes_max: int, seconds: float
    ) -> tuple[dict[str, Any], bytes]:
        """Run a task of `work.inspection` here. Raises what it raises, or WorkError(OUTPUT_TOO_LARGE)."""
        await trio.lowlevel.checkpoint()
        result, output = inspection.TASKS[task](arguments, memoryview(data))
        if len(output) > output_bytes_max:
            raise WorkError(Reason.OUTPUT_TOO_LARGE, f"the task {task} gave {len(output)} bytes")
        return result, output

    async def start_worker(self, model: WorkerModel, limits: WorkerLimits) -> Worker:
        """Load a model here. Raises WorkError(BAD_MODEL) when ONNX Runtime refuses it, SHUTTING_DOWN when not running."""
        if self._nursery is None:
            raise WorkError(Reason.SHUTTING_DOWN, "the runtime is not running")
        await trio.sleep(self._load_seconds)
        session = self._sessions.get(model.model_id)
        if session is None:
            session = self._sessions[model.model_id] = _load(model)
        worker = InlineWorker(model.model_id, session, limits, self._seconds_of)
        self.workers.append(worker)
        self._nursery.start_soon(worker.run)
        return worker


class InlineWorker:
    """`environment.Worker` in this process: one call at a time, in order; slots are plain memory within the arena's size."""

    def __init__(self, model_id: bytes, session: Any, limits: WorkerLimits, seconds_of: SecondsOf | None) -> None:
        self.model_id = model_id
        self._session = session
        self._limits = limits
        self._seconds_of = seconds_of
        self._queue: deque[InlineCall] = deque()
        self._slots: dict[int, int] = {}
        self._outputs: dict[int, int] = {}
        self._next_offset = _ALIGNMENT
        self._more = trio.Event()
        self._released = trio.Event()
        self._interrupt = trio.CancelScope()
        self._alive = True
        # Tests may hold calls back or look at what came in.
        self.is_held = False
        self.submitted: list[InlineCall] = []

    @property
    def alive(self) -> bool:
        """False after `kill`."""
        return self._alive

    @property
    def taken_bytes(self) -> int:
        """Memory of slots and unreleased outputs."""
        return sum(self._slots.values()) + sum(self._outputs.values())

    def reserve(self, size_bytes: int) -> Slot | None:
        """Take memory for an input, or None beyond the arena's size, or the half of it that more than one input may take."""
        inputs, arena = sum(self._slots.values()), self._limits.arena_bytes
        if not self._alive or self.taken_bytes + size_bytes > arena or (self._slots and inputs + size_bytes > arena // 2):
            return None
        offset, self._next_offset = self._next_offset, self._next_offset + size_bytes + -size_bytes % _ALIGNMENT
        self._slots[offset] = size_bytes
        return Slot(offset, _aligned(size_bytes))

    def free(self, slot: Slot) -> None:
        """Give a slot back."""
        del self._slots[slot.offset]

    def submit(
        self,
        call_id: int,
        slot: Slot,
        headers: bytes,
        outputs: Sequence[str],
        deadline_seconds: float,
        on_done: Callable[[WorkerOutcome], None],
    ) -> None:
        """Queue one call; a dead worker answers at once."""
        call = InlineCall(call_id, slot, headers, outputs, deadline_seconds, on_done)
        self.submitted.append(call)
        if not self._alive:
            self._slots.pop(slot.offset, None)
            on_done(WorkerOutcome(call_id, reason=Reason.WORKER_DIED.value))
            return
        self._queue.append(call)
        self._more.set()

    def poll(self) -> None:
        """Nothing is due sooner than its time here."""

    def release(self, call_id: int) -> None:
        """Give a finished call's output memory back. Idempotent."""
        self._outputs.pop(call_id, None)
        self._released.set()

    def cancel(self, call_id: int) -> None:
        """End a call early; the running one at the next moment of virtual time."""
        for call in self._queue:
            if call.call_id == call_id:
                call.is_cancelled = True
                if call is self._queue[0]:
                    self._interrupt.cancel()
                self._more.set()

    def kill(self) -> None:
        """End the worker; every call in it ends with WORKER_DIED when the loop comes round."""
        self._alive = False
        self._interrupt.cancel()
        self._more.set()

    def proceed(self) -> None:
        """Let held calls run."""
        self.is_held = False
        self._more.set()

    async def run(self) -> None:
        """Work through the queue until killed or cancelled."""
        try:
            while self._alive:
                if not self._queue or (self.is_held and not self._queue[0].is_cancelled):
                    await self._more.wait()
                    self._more = trio.Event()
                    continue
                await self._serve(self._queue[0])
        finally:
            self._alive = False
            while self._queue:
                self._finish(self._queue[0], WorkerOutcome(self._queue[0].call_id, reason=Reason.WORKER_DIED.value))

    async def _serve(self, call: InlineCall) -> None:
        seconds = 0.0
        if self._seconds_of is not None:
            seconds = self._seconds_of(self.model_id, tensors.parse_headers(call.headers))
        with trio.CancelScope() as self._interrupt:
            await trio.sleep(min(seconds, call.deadline_seconds))
        if not self._alive:
            return
        if call.is_cancelled:
            self._finish(call, WorkerOutcome(call.call_id, reason=Reason.CANCELLED.value))
        elif seconds > call.deadline_seconds:
            # The real worker is killed when a call does not stop.
            self._alive = False
            self._finish(call, WorkerOutcome(call.call_id, reason=Reason.TIME_LIMIT.value))
        else:
            self._finish(call, await self._placed(call, self._compute(call, seconds)))

    async def _placed(self, call: InlineCall, outcome: WorkerOutcome) -> WorkerOutcome:
        """Wait until the readers of earlier outputs have made room for this one; give the call up when none is left to do so."""
        size, arena = len(outcome.payload), self._limits.arena_bytes
        ends = trio.current_time() + call.deadline_seconds
        reason = None
        while size and reason is None and self.taken_bytes + size > arena:
            if not self._alive or call.is_cancelled:
                reason = Reason.CANCELLED if call.is_cancelled else Reason.WORKER_DIED
            elif self._slots.get(call.slot.offset, 0) + size > arena:
                reason = Reason.OUTPUT_TOO_LARGE
            elif not self._outputs or trio.current_time() >= ends:
                reason = Reason.MEMORY
            else:
                self._released = trio.Event()
                with trio.CancelScope(deadline=ends) as self._interrupt:
                    await self._released.wait()
        if reason is not None:
            return WorkerOutcome(call.call_id, seconds=outcome.seconds, reason=reason.value)
        if size:
            self._outputs[call.call_id] = size
        return outcome

    def _compute(self, call: InlineCall, seconds: float) -> WorkerOutcome:
        try:
            values = tensors.decode_values(tensors.parse_headers(call.headers), call.slot.view)
            names = list(call.outputs) or [output.name for output in self._session.get_outputs()]
            results = dict(zip(names, self._session.run(names, values), strict=True))
            headers, chunks, size = tensors.encode_values(results)
        except (ProtocolViolation, WorkError) as error:
            return WorkerOutcome(call.call_id, seconds=seconds, reason=error.reason.value, detail=error.detail)
        except _ENGINE_ERRORS as error:
            detail = f"{type(error).__name__}: {error}"
            return WorkerOutcome(call.call_id, seconds=seconds, reason=_reason_of(detail).value, detail=detail)
        payload = _aligned(size)
        position = 0
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            payload[position : position + len(view)] = view
            position += len(view)
        return WorkerOutcome(call.call_id, tensors.headers_bytes(headers), payload, seconds)

    def _finish(self, call: InlineCall, outcome: WorkerOutcome) -> None:
        self._queue.remove(call)
        self._slots.pop(call.slot.offset, None)
        call.on_done(outcome)


def _load(model: WorkerModel) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    values = {}
    for name, dtype, shape, offset, size in model.initializers:
        header = ValueHeader(name, 0, dtype, tuple(shape), size)
        values[name] = onnxruntime.OrtValue.ortvalue_from_numpy(
            tensors.decode_values([header], memoryview(model.blob)[offset : offset + size])[name]
        )
    if values:
        options.add_external_initializers(list(values), list(values.values()))
    try:
        session = onnxruntime.InferenceSession(model.graph, options, providers=["CPUExecutionProvider"])
    except _ENGINE_ERRORS as error:
        raise WorkError(Reason.BAD_MODEL, f"{type(error).__name__}: {error}") from error
    # The session reads the initialisers where they lie.
    return _Session(session, (values, model.blob))


class _Session:
    """A session and what must outlive it."""

    def __init__(self, session: Any, keep: object) -> None:
        self._keep = keep
        self.run = session.run
        self.get_outputs = session.get_outputs


def _reason_of(detail: str) -> Reason:
    for text, reason in (
        ("Required inputs", Reason.MISSING_INPUT),
        ("Invalid input name", Reason.UNKNOWN_INPUT),
        ("Invalid Feed Input Name", Reason.UNKNOWN_INPUT),
        ("Invalid output name", Reason.UNKNOWN_OUTPUT),
        ("Unexpected input data type", Reason.WRONG_DTYPE),
        ("Invalid rank for input", Reason.WRONG_SHAPE),
        ("Got invalid dimensions for input", Reason.WRONG_SHAPE),
    ):
        if text in detail:
            return reason
    return Reason.RUN_FAILED


def _aligned(size: int) -> memoryview:
    """Give zeroed memory that starts on a 64-byte boundary, as the real arenas do."""
    raw = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -int(raw.__array_interface__["data"][0]) % _ALIGNMENT
    return raw.data[start : start + size]
