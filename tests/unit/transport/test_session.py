"""The session machine without a network: two of them, joined by their bytes, over a cipher that only adds tags."""

from types import SimpleNamespace

import pytest

from p2pnode.crypto import noise
from p2pnode.errors import ProtocolViolation, Refused
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.transport import events, frames
from p2pnode.transport.limits import BufferBudget, Limits
from p2pnode.transport.session import Session


class PlainCipher:
    """Sixteen tag bytes and no secrecy, so that tests can write and read frames."""

    def __init__(self) -> None:
        self.records = 0
        self.rekeyed = 0

    def seal_into(self, plain, out) -> int:
        out[: len(plain)] = plain
        out[len(plain) : len(plain) + 16] = b"T" * 16
        return len(plain) + 16

    def open_into(self, sealed, out) -> int:
        if len(sealed) < 16:
            raise ProtocolViolation(Reason.TRUNCATED)
        self.records += 1
        if out is not sealed:
            out[: len(sealed) - 16] = sealed[:-16]
        return len(sealed) - 16

    def rekey(self) -> None:
        self.rekeyed += 1
        self.records = 0


class End:
    """One session with the handling a link would give its events: everything is kept, attachments are accepted."""

    def __init__(self, initiator: bool, limits: Limits | None = None, accept: bool = True, cipher=PlainCipher) -> None:
        self.limits = limits or Limits()
        self.metrics = Metrics()
        self.budget = BufferBudget(self.limits.buffer_bytes_max, self.metrics)
        self.receiver = cipher()
        self.session = Session(cipher(), self.receiver, initiator, self.limits, self.metrics, self.budget, 0.0)
        self.accept = accept
        self.seen: list = []
        self.sinks: dict[int, memoryview] = {}

    def output(self) -> bytes:
        space = memoryview(bytearray(self.limits.send_buffer_bytes))
        out = b""
        while size := self.session.output(space):
            out += space[:size]
        return out

    def receive(self, data: bytes, now: float = 0.0) -> None:
        buffer = memoryview(bytearray(data))
        while used := self.session.receive(buffer, now):
            buffer = buffer[used:]
            while self.session.events:
                self.handle(self.session.events.pop(0))
        assert not buffer

    def handle(self, event) -> None:
        if isinstance(event, events.RequestArrived | events.ReplyArrived):
            inline = None if event.attachment is None else bytes(event.attachment)
            token = getattr(event, "token", None)
            self.seen.append(
                SimpleNamespace(
                    number=event.number, token=token, message=bytes(event.message), inline=inline, size=event.attachment_size
                )
            )
            if inline is None and self.accept:
                self.take(event.number, event.attachment_size)
        else:
            self.seen.append(event)

    def take(self, number: int, size: int) -> None:
        self.sinks[number] = memoryview(bytearray(size))
        self.session.accept(number, self.sinks[number])
        while self.session.events:
            self.handle(self.session.events.pop(0))

    def hits(self) -> dict[str, float]:
        return self.metrics.labels("limit_hits_total")


def pair(limits: Limits | None = None, **options) -> tuple[End, End]:
    return End(True, limits, **options), End(False, limits, **options)


def exchange(alice: End, bob: End, now: float = 0.0) -> None:
    """Carry bytes to and fro until both are silent."""
    while True:
        there, back = alice.output(), None
        bob.receive(there, now)
        back = bob.output()
        alice.receive(back, now)
        if not there and not back:
            return


def record(*parts: bytes) -> bytes:
    plain = b"".join(parts)
    return (len(plain) + 16).to_bytes(2, "big") + plain + b"T" * 16


def frame(kind: int, number: int, body: bytes = b"") -> bytes:
    return frames.HEADER.pack(kind, 0, len(body), number) + body


def opening(kind: int, number: int, message: bytes, attachment: bytes = b"", size: int | None = None, window: int = 0) -> bytes:
    total = len(attachment) if size is None else size
    return frame(kind, number, frames.OPENING.pack(len(message), window, total) + message + attachment)


