"""Workers and tasks for real: calls, limits, hostile models, garbage. One runtime serves the tests of this file in turn."""

# ruff: noqa: ASYNC110, ASYNC220, ASYNC230, ASYNC240 - these tests look at real processes, which give no events

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import trio
from onnx import TensorProto, helper

from p2pnode.environment import WorkerLimits, WorkerModel
from p2pnode.errors import WorkError
from p2pnode.reasons import Reason
from p2pnode.wire import tensors
from p2pnode.work import channel
from p2pnode.work.arena import Arena
from p2pnode.work.children import Child
from p2pnode.work.remote_worker import RemoteWorker
from p2pnode.work.runtime import RuntimeSettings, SandboxRuntime

pytestmark = pytest.mark.slow
LIMITS = WorkerLimits(memory_bytes=1 << 30, load_seconds=20, call_seconds=20, arena_bytes=64 << 20)
SMALL = replace(LIMITS, arena_bytes=1 << 20)


def value(name, shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def build(nodes, inputs, outputs, initializers=()):
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


DOUBLE = build([helper.make_node("Add", ["X", "X"], ["Y"])], [value("X", ["n"])], [value("Y", ["n"])])
EXPAND = build(
    [helper.make_node("Expand", ["X", "N"], ["Y"])], [value("X", [1]), value("N", [1], TensorProto.INT64)], [value("Y", [None])]
)

NEGATE = build([helper.make_node("Neg", ["X"], ["Y"])], [value("X", ["n"])], [value("Y", ["n"])])
EXPAND_LARGEST = build(
    [helper.make_node("ReduceMax", ["X"], ["M"]), helper.make_node("Expand", ["M", "N"], ["Y"])],
    [value("X", ["n"]), value("N", [1], TensorProto.INT64)],
    [value("Y", [None])],
)


def endless_loop():
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Add", ["a", "one"], ["a2"])],
        "body",
        [value("i", [], TensorProto.INT64), value("c", [], TensorProto.BOOL), value("a", [1])],
        [value("c2", [], TensorProto.BOOL), value("a2", [1])],
        [helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])],
    )
    limits = [helper.make_tensor("M", TensorProto.INT64, [], [2**62]), helper.make_tensor("go", TensorProto.BOOL, [], [True])]
    return build([helper.make_node("Loop", ["M", "go", "X"], ["Y"], body=body)], [value("X", [1])], [value("Y", [1])], limits)


def big_kernel():
    """One operator that takes seconds and hears no `terminate`."""
    return build([helper.make_node("MatMul", ["X", "X"], ["Y"])], [value("X", ["n", "n"])], [value("Y", ["n", "n"])])


def allocation_bomb(at_load):
    size = [] if at_load else [value("S", [1], TensorProto.INT64)]
    constants = [helper.make_tensor("S", TensorProto.INT64, [1], [4_000_000_000])] if at_load else []
    fill = helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0])
    nodes = [
        helper.make_node("ConstantOfShape", ["S"], ["C"], value=fill),
        helper.make_node("ReduceSum", ["C"], ["Y"], keepdims=0),
    ]
    return build(nodes, size, [value("Y", [])], constants)


def folding_bomb():
    n = 3000
    fill = helper.make_tensor("v", TensorProto.FLOAT, [1], [1e-3])
    nodes = [helper.make_node("ConstantOfShape", ["S"], ["C0"], value=fill)]
    nodes += [helper.make_node("MatMul", [f"C{i}", f"C{i}"], [f"C{i + 1}"]) for i in range(30)]
    nodes.append(helper.make_node("Identity", ["C30"], ["Y"]))
    return build(nodes, [], [value("Y", [n, n])], [helper.make_tensor("S", TensorProto.INT64, [2], [n, n])])


def huge_initializer():
    tensor = TensorProto(name="W", data_type=TensorProto.FLOAT, dims=[1 << 31, 1 << 31], raw_data=bytes(16))
    return build([helper.make_node("Identity", ["W"], ["Y"])], [], [value("Y", None)], [tensor])


