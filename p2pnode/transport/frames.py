"""The bytes of a session: records that carry frames, and records that carry nothing but an attachment's bytes.

A record is a 2-byte big-endian size and a Noise transport message. The plaintext of an ordinary record is a row of frames,
each a header (kind, flags, body size, request number) and a body; small frames share a record. A DATA frame is the last of
its record and says how many bytes of one attachment follow: the plaintexts of the next records are those bytes and nothing
else, so they are sealed from the sender's memory and opened into the receiver's without a copy between.

Requests are numbered by whoever sends them, odd by the session's initiator and even by the other, always upwards. What an
attachment belongs to follows from the number and the direction: on a number of the peer it is the request's, on one of
ours the reply's. Unknown kinds from 128 on are ignored, so that a later version can add hints.
"""

import struct
from collections.abc import Sequence
from typing import Final, Protocol

from p2pnode.crypto.noise import MESSAGE_SIZE_MAX, TAG_SIZE
from p2pnode.environment import Buffer
from p2pnode.errors import ProtocolViolation
from p2pnode.reasons import Reason

REQUEST: Final = 1
REPLY: Final = 2
REFUSAL: Final = 3
CANCEL: Final = 4
MORE: Final = 5
DATA: Final = 6
CREDIT: Final = 7
WINDOW: Final = 8
PING: Final = 9
PONG: Final = 10
GOODBYE: Final = 11
REKEY: Final = 12
FIRST_IGNORED_KIND: Final = 128
NUMBER_MAX: Final = 2**32 - 1

RECORD_PREFIX: Final = 2
RECORD_OVERHEAD: Final = RECORD_PREFIX + TAG_SIZE
PLAIN_SIZE_MAX: Final = MESSAGE_SIZE_MAX - TAG_SIZE
RECORD_SIZE_MAX: Final = RECORD_PREFIX + MESSAGE_SIZE_MAX

# kind, flags (0), body size, request number
HEADER: Final = struct.Struct(">BBHI")
# The start of a REQUEST's or REPLY's body: message size, window the sender assumes, attachment size
OPENING: Final = struct.Struct(">IIQ")
# Header and opening in one go
OPEN_HEADER: Final = struct.Struct(">BBHIIIQ")
DATA_FRAME: Final = struct.Struct(">BBHII")
CREDIT_FRAME: Final = struct.Struct(">BBHIQ")
WINDOW_FRAME: Final = struct.Struct(">BBHII")
PING_FRAME: Final = struct.Struct(">BBHIQ")
FOUR_BYTES: Final = struct.Struct(">I")
EIGHT_BYTES: Final = struct.Struct(">Q")


class SendCipher(Protocol):
    """The sending direction of encryption, as `crypto.noise.CipherState` gives it."""

    def seal_into(self, plain: Buffer, out: memoryview) -> int:
        """Seal `plain` to the start of `out`; give the size."""
        ...

    def rekey(self) -> None:
        """Replace the key."""
        ...


class ReceiveCipher(Protocol):
    """The receiving direction of encryption, as `crypto.noise.CipherState` gives it."""

    @property
    def records(self) -> int:
        """How many records were opened under the present key."""
        ...

    def open_into(self, sealed: memoryview, out: memoryview) -> int:
        """Open to the start of `out`; give the size. Raises ProtocolViolation."""
        ...

    def rekey(self) -> None:
        """Replace the key."""
        ...


def byte_views(chunks: Sequence[Buffer]) -> tuple[list[Buffer], int]:
    """Give the non-empty chunks, each as one row of bytes, and their total size. Raises TypeError for strided views."""
    views: list[Buffer] = []
    total = 0
    for chunk in chunks:
        if type(chunk) is memoryview and (chunk.format != "B" or chunk.ndim != 1):
            chunk = memoryview(b"") if chunk.nbytes == 0 else chunk.cast("B")
        size = len(chunk)
        if size:
            views.append(chunk)
            total += size
    return views, total


def bad_frame(detail: str) -> ProtocolViolation:
    """Give the violation for a frame that does not parse or does not fit the session's state."""
    return ProtocolViolation(Reason.BAD_FRAME, detail)
