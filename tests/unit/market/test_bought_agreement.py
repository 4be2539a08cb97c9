"""The client's machine as a table: what it pays for, and every lie it does not pay for."""

import pytest

from p2pnode.crypto.hashing import document_hash
from p2pnode.errors import ProtocolViolation, Refused
from p2pnode.market.agreements import (
    AskLeaves,
    EndAsked,
    EndConfirmed,
    FetchOutputs,
    Finished,
    Forget,
    LeavesArrived,
    LinkDown,
    LinkUp,
    Now,
    ReceiptArrived,
    SaveCheque,
    SaveReceipt,
    SendCheque,
    SendEnd,
    StateArrived,
    Terms,
    Tick,
)
from p2pnode.market.bought_agreement import BoughtAgreement, BoughtProgress
from p2pnode.market.cheques import HashChain
from p2pnode.market.slices import slice_root
from p2pnode.reasons import EndReason, Reason
from p2pnode.wire.codec import encode
from p2pnode.wire.messages.market import AgreementState, Leaf, Order, Quote, Receipt

CHAIN = HashChain(b"s" * 32, 3)
PROVIDER = b"p" * 32
NOW = Now(0.0, 0)


def machine(progress: BoughtProgress | None = None, pays_forgotten: bool = True, amount_max: int = 1000) -> BoughtAgreement:
    quote = Quote(b"c" * 32, bytes(32), b"m" * 32, "fast", (), 1, 1, 0, 10, 1, 100, 10**12, bytes(16))
    order = Order(
        bytes(32), PROVIDER, b"m" * 32, "fast", amount_max, 1_000_000, 0, 0, 8, 20_000, 100, CHAIN.value(0), 3, b"", True,
        False, 10**12, bytes(16),
    )  # fmt: skip
    terms = Terms(b"a" * 32, PROVIDER, b"c" * 32, b"P" * 32, b"C" * 32, order, quote, 0, amount_max)
    bought = BoughtAgreement(terms, CHAIN, NOW, 30.0, 3600.0, pays_forgotten=pays_forgotten, progress=progress)
    bought.handle(LinkUp(), NOW)
    return bought


def leaf(number: int, amount: int = 10) -> Leaf:
    return Leaf(number, bytes([number]) * 32, bytes([100 + number]) * 32, b"", amount)


def call(bought: BoughtAgreement, number: int, position: int | None, slice_number: int = 0, **options) -> None:
    bought.calls.sent(number, leaf(number).input_hash, 10, **options)
    if position is not None:
        bought.calls.answered(number, slice_number, position, leaf(number).output_hash, 10)


def receipt(leaves: list[Leaf], **changes) -> ReceiptArrived:
    fields = {
        "agreement": b"a" * 32, "slice": 0, "calls": len(leaves), "root": slice_root(leaves), "operations": 1,
        "amount": sum(item.amount for item in leaves), "total": sum(item.amount for item in leaves), "engine": "cpu",
        "numeric_class": "fast", "started_ms": 1, "ended_ms": 2, "previous": b"",
    }  # fmt: skip
    document = Receipt(**(fields | changes))
    return ReceiptArrived(document, document_hash(encode(document)))


def test_a_right_receipt_is_paid_and_saved_before_it_is_sent() -> None:
    bought = machine()
    call(bought, 1, 0)
    call(bought, 2, 1)
    effects = bought.handle(receipt([leaf(1), leaf(2)]), NOW)
    assert [type(effect) for effect in effects] == [SaveReceipt, SaveCheque, SendCheque]
    cheque = effects[1].cheque
    assert (cheque.total, cheque.slice, cheque.preimage) == (20, 0, CHAIN.value(1))
    assert bought.calls.outstanding == 0
    assert bought.handle(receipt([leaf(1), leaf(2)]), NOW) == [SendCheque(0)], "the same receipt gets the same cheque"


@pytest.mark.parametrize(
    "lie",
    [
        receipt([leaf(1), leaf(2, 11)]),
        receipt([leaf(1), leaf(1)]),
        receipt([leaf(2), leaf(1)]),
        receipt([leaf(1), leaf(2)], root=b"x" * 32),
        receipt([leaf(1), leaf(2)], amount=21, total=21),
        receipt([leaf(1), leaf(2)], total=21),
        receipt([leaf(1), leaf(2)], previous=b"x" * 32),
        receipt([leaf(1), leaf(2)], agreement=b"x" * 32),
        receipt([leaf(1), leaf(2)], numeric_class="exact"),
        receipt([leaf(1), leaf(2)], calls=9),
        receipt([leaf(1), leaf(2)], amount=101, total=101),
    ],
    ids=["price", "twice", "order", "root", "sum", "total", "previous", "agreement", "class", "calls", "slice"],
)
def test_a_false_receipt_is_never_paid(lie: ReceiptArrived) -> None:
    bought = machine()
    call(bought, 1, 0)
    call(bought, 2, 1)
    with pytest.raises(ProtocolViolation) as violation:
        bought.handle(lie, NOW)
    assert violation.value.reason is Reason.RECEIPT_MISMATCH
    assert bought.paid == 0


