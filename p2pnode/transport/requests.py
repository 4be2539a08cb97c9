"""A request as its two ends hold it: `Incoming` where it is answered, `Pending` and `Reply` where it was sent."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from p2pnode.environment import Buffer
from p2pnode.errors import PeerError
from p2pnode.reasons import Reason
from p2pnode.transport.streams import OnBytes, SinkSource
from p2pnode.wire.registry import Message

if TYPE_CHECKING:
    from p2pnode.transport.link import Link

_NOTHING = memoryview(b"")


@dataclass(slots=True)
class Reply:
    """The answer to a request: the message and its attachment (the sink, if one was given)."""

    message: Message
    attachment: memoryview


class Pending:
    """What a sent request waits with. message and sink are set while the reply's attachment is on its way."""

    __slots__ = ("message", "on_reply", "reserved", "sink", "view")

    def __init__(self, on_reply: Callable[[Reply | PeerError], None], sink: Callable[[int], memoryview] | None) -> None:
        self.on_reply = on_reply
        self.sink = sink
        self.message: Message | None = None
        self.view = _NOTHING
        self.reserved = 0


class Incoming:
    """A request that waits for this node's answer: exactly one `reply` or `refuse`, now or later, from the event loop.

    message: decoded. attachment_size: bytes that `receive` will bring. on_cancel: called when the peer no longer wants an
    answer, or the link ends; `reply` and `refuse` then do nothing.
    """

    __slots__ = (
        "_inline",
        "_on_complete",
        "_reserved",
        "_sink",
        "_source",
        "attachment_size",
        "cancelled",
        "link",
        "message",
        "number",
        "on_cancel",
    )

    def __init__(self, link: "Link", number: int, message: Message, inline: memoryview | None, attachment_size: int) -> None:
        self.link = link
        self.number = number
        self.message = message
        self.attachment_size = attachment_size
        self.cancelled = False
        self.on_cancel: Callable[[], None] | None = None
        self._inline: memoryview | None = inline
        self._on_complete: Callable[[memoryview], None] | None = None
        self._sink: memoryview | None = None
        self._source: SinkSource | None = None
        self._reserved = 0

    @property
    def is_inline(self) -> bool:
        """True while the attachment lies in the receive buffer: `receive` then completes at once."""
        return self._inline is not None

    def receive(
        self, sink: SinkSource | None, on_complete: Callable[[memoryview], None], on_bytes: OnBytes | None = None
    ) -> None:
        """Take the attachment, and call `on_complete` with exactly its bytes once all are there: maybe at once.

        sink: asked when the first bytes come, which may be long after this; it gives memory that is writable and at least
        `attachment_size` long. Without one, or when it gives None, memory is allocated within the node's buffer budget, and the
        request refused as BUSY when that is used up. Records are decrypted straight into it, so its bytes mean nothing before
        `on_complete`. on_bytes: given the part that is there each time it has become longer, for an attachment that does not
        come with its request. Call `receive` once; until then the peer can send no more than one window.
        """
        if self.cancelled:
            return
        size = self.attachment_size
        inline = self._inline
        if inline is not None:
            self._inline = None
            given = sink() if sink is not None else None
            if given is None:
                on_complete(memoryview(bytes(inline)) if size else _NOTHING)
            else:
                # Handed on as the view it is where that fits: whoever lent it knows it again at once.
                view = given if len(given) == size else given[:size]
                view[:] = inline
                on_complete(view)
            return
        self._source = sink
        self._on_complete = on_complete
        self.link.accept(self, self._memory, on_bytes)

    def _memory(self) -> memoryview | None:
        """Give the memory for the attachment; None when there is none: then the request has been refused."""
        size = self.attachment_size
        source, self._source = self._source, None
        given = source() if source is not None else None
        if given is None:
            if not self.link.reserve(size):
                self.refuse(Reason.BUSY, "no room for the attachment")
                return None
            self._reserved = size
            given = memoryview(bytearray(size))
        self._sink = given if len(given) == size else given[:size]
        return self._sink

    def reply(self, message: Message, attachment: Sequence[Buffer] = (), on_sent: Callable[[], None] | None = None) -> None:
        """Answer. The attachment's buffers must not change until `on_sent` has run, which it does in any case.

        Nothing is copied before it is encrypted. A message over the size limit is refused as INTERNAL instead.
        """
        self._release()
        self.link.answer(self, message, attachment, on_sent)

    def refuse(self, reason: Reason, detail: str = "") -> None:
        """Answer no. detail is for people, at most 1024 characters."""
        self._release()
        self.link.refuse(self, reason, detail)

    def keep(self) -> None:
        """Copy what lies in the receive buffer, because the handler has not taken it at once."""
        if self._inline is not None:
            self._inline = memoryview(bytes(self._inline))

    def complete(self) -> None:
        """The last byte is in the sink."""
        if self._on_complete is not None and self._sink is not None:
            self._on_complete(self._sink)

    def cancel(self) -> None:
        """The answer is not wanted any more; tells the handler, once."""
        if not self.cancelled:
            self.cancelled = True
            self._release()
            if self.on_cancel is not None:
                self.on_cancel()

    def _release(self) -> None:
        if self._reserved:
            self.link.release(self._reserved)
            self._reserved = 0


Router = Callable[[Incoming], None]
