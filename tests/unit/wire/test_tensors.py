"""Values to headers and payload and back."""

from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import pytest

from p2pnode.errors import ProtocolViolation, WorkError
from p2pnode.reasons import Reason
from p2pnode.wire.messages.work import ValueHeader
from p2pnode.wire.tensors import (
    ALIGNMENT,
    ValuesHasher,
    check_headers,
    decode_values,
    elements,
    encode_values,
    headers_bytes,
    parse_headers,
    values_hash,
    values_size,
)

NUMERIC = ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?"]


def through_the_wire(values: dict[str, Any]) -> dict[str, Any]:
    headers, chunks, size = encode_values(values)
    payload = b"".join(chunks)
    assert len(payload) == size == values_size(headers) == check_headers(headers)
    return decode_values(parse_headers(headers_bytes(headers)), payload)


def same(left: Any, right: Any) -> bool:
    if isinstance(left, np.ndarray):
        if left.dtype == object:
            return left.shape == right.shape and left.tolist() == right.tolist()
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    if isinstance(left, list):
        return isinstance(right, list) and len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right


@pytest.mark.parametrize("dtype", NUMERIC)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0,), (2, 0, 3), (1, 1, 1, 1)])
def test_numeric_tensors_of_any_rank(dtype: str, shape: tuple[int, ...]) -> None:
    array = (np.arange(np.prod(shape, dtype=int)) % 2).astype(dtype).reshape(shape)
    assert same(array, through_the_wire({"x": array})["x"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"])
def test_types_that_numpy_lacks(dtype: str) -> None:
    array = np.array([[1.0, -2.0, 0.5]]).astype(getattr(ml_dtypes, dtype))
    assert same(array, through_the_wire({"x": array})["x"])
    assert same(array[0, 0:1].reshape(()), through_the_wire({"x": array[0, 0]})["x"])


@pytest.mark.parametrize(
    "array",
    [np.array(["", "a", "é", "漢字🍺", "x" * 300], object).reshape(5, 1), np.array("one", object), np.empty((0, 2), object)],
)
def test_texts(array: np.ndarray) -> None:
    assert same(array, through_the_wire({"x": array})["x"])


@pytest.mark.parametrize(
    "array", [np.array(["ab", "é"]), np.array(["ab", "é"], np.dtypes.StringDType()), np.array([b"ab", "é".encode()], object)]
)
def test_other_texts_become_objects(array: np.ndarray) -> None:
    assert same(np.array(["ab", "é"], object), through_the_wire({"x": array})["x"])


def test_sequences_maps_and_nothing() -> None:
    values = {
        "sequence": [np.arange(3.0), np.array(["t"], object), np.zeros((0, 4), np.float32)],
        "empty": [],
        "probabilities": [{"spam": 0.25, "ham": 0.75}, {"spam": 1.0, "ham": 0.0}],
        "numbered": {3: 0.5, -1: 0.25},
        "names": {1: "one", 2: "two"},
        "counts": {"a": 1},
        "nobody": {},
        "optional": None,
        "nested": [[np.array(1)], [None]],
    }
    decoded = through_the_wire(values)
    assert list(decoded) == list(values)
    assert same(list(values.values()), list(decoded.values()))


def test_every_leaf_starts_aligned_and_the_last_is_not_padded() -> None:
    values = {"a": np.ones(3, np.uint8), "b": [np.ones(65, np.uint8), np.zeros(0)], "c": {"k": 1.0}, "d": np.ones(1, np.uint8)}
    headers, chunks, size = encode_values(values)
    # a at 0, b[0] at 64, the map's keys (4 + 1 bytes) at 192 and values (8 bytes) at 256, d at 320.
    assert size == 321
    payload = b"".join(chunks)
    assert payload[3:64] == bytes(61)
    assert payload[196:197] == b"k"
    assert payload[320] == 1
    assert size % ALIGNMENT != 0
    assert same(values["d"], decode_values(headers, payload)["d"])


def test_a_contiguous_array_is_sent_in_place_and_received_in_place() -> None:
    array = np.zeros((4, 4), np.float32)
    headers, chunks, _ = encode_values({"x": array})
    array[0, 0] = 7.0
    assert np.frombuffer(chunks[0], np.float32)[0] == 7.0
    payload = bytearray(b"".join(chunks))
    decoded = decode_values(headers, memoryview(payload))["x"]
    payload[0:4] = np.float32(9.0).tobytes()
    assert decoded[0, 0] == 9.0


def test_a_read_only_payload_gives_read_only_arrays() -> None:
    headers, chunks, _ = encode_values({"x": np.ones(2)})
    assert not decode_values(headers, bytes(chunks[0]))["x"].flags.writeable


def test_other_layouts_are_copied_once() -> None:
    base = np.arange(12, dtype=np.int64).reshape(3, 4)
    for array in (base.T, base[:, ::2], base[::-1], np.asfortranarray(base)):
        assert same(np.ascontiguousarray(array), through_the_wire({"x": array})["x"])
    assert same(np.arange(3, dtype=np.int32), through_the_wire({"x": np.arange(3, dtype=">i4")})["x"])
    assert same(np.array(2.5), through_the_wire({"x": np.array(2.5, ">f8")})["x"])
    assert same(np.arange(3), through_the_wire({"x": np.arange(3, dtype=np.longlong)})["x"])
    assert same(np.array(3, np.uint8), through_the_wire({"x": np.uint8(3)})["x"])


@pytest.mark.parametrize(
    "value",
    [
        np.zeros(2, complex),
        np.array([1], "M8[s]"),
        np.zeros(1, [("a", "i4")]),
        np.array([1, "x"], object),
        np.array([b"\xff"], object),
        np.array(["\ud800"], object),
        5,
        "text",
        {1: object()},
        {1.5: 1},
        {"a": 1, 2: 1},
        {2**70: 1},
        {"a": True},
        [[[[[None]]]]],
        [3],
    ],
    ids=repr,
)
def test_what_onnx_cannot_hold_is_our_callers_fault(value: Any) -> None:
    with pytest.raises(WorkError) as caught:
        encode_values({"x": value})
    assert caught.value.reason is Reason.WRONG_DTYPE


def header(**changes: Any) -> ValueHeader:
    return msgspec.structs.replace(ValueHeader("x", 0, 1, (2, 2), 16), **changes)


TEXT = ValueHeader("x", 0, 8, (2,), 10)
KEYS, VALUES = ValueHeader("", 0, 7, (2,), 16), ValueHeader("", 0, 11, (2,), 16)
MAP = ValueHeader("x", 2, 0, (), 0, (KEYS, VALUES))


def lengths(*sizes: int) -> bytes:
    return np.array(sizes, "<u4").tobytes()


@pytest.mark.parametrize(
    ("headers", "payload"),
    [
        ((header(),), bytes(15)),
        ((header(),), bytes(17)),
        ((header(),), b""),
        ((), b"x"),
        ((header(size=15),), bytes(15)),
        ((header(shape=(2**40,) * 32),), bytes(16)),
        ((header(shape=(2**40,) * 32, size=0),), b""),
        ((header(shape=(0, *((2**40,) * 31)), size=0),), b""),
        ((header(shape=(2**32, 2**32), size=0),), b""),
        ((header(dtype=0),), bytes(16)),
        ((header(dtype=14),), bytes(16)),
        ((header(dtype=64),), bytes(16)),
        ((header(items=(header(),)),), bytes(16)),
        ((header(), header()), bytes(80)),
        ((header(dtype=9, shape=(16,)),), b"\1\0" * 7 + b"\2\0"),
        ((TEXT,), lengths(1, 2) + b"ab"),
        ((TEXT,), lengths(1, 2**32 - 1) + b"ab"),
        ((TEXT,), lengths(1, 1) + b"a\xff"),
        ((msgspec.structs.replace(TEXT, size=7),), bytes(7)),
        ((msgspec.structs.replace(TEXT, shape=(0,)),), bytes(10)),
        ((msgspec.structs.replace(TEXT, shape=(2**40, 2**40)),), bytes(10)),
        ((msgspec.structs.replace(TEXT, shape=(0, *((2**40,) * 30)), size=0),), b""),
        ((header(kind=1, items=()),), bytes(16)),
        ((ValueHeader("x", 3, 0, (), 0, (header(),)),), bytes(16)),
        ((ValueHeader("x", 2, 0, (), 0),), b""),
        ((ValueHeader("x", 2, 0, (), 0, (KEYS,)),), bytes(16)),
        ((ValueHeader("x", 2, 0, (), 0, (VALUES, VALUES)),), bytes(80)),
        ((ValueHeader("x", 2, 0, (), 0, (KEYS, ValueHeader("", 0, 11, (1,), 8))),), bytes(72)),
        ((ValueHeader("x", 2, 0, (), 0, (KEYS, ValueHeader("", 1, 0, (2,), 0))),), bytes(16)),
        ((MAP,), bytes(80)),
        (
            (
                ValueHeader(
                    "x",
                    1,
                    0,
                    (),
                    0,
                    (
                        ValueHeader(
                            "",
                            1,
                            0,
                            (),
                            0,
                            (ValueHeader("", 1, 0, (), 0, (ValueHeader("", 1, 0, (), 0, (ValueHeader("", 1, 0, (), 0),)),)),),
                        ),
                    ),
                ),
            ),
            b"",
        ),
    ],
)
def test_unsound_headers_or_payload_are_the_peers_fault(headers: tuple[ValueHeader, ...], payload: bytes) -> None:
    with pytest.raises(ProtocolViolation) as caught:
        decode_values(headers, payload)
    assert caught.value.reason is Reason.BAD_TENSOR


@pytest.mark.parametrize(
    "headers", [(header(size=15),), (header(), header()), (header(shape=(2**40,) * 32),), (ValueHeader("x", 2, 0, (), 0),)]
)
def test_headers_alone_are_refused_before_memory_is_set_aside(headers: tuple[ValueHeader, ...]) -> None:
    with pytest.raises(ProtocolViolation) as caught:
        check_headers(headers)
    assert caught.value.reason is Reason.BAD_TENSOR


def test_too_many_leaves_are_refused() -> None:
    headers = (ValueHeader("x", 1, 0, (), 0, (ValueHeader("", 0, 1, (0,), 0),) * 65_537),)
    with pytest.raises(ProtocolViolation, match="more than 65536"):
        check_headers(headers)
    with pytest.raises(ProtocolViolation, match="more than 65536"):
        decode_values(headers, b"")


def test_too_many_texts_are_refused_before_they_are_made() -> None:
    count = 2**20 + 1
    with pytest.raises(ProtocolViolation, match="texts"):
        decode_values((ValueHeader("x", 0, 8, (count,), 4 * count),), bytes(4 * count))


def test_the_hash_covers_headers_and_payload_however_chunked() -> None:
    values = {"a": np.arange(5.0), "b": np.ones(3, np.int8)}
    headers, chunks, _ = encode_values(values)
    expected = values_hash(headers, chunks)
    assert expected == values_hash(headers, memoryview(b"".join(chunks))) == values_hash(headers, bytearray(b"".join(chunks)))
    other_headers, other_chunks, _ = encode_values({"a": np.arange(5.0), "c": np.ones(3, np.int8)})
    assert expected != values_hash(other_headers, other_chunks)
    assert expected != values_hash(*encode_values({"a": np.arange(5.0) + 1e-9, "b": np.ones(3, np.int8)})[:2])


@pytest.mark.parametrize("size", [5, (1 << 20) - 1, 1 << 20, 5_000_001])
def test_the_hash_is_the_same_with_many_threads(size):
    headers, chunks, _ = encode_values({"x": np.arange(size, dtype=np.uint8)})
    assert values_hash(headers, chunks, parallel=True) == values_hash(headers, chunks)


@pytest.mark.parametrize("step", [1, 1000, 65_519, 65_536, 262_076, 1_000_000])
@pytest.mark.parametrize("size", [0, 1, 65_536, 700_001])
def test_the_hash_of_a_payload_that_still_comes_is_that_of_the_whole(size, step):
    headers, chunks, _ = encode_values({"x": np.arange(size, dtype=np.uint8)})
    payload = memoryview(b"".join(chunks))
    hasher = ValuesHasher(headers)
    for end in range(step, size, max(step, size // 50)):
        hasher.advance(payload[:end])
    assert hasher.digest(payload) == values_hash(headers, payload)


def test_elements_count_every_tensor() -> None:
    headers, _, _ = encode_values({"a": np.zeros((2, 3)), "b": [np.array(1.0), np.zeros(0)], "c": {"k": 1.0}, "d": None})
    assert elements(headers) == 6 + 1 + 0 + 2
