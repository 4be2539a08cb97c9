"""The client's side of one agreement as a pure machine: pacing, checking receipts, issuing cheques, the end.

Promise: a cheque is issued for a receipt only if its Merkle root covers exactly calls that this client made, each once,
with the client's own input hashes, the output hashes of the answers it holds, and the amounts that the quote's arithmetic
gives. `may_send` and the methods of `calls` are the hot path and plain methods; everything else is an event.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from p2pnode.errors import ProtocolViolation, Refused
from p2pnode.market.agreements import (
    AskLeaves,
    CallsWithdrawn,
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
from p2pnode.market.bought_calls import BoughtCall, BoughtCalls
from p2pnode.market.cheques import HashChain
from p2pnode.market.slices import check_leaves
from p2pnode.reasons import EndReason, Reason
from p2pnode.wire.messages.market import AgreementState, Cheque, Leaf, Receipt


@dataclass(slots=True)
class BoughtProgress:
    """What survives a restart: totals of the cheques issued, and the first call number of this run.

    recalled: (number, input hash, amount) of calls whose outputs a job lacks. None of them is paid before the job has the
    output or has given it up, however long that takes.
    """

    paid: int = 0
    slices_paid: int = 0
    last_receipt: bytes = b""
    first_number: int = 0
    is_restart: bool = False
    recalled: Sequence[tuple[int, bytes, int]] = ()


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
        order = terms.order
        self.calls = BoughtCalls(order.slice_amount, order.slice_calls, order.chain_length, progress.slices_paid)
        self._receipts: dict[int, _PendingReceipt] = {}
        self._last_receipt = progress.last_receipt
        self._first_number = progress.first_number
        restart = progress.is_restart and pays_forgotten
        self._forgotten_amount = terms.order.slice_amount if restart else -1
        self._forgotten_calls = terms.order.slice_calls if restart else 0
        for number, input_hash, amount in progress.recalled:
            self.calls.recall(number, input_hash, amount)
        self._disclaimed: set[int] = set()
        self._chain = chain
        self._patience = patience_seconds
        self._away_seconds = away_seconds
        self._since = self._seen = now.seconds
        self._ends_at = now.seconds + (terms.order.deadline_ms - now.wall_ms) / 1000

    def may_send(self, amount: int) -> bool:
        """Say whether one more call of this amount is within the slice now; False means: wait for the next cheque.

        Raises Refused(BUDGET) when it never will be, and Refused(AGREEMENT_ENDED) after the end.
        """
        order = self.terms.order
        if self.phase is not Phase.OPEN:
            raise Refused(Reason.AGREEMENT_ENDED, (self.end_reason or self.wanted_end or EndReason.COMPLETED).value)
        if self.paid + self.calls.outstanding + amount > self.terms.amount_max:
            raise Refused(Reason.BUDGET, f"the agreement is limited to {self.terms.amount_max} micro-credits")
        if amount > order.slice_amount:
            raise Refused(Reason.CREDIT, "one call costs more than a whole slice")
        if self.slices_paid + len(self._receipts) >= order.chain_length:
            raise Refused(Reason.AGREEMENT_ENDED, "every slice of the hash chain is used")
        return self.is_up and self.calls.has_room(amount)

    @property
    def slices_paid(self) -> int:
        """How many slices have a cheque."""
        return self.calls.slices_paid

    @property
    def is_waiting(self) -> bool:
        """Whether a receipt waits for an answer: then `handle(Tick())` is worth a try after each one."""
        return bool(self._receipts)

    @property
    def deadline(self) -> float:
        """When `handle(Tick())` is due next, seconds on the node's clock."""
        if self.phase is Phase.ENDED:
            return inf
        if self.phase is Phase.CLOSING:
            end = self._since + (self._patience if self.is_up else self._away_seconds)
        else:
            end = self._ends_at
        waits = [
            pending.since + self._patience / (2 if pending.has_asked else 4)
            for pending in self._receipts.values()
            if pending.since + self._patience / 2 > self._seen
        ]
        return min([end, *waits])

    def handle(self, event: Event, now: Now) -> list[Effect]:
        """Give what to do about an event. Raises ProtocolViolation for a provider that breaks the agreement."""
        self._seen = now.seconds
        if self.phase is Phase.ENDED:
            return self._late(event)
        effects: list[Effect] = []
        match event:
            case LinkDown():
                self.is_up, self._since = False, now.seconds
                for pending in self._receipts.values():
                    pending.has_asked = False
                self.calls.land_all()
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
            case CallsWithdrawn(numbers, freed, charged):
                self._withdraw(numbers, freed, charged)
            case EndConfirmed():
                return self._finish(self.wanted_end or EndReason.COMPLETED)
            case Tick():
                effects += self._time(now)
            case _:
                pass
        return effects + self._pay(now)

    def disclaimed(self, number: int) -> None:
        """Note that the provider says it does not know a call: it costs nothing, and no later receipt may charge it."""
        self.calls.disclaimed(number)
        if number < self._first_number:
            self._disclaimed.add(number)

    def _withdraw(self, numbers: tuple[int, ...], freed: frozenset[int], charged: frozenset[int]) -> None:
        """Take the provider at its word: what it freed has no price any more, what it does not know it may not charge.

        Its receipts without a cheque come again, signed anew.
        """
        for number in numbers:
            if number in freed:
                self.calls.freed(number)
            elif number not in charged:
                self.disclaimed(number)
        if freed:
            self._receipts.clear()

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
        self.calls.cheques_arrived(state.paid)
        lost = self.calls.forget_from(state.slice, state.position)
        effects: list[Effect] = [Forget(lost)] if lost else []
        unknown = self.calls.unknown()
        if unknown:
            effects.append(FetchOutputs(unknown))
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
            known.has_asked = known.leaves is not None
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
            calls = self.calls.at(receipt.slice, receipt.calls)
            missing = sum(call is None for call in calls)
            if missing and pending.leaves is None:
                # Answers may still be on their way behind the receipt: only then is it worth waiting for them.
                is_patient = self.calls.flying >= missing and now.seconds < pending.since + self._patience / 4
                if self.is_up and not pending.has_asked and not is_patient:
                    pending.has_asked = True
                    effects.append(AskLeaves(receipt.slice))
                return effects
            if pending.leaves is not None and self._lacks_outputs(pending, pending.leaves, calls, now):
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

    def _lacks_outputs(
        self, pending: _PendingReceipt, leaves: tuple[Leaf, ...], calls: list[BoughtCall | None], now: Now
    ) -> bool:
        """Say whether an answer is to come yet. Raises ProtocolViolation when one is charged and withheld for too long."""
        is_lacking = False
        for call, leaf in zip(calls, leaves, strict=True):
            own = self.calls.by_number.get(leaf.number) if call is None else None
            if own is None or own.is_answered or own.is_given_up:
                continue
            if own.is_denied and not own.is_held and now.seconds >= pending.since + self._patience / 2:
                raise ProtocolViolation(Reason.RECEIPT_MISMATCH, f"call {leaf.number} is charged and its answer is withheld")
            is_lacking = True
        return is_lacking

    def _learn(self, slice_number: int, leaves: tuple[Leaf, ...]) -> list[Effect]:
        pending = self._receipts.get(slice_number)
        if pending is None or pending.leaves is not None:
            return []
        if len(leaves) != pending.receipt.calls:
            raise ProtocolViolation(Reason.RECEIPT_MISMATCH, "the leaves are not as many as the receipt says")
        check_leaves(leaves, pending.receipt.root, pending.receipt.amount)
        wanted: list[tuple[int, bytes]] = []
        forgotten: list[Leaf] = []
        for leaf, known in zip(leaves, self.calls.at(slice_number, len(leaves)), strict=True):
            if known is not None:
                continue
            call = self.calls.by_number.get(leaf.number)
            if call is None:
                forgotten.append(leaf)
            elif call.input_hash != leaf.input_hash or call.amount != leaf.amount:
                raise ProtocolViolation(Reason.RECEIPT_MISMATCH, f"call {leaf.number} had another input or price")
            elif not (call.is_held or call.is_flying or call.is_given_up or call.is_denied):
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
        is_old = all(leaf.number < self._first_number and leaf.number not in self._disclaimed for leaf in leaves)
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
        self.paid, self._last_receipt = receipt.total, pending.document
        self._since = now.seconds
        self.calls.pay(receipt, leaves)
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