def external_model(location):
    tensor = TensorProto(name="W", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, text in (("location", location), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=text)
    return build([helper.make_node("Identity", ["W"], ["Y"])], [], [value("Y", [4])], [tensor])


def field(number, payload):
    """One length-delimited protobuf field; by hand, because the library refuses to write what is nested this deep."""
    length, size = len(payload), b""
    while length > 127:
        size, length = size + bytes([length & 127 | 128]), length >> 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + payload


def nested_if(depth):
    other = helper.make_graph([helper.make_node("Identity", ["X"], ["e"])], "e", [], [value("e", [1])])
    branch = helper.make_attribute("else_branch", other).SerializeToString()
    graph = helper.make_graph([helper.make_node("Identity", ["X"], ["y"])], "g", [], [value("y", [1])]).SerializeToString()
    for level in range(depth):
        inner = field(1, b"then_branch") + field(6, graph) + b"\xa0\x01\x05"
        node = field(1, b"c") + field(2, b"y%d" % level) + field(4, b"If") + field(5, inner) + field(5, branch)
        graph = field(1, node) + field(2, b"g") + field(12, value(f"y{level}", [1]).SerializeToString())
    inputs = field(11, value("X", [1]).SerializeToString()) + field(11, value("c", [], TensorProto.BOOL).SerializeToString())
    return b"\x08\x08" + field(7, graph + inputs) + field(8, b"\x10\x11")


@asynccontextmanager
async def running(settings=None):
    async with trio.open_nursery() as nursery:
        runtime = SandboxRuntime(settings)
        await nursery.start(runtime.run)
        yield runtime
        nursery.cancel_scope.cancel()


class Caller:
    """Calls a worker and waits for its answers."""

    def __init__(self, worker):
        self.worker = worker
        self.number = 0

    def start(self, inputs, outputs=(), seconds=10.0):
        headers, chunks, size = tensors.encode_values(inputs)
        slot = self.worker.reserve(size)
        assert slot is not None
        assert slot.offset % 64 == 0
        position = 0
        for chunk in chunks:
            slot.view[position : position + len(chunk)] = chunk
            position += len(chunk)
        self.number += 1
        done = trio.Event()
        outcomes = []

        def on_done(outcome):
            outcomes.append(outcome)
            done.set()

        self.worker.submit(self.number, slot, tensors.headers_bytes(headers), outputs, seconds, on_done)
        return self.number, done, outcomes

    async def call(self, inputs, outputs=(), seconds=10.0):
        _, done, outcomes = self.start(inputs, outputs, seconds)
        with trio.fail_after(30):
            await done.wait()
        assert len(outcomes) == 1
        return outcomes[0]

    async def result(self, inputs, outputs=()):
        outcome = await self.call(inputs, outputs)
        assert not outcome.reason, outcome.detail
        values = tensors.decode_values(tensors.parse_headers(outcome.headers), bytes(outcome.payload))
        self.worker.release(outcome.call_id)
        return values


async def start(runtime, model=DOUBLE, limits=LIMITS, name=b"m"):
    return Caller(await runtime.start_worker(WorkerModel(name, model), limits))


X = {"X": numpy.arange(8, dtype=numpy.float32)}
ONE = {"X": numpy.ones(1, numpy.float32)}


def test_the_daemon_does_not_import_the_engine():
    imports = "import sys, p2pnode.work.runtime, p2pnode.work.hardware"
    code = f"{imports}; sys.exit(bool({{'onnxruntime', 'onnx'}} & {{*sys.modules}}))"
    environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60).returncode == 0


async def test_level_and_tasks():
    async with running() as runtime:
        assert runtime.level == "full" or runtime.level.startswith("reduced:")
        result, output = await runtime.confined("self-test", {"a": 1}, b"payload", 100, 10)
        assert (result, output) == ({"open": False, "socket": False, "fork": False}, b"payload")
        with pytest.raises(WorkError) as caught:
            await runtime.confined("self-test", {}, b"x" * 101, 100, 10)
        assert caught.value.reason is Reason.OUTPUT_TOO_LARGE
        with pytest.raises(WorkError) as caught:
            await runtime.confined("measure", {"size": 64, "seconds": 100}, b"", 0, 0.2)
        assert caught.value.reason is Reason.TIME_LIMIT
        with pytest.raises(KeyError):
            await runtime.confined("os:system", {}, b"", 0, 1)
        large = bytes(3 << 20)
        assert (await runtime.confined("self-test", {}, large, len(large), 10))[1] == large


