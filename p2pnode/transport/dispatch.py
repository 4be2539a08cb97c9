"""From a session's events to whoever they are for: requests to the router, replies to those who asked."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

import trio

from p2pnode.environment import Clock
from p2pnode.errors import PeerError, ProtocolViolation, Refused
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.transport.events import AttachmentArrived, CancelArrived, Event, RefusalArrived, ReplyArrived, RequestArrived
from p2pnode.transport.limits import BufferBudget, Limits
from p2pnode.transport.pump import Turn
from p2pnode.transport.requests import Incoming, Pending, Reply, Router
from p2pnode.transport.session import Session
from p2pnode.wire.codec import decode_numbered

if TYPE_CHECKING:
    from p2pnode.transport.link import Link

_NOTHING = memoryview(b"")


@dataclass(frozen=True, slots=True)
class LinkSurroundings:
    """What all links of one node share. strict: let a bug met while serving a peer stop the node.

    on_violation: told of every breach of the protocol by a verified peer, so that its score can be lowered.
    before_flush: called after each turn's requests were handed on, before what came of them is sent. turn: of all their pumps.
    """

    limits: Limits
    metrics: Metrics
    budget: BufferBudget
    clock: Clock
    router: Router
    turn: Turn
    strict: bool = False
    on_violation: Callable[[bytes, Reason], None] = lambda node_id, reason: None
    before_flush: Callable[[], None] = lambda: None
    serials: "count[int]" = field(default_factory=count)


class Dispatcher:
    """Hands one link's events on, synchronously and in order. It does not hold the link, which so is freed when it is over.

    incoming: the peer's requests that have not been answered. arriving: our requests whose reply's attachment is on its way.
    """

    def __init__(self, peer: bytes, session: Session, around: LinkSurroundings) -> None:
        self.incoming: dict[int, Incoming] = {}
        self.arriving: dict[int, Pending] = {}
        # Where tasks wait to send a request while too many are open; made when the first one does.
        self._room: trio.lowlevel.ParkingLot | None = None
        self._peer = peer
        self._session = session
        self._around = around
        self._metrics = around.metrics
        self._running = False

    def run(self, link: "Link") -> None:
        """Hand the session's events on. A handler's own error costs the peer at most its link, never the node."""
        if self._running:
            return
        events = self._session.events
        self._running = True
        try:
            while events and link.closed is None:
                event = events.pop(0)
                try:
                    self._handle(event, link)
                except Exception:  # a bug met while serving a peer must not reach the others
                    self._metrics.add("bugs_total", type(event).__name__)
                    if self._around.strict:
                        raise
                    link.close(Reason.INTERNAL)
        finally:
            self._running = False

    def _handle(self, event: Event, link: "Link") -> None:
        if isinstance(event, RequestArrived):
            self._requested(event, link)
            if event.attachment is None:
                self._measure(link)
        elif isinstance(event, ReplyArrived):
            self._replied(event, link)
            if event.attachment is None:
                self._measure(link)
        elif isinstance(event, AttachmentArrived):
            incoming = self.incoming.get(event.number)
            pending = self.arriving.pop(event.number, None)
            if incoming is not None:
                incoming.complete()
            elif pending is not None and pending.message is not None:
                self.deliver(pending, Reply(pending.message, pending.view))
        elif isinstance(event, RefusalArrived):
            self.deliver(event.token, Refused(event.reason, event.detail))
        elif isinstance(event, CancelArrived):
            cancelled = self.incoming.pop(event.number, None)
            if cancelled is not None:
                cancelled.cancel()
        elif event.reason is not Reason.DUPLICATE_SESSION:
            link.end(event.reason)

    def _measure(self, link: "Link") -> None:
        """A stream begins: how fast its window may grow depends on the round trip, so that must be known."""
        if not self._session.rtt_seconds:
            link.guarded(self._session.send_ping, self._around.clock.monotonic())

    def _requested(self, event: RequestArrived, link: "Link") -> None:
        try:
            message = decode_numbered(event.message)
        except ProtocolViolation as error:
            link.guarded(self._session.send_refusal, event.number, error.reason, error.detail)
            self.blame(error.reason)
            return
        self._metrics.add("requests_total", type(message).__name__)
        incoming = Incoming(link, event.number, message, event.attachment, event.attachment_size)
        self.incoming[event.number] = incoming
        try:
            self._around.router(incoming)
        except Refused as error:
            incoming.refuse(error.reason, error.detail)
        except ProtocolViolation as error:
            incoming.refuse(error.reason, error.detail)
            self.blame(error.reason)
        if event.attachment is not None:
            incoming.keep()

    def _replied(self, event: ReplyArrived, link: "Link") -> None:
        pending: Pending = event.token
        size = event.attachment_size
        try:
            message = decode_numbered(event.message)
            view = _NOTHING
            if size and event.attachment is not None and pending.sink is None:
                view = memoryview(bytes(event.attachment))
            elif size:
                view = self._sink(pending, size)
        except PeerError as error:
            link.guarded(self._session.send_cancel, event.number)
            self.deliver(pending, error)
            if isinstance(error, ProtocolViolation):
                self.blame(error.reason)
            return
        if event.attachment is not None:
            if pending.sink is not None and size:
                view[:] = event.attachment
            self.deliver(pending, Reply(message, view))
        else:
            pending.message = message
            pending.view = view
            self.arriving[event.number] = pending
            link.guarded(self._session.accept, event.number, view)

    def blame(self, reason: Reason) -> None:
        """Count a violation and report it. A message of a newer version is not the peer's fault."""
        self._metrics.add("violations_total", reason.value)
        if reason is not Reason.UNKNOWN_MESSAGE:
            self._around.on_violation(self._peer, reason)

    def _sink(self, pending: Pending, size: int) -> memoryview:
        """Give the memory for a reply's attachment. Raises Refused when there is none."""
        if pending.sink is not None:
            return pending.sink(size)[:size]
        if not self._around.budget.take(size):
            raise Refused(Reason.MEMORY, "no room for the reply's attachment")
        pending.reserved = size
        return memoryview(bytearray(size))

    def deliver(self, pending: Pending, reply: Reply | PeerError) -> None:
        """Tell whoever waits for a reply, and whoever waits for room to ask."""
        if pending.reserved:
            self._around.budget.give(pending.reserved)
            pending.reserved = 0
        self.make_room(1)
        pending.on_reply(reply)

    async def wait_for_room(self) -> None:
        """Wait until a request is over."""
        if self._room is None:
            self._room = trio.lowlevel.ParkingLot()
        await self._room.park()

    def make_room(self, count: int) -> None:
        """Wake so many of those that wait to send a request."""
        if self._room is not None:
            self._room.unpark(count=count)
