"""One bought agreement: calls out, answers checked, receipts checked, cheques back.

`call_nowait` and the reply's callback are the hot path and plain code. Calls beyond the slice wait in order for the next
cheque. A task of the agreement's own verifies receipts, saves and signs cheques, and takes the agreement up again on a new
link; while there is no link, calls wait and those under way fail as unreachable: repeat them with the same number.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any, Final

import trio

from p2pnode.errors import P2PNodeError, PeerError, ProtocolViolation, Refused, TooSlow, Unreachable
from p2pnode.market.agreements import Phase, Terms
from p2pnode.market.answers import CallAnswer, OnAnswer, OutgoingCall, open_result
from p2pnode.market.bought_agreement import BoughtProgress
from p2pnode.market.cheques import HashChain
from p2pnode.market.payments import Payments
from p2pnode.market.pricing import CallPricer
from p2pnode.market.way_back import PurchaseSurroundings
from p2pnode.reasons import EndReason, Reason
from p2pnode.wire.messages.work import Call, CallResult, FetchResult
from p2pnode.wire.tensors import Value, decode_values, encode_values, values_hash

_WAITING_MAX: Final = 65_536
_GRACE_SECONDS: Final = 5.0
# Answers to FetchResult which mean that a call is not charged, now or ever.
_NOT_EXECUTED: Final = frozenset({Reason.UNKNOWN_CALL, Reason.CALL_MISMATCH, Reason.UNKNOWN_AGREEMENT, Reason.AGREEMENT_ENDED})
# Refusals of a call that may come after it was executed: this node, or the provider's, had no room for the answer.
_UNCLEAR: Final = frozenset({Reason.MEMORY, Reason.INTERNAL})


class ClientAgreement:
    """An agreement as its client uses it. `id`: the order's hash. `peer`: the provider's node id."""

    def __init__(self, around: PurchaseSurroundings, terms: Terms, chain: HashChain, progress: BoughtProgress, link: Any) -> None:
        self.id = terms.agreement_id
        self.peer = terms.provider
        self.terms = terms
        self._clock = around.environment.clock
        self._pricer = CallPricer(terms.quote)
        self._next_number = progress.first_number
        self._waiting: deque[OutgoingCall] = deque()
        self._flying: dict[int, OutgoingCall] = {}
        self._held_back = False
        self._crowded = False
        self.payments = Payments(around, terms, chain, progress, link, self)
        self.machine = self.payments.machine

    @property
    def is_open(self) -> bool:
        """Whether calls may be made, now or as soon as there is a link."""
        return self.machine.phase is Phase.OPEN

    @property
    def is_connected(self) -> bool:
        """Whether the provider has taken the agreement up on a link that stands."""
        return self.payments.link is not None

    @property
    def end_reason(self) -> EndReason | None:
        """How it ended, None before."""
        return self.machine.end_reason

    @property
    def spent(self) -> int:
        """Micro-credits acknowledged by cheque so far."""
        return self.machine.paid

    @property
    def at_risk(self) -> int:
        """Micro-credits of calls that no cheque covers yet."""
        return self.machine.calls.outstanding

    def next_number(self) -> int:
        """Set a call number aside; it is never given again, after a crash neither."""
        number = self._next_number
        self._next_number = number + 1
        return number

    def described(self, inputs: Mapping[str, Value]) -> tuple[bytes, int]:
        """Give the hash and the price of a call with these inputs: what has to be on disk with its number before it leaves.

        Raises Refused(SHAPE_OVER_QUOTE).
        """
        headers, chunks, _ = encode_values(inputs)
        return values_hash(headers, chunks, parallel=True), self._pricer.price(headers)[0]

    async def fetch(self, number: int) -> CallAnswer:
        """Ask for the answer of a call from before a restart, by its number alone; it is not paid before `confirm`.

        Raises Refused: UNKNOWN_CALL (never executed, costs nothing), OUTPUT_GONE (`call` with the same number and inputs
        executes it again without charge). Raises Unreachable when its fate is still open: ask again. ProtocolViolation.
        """
        known = self.machine.calls.by_number.get(number)
        if known is None:
            raise Refused(Reason.UNKNOWN_CALL, f"call {number} is not open here")
        if self.payments.link is None or number in self._flying:
            raise Unreachable("the provider is not connected")
        self.machine.calls.sent(number, known.input_hash, known.amount, True)
        message = FetchResult(self.id, number, known.input_hash)
        return await self._wait(lambda on_answer: self._begin(OutgoingCall(self, message, (), known.amount, on_answer)), None)

    async def call(
        self, inputs: Mapping[str, Value], outputs: Sequence[str] = (), priority: int = 5, timeout: float | None = None, *,
        number: int | None = None, hold: bool = False, keep: bool = True,
    ) -> CallAnswer:  # fmt: skip
        """Run one inference and give its outputs.

        timeout: seconds for the provider's run, and with a grace for the whole. number: from `next_number`; the same number
        with the same inputs asks again for the same answer, which is not paid twice. hold: no cheque covers the call
        before `confirm(number)` or `give_up(number)`. keep: the provider keeps the output until the cheque. Cancelled: the
        call is given up, unless it is held.
        Raises Refused, Unreachable (repeat with the same number), TooSlow, ProtocolViolation.
        """
        return await self._wait(
            lambda on_answer: self.call_nowait(
                inputs, outputs, priority, timeout, on_answer=on_answer, number=number, hold=hold, keep=keep
            ),
            timeout,
        )

    async def _wait(self, start: Callable[[OnAnswer], OutgoingCall], timeout: float | None) -> CallAnswer:
        done = trio.Event()
        result: list[CallAnswer | P2PNodeError] = []

        def on_answer(answer: CallAnswer | P2PNodeError) -> None:
            result.append(answer)
            done.set()

        outgoing = start(on_answer)
        limit = float("inf") if timeout is None else timeout + _GRACE_SECONDS
        try:
            with trio.move_on_after(limit):
                await done.wait()
        finally:
            if not result:
                outgoing.cancel()
        if not result:
            raise TooSlow(f"no answer within {limit:.1f} s")
        answer = result[0]
        if isinstance(answer, CallAnswer):
            return answer
        raise answer

    def call_nowait(
        self, inputs: Mapping[str, Value], outputs: Sequence[str] = (), priority: int = 5, timeout: float | None = None, *,
        on_answer: OnAnswer, number: int | None = None, hold: bool = False, keep: bool = True, deadline: float = inf,
    ) -> OutgoingCall:  # fmt: skip
        """Send one call, or queue it for the next cheque; `on_answer` runs once in the event loop, with answer or error.

        The inputs' arrays must not change until then. deadline: on the node's clock; at it the call is given up and
        `on_answer` gets TooSlow. Raises Refused at once for a shape over the quote, a spent budget, an ended agreement or too
        long a queue.
        """
        headers, chunks, _ = encode_values(inputs)
        amount = self._pricer.price(headers)[0]
        input_hash = values_hash(headers, chunks, parallel=True)
        timeout_ms = 0 if timeout is None else max(1, round(timeout * 1000))
        if number is None:
            number = self._next_number
            self._next_number = number + 1
            message = Call(self.id, number, input_hash, headers, tuple(outputs), priority, timeout_ms, keep)
            outgoing = OutgoingCall(self, message, chunks, amount, on_answer, deadline)
            self._send_or_wait(outgoing, hold)
            if deadline < self.payments.expires_at:
                self.payments.expire_by(deadline)
            return outgoing
        message = Call(self.id, number, input_hash, headers, tuple(outputs), priority, timeout_ms, keep)
        outgoing = OutgoingCall(self, message, chunks, amount, on_answer)
        if number in self._flying:
            raise Refused(Reason.ALREADY_USED, f"call {number} is under way")
        if number in self.machine.calls.by_number or number < self.payments.first_number:
            self._ask_again(outgoing, hold)
        else:
            self._send_or_wait(outgoing, hold)
        return outgoing

    def expire(self, now: float) -> float:
        """Give up the calls whose deadline has come, and say when the next one's does."""
        for outgoing in [*self._flying.values(), *self._waiting]:
            if outgoing.deadline <= now:
                outgoing.cancel()
                outgoing.on_answer(TooSlow("the provider did not answer in time"))
        return min((outgoing.deadline for outgoing in (*self._flying.values(), *self._waiting)), default=inf)

    def confirm(self, number: int) -> None:
        """Say that a held call's output is safe: from now on it may be paid."""
        self.machine.calls.confirmed(number)
        if self.machine.is_waiting:
            self.payments.bell.ring()

    def hold(self, number: int) -> bool:
        """Take a call back that was given up or withdrawn, to ask for it again; False when its end is decided by now."""
        return self.payments.lost_calls.take_back(number) and self.machine.calls.hold(number)

    def give_up(self, number: int) -> None:
        """Say that a held call's output is not wanted any more: it is paid all the same if it was executed."""
        self.payments.lost_calls.take_back(number)
        self.machine.calls.give_up(number)
        self.payments.settle_lost(number)

    def withdraw(self, number: int, after_seconds: float = 0.0) -> None:
        """Say that a call's answer was lost with its link and that it is made elsewhere, unless `hold` takes it back in time.

        It is not paid if the provider agrees to that, which it does within bounds of its own.
        """
        if not self.payments.withdraw(number, after_seconds):
            self.give_up(number)

    def cancel(self, outgoing: OutgoingCall) -> None:
        """Give a call up; see `OutgoingCall.cancel`."""
        if outgoing.is_over:
            return
        outgoing.is_over = True
        number = outgoing.number
        if outgoing.request < 0:
            self._waiting.remove(outgoing)
            self.payments.held.discard(number)
            return
        outgoing.link.cancel(outgoing.request)
        self._flying.pop(number, None)
        if self.machine.calls.is_held(number):
            self.machine.calls.lost(number)  # whoever holds it decides: ask again, or give it up
        else:
            self.give_up(number)

    async def receipt(self, number: int) -> bytes:
        """Wait until a call is covered by a receipt and cheque, and give its `.receipt` bundle.

        Raises Refused(UNKNOWN_CALL) when the provider lost the call before it signed, or the agreement ended without.
        """
        return await self.payments.receipt(number)

    async def close(self, reason: EndReason = EndReason.COMPLETED) -> EndReason:
        """End the agreement: last receipt, last cheque. Gives the end reason once the provider has confirmed.

        Bounded by the settings' patience. Cancelled: the end goes on in the agreement's own task.
        """
        return await self.payments.close(reason)

    async def ended(self) -> EndReason:
        """Wait until it has ended and that is saved, and say how."""
        return await self.payments.ended()

    # --- sending ------------------------------------------------------------------------------------------------------

    def _send_or_wait(self, outgoing: OutgoingCall, hold: bool) -> None:
        machine = self.machine
        may_send = machine.may_send(outgoing.amount)
        if may_send and not self._waiting and not self._held_back:
            machine.calls.sent(outgoing.number, outgoing.message.input_hash, outgoing.amount, hold)
            self._transmit(outgoing)
            return
        if len(self._waiting) >= _WAITING_MAX:
            raise Refused(Reason.BUSY, "too many calls wait for the next cheque")
        self._waiting.append(outgoing)
        if hold:
            self.payments.held.add(outgoing.number)

    def _ask_again(self, outgoing: OutgoingCall, hold: bool) -> None:
        """Fetch a call that may have been executed; send it only if the provider does not hold its answer."""
        call = outgoing.message
        if not isinstance(call, Call) or self.payments.link is None:
            raise Unreachable("the provider is not connected")
        self.payments.drop_fetch(call.number)
        self.machine.calls.sent(call.number, call.input_hash, outgoing.amount, hold)
        outgoing.message = FetchResult(self.id, call.number, call.input_hash)
        wanted = outgoing.on_answer

        def on_answer(answer: CallAnswer | P2PNodeError) -> None:
            if not (isinstance(answer, Refused) and answer.reason in (Reason.UNKNOWN_CALL, Reason.OUTPUT_GONE)):
                wanted(answer)
                return
            outgoing.message, outgoing.on_answer, outgoing.is_over, outgoing.request = call, wanted, False, -1
            try:
                if answer.reason is Reason.OUTPUT_GONE:
                    self.machine.calls.sent(call.number, call.input_hash, outgoing.amount, hold)
                    self._transmit(outgoing)
                else:
                    self._send_or_wait(outgoing, hold)
            except PeerError as error:
                outgoing.is_over = True
                wanted(error)

        outgoing.on_answer = on_answer
        self._transmit(outgoing)

    def _begin(self, outgoing: OutgoingCall) -> OutgoingCall:
        self._transmit(outgoing)
        return outgoing

    def _transmit(self, outgoing: OutgoingCall) -> None:
        number = outgoing.message.number
        link = outgoing.link = self.payments.link
        self._flying[number] = outgoing
        try:
            chunks = outgoing.chunks if type(outgoing.message) is Call else ()
            request = link.request_nowait(outgoing.message, chunks, lambda reply: self._replied(outgoing, reply))
            if not outgoing.is_over:
                outgoing.request = request
        except PeerError as error:
            self._replied(outgoing, error)

    def flush(self, is_after_cheque: bool = False) -> None:
        """Send the calls that wait, as far as the slice allows; the agreement's task calls it when that may have changed."""
        if is_after_cheque:
            self._held_back = self._crowded = False
        while self._waiting and not self._held_back and not self._crowded:
            outgoing = self._waiting[0]
            try:
                if not self.machine.may_send(outgoing.amount):
                    return
                self._waiting.popleft()
                hold = outgoing.number in self.payments.held
                self.payments.held.discard(outgoing.number)
                self.machine.calls.sent(outgoing.number, outgoing.message.input_hash, outgoing.amount, hold)
            except Refused as error:
                if self._waiting and self._waiting[0] is outgoing:
                    self._waiting.popleft()
                self._over(outgoing, error)
                continue
            self._transmit(outgoing)

    def fail_all(self, error: P2PNodeError, is_ended: bool) -> None:
        """Tell those under way (and, at the end, those that wait) that nothing will come."""
        for outgoing in list(self._flying.values()):
            self._flying.pop(outgoing.number, None)
            self._over(outgoing, error)
        while is_ended and self._waiting:
            self._over(self._waiting.popleft(), error)

    def _over(self, outgoing: OutgoingCall, answer: CallAnswer | P2PNodeError) -> None:
        if not outgoing.is_over:
            outgoing.is_over = True
            outgoing.on_answer(answer)

    # --- answers ------------------------------------------------------------------------------------------------------

    def _replied(self, outgoing: OutgoingCall, reply: Any) -> None:
        if outgoing.is_over:
            return
        machine, number = self.machine, outgoing.number
        self._flying.pop(number, None)
        self._crowded = False
        try:
            if isinstance(reply, PeerError):
                raise reply
            answer = self._check(outgoing, reply)
        except Refused as refusal:
            error = self._note_refusal(number, type(outgoing.message) is FetchResult, refusal)
            is_early = refusal.reason is Reason.CREDIT and bool(machine.calls.by_number)
            if type(outgoing.message) is Call and (is_early or refusal.reason is Reason.TOO_MANY_REQUESTS):
                # Our cheque is still on its way there, or the link is full: wait in our place in the queue.
                outgoing.request = -1
                self._held_back, self._crowded = is_early, not is_early
                self._waiting.appendleft(outgoing)
                self.payments.retry_soon()
            else:
                self._over(outgoing, error)
        except ProtocolViolation as error:
            machine.calls.lost(number)
            self._over(outgoing, error)
            self.payments.broken(error)
        except PeerError as error:
            machine.calls.lost(number)
            self._over(outgoing, error)
        else:
            self._over(outgoing, answer)
            if self._waiting:
                self.flush()
        if machine.is_waiting:
            self.payments.bell.ring()

    def _note_refusal(self, number: int, is_fetch: bool, refusal: Refused) -> PeerError:
        """Note what a refusal says of a call's fate; gives the error to pass on, Unreachable where its fate stays open."""
        calls, reason = self.machine.calls, refusal.reason
        if reason is Reason.OUTPUT_GONE:
            calls.gone(number)
        elif is_fetch and reason in _NOT_EXECUTED:
            self.machine.disclaimed(number)
        elif is_fetch:
            calls.lost(number)
            return Unreachable(f"the provider could not say what became of the call: {refusal}")
        elif reason in _UNCLEAR:
            calls.lost(number)
            self.payments.settle_lost(number)
        else:
            calls.failed(number)
        return refusal

    def _check(self, outgoing: OutgoingCall, reply: Any) -> CallAnswer:
        result, payload = open_result(reply)
        answer = CallAnswer(
            decode_values(result.outputs, payload), result.amount, self.peer, result.work_us / 1e6, self.id, outgoing.number,
            outgoing.message.input_hash, result.output_hash, result.engine, result.outputs, payload,
        )  # fmt: skip
        self._place(outgoing.number, result)
        return answer

    def _place(self, number: int, result: CallResult) -> None:
        self.machine.calls.answered(number, result.slice, result.position, result.output_hash, result.amount)

    def take_fetched(self, number: int, reply: Any) -> None:
        """Take the answer to a fetch that nobody waits for: it only completes what a receipt is checked against."""
        try:
            if isinstance(reply, PeerError):
                raise reply
            self._place(number, open_result(reply)[0])
        except Refused as error:
            self._note_refusal(number, True, error)
        except ProtocolViolation as error:
            self.machine.calls.lost(number)
            self.payments.broken(error)
        except PeerError:
            self.machine.calls.lost(number)
        self.payments.bell.ring()
