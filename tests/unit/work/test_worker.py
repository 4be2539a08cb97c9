"""The engine of a worker, unconfined: in-place runs equal plain runs, and failures get their reasons."""

# ruff: noqa: PT011 - the environment is set before the import; the class is what is tested

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import msgpack
import numpy
import onnxruntime
import pytest
from onnx import TensorProto, helper

from p2pnode.errors import ProtocolViolation, WorkError
from p2pnode.reasons import Reason
from p2pnode.wire import tensors
from p2pnode.work import channel, death
from p2pnode.work.engine import Engine, NoRoom, explain_load_failure, explain_run_failure

ARENA = 1 << 20


def build(nodes, inputs, outputs, initializers=()):
    values = [[helper.make_tensor_value_info(*value) for value in side] for side in (inputs, outputs)]
    graph = helper.make_graph(nodes, "g", *values, list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


SQUARE = build(
    [helper.make_node("Mul", ["X", "X"], ["Y"]), helper.make_node("ReduceSum", ["Y"], ["S"], keepdims=0)],
    [("X", TensorProto.FLOAT, ["n"])],
    [("Y", TensorProto.FLOAT, ["n"]), ("S", TensorProto.FLOAT, [])],
)
NONZERO = build(
    [helper.make_node("NonZero", ["X"], ["Y"])], [("X", TensorProto.FLOAT, ["n"])], [("Y", TensorProto.INT64, [1, None])]
)


def make_engine(model, initializers=(), blob=b"", size=ARENA):
    arena = memoryview(bytearray(size + 64))
    start = -numpy.frombuffer(arena, numpy.uint8).ctypes.data % 64
    arena = arena[start : start + size]
    return Engine(model, initializers, memoryview(blob), ["CPUExecutionProvider"], 1, True, arena), arena


def run(engine, arena, inputs, outputs=(), offset=0, target=(ARENA // 2, ARENA // 2)):
    headers, chunks, size = tensors.encode_values(inputs)
    arena[offset : offset + size] = b"".join(bytes(chunk) for chunk in chunks)
    plan = channel.join_plan(msgpack.packb(list(outputs)), tensors.headers_bytes(headers))
    encoded, length = engine.run(plan, (offset, size), target, onnxruntime.RunOptions())
    return tensors.decode_values(tensors.parse_headers(encoded), bytes(arena[target[0] : target[0] + length]))


def test_in_place_equals_plain_for_new_inputs_and_places():
    engine, arena = make_engine(SQUARE)
    for call in range(6):
        x = numpy.arange(100, dtype=numpy.float32) + call
        result = run(engine, arena, {"X": x}, offset=4096 * (call % 3))
        assert (result["Y"] == x * x).all()
        assert result["S"] == (x * x).sum()
    plan = next(iter(engine._plans.values()))
    assert plan.bindings, "the later calls ran in place"


def test_chosen_outputs_only():
    engine, arena = make_engine(SQUARE)
    for _ in range(2):
        assert list(run(engine, arena, {"X": numpy.ones(3, numpy.float32)}, ["S"])) == ["S"]


def test_outputs_whose_shape_depends_on_the_data():
    engine, arena = make_engine(NONZERO)
    for values in ([0, 1, 2], [1, 1, 1], [0, 0, 0], [0, 1, 2]):
        result = run(engine, arena, {"X": numpy.array(values, numpy.float32)})
        assert (result["Y"] == numpy.nonzero(numpy.array(values))).all()


def test_too_large_outputs_wait_for_room():
    engine, arena = make_engine(SQUARE)
    x = numpy.arange(1000, dtype=numpy.float32)
    with pytest.raises(NoRoom) as caught:
        run(engine, arena, {"X": x}, ["Y"], target=(8192, 64))
    assert caught.value.needed == 4000
    with pytest.raises(NoRoom):
        engine.place_held((8192, 64))
    headers, size = engine.place_held((8192, 4096))
    result = tensors.decode_values(tensors.parse_headers(headers), arena[8192 : 8192 + size])
    assert (result["Y"] == x * x).all()


@pytest.mark.parametrize(
    ("inputs", "outputs", "reason", "class_name"),
    [
        ({}, [], Reason.MISSING_INPUT, "ValueError"),
        ({"X": numpy.ones(2, numpy.float64)}, [], Reason.WRONG_DTYPE, "InvalidArgument"),
        ({"X": numpy.ones((2, 2), numpy.float32)}, [], Reason.WRONG_SHAPE, "InvalidArgument"),
        ({"X": numpy.ones(2, numpy.float32), "Z": numpy.ones(2, numpy.float32)}, [], Reason.UNKNOWN_INPUT, None),
        ({"X": numpy.ones(2, numpy.float32)}, ["Q"], Reason.UNKNOWN_OUTPUT, None),
    ],
)
def test_failures_say_what_onnxruntime_says(inputs, outputs, reason, class_name):
    engine, arena = make_engine(SQUARE)
    with pytest.raises(Exception) as ours:
        run(engine, arena, inputs, outputs)
    found, detail = explain_run_failure(ours.value)
    session = onnxruntime.InferenceSession(SQUARE, providers=["CPUExecutionProvider"])
    with pytest.raises(Exception) as theirs:
        session.run(outputs or None, inputs)
    assert found is reason
    assert detail == f"{type(theirs.value).__name__}: {theirs.value}"
    assert class_name in (None, type(theirs.value).__name__)


def test_wrong_fixed_dimension_is_a_wrong_shape():
    model = build([helper.make_node("Neg", ["X"], ["Y"])], [("X", TensorProto.FLOAT, [3])], [("Y", TensorProto.FLOAT, [3])])
    engine, arena = make_engine(model)
    with pytest.raises(Exception) as caught:
        run(engine, arena, {"X": numpy.ones(4, numpy.float32)})
    assert explain_run_failure(caught.value)[0] is Reason.WRONG_SHAPE


def test_headers_that_lie_are_refused():
    engine, _ = make_engine(SQUARE)
    headers, _, _ = tensors.encode_values({"X": numpy.ones(100, numpy.float32)})
    plan = channel.join_plan(msgpack.packb([]), tensors.headers_bytes(headers))
    with pytest.raises(ProtocolViolation) as caught:
        engine.run(plan, (0, 64), (4096, 4096), onnxruntime.RunOptions())
    assert explain_run_failure(caught.value)[0] is Reason.BAD_TENSOR


def external(name, values):
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=values.shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "weights.bin"), ("offset", "0"), ("length", str(values.nbytes))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def test_initialisers_come_from_shared_memory():
    weights = numpy.random.default_rng(1).random((64, 64)).astype(numpy.float32)
    model = build(
        [helper.make_node("MatMul", ["X", "W"], ["Y"])],
        [("X", TensorProto.FLOAT, [1, 64])],
        [("Y", TensorProto.FLOAT, [1, 64])],
        [external("W", weights)],
    )
    engine, arena = make_engine(model, [("W", 1, (64, 64), 64, weights.nbytes)], bytes(64) + weights.tobytes())
    x = numpy.ones((1, 64), numpy.float32)
    assert numpy.allclose(run(engine, arena, {"X": x})["Y"], x @ weights)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (("W", 1, (4,), 0, 4096), Reason.BAD_MODEL),
        (("W", 1, (4,), 32, 16), Reason.BAD_MODEL),
        (("W", 1, (2**31, 2**31), 0, 16), Reason.INITIALIZER_SHAPE),
        (("W", 8, (4,), 0, 16), Reason.BAD_MODEL),
    ],
)
def test_initialisers_that_lie_are_refused(entry, reason):
    with pytest.raises(WorkError) as caught:
        make_engine(SQUARE, [entry], bytes(128))
    assert caught.value.reason is reason


@pytest.mark.parametrize(
    ("model", "reason"),
    [(b"not a model", Reason.NOT_ONNX), (build([helper.make_node("Nope", ["X"], ["Y"])], [], []), Reason.BAD_MODEL)],
)
def test_load_failures(model, reason):
    with pytest.raises(Exception) as caught:
        make_engine(model)
    found, detail = explain_load_failure(caught.value)
    assert found is reason
    assert detail.startswith(type(caught.value).__name__ + ": ")


def test_texts_and_sequences_pass():
    model = build(
        [helper.make_node("Identity", ["X"], ["Y"])], [("X", TensorProto.STRING, ["n"])], [("Y", TensorProto.STRING, ["n"])]
    )
    engine, arena = make_engine(model)
    for words in (["one", "two"], ["", "ünï"]):
        assert run(engine, arena, {"X": numpy.array(words, object)})["Y"].tolist() == words


def test_memory_failures_are_memory():
    assert explain_run_failure(MemoryError())[0] is Reason.MEMORY
    assert explain_run_failure(RuntimeError("std::bad_alloc"))[0] is Reason.MEMORY
    assert explain_load_failure(RuntimeError("std::bad_alloc"))[0] is Reason.MEMORY


@pytest.mark.parametrize(
    ("status", "words", "reason"),
    [
        (death.EXIT_MEMORY, b"", Reason.MEMORY),
        (-6, b"terminate called after throwing an instance of 'std::bad_alloc'", Reason.MEMORY),
        (-24, b"", Reason.TIME_LIMIT),
        (-11, b"", Reason.WORKER_DIED),
        (None, b"", Reason.WORKER_DIED),
    ],
)
def test_causes_of_death(status, words, reason):
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.write(writer, words)
    assert death.explain(status, reader)[0] is reason
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("tail", [b"", b"memory", b"not-a-reason\0x", b"paused\0x", b"\xff\0x"])
def test_failures_from_a_closed_list_only(tail):
    with pytest.raises(channel.GarbledResponse):
        death.parse_failure(tail, frozenset({Reason.MEMORY}))


@pytest.mark.parametrize(
    "datagram", [b"", b"x" * (channel.RESPONSE_SIZE - 1), channel.pack_response(1, 0, 0, float("nan"), 0, 0)]
)
def test_garbled_responses(datagram):
    with pytest.raises(channel.GarbledResponse):
        channel.parse_response(datagram)


def test_plans_join_and_split():
    assert channel.split_plan(channel.join_plan(b"outputs", b"headers")) == (b"outputs", b"headers")