async def test_a_task_has_its_memory_and_no_more():
    async with running(RuntimeSettings(task_memory_bytes=256 << 20)) as runtime:
        with pytest.raises(WorkError) as caught:
            await runtime.confined("measure", {"size": 8000, "seconds": 1}, b"", 0, 10)
        assert caught.value.reason is Reason.MEMORY


async def test_calls_of_all_sizes_and_a_full_queue():
    async with running() as runtime:
        caller = await start(runtime)
        for size in (1, 1000, 200_000, 3_000_000, 3_000_000):
            x = numpy.arange(size, dtype=numpy.float32)
            assert ((await caller.result({"X": x}))["Y"] == 2 * x).all()
        assert (await caller.result(X, ["Y", "Y"])).keys() == {"Y"}
        waiting = [caller.start({"X": numpy.full(10, k, numpy.float32)}) for k in range(100)]
        for k, (number, done, outcomes) in enumerate(waiting):
            await done.wait()
            values = tensors.decode_values(tensors.parse_headers(outcomes[0].headers), bytes(outcomes[0].payload))
            assert (values["Y"] == 2 * k).all()
            caller.worker.release(number)
        assert caller.worker._arena.is_idle


async def test_polling_brings_a_quick_answer_without_a_turn_of_the_loop():
    async with running() as runtime:
        caller = await start(runtime)
        inputs = {"X": numpy.ones(8, numpy.float32)}
        await caller.result(inputs)
        answered = 0
        for _ in range(20):
            _, done, outcomes = caller.start(inputs)
            for _ in range(50):
                # Nothing here gives the loop a turn, so only the poll itself can have read the answer.
                caller.worker.poll()
                if outcomes:
                    answered += 1
                    caller.worker.release(outcomes[0].call_id)
                    break
            else:
                await done.wait()
        assert answered


async def test_long_headers_travel_through_the_arena():
    names = [f"input{k:0100d}" for k in range(200)]
    model = build(
        [helper.make_node("Identity", [name], [name.replace("in", "out")]) for name in names],
        [value(name, [1]) for name in names],
        [value(name.replace("in", "out"), [1]) for name in names],
    )
    async with running() as runtime:
        caller = await start(runtime, model)
        for k in range(3):
            values = await caller.result({name: numpy.full(1, k, numpy.float32) for name in names})
            assert len(values) == 200
            assert all(array[0] == k for array in values.values())
        assert caller.worker._arena.is_idle


async def test_outputs_larger_than_their_slot_and_larger_than_the_arena():
    async with running() as runtime:
        caller = await start(runtime, EXPAND)
        for count in (1 << 20, 10, 2 << 20):
            feed = {"X": numpy.ones(1, numpy.float32), "N": numpy.array([count])}
            assert (await caller.result(feed))["Y"].sum() == count
        outcome = await caller.call({"X": numpy.ones(1, numpy.float32), "N": numpy.array([40 << 20])})
        assert outcome.reason == "output-too-large"
        assert (await caller.result({"X": numpy.ones(1, numpy.float32), "N": numpy.array([5])}))["Y"].sum() == 5


async def test_an_output_waits_for_room():
    async with running() as runtime:
        caller = await start(runtime, EXPAND)
        feed = {"X": numpy.ones(1, numpy.float32), "N": numpy.array([9 << 20])}
        first = await caller.call(feed)
        _, done, outcomes = caller.start(feed)
        with trio.move_on_after(0.1):
            await done.wait()
        assert not outcomes
        caller.worker.release(first.call_id)
        with trio.fail_after(5):
            await done.wait()
        assert not outcomes[0].reason


