"""Every case of kawanet/msgpack-test-suite is decoded or refused with its named reason; see docs/decisions on strictness."""

import json
import os
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest

from p2pnode.errors import ProtocolViolation
from p2pnode.reasons import Reason
from p2pnode.wire.canonical import check_canonical
from p2pnode.wire.codec import decode

VECTORS = Path(os.environ.get("P2PNODE_VECTORS", Path(__file__).parents[3] / "shared" / "vectors")) / "msgpack"


class Holder(msgspec.Struct, frozen=True):
    """A message that ignores everything in it."""


class Typed(msgspec.Struct, frozen=True):
    """A message that takes any value without parts, but for bytes."""

    value: bool | int | float | str | None


class Binary(msgspec.Struct, frozen=True):
    """A message that takes bytes."""

    value: bytes


def cases() -> list[tuple[str, dict[str, Any], bytes]]:
    file = VECTORS / "msgpack-test-suite.json"
    if not file.exists():
        pytest.skip(f"no {file.name}: published vectors are not part of the repository; P2PNODE_VECTORS names their folder")
    groups = json.loads(file.read_text())
    return [
        (group, case, bytes.fromhex(text.replace("-", "")))
        for group, entries in groups.items()
        for case in entries
        for text in case["msgpack"]
    ]


def expected_refusal(case: dict[str, Any], data: bytes) -> Reason | None:
    """Say what must happen, from the case's meaning: only the shortest form is accepted, extensions never, float32 never."""
    if "ext" in case or "timestamp" in case:
        return Reason.EXTENSION_TYPE
    if data[0] == 0xCA:
        return Reason.NOT_MINIMAL
    if data[0] == 0xCB:
        return None  # A 64-bit float is the one form of a float, and a float is not an integer even when it is whole.
    if 0xD0 <= data[0] <= 0xD3 and data[1] < 0x80:
        return Reason.NOT_MINIMAL  # The signed forms are for negative numbers; the unsigned ones are as short.
    shortest = min(len(bytes.fromhex(text.replace("-", ""))) for text in case["msgpack"] if not text.startswith("ca"))
    return None if len(data) == shortest else Reason.NOT_MINIMAL


def class_for(case: dict[str, Any]) -> Any:
    return Binary if "binary" in case else Typed


def refusal(check: Any) -> Reason | None:
    try:
        check()
    except ProtocolViolation as violation:
        return violation.reason
    return None


def test_every_case_alone() -> None:
    seen = set()
    for group, case, data in cases():
        expected = expected_refusal(case, data)
        assert refusal(lambda data=data: check_canonical(data)) == expected, (group, case, data.hex())
        seen.add(expected)
    assert seen == {None, Reason.NOT_MINIMAL, Reason.EXTENSION_TYPE}


def test_every_case_in_a_field() -> None:
    """The same holds inside a message, in a field that is known and in one that is not."""
    for group, case, data in cases():
        expected = expected_refusal(case, data)
        body = b"\x81\xa5value" + data
        assert refusal(lambda body=body: decode(Holder, body)) == expected, (group, case, data.hex())
        if "array" not in case and "map" not in case:
            cls = class_for(case)
            assert refusal(lambda body=body, cls=cls: decode(cls, body)) == expected, (group, case, data.hex())


def test_accepted_values_are_the_suites_values() -> None:
    for group, case, data in cases():
        if expected_refusal(case, data) is not None:
            continue
        value = msgpack.unpackb(data)
        if "array" not in case and "map" not in case:
            assert decode(class_for(case), b"\x81\xa5value" + data).value == value, group
        for kind in ("nil", "bool", "number", "string", "array", "map"):
            if kind in case:
                assert value == case[kind], (group, case)
        if "binary" in case:
            assert value == bytes.fromhex(case["binary"].replace("-", ""))
        if "bignum" in case:
            assert value == int(case["bignum"])
