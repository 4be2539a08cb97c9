"""A link: one session with one verified peer over one stream, and the task that drives it.

The hot path has no task hops: the reader takes what the kernel has, and for each record hands requests to the router and
replies to whoever waits; what they send is collected and leaves in one call when the batch is done. Sends from elsewhere
leave at once when nothing else is in flight, and otherwise together, at the end of the scheduling tick. Whenever the kernel has
no room, a task of the pump's waits for it.
"""

import contextlib
import math
import mmap
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import trio

from p2pnode.environment import Buffer, ByteStream
from p2pnode.errors import PeerError, ProtocolViolation, Refused, Unreachable
from p2pnode.reasons import Reason
from p2pnode.transport.dispatch import Dispatcher, LinkSurroundings
from p2pnode.transport.frames import RECORD_SIZE_MAX
from p2pnode.transport.handshake import Established
from p2pnode.transport.pump import Pump
from p2pnode.transport.requests import Incoming, Pending, Reply
from p2pnode.transport.session import Session
from p2pnode.transport.streams import OnBytes, SinkSource
from p2pnode.wire.codec import encode_numbered
from p2pnode.wire.registry import Message

Result = TypeVar("Result")
# How soon a link that became busy is looked at, and how often while it is; every time-out is many times longer.
_SOON_SECONDS = 5.0
_BUSY_SECONDS = 1.0
# How long to poll for an answer (again if something else came, at most so often), and when again after polls in vain.
_POLL_SECONDS, _POLLS_MAX, _VAIN_POLLS_MAX, _POLL_AGAIN = 0.0004, 4, 3, 16
# The first receive buffer of a link. It doubles up to the size from which on the whole is mapped.
_FIRST_BUFFER_BYTES = 2048
_MAPPED_BYTES_MIN = 65_536


