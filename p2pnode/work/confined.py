"""The closed list of tasks that may be run by name in a confined child.

A task is a function of (arguments: dict, data: memoryview) giving (small result: dict, output: bytes). It raises WorkError
with its own reason. It can open no file and import nothing new: what it needs is imported by its module.
"""

import importlib
import os
import socket
from collections.abc import Callable, Mapping
from time import perf_counter  # noqa: TID251 - a confined task has no event loop and measures the processor
from typing import Any, Final

Task = Callable[[Mapping[str, Any], memoryview], tuple[dict[str, Any], bytes]]

TASKS: Final[dict[str, str]] = {
    "self-test": "p2pnode.work.confined:self_test",
    "engine-facts": "p2pnode.work.confined:engine_facts",
    "measure": "p2pnode.work.confined:measure",
    "split": "p2pnode.work.inspection:split",
    "join": "p2pnode.work.inspection:join",
    "inspect": "p2pnode.work.inspection:inspect",
    "cost": "p2pnode.work.inspection:cost",
}


def load(name: str) -> Task:
    """Give a task's function. Raises KeyError for a name not in `TASKS`."""
    module, function = TASKS[name].split(":")
    task: Task = getattr(importlib.import_module(module), function)
    return task


def load_all() -> None:
    """Import every task, for the zygote: its children cannot."""
    for name in TASKS:
        load(name)


def self_test(arguments: Mapping[str, Any], data: memoryview) -> tuple[dict[str, Any], bytes]:
    """Try what must not work and say what did. Gives {"open": bool, "socket": bool, "fork": bool} and `data`."""
    return {
        "open": _works(lambda: os.close(os.open("/", os.O_RDONLY))),
        "socket": _works(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()),
        "fork": _works(_fork_once),
    }, bytes(data)


def engine_facts(arguments: Mapping[str, Any], data: memoryview) -> tuple[dict[str, Any], bytes]:
    """Give the engine's version and the execution providers that it was built with."""
    import onnxruntime

    return {"version": onnxruntime.__version__, "providers": list(onnxruntime.get_available_providers())}, b""


def measure(arguments: Mapping[str, Any], data: memoryview) -> tuple[dict[str, Any], bytes]:
    """Multiply float32 matrices of `size` for about `seconds` on one thread; gives operations per second, the best round."""
    import numpy
    import onnxruntime
    from onnx import TensorProto, helper

    size, seconds = int(arguments["size"]), float(arguments["seconds"])
    places = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [size, size]) for name in ("A", "B", "C")]
    graph = helper.make_graph([helper.make_node("MatMul", ["A", "B"], ["C"])], "measure", places[:2], places[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {name: numpy.full((size, size), 0.5, numpy.float32) for name in ("A", "B")}
    best, start = float("inf"), perf_counter()
    while perf_counter() - start < seconds or best == float("inf"):
        begin = perf_counter()
        session.run(None, feed)
        best = min(best, perf_counter() - begin)
    return {"operations_per_second": 2.0 * size**3 / best}, b""


def _works(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except OSError:
        return False
    return True


def _fork_once() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
