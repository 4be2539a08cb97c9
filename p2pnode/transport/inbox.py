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
from p2pnode.transport.frames import ReceiveCipher, bad_frame
from p2pnode.transport.limits import BufferBudget, Limits
from p2pnode.transport.outbox import Outbox
from p2pnode.transport.streams import IncomingStream, OnBytes, SinkSource


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
        # All attachment bytes that have come.
        self.received = 0
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

    def accept(
        self, number: int, sink: memoryview | SinkSource, on_bytes: OnBytes | None, now: float, rtt_seconds: float
    ) -> None:
        """Name where an attachment goes; what has already come is copied there at once.

        on_bytes: given what lies in the sink each time it has become more. A function instead of memory is asked when
        the first bytes are there: attachments come one after another, so that the last of many may wait long, and would hold
        its memory for nothing.
        """
        stream = self.streams.get(number)
        if stream is None or stream.sink is not None or stream.source is not None:
            return
        stream.moved_at = stream.checked_at = now
        stream.checked_received = self.received
        stream.on_bytes = on_bytes
        if isinstance(sink, memoryview):
            stream.sink = sink
        else:
            stream.source = sink
            if not stream.announced or not self._take_sink(stream):
                return
        held = len(stream.pending)
        if held and stream.sink is not None:
            stream.sink[:held] = stream.pending
            if on_bytes is not None:
                on_bytes(stream.sink[:held])
        self._budget.give(stream.announced)
        stream.pending = bytearray()
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

    def announce(self, number: int, burst: int, now: float) -> None:
        """A DATA frame: this many bytes follow. Raises ProtocolViolation(FLOW_CONTROL) beyond the credit."""
        if burst == 0:
            raise bad_frame("an empty burst")
        stream = self.streams.get(number)
        if stream is not None:
            if stream.announced + burst > stream.granted:
                raise self._over_credit()
            if stream.source is not None and not self._take_sink(stream):
                stream = None
            elif stream.sink is None and not self._budget.take(burst):
                self._give_up(number)
                self.drop(number)
                stream = None
            else:
                stream.announced += burst
                stream.moved_at = now
        if stream is None:
            # On its way when we dropped the stream: as many bytes as it had credit for, and no more.
            self._discard_allowance -= burst
            if self._discard_allowance < 0:
                raise self._over_credit()
        self.burst_left = burst
        self._burst_stream = stream

    def receive_burst(self, data: memoryview, cipher: ReceiveCipher, now: float, rtt_seconds: float) -> int:
        """Open the whole records at the start of `data` that belong to the burst; give the bytes used. Overwrites `data`.

        Raises ProtocolViolation.
        """
        stream, left, used, end_of_data = self._burst_stream, self.burst_left, 0, len(data)
        is_wanted = stream is not None and not stream.dropped
        sink = stream.sink if stream is not None and is_wanted else None
        first = position = stream.received if stream is not None else 0
        while left and end_of_data - used >= frames.RECORD_PREFIX:
            end = used + frames.RECORD_PREFIX + ((data[used] << 8) | data[used + 1])
            if end > end_of_data:
                break
            size = end - used - frames.RECORD_OVERHEAD
            if not 0 < size <= left:
                raise bad_frame("a record does not fit its burst")
            sealed = data[used + frames.RECORD_PREFIX : end]
            if sink is not None:
                cipher.open_into(sealed, sink[position : position + size])
            else:
                cipher.open_into(sealed, sealed)
                if stream is not None and is_wanted:
                    stream.pending += sealed[:size]
            position += size
            left -= size
            used = end
        self.received += position - first
        self.burst_left = left
        if stream is not None and is_wanted and used:
            stream.received = position
            if sink is not None:
                if stream.on_bytes is not None:
                    stream.on_bytes(sink[:position])
                self._progress(stream, now, rtt_seconds)
        return used

    def is_slow(self, now: float) -> bool:
        """Say whether attachments that the peer has credit for come slower, all together, than the least rate."""
        limits, slow = self._limits, False
        for stream in self.streams.values():  # every one is asked, because asking starts its next period
            slow = stream.is_slow(now, self.received, limits.minimum_rate, limits.minimum_rate_seconds) or slow
        return slow

    def stalled(self, now: float) -> bool:
        """Say whether of some attachment nothing has come for too long, though the peer has credit for it."""
        limit = self._limits.stream_stall_seconds
        return any(now - stream.moved_at > limit and stream.is_awaited for stream in self.streams.values())

    def _take_sink(self, stream: IncomingStream) -> bool:
        """Ask for a stream's memory, now that bytes are there; False, with the stream dropped, if nobody wants them any more."""
        source, stream.source = stream.source, None
        stream.sink = source() if source is not None else None
        if stream.sink is None:
            self.drop(stream.number)
        return stream.sink is not None

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