def violation(end: End, data: bytes, now: float = 0.0) -> Reason:
    with pytest.raises(ProtocolViolation) as caught:
        end.receive(data, now)
    return caught.value.reason


# --- what it is for ------------------------------------------------------------------------------------------------------


def test_small_messages_share_one_record() -> None:
    alice, bob = pair()
    numbers = [alice.session.send_request(f"t{index}", b"message %d" % index, [b"attached"]) for index in range(20)]
    assert numbers == list(range(1, 41, 2))
    data = alice.output()
    assert int.from_bytes(data[:2], "big") + 2 == len(data)
    bob.receive(data)
    assert [(seen.number, seen.inline) for seen in bob.seen] == [(number, b"attached") for number in numbers]
    for seen in bob.seen:
        assert bob.session.send_reply(seen.number, b"answer to " + seen.message)
    alice.receive(bob.output())
    assert [(seen.token, seen.message) for seen in alice.seen][3] == ("t3", b"answer to message 3")
    assert alice.session.is_quiet
    assert bob.session.is_quiet


@pytest.mark.parametrize("size", [1, 60_000, 61_440, 61_441, 262_144, 262_145, 5_000_000])
def test_attachments_arrive_whole_in_both_directions(size) -> None:
    alice, bob = pair()
    data = bytes(index & 255 for index in range(251)) * (size // 251 + 1)
    chunks = [data[:7], memoryview(data)[7 : size // 2], b"", data[max(7, size // 2) : size]]
    sent = []
    number = alice.session.send_request("t", b"m", chunks if size > 7 else [data[:size]], lambda: sent.append(1))
    exchange(alice, bob)
    assert sent == [1]
    got = bob.seen[0].inline if bob.seen[0].inline is not None else bob.sinks[number]
    assert got == data[:size]
    assert bob.session.send_reply(number, b"r", [data[:size]], lambda: sent.append(2))
    exchange(alice, bob)
    assert sent == [1, 2]
    got = alice.seen[0].inline if alice.seen[0].inline is not None else alice.sinks[number]
    assert got == data[:size]
    assert alice.session.is_quiet
    assert bob.session.is_quiet


def test_inline_bytes_max_decides_between_frame_and_stream() -> None:
    alice, bob = pair(Limits(inline_bytes_max=100))
    alice.session.send_request("a", b"m", [b"x" * 99])
    alice.session.send_request("b", b"m", [b"x" * 100])
    exchange(alice, bob)
    assert [seen.inline is None for seen in bob.seen[:2]] == [False, True]


def test_numeric_views_are_sent_as_their_bytes() -> None:
    alice, bob = pair()
    view = memoryview(bytearray(range(16))).cast("I")
    alice.session.send_request("t", b"m", [view, memoryview(b"").cast("B")])
    exchange(alice, bob)
    assert bob.seen[0].inline == bytes(range(16))


@pytest.mark.parametrize("size", [65_000, 65_495, 65_496, 200_000, 262_144])
def test_messages_longer_than_a_frame_arrive_in_pieces(size) -> None:
    alice, bob = pair()
    alice.session.send_request("t", b"m" * size, [b"x" * 100])
    exchange(alice, bob)
    assert bob.seen[0].message == b"m" * size
    assert bob.sinks[1] == b"x" * 100


def test_without_a_sink_no_more_than_one_window_is_sent() -> None:
    limits = Limits()
    alice, bob = pair(limits, accept=False)
    number = alice.session.send_request("t", b"m", [b"x" * 2_000_000])
    exchange(alice, bob)
    assert bob.budget.used == limits.window_initial_bytes
    bob.take(number, 2_000_000)
    exchange(alice, bob)
    assert bob.budget.used == 0
    assert bob.sinks[number] == b"x" * 2_000_000


def test_windows_grow_on_a_fast_path_and_later_streams_start_with_them() -> None:
    limits = Limits()
    alice, bob = pair(limits)
    alice.session.send_request("t", b"m", [bytes(200_000_000)])
    exchange(alice, bob)
    assert bob.session.inbox.window == limits.window_bytes_max
    assert alice.session.outbox.initial_window == limits.window_bytes_max
    bob.accept = False
    alice.session.send_request("t", b"m", [bytes(10_000_000)])
    bob.receive(alice.output())
    assert bob.budget.used == 10_000_000


def test_windows_stay_where_half_of_one_lasts_longer_than_window_growth_seconds() -> None:
    limits = Limits()
    alice, bob = pair(limits)
    alice.session.send_request("t", b"m", [bytes(3_000_000)])
    now = 0.0
    while alice.session.outbox.streams:
        data = alice.output()
        while data:
            size = int.from_bytes(data[:2], "big") + 2
            now += limits.window_growth_seconds
            bob.receive(data[:size], now)
            data = data[size:]
        alice.receive(bob.output(), now)
    assert bob.session.inbox.window == limits.window_initial_bytes


def test_a_reply_before_the_attachment_is_complete_stops_it() -> None:
    alice, bob = pair(accept=False)
    freed = []
    number = alice.session.send_request("t", b"m", [bytes(50_000_000)], lambda: freed.append(1))
    bob.receive(alice.output())
    assert bob.session.send_reply(number, b"enough")
    assert bob.budget.used == 0
    exchange(alice, bob)
    assert alice.seen[0].message == b"enough"
    assert freed == [1]
    assert alice.session.is_quiet
    assert bob.session.is_quiet


def test_cancel_stops_request_and_reply_and_late_answers_are_dropped() -> None:
    alice, bob = pair()
    first = alice.session.send_request("t", b"m", [bytes(50_000_000)])
    second = alice.session.send_request("u", b"m")
    bob.receive(alice.output())
    assert bob.session.send_reply(second, b"r", [bytes(9_000_000)])
    alice.session.send_cancel(first)
    alice.session.send_cancel(second)
    alice.session.send_cancel(second)
    exchange(alice, bob)
    assert [type(seen) for seen in bob.seen[2:]] == [events.CancelArrived] * 2
    assert not bob.session.send_reply(first, b"late")
    assert not bob.session.send_refusal(first, Reason.BUSY)
    assert alice.seen == []
    assert alice.session.is_quiet
    assert bob.session.is_quiet


def test_refusals_carry_their_reason_and_unknown_ones_their_text() -> None:
    alice, bob = pair()
    number = alice.session.send_request("t", b"m")
    bob.receive(alice.output())
    assert bob.session.send_refusal(number, Reason.PRICE, "too low")
    assert not bob.session.send_refusal(number, Reason.PRICE)
    exchange(alice, bob)
    assert alice.seen == [events.RefusalArrived("t", Reason.PRICE, "too low")]
    number = alice.session.send_request("t", b"m")
    alice.output()
    alice.receive(record(frame(frames.REFUSAL, number, b"\x82\xa6reason\xa9from-2030\xa6detail\xa0")))
    assert alice.seen[1] == events.RefusalArrived("t", Reason.INTERNAL, "from-2030")


def test_pings_are_answered_and_measure_the_round_trip() -> None:
    alice, bob = pair()
    alice.session.send_ping(0.0)
    alice.session.send_ping(0.0)
    bob.receive(alice.output(), 0.1)
    alice.receive(bob.output(), 0.25)
    assert alice.session.rtt_seconds == 0.25


def test_goodbye_is_said_once_and_heard() -> None:
    alice, bob = pair()
    alice.session.send_goodbye(Reason.DRAINING)
    alice.session.send_goodbye(Reason.INTERNAL)
    exchange(alice, bob)
    assert bob.seen == [events.GoodbyeArrived(Reason.DRAINING)]


def test_unknown_frame_kinds_from_128_on_are_ignored() -> None:
    _, bob = pair()
    bob.receive(record(frame(200, 77, b"a hint from a later version"), opening(frames.REQUEST, 1, b"m")))
    assert bob.seen[0].message == b"m"


def test_real_ciphers_rekey_after_rekey_records_and_rekey_seconds() -> None:
    limits = Limits(rekey_records=10, rekey_seconds=100.0)
    alice, bob = pair(limits)
    for _ in range(95):
        alice.session.send_request("t", b"m")
        bob.receive(alice.output(), now=1.0)
    assert bob.receiver.rekeyed == 9
    before = bob.receiver.rekeyed
    alice.receive(b"", 200.0)
    alice.session.tick(200.0)
    bob.receive(alice.output(), 200.0)
    assert bob.receiver.rekeyed == before + 1


def test_over_noise_the_session_goes_on_across_new_keys() -> None:
    limits = Limits(rekey_records=20)
    one = noise.HandshakeState(noise.AESGCM_SHA256, True, b"", b"\x01" * 32, b"\x02" * 32)
    two = noise.HandshakeState(noise.AESGCM_SHA256, False, b"", b"\x03" * 32, b"\x04" * 32)
    two.read_message(one.write_message(b""))
    one.read_message(two.write_message(b""))
    two.read_message(one.write_message(b""))
    alice, bob = End(True, limits), End(False, limits)
    for end, state in ((alice, one), (bob, two)):
        sender, receiver = state.split()
        end.session = Session(sender, receiver, end is alice, limits, end.metrics, end.budget, 0.0)
    for _ in range(10):
        alice.session.send_request("t", b"m", [b"x" * 500_000])
        exchange(alice, bob)
    assert len(bob.sinks) == 10
    assert all(sink == b"x" * 500_000 for sink in bob.sinks.values())


# --- limits ---------------------------------------------------------------------------------------------------------------


def test_message_bytes_max() -> None:
    alice, bob = pair(Limits(message_bytes_max=1000))
    with pytest.raises(Refused) as caught:
        alice.session.send_request("t", b"m" * 1001)
    assert caught.value.reason is Reason.TOO_LARGE
    assert not alice.session.waiting
    assert violation(bob, record(opening(frames.REQUEST, 1, b"m" * 1001))) is Reason.TOO_LARGE
    assert bob.hits() == {"message_bytes_max": 1}


def test_attachment_bytes_max() -> None:
    _, bob = pair(Limits(attachment_bytes_max=1000))
    assert violation(bob, record(opening(frames.REQUEST, 1, b"m", size=1001))) is Reason.TOO_LARGE
    assert bob.hits() == {"attachment_bytes_max": 1}


def test_window_initial_bytes_may_not_be_exceeded_by_assumption() -> None:
    _, bob = pair()
    data = record(opening(frames.REQUEST, 1, b"m", size=10_000_000, window=300_000))
    assert violation(bob, data) is Reason.FLOW_CONTROL
    assert bob.hits() == {"window_initial_bytes": 1}


def test_window_bytes_max_bounds_what_comes_without_credit() -> None:
    _, bob = pair(accept=False)
    bob.receive(record(opening(frames.REQUEST, 1, b"m", size=10_000_000, window=1000)))
    assert violation(bob, record(frame(frames.DATA, 1, frames.FOUR_BYTES.pack(1001)))) is Reason.FLOW_CONTROL
    assert bob.hits() == {"window_bytes_max": 1}


def test_after_a_drop_only_what_had_credit_is_discarded() -> None:
    _, bob = pair(accept=False)
    bob.receive(record(opening(frames.REQUEST, 1, b"m", size=10_000_000, window=1000)))
    bob.session.send_refusal(1, Reason.BUSY)
    bob.receive(record(frame(frames.DATA, 1, frames.FOUR_BYTES.pack(1000))) + record(b"x" * 1000))
    assert violation(bob, record(frame(frames.DATA, 1, frames.FOUR_BYTES.pack(1)))) is Reason.FLOW_CONTROL


def test_requests_in_flight_max_refuses_the_request_only() -> None:
    alice, bob = pair(Limits(requests_in_flight_max=2))
    for _ in range(3):
        alice.session.send_request("t", b"m")
    exchange(alice, bob)
    assert len(bob.seen) == 2
    assert alice.seen == [events.RefusalArrived("t", Reason.TOO_MANY_REQUESTS, "")]
    assert bob.hits() == {"requests_in_flight_max": 1}
    bob.session.send_reply(1, b"r")
    alice.session.send_request("t", b"m")
    exchange(alice, bob)
    assert len(bob.seen) == 3


def test_a_refused_request_may_still_send_the_window_it_had() -> None:
    alice, bob = pair(Limits(requests_in_flight_max=1))
    for _ in range(2):
        alice.session.send_request("t", b"m", [b"x" * 900_000])
    exchange(alice, bob)
    assert bob.sinks[1] == b"x" * 900_000
    assert alice.seen[0].reason is Reason.TOO_MANY_REQUESTS


def test_a_reply_that_still_flows_counts_as_a_request_in_flight() -> None:
    alice, bob = pair()
    alice.accept = False
    number = alice.session.send_request("t", b"m")
    bob.receive(alice.output())
    bob.session.send_reply(number, b"r", [bytes(50_000_000)])
    exchange(alice, bob)
    assert bob.session.open_requests == {number}


def test_request_rate_and_request_burst() -> None:
    alice, bob = pair(Limits(request_rate=1.0, request_burst=2.0))
    for _ in range(3):
        alice.session.send_request("t", b"m")
    exchange(alice, bob)
    assert alice.seen == [events.RefusalArrived("t", Reason.RATE, "")]
    assert bob.hits() == {"request_rate": 1}
    alice.session.send_request("t", b"m")
    exchange(alice, bob, now=1.5)
    assert len(bob.seen) == 3


@pytest.mark.parametrize("kind", [frames.PING, 200])
def test_control_rate_and_control_burst(kind) -> None:
    _, bob = pair(Limits(control_rate=1.0, control_burst=5.0))
    bob.receive(record(*[frame(kind, 0, bytes(8))] * 5))
    assert violation(bob, record(frame(kind, 0, bytes(8)))) is Reason.RATE
    assert bob.hits() == {"control_rate": 1}


def test_send_queue_bytes_max_counts_messages_but_not_attachments() -> None:
    alice, _ = pair(Limits(send_queue_bytes_max=10_000))
    for _ in range(50):
        alice.session.send_request("t", b"m" * 100, [b"x" * 60_000])

    def send_on() -> None:
        for _ in range(100):
            alice.session.send_request("t", b"m" * 100)

    with pytest.raises(ProtocolViolation) as caught:
        send_on()
    assert caught.value.reason is Reason.TOO_SLOW
    assert alice.hits() == {"send_queue_bytes_max": 1}


def test_a_long_queue_takes_no_attachments_inside_its_frames() -> None:
    alice, _ = pair()
    for _ in range(50):
        alice.session.send_request("t", b"m", [b"x" * 60_000])
    assert 40 < len(alice.session.outbox.streams) < 50


def test_buffer_bytes_max_refuses_an_attachment_that_nobody_takes() -> None:
    alice, bob = pair(Limits(buffer_bytes_max=100_000), accept=False)
    alice.session.send_request("t", b"m", [bytes(3_000_000)])
    exchange(alice, bob)
    assert alice.seen == [events.RefusalArrived("t", Reason.BUSY, "no room for the attachment")]
    assert isinstance(bob.seen[1], events.CancelArrived)
    assert bob.budget.used == 0
    assert bob.hits() == {"buffer_bytes_max": 1}


def test_minimum_rate_of_an_attachment() -> None:
    limits = Limits()
    _, bob = pair(limits)
    bob.receive(record(opening(frames.REQUEST, 1, b"m", size=10_000_000, window=200_000)))
    now = 0.0
    reason = None
    while now < 3 * limits.minimum_rate_seconds and reason is None:
        now += 1.0
        bob.receive(record(frame(frames.DATA, 1, frames.FOUR_BYTES.pack(500))) + record(b"x" * 500), now)
        reason = bob.session.tick(now)
    assert reason is Reason.TOO_SLOW
    assert bob.hits() == {"minimum_rate": 1}
    assert now == limits.minimum_rate_seconds


def test_minimum_rate_is_not_asked_of_a_peer_without_credit_or_sink() -> None:
    limits = Limits(keepalive_seconds=1e9)
    _, bob = pair(limits, accept=False)
    bob.receive(record(opening(frames.REQUEST, 1, b"m", size=10_000_000, window=1000)))
    assert [bob.session.tick(float(now)) for now in range(100)] == [None] * 100


def test_minimum_rate_of_a_message_in_pieces() -> None:
    limits = Limits(keepalive_seconds=1e9)
    _, bob = pair(limits)
    bob.receive(record(frame(frames.REQUEST, 1, frames.OPENING.pack(1000, 0, 0) + b"m")))
    assert bob.session.tick(limits.minimum_rate_seconds - 1) is None
    assert bob.session.tick(limits.minimum_rate_seconds) is Reason.TOO_SLOW


def test_stream_stall_seconds() -> None:
    limits = Limits(keepalive_seconds=1e9)
    alice, bob = pair(limits, accept=False)
    alice.session.send_request("t", b"m", [bytes(3_000_000)])
    exchange(alice, bob)
    assert alice.session.tick(limits.stream_stall_seconds) is None
    assert alice.session.tick(limits.stream_stall_seconds + 1) is Reason.TOO_SLOW
    assert alice.hits() == {"stream_stall_seconds": 1}


def test_idle_seconds_end_a_session_unless_it_is_pinned_or_busy() -> None:
    limits = Limits()
    alice, bob = pair(limits)
    assert alice.session.tick(limits.idle_seconds - 1) is None
    assert alice.session.tick(limits.idle_seconds) is Reason.IDLE
    bob.session.pinned = True
    assert bob.session.tick(limits.idle_seconds) is None
    busy, _ = pair(limits)
    busy.session.send_request("t", b"m")
    busy.output()
    assert busy.session.tick(limits.idle_seconds) is None


def test_keepalive_seconds_and_pong_seconds() -> None:
    limits = Limits()
    alice, bob = pair(limits)
    alice.session.pinned = True
    assert alice.session.tick(limits.keepalive_seconds - 1) is None
    assert not alice.session.outbox.has_output
    assert alice.session.tick(limits.keepalive_seconds) is None
    probe = alice.output()
    assert probe
    late = limits.keepalive_seconds + limits.pong_seconds
    assert alice.session.tick(late - 1) is None
    bob.receive(probe, late - 1)
    alice.receive(bob.output(), late - 1)
    assert alice.session.tick(late) is None
    alice.output()
    assert alice.session.tick(late + limits.keepalive_seconds) is None
    assert alice.session.tick(late + limits.keepalive_seconds + limits.pong_seconds) is Reason.DEADLINE
    assert alice.hits() == {"pong_seconds": 1}


def test_rekey_records_bind_a_peer_that_never_rekeys() -> None:
    _, bob = pair(Limits(rekey_records=5))
    for index in range(10):
        bob.receive(record(frame(200, index)))
    assert violation(bob, record(frame(200, 0))) is Reason.EXPIRED


def test_request_number_max() -> None:
    alice, _ = pair(Limits(request_number_max=5))
    assert alice.session.numbers_left
    for _ in range(3):
        alice.session.send_request("t", b"m")
    assert not alice.session.numbers_left


# --- what a peer may not do -----------------------------------------------------------------------------------------------

DATA_1 = frame(frames.DATA, 1, frames.FOUR_BYTES.pack(10))
OPEN_1 = opening(frames.REQUEST, 1, b"m", size=1000, window=1000)


@pytest.mark.parametrize(
    "data",
    [
        record(b"short"),
        record(frames.HEADER.pack(frames.PING, 0, 9, 0) + bytes(8)),
        record(frame(frames.PING, 0, b"")),
        record(frame(0, 0)),
        record(frame(13, 0)),
        record(frame(127, 0)),
        record(opening(frames.REQUEST, 2, b"m")),
        record(opening(frames.REQUEST, 0, b"m")),
        record(opening(frames.REQUEST, 3, b"m"), opening(frames.REQUEST, 1, b"m")),
        record(opening(frames.REQUEST, 1, b"m"), opening(frames.REQUEST, 1, b"m")),
        record(opening(frames.REPLY, 2, b"m")),
        record(opening(frames.REPLY, 1, b"m")),
        record(frame(frames.REQUEST, 1, b"too short")),
        record(opening(frames.REQUEST, 1, b"m", b"xyz", size=5)),
        record(frame(frames.REQUEST, 1, frames.OPENING.pack(9, 0, 0) + b"m"), opening(frames.REQUEST, 3, b"m")),
        record(frame(frames.MORE, 1, b"x")),
        record(frame(frames.REQUEST, 1, frames.OPENING.pack(9, 0, 0) + b"m"), frame(frames.MORE, 3, b"x")),
        record(frame(frames.REQUEST, 1, frames.OPENING.pack(3, 0, 0) + b"m"), frame(frames.MORE, 1, b"xxx")),
        record(frame(frames.REQUEST, 1, frames.OPENING.pack(3, 0, 0) + b"m"), frame(frames.MORE, 1, b"")),
        record(DATA_1),
        record(OPEN_1, frame(frames.DATA, 1, frames.FOUR_BYTES.pack(0))),
        record(OPEN_1, frame(frames.DATA, 1, b"abc")),
        record(OPEN_1, DATA_1, frame(frames.PING, 0, bytes(8))),
        record(OPEN_1, DATA_1) + record(b"x" * 11),
        record(OPEN_1, DATA_1) + record(b""),
        record(frame(frames.CREDIT, 1, bytes(8))),
        record(frame(frames.CREDIT, 1, bytes(7))),
        record(frame(frames.CANCEL, 1)),
        record(frame(frames.CANCEL, 2)),
        record(frame(frames.REFUSAL, 2, b"\x82\xa6reason\xa4busy\xa6detail\xa0")),
        record(frame(frames.REKEY, 0), frame(frames.PING, 0, bytes(8))),
        record(frame(frames.WINDOW, 0, b"")),
    ],
)
def test_bad_frames_are_named(data) -> None:
    _, bob = pair()
    assert violation(bob, data) is Reason.BAD_FRAME


def test_a_malformed_goodbye_or_refusal_is_named_by_the_codec() -> None:
    alice, bob = pair()
    assert violation(bob, record(frame(frames.GOODBYE, 0, b"\xc1"))) is Reason.RESERVED_BYTE
    alice.session.send_request("t", b"m")
    assert violation(alice, record(frame(frames.REFUSAL, 1, b"\x80"))) is Reason.WRONG_TYPE


def test_incomplete_records_wait() -> None:
    _, bob = pair()
    data = record(opening(frames.REQUEST, 1, b"m"))
    for size in range(len(data)):
        assert bob.session.receive(memoryview(bytearray(data[:size])), 0.0) == 0
    bob.receive(data)
    assert len(bob.seen) == 1
