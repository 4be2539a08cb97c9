"""Tensors in the body of a control request: a JSON head and the values in the wire's own form, so that nothing is lost.

Layout: `<u32 head size> <u32 headers size>` little-endian, the JSON head, the encoded ValueHeaders, zeros up to a multiple of
64, the values' bytes.
"""

import json
import struct
from collections.abc import Mapping
from typing import Any, Final

from p2pnode.environment import Buffer
from p2pnode.errors import ProtocolViolation
from p2pnode.reasons import Reason
from p2pnode.wire.tensors import Value, decode_values, encode_values, headers_bytes, parse_headers

_SIZES: Final = struct.Struct("<II")
_ALIGNMENT: Final = 64
HEAD_BYTES_MAX: Final = 1 << 20


def pack(head: Mapping[str, Any], values: Mapping[str, Value]) -> bytes:
    """Give the body for a head and values."""
    head_bytes = json.dumps(head).encode()
    headers, chunks, _ = encode_values(values)
    encoded = headers_bytes(headers)
    start = _SIZES.size + len(head_bytes) + len(encoded)
    return b"".join((_SIZES.pack(len(head_bytes), len(encoded)), head_bytes, encoded, bytes(-start % _ALIGNMENT), *chunks))


def unpack(body: Buffer) -> tuple[dict[str, Any], dict[str, Value]]:
    """Give head and values; numeric arrays are views into the body. Raises ProtocolViolation(BAD_TENSOR)."""
    view = memoryview(body)
    if len(view) < _SIZES.size:
        raise ProtocolViolation(Reason.BAD_TENSOR, "the body is too short")
    head_size, headers_size = _SIZES.unpack(view[: _SIZES.size])
    middle = _SIZES.size + head_size
    end = middle + headers_size
    if head_size > HEAD_BYTES_MAX or end > len(view):
        raise ProtocolViolation(Reason.BAD_TENSOR, "the body's sizes do not fit")
    try:
        head = json.loads(bytes(view[_SIZES.size : middle]))
    except (ValueError, RecursionError):
        raise ProtocolViolation(Reason.BAD_TENSOR, "the body's head is not JSON") from None
    if not isinstance(head, dict):
        raise ProtocolViolation(Reason.BAD_TENSOR, "the body's head is not a JSON object")
    start = end + -end % _ALIGNMENT
    return head, decode_values(parse_headers(bytes(view[middle:end])), view[start:])