def sized(k, size=1):
    """Inputs of `size` numbers whose outputs are k numbers."""
    return {"X": numpy.ones(size, numpy.float32), "N": numpy.array([k])}


async def finish(started):
    _, done, outcomes = started
    with trio.fail_after(10):
        await done.wait()
    return outcomes[0]


async def test_inputs_that_wait_leave_room_for_the_running_call_s_outputs():
    async with running() as runtime:
        caller = await start(runtime, NEGATE, SMALL)
        x = numpy.arange(25_000, dtype=numpy.float32)
        slots = []
        while (slot := caller.worker.reserve(x.nbytes)) is not None:
            slots.append(slot)
        for slot in slots:
            caller.worker.free(slot)
        assert len(slots) == 5, "half, as long as nothing is known of the outputs"
        waiting = [caller.start({"X": x + k}) for k in range(5)]
        for k, started in enumerate(waiting):
            outcome = await finish(started)
            assert not outcome.reason, outcome.detail
            assert bytes(outcome.payload) == (-(x + k)).tobytes()
            caller.worker.release(outcome.call_id)
        assert caller.worker._arena.is_idle


async def test_inputs_may_fill_the_arena_when_the_model_s_outputs_are_small():
    async with running() as runtime:
        caller = await start(runtime, EXPAND_LARGEST, SMALL)
        await caller.result(sized(10, 25_000))
        waiting = [caller.start(sized(10, 25_000)) for _ in range(9)]
        assert caller.worker.reserve(100_000) is None
        for started in waiting:
            outcome = await finish(started)
            assert not outcome.reason, outcome.detail
            caller.worker.release(outcome.call_id)
        assert caller.worker._arena.is_idle
        # One that turns out large finds the arena full; after it inputs have half again.
        waiting = [caller.start(sized(k, 25_000)) for k in (60_000, *[10] * 8)]
        outcomes = [await finish(started) for started in waiting]
        assert [outcome.reason for outcome in outcomes] == ["memory", *[""] * 8]
        for outcome in outcomes:
            caller.worker.release(outcome.call_id)
        waiting = [caller.start(sized(k, 25_000)) for k in (60_000, *[10] * 4)]
        assert caller.worker.reserve(100_000) is None
        assert [(await finish(started)).reason for started in waiting] == [""] * 5


async def test_calls_behind_leave_room_for_the_running_call_s_outputs():
    async with running() as runtime:
        caller = await start(runtime, EXPAND, SMALL)
        assert (await caller.result(sized(50_000)))["Y"].sum() == 50_000
        # All are expected to give what the first gave; the next gives far more, and those behind it come after it.
        waiting = [caller.start(sized(k)) for k in (125_000, *[50_000] * 6)]
        for started in waiting:
            outcome = await finish(started)
            assert not outcome.reason, outcome.detail
            caller.worker.release(outcome.call_id)
        assert caller.worker._arena.is_idle


async def test_outputs_for_which_nothing_will_make_room_fail_at_once_and_may_be_tried_again():
    async with running() as runtime:
        caller = await start(runtime, EXPAND_LARGEST, SMALL)
        first = caller.start(sized(150_000))
        others = [caller.start(sized(10, 33_000)) for _ in range(3)]
        outcome = await finish(first)
        assert outcome.reason == "memory"
        assert "600" in outcome.detail
        for started in others:
            outcome = await finish(started)
            assert not outcome.reason
            caller.worker.release(outcome.call_id)
        assert (await caller.result(sized(150_000)))["Y"].sum() == 150_000
        assert caller.worker._arena.is_idle


@pytest.mark.parametrize(("how", "reason"), [("cancelled", "cancelled"), ("overdue", "memory")])
async def test_a_call_that_ends_while_it_waits_for_room_does_not_cost_the_worker(how, reason):
    async with running() as runtime:
        caller = await start(runtime, EXPAND, SMALL)
        kept = await caller.call(sized(150_000))
        started = caller.start(sized(150_000), seconds=0.3 if how == "overdue" else 10.0)
        await trio.sleep(0.1)
        assert not started[2]
        if how == "cancelled":
            caller.worker.cancel(started[0])
        assert (await finish(started)).reason == reason
        assert caller.worker.alive
        caller.worker.release(kept.call_id)
        assert (await caller.result(sized(150_000)))["Y"].sum() == 150_000
        assert caller.worker._arena.is_idle


