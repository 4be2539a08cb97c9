"""The provider's machine as a table: credit, slices, cheques, the end."""

import pytest

from p2pnode.errors import ProtocolViolation, Refused
from p2pnode.market.agreements import (
    ChequeArrived,
    EndAsked,
    Finished,
    LinkDown,
    LinkUp,
    Now,
    Phase,
    ReceiptRefused,
    SaveCheque,
    SaveReceipt,
    SendReceipt,
    Terms,
    Tick,
)
from p2pnode.market.cheques import HashChain
from p2pnode.market.slices import slice_root
from p2pnode.market.sold_agreement import SoldAgreement
from p2pnode.reasons import EndReason, Reason
from p2pnode.wire.messages.market import Cheque, Order, Quote

CHAIN = HashChain(b"s" * 32, 3)
PROVIDER = b"p" * 32


def terms(**changes) -> Terms:
    quote = Quote(b"c" * 32, bytes(32), b"m" * 32, "fast", (), 1, 1, 0, 10, 1, 100, 10**12, bytes(16))
    fields = {
        "quote": bytes(32), "provider": PROVIDER, "model_id": b"m" * 32, "numeric_class": "fast", "amount_max": 1000,
        "deadline_ms": 1_000_000, "audit_ppm": 0, "auditors": 0, "slice_calls": 8, "slice_ms": 20_000, "slice_amount": 100,
        "chain_anchor": CHAIN.value(0), "chain_length": 3, "auditor_root": b"", "share_worker": True,
        "accept_tolerance": False, "expires_ms": 10**12, "nonce": bytes(16),
    }  # fmt: skip
    order = Order(**(fields | changes))
    return Terms(b"a" * 32, PROVIDER, b"c" * 32, b"P" * 32, b"C" * 32, order, quote, 0, order.amount_max)


def at(seconds: float) -> Now:
    return Now(seconds, int(seconds * 1000))


def machine(**changes) -> SoldAgreement:
    sold = SoldAgreement(terms(**changes), at(0), 30.0, 3600.0)
    sold.handle(LinkUp(), at(0))
    return sold


def run(sold: SoldAgreement, number: int, amount: int = 10, now: float = 0) -> None:
    assert sold.admit(number, bytes([number]) * 32, amount) is None
    sold.executed(number, b"o" * 32, 5, "cpu", at(now))


def refusal(sold: SoldAgreement, number: int, amount: int = 10, input_hash: bytes | None = None) -> Reason:
    with pytest.raises(Refused) as refused:
        sold.admit(number, input_hash or bytes([number]) * 32, amount)
    return refused.value.reason


def cheque_for(effects: list, **changes) -> Cheque:
    saved = next(effect for effect in effects if isinstance(effect, SaveReceipt))
    fields = {
        "agreement": b"a" * 32, "provider": PROVIDER, "slice": saved.receipt.slice, "receipt": saved.document,
        "total": saved.receipt.total, "preimage": CHAIN.value(saved.receipt.slice + 1), "issued_ms": 1,
    }  # fmt: skip
    return Cheque(**(fields | changes))


def test_running_calls_count_towards_the_slice() -> None:
    sold = machine()
    for number in range(2):
        sold.admit(number, bytes([number]) * 32, 45)
    assert refusal(sold, 3, 11) is Reason.CREDIT
    sold.failed(0)
    assert sold.admit(3, b"\3" * 32, 11) is None
    assert sold.exposure == 56


def test_the_number_of_unpaid_calls_is_bounded_for_free_work_too() -> None:
    sold = machine()
    for number in range(8):
        run(sold, number, 0)
    assert refusal(sold, 8, 0) is Reason.CREDIT


def test_a_receipt_at_half_a_slice_and_calls_go_on_meanwhile() -> None:
    sold = machine()
    for number in range(3):
        run(sold, number)
        assert not sold.is_due
    run(sold, 3)
    assert sold.is_due
    saved, sent = sold.handle(Tick(), at(0))
    assert isinstance(saved, SaveReceipt)
    assert sent == SendReceipt(0)
    receipt = saved.receipt
    assert (receipt.slice, receipt.calls, receipt.amount, receipt.total, receipt.operations) == (0, 4, 40, 40, 20)
    assert receipt.root == slice_root(saved.leaves)
    run(sold, 4)
    effects = sold.handle(ChequeArrived(cheque_for([saved])), at(1))
    assert isinstance(effects[0], SaveCheque)
    assert sold.exposure == 10


def test_half_of_the_amount_and_half_of_the_time_close_a_slice_too() -> None:
    sold = machine()
    run(sold, 0, 50)
    assert sold.is_due
    sold = machine()
    run(sold, 0, now=2)
    assert sold.deadline == 12
    assert sold.handle(Tick(), at(11.9)) == []
    assert isinstance(sold.handle(Tick(), at(12))[0], SaveReceipt)


