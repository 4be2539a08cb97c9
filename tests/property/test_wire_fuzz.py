"""Whatever bytes arrive, the wire layer gives a message or a ProtocolViolation, and the two ways of checking agree."""

from typing import Any

import hypothesis.extra.numpy as arrays
import msgpack
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pnode.errors import ProtocolViolation
from p2pnode.wire.canonical import check_canonical
from p2pnode.wire.codec import decode, decode_numbered, encode, encode_numbered
from p2pnode.wire.envelope import decode_envelope
from p2pnode.wire.messages.market import Cheque, Leaf, LeafList
from p2pnode.wire.messages.session import Done, Envelope, Goodbye
from p2pnode.wire.messages.work import Call, CallResult, ValueHeader
from p2pnode.wire.registry import registered
from p2pnode.wire.tensors import decode_values, encode_values, headers_bytes, parse_headers, values_hash

few = settings(max_examples=60, deadline=None)
pytestmark = pytest.mark.slow

HEADER = ValueHeader("input", 0, 1, (1, 4), 16)
EXAMPLES = [
    encode_numbered(message)
    for message in (
        Done("note"),
        Goodbye("idle"),
        Envelope(43, b"body" * 9, b"k" * 32, b"s" * 64),
        Cheque(b"a" * 32, b"p" * 32, 3, b"r" * 32, 2**40, b"c" * 32, 1_700_000_000_000),
        LeafList((Leaf(1, b"i" * 32, b"o" * 32, b"", 7),)),
        Call(b"a" * 32, 300, b"h" * 32, (HEADER, ValueHeader("s", 1, 0, (), 0, (HEADER,))), ("output",)),
        CallResult(b"h" * 32, (HEADER,), 70_000, 1, 2, 33, "cpu"),
    )
]
plain_values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=40)
    | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=10), inner, max_size=20),
    max_leaves=30,
)


def outcome(check: Any, *arguments: Any) -> Any:
    """Give what a check gives, or the reason of its refusal; anything else that is raised fails the test."""
    try:
        return check(*arguments)
    except ProtocolViolation as violation:
        return violation.reason


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Draw a good message with a few bytes changed, put in, taken out, or repeated."""
    data = bytearray(draw(st.sampled_from(EXAMPLES)))
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(data)))
        piece = draw(
            st.binary(max_size=4)
            | st.sampled_from([b"\xc1", b"\xdd\xff\xff\xff\xff", b"\x80", b"\x91" * 40, b"\xd6\xff\0\0\0\0"])
        )
        data[place : place + draw(st.integers(0, 6))] = piece
    return bytes(data)


@few
@given(st.binary(max_size=300))
def test_random_bytes(data: bytes) -> None:
    outcome(decode_numbered, data)
    outcome(check_canonical, data)
    outcome(decode_envelope, data)
    outcome(parse_headers, data)
    for cls in registered().values():
        outcome(decode, cls, data)


@settings(max_examples=400, deadline=None)
@given(mutated())
def test_mutated_messages(data: bytes) -> None:
    message = outcome(decode_numbered, data)
    if isinstance(message, msgspec.Struct):
        # What was accepted is canonical: the scanner has nothing against it, and its known fields survive.
        check_canonical(data[2:])
        assert decode(type(message), encode(message)) == message


@few
@given(plain_values)
def test_the_scanner_accepts_what_a_canonical_encoder_writes(value: Any) -> None:
    check_canonical(msgpack.packb(value))
    check_canonical(msgspec.msgpack.encode(value))
    body = msgpack.packb({"note": "x", "unknown": value})
    assert decode(Done, body) == Done("x")


@few
@given(plain_values, st.data())
def test_the_fast_check_and_the_scanner_agree(value: Any, data: st.DataObject) -> None:
    body = bytearray(msgpack.packb({"note": "x", "unknown": value}))
    place = data.draw(st.integers(0, len(body) - 1))
    body[place] = data.draw(st.integers(0, 255))
    by_codec, by_scanner = outcome(decode, Done, bytes(body)), outcome(check_canonical, bytes(body))
    if isinstance(by_codec, Done):
        assert by_scanner is None
    elif by_scanner is not None:
        assert by_codec is by_scanner


DTYPES = st.sampled_from(["?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"])
shapes = arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
tensors = DTYPES.flatmap(lambda dtype: arrays.arrays(dtype, shapes)) | shapes.flatmap(
    lambda shape: arrays.arrays(object, shape, elements=st.text(st.characters(codec="utf-8"), max_size=8), fill=st.nothing())
)
maps = st.dictionaries(st.integers(-(2**63), 2**63 - 1) | st.none().map(lambda _: 0), st.floats(allow_nan=False), max_size=4) | (
    st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), st.integers(-(2**63), 2**63 - 1), max_size=4)
)
values = st.recursive(tensors | maps | st.none(), lambda inner: st.lists(inner, max_size=3), max_leaves=4)


def plain(value: Any) -> Any:
    """Give something that compares equal exactly when two values are the same, NaNs included."""
    if isinstance(value, np.ndarray):
        content = value.tolist() if value.dtype == object else value.tobytes()
        return str(value.dtype), value.shape, content
    return [plain(item) for item in value] if isinstance(value, list) else value


@few
@given(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), values, max_size=4))
def test_values_survive_the_wire(named: dict[str, Any]) -> None:
    headers, chunks, size = encode_values(named)
    payload = b"".join(chunks)
    assert len(payload) == size
    received = parse_headers(headers_bytes(headers))
    decoded = decode_values(received, payload)
    assert {name: plain(value) for name, value in decoded.items()} == {name: plain(value) for name, value in named.items()}
    again, again_chunks, _ = encode_values(decoded)
    assert values_hash(again, again_chunks) == values_hash(headers, payload)


header_numbers = st.integers(0, 25) | st.sampled_from([2**20, 2**40, 2**53])
leaf_headers = st.builds(
    ValueHeader,
    st.text(max_size=2),
    st.integers(0, 3),
    st.integers(0, 25),
    st.lists(header_numbers, max_size=4).map(tuple),
    header_numbers,
)
any_headers = st.recursive(
    leaf_headers,
    lambda inner: st.builds(
        ValueHeader,
        st.text(max_size=2),
        st.integers(0, 3),
        st.just(0),
        st.just(()),
        st.just(0),
        st.lists(inner, max_size=3).map(tuple),
    ),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.lists(any_headers, max_size=3).map(tuple), st.binary(max_size=200))
def test_random_headers(headers: tuple[ValueHeader, ...], payload: bytes) -> None:
    outcome(decode_values, headers, payload)