async def test_errors_name_reason_and_class():
    async with running() as runtime:
        caller = await start(runtime)
        for inputs, reason, text in (
            ({}, "missing-input", "ValueError: Required inputs"),
            ({"X": numpy.ones(2)}, "wrong-dtype", "InvalidArgument: "),
            ({"X": numpy.ones((2, 2), numpy.float32)}, "wrong-shape", "InvalidArgument: "),
        ):
            outcome = await caller.call(inputs)
            assert outcome.reason == reason
            assert outcome.detail.startswith(text)
        outcome = await caller.call(X, ["Nope"])
        assert outcome.reason == "unknown-output"
        assert caller.worker.alive


@pytest.mark.parametrize(
    ("make", "reasons"),
    [
        (lambda: b"no model at all", {Reason.NOT_ONNX}),
        (huge_initializer, {Reason.BAD_MODEL, Reason.NOT_ONNX}),
        (lambda: nested_if(3000), {Reason.NOT_ONNX, Reason.BAD_MODEL}),
        (lambda: external_model("/etc/hostname"), {Reason.EXTERNAL_DATA, Reason.BAD_MODEL}),
        (lambda: external_model("../secret"), {Reason.EXTERNAL_DATA, Reason.BAD_MODEL}),
        (lambda: external_model("hostname"), {Reason.EXTERNAL_DATA, Reason.BAD_MODEL}),
        (lambda: external_model("*/_ORT_MEM_ADDR_/*"), {Reason.EXTERNAL_DATA, Reason.BAD_MODEL}),
    ],
    ids=["garbage", "dimensions", "nested-if", "absolute", "parent-folder", "beside", "memory-address"],
)
async def test_hostile_models_fail_to_load_with_a_reason(make, reasons):
    async with running() as runtime:
        other = await start(runtime)
        with pytest.raises(WorkError) as caught:
            await start(runtime, make(), name=b"hostile")
        assert caught.value.reason in reasons, caught.value
        assert ((await other.result(X))["Y"] == 2 * X["X"]).all()
        assert len(await children_of(runtime, 1)) == 1


async def test_a_folding_bomb_is_killed_at_the_load_deadline():
    bomb = folding_bomb()
    assert len(bomb) < 1000
    async with running() as runtime:
        other = await start(runtime)
        began = time.monotonic()
        with pytest.raises(WorkError) as caught:
            await start(runtime, bomb, WorkerLimits(load_seconds=0.4, arena_bytes=1 << 20), b"hostile")
        assert caught.value.reason is Reason.TIME_LIMIT
        assert time.monotonic() - began < 3
        assert len(await children_of(runtime, 1)) == 1
        assert (await other.result(X))["Y"][1] == 2


async def children_of(runtime, expected):
    """Give the zygote's living children, after those that were killed have gone."""
    path = f"/proc/{runtime.zygote_pid}/task/{runtime.zygote_pid}/children"
    with trio.move_on_after(3):
        while True:
            with open(path) as file:
                children = file.read().split()
            if len(children) == expected:
                return children
            await trio.sleep(0.01)
    return children


def test_the_nested_model_is_one():
    import onnx

    assert onnx.load_from_string(nested_if(3)).graph.node[0].op_type == "If"


@pytest.mark.parametrize("at_load", [True, False])
async def test_an_allocation_bomb_is_out_of_memory_and_nothing_else(at_load):
    async with running() as runtime:
        other = await start(runtime)
        try:
            # Whether it is folded while loading is ONNX Runtime's choice.
            caller = await start(runtime, allocation_bomb(at_load), name=b"bomb")
            outcome = await caller.call({} if at_load else {"S": numpy.array([4_000_000_000])})
            reason = outcome.reason
        except WorkError as error:
            reason = error.reason.value
        assert reason == "memory"
        assert (await other.result(X))["Y"][1] == 2


