"""Requests with a deadline to peers that may have to be dialled first, in callback style: no task where a link stands.

A lookup asks dozens of peers; most links are open or opened for the purpose and closed when idle. So an ask on an open link is
one dictionary entry and one heap entry, and only a dial costs a task. Dials at once and asks that wait for one are bounded.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from typing import Final

import trio

from p2pnode.errors import PeerError, Refused
from p2pnode.ids import NodeId
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.transport.link import Link
from p2pnode.transport.requests import Reply
from p2pnode.transport.service import TransportService
from p2pnode.wire.registry import Message

ASKS_MAX: Final = 1024
ANSWERED: Final = "answered"
REFUSED: Final = "refused"
TIMED_OUT: Final = "timed out"
UNREACHABLE: Final = "unreachable"


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of an ask. message: None without an answer. reason: of a refusal or failure. address: where it came from.

    is_ours: it failed by this node's own limits, which says nothing of the peer. is_refusal: the peer said no.
    """

    message: Message | None
    reason: Reason | None = None
    address: str = ""
    is_ours: bool = False
    is_refusal: bool = False


OnAnswer = Callable[[Answer], None]


class _Ask:
    __slots__ = (
        "addresses",
        "deadline",
        "expected",
        "is_over",
        "link",
        "message",
        "node_id",
        "on_answer",
        "request_id",
        "seconds",
    )

    def __init__(
        self, node_id: NodeId, addresses: Sequence[str], message: Message, expected: type[Message], seconds: float,
        on_answer: OnAnswer,
    ) -> None:  # fmt: skip
        self.node_id = node_id
        self.addresses = addresses
        self.message = message
        self.expected = expected
        self.seconds = seconds
        self.deadline = 0.0
        self.on_answer = on_answer
        self.link: Link | None = None
        self.request_id = -1
        self.is_over = False


