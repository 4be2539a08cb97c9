"""One ONNX Runtime session inside a confined process: loading from bytes, running in place, naming failures.

Imported by the zygote and its children only. The first call of a kind runs plainly; when it gave plain tensors, later calls
with the same headers bind input and output where they lie in the arena, so that nothing is copied.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter  # noqa: TID251 - runs in the child only, which has no event loop
from typing import Any, Final

import msgpack
import numpy
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as onnxruntime_errors

from p2pnode.environment import Buffer
from p2pnode.errors import ProtocolViolation, WorkError
from p2pnode.reasons import Reason
from p2pnode.wire import tensors
from p2pnode.work.arena import align
from p2pnode.work.channel import INLINE_BYTES_MAX, split_plan

_PLANS_MAX: Final = 64
_BINDINGS_MAX: Final = 8
_BRIEF_SECONDS: Final = 0.02
# ONNX dtypes that numpy lacks and ONNX Runtime takes as bits: bfloat16 and the float8 family.
_BIT_DTYPES: Final = {16: numpy.uint16, 17: numpy.uint8, 18: numpy.uint8, 19: numpy.uint8, 20: numpy.uint8}
# Text of ONNX Runtime's messages -> reason; the first match counts.
_RUN_TEXTS: Final = (
    ("bad_alloc", Reason.MEMORY),
    ("Failed to allocate memory", Reason.MEMORY),
    ("bad allocation", Reason.MEMORY),
    ("terminate flag", Reason.CANCELLED),
    ("Required inputs", Reason.MISSING_INPUT),
    ("Missing Input", Reason.MISSING_INPUT),
    ("Invalid input name", Reason.UNKNOWN_INPUT),
    ("Invalid Feed Input Name", Reason.UNKNOWN_INPUT),
    ("Invalid output name", Reason.UNKNOWN_OUTPUT),
    ("Invalid Output Name", Reason.UNKNOWN_OUTPUT),
    ("Unexpected input data type", Reason.WRONG_DTYPE),
    ("not supported to be used as input", Reason.WRONG_DTYPE),
    ("Invalid rank for input", Reason.WRONG_SHAPE),
    ("Got invalid dimensions for input", Reason.WRONG_SHAPE),
)


class NoRoom(Exception):
    """The outputs do not fit in their slot. The values wait in `Engine.held`."""

    def __init__(self, needed: int) -> None:
        super().__init__(needed)
        self.needed = needed


@dataclass(slots=True)
class Expected:
    """What a kind of call gave last time: (name, dtype, shape, offset in the payload), encoded headers, payload size."""

    places: list[tuple[str, Any, tuple[int, ...], int]]
    headers: bytes
    size: int


@dataclass(slots=True)
class Plan:
    """A kind of call: the same input headers and output names."""

    headers: Any
    outputs: list[str]
    may_bind: bool
    expected: Expected | None = None
    bindings: dict[tuple[int, int], tuple[Any, list[Any]]] = field(default_factory=dict)
    is_brief: bool = False


class Engine:
    """A loaded model over an arena.

    arena: the shared memory, writable. Initialisers are used where they lie in `blob`, which must stay mapped.
    """

    def __init__(
        self,
        graph: bytes,
        initializers: Sequence[tuple[str, int, Sequence[int], int, int]],
        blob: memoryview,
        providers: Sequence[str],
        threads: int,
        optimise: bool,
        arena: memoryview,
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        # Spinning threads of an idle worker would eat the owner's processor.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        level = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
        self._initializers = _initializer_values(initializers, blob)
        if self._initializers:
            options.add_external_initializers(list(self._initializers), list(self._initializers.values()))
        self._session = onnxruntime.InferenceSession(graph, options, providers=list(providers))
        self._output_names = [output.name for output in self._session.get_outputs()]
        self._plans: OrderedDict[bytes, Plan] = OrderedDict()
        self._arena = arena
        self.held: tuple[list[Buffer], bytes, int] | None = None

    def facts(self) -> dict[str, Any]:
        """Give what the parent is told once after loading."""
        return {"outputs": self._output_names, "providers": self._session.get_providers()}

    def run(self, plan_bytes: bytes, source: tuple[int, int], target: tuple[int, int], run_options: Any) -> tuple[bytes, int]:
        """Run one call from and into (offset, size) of the arena. Gives (encoded output headers, payload size).

        Raises NoRoom with the outputs kept in `held`, ProtocolViolation for bad headers, or what ONNX Runtime raises.
        """
        plan = self._plans.get(plan_bytes) or self._make_plan(plan_bytes)
        started = perf_counter()
        try:
            return self._run_plan(plan, source, target, run_options)
        finally:
            plan.is_brief = perf_counter() - started < _BRIEF_SECONDS

    def _run_plan(self, plan: Plan, source: tuple[int, int], target: tuple[int, int], run_options: Any) -> tuple[bytes, int]:
        expected = plan.expected
        if expected is not None and space_needed(expected.headers, expected.size) <= target[1]:
            try:
                return self._run_bound(plan, expected, source, target, run_options)
            except Exception:  # a stranger's model may raise anything
                if run_options.terminate:
                    raise
                # The outputs' shape depends on the data: binding is not for this model. The plain run tells the real error.
                plan.may_bind, plan.expected = False, None
                plan.bindings.clear()
        return self._run_plain(plan, source, target, run_options)

    def place_held(self, target: tuple[int, int]) -> tuple[bytes, int]:
        """Write the outputs that did not fit into a larger slot. Raises NoRoom if they do not fit there either."""
        if self.held is None:
            raise LookupError("no outputs are waiting")
        chunks, headers, size = self.held
        if space_needed(headers, size) > target[1]:
            raise NoRoom(space_needed(headers, size))
        self.held = None
        self._write(chunks, target[0])
        return headers, size

    def _run_plain(self, plan: Plan, source: tuple[int, int], target: tuple[int, int], run_options: Any) -> tuple[bytes, int]:
        values = tensors.decode_values(plan.headers, self._arena[source[0] : source[0] + source[1]])
        names = plan.outputs or self._output_names
        for header in plan.headers:
            if header.kind == tensors.TENSOR and header.dtype in _BIT_DTYPES:
                # ONNX Runtime takes types that numpy lacks only as bits with a type beside them.
                bits = values[header.name].view(_BIT_DTYPES[header.dtype])
                values[header.name] = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, header.dtype)
        results = self._session.run(names, values, run_options)
        outputs = dict(zip(names, results, strict=True))
        headers, chunks, size = tensors.encode_values(outputs)
        encoded = tensors.headers_bytes(headers)
        # As the parent will check them: what it would refuse fails this call instead of this worker.
        tensors.check_headers(tensors.parse_headers(encoded))
        if plan.may_bind:
            plan.expected = _expectation(outputs, encoded, size)
        needed = space_needed(encoded, size)
        if needed > target[1]:
            self.held = (chunks, encoded, size)
            raise NoRoom(needed)
        self._write(chunks, target[0])
        return encoded, size

    def _run_bound(
        self, plan: Plan, expected: Expected, source: tuple[int, int], target: tuple[int, int], run_options: Any
    ) -> tuple[bytes, int]:
        key = (source[0], target[0])
        bound = plan.bindings.get(key)
        if bound is None:
            if len(plan.bindings) >= _BINDINGS_MAX:
                plan.bindings.clear()
            bound = plan.bindings[key] = self._bind(plan, expected, source, target)
        # Run options cost a bound call 23 µs of its 25 (ONNX Runtime 1.31), so what ended quickly last time goes without
        # them; should it hang now, only SIGKILL ends it.
        self._session.run_with_iobinding(bound[0], None if plan.is_brief else run_options)
        return expected.headers, expected.size

    def _bind(self, plan: Plan, expected: Expected, source: tuple[int, int], target: tuple[int, int]) -> tuple[Any, list[Any]]:
        binding = self._session.io_binding()
        values = tensors.decode_values(plan.headers, self._arena[source[0] : source[0] + source[1]])
        keep: list[Any] = list(values.values())
        for name, value in values.items():
            binding.bind_cpu_input(name, value)
        for name, dtype, shape, offset in expected.places:
            place = numpy.ndarray(shape, dtype, self._arena, target[0] + offset)
            keep.append(place)
            binding.bind_output(name, "cpu", 0, dtype, shape, place.ctypes.data)
        return binding, keep

    def _make_plan(self, plan_bytes: bytes) -> Plan:
        outputs, encoded = split_plan(plan_bytes)
        headers = tensors.parse_headers(encoded)
        names = msgpack.unpackb(outputs)
        may_bind = all(header.kind == 0 and _is_plain(header.dtype) for header in headers)
        plan = self._plans[plan_bytes] = Plan(headers, names, may_bind)
        if len(self._plans) > _PLANS_MAX:
            self._plans.popitem(last=False)
        return plan

    def _write(self, chunks: Sequence[Buffer], offset: int) -> None:
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            self._arena[offset : offset + len(view)] = view
            offset += len(view)


def space_needed(headers: bytes, size: int) -> int:
    """Give the size of the slot for a payload: long headers follow it there, short ones travel in the response."""
    return size + (len(headers) if len(headers) > INLINE_BYTES_MAX else 0)


def explain_run_failure(error: BaseException) -> tuple[Reason, str]:
    """Give the reason and `ClassName: message` of what a run raised; a client re-raises ONNX Runtime's own error from it."""
    detail = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError):
        return Reason.MEMORY, detail
    if isinstance(error, (ProtocolViolation, WorkError)):
        return error.reason, error.detail
    for text, reason in _RUN_TEXTS:
        if text in detail:
            return reason, detail
    return Reason.RUN_FAILED, detail


