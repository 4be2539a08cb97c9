"""The session: a pure machine between two ciphers. Bytes in, events out; `send_*` in, bytes out.

It multiplexes requests, replies, refusals, cancels and attachments with credit windows, and keeps every per-session limit of
`limits.Limits`. It never waits, reads no clock and does no I/O: `receive` takes at most one record and appends to `events`,
`output` seals what is due into the caller's buffer. Anything a peer may send either has a meaning or raises
ProtocolViolation; after that the session is over.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from p2pnode.environment import Buffer
from p2pnode.errors import ProtocolViolation, Refused
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.transport import frames
from p2pnode.transport.events import CancelArrived, Event, GoodbyeArrived, RefusalArrived, ReplyArrived, RequestArrived
from p2pnode.transport.frames import ReceiveCipher, SendCipher, bad_frame
from p2pnode.transport.inbox import Inbox
from p2pnode.transport.limits import BufferBudget, Limits, TokenBucket
from p2pnode.transport.outbox import Outbox
from p2pnode.transport.streams import OnBytes, SinkSource
from p2pnode.wire.codec import decode, encode
from p2pnode.wire.messages.session import Goodbye, Refusal


@dataclass(slots=True)
class _Assembly:
    """A message that is longer than one frame and has not fully arrived."""

    kind: int
    number: int
    window: int
    attachment_size: int
    message_size: int
    message: bytearray
    started_at: float


class Session:
    """One end of an established session.

    waiting: token by number of our requests without reply. open_requests: numbers of the peer's requests that are not yet
    fully answered. rtt_seconds: the smallest round trip seen, 0 before the first. pinned: keep it alive when idle.
    """

    def __init__(
        self,
        sender: SendCipher,
        receiver: ReceiveCipher,
        initiator: bool,
        limits: Limits,
        metrics: Metrics,
        budget: BufferBudget,
        now: float,
    ) -> None:
        self.events: list[Event] = []
        self.waiting: dict[int, Any] = {}
        self.open_requests: set[int] = set()
        self.rtt_seconds = 0.0
        self.said_goodbye: Reason | None = None
        self.heard_goodbye: Reason | None = None
        self.pinned = False
        self.frames_received = 0
        self.outbox = Outbox(sender, limits, metrics, now)
        # Our own numbers are never among the peer's, so the end of an own request's attachment changes nothing there.
        self.outbox.on_finished(self.open_requests.discard)
        self.inbox = Inbox(limits, metrics, budget, self.outbox, self.events, self._give_up)
        self._receiver = receiver
        self._limits = limits
        self._metrics = metrics
        self._parity = 1 if initiator else 0
        self._next_number = 1 if initiator else 2
        self._peer_number = 0
        self._assembly: _Assembly | None = None
        self._requests = TokenBucket(limits.request_rate, limits.request_burst, now)
        self._control = TokenBucket(limits.control_rate, limits.control_burst, now)
        self._now = now
        self._active_at = now
        self._received_at = now
        self._ping_at: float | None = None
        self._pinged_at = now

    # --- what leaves -------------------------------------------------------------------------------------------------

    def send_request(
        self, token: Any, message: Buffer, attachment: Sequence[Buffer] = (), on_sent: Callable[[], None] | None = None
    ) -> int:
        """Queue a request and give its number. The attachment's buffers must not change until `on_sent` has run.

        Raises Refused(TOO_LARGE) before anything is queued; ProtocolViolation(TOO_SLOW) when the peer takes nothing.
        """
        number = self._next_number
        if number > frames.NUMBER_MAX:
            raise Refused(Reason.EXPIRED, "the session has used up its request numbers")
        self.outbox.open(frames.REQUEST, number, message, attachment, on_sent, self._now)
        self._next_number = number + 2
        self._active_at = self._now
        self.waiting[number] = token
        return number

    def send_reply(
        self, number: int, message: Buffer, attachment: Sequence[Buffer] = (), on_sent: Callable[[], None] | None = None
    ) -> bool:
        """Queue the reply to a request; False if the request was cancelled or answered before. Raises as `send_request`."""
        if number not in self.open_requests or number in self.outbox.streams:
            return False
        self.outbox.open(frames.REPLY, number, message, attachment, on_sent, self._now)
        self.inbox.drop(number)
        self._active_at = self._now
        if number not in self.outbox.streams:
            self.open_requests.discard(number)
        return True

    def send_refusal(self, number: int, reason: Reason, detail: str = "") -> bool:
        """Queue a refusal instead of a reply; False as for `send_reply`."""
        if number not in self.open_requests or number in self.outbox.streams:
            return False
        self.open_requests.discard(number)
        self.inbox.drop(number)
        self._queue_refusal(number, reason, detail)
        return True

    def send_cancel(self, number: int) -> None:
        """Give up one of our requests: whatever still arrives for it is dropped. Does nothing for one that is over."""
        if self.waiting.pop(number, None) is None and number not in self.inbox.streams:
            return
        self.outbox.forget(number)
        self.inbox.drop(number)
        self.outbox.queue(frames.CANCEL, number)

    def send_ping(self, now: float) -> None:
        """Queue a probe unless one is on its way."""
        self._pinged_at = now
        if self._ping_at is None:
            self._ping_at = now
            self.outbox.queue(frames.PING, 0, bytes(8))

    def send_goodbye(self, reason: Reason) -> None:
        """Say, once, that we will send no more requests. What is in flight may finish."""
        if self.said_goodbye is None:
            self.said_goodbye = reason
            self.outbox.queue(frames.GOODBYE, 0, encode(Goodbye(reason=reason.value)))

    def output(self, space: memoryview) -> int:
        """Seal what is due to the start of `space` (a full record and 64 bytes, at least); 0 when nothing is left."""
        return self.outbox.output(space, self._now)

    @property
    def is_quiet(self) -> bool:
        """True if nothing is in flight in either direction."""
        box = self.outbox
        return not (self.waiting or self.open_requests or self.inbox.streams or box.streams or box.has_output)

    @property
    def is_busy(self) -> bool:
        """True if something is in flight or half arrived, so that time-outs may fall due at any `tick`."""
        return not self.is_quiet or self._assembly is not None

    @property
    def active_at(self) -> float:
        """When something last began or ended here: a request, a reply, a probe of the peer's."""
        return self._active_at

    @property
    def numbers_left(self) -> bool:
        """False when the session has used up its request numbers and must be replaced."""
        return self._next_number < self._limits.request_number_max

    def advance(self, now: float) -> bool:
        """Take note of the time before a request is sent; True if the peer was silent so long that it should be probed too."""
        self._now = now
        return now - self._received_at >= self._limits.keepalive_seconds

    # --- what arrives ------------------------------------------------------------------------------------------------

    def receive(self, data: memoryview, now: float) -> int:
        """Take one record, or those of a burst, from the start of `data`, which is overwritten.

        Gives the bytes used, 0 if no record is complete.

        Appends to `events`; the caller handles and clears them before the next call. Raises ProtocolViolation.
        """
        self._now = now
        inbox = self.inbox
        if inbox.burst_left:
            end = inbox.receive_burst(data, self._receiver, now, self.rtt_seconds)
            if end:
                self._received_at = now
            return end
        if len(data) < frames.RECORD_PREFIX:
            return 0
        end = ((data[0] << 8) | data[1]) + 2
        if len(data) < end:
            return 0
        self._received_at = now
        sealed = data[2:end]
        size = self._receiver.open_into(sealed, sealed)
        self._receive_frames(sealed[:size], now)
        return end

    def accept(self, number: int, sink: memoryview | SinkSource, on_bytes: OnBytes | None = None) -> None:
        """Name where an attachment goes; what has already come is copied there at once.

        Appends AttachmentArrived if that was all. sink: exactly the attachment's size, or what gives it when the first bytes
        come. on_bytes: given what lies there each time it has become more. Does nothing if it is gone.
        """
        self.inbox.accept(number, sink, on_bytes, self._now, self.rtt_seconds)

    def close(self) -> None:
        """Give back what the session holds of the shared budget; it must not be used afterwards."""
        self.inbox.close()
        self.outbox.close()

    def tick(self, now: float) -> Reason | None:
        """Do what is due by the clock: probes. Gives the reason to close the session for, if there is one.

        Call it about once a second while it `is_busy`, else when it is `due_at`, with `output` after it.
        """
        limits = self._limits
        self._now = now
        busy = not self.is_quiet
        if busy or self.pinned:
            # Whatever came proves the peer alive as well as an answer would; so of two idle sides only one probes.
            if now - max(self._pinged_at, self._received_at) >= limits.keepalive_seconds:
                self.send_ping(now)
        elif now - self._active_at >= limits.idle_seconds:
            return self._hit("idle_seconds", Reason.IDLE)
        if self._ping_at is not None and now - max(self._ping_at, self._received_at) >= limits.pong_seconds:
            return self._hit("pong_seconds", Reason.DEADLINE)
        if self._assembly is not None and now - self._assembly.started_at >= limits.minimum_rate_seconds:
            return self._hit("minimum_rate", Reason.TOO_SLOW)
        if self.inbox.is_slow(now):
            return self._hit("minimum_rate", Reason.TOO_SLOW)
        if self.outbox.stalled(now) or self.inbox.stalled(now):
            return self._hit("stream_stall_seconds", Reason.TOO_SLOW)
        return None

    def due_at(self) -> float:
        """Give when `tick` next has something to do if nothing happens until then."""
        limits = self._limits
        probe = max(self._pinged_at, self._received_at) + limits.keepalive_seconds
        due = probe if self.pinned else self._active_at + limits.idle_seconds
        if self._ping_at is not None:
            due = min(due, max(self._ping_at, self._received_at) + limits.pong_seconds)
        return due

    def _receive_frames(self, plain: memoryview, now: float) -> None:
        position, size = 0, len(plain)
        while position < size:
            if self.inbox.burst_left:
                raise bad_frame("a DATA frame must be the last of its record")
            if size - position < 8:
                raise bad_frame("a frame header is cut off")
            kind, _, length, number = frames.HEADER.unpack_from(plain, position)
            body = position + 8
            position = body + length
            if position > size:
                raise bad_frame("a frame is cut off")
            self.frames_received += 1
            if kind == frames.REQUEST or kind == frames.REPLY:
                self._receive_opening(kind, number, plain[body:position], now)
            elif kind == frames.MORE:
                self._receive_more(number, plain[body:position], now)
            elif kind == frames.REKEY:
                if position != size:
                    raise bad_frame("REKEY must be the last frame of its record")
                self._receiver.rekey()
            elif kind < frames.FIRST_IGNORED_KIND:
                self._receive_control(kind, number, plain[body:position], now)
            elif not self._control.take(now):
                raise self._violation("control_rate", Reason.RATE)
        if self._receiver.records > 2 * self._limits.rekey_records:
            raise self._violation("rekey_records", Reason.EXPIRED)

    def _receive_opening(self, kind: int, number: int, body: memoryview, now: float) -> None:
        limits = self._limits
        if len(body) < 16:
            raise bad_frame("an opening is cut off")
        if self._assembly is not None:
            raise bad_frame("a message begins inside another")
        message_size, window, attachment_size = frames.OPENING.unpack_from(body)
        self._check_number(kind, number)
        if message_size > limits.message_bytes_max:
            raise self._violation("message_bytes_max", Reason.TOO_LARGE)
        if attachment_size > limits.attachment_bytes_max:
            raise self._violation("attachment_bytes_max", Reason.TOO_LARGE)
        if window > self.inbox.window:
            raise self._violation("window_initial_bytes", Reason.FLOW_CONTROL)
        held = len(body) - 16
        if held < message_size:
            self._assembly = _Assembly(kind, number, window, attachment_size, message_size, bytearray(body[16:]), now)
            return
        message_end = 16 + message_size
        inline: memoryview | None = body[message_end:]
        if held - message_size != attachment_size:
            if held != message_size:
                raise bad_frame("part of an attachment")
            inline = None
        self._opened(kind, number, body[16:message_end], inline, attachment_size, window, now)

    def _check_number(self, kind: int, number: int) -> None:
        own = number & 1 == self._parity
        if kind == frames.REQUEST:
            if own or number <= self._peer_number:
                raise bad_frame("a request number out of order")
            self._peer_number = number
        elif not own or number >= self._next_number:
            raise bad_frame("a reply to nothing")

    def _receive_more(self, number: int, body: memoryview, now: float) -> None:
        assembly = self._assembly
        if assembly is None or assembly.number != number:
            raise bad_frame("a piece of no message")
        if not body or len(assembly.message) + len(body) > assembly.message_size:
            raise bad_frame("a piece does not fit its message")
        assembly.message += body
        if len(assembly.message) == assembly.message_size:
            self._assembly = None
            inline = None if assembly.attachment_size else memoryview(b"")
            message = memoryview(assembly.message)
            self._opened(assembly.kind, number, message, inline, assembly.attachment_size, assembly.window, now)

    def _opened(
        self, kind: int, number: int, message: memoryview, inline: memoryview | None, size: int, window: int, now: float
    ) -> None:
        """A whole message is there: report it, or refuse it where a limit says so."""
        self._active_at = now
        if kind == frames.REQUEST:
            reason = None
            if len(self.open_requests) >= self._limits.requests_in_flight_max:
                reason = self._hit("requests_in_flight_max", Reason.TOO_MANY_REQUESTS)
            elif not self._requests.take(now):
                reason = self._hit("request_rate", Reason.RATE)
            if reason is not None:
                if inline is None:
                    self.inbox.discard(size, window)
                self._queue_refusal(number, reason, "")
                return
            self.open_requests.add(number)
            self.events.append(RequestArrived(number, message, inline, size))
        else:
            token = self.waiting.pop(number, None)
            if token is None:  # cancelled, while the reply was on its way
                if inline is None:
                    self.inbox.discard(size, window)
                return
            self.outbox.forget(number)
            self.events.append(ReplyArrived(number, token, message, inline, size))
        if inline is None:
            self.inbox.open(number, size, window, now)

    def _receive_control(self, kind: int, number: int, body: memoryview, now: float) -> None:
        if kind == frames.DATA and len(body) == 4:
            self._check_seen(number)
            self.inbox.announce(number, frames.FOUR_BYTES.unpack(body)[0], now)
            return
        if kind == frames.REFUSAL:
            self._receive_refusal(number, body)
            return
        if not self._control.take(now):
            raise self._violation("control_rate", Reason.RATE)
        if kind == frames.CREDIT and len(body) == 8:
            self._check_seen(number)
            self.outbox.credit(number, frames.EIGHT_BYTES.unpack(body)[0], now)
        elif kind == frames.WINDOW and len(body) == 4:
            window = frames.FOUR_BYTES.unpack(body)[0]
            self.outbox.initial_window = min(max(window, self.outbox.initial_window), self._limits.window_bytes_max)
        elif kind == frames.CANCEL:
            self._receive_cancel(number)
        elif kind == frames.PING and len(body) == 8:
            self._active_at = now
            self.outbox.queue(frames.PONG, 0, bytes(body))
        elif kind == frames.PONG:
            if self._ping_at is not None:
                trip = now - self._ping_at
                self.rtt_seconds = min(trip, self.rtt_seconds) if self.rtt_seconds else trip
                self._ping_at = None
        elif kind == frames.GOODBYE:
            self.heard_goodbye = _reason(decode(Goodbye, body).reason)[0]
            self.events.append(GoodbyeArrived(self.heard_goodbye))
        else:
            raise bad_frame(f"frame kind {kind} with {len(body)} bytes")

    def _give_up(self, number: int) -> None:
        """There is no room to keep an attachment that nobody has accepted: its request is refused."""
        if self.send_refusal(number, Reason.BUSY, "no room for the attachment"):
            self.events.append(CancelArrived(number))

    def _receive_refusal(self, number: int, body: memoryview) -> None:
        self._check_number(frames.REFUSAL, number)
        refusal = decode(Refusal, body)
        token = self.waiting.pop(number, None)
        if token is not None:
            self.outbox.forget(number)
            reason, unknown = _reason(refusal.reason)
            self._metrics.add("refused_total", reason.value)
            self.events.append(RefusalArrived(token, reason, refusal.detail or unknown))

    def _receive_cancel(self, number: int) -> None:
        if number & 1 == self._parity or number > self._peer_number:
            raise bad_frame("a cancel of nothing")
        if number in self.open_requests:
            self.open_requests.discard(number)
            self.outbox.forget(number)
            self.inbox.drop(number)
            self.events.append(CancelArrived(number))

    def _check_seen(self, number: int) -> None:
        own = number & 1 == self._parity
        if number == 0 or (number >= self._next_number if own else number > self._peer_number):
            raise bad_frame("a frame for a request that does not exist")

    def _queue_refusal(self, number: int, reason: Reason, detail: str) -> None:
        self._metrics.add("refusals_total", reason.value)
        self.outbox.queue(frames.REFUSAL, number, encode(Refusal(reason=reason.value, detail=detail[:1024])))

    def _hit(self, limit: str, reason: Reason) -> Reason:
        self._metrics.add("limit_hits_total", limit)
        return reason

    def _violation(self, limit: str, reason: Reason) -> ProtocolViolation:
        return ProtocolViolation(self._hit(limit, reason), limit)


def _reason(text: str) -> tuple[Reason, str]:
    """Give the reason a peer named, or INTERNAL and its text for one that a later version has added."""
    try:
        return Reason(text), ""
    except ValueError:
        return Reason.INTERNAL, text
