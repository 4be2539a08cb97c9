"""Agreements: counters move by one step, receipts and cheques count once."""

from dataclasses import replace

import pytest

from p2pnode.errors import LedgerError
from p2pnode.ids import DOCUMENT, id_text
from p2pnode.store import agreements
from p2pnode.store.agreements import AgreementRow, CallRow, ChequeRow, ReceiptRow
from p2pnode.store.database import memory

ORDER = b"o" * 32


@pytest.fixture
def connection():
    connection = memory()
    agreements.save_agreement(connection, agreement())
    yield connection
    connection.close()


def agreement(identifier=ORDER, **changes):
    row = AgreementRow(
        id=identifier, role="client", peer=b"p" * 32, model_id=b"m" * 32, quote=b"q" * 32, job=b"j" * 32, state="ordered",
        amount_max=1000, slice_amount=100, chain_anchor=b"a" * 32, chain_length=50, chain_seed=b"s" * 32, opened_ms=5,
        deadline_ms=900, chain_tip=b"a" * 32,
    )  # fmt: skip
    return replace(row, **changes)


def receipt(number, amount, total):
    return ReceiptRow(ORDER, number, bytes([number + 1]) * 32, 2, b"r" * 32, 10, amount, total, "cpu", 9)


def cheque(number, total):
    return ChequeRow(ORDER, number, bytes([number + 100]) * 32, bytes([number + 1]) * 32, total, bytes([number]) * 32, 10)


def call(number, state="answered", slice_number=0):
    return CallRow(ORDER, number, slice_number, number, b"i" * 32, b"o" * 32 if state != "sent" else b"", b"", 5, state)


def test_an_agreement_is_kept_once_and_found(connection):
    assert not agreements.save_agreement(connection, agreement(amount_max=7))
    assert agreements.get_agreement(connection, ORDER) == agreement()
    assert agreements.find_agreements(connection, id_text(DOCUMENT, ORDER)[:10]) == [agreement()]
    agreements.save_agreement(connection, agreement(b"x" * 32, role="provider", job=None, opened_ms=6, chain_seed=None))
    assert [row.id for row in agreements.list_agreements(connection)] == [b"x" * 32, ORDER]
    assert [row.id for row in agreements.list_agreements(connection, role="client", peer=b"p" * 32, is_ended=False)] == [ORDER]
    assert agreements.list_agreements(connection, job=b"j" * 32, is_ended=True) == []


def test_the_first_end_reason_stays(connection):
    agreements.set_agreement_state(connection, ORDER, "open")
    assert agreements.end_agreement(connection, ORDER, "completed", 20)
    assert not agreements.end_agreement(connection, ORDER, "unpaid", 30)
    agreements.set_agreement_state(connection, ORDER, "open")
    row = agreements.get_agreement(connection, ORDER)
    assert (row.state, row.end_reason, row.ended_ms) == ("ended", "completed", 20)


def test_call_numbers_are_never_handed_out_twice(connection):
    assert agreements.take_call_numbers(connection, ORDER, 64) == 0
    assert agreements.take_call_numbers(connection, ORDER, 1) == 64
    with pytest.raises(LedgerError):
        agreements.take_call_numbers(connection, b"x" * 32, 1)


def test_calls_become_the_leaves_of_their_receipt(connection):
    agreements.save_calls(connection, [call(0, "sent"), call(1), call(2, slice_number=1)])
    agreements.save_calls(connection, [call(0)])
    assert [row.number for row in agreements.list_calls(connection, ORDER, state="answered")] == [0, 1, 2]
    agreements.save_receipt(connection, receipt(0, 10, 10))
    assert [row.state for row in agreements.list_calls(connection, ORDER, slice_number=0)] == ["receipted", "receipted"]
    assert agreements.get_call(connection, ORDER, 2).state == "answered"
    assert agreements.get_call(connection, ORDER, 3) is None


def test_receipts_and_cheques_move_the_totals_once(connection):
    assert agreements.save_receipt(connection, receipt(0, 60, 60))
    assert not agreements.save_receipt(connection, receipt(0, 60, 60))
    assert agreements.save_receipt(connection, receipt(1, 40, 100))
    assert agreements.get_agreement(connection, ORDER).unpaid == 100
    assert agreements.save_cheque(connection, cheque(0, 60)) == 60
    assert agreements.save_cheque(connection, cheque(0, 60)) == 0
    assert agreements.save_cheque(connection, cheque(1, 100)) == 40
    row = agreements.get_agreement(connection, ORDER)
    assert (row.total, row.paid, row.slices, row.slices_paid, row.chain_tip) == (100, 100, 2, 2, bytes([1]) * 32)
    assert [r.slice for r in agreements.list_receipts(connection, ORDER)] == [1, 0]
    assert [c.slice for c in agreements.list_cheques(connection)] == [1, 0]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (receipt(1, 5, 65), "two different receipts|does not follow"),
        (receipt(3, 5, 105), "does not follow"),
        (receipt(2, 5, 104), "does not follow"),
        (receipt(2, 950, 1050), "largest amount"),
        (cheque(1, 100), "does not follow"),
        (cheque(0, 59), "does not match"),
        (replace(cheque(0, 60), receipt=b"z" * 32), "does not match"),
    ],
)
def test_what_does_not_follow_is_refused(connection, row, complaint):
    agreements.save_receipt(connection, receipt(0, 60, 60))
    agreements.save_receipt(connection, receipt(1, 40, 100))
    save = agreements.save_receipt if isinstance(row, ReceiptRow) else agreements.save_cheque
    with pytest.raises(LedgerError, match=complaint):
        save(connection, row)
    assert agreements.get_agreement(connection, ORDER).total == 100


def test_a_second_cheque_that_differs_is_refused(connection):
    agreements.save_receipt(connection, receipt(0, 60, 60))
    agreements.save_cheque(connection, cheque(0, 60))
    with pytest.raises(LedgerError, match="two different cheques"):
        agreements.save_cheque(connection, replace(cheque(0, 60), preimage=b"y" * 32))
