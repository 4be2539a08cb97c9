"""The child process: what runs after the fork, first in freedom for a millisecond, then confined.

Two kinds: a worker, which loads one model and serves calls until its socket closes, and a confined task, which runs one
named function and ends. Both get everything through inherited descriptors and can open nothing.
"""

import mmap
import os
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from time import perf_counter  # noqa: TID251 - the child has no event loop; this measures the call itself
from typing import Any, Final, NoReturn

import msgpack
import onnxruntime

from p2pnode.errors import WorkError
from p2pnode.reasons import Reason
from p2pnode.work import channel, confined, sandbox
from p2pnode.work.arena import map_constant
from p2pnode.work.death import EXIT_MEMORY
from p2pnode.work.engine import Engine, NoRoom, explain_load_failure, explain_run_failure

RESULT_BYTES_MAX: Final = 4 << 20
_STANDARD_ERROR: Final = 2


def run_child(request: Mapping[str, Any], descriptors: Sequence[int], parent: int) -> NoReturn:
    """Become the child that a request describes. Never returns; the exit code is 0, 1 or EXIT_MEMORY.

    descriptors of a worker: control, cancel, standard error, arena, model, blob; of a task: control, standard error, data,
    output.
    """
    code = 1
    try:
        if request["kind"] == "worker":
            _serve_worker(request, list(descriptors), parent)
        else:
            _run_task(request, list(descriptors), parent)
        code = 0
    except MemoryError:
        code = EXIT_MEMORY
    except BaseException as error:  # the parent reads what is written here
        _complain(error)
    finally:
        os._exit(code)


def _serve_worker(request: Mapping[str, Any], descriptors: list[int], parent: int) -> None:
    control, cancel, errors, arena_descriptor, model_descriptor, blob_descriptor = descriptors
    os.dup2(errors, _STANDARD_ERROR)
    # Mapped first: the confined process may not even ask for a descriptor's size.
    arena = _map_shared(arena_descriptor)
    model, blob = map_constant(model_descriptor), map_constant(blob_descriptor)
    sandbox.close_other_descriptors((0, 1, _STANDARD_ERROR, control, cancel))
    server = _WorkerServer(control, cancel, arena)
    missing = sandbox.lock_down(sandbox.Policy(**request["policy"]), parent, server.start_canceller)
    if server.load(request, model, blob, missing):
        server.serve()


