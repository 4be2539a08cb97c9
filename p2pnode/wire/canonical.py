"""What exactly is wrong with a msgpack value: a scanner that accepts one form of every value and names every breach.

p2pnode signs bytes, so a value must have one encoding. Integers, lengths and container heads use their shortest form;
floats are always 64 bits, so a float32 is refused as not-minimal; map keys are distinct texts; extension types (timestamps
among them) and the byte 0xc1 do not occur. `codec.decode` accepts good messages in C and comes here only to find
out why a message is bad. Source: the msgpack specification, github.com/msgpack/msgpack/blob/master/spec.md.
"""

from typing import Final

from p2pnode.errors import ProtocolViolation
from p2pnode.reasons import Reason

DEPTH_MAX: Final = 32
# Scanning costs about 0.3 µs an item, so this bounds the time that a hostile message can take to about 40 ms.
ITEMS_MAX: Final = 131_072

_INTEGER, _TEXT, _BINARY, _FLOAT, _ARRAY, _MAP = range(6)

# First byte -> (kind, bytes of the number that follows, smallest such number in minimal form).
_SIZED: Final[dict[int, tuple[int, int, int]]] = {
    0xC4: (_BINARY, 1, 0), 0xC5: (_BINARY, 2, 2**8), 0xC6: (_BINARY, 4, 2**16),
    0xCB: (_FLOAT, 8, 0),
    0xCC: (_INTEGER, 1, 2**7), 0xCD: (_INTEGER, 2, 2**8), 0xCE: (_INTEGER, 4, 2**16), 0xCF: (_INTEGER, 8, 2**32),
    0xD9: (_TEXT, 1, 32), 0xDA: (_TEXT, 2, 2**8), 0xDB: (_TEXT, 4, 2**16),
    0xDC: (_ARRAY, 2, 16), 0xDD: (_ARRAY, 4, 2**16),
    0xDE: (_MAP, 2, 16), 0xDF: (_MAP, 4, 2**16),
}  # fmt: skip
# First byte -> (bytes that follow, largest number in minimal form), for the signed forms, which hold negative numbers only.
_SIGNED: Final[dict[int, tuple[int, int]]] = {
    0xD0: (1, -33), 0xD1: (2, -(2**7) - 1), 0xD2: (4, -(2**15) - 1), 0xD3: (8, -(2**31) - 1),
}  # fmt: skip
_EXTENSIONS: Final = frozenset((0xC7, 0xC8, 0xC9, 0xD4, 0xD5, 0xD6, 0xD7, 0xD8))


def check_canonical(data: bytes, items_max: int = ITEMS_MAX) -> None:
    """Return if `data` is exactly one value in its one accepted form.

    Raises ProtocolViolation with TRUNCATED, TRAILING_BYTES, TOO_DEEP, TOO_MANY_ITEMS, EXTENSION_TYPE, DUPLICATE_KEY,
    NOT_MINIMAL, BAD_UTF8, BAD_KEY or RESERVED_BYTE: of the first breach in order of bytes. The detail is its position.
    """
    position, items = 0, 0
    # One entry per open container: values still to come, and for a map the keys so far (a value count is keys + values).
    open_containers: list[tuple[int, set[str] | None]] = []
    remaining: int = 1
    keys: set[str] | None = None
    while True:
        items += 1
        if items > items_max:
            raise ProtocolViolation(Reason.TOO_MANY_ITEMS, f"more than {items_max}")
        kind, length, start, end = _head(data, position)
        if keys is not None and remaining % 2 == 0:
            _check_key(keys, data, position, kind, start, end)
        elif kind == _TEXT:
            _text(data, position, start, end)
        remaining -= 1
        position = end
        if kind >= _ARRAY:
            if len(open_containers) >= DEPTH_MAX:
                raise ProtocolViolation(Reason.TOO_DEEP, f"more than {DEPTH_MAX} containers in each other at byte {start}")
            open_containers.append((remaining, keys))
            remaining, keys = (length, None) if kind == _ARRAY else (2 * length, set())
            if remaining > len(data) - position:
                # Every value takes at least a byte: refuse the claimed length before anything is set aside for it.
                raise ProtocolViolation(Reason.TRUNCATED, f"a container of {length} items at byte {start}")
        while remaining == 0 and open_containers:
            remaining, keys = open_containers.pop()
        if remaining == 0:
            break
    if position != len(data):
        raise ProtocolViolation(Reason.TRAILING_BYTES, f"{len(data) - position} after the value")


def _head(data: bytes, position: int) -> tuple[int, int, int, int]:
    """Give (kind, length, where the contents start, where they end) of the value at `position`."""
    if position >= len(data):
        raise ProtocolViolation(Reason.TRUNCATED, f"a value is missing at byte {position}")
    first = data[position]
    start = position + 1
    if first < 0x80 or first >= 0xE0 or 0xC2 <= first <= 0xC3 or first == 0xC0:
        return _INTEGER, 0, start, start
    if first < 0x90:
        return _MAP, first & 0x0F, start, start
    if first < 0xA0:
        return _ARRAY, first & 0x0F, start, start
    if first < 0xC0:
        return _TEXT, 0, start, _end(data, start, first & 0x1F)
    if first in _SIZED:
        kind, width, smallest = _SIZED[first]
        start = _end(data, start, width)
        number = int.from_bytes(data[start - width : start], "big")
        if number < smallest:
            raise ProtocolViolation(Reason.NOT_MINIMAL, f"at byte {position}")
        return kind, number, start, (_end(data, start, number) if kind in (_TEXT, _BINARY) else start)
    if first in _SIGNED:
        width, largest = _SIGNED[first]
        start = _end(data, start, width)
        if int.from_bytes(data[start - width : start], "big", signed=True) > largest:
            raise ProtocolViolation(Reason.NOT_MINIMAL, f"at byte {position}")
        return _INTEGER, 0, start, start
    if first in _EXTENSIONS:
        raise ProtocolViolation(Reason.EXTENSION_TYPE, f"at byte {position}")
    if first == 0xCA:
        raise ProtocolViolation(Reason.NOT_MINIMAL, f"a 32-bit float at byte {position}")
    raise ProtocolViolation(Reason.RESERVED_BYTE, f"0xc1 at byte {position}")


def _end(data: bytes, start: int, size: int) -> int:
    if size > len(data) - start:
        raise ProtocolViolation(Reason.TRUNCATED, f"{size} bytes are missing at byte {start}")
    return start + size


def _text(data: bytes, position: int, start: int, end: int) -> str:
    try:
        return data[start:end].decode()
    except UnicodeDecodeError:
        raise ProtocolViolation(Reason.BAD_UTF8, f"at byte {position}") from None


def _check_key(keys: set[str], data: bytes, position: int, kind: int, start: int, end: int) -> None:
    if kind != _TEXT:
        raise ProtocolViolation(Reason.BAD_KEY, f"a key that is not text at byte {position}")
    key = _text(data, position, start, end)
    if key in keys:
        raise ProtocolViolation(Reason.DUPLICATE_KEY, f"at byte {position}")
    keys.add(key)
