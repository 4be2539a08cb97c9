"""The provider's hot path: a call arrives, runs, and its answer leaves, without a task of its own.

check (dictionary, price, credit) -> receive into the worker's memory -> hash -> submit -> hash of the output -> leaf -> reply.
Everything here is plain code run by the link's reader or the worker's channel; what must be saved waits for the sale's own
task, which the bell wakes.
"""

from typing import Any, Final, Protocol

from p2pnode.environment import Clock
from p2pnode.errors import PeerError, ProtocolViolation, Refused, WorkError
from p2pnode.market.agreements import Now, Phase, Terms
from p2pnode.market.bell import Bell
from p2pnode.market.outputs import KeptOutputs
from p2pnode.market.pricing import CallPricer
from p2pnode.market.settings import EXACT_CLASS, MarketSettings
from p2pnode.market.sold_agreement import SoldAgreement, SoldCall
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.wire.messages.work import Call, CallResult, FetchResult
from p2pnode.wire.tensors import ValuesHasher, values_hash, values_size
from p2pnode.work.service import WorkOutcome, WorkRequest, WorkService, WorkTicket

Incoming = Any
Link = Any


class Seat(Protocol):
    """What the call desk needs of one sold agreement."""

    machine: SoldAgreement
    pricer: CallPricer
    terms: Terms
    bell: Bell
    running: "dict[int, RunningCall]"
    link: Link | None
    hashes_first: bool

    def attach(self, link: Link) -> None:
        """Take this link as the way to the client."""
        ...


class CallDesk:
    """Answers the calls of every sold agreement. seats: agreement id -> its sale."""

    def __init__(
        self, clock: Clock, settings: MarketSettings, metrics: Metrics, work: WorkService, seats: "dict[bytes, Any]"
    ) -> None:
        self.clock = clock
        self.settings = settings
        self.metrics = metrics
        self.work = work
        self.seats = seats
        self.outputs = KeptOutputs(settings.kept_bytes_max, settings.kept_output_bytes_max)

    def call(self, incoming: Incoming) -> None:
        """Take one Call: it is refused with a reason, answered from what is kept, or started.

        Raises ProtocolViolation(BAD_TENSOR) for headers that do not describe the attachment.
        """
        message: Call = incoming.message
        try:
            seat = self._seat(incoming, message.agreement_id)
            size = incoming.attachment_size
            if size > self.settings.input_bytes_max:
                raise Refused(Reason.TOO_LARGE, f"inputs may have {self.settings.input_bytes_max} bytes")
            if values_size(message.inputs) != size:
                raise ProtocolViolation(Reason.BAD_TENSOR, "the headers do not describe the attachment")
            amount, operations = seat.pricer.price(message.inputs)
            known = seat.machine.admit(message.number, message.input_hash, amount)
            if known is not None and self._repeat(seat, incoming, known):
                return
        except Refused as error:
            self.refuse(incoming, error.reason, error.detail)
            return
        call = RunningCall(self, seat, incoming, message, operations)
        seat.running[message.number] = call
        call.start()

    def fetch(self, incoming: Incoming) -> None:
        """Take one FetchResult: the kept answer, the one still being made, or a refusal."""
        message: FetchResult = incoming.message
        try:
            seat = self._seat(incoming, message.agreement_id)
            known = seat.machine.calls.get(message.number)
            if known is None:
                raise Refused(Reason.UNKNOWN_CALL, f"call {message.number}")
            if known.input_hash != message.input_hash:
                raise Refused(Reason.CALL_MISMATCH, f"call {message.number} has another input")
            running = seat.running.get(message.number)
            if running is not None and running.adopt(incoming):
                return
            if not self._answer_kept(seat, incoming, known):
                raise Refused(Reason.OUTPUT_GONE, "send the call again: it is executed again without charge")
        except Refused as error:
            self.refuse(incoming, error.reason, error.detail)

    def refuse(self, incoming: Incoming, reason: Reason, detail: str = "") -> None:
        """Refuse a request; the session counts it."""
        incoming.refuse(reason, detail)

    def _seat(self, incoming: Incoming, agreement_id: bytes) -> Seat:
        seat: Seat | None = self.seats.get(agreement_id)
        link = incoming.link
        if seat is None or seat.terms.client != link.peer.node_id:
            raise Refused(Reason.UNKNOWN_AGREEMENT, "no open agreement with this id")
        if seat.link is not link:
            seat.attach(link)
        return seat

    def _repeat(self, seat: Seat, incoming: Incoming, known: SoldCall) -> bool:
        """Deal with a call whose number is known; False when it has to be executed again, at no charge."""
        running = seat.running.get(known.number)
        if running is not None:
            if not running.adopt(incoming):
                raise Refused(Reason.BUSY, f"call {known.number} is being cancelled")
            incoming.receive(None, _ignore)
            return True
        if self.outputs.get(seat.terms.agreement_id, known.number) is not None:
            incoming.receive(None, lambda _: self._answer_kept_or_refuse(seat, incoming, known))
            return True
        if known.runs > self.settings.reruns_max:
            raise Refused(Reason.ALREADY_USED, f"call {known.number} was answered {known.runs} times")
        known.runs += 1
        return False

    def _answer_kept_or_refuse(self, seat: Seat, incoming: Incoming, known: SoldCall) -> None:
        if not self._answer_kept(seat, incoming, known):
            self.refuse(incoming, Reason.BUSY, "the output made room for another: send the call again")

    def _answer_kept(self, seat: Seat, incoming: Incoming, known: SoldCall) -> bool:
        kept = self.outputs.get(seat.terms.agreement_id, known.number)
        if kept is None:
            return False
        result = CallResult(known.output_hash, kept.headers, known.amount, known.slice, known.position, kept.work_us, kept.engine)
        incoming.reply(result, (kept.payload,))
        return True