class Link:
    """An open session with a verified peer. `request` may be used from any task, everything else from plain code too.

    peer: who it is. closed: the reason once it is over. successor: the link that took this one's place, if one did.
    memo: what a layer above keeps with the link, which would be looked up at each request otherwise.
    """

    def __init__(self, stream: ByteStream, established: Established, leftover: bytes, around: LinkSurroundings) -> None:
        self.peer = established.peer
        self.closed: Reason | None = None
        self.successor: Link | None = None
        self.memo: object = None
        self._serial = next(around.serials) << 32
        self._stream = stream
        self._around = around
        self._metrics = around.metrics
        self._clock = around.clock
        limits = self._limits = around.limits
        self._session = Session(
            established.sender,
            established.receiver,
            not self.peer.inbound,
            limits,
            around.metrics,
            around.budget,
            around.clock.monotonic(),
        )
        # It starts small and grows where traffic fills it, so that a link that only asks and answers stays at a few kilobytes.
        self._received = memoryview(bytearray(max(min(_FIRST_BUFFER_BYTES, limits.receive_buffer_bytes), len(leftover))))
        self._received[: len(leftover)] = leftover
        self._start, self._end_of_data = 0, len(leftover)
        self._pump = Pump(stream, self._session, around.turn, around.metrics, around.clock, self._failed)
        self._record_at = around.clock.monotonic()
        self._dispatcher = Dispatcher(self.peer.node_id, self._session, around)
        self._scope = trio.CancelScope()
        self._is_parked = False
        self._polls = self._vain_polls = 0
        self._retire_at = float("inf")
        # When `tick` next has something to do, if nothing happens until then.
        self.due_at = 0.0

    # --- for the layers above ----------------------------------------------------------------------------------------

    @property
    def pinned(self) -> bool:
        """Whether the link is kept alive while idle."""
        return self._session.pinned

    @pinned.setter
    def pinned(self, value: bool) -> None:
        self._session.pinned = value
        self.due_at = 0.0

    @property
    def is_busy(self) -> bool:
        """Whether anything is in flight, half arrived or held up, so that `tick` looks at it every second."""
        return self._session.is_busy or self._pump.blocked or self._end_of_data > self._start

    def idle_since(self) -> float:
        """Give when the link last carried a message; never, as infinity, for one that is kept, in use or over."""
        session = self._session
        is_used = session.pinned or session.waiting or session.open_requests or self.closed is not None
        return math.inf if is_used else session.active_at

    @property
    def local_address(self) -> str:
        """`host:port` of this end, as this machine knows it."""
        return self._stream.local_address

    @property
    def rtt_seconds(self) -> float:
        """The smallest round trip measured, 0 before the first."""
        return self._session.rtt_seconds

    @property
    def requests_in_flight(self) -> int:
        """Our requests without a reply, plus the peer's that are being answered."""
        return len(self._session.waiting) + len(self._session.open_requests)

    @property
    def answering(self) -> int:
        """The peer's requests that are not yet fully answered."""
        return len(self._session.open_requests)

    async def request(
        self, message: Message, attachment: Sequence[Buffer] = (), *, sink: Callable[[int], memoryview] | None = None
    ) -> Reply:
        """Send a request and wait for its reply. Waits, too, while as many requests are open as the peer allows.

        attachment: buffers that must not change until the reply is there. sink: given the size of the reply's attachment,
        gives the memory for it, exactly that long; without one it is allocated. Cancelled: the peer is told, and nothing is
        left. Raises Refused (by the peer, or before sending), Unreachable when the link ends first, and ProtocolViolation
        when the reply is not a message.
        """
        while len(self._session.waiting) >= self._limits.requests_in_flight_max and self.closed is None:
            await self._dispatcher.wait_for_room()
        task = trio.lowlevel.current_task()
        outcome: list[Reply | PeerError] = []
        waiting = False

        def on_reply(reply: Reply | PeerError) -> None:
            outcome.append(reply)
            if waiting:
                trio.lowlevel.reschedule(task)

        request_id = self.request_nowait(message, attachment, on_reply, sink)
        if outcome:
            await trio.lowlevel.checkpoint()
        else:

            def abort(_: object) -> trio.lowlevel.Abort:
                self.cancel(request_id)
                return trio.lowlevel.Abort.SUCCEEDED

            waiting = True
            await trio.lowlevel.wait_task_rescheduled(abort)
        result = outcome[0]
        if isinstance(result, Reply):
            return result
        raise result

    def request_nowait(
        self,
        message: Message,
        attachment: Sequence[Buffer],
        on_reply: Callable[[Reply | PeerError], None],
        sink: Callable[[int], memoryview] | None = None,
    ) -> int:
        """Send a request and give its id for `cancel`. `on_reply` runs once, unless cancelled, in the event loop.

        Raises Refused(TOO_MANY_REQUESTS) at the limit of open requests, Refused(TOO_LARGE), Unreachable on a closed link.
        """
        if self.successor is not None and self.successor.closed is None:
            return self.successor.request_nowait(message, attachment, on_reply, sink)
        session = self._session
        if self.closed is not None:
            raise Unreachable(f"the link is closed: {self.closed.value}")
        if len(session.waiting) >= self._limits.requests_in_flight_max:
            self._metrics.add("limit_hits_total", "requests_in_flight_max")
            raise Refused(Reason.TOO_MANY_REQUESTS, "this node's own requests on the link")
        now = self._clock.monotonic()
        is_silent = session.advance(now)
        if self.due_at > now + _SOON_SECONDS:
            self.due_at = now + _SOON_SECONDS
        try:
            number = session.send_request(Pending(on_reply, sink), encode_numbered(message), attachment)
            if is_silent:
                session.send_ping(now)  # in the same record: if the peer is gone, it is known after `pong_seconds`
        except ProtocolViolation as error:
            self._violated(error)
            raise Unreachable(f"the link is closed: {error.reason.value}") from error
        self._pump.kick()
        return self._serial | number

    def cancel(self, request_id: int) -> None:
        """Give up a request of `request_nowait`; its `on_reply` will not run. Does nothing when it is over."""
        if request_id & ~0xFFFFFFFF != self._serial:
            if self.successor is not None:
                self.successor.cancel(request_id)
            return
        if self.closed is None:
            number = request_id & 0xFFFFFFFF
            pending = self._dispatcher.arriving.pop(number, None)
            if pending is not None:
                self.release(pending.reserved)
            self.guarded(self._session.send_cancel, number)
            self._dispatcher.make_room(1)
            self._pump.kick()

    def close(self, reason: Reason) -> None:
        """Say goodbye and end the link now; whatever is in flight fails on both sides. Idempotent."""
        if self.closed is None:
            self.guarded(self._session.send_goodbye, reason)
            self._pump.flush()
            self.end(reason)

    # --- for the transport's own files -------------------------------------------------------------------------------

    async def run(self) -> Reason:
        """Drive the link until it is over and give the reason. Cancelled: says goodbye first. Closes the stream."""
        try:
            with self._scope:
                await self._read()
        finally:
            self.close(Reason.SHUTTING_DOWN)
            if not self._pump.is_drained:
                with trio.move_on_after(self._limits.goodbye_seconds, shield=True) as goodbye:
                    await self._pump.drain()
                if goodbye.cancelled_caught:
                    self._metrics.add("limit_hits_total", "goodbye_seconds")
            self._pump.stop()
            self._stream.close()
        return self.closed or Reason.CONNECTION_LOST

    def retire(self, successor: "Link | None") -> None:
        """Another link with the same peer has taken over: finish what is in flight, within a time, and end."""
        self.successor = successor
        self.due_at = self._retire_at = self._clock.monotonic() + self._limits.retire_seconds
        self.guarded(self._session.send_goodbye, Reason.DUPLICATE_SESSION)
        self._pump.flush()
        self._end_if_retired()

    def tick(self, now: float) -> None:
        """Do what is due by the clock; the service calls it when `due_at` has come."""
        if self.closed is not None:
            return
        limits = self._limits
        if now >= self._retire_at:
            self._metrics.add("limit_hits_total", "retire_seconds")
            self.end(Reason.DUPLICATE_SESSION)
            return
        if not self._session.numbers_left and self._session.is_quiet:
            self._metrics.add("limit_hits_total", "request_number_max")
            self.close(Reason.EXPIRED)
            return
        reason = self.guarded(self._session.tick, now)
        if self._pump.blocked and now - self._pump.progress_at >= limits.send_stall_seconds:
            self._metrics.add("limit_hits_total", "send_stall_seconds")
            reason = Reason.TOO_SLOW
        elif self._end_of_data > self._start and now - self._record_at >= limits.minimum_rate_seconds:
            self._metrics.add("limit_hits_total", "minimum_rate")
            reason = Reason.TOO_SLOW
        if reason is not None:
            self.close(reason)
        else:
            self._pump.kick()
            self.due_at = now + _BUSY_SECONDS if self.is_busy else min(self._session.due_at(), self._retire_at)

    def reserve(self, size: int) -> bool:
        """Count memory for an attachment against the node's budget; False if there is no room."""
        return self._around.budget.take(size)

    def release(self, size: int) -> None:
        """Give back what `reserve` took."""
        self._around.budget.give(size)

    def accept(self, incoming: Incoming, source: SinkSource, on_bytes: OnBytes | None) -> None:
        """Let an attachment flow, into the memory that `source` gives when its first bytes come."""
        if self.closed is None:
            self.guarded(self._session.accept, incoming.number, source, on_bytes)
            self._dispatcher.run(self)
            self._pump.kick()

    def answer(
        self, incoming: Incoming, message: Message, attachment: Sequence[Buffer], on_sent: Callable[[], None] | None
    ) -> None:
        """Send the reply to a request; `on_sent` runs even if nobody wants it any more."""
        self._dispatcher.incoming.pop(incoming.number, None)
        is_queued = False
        if self.closed is None and not incoming.cancelled:
            try:
                is_queued = self._session.send_reply(incoming.number, encode_numbered(message), attachment, on_sent)
            except Refused:
                self.guarded(self._session.send_refusal, incoming.number, Reason.INTERNAL, "the reply is too large")
            except ProtocolViolation as error:
                self._violated(error)
        if not is_queued and on_sent is not None:
            on_sent()
        self._pump.kick()

    def refuse(self, incoming: Incoming, reason: Reason, detail: str) -> None:
        """Send a refusal of a request."""
        self._dispatcher.incoming.pop(incoming.number, None)
        if self.closed is None and not incoming.cancelled:
            self.guarded(self._session.send_refusal, incoming.number, reason, detail)
            self._pump.kick()

    # --- arriving ----------------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        if self._end_of_data:
            self._process(self._clock.monotonic())
        while self.closed is None:
            self._is_parked = True
            try:
                await self._stream.wait_readable()
                count = self._stream.receive_nowait(self._received[self._end_of_data :])
            except Unreachable:
                count = 0
            finally:
                self._is_parked = False
            self._take(count)

    def poll(self) -> None:
        """Wait a moment for the answer to the only open request, outside the event loop, whose turns are long for a quick call.

        After some polls in vain, as over any but the shortest path, it is tried only now and then.
        """
        session = self._session
        if len(session.waiting) != 1 or not self._is_parked or self._pump.blocked or session.outbox.streams:
            return
        self._polls += 1
        if self._vain_polls >= _VAIN_POLLS_MAX and self._polls % _POLL_AGAIN:
            return
        for _ in range(_POLLS_MAX):
            try:
                count = self._stream.poll(self._received[self._end_of_data :], _POLL_SECONDS)
            except Unreachable:
                count = 0
            self._take(count)
            if count <= 0 or not session.waiting:
                break
        self._vain_polls = self._vain_polls + 1 if session.waiting else 0

    def _take(self, count: int) -> None:
        """So many bytes have come: 0 means the end, less than that nothing."""
        if count > 0:
            self._end_of_data += count
            self._metrics.add("received_bytes_total", amount=count)
            self._process(self._clock.monotonic())
        elif count == 0:
            self.end(self._session.heard_goodbye or Reason.CONNECTION_LOST)

    def _process(self, now: float) -> None:
        """Handle every whole record that is there, then send what came of them in one go."""
        session, data, start, end = self._session, self._received, self._start, self._end_of_data
        self._pump.corked = True
        frames_before = session.frames_received
        has_handed_on = False
        try:
            while True:
                used = session.receive(data[start:end], now)
                if used == 0:
                    break
                start += used
                if session.events:
                    has_handed_on = True
                    self._dispatcher.run(self)
                    if self.closed is not None:
                        return
        except ProtocolViolation as error:
            self._violated(error)
            return
        finally:
            self._pump.corked = False
        if has_handed_on:
            # Answers that are only microseconds away leave now, a lone one before what else there is to do about it.
            self._around.before_flush()
        if start > self._start or end == start:
            self._record_at = now
        was_full = end == len(data)
        if start == end:
            start = end = 0
        elif len(data) - start < RECORD_SIZE_MAX:
            data[: end - start] = data[start:end]
            start, end = 0, end - start
        self._start, self._end_of_data = start, end
        if was_full and len(data) < self._limits.receive_buffer_bytes:
            self._grow()
        self._metrics.add("frames_received_total", amount=session.frames_received - frames_before)
        self._pump.flush()
        if self.due_at > now + _SOON_SECONDS and self.is_busy:
            self.due_at = now + _SOON_SECONDS
        if self._session.said_goodbye is not None:
            self._end_if_retired()

    def _grow(self) -> None:
        """Traffic has filled the buffer: take a larger one. Mapped memory costs nothing where no traffic reaches it."""
        most = self._limits.receive_buffer_bytes
        size = min(most, 2 * len(self._received))
        larger = memoryview(bytearray(size) if size < min(most, _MAPPED_BYTES_MIN) else mmap.mmap(-1, most))
        larger[self._start : self._end_of_data] = self._received[self._start : self._end_of_data]
        self._received = larger

    # --- ending ------------------------------------------------------------------------------------------------------

    def guarded(self, function: Callable[..., Result], *arguments: object) -> Result | None:
        """Call into the session; if the peer has broken it, end the link instead."""
        try:
            return function(*arguments)
        except ProtocolViolation as error:
            self._violated(error)
            return None

    def _violated(self, error: ProtocolViolation) -> None:
        if self.closed is None:
            with contextlib.suppress(ProtocolViolation):
                self._session.send_goodbye(error.reason)
            self._pump.flush()
            self.end(error.reason)
            self._dispatcher.blame(error.reason)

    def _failed(self, error: PeerError) -> None:
        self.end(error.reason if isinstance(error, ProtocolViolation) else Reason.CONNECTION_LOST)

    def _end_if_retired(self) -> None:
        session = self._session
        if session.said_goodbye is not None and session.heard_goodbye is not None and session.is_quiet:
            self.end(Reason.DUPLICATE_SESSION)

    def end(self, reason: Reason) -> None:
        """The link is over: everybody who waits on it is told, once."""
        if self.closed is not None:
            return
        self.closed = reason
        if self._is_parked:
            self._scope.cancel()
        session = self._session
        waiting: list[Pending] = [*session.waiting.values(), *self._dispatcher.arriving.values()]
        session.waiting.clear()
        self._dispatcher.arriving.clear()
        for pending in waiting:
            self._dispatcher.deliver(pending, Unreachable(f"the link ended: {reason.value}"))
        unanswered = list(self._dispatcher.incoming.values())
        self._dispatcher.incoming.clear()
        for incoming in unanswered:
            incoming.cancel()
        self._dispatcher.make_room(sys.maxsize)
        session.close()
