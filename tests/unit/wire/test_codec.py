"""Encoding and strict decoding of messages."""

import tracemalloc
from typing import Any

import msgpack
import msgspec
import pytest

from p2pnode.errors import ProtocolViolation
from p2pnode.reasons import Reason
from p2pnode.wire.canonical import check_canonical
from p2pnode.wire.codec import LIMIT_BYTES, decode, decode_numbered, encode, encode_numbered
from p2pnode.wire.messages.market import Cheque
from p2pnode.wire.messages.session import Done, Envelope, Goodbye, Refusal
from p2pnode.wire.messages.work import Call, ModelManifest, ValueHeader
from p2pnode.wire.registry import registered

CHEQUE = Cheque(b"a" * 32, b"p" * 32, 3, b"r" * 32, 500, b"c" * 32, 1_700_000_000_000)


def reason(cls: Any, data: bytes, **arguments: Any) -> Reason | None:
    try:
        decode(cls, data, **arguments)
    except ProtocolViolation as violation:
        return violation.reason
    return None


def map_with(extra: bytes, fields: int = 1) -> bytes:
    """Give a good Goodbye with more in its map: `extra` holds keys and values."""
    return bytes([0x81 + fields]) + encode(Goodbye("bye"))[1:] + extra


def test_roundtrip_and_field_order() -> None:
    data = encode(CHEQUE)
    assert decode(Cheque, data) == CHEQUE
    assert list(msgpack.unpackb(data)) == ["agreement", "provider", "slice", "receipt", "total", "preimage", "issued_ms"]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_is_decoded(kind: Any) -> None:
    assert decode(Cheque, kind(encode(CHEQUE))) == CHEQUE
    assert decode_numbered(kind(encode_numbered(CHEQUE))) == CHEQUE


def test_unknown_fields_are_ignored() -> None:
    assert decode(Goodbye, map_with(b"\xa3new\x93\x01\xa1x\x81\xa1y\xc0")) == Goodbye("bye")


def test_missing_fields_with_defaults_take_them() -> None:
    assert decode(Done, b"\x80") == Done()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", Reason.TRUNCATED),
        (encode(CHEQUE)[:-1], Reason.TRUNCATED),
        (b"\x81\xa6reason\xdb\xff\xff\xff\xff", Reason.TRUNCATED),
        (map_with(b"\xa1x\xdd\xff\xff\xff\xff"), Reason.TRUNCATED),
        (map_with(b"\xa1x\xdf\xff\xff\xff\xff"), Reason.TRUNCATED),
        (encode(Goodbye("bye")) + b"\xc0", Reason.TRAILING_BYTES),
        (map_with(b"\xa1x" + b"\x91" * 32 + b"\xc0"), Reason.TOO_DEEP),
        (map_with(b"\xa1x" + b"\x91" * 5000 + b"\xc0"), Reason.TOO_DEEP),
        (map_with(b"\xa1x" + b"\x81\xa1y" * 32 + b"\xc0"), Reason.TOO_DEEP),
        (map_with(b"\xa1x\xd4\x05\x00"), Reason.EXTENSION_TYPE),
        (map_with(b"\xa1x\xd6\xff\x00\x00\x00\x01"), Reason.EXTENSION_TYPE),
        (map_with(b"\xa1x\xc7\x00\x07"), Reason.EXTENSION_TYPE),
        (map_with(b"\xa6reason\xa1z"), Reason.DUPLICATE_KEY),
        (map_with(b"\xa1x\x82\xa1y\x01\xa1y\x02"), Reason.DUPLICATE_KEY),
        (b"\x81\xa6reason\xd9\x03bye", Reason.NOT_MINIMAL),
        (b"\xde\x00\x01\xa6reason\xa3bye", Reason.NOT_MINIMAL),
        (b"\x81\xd9\x06reason\xa3bye", Reason.NOT_MINIMAL),
        (map_with(b"\xa1x\xcc\x01"), Reason.NOT_MINIMAL),
        (map_with(b"\xa1x\xd0\xff"), Reason.NOT_MINIMAL),
        (map_with(b"\xa1x\xd1\x00\x80"), Reason.NOT_MINIMAL),
        (map_with(b"\xa1x\xc5\x00\x01z"), Reason.NOT_MINIMAL),
        (map_with(b"\xa1x\xca\x3f\x80\x00\x00"), Reason.NOT_MINIMAL),
        (map_with(b"\xa1x\xa1\xff"), Reason.BAD_UTF8),
        (map_with(b"\xa1x\xa3\xed\xa0\x80"), Reason.BAD_UTF8),
        (b"\x81\xa6reason\xa1\xff", Reason.BAD_UTF8),
        (map_with(b"\xa1\xff\x01"), Reason.BAD_UTF8),
        (map_with(b"\x01\x01"), Reason.BAD_KEY),
        (map_with(b"\xc4\x01x\x01"), Reason.BAD_KEY),
        (map_with(b"\xa1x\x81\xc4\x01y\x01"), Reason.BAD_KEY),
        (map_with(b"\xa1x\x81\x90\x01"), Reason.BAD_KEY),
        (map_with(b"\xa1x\xc1"), Reason.RESERVED_BYTE),
        (b"\x81\xa6reason\x05", Reason.WRONG_TYPE),
        (b"\x81\xa6reason\xc4\x01x", Reason.WRONG_TYPE),
        (b"\x80", Reason.WRONG_TYPE),
        (b"\x91\xa3bye", Reason.WRONG_TYPE),
        (b"\xc0", Reason.WRONG_TYPE),
        (b"\x81\xa6reason\xd9\x41" + b"x" * 65, Reason.WRONG_TYPE),
    ],
)
def test_every_breach_is_named(data: bytes, expected: Reason) -> None:
    assert reason(Goodbye if data != encode(CHEQUE)[:-1] else Cheque, data) is expected


