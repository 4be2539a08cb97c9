"""The client's side of one agreement as a pure machine: pacing, checking receipts, issuing cheques, the end.

Promise: a cheque is issued for a receipt only if its Merkle root covers exactly calls that this client made, each once,
with the client's own input hashes, the output hashes of the answers it holds, and the amounts that the quote's arithmetic
gives. `may_send`, `sent`, `answered` and `failed` are the hot path and plain methods; everything else is an event.
"""

from dataclasses import dataclass
from math import inf

from p2pnode.errors import ProtocolViolation, Refused
from p2pnode.market.agreements import (
    AskLeaves,
    Effect,
    EndAsked,
    EndConfirmed,
    Event,
    FetchOutputs,
    Finished,
    Forget,
    LeavesArrived,
    LinkDown,
    LinkUp,
    Now,
    Phase,
    ReceiptArrived,
    RefuseReceipt,
    SaveCheque,
    SaveReceipt,
    SendCheque,
    SendEnd,
    StateArrived,
    Terms,
    Tick,
)  # fmt: skip
from p2pnode.market.cheques import HashChain
from p2pnode.market.slices import check_leaves
from p2pnode.reasons import EndReason, Reason
from p2pnode.wire.messages.market import AgreementState, Cheque, Leaf, Receipt


@dataclass(slots=True)
class BoughtCall:
    """One call that this client made.

    is_flying: a reply may still come on this link. is_held: its output is not safe with the caller yet, so no cheque covers
    it. is_denied: a receipt charges it and the provider no longer has its answer.
    """

    number: int
    input_hash: bytes
    amount: int
    slice: int = -1
    position: int = -1
    output_hash: bytes = b""
    is_flying: bool = True
    is_held: bool = False
    is_denied: bool = False

    @property
    def is_answered(self) -> bool:
        """Whether this client holds an answer."""
        return self.position >= 0


@dataclass(slots=True)
class BoughtProgress:
    """What survives a restart: totals of the cheques issued, and the first call number of this run."""

    paid: int = 0
    slices_paid: int = 0
    last_receipt: bytes = b""
    first_number: int = 0
    is_restart: bool = False


@dataclass(slots=True)
class _PendingReceipt:
    receipt: Receipt
    document: bytes
    since: float
    leaves: tuple[Leaf, ...] | None = None
    has_asked: bool = False