def test_a_wrong_charge_or_place_in_an_answer_is_noticed_at_once() -> None:
    bought = machine()
    call(bought, 1, 0)
    bought.calls.sent(2, leaf(2).input_hash, 10)
    for place in ((0, 0, 10), (0, 1, 11), (7, 1, 10)):
        with pytest.raises(ProtocolViolation):
            bought.calls.answered(2, place[0], place[1], b"o" * 32, place[2])


def test_a_call_that_was_never_made_is_not_paid() -> None:
    bought = machine()
    call(bought, 1, 0)
    assert bought.handle(receipt([leaf(1), leaf(9)]), NOW) == [AskLeaves(0)]
    with pytest.raises(ProtocolViolation, match="not made"):
        bought.handle(LeavesArrived(0, (leaf(1), leaf(9))), NOW)


def test_an_answer_on_its_way_is_waited_for() -> None:
    bought = machine()
    call(bought, 1, 0)
    call(bought, 2, None)
    assert bought.handle(receipt([leaf(1), leaf(2)]), NOW) == []
    bought.calls.answered(2, 0, 1, leaf(2).output_hash, 10)
    assert isinstance(bought.handle(Tick(), NOW)[-1], SendCheque)


def test_a_lost_answer_is_fetched_before_it_is_paid() -> None:
    bought = machine()
    call(bought, 1, 0)
    call(bought, 2, None)
    bought.calls.lost(2)
    assert bought.handle(receipt([leaf(1), leaf(2)]), NOW) == [AskLeaves(0)]
    wanted = bought.handle(LeavesArrived(0, (leaf(1), leaf(2))), NOW)
    assert wanted == [FetchOutputs(((2, leaf(2).input_hash),))]
    assert bought.handle(Tick(), NOW) == []
    bought.calls.answered(2, 0, 1, leaf(2).output_hash, 10)
    assert isinstance(bought.handle(Tick(), NOW)[-1], SendCheque)


def test_an_answer_charged_and_withheld_is_not_paid() -> None:
    bought = machine()
    call(bought, 1, None)
    bought.calls.lost(1)
    bought.handle(receipt([leaf(1)]), NOW)
    bought.handle(LeavesArrived(0, (leaf(1),)), NOW)
    bought.calls.gone(1)
    assert bought.handle(Tick(), Now(14.0, 0)) == [], "sending it again may still help"
    with pytest.raises(ProtocolViolation, match="withheld"):
        bought.handle(Tick(), Now(15.0, 0))


def test_a_held_output_is_not_paid_before_it_is_safe() -> None:
    bought = machine()
    call(bought, 1, 0, is_held=True)
    assert bought.handle(receipt([leaf(1)]), NOW) == []
    bought.calls.confirmed(1)
    assert isinstance(bought.handle(Tick(), NOW)[-1], SendCheque)


def test_a_cancelled_call_that_was_executed_is_paid_without_its_answer() -> None:
    bought = machine()
    call(bought, 1, None)
    bought.calls.give_up(1)
    bought.handle(receipt([leaf(1)]), NOW)
    assert isinstance(bought.handle(LeavesArrived(0, (leaf(1),)), NOW)[-1], SendCheque)


def test_forgotten_calls_are_paid_after_a_crash_and_only_up_to_one_slice() -> None:
    restart = BoughtProgress(first_number=50, is_restart=True)
    for pays, numbers, amount, is_paid in (
        (True, range(3), 10, True), (False, range(3), 10, False), (True, (60, 61), 10, False), (True, range(8), 13, False),
    ):  # fmt: skip
        bought = machine(restart, pays)
        leaves = [leaf(number, amount) for number in numbers]
        arrived = receipt(leaves)
        if arrived.receipt.amount > 100:
            with pytest.raises(ProtocolViolation):
                bought.handle(arrived, NOW)
            continue
        bought.handle(arrived, NOW)
        if is_paid:
            assert isinstance(bought.handle(LeavesArrived(0, tuple(leaves)), NOW)[-1], SendCheque)
        else:
            with pytest.raises(ProtocolViolation):
                bought.handle(LeavesArrived(0, tuple(leaves)), NOW)


def recalling(*numbers: int) -> BoughtAgreement:
    """A client that came back after a crash, with a map that lacks the outputs of these calls."""
    recalled = [(number, leaf(number).input_hash, 10) for number in numbers]
    return machine(BoughtProgress(first_number=50, is_restart=True, recalled=recalled))