def test_the_same_call_is_known_and_charged_once() -> None:
    sold = machine()
    run(sold, 1)
    known = sold.admit(1, b"\1" * 32, 10)
    assert known is not None
    assert refusal(sold, 1, input_hash=b"x" * 32) is Reason.CALL_MISMATCH
    sold.executed(1, b"o" * 32, 5, "cpu", at(0))
    assert sold.exposure == 10
    effects = sold.handle(EndAsked(EndReason.COMPLETED), at(0))
    sold.handle(ChequeArrived(cheque_for(effects)), at(0))
    assert refusal(sold, 1) is Reason.ALREADY_USED


def test_another_output_of_a_signed_call_is_not_passed_off() -> None:
    sold = machine()
    for number in range(4):
        run(sold, number)
    sold.executed(1, b"n" * 32, 5, "cpu", at(0))
    effects = sold.handle(Tick(), at(0))
    assert effects[0].leaves[1].output_hash == b"n" * 32
    with pytest.raises(Refused) as refused:
        sold.executed(1, b"z" * 32, 5, "cpu", at(0))
    assert refused.value.reason is Reason.WRONG_HASH


@pytest.mark.parametrize(
    "change",
    [{"total": 39}, {"total": 41}, {"slice": 1}, {"preimage": b"x" * 32}, {"preimage": CHAIN.value(2)},
     {"receipt": b"x" * 32}, {"provider": b"x" * 32}, {"agreement": b"x" * 32}],
    ids=str,
)  # fmt: skip
def test_a_false_cheque_changes_nothing(change: dict) -> None:
    sold = machine()
    for number in range(4):
        run(sold, number)
    effects = sold.handle(Tick(), at(0))
    with pytest.raises(ProtocolViolation) as violation:
        sold.handle(ChequeArrived(cheque_for(effects, **change)), at(0))
    assert violation.value.reason is Reason.CHEQUE_MISMATCH
    assert (sold.paid, sold.exposure) == (0, 40)
    sold.handle(ChequeArrived(cheque_for(effects)), at(0))
    assert sold.paid == 40


def test_a_replayed_cheque_is_harmless() -> None:
    sold = machine()
    for number in range(4):
        run(sold, number)
    cheque = cheque_for(sold.handle(Tick(), at(0)))
    sold.handle(ChequeArrived(cheque), at(0))
    assert sold.handle(ChequeArrived(cheque), at(0)) == []


def test_cheques_count_in_order() -> None:
    sold = machine()
    for number in range(4):
        run(sold, number)
    first = sold.handle(Tick(), at(0))
    for number in range(4, 8):
        run(sold, number)
    second = sold.handle(Tick(), at(0))
    assert sold.handle(ChequeArrived(cheque_for(second)), at(0)) == [SendReceipt(0)]
    effects = sold.handle(ChequeArrived(cheque_for(first)), at(0))
    assert [effect.cheque.slice for effect in effects if isinstance(effect, SaveCheque)] == [0, 1]
    assert sold.paid == sold.total == 80


def test_budget_chain_and_deadline_end_it() -> None:
    assert refusal(machine(amount_max=25), 0, 26) is Reason.BUDGET
    sold = machine(chain_length=1)
    for number in range(4):
        run(sold, number)
    sold.handle(Tick(), at(0))
    assert refusal(sold, 9) is Reason.AGREEMENT_ENDED
    sold = machine()
    assert sold.handle(Tick(), at(1000)) == [Finished(EndReason.EXPIRED, 0)]
    assert refusal(sold, 9) is Reason.AGREEMENT_ENDED


def test_the_end_waits_for_the_last_cheque() -> None:
    sold = machine()
    run(sold, 0)
    effects = sold.handle(EndAsked(EndReason.COMPLETED), at(0))
    assert [type(effect) for effect in effects] == [SaveReceipt, SendReceipt]
    assert sold.phase is Phase.CLOSING
    assert refusal(sold, 1) is Reason.AGREEMENT_ENDED
    assert sold.handle(ChequeArrived(cheque_for(effects)), at(1))[-1] == Finished(EndReason.COMPLETED, 0)


def test_patience_ends_unpaid_with_a_link_and_lost_without() -> None:
    for is_up, seconds, reason in ((True, 30, EndReason.UNPAID), (False, 3600, EndReason.PEER_LOST)):
        sold = machine(deadline_ms=10**8)
        for number in range(4):
            run(sold, number)
        sold.handle(Tick(), at(0))
        if not is_up:
            sold.handle(LinkDown(), at(0))
        assert sold.handle(Tick(), at(seconds - 1)) == []
        assert sold.handle(Tick(), at(seconds)) == [Finished(reason, 40)]


def test_a_refused_receipt_ends_it_as_a_mismatch() -> None:
    sold = machine()
    for number in range(4):
        run(sold, number)
    sold.handle(Tick(), at(0))
    assert sold.handle(ReceiptRefused(), at(1)) == [Finished(EndReason.MISMATCH, 40)]


def test_a_new_link_gets_every_unpaid_receipt_again() -> None:
    sold = machine()
    for number in range(4):
        run(sold, number)
    sold.handle(Tick(), at(0))
    sold.handle(LinkDown(), at(1))
    assert sold.handle(LinkUp(), at(2)) == [SendReceipt(0)]