class _WorkerServer:
    """The loop of a worker: one request in, one response out, in order."""

    def __init__(self, control: int, cancel: int, arena: memoryview) -> None:
        self._control = control
        self._cancel = cancel
        self._arena = arena
        self._waiting: deque[bytes] = deque()
        self._cancelled: set[int] = set()
        self._begun = 0
        self._current: tuple[int, Any] = (0, None)
        self._lock = threading.Lock()

    def start_canceller(self) -> None:
        """Start the thread that hears of cancelled calls while the main thread is inside ONNX Runtime."""
        threading.Thread(target=self._hear_cancels, daemon=True).start()

    def load(self, request: Mapping[str, Any], model: memoryview, blob: memoryview, missing: Sequence[str]) -> bool:
        """Load the model and tell the parent. Gives False when it could not be loaded."""
        started = perf_counter()
        try:
            size = request["initializers_size"]
            self._engine = Engine(
                bytes(model[size:]),
                msgpack.unpackb(model[:size], use_list=False),
                blob,
                request["providers"],
                request["policy"]["threads"],
                request["optimise"],
                self._arena,
            )
            facts = {"missing": list(missing), **self._engine.facts()}
        except Exception as error:  # a stranger's model may raise anything
            self._respond_failure(channel.LOAD_FAILED, 0, *explain_load_failure(error), perf_counter() - started)
            return False
        # The arena is empty while the parent waits for this, so the facts, of any length, go to its start.
        encoded = msgpack.packb(facts)
        if len(encoded) > len(self._arena):
            self._respond_failure(channel.LOAD_FAILED, 0, Reason.OUTPUT_TOO_LARGE, "too many outputs", 0.0)
            return False
        self._arena[: len(encoded)] = encoded
        os.write(self._control, channel.pack_response(channel.LOADED, 0, 0, perf_counter() - started, len(encoded), 0))
        return True

    def serve(self) -> None:
        """Serve calls until the parent closes the socket."""
        control, waiting = self._control, self._waiting
        while True:
            datagram = waiting.popleft() if waiting else os.read(control, channel.DATAGRAM_BYTES_MAX)
            if not datagram:
                return
            fields = channel.unpack_request(datagram)
            if fields[0] == channel.RUN:
                self._run(fields, datagram)

    def _run(self, fields: tuple[int, ...], datagram: bytes) -> None:
        _, plan_size, sequence, input_offset, input_size, output_offset, output_size, plan_offset = fields
        started = perf_counter()
        first = plan_offset - 1
        plan = bytes(self._arena[first : first + plan_size]) if plan_offset else datagram[channel.REQUEST_SIZE :]
        run_options = onnxruntime.RunOptions()
        try:
            with self._lock:
                self._begun = sequence
                if sequence in self._cancelled:
                    self._cancelled.discard(sequence)
                    raise WorkError(Reason.CANCELLED)
                self._current = (sequence, run_options)
            try:
                headers, size = self._engine.run(plan, (input_offset, input_size), (output_offset, output_size), run_options)
            finally:
                with self._lock:
                    self._current = (0, None)
            seconds = perf_counter() - started
            self._respond_done(sequence, seconds, headers, size, output_offset)
        except NoRoom as error:
            self._ask_for_room(sequence, perf_counter() - started, error.needed)
        except Exception as error:  # a stranger's model may raise anything
            self._respond_failure(channel.FAILED, sequence, *explain_run_failure(error), perf_counter() - started)

    def _ask_for_room(self, sequence: int, seconds: float, needed: int) -> None:
        """Say how large the outputs are and wait for a slot; the requests that come meanwhile wait their turn."""
        self._respond(channel.pack_response(channel.NEED, 0, sequence, seconds, 0, needed))
        while True:
            datagram = os.read(self._control, channel.DATAGRAM_BYTES_MAX)
            if not datagram:
                os._exit(0)
            fields = channel.unpack_request(datagram)
            if fields[0] == channel.RUN:
                self._waiting.append(datagram)
                continue
            if fields[0] == channel.DROP:
                self._engine.held = None
                self._respond_failure(
                    channel.FAILED, sequence, Reason.OUTPUT_TOO_LARGE, f"the outputs take {needed} bytes", seconds
                )
                return
            headers, size = self._engine.place_held((fields[5], fields[6]))
            self._respond_done(sequence, seconds, headers, size, fields[5])
            return

    def _respond_done(self, sequence: int, seconds: float, headers: bytes, size: int, offset: int) -> None:
        if len(headers) <= channel.INLINE_BYTES_MAX:
            os.write(self._control, channel.pack_response(channel.DONE, len(headers), sequence, seconds, size, 0) + headers)
            return
        self._arena[offset + size : offset + size + len(headers)] = headers
        self._respond(channel.pack_response(channel.DONE, len(headers), sequence, seconds, size, 0))

    def _respond_failure(self, kind: int, sequence: int, reason: Reason, detail: str, seconds: float) -> None:
        text = reason.value.encode() + b"\0" + detail.encode("utf-8", "replace")[: channel.DETAIL_BYTES_MAX]
        self._respond(channel.pack_response(kind, 0, sequence, seconds, 0, 0) + text)

    def _respond(self, datagram: bytes) -> None:
        os.write(self._control, datagram)

    def _hear_cancels(self) -> None:
        while True:
            datagram = os.read(self._cancel, 64)
            if len(datagram) != channel.SEQUENCE.size:
                return
            (sequence,) = channel.SEQUENCE.unpack(datagram)
            with self._lock:
                current, run_options = self._current
                if current == sequence:
                    run_options.terminate = True
                elif sequence > self._begun:
                    self._cancelled.add(sequence)


def _run_task(request: Mapping[str, Any], descriptors: list[int], parent: int) -> None:
    control, errors, data_descriptor, output_descriptor = descriptors
    os.dup2(errors, _STANDARD_ERROR)
    data, output = map_constant(data_descriptor), _map_shared(output_descriptor)
    function = confined.load(request["task"])
    sandbox.close_other_descriptors((0, 1, _STANDARD_ERROR, control))
    missing = sandbox.lock_down(sandbox.Policy(**request["policy"]), parent)
    try:
        arguments = msgpack.unpackb(data[: request["arguments_size"]], strict_map_key=False)
        result, payload = function(arguments, data[request["arguments_size"] :])
        encoded = msgpack.packb({"missing": list(missing), "result": result})
        if len(payload) > request["output_bytes_max"] or len(encoded) > RESULT_BYTES_MAX:
            raise WorkError(Reason.OUTPUT_TOO_LARGE, f"the task gave {len(payload)} + {len(encoded)} bytes")
        output[: len(encoded)] = encoded
        output[RESULT_BYTES_MAX : RESULT_BYTES_MAX + len(payload)] = payload
        os.write(control, channel.pack_response(channel.DONE, len(encoded), 0, 0.0, len(payload), 0))
    except MemoryError:
        raise
    except Exception as error:  # a stranger's model may raise anything
        reason, detail = explain_run_failure(error)
        text = reason.value.encode() + b"\0" + detail.encode("utf-8", "replace")[: channel.DETAIL_BYTES_MAX]
        os.write(control, channel.pack_response(channel.FAILED, 0, 0, 0.0, 0, 0) + text)


def _map_shared(descriptor: int) -> memoryview:
    return memoryview(mmap.mmap(descriptor, os.fstat(descriptor).st_size))


def _complain(error: BaseException) -> None:
    try:
        os.write(_STANDARD_ERROR, f"{type(error).__name__}: {error}".encode("utf-8", "replace")[:1024])
    except OSError:
        pass
