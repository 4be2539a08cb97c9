"""The calls of a bought agreement: which were made, answered, placed in a slice, and still count as unpaid.

The hot path of the client: plain methods without effects. Receipts and cheques are `bought_agreement`'s.
"""

from collections.abc import Sequence

import msgspec

from p2pnode.errors import ProtocolViolation, Refused
from p2pnode.reasons import Reason
from p2pnode.wire.messages.market import Leaf, Receipt


class BoughtCall(msgspec.Struct):
    """One call that this client made.

    is_flying: a reply may still come on this link. is_held: its output is not safe with the caller yet, so no cheque covers
    it. is_charged: the provider has said so; a later refusal does not change that. is_denied: the provider charges it and no
    longer has its answer; sending it again would help. is_given_up: the caller cancelled it, so it is paid without its answer
    if it was executed by then.
    """

    number: int
    input_hash: bytes
    amount: int
    slice: int = -1
    position: int = -1
    output_hash: bytes = b""
    is_flying: bool = True
    is_held: bool = False
    is_charged: bool = False
    is_denied: bool = False
    is_given_up: bool = False

    @property
    def is_answered(self) -> bool:
        """Whether this client holds an answer."""
        return self.position >= 0


class BoughtCalls:
    """Every call that no cheque covers yet, by number and by place. Amounts in micro-credits."""

    def __init__(self, slice_amount: int, slice_calls: int, chain_length: int, slices_paid: int) -> None:
        self.by_number: dict[int, BoughtCall] = {}
        self.outstanding = 0
        self.flying = 0
        self.slices_paid = slices_paid
        self._slice_amount = slice_amount
        self._slice_calls = slice_calls
        self._chain_length = chain_length
        self._places: dict[tuple[int, int], BoughtCall] = {}
        # Cheques issued but not sent yet, by slice: (total, amount, calls). The provider still counts those calls.
        self._unsent: dict[int, tuple[int, int, int]] = {}
        self._unsent_amount = self._unsent_calls = 0

    def is_held(self, number: int) -> bool:
        """Say whether a call's caller has still to say that its output is safe."""
        call = self.by_number.get(number)
        return call is not None and call.is_held

    def has_room(self, amount: int) -> bool:
        """Say whether one more call of this amount is within the slice now."""
        exposed = self.outstanding + self._unsent_amount + amount
        return exposed <= self._slice_amount and len(self.by_number) + self._unsent_calls < self._slice_calls

    def sent(self, number: int, input_hash: bytes, amount: int, is_held: bool = False) -> None:
        """Note that a call is about to be sent, or sent again. Raises Refused(CALL_MISMATCH) for another input."""
        call = self.by_number.get(number)
        if call is None:
            self.by_number[number] = BoughtCall(number, input_hash, amount, is_held=is_held)
            self.outstanding += amount
            self.flying += 1
            return
        if call.input_hash != input_hash:
            raise Refused(Reason.CALL_MISMATCH, f"call {number} had another input")
        call.is_held = is_held
        call.is_denied = call.is_given_up = False
        if not call.is_flying:
            call.is_flying = True
            self.flying += 1

    def recall(self, number: int, input_hash: bytes, amount: int) -> None:
        """Note a call from before a restart whose output its caller lacks: no cheque covers it before the caller decides."""
        self.by_number[number] = BoughtCall(number, input_hash, amount, is_flying=False, is_held=True)
        self.outstanding += amount

    def fetching(self, number: int) -> None:
        """Note that a call's answer is being asked for again."""
        call = self.by_number.get(number)
        if call is not None and not call.is_flying:
            call.is_flying = True
            self.flying += 1

    def answered(self, number: int, slice_number: int, position: int, output_hash: bytes, amount: int) -> None:
        """Note a call's answer and its place. Raises ProtocolViolation(RECEIPT_MISMATCH) for a wrong amount or place."""
        call = self.by_number.get(number)
        if call is None:
            return  # paid in the meantime, or given up with the link
        if amount != call.amount:
            raise ProtocolViolation(Reason.RECEIPT_MISMATCH, f"call {number} was charged {amount} instead of {call.amount}")
        other = self._places.setdefault((slice_number, position), call)
        if other is not call or slice_number < self.slices_paid or slice_number >= self._chain_length:
            raise ProtocolViolation(Reason.RECEIPT_MISMATCH, f"call {number} has no place of its own")
        if call.is_answered and (call.slice, call.position) != (slice_number, position):
            raise ProtocolViolation(Reason.RECEIPT_MISMATCH, f"call {number} changed its place")
        call.slice, call.position, call.output_hash = slice_number, position, output_hash
        self._land(call)

    def disclaimed(self, number: int) -> None:
        """Note that the provider does not know a call (any more): it costs nothing."""
        call = self.by_number.get(number)
        if call is not None:
            call.is_charged = False
            self.failed(number)

    def failed(self, number: int) -> None:
        """Note that the provider refused a call: it costs nothing, unless it was executed and charged before."""
        call = self.by_number.get(number)
        if call is None:
            return
        self._land(call)
        call.is_denied = call.is_charged and not call.is_answered
        if not (call.is_answered or call.is_charged):
            del self.by_number[number]
            self.outstanding -= call.amount

    def gone(self, number: int) -> None:
        """Note that the provider charges a call and no longer has its answer."""
        call = self.by_number.get(number)
        if call is not None:
            self._land(call)
            call.is_charged = True
            call.is_denied = not call.is_answered

    def give_up(self, number: int) -> None:
        """Note that the caller cancelled a call: whether it was executed by then is open."""
        call = self.by_number.get(number)
        if call is not None:
            self._land(call)
            call.is_given_up, call.is_held = True, False

    def hold(self, number: int) -> bool:
        """Take a call that was given up back, as long as it is open: no cheque covers it before its caller decides again."""
        call = self.by_number.get(number)
        if call is None:
            return False
        call.is_held, call.is_given_up = True, False
        return True

    def freed(self, number: int) -> None:
        """Note that the provider charges nothing for a call: it keeps its place in a slice, without a price."""
        call = self.by_number.get(number)
        if call is not None:
            self.outstanding -= call.amount
            call.amount, call.is_given_up, call.is_held = 0, True, False

    def lost(self, number: int) -> None:
        """Note that a call's fate is unknown because its link is lost: the provider may have executed it."""
        call = self.by_number.get(number)
        if call is not None:
            self._land(call)

    def confirmed(self, number: int) -> None:
        """Note that the caller holds a call's output safely."""
        call = self.by_number.get(number)
        if call is not None:
            call.is_held = False

    def cheque_sent(self, slice_number: int) -> None:
        """Note that a slice's cheque is on its way: what it covers no longer counts as unpaid."""
        _, amount, calls = self._unsent.pop(slice_number, (0, 0, 0))
        self._unsent_amount -= amount
        self._unsent_calls -= calls

    def _land(self, call: BoughtCall) -> None:
        if call.is_flying:
            call.is_flying = False
            self.flying -= 1

    def land_all(self) -> None:
        """Note that no reply will come any more on this link."""
        for call in self.by_number.values():
            self._land(call)

    def at(self, slice_number: int, count: int) -> list[BoughtCall | None]:
        """Give the calls known at the first `count` places of a slice."""
        return [self._places.get((slice_number, position)) for position in range(count)]

    def unknown(self) -> tuple[tuple[int, bytes], ...]:
        """Give (number, input hash) of calls whose fate has to be asked for."""
        calls = self.by_number.values()
        return tuple((call.number, call.input_hash) for call in calls if not (call.is_answered or call.is_flying or call.is_held))

    def forget_from(self, slice_number: int, position: int) -> tuple[int, ...]:
        """Forget answered calls at or beyond a place, because the provider lost them; gives their numbers."""
        lost = [
            call
            for call in self.by_number.values()
            if call.is_answered and (call.slice, call.position) >= (slice_number, position)
        ]
        for call in lost:
            del self.by_number[call.number]
            self.outstanding -= call.amount
            self._places.pop((call.slice, call.position), None)
        return tuple(call.number for call in lost)

    def cheques_arrived(self, total: int) -> None:
        """Note that the provider holds every cheque up to this total."""
        for number in [number for number, (covered, _, _) in self._unsent.items() if covered <= total]:
            self.cheque_sent(number)

    def pay(self, receipt: Receipt, leaves: Sequence[Leaf]) -> None:
        """Take a slice's calls out: a cheque for them is being issued."""
        self.slices_paid = receipt.slice + 1
        self._unsent[receipt.slice] = (receipt.total, receipt.amount, receipt.calls)
        self._unsent_amount += receipt.amount
        self._unsent_calls += receipt.calls
        for position, leaf in enumerate(leaves):
            self._places.pop((receipt.slice, position), None)
            call = self.by_number.pop(leaf.number, None)
            if call is not None:
                self._land(call)
                self.outstanding -= call.amount
