"""The sending side of a link: from the session's outbox to the stream, at once where possible, by a task where not."""

import mmap
from collections.abc import Callable

import trio

from p2pnode.environment import ByteStream, Clock
from p2pnode.errors import PeerError
from p2pnode.metrics import Metrics
from p2pnode.transport.limits import Limits
from p2pnode.transport.session import Session

# One turn sends at most this many buffers (2 MiB) before the other tasks get theirs.
_FLUSHES_PER_TURN = 8


class Pump:
    """Moves what a session has to say into a stream.

    corked: hold everything back until the next `flush`. blocked: the kernel has no room. progress_at: when bytes last left.
    on_failure: told the error that ended the sending, once.
    """

    def __init__(
        self,
        stream: ByteStream,
        session: Session,
        limits: Limits,
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
        # An anonymous mapping: pages that no traffic reaches cost nothing.
        self._sealed = memoryview(mmap.mmap(-1, limits.send_buffer_bytes))
        self._start = self._end = 0
        self._flushing = False
        self._failed = False
        self._task: trio.lowlevel.Task | None = None
        self._due = False

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
        self._flushing = True
        try:
            self._send_turn()
        except PeerError as error:
            self._failed = True
            self._on_failure(error)
        finally:
            self._flushing = False

    def wake(self) -> None:
        """Let the writer task flush at the end of this scheduling tick."""
        self._due = True
        if self._task is not None:
            task, self._task = self._task, None
            trio.lowlevel.reschedule(task)

    async def run(self) -> None:
        """The writer task: flushes when woken, and waits for room when there is none."""
        while not self._failed:
            if not self._due:
                self._task = trio.lowlevel.current_task()
                await trio.lowlevel.wait_task_rescheduled(self._abort)
            self._due = False
            if self.blocked:
                await self._wait_for_room()
            self.flush()
            if self._due and not self.blocked:
                await trio.lowlevel.checkpoint()

    async def drain(self) -> None:
        """Send what is queued, however long it takes; the caller sets the limit."""
        while not self._failed and (self.blocked or self._start < self._end or self._session.outbox.has_output):
            if self.blocked:
                await self._wait_for_room()
            self.flush()
            await trio.lowlevel.checkpoint()

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
        for _ in range(_FLUSHES_PER_TURN):
            if self._start == self._end:
                self._start = 0
                self._end = self._session.output(self._sealed)
                if self._end == 0:
                    break
            sent = self._stream.send_nowait((self._sealed[self._start : self._end],))
            self._start += sent
            sent_total += sent
            if self._start < self._end:
                self.blocked = True
                self.wake()
                break
            if not box.has_output:
                break
        else:
            self.wake()
        if sent_total:
            self.progress_at = self._clock.monotonic()
            self._metrics.add("sent_bytes_total", amount=sent_total)

    def _abort(self, _: object) -> trio.lowlevel.Abort:
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED
