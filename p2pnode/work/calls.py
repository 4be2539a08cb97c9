"""One call of a model, as it goes into the work service and as it comes out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from p2pnode.environment import Slot
from p2pnode.reasons import Reason
from p2pnode.wire.messages.work import ValueHeader

if TYPE_CHECKING:
    from p2pnode.work.batching import Key
    from p2pnode.work.dispatch import Dispatcher
    from p2pnode.work.pool import Handle

NOTHING = memoryview(b"")


@dataclass(slots=True)
class WorkRequest:
    """What to run. Not changed after it was submitted.

    payload: the inputs' bytes as `wire.tensors` lays them out; best a view from `WorkService.reserve`, else it is copied once.
    outputs: names, empty for all. priority: 0 first, 9 last. timeout_seconds: for queue and run together; 0 is the run's limit.
    owner: the client's node id, empty for this node's own work. share: the order allows other clients in the same worker.
    tolerance: the order accepts results within a tolerance. exact: the order asks for exact results: never batched.
    """

    model_id: bytes
    headers: Sequence[ValueHeader]
    payload: memoryview
    outputs: Sequence[str] = ()
    priority: int = 5
    timeout_seconds: float = 0.0
    owner: bytes = b""
    share: bool = False
    tolerance: bool = False
    exact: bool = False


@dataclass(slots=True)
class WorkOutcome:
    """What became of a call. On failure `reason` is set and there is no payload.

    payload: the outputs' bytes, often in a worker's memory: valid until `WorkTicket.release`. seconds: in the worker; a batch's
    time is divided by its rows. engine: name and version of what computed it.
    """

    headers: tuple[ValueHeader, ...] = ()
    payload: memoryview = field(default_factory=lambda: NOTHING)
    seconds: float = 0.0
    engine: str = ""
    reason: Reason | None = None
    detail: str = ""


OnDone = Callable[[WorkOutcome], None]


class WorkTicket:
    """A submitted call: cancel it while it lives, release its output when that is no longer needed."""

    __slots__ = (
        "attempts", "batch_key", "call_id", "deadline", "encoded_headers", "handle", "is_done", "key", "on_done", "queued_at",
        "request", "rows", "run_id", "service", "slot",
    )  # fmt: skip

    def __init__(self, service: "Dispatcher", call_id: int, request: WorkRequest, key: bytes, on_done: OnDone) -> None:
        self.service = service
        self.call_id = call_id
        self.request = request
        self.key = key
        self.on_done = on_done
        self.attempts = 0
        self.batch_key: Key | None = None
        self.deadline = 0.0
        self.encoded_headers = b""
        self.handle: Handle | None = None
        self.is_done = False
        self.queued_at = 0.0
        self.rows = 1
        self.run_id = 0
        self.slot: Slot | None = None

    def cancel(self) -> None:
        """End the call early; `on_done` runs with CANCELLED, at once if it had not started. Idempotent."""
        self.service.cancel(self)

    def release(self) -> None:
        """Say that the outcome's payload is no longer needed. Idempotent; to be called once for every finished call."""
        handle = self.handle
        if handle is not None and self.is_done:
            self.handle = None
            self.service.release(handle, self.run_id)