def test_a_call_to_be_recalled_is_not_paid_before_it_is_decided_whatever_time_passes() -> None:
    bought = recalling(1, 2)
    assert bought.handle(receipt([leaf(0), leaf(1), leaf(2)]), NOW) == [AskLeaves(0)]
    # Call 0 is forgotten and may be paid; of 1 and 2 nobody has said yet what becomes of them.
    assert bought.handle(LeavesArrived(0, (leaf(0), leaf(1), leaf(2))), NOW) == []
    assert bought.handle(Tick(), Now(900.0, 0)) == []
    bought.calls.answered(1, 0, 1, leaf(1).output_hash, 10)
    bought.calls.confirmed(1)
    assert bought.handle(Tick(), Now(901.0, 0)) == []
    bought.calls.answered(2, 0, 2, leaf(2).output_hash, 10)
    assert bought.handle(Tick(), Now(902.0, 0)) == [], "its output is here and not yet safe"
    bought.calls.confirmed(2)
    assert isinstance(bought.handle(Tick(), Now(903.0, 0))[-1], SendCheque)
    assert bought.calls.outstanding == 0


def test_a_recalled_call_that_is_given_up_is_paid_as_its_leaf_says() -> None:
    bought = recalling(1)
    bought.handle(receipt([leaf(1)]), NOW)
    assert bought.handle(LeavesArrived(0, (leaf(1),)), NOW) == []
    bought.calls.give_up(1)
    assert isinstance(bought.handle(Tick(), NOW)[-1], SendCheque)


def test_what_a_provider_said_it_does_not_know_it_may_not_charge_later() -> None:
    bought = recalling(1)
    bought.disclaimed(1)
    assert bought.calls.outstanding == 0
    assert bought.handle(receipt([leaf(0), leaf(1)]), NOW) == [AskLeaves(0)]
    with pytest.raises(ProtocolViolation, match="not made"):
        bought.handle(LeavesArrived(0, (leaf(0), leaf(1))), NOW)


def test_a_charged_call_stays_charged_when_it_fails_the_second_time() -> None:
    bought = machine()
    call(bought, 1, None, is_held=True)
    bought.calls.gone(1)
    bought.calls.sent(1, leaf(1).input_hash, 10, True)
    bought.calls.failed(1)
    assert bought.calls.outstanding == 10
    bought.calls.disclaimed(1)
    assert bought.calls.outstanding == 0, "the provider lost it: nothing is charged any more"


def test_a_call_that_was_given_up_is_taken_back_only_while_it_is_open() -> None:
    bought = machine()
    call(bought, 1, None)
    bought.calls.give_up(1)
    assert bought.calls.hold(1)
    bought.handle(receipt([leaf(1)]), NOW)
    assert bought.handle(LeavesArrived(0, (leaf(1),)), NOW) == []
    bought.calls.give_up(1)
    assert isinstance(bought.handle(Tick(), NOW)[-1], SendCheque)
    assert not bought.calls.hold(1)


def test_pacing_counts_until_the_cheque_is_sent() -> None:
    bought = machine()
    for number in range(8):
        assert bought.may_send(10)
        call(bought, number, number)
    assert not bought.may_send(10)
    bought.handle(receipt([leaf(number) for number in range(8)]), NOW)
    assert not bought.may_send(10), "saved but not on its way"
    bought.calls.cheque_sent(0)
    assert bought.may_send(10)
    assert bought.may_send(100)
    with pytest.raises(Refused, match="credit"):
        bought.may_send(101)


def test_the_budget_is_a_hard_stop() -> None:
    bought = machine(amount_max=25)
    call(bought, 1, 0)
    call(bought, 2, 1)
    with pytest.raises(Refused) as refusal:
        bought.may_send(10)
    assert refusal.value.reason is Reason.BUDGET


def test_a_restarted_provider_loses_what_it_had_not_signed() -> None:
    bought = machine()
    call(bought, 1, 0)
    call(bought, 2, 1)
    call(bought, 3, None)
    bought.handle(LinkDown(), NOW)
    effects = bought.handle(StateArrived(AgreementState(b"a" * 32, 0, 1, 0, 0, "")), NOW)
    assert effects == [Forget((2,)), FetchOutputs(((3, leaf(3).input_hash),))]
    assert bought.calls.outstanding == 20


def test_the_end_is_asked_for_and_confirmed() -> None:
    bought = machine()
    call(bought, 1, 0)
    assert bought.handle(EndAsked(EndReason.COMPLETED), NOW) == [SendEnd(EndReason.COMPLETED)]
    with pytest.raises(Refused):
        bought.may_send(1)
    assert isinstance(bought.handle(receipt([leaf(1)]), NOW)[-1], SendCheque)
    assert bought.handle(EndConfirmed(), NOW) == [Finished(EndReason.COMPLETED, 0)]
    assert bought.handle(receipt([leaf(1)]), NOW) == [SendCheque(0)], "after the end the old cheque is given again"


def test_a_silent_provider_and_the_deadline_end_it_too() -> None:
    bought = machine()
    assert bought.handle(Tick(), Now(1000.0, 0)) == [SendEnd(EndReason.EXPIRED)]
    assert bought.handle(Tick(), Now(1030.0, 0)) == [Finished(EndReason.EXPIRED, 0)]