def explain_load_failure(error: BaseException) -> tuple[Reason, str]:
    """Give the reason and `ClassName: message` of what loading raised."""
    detail = f"{type(error).__name__}: {error}"
    if isinstance(error, WorkError):
        return error.reason, error.detail
    if isinstance(error, MemoryError) or any(text in detail for text, reason in _RUN_TEXTS[:3]):
        return Reason.MEMORY, detail
    if isinstance(error, onnxruntime_errors.InvalidProtobuf):
        return Reason.NOT_ONNX, detail
    if "external data" in detail or "External data" in detail or "external_data" in detail:
        return Reason.EXTERNAL_DATA, detail
    return Reason.BAD_MODEL, detail


def _initializer_values(initializers: Sequence[tuple[str, int, Sequence[int], int, int]], blob: memoryview) -> dict[str, Any]:
    values = {}
    for name, dtype, shape, offset, size in initializers:
        if offset % 64 or offset < 0 or size < 0 or offset + size > len(blob):
            raise WorkError(Reason.BAD_MODEL, f"initialiser {name!r} lies outside the model's data")
        bits = _BIT_DTYPES.get(dtype)
        element = numpy.dtype(bits) if bits is not None else _numpy_dtype(dtype)
        if element is None:
            raise WorkError(Reason.BAD_MODEL, f"initialiser {name!r} has a dtype that cannot stand outside the graph")
        count = 1
        for dimension in shape:
            count *= dimension
        if count * element.itemsize != size:
            raise WorkError(Reason.INITIALIZER_SHAPE, f"initialiser {name!r} has a shape that does not fit its size")
        array = numpy.frombuffer(blob, element, count, offset).reshape(shape) if count else numpy.empty(tuple(shape), element)
        if bits is None:
            values[name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        else:
            values[name] = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, dtype)
    return values


