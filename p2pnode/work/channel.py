"""The few fixed-size messages between the daemon and a worker, each one datagram on a Unix socket pair.

Tensors never travel here, only where they lie in the arena. The daemon trusts nothing in a `Response`: `parse_response`
checks the layout and its caller the ranges.
"""

import struct
from typing import Final, NamedTuple

# Longer headers travel through the arena, so that eight requests always fit in the socket's buffer.
INLINE_BYTES_MAX: Final = 8192
DATAGRAM_BYTES_MAX: Final = 16384
DETAIL_BYTES_MAX: Final = 4096

RUN, PLACE, DROP = 1, 2, 3
DONE, FAILED, NEED, LOADED, LOAD_FAILED = 1, 2, 3, 4, 5

_PREFIX: Final = struct.Struct("<I")
SEQUENCE: Final = struct.Struct("<Q")
# kind, plan length, sequence, input offset, input size, output offset, output size, plan offset + 1 (0: the plan follows)
_REQUEST: Final = struct.Struct("<B3xIQQQQQQ")
# kind, headers length, sequence, seconds, payload size, size needed (FAILED and LOADED: bytes of text or facts that follow)
_RESPONSE: Final = struct.Struct("<B3xIQdQQ")

pack_request = _REQUEST.pack
unpack_request = _REQUEST.unpack_from
REQUEST_SIZE: Final = _REQUEST.size
pack_response = _RESPONSE.pack
RESPONSE_SIZE: Final = _RESPONSE.size


class GarbledResponse(ValueError):
    """A worker sent what no worker of ours sends."""


class Response(NamedTuple):
    """What a worker said. tail: the bytes after the fixed part."""

    kind: int
    headers_size: int
    sequence: int
    seconds: float
    payload_size: int
    needed_size: int
    tail: bytes


def parse_response(datagram: bytes) -> Response:
    """Give a worker's datagram as fields; what they say is not checked but for the time. Raises GarbledResponse."""
    if len(datagram) < RESPONSE_SIZE:
        raise GarbledResponse("short")
    response = Response._make((*_RESPONSE.unpack_from(datagram), datagram[RESPONSE_SIZE:]))
    if not 0 <= response.seconds < 1e9:
        raise GarbledResponse("seconds")
    return response


def join_plan(outputs: bytes, headers: bytes) -> bytes:
    """Give what identifies a kind of call: the encoded output names and the encoded input headers."""
    return _PREFIX.pack(len(outputs)) + outputs + headers


def split_plan(plan: bytes) -> tuple[bytes, bytes]:
    """Give (encoded output names, encoded input headers)."""
    end = _PREFIX.size + _PREFIX.unpack_from(plan)[0]
    return plan[_PREFIX.size : end], plan[end:]
