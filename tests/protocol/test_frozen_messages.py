"""Bytes that were once sent are understood for ever, and every message's encoding is on record.

`frozen_messages.txt` holds one line per message and shape it ever had: number, class name, hex of number and body. Lines are
never changed after a release; `python tests/protocol/test_frozen_messages.py` appends lines for what is new.
"""

import sys
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest

from p2pnode.wire.codec import decode_numbered, encode, encode_numbered
from p2pnode.wire.registry import class_of, registered

FROZEN = Path(__file__).with_name("frozen_messages.txt")


def read_frozen() -> list[tuple[int, str, bytes]]:
    """Give (number, class name, bytes) of every line."""
    lines = FROZEN.read_text().splitlines() if FROZEN.exists() else []
    fields = [line.split() for line in lines if line and not line.startswith("#")]
    return [(int(number), name, bytes.fromhex(data)) for number, name, data in fields]


def sample(info: Any, name: str = "", nested: bool = False) -> Any:
    """Make a value of a msgspec type whose content follows from the field's name, so that swapped fields are noticed."""
    inspect = msgspec.inspect
    if isinstance(info, inspect.StructType):
        cut = {field.name for field in info.fields if nested and field.encode_name == "items"}
        return info.cls(**{field.name: sample(field.type, field.name, True) for field in info.fields if field.name not in cut})
    if isinstance(info, inspect.BoolType):
        return True
    if isinstance(info, inspect.IntType):
        low, high = info.ge or 0, info.le if info.le is not None else 2**31
        return low + sum(name.encode()) % (high - low + 1)
    if isinstance(info, inspect.StrType):
        return name[: info.max_length]
    if isinstance(info, inspect.BytesType):
        size = info.min_length or min(info.max_length or 40, 40)
        return (name.encode() * size)[:size]
    if isinstance(info, inspect.VarTupleType | inspect.ListType):
        return tuple(sample(info.item_type, f"{name}{i}", nested) for i in range(2))
    raise TypeError(f"no sample for {info}")


def sample_of(cls: type[msgspec.Struct]) -> msgspec.Struct:
    message: msgspec.Struct = sample(msgspec.inspect.type_info(cls))
    return message


def new_lines() -> list[str]:
    """Give the lines that are missing: for a message without one, or whose last one lacks a field."""
    last = {number: data for number, _, data in read_frozen()}
    lines = []
    for number, cls in registered().items():
        data = encode_numbered(sample_of(cls))
        if number not in last or last[number] != data:
            lines.append(f"{number} {cls.__name__} {data.hex()}")
    return lines


@pytest.mark.parametrize(("number", "name", "data"), read_frozen(), ids=lambda value: value if isinstance(value, str) else "")
def test_frozen_bytes_are_decoded(number: int, name: str, data: bytes) -> None:
    cls = class_of(number)
    assert cls is not None, f"message number {number} ({name}) has gone; numbers are kept for ever"
    assert cls.__name__ == name
    message = decode_numbered(data)
    understood = msgpack.unpackb(encode(message))
    for field, value in msgpack.unpackb(data[2:]).items():
        assert understood[field] == value, f"field {field} of {name} is not understood any more"


def test_every_message_is_frozen_in_its_present_shape() -> None:
    missing = [line.split()[1] for line in new_lines()]
    assert missing == [], "run `python tests/protocol/test_frozen_messages.py` once the new fields are final"


def test_a_field_from_the_future_is_ignored() -> None:
    for number, cls in registered().items():
        message = sample_of(cls)
        body = msgpack.packb({**msgpack.unpackb(encode(message)), "field_of_version_nine": [1, {"deep": b"\x00"}]})
        assert decode_numbered(number.to_bytes(2, "big") + body) == message


if __name__ == "__main__":
    with FROZEN.open("a") as frozen:
        for text in new_lines():
            frozen.write(text + "\n")
            sys.stdout.write(" ".join(text.split()[:2]) + "\n")
