"""Small real ONNX models, and a work service on the inline runtime: real ONNX Runtime, no processes."""

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import trio
from onnx import ModelProto, TensorProto, helper, numpy_helper

from p2pnode.environment import Environment
from p2pnode.metrics import Metrics
from p2pnode.sim.machine import InlineExecutor, SeededEntropy
from p2pnode.sim.runtime import InlineRuntime
from p2pnode.wire import tensors
from p2pnode.work.models import ModelStore
from p2pnode.work.service import WorkRequest, WorkService
from p2pnode.work.settings import WorkSettings


class LoopClock:
    """trio's clock, and a wall clock that moves a second with each look."""

    def __init__(self) -> None:
        self.wall = 1_700_000_000_000

    def monotonic(self) -> float:
        return trio.current_time()

    def wall_ms(self) -> int:
        self.wall += 1000
        return self.wall


def value(name: str, dtype: int, shape: Any) -> Any:
    return helper.make_tensor_value_info(name, dtype, shape)


def model_of(nodes: Any, inputs: Any, outputs: Any, initializers: Any = (), opset: int = 17, **more: Any) -> ModelProto:
    graph = helper.make_graph(list(nodes), "graph", list(inputs), list(outputs), list(initializers))
    more.setdefault("opset_imports", [helper.make_opsetid("", opset), helper.make_opsetid("ai.onnx.ml", 3)])
    return helper.make_model(graph, ir_version=8, **more)


def linear(rows: Any = "N", width: int = 32, scale: float = 1.0) -> ModelProto:
    """y = x W: the weights are large enough to leave the graph."""
    weights = np.arange(width * width, dtype=np.float32).reshape(width, width) * np.float32(scale) / (width * width)
    return model_of(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [value("x", TensorProto.FLOAT, [rows, width])],
        [value("y", TensorProto.FLOAT, [rows, width])],
        [numpy_helper.from_array(weights, "w")],
    )


def double(shape: Any = ("N", 4)) -> ModelProto:
    return model_of(
        [helper.make_node("Add", ["x", "x"], ["y"])],
        [value("x", TensorProto.FLOAT, list(shape))],
        [value("y", TensorProto.FLOAT, list(shape))],
    )


def batch_mean() -> ModelProto:
    """y = x - mean over rows: depends on batch mates."""
    return model_of(
        [helper.make_node("ReduceMean", ["x"], ["m"], axes=[0], keepdims=1), helper.make_node("Sub", ["x", "m"], ["y"])],
        [value("x", TensorProto.FLOAT, ["N", 4])],
        [value("y", TensorProto.FLOAT, ["N", 4])],
    )


def random_model() -> ModelProto:
    return model_of(
        [helper.make_node("RandomUniformLike", ["x"], ["y"])],
        [value("x", TensorProto.FLOAT, ["N", 4])],
        [value("y", TensorProto.FLOAT, ["N", 4])],
    )


def nested_if(depth: int) -> bytes:
    """A model whose subgraphs are nested this deep, built as bytes so that no builder's own limit is in the way."""

    def leaf(name: str) -> Any:
        return helper.make_graph([helper.make_node("Identity", ["x"], ["t"])], name, [], [value("t", TensorProto.FLOAT, [1])])

    def field(number: int, content: bytes) -> bytes:
        size, encoded = len(content), b""
        while size > 127:
            encoded += bytes([size & 127 | 128])
            size >>= 7
        return bytes([number << 3 | 2]) + encoded + bytes([size]) + content

    inner = leaf("g").SerializeToString()
    for _ in range(depth):
        branch = field(1, b"then_branch") + field(6, inner) + b"\xa0\x01\x05"
        other = field(1, b"else_branch") + field(6, leaf("e").SerializeToString()) + b"\xa0\x01\x05"
        node = field(1, b"c") + field(2, b"t") + field(4, b"If") + field(5, branch) + field(5, other)
        inner = field(1, node) + field(2, b"g") + field(12, value("t", TensorProto.FLOAT, [1]).SerializeToString())
    graph = inner
    for name, dtype, shape in (("x", TensorProto.FLOAT, [1]), ("c", TensorProto.BOOL, [])):
        graph += field(11, value(name, dtype, shape).SerializeToString())
    return b"\x08\x08" + field(7, graph) + field(8, helper.make_opsetid("", 17).SerializeToString())


@pytest.fixture
def onnx_models() -> SimpleNamespace:
    return SimpleNamespace(
        model_of=model_of,
        value=value,
        linear=linear,
        double=double,
        batch_mean=batch_mean,
        random=random_model,
        nested_if=nested_if,
    )


@dataclass
class Bench:
    """A running service and what it stands on."""

    service: WorkService
    store: ModelStore
    runtime: Any
    metrics: Metrics
    folder: Path
    environment: Environment

    async def add(self, model: ModelProto, name: str = "model.onnx", prepare: bool = True) -> bytes:
        path = self.folder / name
        path.write_bytes(model.SerializeToString())
        model_id, _ = await self.store.add_file(path)
        if prepare:
            await self.service.prepare(model_id)
        return model_id

    def request(self, model_id: bytes, values: dict[str, Any], **more: Any) -> WorkRequest:
        headers, chunks, _ = tensors.encode_values(values)
        payload = b"".join(memoryview(chunk).cast("B") for chunk in chunks)
        return WorkRequest(model_id, headers, memoryview(payload), **more)

    async def call(self, model_id: bytes, values: dict[str, Any], **more: Any) -> Any:
        outcome = await self.service.execute(self.request(model_id, values, **more))
        if outcome.reason is not None:
            return outcome.reason
        return tensors.decode_values(outcome.headers, outcome.payload)


def make_environment(runtime: Any) -> Environment:
    return Environment(LoopClock(), SeededEntropy(1, "a"), None, None, InlineExecutor(), runtime)  # type: ignore[arg-type]


@pytest.fixture
def make_bench(tmp_path: Path) -> Callable[..., Any]:
    """Give an async context manager: (settings, runtime) -> a running Bench."""

    @asynccontextmanager
    async def make(settings: WorkSettings | None = None, runtime: Any = None) -> Any:
        runtime = runtime or InlineRuntime()
        settings = settings or WorkSettings(cores=2, batch_size_max=1)
        environment, metrics = make_environment(runtime), Metrics()
        store = ModelStore(tmp_path / "store", environment, settings)
        service = WorkService(environment, settings, store, metrics)
        async with trio.open_nursery() as nursery:
            await nursery.start(runtime.run)
            async with trio.open_nursery() as inner:
                await inner.start(service.run)
                yield Bench(service, store, runtime, metrics, tmp_path, environment)
                inner.cancel_scope.cancel()
            nursery.cancel_scope.cancel()

    return make


@pytest.fixture(params=["inline", pytest.param("real", marks=pytest.mark.slow)])
def any_bench(request: Any, make_bench: Any) -> Any:
    """The same promises on both runtimes: the inline one stands in for the sandboxed one only as long as these pass on both."""

    def make(settings: WorkSettings | None = None) -> Any:
        if request.param == "inline":
            return make_bench(settings, InlineRuntime())
        from p2pnode.work.runtime import SandboxRuntime

        return make_bench(replace(settings or WorkSettings(cores=2, batch_size_max=1), sandbox_min="reduced"), SandboxRuntime())

    return make
