"""What leaves a session: control frames that share records, then bursts of attachments, the one that is nearest its end first.

Pure, like the session it belongs to: frames are queued by `open`, `queue` and `credit`, and sealed by `output` into the
caller's buffer. Only headers and messages count towards the queue's limit; attachments wait in their owner's memory.
"""

from collections.abc import Callable, Sequence

from p2pnode.environment import Buffer
from p2pnode.errors import ProtocolViolation, Refused
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.transport import frames
from p2pnode.transport.frames import SendCipher
from p2pnode.transport.limits import Limits
from p2pnode.transport.streams import OutgoingStream

# The peer sees control frames between bursts. Where windows have grown, which they do on a fast path, half a megabyte passes
# within a millisecond, and longer bursts cost less: the send buffer then is filled by one.
_BURST_RECORDS = 4
_FAST_BURST_RECORDS = 8
_FAST_WINDOW_BYTES = 2 << 20
# Every so many bursts the attachment that has waited longest goes first, however much is left of it, if that was long.
_LONGEST_WAIT_EVERY = 8
_LONG_WAIT_SECONDS = 1.0


class Outbox:
    """The queue of one session's sending direction.

    streams: attachments on their way, by request number. frames_sent counts frames, data bursts included.
    """

    def __init__(self, cipher: SendCipher, limits: Limits, metrics: Metrics, now: float) -> None:
        self.streams: dict[int, OutgoingStream] = {}
        self.initial_window = limits.window_initial_bytes
        self.frames_sent = 0
        self._cipher = cipher
        self._limits = limits
        self._metrics = metrics
        # The record being filled: its plaintext parts, their size, and how much of it counts as control data.
        self._parts: list[Buffer] = []
        self._size = 0
        self._control = 0
        self._records: list[tuple[list[Buffer], int]] = []
        self._control_total = 0
        # Owners of attachments inside frames, and those whose frames are sealed: told at the next `output`, when these are sent.
        self._owners: list[Callable[[], None]] = []
        self._sealed_owners: list[Callable[[], None]] = []
        self._finished: Callable[[int], None] = lambda number: None
        self._ready: list[OutgoingStream] = []
        self._rekeyed_at = now
        self._since_rekey = 0
        self._bursts = 0

    def on_finished(self, callback: Callable[[int], None]) -> None:
        """Name who is told, by number, that a stream was sent to its last byte or forgotten."""
        self._finished = callback

    @property
    def has_output(self) -> bool:
        """True if `output` would write something, given room, or tell an owner that a buffer is free again."""
        return bool(self._parts or self._records or self._ready or self._sealed_owners)

    def open(
        self,
        kind: int,
        number: int,
        message: Buffer,
        attachment: Sequence[Buffer],
        on_sent: Callable[[], None] | None,
        now: float,
    ) -> None:
        """Queue a REQUEST or REPLY: with its attachment inside if that is small, else with a stream behind it.

        Raises Refused(TOO_LARGE) before anything is queued, ProtocolViolation(TOO_SLOW) when the queue is over its limit.
        """
        size = len(message)
        if size > self._limits.message_bytes_max:
            self._metrics.add("limit_hits_total", "message_bytes_max")
            raise Refused(Reason.TOO_LARGE, f"a message of {size} bytes; bulk data belongs into the attachment")
        chunks, total = frames.byte_views(attachment) if attachment else ([], 0)
        # When the peer reads slowly its queue is not fed with attachments too: they wait, as streams, at their owner.
        inline = total == 0 or (total + size <= self._limits.inline_bytes_max and len(self._records) < _BURST_RECORDS)
        window = 0 if inline else self.initial_window
        held = size + total if inline else size
        if held <= frames.PLAIN_SIZE_MAX - frames.OPEN_HEADER.size:
            header = frames.OPEN_HEADER.pack(kind, 0, 16 + held, number, size, window, total)
            self._append(header, message, chunks if inline else (), held + 24, size + 24)
        else:
            self._open_in_pieces(kind, number, message, window, total)
        if not inline:
            stream = self.streams[number] = OutgoingStream(number, chunks, total, window, on_sent, now)
            self._make_ready(stream)
        elif on_sent is not None:
            self._owners.append(on_sent)

    def queue(self, kind: int, number: int, body: bytes = b"") -> None:
        """Queue a small frame. Raises ProtocolViolation(TOO_SLOW) when the queue is over its limit."""
        size = frames.HEADER.size + len(body)
        self._append(frames.HEADER.pack(kind, 0, len(body), number), body, (), size, size)

    def credit(self, number: int, offset: int, now: float) -> None:
        """The peer grants credit up to an offset; nothing happens for a stream that is gone."""
        stream = self.streams.get(number)
        if stream is not None and offset > stream.limit:
            stream.limit = min(offset, stream.size)
            stream.progress_at = now
            self._make_ready(stream)

    def forget(self, number: int) -> None:
        """Stop sending an attachment; its owner gets the buffers back."""
        stream = self.streams.get(number)
        if stream is not None:
            if stream.is_queued:
                self._ready.remove(stream)
                stream.is_queued = False
            self._finish(stream)

    def output(self, space: memoryview, now: float) -> int:
        """Seal what is due to the start of `space` and give the size: control frames first, then attachments.

        space: at least one full record and 64 bytes. Call again while it gives more than 0.
        """
        if self._sealed_owners:
            self._tell_owners()
        written = 0
        room = len(space)
        if self._since_rekey >= self._limits.rekey_records or now - self._rekeyed_at >= self._limits.rekey_seconds:
            written = self._rekey(space, now)
        while self._records or self._parts:
            if self._records:
                parts, control = self._records[0]
                plain = b"".join(parts)
                if len(plain) + frames.RECORD_OVERHEAD > room - written:
                    return written
                del self._records[0]
                self._control_total -= control
            else:
                if self._size + frames.RECORD_OVERHEAD > room - written:
                    return written
                plain = b"".join(self._parts)
                self._control_total -= self._control
                self._parts = []
                self._size = self._control = 0
            written += self._seal(plain, space[written:])
        if self._owners:
            self._sealed_owners, self._owners = self._owners, []
        while self._ready and not self._parts and room - written >= frames.RECORD_SIZE_MAX + 64:
            written += self._send_burst(space[written:], now)
        return written

    def close(self) -> None:
        """The session is over: every owner gets its buffers back."""
        for number in list(self.streams):
            self.forget(number)
        self._tell_owners()
        self._sealed_owners, self._owners = self._owners, []
        self._tell_owners()

    def stalled(self, now: float) -> bool:
        """Say whether some attachment got no credit for too long."""
        limit = self._limits.stream_stall_seconds
        return any(now - stream.progress_at > limit for stream in self.streams.values())

    def _send_burst(self, space: memoryview, now: float) -> int:
        """Seal one DATA frame and the attachment bytes it announces: as many full records as fit."""
        stream = self._next(now)
        most = _FAST_BURST_RECORDS if self.initial_window >= _FAST_WINDOW_BYTES else _BURST_RECORDS
        records = min(most, (len(space) - 64) // frames.RECORD_SIZE_MAX)
        burst = min(stream.limit - stream.sent, records * frames.PLAIN_SIZE_MAX)
        written = self._seal(frames.DATA_FRAME.pack(frames.DATA, 0, 4, stream.number, burst), space)
        self.frames_sent += 1
        while burst:
            size = min(burst, frames.PLAIN_SIZE_MAX)
            written += self._seal(stream.take(size), space[written:])
            burst -= size
        stream.progress_at = now
        stream.is_queued = False
        if stream.sent == stream.size:
            self._finish(stream)
        else:
            self._make_ready(stream)
        return written

    def _tell_owners(self) -> None:
        owners, self._sealed_owners = self._sealed_owners, []
        for on_sent in owners:
            on_sent()

    def _next(self, now: float) -> OutgoingStream:
        """Take the attachment that goes now: the one with the fewest bytes left.

        So calls are complete one after another instead of all at the end, the first can be worked on while the second is on its
        way, and the receiver needs memory for few at a time (shortest remaining processing time: Schrage 1968; RFC 9218, section
        10, gives the same advice for HTTP). Against starvation an eighth of the bursts goes to those that have waited long.
        """
        ready = self._ready
        self._bursts += 1
        if len(ready) == 1 or (self._bursts % _LONGEST_WAIT_EVERY == 0 and now - ready[0].progress_at > _LONG_WAIT_SECONDS):
            return ready.pop(0)
        stream = min(ready, key=_bytes_left)
        ready.remove(stream)
        return stream

    def _seal(self, plain: Buffer, space: memoryview) -> int:
        size = self._cipher.seal_into(plain, space[2:])
        space[0] = size >> 8
        space[1] = size & 255
        self._since_rekey += 1
        return size + 2

    def _rekey(self, space: memoryview, now: float) -> int:
        """Seal the announcement of a new key as the old one's last record."""
        written = self._seal(frames.HEADER.pack(frames.REKEY, 0, 0, 0), space)
        self._cipher.rekey()
        self._rekeyed_at = now
        self._since_rekey = 0
        return written

    def _open_in_pieces(self, kind: int, number: int, message: Buffer, window: int, total: int) -> None:
        view = memoryview(message)
        first = frames.PLAIN_SIZE_MAX - frames.OPEN_HEADER.size
        header = frames.OPEN_HEADER.pack(kind, 0, 16 + first, number, len(view), window, total)
        self._append(header, view[:first], (), frames.PLAIN_SIZE_MAX, frames.PLAIN_SIZE_MAX)
        step = frames.PLAIN_SIZE_MAX - frames.HEADER.size
        for start in range(first, len(view), step):
            piece = view[start : start + step]
            size = len(piece) + frames.HEADER.size
            self._append(frames.HEADER.pack(frames.MORE, 0, len(piece), number), piece, (), size, size)

    def _append(self, header: bytes, body: Buffer, chunks: Sequence[Buffer], size: int, control: int) -> None:
        if self._control_total > self._limits.send_queue_bytes_max:
            self._metrics.add("limit_hits_total", "send_queue_bytes_max")
            raise ProtocolViolation(Reason.TOO_SLOW, "the peer does not take what is sent to it")
        if self._size + size > frames.PLAIN_SIZE_MAX:
            self._records.append((self._parts, self._control))
            self._parts = []
            self._size = self._control = 0
        self._parts.append(header)
        if body:
            self._parts.append(body)
        if chunks:
            self._parts.extend(chunks)
        self._size += size
        self._control += control
        self._control_total += control
        self.frames_sent += 1

    def _make_ready(self, stream: OutgoingStream) -> None:
        if not stream.is_queued and stream.sent < stream.limit:
            stream.is_queued = True
            self._ready.append(stream)

    def _finish(self, stream: OutgoingStream) -> None:
        del self.streams[stream.number]
        self._finished(stream.number)
        if stream.on_sent is not None:
            stream.on_sent()


def _bytes_left(stream: OutgoingStream) -> int:
    return stream.size - stream.sent