class RunningCall:
    """One call from arrival to answer."""

    __slots__ = (
        "_cancelled", "_desk", "_hasher", "_incoming", "_message", "_operations", "_seat", "_sink", "_submitted", "_ticket",
    )  # fmt: skip

    def __init__(self, desk: CallDesk, seat: Seat, incoming: Incoming, message: Call, operations: int) -> None:
        self._desk = desk
        self._seat = seat
        self._incoming = incoming
        self._message = message
        self._operations = operations
        self._ticket: WorkTicket | None = None
        self._sink: memoryview | None = None
        self._hasher: ValuesHasher | None = None
        self._submitted = False
        self._cancelled = False

    def start(self) -> None:
        """Take the inputs, when they come, into the worker's memory if it has room then; small ones are copied there later."""
        incoming = self._incoming
        incoming.on_cancel = self.cancel
        incoming.receive(None if incoming.is_inline else self._memory, self._received, self._arrived)

    def _memory(self) -> memoryview | None:
        terms = self._seat.terms
        size = self._incoming.attachment_size
        self._sink = self._desk.work.reserve(terms.order.model_id, size, terms.client, terms.order.share_worker)
        return self._sink

    def _arrived(self, there: memoryview) -> None:
        """Hash a large input while it comes: its bytes are still in the processor's cache."""
        if self._hasher is None:
            self._hasher = ValuesHasher(self._message.inputs)
        self._hasher.advance(there)

    def adopt(self, incoming: Incoming) -> bool:
        """Answer this request instead of the one that was lost with its link; False after a cancellation."""
        if self._cancelled:
            return False
        self._incoming.on_cancel = None
        self._incoming = incoming
        incoming.on_cancel = self.cancel
        return True

    def cancel(self) -> None:
        """The client does not wait any more: stop the work; an answer that comes all the same is not charged."""
        self._cancelled = True
        if self._ticket is not None:
            self._ticket.cancel()
        elif not self._submitted:
            if self._sink is not None:
                self._desk.work.unreserve(self._sink)
            self._end()

    def _end(self) -> None:
        self._seat.running.pop(self._message.number, None)
        self._seat.machine.failed(self._message.number)

    def _fail(self, reason: Reason, detail: str) -> None:
        self._end()
        if not self._cancelled:
            self._desk.metrics.add("calls_total", reason.value)
            self._desk.refuse(self._incoming, reason, detail)

    def _received(self, payload: memoryview) -> None:
        message, terms, seat = self._message, self._seat.terms, self._seat
        if self._cancelled:
            return
        # The worker begins while short inputs are hashed. A client whose hash was wrong once has its calls hashed first.
        hashes_later = self._hasher is None and not seat.hashes_first
        if not hashes_later and self._input_hash(payload) != message.input_hash:
            if self._sink is not None:
                self._desk.work.unreserve(self._sink)
            self._fail(Reason.WRONG_HASH, _WRONG_HASH)
            return
        order = terms.order
        seconds = message.timeout_ms / 1000 if message.timeout_ms else self._desk.settings.call_seconds_max
        request = WorkRequest(
            order.model_id,
            message.inputs,
            payload,
            message.outputs,
            message.priority,
            min(seconds, self._desk.settings.call_seconds_max),
            terms.client,
            order.share_worker,
            order.accept_tolerance,
            order.numeric_class == EXACT_CLASS,
        )
        self._submitted = True
        try:
            self._ticket = self._desk.work.submit(request, self._done)
        except (Refused, WorkError) as error:
            self._fail(error.reason, error.detail)
            return
        if hashes_later and self._input_hash(payload) != message.input_hash:
            seat.hashes_first = True
            self._refuse_started()

    def _input_hash(self, payload: memoryview) -> bytes:
        return values_hash(self._message.inputs, payload) if self._hasher is None else self._hasher.digest(payload)

    def _refuse_started(self) -> None:
        """The inputs do not have their hash: whatever the worker makes of them is thrown away and not charged."""
        if self._ticket is None or self._ticket.is_done or self._cancelled:
            return
        self._desk.metrics.add("calls_total", Reason.WRONG_HASH.value)
        self._desk.refuse(self._incoming, Reason.WRONG_HASH, _WRONG_HASH)
        self.cancel()

    def _done(self, outcome: WorkOutcome) -> None:
        if outcome.reason is not None or self._cancelled or self._seat.machine.phase is Phase.ENDED:
            self._release()
            self._fail(outcome.reason or Reason.AGREEMENT_ENDED, outcome.detail)
            return
        desk, seat, message = self._desk, self._seat, self._message
        size = len(outcome.payload)
        if size > desk.settings.output_bytes_max:
            self._release()
            self._fail(Reason.OUTPUT_TOO_LARGE, f"outputs may have {desk.settings.output_bytes_max} bytes")
            return
        output_hash = values_hash(outcome.headers, outcome.payload)
        clock = desk.clock
        machine = seat.machine
        try:
            place = machine.executed(
                message.number, output_hash, self._operations, outcome.engine, Now(clock.monotonic(), clock.wall_ms())
            )
        except PeerError as error:
            self._release()
            self._fail(Reason.WRONG_HASH, str(error))
            return
        seat.running.pop(message.number, None)
        work_us = round(outcome.seconds * 1e6)
        if message.keep:
            desk.outputs.keep(seat.terms.agreement_id, message.number, outcome.headers, outcome.payload, work_us, outcome.engine)
        result = CallResult(output_hash, outcome.headers, place.amount, place.slice, place.position, work_us, outcome.engine)
        self._incoming.reply(result, (outcome.payload,) if size else (), self._release)
        if place.position == 0 or machine.is_due:
            seat.bell.ring()

    def _release(self) -> None:
        if self._ticket is not None:
            self._ticket.release()


_WRONG_HASH: Final = "the inputs do not have the call's hash"


def _ignore(_: memoryview) -> None:
    """The attachment of a call that is answered already."""