class Asker:
    """Sends requests and keeps their deadlines. Every ask ends with exactly one call of its `on_answer`, never at once.

    on_dial_failed: told of a dial that came to nothing: (peer, its first address, why). on_wrong: told of a peer that
    answered with a message of another class. on_deadline: told of a new moment at which `tick` must run.
    """

    def __init__(
        self,
        now: Callable[[], float],
        transport: TransportService,
        metrics: Metrics,
        dials_max: int,
        on_dial_failed: Callable[[NodeId, str, Reason | None], None],
        on_wrong: Callable[[NodeId, Reason], None],
        on_deadline: Callable[[float], None],
    ) -> None:
        self.dials_max = dials_max
        self._now = now
        self._transport = transport
        self._links = transport.links()
        self._metrics = metrics
        self._on_dial_failed = on_dial_failed
        self._on_wrong = on_wrong
        self._on_deadline = on_deadline
        self._deadlines: list[tuple[float, int, _Ask]] = []
        self._serial = count()
        self._dials = 0
        self._open = 0
        self._waiting: deque[_Ask] = deque()
        self._failed_now: deque[tuple[_Ask, Answer]] = deque()
        self._nursery: trio.Nursery | None = None

    def start(self, nursery: trio.Nursery | None) -> None:
        """Dial in this nursery from now on; None ends that."""
        self._nursery = nursery

    @property
    def deadline(self) -> float:
        """When `tick` should run next."""
        heap = self._deadlines
        while heap and heap[0][2].is_over:
            heappop(heap)
        if self._failed_now:
            return -math.inf
        return heap[0][0] if heap else math.inf

    def ask(
        self,
        node_id: NodeId,
        addresses: Sequence[str],
        message: Message,
        expected: type[Message],
        seconds: float,
        on_answer: OnAnswer,
    ) -> None:
        """Send a request, over the open link or over one dialled at these addresses; none means: only over an open link.

        expected: the class of an honest answer. seconds: for dial, handshake and answer together, from when the dial begins.
        """
        ask = _Ask(node_id, addresses, message, expected, seconds, on_answer)
        link = self._links.get(node_id)
        if self._open >= ASKS_MAX:
            self._metrics.add("limit_hits_total", "asks_max")
            self._fail_soon(ask, Answer(None, Reason.BUSY, is_ours=True))
            return
        self._open += 1
        if link is not None:
            self._begin(ask)
            self._send(ask, link)
        elif not addresses or self._nursery is None:
            self._begin(ask)
            self._end_soon(ask, Answer(None, Reason.CONNECTION_LOST, is_ours=not addresses))
        elif self._dials < self.dials_max:
            self._dial(ask)
        else:
            self._waiting.append(ask)

    def tick(self) -> None:
        """End what is overdue."""
        if self._failed_now:
            failed, self._failed_now = self._failed_now, deque()
            for ask, answer in failed:
                ask.on_answer(answer)
        now = self._now()
        heap = self._deadlines
        while heap and (heap[0][2].is_over or heap[0][0] <= now):
            ask = heappop(heap)[2]
            if ask.is_over:
                continue
            if ask.link is not None:
                ask.link.cancel(ask.request_id)
            self._end(ask, Answer(None, Reason.TOO_SLOW), TIMED_OUT)

    def _begin(self, ask: _Ask) -> None:
        ask.deadline = self._now() + ask.seconds
        heappush(self._deadlines, (ask.deadline, next(self._serial), ask))
        self._on_deadline(ask.deadline)

    def _send(self, ask: _Ask, link: Link) -> None:
        ask.link = link

        def on_reply(reply: Reply | PeerError) -> None:
            self._replied(ask, link, reply)

        try:
            ask.request_id = link.request_nowait(ask.message, (), on_reply)
        except PeerError as error:
            self._end_soon(ask, Answer(None, getattr(error, "reason", None), is_ours=isinstance(error, Refused)))

    def _replied(self, ask: _Ask, link: Link, reply: Reply | PeerError) -> None:
        if ask.is_over:
            return
        if not isinstance(reply, Reply):
            reason = getattr(reply, "reason", None)
            is_refusal = isinstance(reply, Refused)
            answer = Answer(None, reason or Reason.CONNECTION_LOST, is_refusal=is_refusal)
            self._end(ask, answer, REFUSED if is_refusal else UNREACHABLE)
        elif type(reply.message) is not ask.expected:
            self._end(ask, Answer(None, Reason.WRONG_TYPE), REFUSED)
            self._on_wrong(ask.node_id, Reason.WRONG_TYPE)
            link.close(Reason.WRONG_TYPE)
        else:
            address = "" if link.peer.inbound else link.peer.seen_address
            self._end(ask, Answer(reply.message, address=address), ANSWERED)

    def _end(self, ask: _Ask, answer: Answer, outcome: str) -> None:
        if not ask.is_over:
            ask.is_over = True
            self._open -= 1
            self._metrics.add("asks_total", outcome)
            ask.on_answer(answer)

    def _end_soon(self, ask: _Ask, answer: Answer) -> None:
        """End an ask from the next `tick`, because whoever asks is in the middle of something."""
        ask.is_over = True
        self._open -= 1
        self._metrics.add("asks_total", UNREACHABLE)
        self._fail_soon(ask, answer)

    def _fail_soon(self, ask: _Ask, answer: Answer) -> None:
        self._failed_now.append((ask, answer))
        self._on_deadline(-math.inf)

    def _dial(self, ask: _Ask) -> None:
        assert self._nursery is not None
        self._begin(ask)
        self._dials += 1
        self._nursery.start_soon(self._dial_and_send, ask)

    async def _dial_and_send(self, ask: _Ask) -> None:
        failure: Reason | None = Reason.TOO_SLOW
        is_ours = False
        try:
            with trio.move_on_after(ask.deadline - self._now()):
                try:
                    link = await self._transport.connect(ask.addresses, ask.node_id)
                except PeerError as error:
                    failure = getattr(error, "reason", None)
                    is_ours = isinstance(error, Refused) or failure in (Reason.SELF_DIAL, Reason.DUPLICATE_IDENTITY)
                else:
                    if not ask.is_over:
                        self._send(ask, link)
                    return
        finally:
            self._dials -= 1
            while self._waiting and self._dials < self.dials_max and self._nursery is not None:
                self._next_waiting()
        outcome = TIMED_OUT if failure is Reason.TOO_SLOW else UNREACHABLE
        if not is_ours:
            self._on_dial_failed(ask.node_id, ask.addresses[0], failure)
        self._end(ask, Answer(None, failure or Reason.CONNECTION_LOST, is_ours=is_ours), outcome)

    def _next_waiting(self) -> None:
        ask = self._waiting.popleft()
        link = self._links.get(ask.node_id)
        if link is not None:
            self._begin(ask)
            self._send(ask, link)
        else:
            self._dial(ask)
