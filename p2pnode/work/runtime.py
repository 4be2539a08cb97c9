"""`environment.ModelRuntime` for real: confined processes, forked from one zygote, with what they need in sealed memory.

`SandboxRuntime.run` owns the zygote and every worker; cancelling it kills them all. Whatever blocks (copying a large model
into shared memory) happens in a thread.
"""

import os
import pwd
import socket
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import msgpack
import trio

from p2pnode.environment import Buffer, WorkerLimits, WorkerModel
from p2pnode.errors import ConfigError, WorkError
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.work import arena as memory
from p2pnode.work import channel, confined, death, hardware_paths, sandbox
from p2pnode.work.channel import GarbledResponse
from p2pnode.work.children import Child, Zygote, spawn
from p2pnode.work.remote_worker import RemoteWorker

# Room for a task's small result, before its output in the same memfd; the child knows the same number.
RESULT_BYTES_MAX: Final = 4 << 20
_INLINE_COPY_BYTES: Final = 1 << 20
_CPU_PROVIDER: Final = "CPUExecutionProvider"


@dataclass(frozen=True, slots=True)
class RuntimeSettings:
    """How children are confined.

    user: who they become when the node runs as root. task_memory_bytes: address space of a confined task.
    environment: more variables for the zygote, for tests.
    """

    user: str = "nobody"
    task_memory_bytes: int = 4 << 30
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _ModelMemory:
    """A model's graph and initialisers in memfds that nobody can write, shared by its workers."""

    model: int
    blob: int
    initializers_size: int
    users: int = 0


