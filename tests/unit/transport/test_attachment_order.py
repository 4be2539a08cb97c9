"""Many attachments on one session: which goes first, when memory is taken for it, and who counts as slow."""

from p2pnode.reasons import Reason
from p2pnode.transport import events, frames
from p2pnode.transport.limits import Limits
from tests.unit.transport.test_session import End, exchange, frame, opening, pair, record

MIB = 1 << 20


def finished(end: End) -> list[int]:
    return [seen.number for seen in end.seen if isinstance(seen, events.AttachmentArrived)]


def learned(accept: bool = True) -> tuple[End, End]:
    """A pair whose windows have grown, so that credit holds nothing back."""
    alice, bob = pair()
    alice.session.send_request("t", b"m", [bytes(100 * MIB)])
    exchange(alice, bob)
    bob.seen.clear()
    bob.accept = accept
    return alice, bob


def test_the_attachment_nearest_its_end_goes_first() -> None:
    alice, bob = learned()
    large = alice.session.send_request("large", b"m", [bytes(8 * MIB)])
    small = alice.session.send_request("small", b"m", [bytes(MIB)])
    exchange(alice, bob)
    assert finished(bob) == [small, large]


def test_equal_attachments_are_complete_one_after_another() -> None:
    alice, bob = learned()
    numbers = [alice.session.send_request(index, b"m", [bytes(4 * MIB)]) for index in range(8)]
    begun: list[int] = []
    space = memoryview(bytearray(alice.limits.send_buffer_bytes))
    while size := alice.session.output(space):
        bob.receive(bytes(space[:size]))
        begun.append(sum(stream.received > 0 for stream in bob.session.inbox.streams.values()))
        alice.receive(bob.output())
    assert finished(bob) == numbers
    assert max(begun) == 1


def test_a_large_attachment_gets_an_eighth_while_smaller_ones_keep_coming() -> None:
    alice, bob = learned()
    large = alice.session.send_request("large", b"m", [bytes(64 * MIB)])
    now, bursts = 0.0, 0
    space = memoryview(bytearray(alice.limits.send_buffer_bytes))
    while large in alice.session.outbox.streams:
        if len(alice.session.outbox.streams) < 3:
            alice.session.send_request("small", b"m", [bytes(MIB)])
        now += 0.5
        alice.session.advance(now)
        size = alice.session.output(space)
        bob.receive(bytes(space[:size]), now)
        alice.receive(bob.output(), now)
        bursts += 1
    # Bursts of half a MiB, of which it got every eighth.
    assert 7 * 64 * 2 < bursts < 9 * 64 * 2 + 100


def test_memory_is_taken_when_the_first_bytes_come() -> None:
    alice, bob = learned(accept=False)
    taken: list[int] = []
    numbers = [alice.session.send_request(index, b"m", [bytes([index]) * (4 * MIB)]) for index in range(3)]
    sinks = {number: memoryview(bytearray(4 * MIB)) for number in numbers}

    def source(number: int):
        def give() -> memoryview:
            taken.append(number)
            return sinks[number]

        return give

    space = memoryview(bytearray(alice.limits.send_buffer_bytes))
    seen: list[list[int]] = []
    accepted: set[int] = set()
    while size := alice.session.output(space):
        bob.receive(bytes(space[:size]))
        for number in {entry.number for entry in bob.seen if hasattr(entry, "inline")} - accepted:
            accepted.add(number)
            bob.session.accept(number, source(number))
        bob.session.events.clear()
        alice.receive(bob.output())
        if not seen or seen[-1] != taken:
            seen.append(list(taken))
    # The first burst came together with the requests, before anybody had accepted it.
    assert seen == [numbers[:1], numbers[:2], numbers]
    assert [bytes(sinks[number][::MIB]) for number in numbers] == [bytes([index]) * 4 for index in range(3)]
    assert bob.budget.used == 0


