"""The daemon's side of one worker: its queue, its memory, its deadlines, and the check of everything it says.

A worker may have been taken over by its model. So only the parent allocates memory, and each response is checked: order,
sizes, headers, names. What fails a check is killed. A worker can still change an output after its answer; then the output's
hash no longer fits, to its own provider's harm alone. A call costs one datagram each way and two views of shared memory.
"""

import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgpack
import trio

from p2pnode.environment import Slot, WorkerLimits, WorkerOutcome
from p2pnode.errors import WorkError
from p2pnode.reasons import Reason
from p2pnode.work import channel, death
from p2pnode.work.answers import WORKER_REASONS, PendingCall, check_headers, remember
from p2pnode.work.arena import Arena
from p2pnode.work.channel import GarbledResponse, Response
from p2pnode.work.children import Child

# Requests in the worker's socket: enough to keep it busy while the loop does something else.
PIPE_DEPTH: Final = 8
# A call of an unknown kind gets this much for its outputs; if they are larger it asks.
_FIRST_OUTPUT_BYTES: Final = 64 << 10
_GRACE_SECONDS: Final = 0.25
_TRIM_SECONDS: Final = 5.0
_TRIM_BYTES: Final = 1 << 20
_FACTS_BYTES_MAX: Final = 16 << 20
_REMEMBERED_MAX: Final = 256
_POLL_SECONDS: Final = 0.0001


