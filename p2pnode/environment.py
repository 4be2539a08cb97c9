"""The only door to the machine: clock, entropy, network, database, executor and model runtime, as Protocols.

Everything above this module is given an `Environment` and touches the outside world through it alone. There are two
environments: the real one (`node/machine.py`) and the simulated one (`sim/machine.py`); a `Node` cannot tell which it has.
Lint bans the direct calls (`time.*`, `random.*`, `os.urandom`, asyncio …) everywhere but in those adapters.
"""

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

Result = TypeVar("Result")
Buffer = bytes | bytearray | memoryview


class Clock(Protocol):
    """Time. Durations and deadlines use `monotonic`; documents that others read use `wall_ms`."""

    def monotonic(self) -> float:
        """Seconds on the same clock that trio's deadlines use."""
        ...

    def wall_ms(self) -> int:
        """Unix time in milliseconds."""
        ...


class Entropy(Protocol):
    """Randomness."""

    def token(self, size: int) -> bytes:
        """Bytes fit for keys and nonces."""
        ...

    def uniform(self) -> float:
        """A float in [0, 1) for jitter and sampling; never for secrets."""
        ...


class ByteStream(Protocol):
    """A reliable, ordered stream of bytes between two machines, such as a TCP connection."""

    @property
    def local_address(self) -> str:
        """`host:port` of this end."""
        ...

    @property
    def remote_address(self) -> str:
        """`host:port` of the other end, as this machine sees it."""
        ...

    def send_nowait(self, chunks: Sequence[Buffer]) -> int:
        """Hand over as many bytes, in order, as fit without waiting; gives their number, possibly 0.

        Raises Unreachable when the stream is broken.
        """
        ...

    async def wait_writable(self) -> None:
        """Wait until `send_nowait` would take at least one byte."""
        ...

    async def receive_into(self, buffer: memoryview) -> int:
        """Wait for bytes and put them at the start of `buffer`; 0 at the end of the stream. Raises Unreachable."""
        ...

    async def wait_readable(self) -> None:
        """Wait until `receive_nowait` probably has something to give. Raises Unreachable."""
        ...

    def receive_nowait(self, buffer: memoryview) -> int:
        """Put the bytes that are there at the start of `buffer`; 0 at the end of the stream, -1 when there are none now.

        Raises Unreachable.
        """
        ...

    def poll(self, buffer: memoryview, seconds: float) -> int:
        """`receive_nowait` again and again for a time, in which nothing else runs on this thread; -1 when nothing came.

        Where time is simulated nothing can come meanwhile: it gives -1. Raises Unreachable.
        """
        ...

    def close(self) -> None:
        """Close both directions at once; whoever waits on the stream gets Unreachable. Idempotent."""
        ...

    async def aclose(self) -> None:
        """`close`, and let other tasks have a turn."""
        ...


class Listener(Protocol):
    """A place where streams arrive."""

    @property
    def address(self) -> str:
        """`host:port` actually bound."""
        ...

    async def accept(self) -> ByteStream:
        """Wait for the next stream. Raises Unreachable after `aclose`."""
        ...

    async def aclose(self) -> None:
        """Stop listening. Idempotent."""
        ...


class Network(Protocol):
    """Where streams come from."""

    async def dial(self, address: str) -> ByteStream:
        """Open a stream to `host:port`. Raises Unreachable."""
        ...

    async def listen(self, address: str) -> Listener:
        """Listen on `host:port`; port 0 picks one. Raises ConfigError when the address is taken."""
        ...


class Database(Protocol):
    """One SQLite database. A transaction is a plain function of a connection and commits when it returns."""

    async def write(self, transaction: Callable[[sqlite3.Connection], Result]) -> Result:
        """Run a transaction and wait until it is durable. It cannot be cancelled half-way. Raises StoreError."""
        ...

    async def read(self, query: Callable[[sqlite3.Connection], Result]) -> Result:
        """Run a function that only reads. Raises StoreError."""
        ...