class BoughtAgreement:
    """A client's agreement.

    patience_seconds: how long to wait for replies that a receipt names before asking what stands behind it, and how long
    for the provider's last receipt. pays_forgotten: whether calls from before a crash are paid, at most one slice.
    """

    def __init__(
        self,
        terms: Terms,
        chain: HashChain,
        now: Now,
        patience_seconds: float,
        away_seconds: float,
        *,
        pays_forgotten: bool = True,
        progress: BoughtProgress | None = None,
    ) -> None:
        progress = progress or BoughtProgress()
        self.terms = terms
        self.phase = Phase.OPEN
        self.end_reason: EndReason | None = None
        self.wanted_end: EndReason | None = None
        self.is_up = False
        self.paid = progress.paid
        self.slices_paid = progress.slices_paid
        self.calls: dict[int, BoughtCall] = {}
        self.outstanding = 0
        self._places: dict[tuple[int, int], BoughtCall] = {}
        self._receipts: dict[int, _PendingReceipt] = {}
        self._last_receipt = progress.last_receipt
        self._first_number = progress.first_number
        restart = progress.is_restart and pays_forgotten
        self._forgotten_amount = terms.order.slice_amount if restart else -1
        self._forgotten_calls = terms.order.slice_calls if restart else 0
        self._chain = chain
        self._flying = 0
        self._patience = patience_seconds
        self._away_seconds = away_seconds
        self._since = now.seconds
        self._ends_at = now.seconds + (terms.order.deadline_ms - now.wall_ms) / 1000

    def may_send(self, amount: int) -> bool:
        """Say whether one more call of this amount is within the slice now; False means: wait for the next cheque.

        Raises Refused(BUDGET) when it never will be, and Refused(AGREEMENT_ENDED) after the end.
        """
        order = self.terms.order
        if self.phase is not Phase.OPEN:
            raise Refused(Reason.AGREEMENT_ENDED, (self.end_reason or self.wanted_end or EndReason.COMPLETED).value)
        if self.paid + self.outstanding + amount > self.terms.amount_max:
            raise Refused(Reason.BUDGET, f"the agreement is limited to {self.terms.amount_max} micro-credits")
        if amount > order.slice_amount:
            raise Refused(Reason.CREDIT, "one call costs more than a whole slice")
        if self.slices_paid + len(self._receipts) >= order.chain_length:
            raise Refused(Reason.AGREEMENT_ENDED, "every slice of the hash chain is used")
        return self.is_up and self.outstanding + amount <= order.slice_amount and len(self.calls) < order.slice_calls

    def sent(self, number: int, input_hash: bytes, amount: int, is_held: bool = False) -> None:
        """Note that a call is about to be sent, or sent again. Raises Refused(CALL_MISMATCH) for another input."""
        call = self.calls.get(number)
        if call is None:
            self.calls[number] = BoughtCall(number, input_hash, amount, is_held=is_held)
            self.outstanding += amount
            self._flying += 1
            return
        if call.input_hash != input_hash:
            raise Refused(Reason.CALL_MISMATCH, f"call {number} had another input")
        call.is_held = is_held
        if not call.is_flying:
            call.is_flying = True
            self._flying += 1

    def recall(self, number: int, input_hash: bytes, amount: int) -> None:
        """Note a call from before a restart whose output the caller will ask for again; until then no cheque covers it."""
        if number not in self.calls:
            self.calls[number] = BoughtCall(number, input_hash, amount, is_flying=False, is_held=True)
            self.outstanding += amount

    def fetching(self, number: int) -> None:
        """Note that a call's answer is being asked for again."""
        call = self.calls.get(number)
        if call is not None and not call.is_flying:
            call.is_flying = True
            self._flying += 1

    def answered(self, number: int, slice_number: int, position: int, output_hash: bytes, amount: int) -> None:
        """Note a call's answer and its place. Raises ProtocolViolation(RECEIPT_MISMATCH) for a wrong amount or place."""
        call = self.calls.get(number)
        if call is None:
            return  # paid in the meantime, or given up with the link
        if amount != call.amount:
            raise ProtocolViolation(Reason.RECEIPT_MISMATCH, f"call {number} was charged {amount} instead of {call.amount}")
        other = self._places.setdefault((slice_number, position), call)
        if other is not call or slice_number < self.slices_paid or slice_number >= self.terms.order.chain_length:
            raise ProtocolViolation(Reason.RECEIPT_MISMATCH, f"call {number} has no place of its own")
        if call.is_answered and (call.slice, call.position) != (slice_number, position):
            raise ProtocolViolation(Reason.RECEIPT_MISMATCH, f"call {number} changed its place")
        call.slice, call.position, call.output_hash = slice_number, position, output_hash
        self._land(call)

    def failed(self, number: int) -> None:
        """Note that the provider has no answer for a call: it costs nothing, unless a receipt charges it all the same."""
        call = self.calls.get(number)
        if call is None:
            return
        self._land(call)
        if call.is_answered:
            return
        if any(leaf.number == number for pending in self._receipts.values() for leaf in pending.leaves or ()):
            call.is_denied = True
            return
        del self.calls[number]
        self.outstanding -= call.amount

    def lost(self, number: int) -> None:
        """Note that a call's fate is unknown (link lost, or cancelled here): the provider may have executed it."""
        call = self.calls.get(number)
        if call is not None:
            self._land(call)

    def confirmed(self, number: int) -> None:
        """Note that the caller holds a call's output safely."""
        call = self.calls.get(number)
        if call is not None:
            call.is_held = False

    @property
    def is_waiting(self) -> bool:
        """Whether a receipt waits for an answer: then `handle(Tick())` is worth a try after each one."""
        return bool(self._receipts)

    def _land(self, call: BoughtCall) -> None:
        if call.is_flying:
            call.is_flying = False
            self._flying -= 1

    @property
    def deadline(self) -> float:
        """When `handle(Tick())` is due next, seconds on the node's clock."""
        if self.phase is Phase.ENDED:
            return inf
        if self.phase is Phase.CLOSING:
            end = self._since + (self._patience if self.is_up else self._away_seconds)
        else:
            end = self._ends_at
        waits = [pending.since + self._patience / 4 for pending in self._receipts.values() if not pending.has_asked]
        return min([end, *waits])

    def handle(self, event: Event, now: Now) -> list[Effect]:
        """Give what to do about an event. Raises ProtocolViolation for a provider that breaks the agreement."""
        if self.phase is Phase.ENDED:
            return self._late(event)
        effects: list[Effect] = []
        match event:
            case LinkDown():
                self.is_up, self._since = False, now.seconds
                for call in self.calls.values():
                    self._land(call)
            case StateArrived(state):
                effects += self._resume(state, now)
            case LinkUp():
                self.is_up, self._since = True, now.seconds
            case ReceiptArrived(receipt, document):
                effects += self._receive(receipt, document, now)
            case LeavesArrived(slice_number, leaves):
                effects += self._learn(slice_number, leaves)
            case EndAsked(reason) if self.phase is Phase.OPEN:
                effects += self._close(reason, now)
            case EndConfirmed():
                return self._finish(self.wanted_end or EndReason.COMPLETED)
            case Tick():
                effects += self._time(now)
            case _:
                pass
        return effects + self._pay(now)

    def abandon(self, reason: EndReason) -> list[Effect]:
        """End at once, for example because the provider broke the agreement; nothing more is paid."""
        return [] if self.phase is Phase.ENDED else self._finish(reason)

    def _late(self, event: Event) -> list[Effect]:
        if isinstance(event, ReceiptArrived) and event.receipt.slice < self.slices_paid:
            return [SendCheque(event.receipt.slice)]
        if isinstance(event, ReceiptArrived):
            return [RefuseReceipt(event.receipt.slice, "this agreement has ended here")]
        return []

    def _close(self, reason: EndReason, now: Now) -> list[Effect]:
        self.phase, self.wanted_end, self._since = Phase.CLOSING, reason, now.seconds
        return [SendEnd(reason)] if self.is_up else []

    def _time(self, now: Now) -> list[Effect]:
        if self.phase is Phase.OPEN and now.seconds >= self._ends_at:
            return self._close(EndReason.EXPIRED, now)
        if self.phase is Phase.CLOSING and now.seconds >= self._since + (self._patience if self.is_up else self._away_seconds):
            return self._finish(self.wanted_end if self.is_up and self.wanted_end else EndReason.PEER_LOST)
        return []

    def _resume(self, state: AgreementState, now: Now) -> list[Effect]:
        """Adopt the provider's word on where it stands: what it does not hold was not charged and is forgotten."""
        if state.slice < self.slices_paid or state.agreement != self.terms.agreement_id:
            raise ProtocolViolation(Reason.RECEIPT_MISMATCH, "the provider fell behind its own receipts")
        if state.ended:
            return self._finish(_end_reason(state.ended))
        self.is_up, self._since = True, now.seconds
        lost = [
            call
            for call in self.calls.values()
            if call.is_answered and (call.slice, call.position) >= (state.slice, state.position)
        ]
        for call in lost:
            del self.calls[call.number]
            self.outstanding -= call.amount
            self._places.pop((call.slice, call.position), None)
        effects: list[Effect] = [Forget(tuple(call.number for call in lost))] if lost else []
        unknown = [call for call in self.calls.values() if not (call.is_answered or call.is_flying or call.is_held)]
        if unknown:
            effects.append(FetchOutputs(tuple((call.number, call.input_hash) for call in unknown)))
        if self.phase is Phase.CLOSING:
            effects.append(SendEnd(self.wanted_end or EndReason.COMPLETED))
        return effects

    def _receive(self, receipt: Receipt, document: bytes, now: Now) -> list[Effect]:
        if receipt.slice < self.slices_paid:
            return [SendCheque(receipt.slice)]
        known = self._receipts.get(receipt.slice)
        if known is not None:
            if known.document != document:
                raise ProtocolViolation(Reason.RECEIPT_MISMATCH, f"slice {receipt.slice} has two receipts")
            return []
        following = self.slices_paid + len(self._receipts)
        if receipt.slice != following:
            return [RefuseReceipt(receipt.slice, f"slice {following} comes first")]
        last = self._receipts[following - 1] if self._receipts else None
        total = last.receipt.total if last else self.paid
        order = self.terms.order
        if receipt.agreement != self.terms.agreement_id or receipt.numeric_class != order.numeric_class:
            raise ProtocolViolation(Reason.RECEIPT_MISMATCH, "the receipt belongs to another agreement or class")
        if receipt.previous != (last.document if last else self._last_receipt) or receipt.total != total + receipt.amount:
            raise ProtocolViolation(Reason.RECEIPT_MISMATCH, "the receipt does not follow the one before")
        if receipt.calls > order.slice_calls or receipt.amount > order.slice_amount or receipt.total > self.terms.amount_max:
            raise ProtocolViolation(Reason.RECEIPT_MISMATCH, "the receipt exceeds what was ordered")
        if receipt.slice >= order.chain_length:
            raise ProtocolViolation(Reason.RECEIPT_MISMATCH, "the receipt lies beyond the hash chain")
        self._receipts[receipt.slice] = _PendingReceipt(receipt, document, now.seconds)
        self._since = now.seconds
        return []

    def _pay(self, now: Now) -> list[Effect]:
        effects: list[Effect] = []
        while self.phase is not Phase.ENDED and (pending := self._receipts.get(self.slices_paid)) is not None:
            receipt = pending.receipt
            calls = [self._places.get((receipt.slice, position)) for position in range(receipt.calls)]
            missing = sum(call is None for call in calls)
            if missing and pending.leaves is None:
                # Answers may still be on their way behind the receipt: only then is it worth waiting for them.
                is_patient = self._flying >= missing and now.seconds < pending.since + self._patience / 4
                if self.is_up and not pending.has_asked and not is_patient:
                    pending.has_asked = True
                    effects.append(AskLeaves(receipt.slice))
                return effects
            if pending.leaves is not None and self._lacks_outputs(pending.leaves, calls):
                return effects
            if any(call is not None and call.is_held for call in calls):
                return effects
            own = [self._leaf(call, position, pending) for position, call in enumerate(calls)]
            check_leaves(own, receipt.root, receipt.amount)
            effects += self._issue(pending, tuple(own), now)
        return effects

    def _leaf(self, call: BoughtCall | None, position: int, pending: _PendingReceipt) -> Leaf:
        if call is not None:
            return Leaf(call.number, call.input_hash, call.output_hash, b"", call.amount)
        if pending.leaves is None:
            raise ProtocolViolation(Reason.RECEIPT_MISMATCH, f"nothing is known of position {position}")
        return pending.leaves[position]

    def _lacks_outputs(self, leaves: tuple[Leaf, ...], calls: list[BoughtCall | None]) -> bool:
        """Say whether a named call of ours has no answer here yet. Raises ProtocolViolation when none will come."""
        for call, leaf in zip(calls, leaves, strict=True):
            own = self.calls.get(leaf.number) if call is None else None
            if own is not None and own.is_denied:
                raise ProtocolViolation(Reason.RECEIPT_MISMATCH, f"call {leaf.number} is charged and its answer is withheld")
            if own is not None and not own.is_answered:
                return True
        return False

    def _learn(self, slice_number: int, leaves: tuple[Leaf, ...]) -> list[Effect]:
        pending = self._receipts.get(slice_number)
        if pending is None or pending.leaves is not None:
            return []
        if len(leaves) != pending.receipt.calls:
            raise ProtocolViolation(Reason.RECEIPT_MISMATCH, "the leaves are not as many as the receipt says")
        check_leaves(leaves, pending.receipt.root, pending.receipt.amount)
        wanted: list[tuple[int, bytes]] = []
        forgotten: list[Leaf] = []
        for position, leaf in enumerate(leaves):
            if (slice_number, position) in self._places:
                continue
            call = self.calls.get(leaf.number)
            if call is None:
                forgotten.append(leaf)
            elif call.input_hash != leaf.input_hash or call.amount != leaf.amount:
                raise ProtocolViolation(Reason.RECEIPT_MISMATCH, f"call {leaf.number} had another input or price")
            elif not call.is_held and not call.is_flying:
                wanted.append((leaf.number, leaf.input_hash))
        self._accept_forgotten(forgotten)
        pending.leaves = leaves
        return [FetchOutputs(tuple(wanted))] if wanted else []

    def _accept_forgotten(self, leaves: list[Leaf]) -> None:
        """Accept calls from before a crash, at most one slice in all; whoever crashed pays for it."""
        if not leaves:
            return
        self._forgotten_amount -= sum(leaf.amount for leaf in leaves)
        self._forgotten_calls -= len(leaves)
        is_old = all(leaf.number < self._first_number for leaf in leaves)
        if not is_old or self._forgotten_amount < 0 or self._forgotten_calls < 0:
            raise ProtocolViolation(Reason.RECEIPT_MISMATCH, "the receipt charges calls that were not made")

    def _issue(self, pending: _PendingReceipt, leaves: tuple[Leaf, ...], now: Now) -> list[Effect]:
        receipt = pending.receipt
        amount = receipt.total - self.paid
        cheque = Cheque(
            agreement=self.terms.agreement_id,
            provider=self.terms.provider,
            slice=receipt.slice,
            receipt=pending.document,
            total=receipt.total,
            preimage=self._chain.value(receipt.slice + 1),
            issued_ms=now.wall_ms,
        )
        del self._receipts[receipt.slice]
        self.paid, self.slices_paid, self._last_receipt = receipt.total, receipt.slice + 1, pending.document
        self._since = now.seconds
        for position, leaf in enumerate(leaves):
            self._places.pop((receipt.slice, position), None)
            call = self.calls.pop(leaf.number, None)
            if call is not None:
                self._land(call)
                self.outstanding -= call.amount
        return [SaveReceipt(receipt, pending.document, leaves), SaveCheque(cheque, amount), SendCheque(receipt.slice)]

    def _finish(self, reason: EndReason) -> list[Effect]:
        self.phase, self.end_reason = Phase.ENDED, reason
        unpaid = sum(pending.receipt.amount for pending in self._receipts.values())
        return [*(RefuseReceipt(number, "this agreement has ended here") for number in self._receipts), Finished(reason, unpaid)]


def _end_reason(text: str) -> EndReason:
    try:
        return EndReason(text)
    except ValueError:
        return EndReason.FAILED