def test_an_attachment_whose_memory_is_refused_is_discarded() -> None:
    alice, bob = learned(accept=False)
    first = alice.session.send_request("first", b"m", [bytes(MIB)])
    second = alice.session.send_request("second", b"m", [b"y" * (2 * MIB)])
    bob.receive(record(opening(frames.REQUEST, first, b"m", size=MIB, window=MIB)))
    bob.receive(record(opening(frames.REQUEST, second, b"m", size=2 * MIB, window=2 * MIB)))
    sink = memoryview(bytearray(2 * MIB))
    bob.session.accept(first, lambda: None)
    bob.session.accept(second, lambda: sink)
    assert bob.session.inbox.streams.keys() == {first, second}
    for number, byte, count in ((first, b"x", MIB), (second, b"y", 2 * MIB)):
        for _ in range(count // 32768):
            bob.receive(record(frames.DATA_FRAME.pack(frames.DATA, 0, 4, number, 32768)) + record(byte * 32768))
    assert not bob.session.inbox.streams
    assert sink == b"y" * (2 * MIB)
    assert bob.budget.used == 0


def test_what_has_come_is_shown_as_it_grows() -> None:
    alice, bob = pair(accept=False)
    data = bytes(range(256)) * 1000
    number = alice.session.send_request("t", b"m", [data])
    sink, shown = memoryview(bytearray(len(data))), []
    stream, held = alice.output(), b""
    for position in range(0, len(stream), 1000):
        held += stream[position : position + 1000]
        while len(held) >= 2 and (size := int.from_bytes(held[:2], "big") + 2) <= len(held):
            bob.receive(held[:size])
            held = held[size:]
            bob.session.accept(number, lambda: sink, lambda there: shown.append(bytes(there)))
    assert shown[-1] == data
    assert all(data.startswith(piece) for piece in shown)
    sizes = [len(piece) for piece in shown]
    assert sizes == sorted(set(sizes))
    assert len(sizes) > 2


def test_what_came_before_anybody_wanted_it_is_shown_too() -> None:
    alice, bob = pair(accept=False)
    data = bytes(range(256)) * 1000
    number = alice.session.send_request("t", b"m", [data])
    bob.receive(alice.output())
    shown: list[bytes] = []
    bob.session.accept(number, memoryview(bytearray(len(data))), lambda there: shown.append(bytes(there)))
    assert shown == [data]


def test_minimum_rate_is_asked_of_all_attachments_together() -> None:
    """They come one after another: that the second has not begun is nobody's fault."""
    limits = Limits(keepalive_seconds=1e9)
    _, bob = pair(limits)
    for number in (1, 3):
        bob.receive(record(opening(frames.REQUEST, number, b"m", size=10_000_000, window=200_000)))
    now, rate = 0.0, round(2 * limits.minimum_rate)
    while now < 4 * limits.minimum_rate_seconds:
        now += 1.0
        bob.receive(record(frame(frames.DATA, 1, frames.FOUR_BYTES.pack(rate))) + record(b"x" * rate), now)
        assert bob.session.tick(now) is None
    silent_from = now
    while bob.session.tick(now) is None:
        now += 1.0
    assert now <= silent_from + 2 * limits.minimum_rate_seconds
    assert bob.hits() == {"minimum_rate": 1}


def test_an_attachment_that_stands_still_is_not_hidden_by_another() -> None:
    limits = Limits(keepalive_seconds=1e9)
    _, bob = pair(limits)
    for number in (1, 3):
        bob.receive(record(opening(frames.REQUEST, number, b"m", size=100_000_000, window=200_000)))
    now = 0.0
    reason = None
    while reason is None and now < 2 * limits.stream_stall_seconds:
        now += 1.0
        bob.receive(record(frame(frames.DATA, 1, frames.FOUR_BYTES.pack(60_000))) + record(b"x" * 60_000), now)
        bob.output()
        reason = bob.session.tick(now)
    assert reason is Reason.TOO_SLOW
    assert limits.stream_stall_seconds < now <= limits.stream_stall_seconds + 2
    assert bob.hits() == {"stream_stall_seconds": 1}


def test_the_owner_of_a_small_attachment_hears_of_it_when_it_was_sent() -> None:
    """Not between sealing and sending, where whatever the owner does would delay it."""
    alice, _ = pair()
    told: list[str] = []
    alice.session.send_request("t", b"m", [b"small"], lambda: told.append("sent"))
    space = memoryview(bytearray(alice.limits.send_buffer_bytes))
    assert alice.session.output(space) > 0
    assert told == []
    assert alice.session.outbox.has_output
    assert alice.session.output(space) == 0
    assert told == ["sent"]
    assert not alice.session.outbox.has_output