async def test_an_allocation_bomb_in_a_call_spares_the_worker():
    async with running() as runtime:
        caller = await start(runtime, allocation_bomb(False))
        outcome = await caller.call({"S": numpy.array([4_000_000_000])})
        assert outcome.reason == "memory"
        assert (await caller.result({"S": numpy.array([10])}))["Y"] == 10


async def test_an_endless_loop_ends_politely():
    async with running() as runtime:
        caller = await start(runtime, endless_loop())
        began = time.monotonic()
        outcome = await caller.call(ONE, seconds=0.2)
        assert outcome.reason == "time-limit"
        assert time.monotonic() - began < 2
        assert caller.worker.alive
        number, done, outcomes = caller.start(ONE)
        later = caller.start(ONE)
        caller.worker.cancel(later[0])
        await trio.sleep(0.05)
        caller.worker.cancel(number)
        with trio.fail_after(5):
            await done.wait()
            await later[1].wait()
        assert [outcomes[0].reason, later[2][0].reason] == ["cancelled", "cancelled"]
        assert caller.worker.alive


async def test_what_hears_no_terminate_is_killed_and_its_neighbours_live():
    async with running() as runtime:
        other = await start(runtime)
        caller = await start(runtime, big_kernel(), WorkerLimits(arena_bytes=512 << 20), b"kernel")
        feed = {"X": numpy.ones((5000, 5000), numpy.float32)}
        number, done, outcomes = caller.start(feed, seconds=0.1)
        queued = caller.start({"X": numpy.ones((2, 2), numpy.float32)})
        assert (await other.result(X))["Y"][1] == 2
        with trio.fail_after(3):
            await done.wait()
            await queued[1].wait()
        assert outcomes[0].reason == "time-limit"
        assert queued[2][0].reason == "worker-died"
        assert not caller.worker.alive
        assert caller.worker.reserve(10) is None
        assert (await other.result(X))["Y"][1] == 2
        replaced = await start(runtime, big_kernel(), name=b"kernel")
        assert (await replaced.result({"X": numpy.ones((2, 2), numpy.float32)}))["Y"][0, 0] == 2
        assert number


async def test_cancelling_what_hears_no_terminate():
    async with running() as runtime:
        caller = await start(runtime, big_kernel(), WorkerLimits(arena_bytes=512 << 20))
        number, done, outcomes = caller.start({"X": numpy.ones((5000, 5000), numpy.float32)})
        await trio.sleep(0.05)
        caller.worker.cancel(number)
        with trio.fail_after(3):
            await done.wait()
        assert outcomes[0].reason == "cancelled"


@pytest.mark.parametrize("how", ["kill", "outside", "zygote"])
async def test_death_answers_every_call_once(how):
    async with running() as runtime:
        caller = await start(runtime, endless_loop())
        waiting = [caller.start(ONE) for _ in range(12)]
        await trio.sleep(0.02)
        if how == "kill":
            caller.worker.kill()
        else:
            os.kill(caller.worker.pid if how == "outside" else runtime.zygote_pid, signal.SIGKILL)
        with trio.fail_after(5):
            for _, done, _ in waiting:
                await done.wait()
        await trio.sleep(0.02)
        assert [outcome.reason for _, _, outcomes in waiting for outcome in outcomes] == ["worker-died"] * 12
        assert not caller.worker.alive
        late = await caller_of_the_dead(caller)
        assert late.reason == "worker-died"
        again = await start(runtime)
        assert (await again.result(X))["Y"][1] == 2


async def caller_of_the_dead(caller):
    slot = caller.worker._arena.reserve(64)
    outcomes = []
    caller.worker.submit(1000, slot, b"", (), 1.0, outcomes.append)
    return outcomes[0]


async def test_cancelling_the_start_leaves_nothing():
    async with running() as runtime:
        before = set(os.listdir("/proc/self/fd"))
        with trio.move_on_after(0.2) as scope:
            await start(runtime, folding_bomb())
        assert scope.cancelled_caught
        assert await children_of(runtime, 0) == []
        assert set(os.listdir("/proc/self/fd")) == before


