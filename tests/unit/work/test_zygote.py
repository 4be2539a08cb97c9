"""The zygote: one thread, no telemetry, replaced when it dies, and nothing of it outlives its parent."""

# ruff: noqa: ASYNC110, ASYNC220, ASYNC240 - these tests look at real processes, which give no events

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from p2pnode.errors import ConfigError, WorkError
from p2pnode.work import children
from p2pnode.work.children import Zygote
from p2pnode.work.zygote import ENVIRONMENT

ROOT = children._child_environment()["PYTHONPATH"]
SESSION = """
import onnxruntime
from onnx import TensorProto, helper
value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "XY"]
graph = helper.make_graph([helper.make_node("Neg", ["X"], ["Y"])], "g", value[:1], value[1:])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
import time
onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
time.sleep(0.3)
"""


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


async def gone(*pids: int) -> None:
    with trio.fail_after(5):
        while any(alive(pid) for pid in pids):
            await trio.sleep(0.005)


def task_request() -> dict:
    return {"kind": "task", "task": "nothing", "policy": {}, "arguments_size": 0, "output_bytes_max": 0}


@pytest.mark.slow
async def test_has_one_thread_and_a_bare_environment(tmp_path):
    async with trio.open_nursery() as nursery:
        zygote = Zygote({"HOME": str(tmp_path)})
        nursery.start_soon(zygote.run)
        await zygote.wait_ready()
        assert len(os.listdir(f"/proc/{zygote.pid}/task")) == 1
        environment = dict(part.split("=", 1) for part in Path(f"/proc/{zygote.pid}/environ").read_text().split("\0") if part)
        assert environment.items() >= ENVIRONMENT.items()
        assert "CI" not in environment
        assert set(environment) <= {*ENVIRONMENT, "HOME", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "LC_ALL", "LD_LIBRARY_PATH"}
        nursery.cancel_scope.cancel()
    assert files_below(tmp_path) == []


@pytest.mark.slow
def test_telemetry_is_off_without_ci(tmp_path):
    # The same environment as every child's, but unconfined: here it could write if it wanted to.
    environment = {**children._child_environment(), "HOME": str(tmp_path)}
    assert "CI" not in environment
    subprocess.run([sys.executable, "-c", SESSION], env=environment, check=True, timeout=60, capture_output=True)
    assert files_below(tmp_path) == []


@pytest.mark.slow
def test_the_control_shows_telemetry_where_it_is_built_in(tmp_path):
    environment = {"HOME": str(tmp_path), "PYTHONPATH": ROOT}
    subprocess.run([sys.executable, "-c", SESSION], env=environment, check=True, timeout=60, capture_output=True)
    if not files_below(tmp_path):
        pytest.skip("this build of onnxruntime has no telemetry")


@pytest.mark.slow
async def test_is_replaced_when_it_dies_and_takes_its_children_along():
    async with trio.open_nursery() as nursery:
        zygote = Zygote()
        nursery.start_soon(zygote.run)
        await zygote.wait_ready()
        first = zygote.pid
        child, hold = await sleeping_child(zygote)
        os.kill(first, signal.SIGKILL)
        with trio.fail_after(5):
            assert await child.wait() is None
        child.close()
        await gone(first, child.pid)
        with trio.fail_after(5):
            while zygote.pid in (0, first):
                await trio.sleep(0.005)
            await zygote.wait_ready()
            again, hold_again = await sleeping_child(zygote)
        again.kill()
        assert await again.wait() == -signal.SIGKILL
        again.close()
        for descriptor in (*hold, *hold_again):
            os.close(descriptor)
        nursery.cancel_scope.cancel()


