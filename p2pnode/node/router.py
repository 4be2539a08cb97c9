"""From message to handler: one dictionary look-up per request, synchronous all the way for the calls that must be quick.

Whatever a peer sends, the worst it can cost is its own link: refusals are answered, violations close the link and lower the
score, and a bug met while serving is counted and closes the link. Under `strict` (tests, simulations) a bug stops the node,
so that it is found.
"""

import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Final, Protocol

import trio

from p2pnode.errors import ProtocolViolation as Violation
from p2pnode.errors import Refused, WorkError
from p2pnode.ids import short
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.transport.requests import Incoming
from p2pnode.wire.registry import Message

TASKS_MAX: Final = 256
Handler = Callable[[Incoming], bool]
TaskHandler = Callable[[Incoming], Awaitable[None]]
_log = logging.getLogger(__name__)


class OnViolation(Protocol):
    """Who is told that a peer broke the protocol."""

    def __call__(self, node_id: bytes, reason: Reason) -> None:
        """Lower the peer's score."""
        ...


class Router:
    """Gives every incoming request to its handler. Call the router itself from the transport's reader."""

    def __init__(self, metrics: Metrics, on_violation: OnViolation, *, strict: bool = False, tasks_max: int = TASKS_MAX) -> None:
        self._metrics = metrics
        self._on_violation = on_violation
        self._strict = strict
        self._handlers: dict[type[Message], Handler] = {}
        self._tasks_max = tasks_max
        self._tasks = 0
        self._nursery: trio.Nursery | None = None

    def register(self, classes: Iterable[type[Message]], handler: Handler) -> None:
        """Send these messages to a plain function that answers at once or arranges the answer. It gives False to refuse."""
        for cls in classes:
            if cls in self._handlers:
                raise RuntimeError(f"{cls.__name__} has a handler already")
            self._handlers[cls] = handler

    def register_task(self, classes: Iterable[type[Message]], handler: TaskHandler) -> None:
        """Send these messages to an async function, each in its own task; beyond the limit they are refused as busy."""

        def start(incoming: Incoming) -> bool:
            if self._nursery is None:
                incoming.refuse(Reason.SHUTTING_DOWN)
            elif self._tasks >= self._tasks_max:
                self._metrics.add("limit_hits_total", "router_tasks_max")
                incoming.refuse(Reason.BUSY)
            else:
                self._tasks += 1
                self._nursery.start_soon(self._run_task, handler, incoming)
            return True

        self.register(classes, start)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the tasks of async handlers until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    def __call__(self, incoming: Incoming) -> None:
        """Handle one request; never raises unless strict."""
        message = incoming.message
        handler = self._handlers.get(type(message))
        if handler is None:
            incoming.refuse(Reason.UNKNOWN_MESSAGE, "")
            return
        try:
            if not handler(incoming):
                incoming.refuse(Reason.UNKNOWN_MESSAGE, "")
        except Exception as error:  # the peer pays with its link, the node goes on; strict raises again
            self.failed(incoming, error)

    async def _run_task(self, handler: TaskHandler, incoming: Incoming) -> None:
        try:
            await handler(incoming)
        except Exception as error:  # as above
            self.failed(incoming, error)
        finally:
            self._tasks -= 1

    def failed(self, incoming: Incoming, error: Exception) -> None:
        """Answer a request whose handler raised; also for handlers that run in other services' tasks. Raises if strict."""
        peer = incoming.link.peer.node_id
        if isinstance(error, Refused | WorkError):
            incoming.refuse(error.reason, error.detail)
        elif isinstance(error, Violation):
            self._metrics.add("violations_total", error.reason.value)
            incoming.refuse(error.reason, error.detail)
            self._on_violation(peer, error.reason)
            incoming.link.close(error.reason)
        else:
            self._metrics.add("bugs_total", type(error).__name__)
            about = {"message_class": type(incoming.message).__name__}
            _log.error("bug while serving %s", short(peer), exc_info=error, extra=about)
            if self._strict:
                raise error
            incoming.link.close(Reason.INTERNAL)
