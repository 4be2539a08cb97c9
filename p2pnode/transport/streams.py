"""Attachments in flight: one object per direction and request, with its credit window.

The receiver grants credit as an absolute offset: the sender may send up to that byte. Windows start at what the session has
learned and double, up to a limit, whenever half a window is used up faster than two round trips (or the growth time of
`limits`, if longer): a fast path is never held back by its first window, a slow reader never has more on the way than it
granted.
"""

from collections.abc import Callable
from typing import TypeAlias

from p2pnode.environment import Buffer

# Gives the memory for an attachment, exactly as long as that; None: nobody wants it any more.
SinkSource: TypeAlias = Callable[[], memoryview | None]
# Given what has come of an attachment, from its start, each time it has become more.
OnBytes: TypeAlias = Callable[[memoryview], None]


class OutgoingStream:
    """An attachment that leaves: the sender's own buffers, in order, never copied until they are sealed."""

    __slots__ = ("_chunk", "_chunks", "_offset", "is_queued", "limit", "number", "on_sent", "progress_at", "sent", "size")

    def __init__(
        self, number: int, chunks: list[Buffer], size: int, limit: int, on_sent: Callable[[], None] | None, now: float
    ) -> None:
        self.number = number
        self.size = size
        self.sent = 0
        self.limit = min(limit, size)
        self.on_sent = on_sent
        self.is_queued = False
        self.progress_at = now
        self._chunks = chunks
        self._chunk = 0
        self._offset = 0

    def take(self, size: int) -> Buffer:
        """Give exactly the next `size` bytes: a view of the owner's memory, or joined bytes where chunks meet."""
        self.sent += size
        chunk = self._chunks[self._chunk]
        end = self._offset + size
        if end <= len(chunk):
            piece = memoryview(chunk)[self._offset : end]
            self._offset = end
            if end == len(chunk):
                self._chunk += 1
                self._offset = 0
            return piece
        parts = []
        while size:
            chunk = self._chunks[self._chunk]
            part = memoryview(chunk)[self._offset : self._offset + size]
            parts.append(part)
            size -= len(part)
            self._offset += len(part)
            if self._offset == len(chunk):
                self._chunk += 1
                self._offset = 0
        return b"".join(parts)


class IncomingStream:
    """An attachment that arrives: into a sink where the handler has named one, else into `pending` until it does.

    source: gives the sink when the first bytes come. announced: bytes for which DATA frames have come; received: bytes that
    have come; granted: credit given so far.
    """

    __slots__ = (
        "announced",
        "checked_at",
        "checked_received",
        "dropped",
        "granted",
        "granted_at",
        "moved_at",
        "number",
        "on_bytes",
        "pending",
        "received",
        "sink",
        "size",
        "source",
        "window",
    )

    def __init__(self, number: int, size: int, assumed: int, window: int, now: float) -> None:
        self.number = number
        self.size = size
        self.window = window
        self.granted = min(assumed, size)
        self.granted_at = now
        self.announced = 0
        self.received = 0
        self.sink: memoryview | None = None
        self.source: SinkSource | None = None
        self.on_bytes: OnBytes | None = None
        self.pending = bytearray()
        self.dropped = False
        self.moved_at = now
        self.checked_at = now
        self.checked_received = 0

    @property
    def complete(self) -> bool:
        """True once every byte is in the sink."""
        return self.sink is not None and self.received == self.size

    def credit(self, now: float, growth_seconds: float, window_max: int) -> int | None:
        """Give the new absolute credit if it is time to grant some, and let the window grow where it was used up fast."""
        if self.granted >= self.size or self.granted - self.received > self.window >> 1:
            return None
        if now - self.granted_at < growth_seconds and self.window < window_max:
            self.window = min(window_max, self.window * 2)
        self.granted_at = now
        self.granted = min(self.size, self.received + self.window)
        return self.granted

    @property
    def is_awaited(self) -> bool:
        """True while the peer has credit, and bytes have somewhere to go."""
        return self.received < self.granted and (self.sink is not None or self.source is not None)

    def is_slow(self, now: float, session_received: int, rate: float, seconds: float) -> bool:
        """Say whether the peer, which owes this stream bytes, stayed under the rate with all of its streams for a whole period.

        session_received: attachment bytes that have come on all streams of the session, which are sent one after another.
        """
        if now - self.checked_at < seconds:
            return False
        slow = self.is_awaited and session_received - self.checked_received < rate * (now - self.checked_at)
        self.checked_at = now
        self.checked_received = session_received
        return slow