def test_the_first_breach_in_order_counts() -> None:
    assert reason(Goodbye, map_with(b"\xa1x\xcc\x01\xa1y\xc1", 2)) is Reason.NOT_MINIMAL


def test_size_is_checked_before_anything_else() -> None:
    data = map_with(b"\xa1x\xc6" + LIMIT_BYTES.to_bytes(4, "big") + bytes(LIMIT_BYTES))
    assert reason(Goodbye, data) is Reason.TOO_LARGE
    assert reason(Goodbye, data, limit=len(data)) is None
    assert reason(Goodbye, encode(Goodbye("bye")), limit=5) is Reason.TOO_LARGE


def test_values_at_the_depth_limit_pass() -> None:
    assert reason(Goodbye, map_with(b"\xa1x" + b"\x91" * 30 + b"\x90")) is None
    assert reason(Goodbye, map_with(b"\xa1x" + b"\x91" * 31 + b"\x90")) is Reason.TOO_DEEP


def nested_call(levels: int) -> Call:
    header = ValueHeader("x", 1, 0, (), 0)
    for _ in range(levels):
        header = ValueHeader("x", 1, 0, (), 0, (header,))
    return Call(b"a" * 32, 1, b"\x91" * 32, (header,), ())


def test_a_message_class_that_contains_itself_cannot_nest_beyond_the_limit() -> None:
    # Map, tuple of headers, then two containers a level, and the innermost header's three tuples.
    assert decode(Call, encode(nested_call(13))) == nested_call(13)
    assert reason(Call, encode(nested_call(15))) is Reason.TOO_DEEP
    bomb = encode(nested_call(0)).replace(b"\xa5items\x90", b"\xa5items\x91\x81" * 20_000)
    assert reason(Call, bomb) in (Reason.TRUNCATED, Reason.TOO_DEEP)


def test_a_depth_limit_is_the_same_for_the_scanner_and_for_types() -> None:
    for levels in range(10, 18):
        data = encode(nested_call(levels))
        try:
            check_canonical(data)
            by_scanner = None
        except ProtocolViolation as violation:
            by_scanner = violation.reason
        assert reason(Call, data) is by_scanner


@pytest.mark.slow
def test_a_bomb_of_small_items_is_bounded_in_items_and_memory() -> None:
    count = 5_000_000
    bomb = map_with(b"\xa1x\xdd" + count.to_bytes(4, "big") + b"\x80" * count)
    tracemalloc.start()
    assert reason(Goodbye, bomb) is Reason.TOO_LARGE
    assert reason(Goodbye, bomb, limit=len(bomb)) is Reason.TOO_MANY_ITEMS
    small = map_with(b"\xa1x\xdc" + (60_000).to_bytes(2, "big") + b"\x80" * 60_000)
    assert reason(Goodbye, small) is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20


def test_claimed_sizes_are_not_believed() -> None:
    data = b"\x83\xa4name\xa0\xa5blobs\xdd\x7f\xff\xff\xff"
    tracemalloc.start()
    assert reason(ModelManifest, data) is Reason.TRUNCATED
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_numbers_lead_to_classes() -> None:
    assert encode_numbered(Done()) == b"\x00\x05" + encode(Done())
    assert decode_numbered(b"\x00\x02" + encode(Refusal("busy", ""))) == Refusal("busy", "")
    assert {40, 45, 80, 85} <= set(registered()), "the message modules are not imported"


@pytest.mark.parametrize(
    ("data", "expected"), [(b"", Reason.TRUNCATED), (b"\x00", Reason.TRUNCATED), (b"\xff\xff\x80", Reason.UNKNOWN_MESSAGE)]
)
def test_bad_numbers(data: bytes, expected: Reason) -> None:
    with pytest.raises(ProtocolViolation) as caught:
        decode_numbered(data)
    assert caught.value.reason is expected


def test_a_message_class_with_an_untyped_field_is_a_bug_of_ours() -> None:
    class Loose(msgspec.Struct):
        value: Any

    with pytest.raises(TypeError, match="no message may have"):
        decode(Loose, b"\x80")


def test_a_detail_stays_short() -> None:
    with pytest.raises(ProtocolViolation) as caught:
        decode(Envelope, b"\x81\xa4kind\xa1x")
    assert caught.value.reason is Reason.WRONG_TYPE
    assert len(caught.value.detail) <= 200