async def test_stopping_the_runtime_ends_everything():
    descriptors = len(os.listdir("/proc/self/fd"))
    async with running() as runtime:
        caller = await start(runtime, endless_loop())
        _, _, outcomes = caller.start(ONE)
        await trio.sleep(0.02)
        pids = (runtime.zygote_pid, caller.worker.pid)
    assert outcomes[0].reason == "worker-died"
    for pid in pids:
        assert not os.path.exists(f"/proc/{pid}")
    del caller, outcomes
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 2


async def test_initialisers_are_shared_and_large_models_load():
    weights = numpy.random.default_rng(1).random((512, 512)).astype(numpy.float32)
    tensor = TensorProto(name="W", data_type=TensorProto.FLOAT, dims=weights.shape, data_location=TensorProto.EXTERNAL)
    for key, text in (("location", "weights.bin"), ("offset", "0"), ("length", str(weights.nbytes))):
        tensor.external_data.add(key=key, value=text)
    graph = build([helper.make_node("MatMul", ["X", "W"], ["Y"])], [value("X", [1, 512])], [value("Y", [1, 512])], [tensor])
    model = WorkerModel(b"w", graph, (("W", 1, (512, 512), 0, weights.nbytes),), memoryview(weights.tobytes()))
    async with running() as runtime:
        callers = [Caller(await runtime.start_worker(model, LIMITS)) for _ in range(2)]
        assert len(runtime._models) == 1
        x = numpy.ones((1, 512), numpy.float32)
        for caller in callers:
            assert numpy.allclose((await caller.result({"X": x}))["Y"], x @ weights, rtol=1e-4)
            caller.worker.kill()
        with trio.fail_after(5):
            while runtime._models:
                await trio.sleep(0.01)


async def test_threads_where_asked():
    async with running() as runtime:
        caller = await start(runtime, big_kernel(), WorkerLimits(threads=2, arena_bytes=64 << 20))
        result = await caller.result({"X": numpy.ones((300, 300), numpy.float32)})
        assert result["Y"][0, 0] == 300
        assert len(os.listdir(f"/proc/{caller.worker.pid}/task")) >= 3