class SandboxRuntime:
    """Runs strangers' models where they can do no harm; one per node, driven by `run`."""

    def __init__(self, settings: RuntimeSettings | None = None, metrics: Metrics | None = None) -> None:
        self._settings = settings or RuntimeSettings()
        self._metrics = metrics or Metrics()
        self._zygote = Zygote(self._settings.environment)
        self._nursery: trio.Nursery | None = None
        self._missing: tuple[str, ...] | None = None
        self._models: dict[tuple[bytes, int, int], _ModelMemory] = {}
        self._models_lock = trio.Lock()
        self._may_extend = death.may_extend_processor_time()
        self._user = (65534, 65534)

    @property
    def level(self) -> str:
        """The achieved level: `full`, or `reduced:` and the missing layers. Known once `run` has started."""
        return "unknown" if self._missing is None else sandbox.level_name(self._missing)

    @property
    def zygote_pid(self) -> int:
        """Process id of the zygote, 0 between two."""
        return self._zygote.pid

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the zygote and the workers; started once a confined process has proved the level.

        Cancelled, it leaves no process behind. Raises ConfigError when the sandbox cannot work on this machine.
        """
        self._user = _user_ids(self._settings.user)
        # The zygote outlives the workers, so that their ends are still reported when the runtime is cancelled.
        zygote_life = trio.CancelScope(shield=True)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keep_zygote, zygote_life)
                try:
                    await self._zygote.wait_ready()
                    async with trio.open_nursery() as workers:
                        self._nursery = workers
                        await self._prove_level()
                        task_status.started()
                        await trio.sleep_forever()
                finally:
                    zygote_life.cancel()
        finally:
            self._nursery = None

    async def _keep_zygote(self, life: trio.CancelScope) -> None:
        with life:
            await self._zygote.run()

    async def _prove_level(self) -> None:
        result, _ = await self.confined("self-test", {}, b"", 0, 30.0)
        is_open = any(result.get(attempt) for attempt in ("open", "socket", "fork"))
        if is_open and "seccomp" not in (self._missing or ()):
            raise ConfigError("the sandbox does not hold on this machine; run `p2pnode status` and report this")

    async def confined(
        self, task: str, arguments: Mapping[str, Any], data: Buffer, output_bytes_max: int, seconds: float
    ) -> tuple[dict[str, Any], bytes]:
        """Run one named task in a fresh confined process; see `environment.ModelRuntime.confined`.

        Raises WorkError; KeyError for a name that is not in `confined.TASKS`. Cancelled, the process is killed.
        """
        if task not in confined.TASKS:
            raise KeyError(task)
        encoded = msgpack.packb(dict(arguments))
        policy = self._policy(self._settings.task_memory_bytes, seconds, may_extend=False, threads=1)
        request = {
            "kind": "task", "task": task, "arguments_size": len(encoded), "output_bytes_max": output_bytes_max, "policy": policy,
        }  # fmt: skip
        async with AsyncExitStack() as stack:
            source = _keep(stack, await _constant("p2pnode-task", (encoded, data)))
            target = _keep(stack, memory.sealed_memfd("p2pnode-result", RESULT_BYTES_MAX + output_bytes_max))
            ours, theirs = _socket_pair(stack)
            errors, errors_child = _error_pipe(stack)
            child = await self._zygote.fork(request, (theirs.fileno(), errors_child, source, target))
            stack.push_async_callback(child.destroy)
            theirs.close()
            try:
                with trio.fail_after(seconds):
                    return await self._task_result(child, ours, errors, target, output_bytes_max)
            except trio.TooSlowError:
                raise WorkError(Reason.TIME_LIMIT, f"the task {task} took more than {seconds:g} s") from None

    async def start_worker(self, model: WorkerModel, limits: WorkerLimits) -> RemoteWorker:
        """Start a process and load a model in it. Raises WorkError; nothing is left behind on failure or cancellation."""
        if self._nursery is None:
            raise WorkError(Reason.SHUTTING_DOWN, "the runtime is not running")
        async with AsyncExitStack() as stack:
            shared = await self._hold_model(model)
            stack.callback(self._drop_model, shared)
            worker = await self._fork_worker(model, limits, shared)
            stack.push_async_callback(worker.destroy)
            try:
                with trio.fail_after(limits.load_seconds):
                    await worker.wait_loaded()
            except trio.TooSlowError:
                raise WorkError(Reason.TIME_LIMIT, f"the model did not load within {limits.load_seconds:g} s") from None
            missing = self._check_layers(worker.facts.get("missing"))
            worker.level = sandbox.level_name(missing, gpu=_needs_device(model))
            death.extend_processor_time(worker.pid, 2 * limits.call_seconds * limits.threads + 60)
            stack.pop_all()
            self._nursery.start_soon(self._keep_worker, worker, shared)
        self._metrics.add("workers_started_total")
        self._metrics.add("model_loads_total")
        return worker

    async def _fork_worker(self, model: WorkerModel, limits: WorkerLimits, shared: _ModelMemory) -> RemoteWorker:
        gpu = _needs_device(model)
        request = {
            "kind": "worker",
            "initializers_size": shared.initializers_size,
            "providers": list(model.execution_providers),
            "optimise": model.optimise,
            "policy": self._policy(limits.memory_bytes, limits.load_seconds, may_extend=True, threads=limits.threads, gpu=gpu),
        }
        async with AsyncExitStack() as stack:
            space = memory.Arena(limits.arena_bytes)
            stack.callback(space.close)
            ours, theirs = _socket_pair(stack)
            cancel, cancel_child = _socket_pair(stack)
            errors, errors_child = _error_pipe(stack)
            descriptors = (theirs.fileno(), cancel_child.fileno(), errors_child, space.descriptor, shared.model, shared.blob)
            child = await (spawn(request, descriptors) if gpu else self._zygote.fork(request, descriptors))
            theirs.close()
            cancel_child.close()
            os.close(errors_child)
            stack.pop_all()
        return RemoteWorker(child, ours, cancel, errors, space, limits)

    async def _keep_worker(self, worker: RemoteWorker, shared: _ModelMemory) -> None:
        self._metrics.add("workers_running")
        try:
            await worker.run()
        finally:
            self._metrics.add("workers_running", amount=-1)
            self._drop_model(shared)

    async def _task_result(
        self, child: Child, ours: socket.socket, errors: int, target: int, output_bytes_max: int
    ) -> tuple[dict[str, Any], bytes]:
        await trio.lowlevel.wait_readable(ours)
        try:
            datagram = os.read(ours.fileno(), channel.DATAGRAM_BYTES_MAX)
        except OSError:
            datagram = b""
        if not datagram:
            raise WorkError(*death.explain(await child.wait(), errors))
        try:
            response = channel.parse_response(datagram)
            if response.kind == channel.FAILED:
                raise WorkError(*death.parse_failure(response.tail, frozenset(Reason)))
            if response.headers_size > RESULT_BYTES_MAX or response.payload_size > output_bytes_max:
                raise GarbledResponse("sizes")
            encoded = os.pread(target, response.headers_size, 0)
            result = msgpack.unpackb(encoded, strict_map_key=False)
            if not isinstance(result, dict) or not isinstance(result.get("result"), dict):
                raise GarbledResponse("result")
        except (GarbledResponse, ValueError) as error:
            raise WorkError(Reason.WORKER_DIED, f"the task gave nonsense: {error}") from error
        self._check_layers(result.get("missing"))
        return result["result"], os.pread(target, response.payload_size, RESULT_BYTES_MAX)

    def _check_layers(self, missing: object) -> tuple[str, ...]:
        """Hold every child to the level that the first one proved. Gives what it lacks."""
        if not isinstance(missing, list) or not all(isinstance(layer, str) for layer in missing):
            raise WorkError(Reason.WORKER_DIED, "a child did not say how it is confined")
        if self._missing is None:
            self._missing = tuple(missing)
        if not set(missing) <= set(self._missing):
            raise WorkError(Reason.SANDBOX_LEVEL, f"a child lacks {','.join(missing)}")
        return tuple(missing)

    def _policy(self, memory_bytes: int, seconds: float, *, may_extend: bool, threads: int, gpu: bool = False) -> dict[str, Any]:
        readable, devices = (hardware_paths.readable(), hardware_paths.devices()) if gpu else ((), ())
        return asdict(
            sandbox.Policy(
                user=self._user[0],
                group=self._user[1],
                memory_bytes=memory_bytes,
                cpu_seconds=seconds if not may_extend or self._may_extend else 0,
                may_extend=may_extend,
                threads=threads,
                gpu=gpu,
                readable=readable,
                devices=devices,
            )
        )

    async def _hold_model(self, model: WorkerModel) -> _ModelMemory:
        key = (model.model_id, len(model.graph), len(model.blob))
        async with self._models_lock:
            shared = self._models.get(key)
            if shared is None:
                encoded = msgpack.packb(model.initializers)
                graph = await _constant("p2pnode-graph", (encoded, model.graph))
                try:
                    blob = await _constant("p2pnode-blob", (model.blob,))
                except BaseException:  # whatever it was, nothing is left open
                    os.close(graph)
                    raise
                shared = self._models[key] = _ModelMemory(graph, blob, len(encoded))
            shared.users += 1
            return shared

    def _drop_model(self, shared: _ModelMemory) -> None:
        shared.users -= 1
        if shared.users == 0:
            self._models = {key: kept for key, kept in self._models.items() if kept is not shared}
            os.close(shared.model)
            os.close(shared.blob)


def _needs_device(model: WorkerModel) -> bool:
    return any(provider != _CPU_PROVIDER for provider in model.execution_providers)


async def _constant(name: str, parts: tuple[Buffer, ...]) -> int:
    if sum(memoryview(part).nbytes for part in parts) <= _INLINE_COPY_BYTES:
        return memory.constant_memfd(name, parts)
    # Not abandoned on cancellation, so the descriptor always reaches its owner.
    return await trio.to_thread.run_sync(memory.constant_memfd, name, parts)


def _keep(stack: AsyncExitStack, descriptor: int) -> int:
    stack.callback(os.close, descriptor)
    return descriptor


def _socket_pair(stack: AsyncExitStack) -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stack.callback(ours.close)
    stack.callback(theirs.close)
    ours.setblocking(False)
    return ours, theirs


def _error_pipe(stack: AsyncExitStack) -> tuple[int, int]:
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    return _keep(stack, reader), _keep(stack, writer)


def _user_ids(name: str) -> tuple[int, int]:
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise ConfigError(f"the user {name!r} that confined processes should become does not exist") from None
    return entry.pw_uid, entry.pw_gid
