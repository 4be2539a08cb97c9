"""A node inside another program: in a trio program's own loop, or in a thread of its own for programs without one.

Used where no daemon runs. The data folder's lock is held as long as the node lives, so it is never shared by two. An
embedded node sells nothing: a program that only buys should not start serving strangers behind its user's back.
"""

import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

import trio
from msgspec import to_builtins

from p2pnode.dropin import NetworkSession
from p2pnode.errors import P2PNodeError
from p2pnode.ids import DOCUMENT, JOB, MODEL, id_text, node_text
from p2pnode.jobs.service import JobResult
from p2pnode.jobs.sessions import Answer, is_worth_another_try
from p2pnode.jobs.spec import JobSpec, MapSpec, SessionSpec
from p2pnode.metrics import Metrics
from p2pnode.node.config import NodeConfig, load_config, with_settings
from p2pnode.node.identity import load_or_create
from p2pnode.node.machine import SystemEntropy, open_machine
from p2pnode.node.node import Node
from p2pnode.node.scopes import bare, running
from p2pnode.store import agreements
from p2pnode.work.runtime import SandboxRuntime

Result = TypeVar("Result")
START_SECONDS: Final = 60.0
STOP_SECONDS: Final = 30.0


def embedded_config(config: NodeConfig | None = None) -> NodeConfig:
    """Give the settings of a node that only buys: the owner's, nothing for sale, any free port."""
    config = config or load_config()
    host = config.network.listen.rpartition(":")[0]
    return with_settings(config, {"provide.enabled": "false", "network.listen": f"{host}:0"})


@asynccontextmanager
async def embedded_node(config: NodeConfig | None = None) -> AsyncIterator[Node]:
    """Run a node around a block of a trio program. Raises ConfigError when another process holds the data folder."""
    config = config or embedded_config()
    metrics = Metrics()
    runtime = SandboxRuntime(metrics=metrics)
    async with open_machine(config.database_file, runtime, metrics) as environment:
        identity = load_or_create(config, SystemEntropy())
        async with running(runtime):
            node = Node(config, environment, identity, metrics=metrics)
            async with running(node):
                yield node


class NodeThread:
    """A node in a thread of its own, for programs that know nothing of trio. Its methods may be called from any thread."""

    def __init__(self, config: NodeConfig | None = None) -> None:
        self._config = config
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._stop: trio.Event | None = None
        self._node: Node | None = None
        self._thread = threading.Thread(target=self._run, name="p2pnode", daemon=True)

    def start(self) -> None:
        """Start the node and wait until it is ready. Raises what its start raised."""
        self._thread.start()
        if not self._ready.wait(START_SECONDS):
            raise P2PNodeError(f"the node did not start within {START_SECONDS:.0f} s")
        if self._error is not None:
            self._thread.join()
            raise self._error

    @property
    def node(self) -> Node:
        """The running node; touch it only through `call` and `soon`."""
        if self._node is None:
            raise P2PNodeError("the connection is closed")
        return self._node

    @property
    def alive(self) -> bool:
        """False once the node ended."""
        return self._thread.is_alive() and self._node is not None

    def call(self, function: Callable[..., Awaitable[Result]], *arguments: Any) -> Result:
        """Run an async function in the node's loop and wait for its result."""
        try:
            return trio.from_thread.run(function, *arguments, trio_token=self._running())
        except trio.RunFinishedError as error:
            raise P2PNodeError("the connection is closed") from error

    def soon(self, function: Callable[[], Any]) -> None:
        """Run a plain function in the node's loop as soon as it gets round to it: the shortest way in."""
        try:
            self._running().run_sync_soon(function)
        except trio.RunFinishedError as error:
            raise P2PNodeError("the connection is closed") from error

    def close(self) -> None:
        """Stop the node in order and wait for its end. Idempotent."""
        stop, token = self._stop, self._token
        if stop is not None and token is not None:
            try:
                token.run_sync_soon(stop.set)
            except trio.RunFinishedError:
                pass
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(STOP_SECONDS)

    def _running(self) -> trio.lowlevel.TrioToken:
        if self._token is None or self._node is None:
            raise P2PNodeError("the connection is closed")
        return self._token

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as error:  # whatever ended the node is told to the thread that waits for its start
            self._error = bare(error)
        finally:
            self._node = None
            self._ready.set()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._stop = trio.Event()
        async with embedded_node(self._config) as node:
            self._node = node
            self._ready.set()
            await self._stop.wait()
            self._node = None


