"""The provider's side of one agreement as a pure machine: credit, slices, receipts, cheques, the end.

Promise: executed but unpaid value, running calls included, never exceeds the order's `slice_amount`, and the number of
such calls never exceeds `slice_calls`. A receipt is due at half of either, or at half of `slice_ms`, so that calls go on
while it travels. `admit`, `executed` and `failed` are the hot path and plain methods; everything else is an event.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Final

import msgspec

from p2pnode.crypto.hashing import document_hash
from p2pnode.errors import ProtocolViolation, Refused
from p2pnode.market.agreements import (
    AnswerWithdrawal,
    ChequeArrived,
    Effect,
    EndAsked,
    Event,
    Finished,
    Forget,
    LinkDown,
    LinkUp,
    Now,
    Phase,
    ReceiptRefused,
    ReplaceReceipts,
    SaveCheque,
    SaveReceipt,
    SendReceipt,
    Terms,
    Tick,
)  # fmt: skip
from p2pnode.market.cheques import check_cheque, check_preimage
from p2pnode.market.slices import slice_root
from p2pnode.reasons import EndReason, Reason
from p2pnode.wire.codec import encode
from p2pnode.wire.messages.market import AgreementState, Cheque, Leaf, Receipt

_PAID_NUMBERS_MAX: Final = 16_384


class SoldCall(msgspec.Struct):
    """One call from admission to cheque. position is -1 while it runs; runs counts executions, the first included."""

    number: int
    input_hash: bytes
    amount: int
    slice: int = 0
    position: int = -1
    runs: int = 1
    output_hash: bytes = b""


@dataclass(slots=True)
class SignedSlice:
    """A receipt without a cheque, and what stands behind it."""

    receipt: Receipt
    document: bytes
    leaves: tuple[Leaf, ...]


@dataclass(slots=True)
class SoldProgress:
    """What survives a restart: read from the store, empty for a new agreement.

    tip: value number `slices_paid` of the client's chain (the anchor at first). unpaid: slices without cheque, in order.
    """

    total: int = 0
    slices: int = 0
    paid: int = 0
    slices_paid: int = 0
    tip: bytes = b""
    last_receipt: bytes = b""
    unpaid: Sequence[SignedSlice] = ()
    paid_numbers: Sequence[int] = ()


@dataclass(slots=True)
class _OpenSlice:
    number: int
    leaves: list[Leaf] = field(default_factory=list)
    amount: int = 0
    operations: int = 0
    engine: str = ""
    started_ms: int = 0
    started: float = 0.0


class SoldAgreement:
    """A provider's agreement. cheque_seconds: patience for a cheque; away_seconds: patience for a lost client."""

    def __init__(
        self, terms: Terms, now: Now, cheque_seconds: float, away_seconds: float, progress: SoldProgress | None = None
    ) -> None:
        progress = progress or SoldProgress()
        self.terms = terms
        self.phase = Phase.OPEN
        self.end_reason: EndReason | None = None
        self.total = progress.total
        self.paid = progress.paid
        self.slices_paid = progress.slices_paid
        self.calls: dict[int, SoldCall] = {}
        self.unpaid: dict[int, SignedSlice] = {}
        self.wanted_end: EndReason | None = None
        self._tip = progress.tip or terms.order.chain_anchor
        self._last_receipt = progress.last_receipt
        self._open = _OpenSlice(progress.slices)
        self._early: dict[int, Cheque] = {}
        self._running_amount = 0
        self._running = 0
        self._unpaid_calls = 0
        self._is_up = False
        self._paid_numbers: deque[int] = deque()
        self._paid_set: set[int] = set()
        self._paid_floor = 0
        self._cheque_seconds = cheque_seconds
        self._away_seconds = away_seconds
        self._waits_since = now.seconds
        self._ends_at = now.seconds + (terms.order.deadline_ms - now.wall_ms) / 1000
        order = terms.order
        self._half_amount = order.slice_amount // 2
        self._half_calls = max(1, order.slice_calls // 2)
        self._half_seconds = order.slice_ms / 2000
        self._restore(progress)

    def _restore(self, progress: SoldProgress) -> None:
        self._remember_paid(sorted(progress.paid_numbers))
        for signed in progress.unpaid:
            self.unpaid[signed.receipt.slice] = signed
            self._unpaid_calls += signed.receipt.calls
            for position, leaf in enumerate(signed.leaves):
                call = SoldCall(leaf.number, leaf.input_hash, leaf.amount, signed.receipt.slice, position)
                call.output_hash = leaf.output_hash
                self.calls[leaf.number] = call

    @property
    def exposure(self) -> int:
        """Micro-credits executed or running that no cheque covers."""
        return self._running_amount + self._open.amount + self.total - self.paid

    @property
    def exposed_calls(self) -> int:
        """Calls executed or running that no cheque covers."""
        return self._running + len(self._open.leaves) + self._unpaid_calls

    @property
    def is_due(self) -> bool:
        """Whether the open slice has reached half of its count or amount (time is seen by `handle(Tick())`)."""
        leaves = self._open.leaves
        if not leaves:
            return False
        if self.phase is not Phase.OPEN or len(leaves) >= self._half_calls:
            return True
        return self._open.amount >= self._half_amount and self._open.amount > 0

    def admit(self, number: int, input_hash: bytes, amount: int) -> SoldCall | None:
        """Take a new call's amount into the exposure and give None, or give the call that has this number already.

        Raises Refused: CALL_MISMATCH (same number, other input), ALREADY_USED (paid), AGREEMENT_ENDED, BUDGET, CREDIT.
        """
        known = self.calls.get(number)
        if known is not None:
            if known.input_hash != input_hash:
                raise Refused(Reason.CALL_MISMATCH, f"call {number} has another input")
            return known
        if number < self._paid_floor or number in self._paid_set:
            raise Refused(Reason.ALREADY_USED, f"call {number} is paid for and its answer was given")
        if self.phase is not Phase.OPEN:
            raise Refused(Reason.AGREEMENT_ENDED, self.end_reason.value if self.end_reason else self.phase.value)
        order = self.terms.order
        if self._open.number >= order.chain_length:
            raise Refused(Reason.AGREEMENT_ENDED, "every slice of the hash chain is used: place a new order")
        exposure = self._running_amount + self._open.amount + self.total - self.paid + amount
        if self.paid + exposure > self.terms.amount_max:
            raise Refused(Reason.BUDGET, f"the agreement is limited to {self.terms.amount_max} micro-credits")
        if exposure > order.slice_amount or self._running + len(self._open.leaves) + self._unpaid_calls >= order.slice_calls:
            raise Refused(Reason.CREDIT, "a cheque is needed first")
        self.calls[number] = SoldCall(number, input_hash, amount)
        self._running_amount += amount
        self._running += 1
        return None

    def executed(self, number: int, output_hash: bytes, operations: int, engine: str, now: Now) -> SoldCall:
        """Put an executed call into the open slice and give it with its place.

        A call that ran again keeps its place and is not charged again; its new output hash replaces the old one while the
        slice is unsigned. Raises Refused(WRONG_HASH) when a signed call gives another output this time.
        """
        call = self.calls[number]
        opened = self._open
        if call.position >= 0:
            if call.output_hash != output_hash:
                if call.slice != opened.number:
                    raise Refused(Reason.WRONG_HASH, f"call {number} gives another output than its receipt says")
                opened.leaves[call.position] = Leaf(number, call.input_hash, output_hash, b"", call.amount)
                call.output_hash = output_hash
            return call
        if not opened.leaves:
            opened.started_ms, opened.started = now.wall_ms, now.seconds
        call.slice, call.position, call.output_hash = opened.number, len(opened.leaves), output_hash
        opened.leaves.append(Leaf(number, call.input_hash, output_hash, b"", call.amount))
        opened.amount += call.amount
        opened.operations += operations
        opened.engine = engine
        self._running_amount -= call.amount
        self._running -= 1
        return call

    def failed(self, number: int) -> None:
        """Forget a call that gave no answer: it costs nothing. A call that was executed before stays."""
        call = self.calls.get(number)
        if call is not None and call.position < 0:
            del self.calls[number]
            self._running_amount -= call.amount
            self._running -= 1

    def withdraw(self, numbers: Iterable[int], room: int) -> list[Effect]:
        """Charge nothing for these calls, as far as `room` micro-credits go: their client never got the answers.

        A receipt without a cheque binds nobody, so those that charge them are signed anew: the same calls at the same places,
        the freed ones with amount 0. Calls that are paid stay paid; unknown ones were never charged.
        """
        freed: list[int] = []
        charged: list[int] = []
        amount, slices = 0, set[int]()
        for number in dict.fromkeys(numbers):
            call = self.calls.get(number)
            if call is None or call.position < 0:
                if number < self._paid_floor or number in self._paid_set:
                    charged.append(number)
            elif call.amount > room - amount or self.phase is Phase.ENDED:
                charged.append(number)
            else:
                freed.append(number)
                amount += call.amount
                if call.amount:
                    slices.add(call.slice)
                    self._free(call)
        effects: list[Effect] = []
        if slices:
            effects.append(ReplaceReceipts(self._sign_again(slices), amount))
        effects.append(AnswerWithdrawal(tuple(freed), tuple(charged)))
        if self._is_up and freed:
            effects += [SendReceipt(number) for number in self.unpaid]
        return effects

    def _free(self, call: SoldCall) -> None:
        leaf = Leaf(call.number, call.input_hash, call.output_hash, b"", 0)
        if call.slice == self._open.number:
            self._open.leaves[call.position] = leaf
            self._open.amount -= call.amount
        else:
            leaves = self.unpaid[call.slice].leaves
            self.unpaid[call.slice].leaves = (*leaves[: call.position], leaf, *leaves[call.position + 1 :])
        call.amount = 0

    def _sign_again(self, slices: set[int]) -> tuple[SaveReceipt, ...]:
        """Make the receipts of these slices, and all that follow one, from their leaves as they are now."""
        again: list[SaveReceipt] = []
        for number, signed in self.unpaid.items():
            if number < min(slices):
                continue
            if not again:
                self.total, self._last_receipt = signed.receipt.total - signed.receipt.amount, signed.receipt.previous
            amount = sum(leaf.amount for leaf in signed.leaves)
            self.total += amount
            signed.receipt = msgspec.structs.replace(
                signed.receipt, root=slice_root(signed.leaves), amount=amount, total=self.total, previous=self._last_receipt
            )
            signed.document = self._last_receipt = document_hash(encode(signed.receipt))
            self._early.pop(number, None)
            again.append(SaveReceipt(signed.receipt, signed.document, signed.leaves))
        return tuple(again)

    @property
    def deadline(self) -> float:
        """When `handle(Tick())` is due next, seconds on the node's clock."""
        if self.phase is Phase.ENDED:
            return inf
        times = [self._ends_at] if self.phase is Phase.OPEN else []
        if self._open.leaves:
            times.append(-inf if self.is_due else self._open.started + self._half_seconds)
        if self.unpaid or self.phase is Phase.CLOSING:
            times.append(self._waits_since + self._patience)
        return min(times, default=inf)

    @property
    def _patience(self) -> float:
        return self._cheque_seconds if self._is_up else self._away_seconds

    @property
    def state(self) -> AgreementState:
        """Where this side stands, for a client that resumes."""
        ended = self.end_reason.value if self.phase is Phase.ENDED and self.end_reason else ""
        opened = self._open
        return AgreementState(self.terms.agreement_id, opened.number, len(opened.leaves), self.total, self.paid, ended)

    def handle(self, event: Event, now: Now) -> list[Effect]:
        """Give what to do about an event. Raises ProtocolViolation(CHEQUE_MISMATCH) for a false cheque, changing nothing."""
        effects: list[Effect] = []
        if self.phase is Phase.ENDED and not isinstance(event, ChequeArrived):
            return effects
        match event:
            case ChequeArrived(cheque):
                effects += self._take(cheque, now)
            case LinkUp():
                self._is_up, self._waits_since = True, now.seconds
                effects += [SendReceipt(number) for number in self.unpaid]
            case LinkDown():
                self._is_up, self._waits_since = False, now.seconds
            case ReceiptRefused():
                effects += self._finish(EndReason.MISMATCH)
            case EndAsked(reason) if self.phase is Phase.OPEN:
                self._close(reason, now)
            case Tick() if self.phase is Phase.OPEN and now.seconds >= self._ends_at:
                self._close(EndReason.EXPIRED, now)
            case _:
                pass
        return effects + self._advance(now)

    def _close(self, reason: EndReason, now: Now) -> None:
        self.phase, self.wanted_end, self._waits_since = Phase.CLOSING, reason, now.seconds

    def _advance(self, now: Now) -> list[Effect]:
        if self.phase is Phase.ENDED:
            return []
        effects: list[Effect] = []
        opened = self._open
        if opened.leaves and (self.is_due or now.seconds >= opened.started + self._half_seconds):
            effects += self._sign(now)
        overdue = now.seconds >= self._waits_since + self._patience
        if self.unpaid and overdue:
            effects += self._finish(EndReason.UNPAID if self._is_up else EndReason.PEER_LOST)
        elif self.phase is Phase.CLOSING and not self.unpaid and (not self._running or overdue):
            effects += self._finish(self.wanted_end or EndReason.COMPLETED)
        return effects

    def _sign(self, now: Now) -> list[Effect]:
        opened = self._open
        self.total += opened.amount
        receipt = Receipt(
            agreement=self.terms.agreement_id,
            slice=opened.number,
            calls=len(opened.leaves),
            root=slice_root(opened.leaves),
            operations=opened.operations,
            amount=opened.amount,
            total=self.total,
            engine=opened.engine,
            numeric_class=self.terms.order.numeric_class,
            started_ms=opened.started_ms,
            ended_ms=max(now.wall_ms, opened.started_ms),
            previous=self._last_receipt,
        )
        document = document_hash(encode(receipt))
        if not self.unpaid:
            self._waits_since = now.seconds
        signed = SignedSlice(receipt, document, tuple(opened.leaves))
        self.unpaid[opened.number] = signed
        self._unpaid_calls += len(opened.leaves)
        self._last_receipt = document
        self._open = _OpenSlice(opened.number + 1)
        effects: list[Effect] = [SaveReceipt(receipt, document, signed.leaves)]
        if self._is_up:
            effects.append(SendReceipt(receipt.slice))
        return effects

    def _take(self, cheque: Cheque, now: Now) -> list[Effect]:
        if cheque.slice < self.slices_paid and cheque.total <= self.paid:
            return []  # a copy of a cheque that we hold, or an older one: harmless
        signed = self.unpaid.get(cheque.slice)
        if signed is None:
            raise ProtocolViolation(Reason.CHEQUE_MISMATCH, f"slice {cheque.slice} has no open receipt")
        check_cheque(cheque, self.terms.agreement_id, self.terms.provider, signed.receipt, signed.document)
        check_preimage(cheque.preimage, cheque.slice, self._tip, self.slices_paid)
        # Cheques count in order, so that the books show one per slice; one that overtook another waits for it.
        self._early[cheque.slice] = cheque
        effects: list[Effect] = []
        while (following := self._early.pop(self.slices_paid, None)) is not None:
            effects += self._settle(following, now)
        if self._early:
            effects.append(SendReceipt(self.slices_paid))
        return effects

    def _settle(self, cheque: Cheque, now: Now) -> list[Effect]:
        signed = self.unpaid.pop(cheque.slice)
        self._unpaid_calls -= signed.receipt.calls
        amount = cheque.total - self.paid
        self.paid, self.slices_paid, self._tip = cheque.total, cheque.slice + 1, cheque.preimage
        self._waits_since = now.seconds
        numbers = tuple(leaf.number for leaf in signed.leaves)
        for number in numbers:
            self.calls.pop(number, None)
        self._remember_paid(numbers)
        return [SaveCheque(cheque, amount), Forget(numbers)]

    def _remember_paid(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            if len(self._paid_numbers) >= _PAID_NUMBERS_MAX:
                oldest = self._paid_numbers.popleft()
                self._paid_set.discard(oldest)
                self._paid_floor = max(self._paid_floor, oldest + 1)
            self._paid_numbers.append(number)
            self._paid_set.add(number)

    def _finish(self, reason: EndReason) -> list[Effect]:
        self.phase, self.end_reason = Phase.ENDED, reason
        return [Finished(reason, self.total - self.paid)]
