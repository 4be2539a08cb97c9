"""What a session tells its owner: one small class per thing that can happen."""

from dataclasses import dataclass
from typing import Any

from p2pnode.reasons import Reason


@dataclass(slots=True)
class RequestArrived:
    """A request. `message` and `attachment` are views that live until the next `receive`.

    attachment: all its bytes if they came with the message (empty if there are none), else None: they follow as a stream.
    """

    number: int
    message: memoryview
    attachment: memoryview | None
    attachment_size: int


@dataclass(slots=True)
class ReplyArrived:
    """The reply to the request sent with `token`; other fields as in RequestArrived."""

    number: int
    token: Any
    message: memoryview
    attachment: memoryview | None
    attachment_size: int


@dataclass(slots=True)
class RefusalArrived:
    """The peer refused the request sent with `token`."""

    token: Any
    reason: Reason
    detail: str


@dataclass(slots=True)
class CancelArrived:
    """The request on this number needs no answer any more, or its attachment could not be kept."""

    number: int


@dataclass(slots=True)
class AttachmentArrived:
    """The last byte of the attachment on this number is in its sink."""

    number: int


@dataclass(slots=True)
class GoodbyeArrived:
    """The peer will send no more requests."""

    reason: Reason


Event = RequestArrived | ReplyArrived | RefusalArrived | CancelArrived | AttachmentArrived | GoodbyeArrived