async def sleeping_child(zygote: Zygote):
    """Fork a worker that waits for its first request for ever."""
    import socket

    import msgpack

    from p2pnode.work.arena import constant_memfd, sealed_memfd

    control, control_child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    cancel, cancel_child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reader, writer = os.pipe()
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "XY"]
    graph = helper.make_graph([helper.make_node("Neg", ["X"], ["Y"])], "g", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    initializers = msgpack.packb([])
    given = [sealed_memfd("a", 4096), constant_memfd("m", (initializers, model)), constant_memfd("b", ())]
    request = {
        "kind": "worker", "initializers_size": len(initializers), "providers": ["CPUExecutionProvider"], "optimise": True,
        "policy": {"threads": 1},
    }  # fmt: skip
    child = await zygote.fork(request, [control_child.fileno(), cancel_child.fileno(), writer, *given])
    control_child.close()
    cancel_child.close()
    os.close(writer)
    for descriptor in given:
        os.close(descriptor)
    await trio.lowlevel.wait_readable(control)
    return child, (control.detach(), cancel.detach(), reader)


@pytest.mark.slow
async def test_a_cancelled_fork_leaves_no_child():
    async with trio.open_nursery() as nursery:
        zygote = Zygote()
        nursery.start_soon(zygote.run)
        await zygote.wait_ready()
        with trio.CancelScope() as scope:
            scope.cancel()
            with pytest.raises(trio.Cancelled):
                await zygote.fork(task_request(), [])
            await trio.lowlevel.checkpoint()
        with trio.fail_after(5):
            while Path(f"/proc/{zygote.pid}/task/{zygote.pid}/children").read_text().strip():
                await trio.sleep(0.005)
        nursery.cancel_scope.cancel()


@pytest.mark.slow
async def test_a_zygote_that_cannot_start_says_why(monkeypatch, tmp_path):
    broken = tmp_path / "p2pnode"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('this p2pnode is broken')")
    monkeypatch.setattr(children, "_child_environment", lambda: {"PYTHONPATH": str(tmp_path)})
    with pytest.raises((ConfigError, ExceptionGroup)) as caught:
        with trio.fail_after(10):
            await Zygote().run()
    assert "p2pnode" in str(caught.value)


@pytest.mark.slow
async def test_waiters_hear_of_a_death():
    async with trio.open_nursery() as nursery:
        zygote = Zygote()
        nursery.start_soon(zygote.run)
        await zygote.wait_ready()
        os.kill(zygote.pid, signal.SIGSTOP)
        results = []

        async def ask() -> None:
            try:
                await zygote.fork(task_request(), [])
            except WorkError as error:
                results.append(error.reason.value)

        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked(0.01)
        os.kill(zygote.pid, signal.SIGKILL)
        with trio.fail_after(5):
            while not results:
                await trio.sleep(0.005)
        assert results == ["worker-died"]
        nursery.cancel_scope.cancel()


DAEMON = """
import sys, trio
from p2pnode.work.runtime import SandboxRuntime
from p2pnode.environment import WorkerLimits, WorkerModel
async def main():
    async with trio.open_nursery() as nursery:
        runtime = SandboxRuntime()
        await nursery.start(runtime.run)
        model = bytes.fromhex(sys.argv[1])
        worker = await runtime.start_worker(WorkerModel(b"m", model), WorkerLimits(arena_bytes=1 << 20))
        print(runtime.zygote_pid, worker.pid, flush=True)
        await trio.sleep_forever()
trio.run(main)
"""


@pytest.mark.slow
async def test_nothing_outlives_a_killed_daemon():
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "XY"]
    graph = helper.make_graph([helper.make_node("Neg", ["X"], ["Y"])], "g", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    daemon = subprocess.Popen(
        [sys.executable, "-c", DAEMON, model.hex()], env={"PYTHONPATH": ROOT}, cwd="/", stdout=subprocess.PIPE, text=True
    )
    with daemon:
        pids = [int(word) for word in daemon.stdout.readline().split()]
        assert len(pids) == 2
        assert all(alive(pid) for pid in pids)
        daemon.kill()
        daemon.wait()
        await gone(*pids)
