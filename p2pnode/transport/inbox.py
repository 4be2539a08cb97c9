"""What arrives as attachments: who may send how much, and where it goes.

Pure, like the session it belongs to. A stream without a sink keeps its first window in memory that is counted against the
node's budget; with a sink, records are opened straight into it.
"""

from collections.abc import Callable

from p2pnode.errors import ProtocolViolation
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.transport import frames
from p2pnode.transport.events import AttachmentArrived, Event
from p2pnode.transport.frames import bad_frame
from p2pnode.transport.limits import BufferBudget, Limits
from p2pnode.transport.outbox import Outbox
from p2pnode.transport.streams import IncomingStream


class Inbox:
    """The arriving attachments of one session.

    streams: by request number. window: what this session has learned; streams start with it. burst_left: attachment bytes
    that the next records must bring before any frame. give_up: called with a number whose attachment cannot be kept.
    """

    def __init__(
        self,
        limits: Limits,
        metrics: Metrics,
        budget: BufferBudget,
        outbox: Outbox,
        events: list[Event],
        give_up: Callable[[int], None],
    ) -> None:
        self.streams: dict[int, IncomingStream] = {}
        self.window = limits.window_initial_bytes
        self.burst_left = 0
        self._burst_stream: IncomingStream | None = None
        # Bytes that may still come for streams we have dropped.
        self._discard_allowance = 0
        self._limits = limits
        self._metrics = metrics
        self._budget = budget
        self._outbox = outbox
        self._events = events
        self._give_up = give_up

    def open(self, number: int, size: int, assumed: int, now: float) -> None:
        """An attachment of `size` bytes will come; its sender assumes this first window."""
        self.streams[number] = IncomingStream(number, size, assumed, max(assumed, self.window), now)

    def discard(self, size: int, assumed: int) -> None:
        """An attachment will come that nobody wants: as much of it as the first window allows."""
        self._discard_allowance += min(size, assumed)

    def accept(self, number: int, sink: memoryview, now: float, rtt_seconds: float) -> None:
        """Name where an attachment goes; what has already come is copied there at once."""
        stream = self.streams.get(number)
        if stream is None or stream.sink is not None:
            return
        stream.sink = sink
        sink[: len(stream.pending)] = stream.pending
        self._budget.give(stream.announced)
        stream.pending = bytearray()
        stream.checked_at = now
        stream.checked_received = stream.received
        self._progress(stream, now, rtt_seconds)

    def drop(self, number: int) -> None:
        """Forget an attachment; what its credit still allows to come will be discarded."""
        stream = self.streams.pop(number, None)
        if stream is not None:
            stream.dropped = True
            self._discard_allowance += stream.granted - stream.announced
            if stream.sink is None:
                self._budget.give(stream.announced)
            stream.pending = bytearray()

    def close(self) -> None:
        """The session is over: forget everything, and its owner with it."""
        for number in list(self.streams):
            self.drop(number)
        self._give_up = _nobody

    def announce(self, number: int, burst: int) -> None:
        """A DATA frame: this many bytes follow. Raises ProtocolViolation(FLOW_CONTROL) beyond the credit."""
        if burst == 0:
            raise bad_frame("an empty burst")
        stream = self.streams.get(number)
        if stream is not None:
            if stream.announced + burst > stream.granted:
                raise self._over_credit()
            if stream.sink is None and not self._budget.take(burst):
                self._give_up(number)
                self.drop(number)
                stream = None
            else:
                stream.announced += burst
        if stream is None:
            # On its way when we dropped the stream: as many bytes as it had credit for, and no more.
            self._discard_allowance -= burst
            if self._discard_allowance < 0:
                raise self._over_credit()
        self.burst_left = burst
        self._burst_stream = stream

    def target(self, sealed: memoryview) -> memoryview:
        """Give where to open the next record of a burst: the sink, or the record itself."""
        size = len(sealed) - (frames.RECORD_OVERHEAD - frames.RECORD_PREFIX)
        if size > self.burst_left or size <= 0:
            raise bad_frame("a record does not fit its burst")
        stream = self._burst_stream
        if stream is None or stream.dropped or stream.sink is None:
            return sealed
        return stream.sink[stream.received : stream.received + size]

    def took(self, plain: memoryview, now: float, rtt_seconds: float) -> None:
        """A record of a burst was opened to where `target` said."""
        self.burst_left -= len(plain)
        stream = self._burst_stream
        if stream is None or stream.dropped:
            return
        stream.received += len(plain)
        if stream.sink is None:
            stream.pending += plain
        else:
            self._progress(stream, now, rtt_seconds)

    def is_slow(self, now: float) -> bool:
        """Say whether some attachment comes slower than the least rate."""
        limits, slow = self._limits, False
        for stream in self.streams.values():  # every one is asked, because asking starts its next period
            slow = stream.is_slow(now, limits.minimum_rate, limits.minimum_rate_seconds) or slow
        return slow

    def _progress(self, stream: IncomingStream, now: float, rtt_seconds: float) -> None:
        """After bytes reached a sink: finish the stream or grant more credit."""
        if stream.received == stream.size:
            del self.streams[stream.number]
            self._events.append(AttachmentArrived(stream.number))
            return
        growth = max(self._limits.window_growth_seconds, 2 * rtt_seconds)
        offset = stream.credit(now, growth, self._limits.window_bytes_max)
        if offset is not None:
            self._outbox.queue(frames.CREDIT, stream.number, frames.EIGHT_BYTES.pack(offset))
            if stream.window > self.window:
                self.window = stream.window
                self._outbox.queue(frames.WINDOW, 0, frames.FOUR_BYTES.pack(stream.window))

    def _over_credit(self) -> ProtocolViolation:
        self._metrics.add("limit_hits_total", "window_bytes_max")
        return ProtocolViolation(Reason.FLOW_CONTROL, "more bytes than there was credit for")


def _nobody(number: int) -> None:
    """Nobody is left to be told."""