async def test_the_device_worker_is_spawned_and_confined():
    async with running() as runtime:
        # A provider this build lacks: the process for it is started, confined, and says what it has instead.
        model = WorkerModel(b"gpu", DOUBLE, execution_providers=("CUDAExecutionProvider", "CPUExecutionProvider"))
        caller = Caller(await runtime.start_worker(model, LIMITS))
        assert await children_of(runtime, 0) == []
        assert caller.worker.facts["providers"] == ["CPUExecutionProvider"]
        assert caller.worker.facts["missing"] == []
        assert caller.worker.level == "gpu"
        assert (await caller.result(X))["Y"][1] == 2
        lines = Path(f"/proc/{caller.worker.pid}/status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        assert status["Seccomp"] == "2"
        assert status["NoNewPrivs"] == "1"
        assert status["Uid"].split()[0] != "0"


async def test_an_unknown_user_is_a_setting_error():
    with pytest.raises(Exception, match="no-such-user"):
        await SandboxRuntime(RuntimeSettings(user="no-such-user")).run()


async def test_processor_time_is_bounded_and_extended():
    async with running() as runtime:
        caller = await start(runtime, limits=WorkerLimits(load_seconds=20, call_seconds=100, arena_bytes=1 << 20))
        if runtime._may_extend:
            soft, hard = resource.prlimit(caller.worker.pid, resource.RLIMIT_CPU)
            assert 260 <= soft <= 262
            assert hard == resource.RLIM_INFINITY
            assert (await caller.result(X))["Y"][1] == 2
            resource.prlimit(caller.worker.pid, resource.RLIMIT_CPU, (30, hard))
            caller.worker._check_deadlines(trio.current_time())
            assert resource.prlimit(caller.worker.pid, resource.RLIMIT_CPU)[0] >= 260


async def test_memory_returns_when_idle():
    async with running() as runtime:
        caller = await start(runtime)
        await caller.result({"X": numpy.ones(3_000_000, numpy.float32)})
        arena = caller.worker._arena
        assert os.fstat(arena.descriptor).st_blocks > 20000
        caller.worker._check_deadlines(trio.current_time())
        assert os.fstat(arena.descriptor).st_blocks < 100
        assert (await caller.result(X))["Y"][1] == 2


# A worker that was taken over: the test plays it, on the far end of the sockets.

TAKEN_OVER = {
    "noise": lambda call: os.urandom(200),
    "short": lambda call: b"x",
    "wrong sequence": lambda call: channel.pack_response(channel.DONE, 0, 99, 0.0, 0, 0),
    "unknown kind": lambda call: channel.pack_response(77, 0, 1, 0.0, 0, 0),
    "second load": lambda call: channel.pack_response(channel.LOADED, 0, 1, 0.0, 0, 0),
    "payload beyond the slot": lambda call: channel.pack_response(channel.DONE, 0, 1, 0.0, 1 << 40, 0),
    "headers beyond the slot": lambda call: channel.pack_response(channel.DONE, 1 << 30, 1, 0.0, 0, 0),
    "headers cut": lambda call: channel.pack_response(channel.DONE, 100, 1, 0.0, 0, 0) + b"x",
    "no headers": lambda call: channel.pack_response(channel.DONE, 3, 1, 0.0, 0, 0) + b"abc",
    "other outputs": lambda call: answer({"Z": numpy.ones(4, numpy.float32)}),
    "less payload": lambda call: answer({"Y": numpy.ones(4, numpy.float32)}, -8),
    "needs nothing": lambda call: channel.pack_response(channel.NEED, 0, 1, 0.0, 0, 5),
    "reason not its own": lambda call: channel.pack_response(channel.FAILED, 0, 1, 0.0, 0, 0) + b"paused\0x",
    "endless time": lambda call: channel.pack_response(channel.DONE, 0, 1, float("inf"), 0, 0),
}


def answer(values, less=0):
    headers, _, size = tensors.encode_values(values)
    encoded = tensors.headers_bytes(headers)
    return channel.pack_response(channel.DONE, len(encoded), 1, 0.0, size + less, 0) + encoded


@asynccontextmanager
async def taken_over():
    process = subprocess.Popen(["sleep", "60"])
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    cancel, _cancel_theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    child = Child(process.pid, os.pidfd_open(process.pid))
    child.report(None)
    worker = RemoteWorker(child, ours, cancel, reader, Arena(1 << 20), LIMITS)
    worker._all_names = ("Y",)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker.run)
        yield worker, theirs
        nursery.cancel_scope.cancel()
    theirs.close()
    _cancel_theirs.close()
    os.close(writer)
    assert process.wait(5) == -signal.SIGKILL


@pytest.mark.parametrize("kind", TAKEN_OVER)
async def test_garbage_kills_the_worker_and_not_the_parent(kind):
    async with taken_over() as (worker, theirs):
        caller = Caller(worker)
        _, done, outcomes = caller.start({"X": numpy.ones(4, numpy.float32)})
        theirs.send(TAKEN_OVER[kind](None))
        with trio.fail_after(5):
            await done.wait()
        assert outcomes[0].reason == "worker-died"
        assert not worker.alive


async def test_the_played_worker_is_heard_when_it_is_honest():
    async with taken_over() as (worker, theirs):
        caller = Caller(worker)
        _, done, outcomes = caller.start({"X": numpy.ones(4, numpy.float32)})
        theirs.send(answer({"Y": numpy.ones(4, numpy.float32)}))
        with trio.fail_after(5):
            await done.wait()
        assert not outcomes[0].reason
        assert len(outcomes[0].payload) == 16


async def test_answers_nobody_asked_for():
    async with taken_over() as (worker, theirs):
        theirs.send(answer({"Y": numpy.ones(4, numpy.float32)}))
        with trio.fail_after(5):
            while worker.alive:
                await trio.sleep(0.005)