_NUMPY_DTYPES: Final = {
    1: "f4", 2: "u1", 3: "i1", 4: "u2", 5: "i2", 6: "i4", 7: "i8", 9: "?", 10: "f2", 11: "f8", 12: "u4", 13: "u8",
}  # fmt: skip


# What binds in place. Truth values are left out: each must be checked to be 0 or 1, which decoding does.
_BINDABLE: Final = frozenset(numpy.dtype(code) for code in _NUMPY_DTYPES.values() if code != "?")


def _numpy_dtype(dtype: int) -> Any:
    code = _NUMPY_DTYPES.get(dtype)
    return None if code is None else numpy.dtype(code)


def _is_plain(dtype: int) -> bool:
    return _numpy_dtype(dtype) in _BINDABLE


def _expectation(outputs: dict[str, Any], headers: bytes, size: int) -> Expected | None:
    """Give where plain tensors lie in a payload, or None when one of the values is of another kind or empty."""
    places = []
    end = 0
    for name, value in outputs.items():
        if not isinstance(value, numpy.ndarray) or value.dtype.newbyteorder("=") not in _BINDABLE or not value.size:
            return None
        start = align(end)
        places.append((name, value.dtype, value.shape, start))
        end = start + value.nbytes
    return Expected(places, headers, size) if end == size else None
