"""Identifiers: 32-byte values with one type each, and their checksummed text form.

Text form: `<prefix>-` then lower-case base32 (RFC 4648, no padding) of the 32 bytes followed by a 3-byte BLAKE2b
checksum over prefix and value: 35 bytes, 56 characters. A mistyped id is therefore refused, not silently unknown.
"""

import base64
import hashlib
from typing import NewType

NodeId = NewType("NodeId", bytes)
ModelId = NewType("ModelId", bytes)
BlobId = NewType("BlobId", bytes)
DocumentId = NewType("DocumentId", bytes)
JobId = NewType("JobId", bytes)

ID_SIZE = 32
_CHECKSUM_SIZE = 3
_TEXT_LENGTH = 56
_VALUE_LENGTH = 51  # characters of the text that hold nothing but the value's bits
_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"

NODE = "node"
MODEL = "model"
BLOB = "blob"
JOB = "job"
DOCUMENT = "doc"


def id_text(prefix: str, value: bytes) -> str:
    """Give the checksummed text of a 32-byte id, for example `node-mfrgg…`."""
    if len(value) != ID_SIZE:
        raise ValueError(f"an id has {ID_SIZE} bytes, not {len(value)}")
    raw = value + _checksum(prefix, value)
    return f"{prefix}-{base64.b32encode(raw).decode().lower()}"


def parse_id(prefix: str, text: str) -> bytes:
    """Give the 32 bytes behind `text`. Raises ValueError, in words, on a wrong prefix, length or checksum."""
    head, _, body = text.strip().lower().rpartition("-")
    if head != prefix:
        raise ValueError(f"{text!r} is not a {prefix} id: it should start with '{prefix}-'")
    if len(body) != _TEXT_LENGTH:
        raise ValueError(f"{text!r} should have {_TEXT_LENGTH} characters after '{prefix}-', not {len(body)}")
    try:
        raw = base64.b32decode(body.upper())
    except ValueError:
        raise ValueError(f"{text!r} has a character that no id contains") from None
    value, checksum = raw[:ID_SIZE], raw[ID_SIZE:]
    if checksum != _checksum(prefix, value):
        raise ValueError(f"{text!r} has a typing error: its checksum does not match")
    return value


def node_text(node_id: bytes) -> str:
    """Give a node id as text."""
    return id_text(NODE, node_id)


def short(value: bytes) -> str:
    """Give the first eight characters of an id's text body: enough for people and logs, never for lookups by machines."""
    return base64.b32encode(value[:5]).decode().lower()


def matches_prefix(prefix: str, value: bytes, typed: str) -> bool:
    """Say whether what a person typed (with or without `prefix-`) is the start of this id's text."""
    text = id_text(prefix, value)
    typed = typed.strip().lower()
    return bool(typed) and (text.startswith(typed) or text.split("-", 1)[1].startswith(typed))


def id_range(prefix: str, typed: str) -> tuple[bytes, bytes]:
    """Give the lowest and highest 32-byte id whose text starts with what a person typed, with or without `prefix-`.

    Both ends count. Characters that only concern the checksum are not looked at. Raises ValueError, in words.
    """
    body = typed.strip().lower().removeprefix(f"{prefix}-")
    if not body:
        raise ValueError("type at least one character of the id")
    bits = 0
    for character in body[:_VALUE_LENGTH]:
        digit = _ALPHABET.find(character)
        if digit < 0:
            raise ValueError(f"{typed!r} has a character that no {prefix} id contains")
        bits = bits << 5 | digit
    missing = ID_SIZE * 8 - 5 * min(len(body), _VALUE_LENGTH)
    low = bits << missing
    return low.to_bytes(ID_SIZE, "big"), (low | ((1 << missing) - 1)).to_bytes(ID_SIZE, "big")


def _checksum(prefix: str, value: bytes) -> bytes:
    return hashlib.blake2b(prefix.encode() + b"\0" + value, digest_size=_CHECKSUM_SIZE).digest()