class RemoteWorker:
    """One confined process with one loaded model, as `environment.Worker`. `run` drives it and ends with it."""

    def __init__(
        self, child: Child, control: socket.socket, cancel: socket.socket, errors: int, arena: Arena, limits: WorkerLimits
    ) -> None:
        self._child = child
        self._control, self._cancel, self._errors = control, cancel, errors
        self._descriptor = control.fileno()
        self._arena = arena
        self._limits = limits
        self._alive = True
        self._sequence = 0
        self._queue: deque[PendingCall] = deque()
        self._sent = 0
        self._calls: dict[int, PendingCall] = {}
        self._outputs: dict[int, Slot] = {}
        self._output_sizes: dict[bytes, int] = {}
        self._checked: dict[tuple[bytes, tuple[str, ...]], int] = {}
        self._encoded_names: dict[tuple[str, ...], bytes] = {}
        self._all_names: tuple[str, ...] = ()
        self._head_since = 0.0
        self._timer = trio.CancelScope()
        self._verdict: tuple[PendingCall | None, Reason, str] | None = None
        self.facts: dict[str, Any] = {}
        self.pid = child.pid
        self.load_seconds = 0.0
        self._last_seconds = 1.0
        self.level = ""

    @property
    def alive(self) -> bool:
        """False once the process has ended or was killed."""
        return self._alive

    def reserve(self, size_bytes: int) -> Slot | None:
        """Take arena space for a call's input, or None when inputs have their share of it now or the worker is gone."""
        return self._arena.reserve_input(size_bytes) if self._alive else None

    def free(self, slot: Slot) -> None:
        """Give back a slot that was reserved and never submitted."""
        self._arena.free(slot)
        self._use_freed_room()

    def submit(
        self,
        call_id: int,
        slot: Slot,
        headers: bytes,
        outputs: Sequence[str],
        deadline_seconds: float,
        on_done: Callable[[WorkerOutcome], None],
    ) -> None:
        """Queue one call; see `environment.Worker.submit`. The deadline counts from when the worker starts on it.

        To a worker that is gone the answer, WORKER_DIED, comes before this returns. Raises ValueError for a call id in use.
        """
        if call_id in self._calls or call_id in self._outputs:
            raise ValueError(f"call {call_id} is in use")
        if not self._alive:
            self._arena.free(slot)
            on_done(WorkerOutcome(call_id, reason=Reason.WORKER_DIED.value, detail="the worker has ended"))
            return
        names = tuple(dict.fromkeys(outputs))
        encoded = self._encoded_names.get(names)
        if encoded is None:
            encoded = remember(self._encoded_names, names, msgpack.packb(names))
        self._sequence += 1
        plan = channel.join_plan(encoded, headers)
        deadline = min(deadline_seconds, self._limits.call_seconds)
        call = PendingCall(call_id, self._sequence, slot, plan, names or self._all_names, deadline, on_done)
        self._calls[call_id] = call
        self._queue.append(call)
        if len(self._queue) == 1:
            self._start_clock()
        self._feed()

    def release(self, call_id: int) -> None:
        """Say that a finished call's output payload is no longer needed. Idempotent."""
        slot = self._outputs.pop(call_id, None)
        if slot is not None:
            self._arena.free(slot)
            self._use_freed_room()

    def cancel(self, call_id: int) -> None:
        """Ask for an early end: politely first, SIGKILL when the call does not stop. `on_done` still runs."""
        call = self._calls.get(call_id)
        if call is None or call.is_cancelled:
            return
        call.is_cancelled = True
        if call not in list(self._queue)[: self._sent]:
            self._finish(call, WorkerOutcome(call_id, reason=Reason.CANCELLED.value))
            return
        call.cancelled_at = trio.current_time()
        self._ask_to_stop(call)
        if call is self._queue[0]:
            self._wake_by(call.cancelled_at + _GRACE_SECONDS)
            self._place_waiting()

    def kill(self) -> None:
        """Kill the process now. Every call in it ends with WORKER_DIED."""
        self._end(None, Reason.WORKER_DIED, "the worker was stopped")

    async def wait_loaded(self) -> None:
        """Wait until the model is loaded. Raises WorkError with what went wrong; the caller destroys the worker then."""
        while True:
            await trio.lowlevel.wait_readable(self._descriptor)
            try:
                datagram = os.read(self._descriptor, channel.DATAGRAM_BYTES_MAX)
                break
            except BlockingIOError:
                continue
            except OSError:
                datagram = b""
                break
        if not datagram:
            self._child.kill()
            reason, detail = death.explain(await self._child.wait(), self._errors)
            raise WorkError(reason, f"while loading the model: {detail}")
        try:
            response = channel.parse_response(datagram)
            if response.kind == channel.LOAD_FAILED:
                reason, detail = death.parse_failure(response.tail, frozenset(Reason))
                raise WorkError(reason, detail)
            self._accept_facts(response)
        except (GarbledResponse, ValueError) as error:
            raise WorkError(Reason.WORKER_DIED, f"the worker talked nonsense while loading: {error}") from error

    async def run(self) -> None:
        """Serve until the process ends. Then, or when cancelled, it is killed and every call answered."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch)
                await self._read()
                nursery.cancel_scope.cancel()
        finally:
            await self.destroy()

    async def destroy(self) -> None:
        """Kill the process, wait for its end, answer its calls, free its descriptors. Not cancellable, at most two seconds."""
        self._alive = False
        self._child.kill()
        status = None
        with trio.move_on_after(2, shield=True):
            status = await self._child.wait()
        guilty, reason, detail = self._verdict or (self._queue[0] if self._sent else None, *death.explain(status, self._errors))
        self._child.close()
        self._control.close()
        self._cancel.close()
        os.close(self._errors)
        self._arena.close()
        self._sent = 0
        while self._queue:
            call = self._queue[0]
            mine = call is guilty
            because = reason if mine else Reason.CANCELLED if call.is_cancelled else Reason.WORKER_DIED
            self._finish(call, WorkerOutcome(call.call_id, reason=because.value, detail=detail))

    def _accept_facts(self, response: Response) -> None:
        size = response.payload_size
        if response.kind != channel.LOADED or size > min(_FACTS_BYTES_MAX, self._arena.size):
            raise GarbledResponse("facts")
        facts = msgpack.unpackb(bytes(self._arena.view(0, size)))
        names = facts.get("outputs") if isinstance(facts, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise GarbledResponse("outputs")
        self.facts, self.load_seconds, self._all_names = facts, response.seconds, tuple(names)

    async def _read(self) -> None:
        while self._alive:
            await trio.lowlevel.wait_readable(self._descriptor)
            if not self._alive or not self._take_responses():
                return

    def poll(self) -> None:
        """Wait for the answer of a single short call for a moment; see `environment.Worker.poll`.

        Sleeping and being woken costs as much as such a call, so this thread looks again and again. In between it lets others
        have its processor: the worker may have been put on the same one.
        """
        if len(self._queue) != 1 or self._last_seconds > _POLL_SECONDS:
            return
        until = trio.current_time() + _POLL_SECONDS
        while self._alive and self._take_responses() and self._queue and trio.current_time() < until:
            os.sched_yield()

    def _take_responses(self) -> bool:
        """Handle what the worker has said so far; False when it will say no more."""
        while True:
            try:
                datagram = os.read(self._descriptor, channel.DATAGRAM_BYTES_MAX)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not datagram:
                return False
            try:
                self._handle(channel.parse_response(datagram))
            except GarbledResponse as error:
                self._end(self._queue[0] if self._sent else None, Reason.WORKER_DIED, f"the worker talked nonsense: {error}")
                return False
            if not self._sent:
                return True

    def _handle(self, response: Response) -> None:
        if not self._sent or response.sequence != self._queue[0].sequence:
            raise GarbledResponse("sequence")
        call = self._queue[0]
        self._last_seconds = response.seconds
        if response.kind == channel.DONE:
            headers = self._check_outputs(call, response)
            payload = call.target.view[: response.payload_size] if call.target else memoryview(b"")
            self._learn(call, max(response.payload_size + response.headers_size, 64))
            self._finish(call, WorkerOutcome(call.call_id, headers, payload, response.seconds))
        elif response.kind == channel.FAILED:
            reason, detail = death.parse_failure(response.tail, WORKER_REASONS)
            if call.dropped is not None:
                reason, detail = call.dropped
            elif reason is Reason.CANCELLED and not call.is_cancelled:
                reason = Reason.TIME_LIMIT if call.is_overdue else Reason.RUN_FAILED
            outcome = WorkerOutcome(call.call_id, b"", memoryview(b""), response.seconds, reason.value, detail)
            self._finish(call, outcome)
        elif response.kind == channel.NEED and response.needed_size > (len(call.target.view) if call.target else 0):
            call.needs = response.needed_size
            self._learn(call, call.needs)
            self._place_waiting()
        else:
            raise GarbledResponse("kind")

    def _learn(self, call: PendingCall, size: int) -> None:
        if self._output_sizes.get(call.plan) != size:
            remember(self._output_sizes, call.plan, size)
            self._arena.learn(len(call.slot.view), size)

    def _check_outputs(self, call: PendingCall, response: Response) -> bytes:
        room = len(call.target.view) if call.target else 0
        size, length = response.payload_size, response.headers_size
        if size > room:
            raise GarbledResponse("payload size")
        if length <= channel.INLINE_BYTES_MAX:
            headers = response.tail
            if len(headers) != length:
                raise GarbledResponse("headers size")
        else:
            if call.target is None or size + length > room:
                raise GarbledResponse("headers size")
            # Copied before it is checked: the worker can still write there.
            headers = bytes(call.target.view[size : size + length])
        if self._checked.get((headers, call.names)) != size:
            remember(self._checked, (headers, call.names), check_headers(headers, call.names, size))
        return headers

    def _finish(self, call: PendingCall, outcome: WorkerOutcome) -> None:
        if self._sent and call is self._queue[0]:
            self._queue.popleft()
            self._sent -= 1
            if self._queue:
                self._start_clock()
            elif self._arena.touched_bytes > _TRIM_BYTES:
                self._wake_by(trio.current_time() + _TRIM_SECONDS)
        else:
            self._queue.remove(call)
        del self._calls[call.call_id]
        self._arena.free(call.slot)
        if call.plan_slot is not None:
            self._arena.free(call.plan_slot)
        if call.target is not None:
            if outcome.reason or not outcome.payload:
                self._arena.free(call.target)
            else:
                self._outputs[call.call_id] = call.target
        self._use_freed_room()
        call.on_done(outcome)

    def _use_freed_room(self) -> None:
        if self._alive and self._queue:
            self._place_waiting()
            self._feed()

    def _feed(self) -> None:
        while self._sent < min(len(self._queue), PIPE_DEPTH):
            if not self._send(self._queue[self._sent]):
                return
            self._sent += 1

    def _send(self, call: PendingCall) -> bool:
        # A call behind others waits for its turn when there is not room in plenty: the one that runs must get what it needs.
        reserve = self._arena.reserve_ahead if self._sent else self._arena.reserve
        tail = call.plan
        plan_offset = 0
        if len(tail) > channel.INLINE_BYTES_MAX:
            call.plan_slot = call.plan_slot or reserve(len(tail))
            if call.plan_slot is None:
                return False
            call.plan_slot.view[:] = tail
            plan_offset, tail = call.plan_slot.offset + 1, b""
        if call.target is None:
            call.target = reserve(self._output_sizes.get(call.plan, _FIRST_OUTPUT_BYTES))
            if call.target is None and self._sent:
                return False
        slot, target = call.slot, call.target
        where = (target.offset, len(target.view)) if target else (0, 0)
        try:
            os.write(
                self._descriptor,
                channel.pack_request(channel.RUN, len(call.plan), call.sequence, slot.offset, len(slot.view), *where, plan_offset)
                + tail,
            )
        except OSError:
            # Full: the next response makes room. Closed: the reader hears of it.
            return False
        return True

    def _place_waiting(self) -> None:
        """Give the call whose outputs did not fit a larger slot, as soon as there is one; or give them up."""
        call = self._queue[0] if self._sent else None
        if call is None or not call.needs:
            return
        if call.target is not None:
            self._arena.free(call.target)
            call.target = None
        needs, own = call.needs, len(call.slot.view)
        if call.is_cancelled:
            self._drop(call, Reason.CANCELLED, "")
        elif needs + own > self._arena.size:
            self._drop(call, Reason.OUTPUT_TOO_LARGE, f"the outputs take {needs} bytes, the inputs {own} of {self._arena.size}")
        elif (target := self._arena.reserve(needs)) is not None:
            call.target = target
            self._command(channel.PLACE, call, target.offset, needs)
        elif call.is_overdue or not self._outputs:
            # Only a reader who releases an output makes room: inputs that wait are freed after this call.
            self._drop(call, Reason.MEMORY, f"the outputs take {needs} bytes and other calls fill the worker's memory")

    def _drop(self, call: PendingCall, reason: Reason, detail: str) -> None:
        call.dropped = reason, detail
        self._command(channel.DROP, call, 0, 0)

    def _command(self, kind: int, call: PendingCall, offset: int, size: int) -> None:
        call.needs = 0
        try:
            os.write(self._descriptor, channel.pack_request(kind, 0, call.sequence, 0, 0, offset, size, 0))
        except BlockingIOError:
            self._end(call, Reason.WORKER_DIED, "the worker does not read its socket")
        except OSError:
            pass

    def _ask_to_stop(self, call: PendingCall) -> None:
        try:
            self._cancel.send(channel.SEQUENCE.pack(call.sequence))
        except OSError:
            # It does not listen, so the grace period ends with SIGKILL.
            pass

    def _end(self, guilty: PendingCall | None, reason: Reason, detail: str) -> None:
        self._alive = False
        self._verdict = self._verdict or (guilty, reason, detail)
        self._child.kill()

    def _start_clock(self) -> None:
        self._head_since = trio.current_time()
        self._wake_by(self._head_end(self._queue[0])[0])

    def _wake_by(self, deadline: float) -> None:
        if deadline < self._timer.deadline:
            self._timer.deadline = deadline

    def _head_end(self, call: PendingCall) -> tuple[float, float]:
        """Give when the first call is asked to stop and when it is killed."""
        soft = self._head_since + call.deadline_seconds
        hard = soft + _GRACE_SECONDS
        if call.is_cancelled:
            hard = min(hard, max(call.cancelled_at, self._head_since) + _GRACE_SECONDS)
        return (hard if call.is_overdue or call.is_cancelled else soft), hard

    async def _watch(self) -> None:
        while True:
            with trio.CancelScope(deadline=self._next_wake()) as self._timer:
                await trio.sleep_forever()
            self._check_deadlines(trio.current_time())

    def _next_wake(self) -> float:
        if self._queue:
            return self._head_end(self._queue[0])[0]
        return trio.current_time() + _TRIM_SECONDS if self._arena.touched_bytes > _TRIM_BYTES else float("inf")

    def _check_deadlines(self, now: float) -> None:
        death.extend_processor_time(self._child.pid, 2 * self._limits.call_seconds * self._limits.threads + 60)
        if not self._queue:
            if self._arena.is_idle or self._arena.touched_bytes > _TRIM_BYTES:
                self._arena.trim()
            return
        call = self._queue[0]
        _, hard = self._head_end(call)
        if now >= hard:
            reason = Reason.CANCELLED if call.is_cancelled else Reason.TIME_LIMIT
            self._end(call, reason, f"a call did not stop within {call.deadline_seconds:g} s and the worker was killed")
        elif now >= self._head_since + call.deadline_seconds and not call.is_overdue:
            call.is_overdue = True
            self._ask_to_stop(call)
            self._place_waiting()
