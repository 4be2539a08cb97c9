"""The sending side of a link: from the session's outbox to the stream, at once where possible, by a task where not.

A node has one `Turn` for all its pumps: the end of the scheduling tick, where what was queued by several leaves together, and
the buffers to seal into. So a link that never found its stream full has neither a task nor a buffer of its own.
"""

import mmap
from collections.abc import Callable

import trio

from p2pnode.environment import ByteStream, Clock
from p2pnode.errors import PeerError
from p2pnode.metrics import Metrics
from p2pnode.transport.session import Session

# One turn sends at most this many buffers (2 MiB) before the other tasks get theirs.
_FLUSHES_PER_TURN = 4
# Free buffers that are kept: one in use at a time, and one more where a handler sends on another link meanwhile.
_FREE_BUFFERS_MAX = 2


class Turn:
    """What the pumps of one node share. `run` flushes, at the end of each scheduling tick, the pumps that asked for it."""

    def __init__(self, buffer_bytes: int) -> None:
        self.nursery: trio.Nursery | None = None
        self._buffer_bytes = buffer_bytes
        self._free: list[memoryview] = []
        self._due: list[Pump] = []
        self._task: trio.lowlevel.Task | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Work until cancelled. The tasks of pumps whose stream is full live in its nursery."""
        try:
            async with trio.open_nursery() as self.nursery:
                task_status.started()
                while True:
                    if self._due:
                        await trio.lowlevel.checkpoint()
                    else:
                        self._task = trio.lowlevel.current_task()
                        await trio.lowlevel.wait_task_rescheduled(self._abort)
                    due, self._due = self._due, []
                    for pump in due:
                        pump.flush_due()
        finally:
            self.nursery = None

    def wake(self, pump: "Pump") -> None:
        """Flush a pump at the end of this scheduling tick; it asks once a turn."""
        self._due.append(pump)
        task = self._task
        if task is not None:
            self._task = None
            trio.lowlevel.reschedule(task)

    def borrow(self) -> memoryview:
        """Give a buffer to seal into, until `give_back`."""
        # An anonymous mapping: pages that no traffic reaches cost nothing.
        return self._free.pop() if self._free else memoryview(mmap.mmap(-1, self._buffer_bytes))

    def give_back(self, buffer: memoryview) -> None:
        """Take a buffer back with nothing in it that is still to be sent."""
        if len(self._free) < _FREE_BUFFERS_MAX:
            self._free.append(buffer)

    def _abort(self, _: object) -> trio.lowlevel.Abort:
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED


class Pump:
    """Moves what a session has to say into a stream. Whoever owns it calls `drain`, or at least `stop`, at the end.

    corked: hold everything back until the next `flush`. blocked: the kernel has no room. progress_at: when bytes last left.
    on_failure: told the error that ended the sending, once.
    """

    def __init__(
        self,
        stream: ByteStream,
        session: Session,
        turn: Turn,
        metrics: Metrics,
        clock: Clock,
        on_failure: Callable[[PeerError], None],
    ) -> None:
        self.corked = False
        self.blocked = False
        self.progress_at = clock.monotonic()
        self._stream = stream
        self._session = session
        self._metrics = metrics
        self._clock = clock
        self._on_failure = on_failure
        self._turn = turn
        # Where sealed bytes wait that the stream had no room for; the turn's buffer otherwise.
        self._sealed: memoryview | None = None
        self._start = self._end = 0
        self._flushing = False
        self._failed = False
        self._due = False
        # The task that waits for room, once there was none: its scope while it lives, itself while it is parked.
        self._waiter: trio.CancelScope | None = None
        self._waiter_ended: trio.Event | None = None
        self._parked: trio.lowlevel.Task | None = None

    def kick(self) -> None:
        """Something was queued: send it now if it stands alone, else with what else is queued in this scheduling tick."""
        if self.corked or self.blocked or self._flushing:
            return
        session = self._session
        if len(session.waiting) + len(session.open_requests) <= 1:
            self.flush()
        else:
            self.wake()

    def flush(self) -> None:
        """Seal and send until nothing is left, the kernel has no room, or the turn is over."""
        if self.blocked or self._flushing or self._failed:
            return
        if self._start == self._end and not self._session.outbox.has_output:
            return
        self._flushing = True
        try:
            self._send_turn()
        except PeerError as error:
            self._failed = True
            self._on_failure(error)
        finally:
            self._flushing = False

    def wake(self) -> None:
        """Flush at the end of this scheduling tick."""
        if not self._due:
            self._due = True
            self._turn.wake(self)

    def flush_due(self) -> None:
        """The end of the tick has come."""
        self._due = False
        self.flush()

    async def drain(self) -> None:
        """Send what is queued, however long it takes; the caller sets the limit. Afterwards nothing of the pump is left."""
        if self._waiter is not None and self._waiter_ended is not None:
            self._waiter.cancel()
            await self._waiter_ended.wait()
        while not self._failed and (self.blocked or self._start < self._end or self._session.outbox.has_output):
            if self.blocked:
                await self._wait_for_room()
            self.flush()
            await trio.lowlevel.checkpoint()

    @property
    def is_drained(self) -> bool:
        """True if `drain` would have nothing to do."""
        is_empty = self._failed or not (self.blocked or self._start < self._end or self._session.outbox.has_output)
        return is_empty and self._waiter is None

    def stop(self) -> None:
        """Nothing more will be sent, and nobody is told of anything."""
        self._failed = True
        self._on_failure = _ignore
        if self._waiter is not None:
            self._waiter.cancel()

    def _block(self) -> None:
        """The stream has no room: let a task wait for it. While everything stops, only `drain` does."""
        self.blocked = True
        if self._parked is not None:
            task, self._parked = self._parked, None
            trio.lowlevel.reschedule(task)
        elif self._waiter_ended is None and self._turn.nursery is not None:
            self._waiter, self._waiter_ended = trio.CancelScope(), trio.Event()
            self._turn.nursery.start_soon(self._wait_and_flush, self._waiter, self._waiter_ended)

    async def _wait_and_flush(self, scope: trio.CancelScope, ended: trio.Event) -> None:
        try:
            with scope:
                while not self._failed:
                    if not self.blocked:
                        self._parked = trio.lowlevel.current_task()
                        await trio.lowlevel.wait_task_rescheduled(self._abort)
                    await self._wait_for_room()
                    self.flush()
        finally:
            self._waiter = None
            ended.set()

    async def _wait_for_room(self) -> None:
        try:
            await self._stream.wait_writable()
        except PeerError as error:
            self._failed = True
            self._on_failure(error)
        self.blocked = False

    def _send_turn(self) -> None:
        box = self._session.outbox
        sent_total = 0
        buffer = self._sealed or self._turn.borrow()
        for _ in range(_FLUSHES_PER_TURN):
            if self._start == self._end:
                self._start = 0
                self._end = self._session.output(buffer)
                if self._end == 0:
                    break
            sent = self._stream.send_nowait((buffer[self._start : self._end],))
            self._start += sent
            sent_total += sent
            if self._start < self._end:
                self._block()
                break
            if not box.has_output:
                break
        else:
            self.wake()
        if self._start < self._end:
            self._sealed = buffer
        else:
            self._sealed = None
            self._turn.give_back(buffer)
        if sent_total:
            self.progress_at = self._clock.monotonic()
            self._metrics.add("sent_bytes_total", amount=sent_total)

    def _abort(self, _: object) -> trio.lowlevel.Abort:
        self._parked = None
        return trio.lowlevel.Abort.SUCCEEDED


def _ignore(error: PeerError) -> None:
    """Nobody is left who would want to know."""