class NodeBackend:
    """What a connection does, done by a node in the same trio program."""

    alive = True

    def __init__(self, node: Node) -> None:
        self._node = node

    async def run_async(self, spec: JobSpec) -> JobResult:
        """Run one inference."""
        return await self._node.jobs.run_job(spec)

    async def map_async(self, spec: MapSpec) -> dict[str, Any]:
        """Run a map to its end and give its description."""
        return await self._node.jobs.wait(await self._node.jobs.start_map(spec))


class EmbeddedBackend:
    """What a connection does, done by a node in a thread of this process."""

    def __init__(self, config: NodeConfig) -> None:
        self._thread = NodeThread(config)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """False once the node ended."""
        return self._thread.alive

    def run(self, spec: JobSpec) -> JobResult:
        """Run one inference."""
        return self._thread.call(self._thread.node.jobs.run_job, spec)

    def dry_run(self, spec: JobSpec) -> dict[str, Any]:
        """Say what a run would do."""
        return self._thread.call(self._thread.node.jobs.dry_run, spec)

    def map(self, spec: MapSpec) -> Iterator[dict[str, Any]]:
        """Start a map, or go on with it, and follow it."""
        jobs = self._thread.node.jobs
        job = self._thread.call(jobs.start_map, spec)
        events: Any = jobs.events(job)
        try:
            while True:
                try:
                    event = self._thread.call(events.__anext__)
                except StopAsyncIteration:
                    return
                yield {"job": id_text(JOB, job), **event}
        finally:
            if self._thread.alive:
                self._thread.call(events.aclose)

    def session(self, spec: SessionSpec) -> NetworkSession:
        """Open a session whose calls take the shortest way: one hop into the node's loop and one back."""
        thread, jobs = self._thread, self._thread.node.jobs
        session = thread.call(jobs.session, spec)

        def infer(values: Mapping[str, Any], names: Sequence[str]) -> Mapping[str, Any]:
            waiting = _Waiting()

            def start() -> None:
                try:
                    if not session.call_nowait(values, names, waiting.answer):
                        waiting.answer(None)
                except Exception as error:  # it would end in trio's own machinery; the caller's thread is its place
                    waiting.answer(error)

            thread.soon(start)
            answer = waiting.wait(thread)
            if isinstance(answer, Answer):
                return answer.outputs
            if isinstance(answer, Exception) and not is_worth_another_try(answer):
                raise answer
            return thread.call(session.call, values, names).outputs

        def close() -> None:
            if thread.alive:
                thread.call(jobs.close_session, session)

        return NetworkSession(session.inputs, session.outputs, session.metadata, infer, close)

    def books(self, name: str) -> list[dict[str, Any]]:
        """Give `offers`, `models` or `receipts`."""
        node = self._thread.node
        if name == "offers":
            found = self._thread.call(node.market.fetch_offers, list(node.transport.links().values()))
            return [
                {
                    "provider": node_text(item.provider),
                    **to_builtins(item.offer),
                    "models": [id_text(MODEL, m) for m in item.offer.models],
                }
                for item in found.values()
            ]
        if name == "models":
            return [
                {
                    "id": id_text(MODEL, item.model_id),
                    "name": item.name,
                    "size_bytes": item.size_bytes,
                    "complete": not item.is_partial,
                }
                for item in node.models.list()
            ]
        rows = self._thread.call(node.environment.database.read, lambda connection: agreements.list_receipts(connection))
        return [
            {
                "id": id_text(DOCUMENT, row.document),
                "agreement": id_text(DOCUMENT, row.agreement),
                "calls": row.calls,
                "amount": row.amount,
                "ended_ms": row.ended_ms,
            }
            for row in rows
        ]

    def close(self) -> None:
        """Stop the node: agreements end with their last receipts and cheques."""
        self._thread.close()


class _Waiting:
    """One thread waiting for one answer. A plain lock wakes it faster than a condition does."""

    __slots__ = ("_answer", "_lock")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self._answer: Any = None

    def answer(self, answer: Any) -> None:
        self._answer = answer
        self._lock.release()

    def wait(self, thread: NodeThread) -> Any:
        while not self._lock.acquire(timeout=1.0):
            if not thread.alive:
                raise P2PNodeError("the connection was closed during a call")
        return self._answer