class Executor(Protocol):
    """Where CPU work of more than 5 ms goes so that the event loop stays quick."""

    async def run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Run a plain function elsewhere and give its result. Not cancellable half-way."""
        ...


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """What one worker process may use.

    memory_bytes bounds its address space beyond the zygote's own; load_seconds and call_seconds are wall-clock deadlines
    kept by SIGKILL; arena_bytes is the shared memory for inputs and outputs together.
    """

    memory_bytes: int = 4 << 30
    load_seconds: float = 60.0
    call_seconds: float = 120.0
    arena_bytes: int = 1 << 30
    threads: int = 1


@dataclass(frozen=True, slots=True)
class WorkerModel:
    """A model as a worker takes it: graph bytes and, per external initialiser, where it lies in `blob`.

    initializers: (name, ONNX dtype, shape, offset, size in bytes); offsets into `blob` are multiples of 64.
    blob: one buffer (or a read-only mapping of a file) shared by all workers of the model.
    """

    model_id: bytes
    graph: bytes
    initializers: tuple[tuple[str, int, tuple[int, ...], int, int], ...] = ()
    blob: Buffer = b""
    execution_providers: tuple[str, ...] = ("CPUExecutionProvider",)
    optimise: bool = True


@dataclass(frozen=True, slots=True)
class Slot:
    """A piece of a worker's shared memory, starting on a 64-byte boundary. `view` is writable by this process."""

    offset: int
    view: memoryview


@dataclass(frozen=True, slots=True)
class WorkerOutcome:
    """What became of one call in a worker.

    headers: the outputs' ValueHeaders as encoded by `wire.tensors`; payload: their bytes in the arena, valid until
    `Worker.release(call_id)`. On failure `reason` is the text of a `reasons.Reason` and `detail` is for people.
    """

    call_id: int
    headers: bytes = b""
    payload: memoryview = field(default_factory=lambda: memoryview(b""))
    seconds: float = 0.0
    reason: str = ""
    detail: str = ""


class Worker(Protocol):
    """One process with one loaded model. It runs one call at a time and keeps a short queue."""

    @property
    def alive(self) -> bool:
        """False once the process has ended or was killed."""
        ...

    def reserve(self, size_bytes: int) -> Slot | None:
        """Take arena space for a call's input, or None when there is none now.

        All inputs at the same time, whether reserved, queued or running, leave room for outputs: they take half of the arena, or
        more once outputs are known to be small. A single one may take what is there.
        """
        ...

    def free(self, slot: Slot) -> None:
        """Give back a slot that was reserved and never submitted."""
        ...

    def submit(
        self,
        call_id: int,
        slot: Slot,
        headers: bytes,
        outputs: Sequence[str],
        deadline_seconds: float,
        on_done: Callable[[WorkerOutcome], None],
    ) -> None:
        """Queue one call. `on_done` runs once, in the event loop, whatever happens (the worker's death included).

        Outputs that find no room wait for releases; where none are to come, the call fails: OUTPUT_TOO_LARGE when arena and
        input leave too little in any case, MEMORY when other calls do.
        """
        ...

    def poll(self) -> None:
        """Look for an answer that is due within microseconds, at most for a tenth of a millisecond; may do nothing."""
        ...

    def release(self, call_id: int) -> None:
        """Say that a finished call's output payload is no longer needed."""
        ...

    def cancel(self, call_id: int) -> None:
        """Ask for an early end: politely first, SIGKILL when the call does not stop. `on_done` still runs."""
        ...

    def kill(self) -> None:
        """Kill the process now. Every call in it ends with WORKER_DIED."""
        ...


class ModelRuntime(Protocol):
    """Runs strangers' models where they can do no harm."""

    @property
    def level(self) -> str:
        """The achieved sandbox level: `full`, `gpu`, `reduced:<what the kernel lacks>` or `simulated`."""
        ...

    async def confined(
        self, task: str, arguments: Mapping[str, Any], data: Buffer, output_bytes_max: int, seconds: float
    ) -> tuple[dict[str, Any], bytes]:
        """Run one named task of `work.confined` over `data` in a fresh sandboxed process.

        Gives the task's small result and its output bytes. Raises WorkError with the task's own reason, MEMORY,
        TIME_LIMIT or WORKER_DIED.
        """
        ...

    async def start_worker(self, model: WorkerModel, limits: WorkerLimits) -> Worker:
        """Start a process and load a model in it. Raises WorkError; nothing is left behind on failure or cancellation."""
        ...


@dataclass(frozen=True, slots=True)
class Environment:
    """Everything a node may touch."""

    clock: Clock
    entropy: Entropy
    network: Network
    database: Database
    executor: Executor
    runtime: ModelRuntime
