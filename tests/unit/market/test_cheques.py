import pytest

from p2pnode.errors import ProtocolViolation
from p2pnode.market.cheques import HashChain, chain_step, check_cheque, check_preimage
from p2pnode.reasons import Reason
from p2pnode.wire.messages.market import Cheque, Receipt

AGREEMENT, PROVIDER, RECEIPT_ID = b"a" * 32, b"p" * 32, b"r" * 32


def test_a_chain_leads_from_every_value_to_its_anchor() -> None:
    chain = HashChain(b"s" * 32, 200)
    value = b"s" * 32
    for index in range(200, -1, -1):
        assert chain.value(index) == value
        value = chain_step(value)
    with pytest.raises(ValueError, match="200 values"):
        chain.value(201)


def test_a_preimage_opens_its_own_slice_only() -> None:
    chain = HashChain(b"s" * 32, 50)
    check_preimage(chain.value(1), 0, chain.value(0), 0)
    check_preimage(chain.value(7), 6, chain.value(3), 3)
    for preimage, slice_number in ((chain.value(2), 0), (chain.value(1), 1), (b"x" * 32, 0)):
        with pytest.raises(ProtocolViolation) as violation:
            check_preimage(preimage, slice_number, chain.value(0), 0)
        assert violation.value.reason is Reason.CHEQUE_MISMATCH
    with pytest.raises(ProtocolViolation):
        check_preimage(chain.value(2), 1, chain.value(5), 5)


def receipt(total: int = 50) -> Receipt:
    return Receipt(AGREEMENT, 3, 2, b"m" * 32, 1, 20, total, "cpu", "fast", 1, 2, b"")


@pytest.mark.parametrize(
    "change",
    [
        {"agreement": b"x" * 32}, {"provider": b"x" * 32}, {"slice": 4}, {"total": 49}, {"total": 51}, {"receipt": b"x" * 32},
    ],
    ids=str,
)  # fmt: skip
def test_a_cheque_has_to_cover_exactly_its_receipt(change: dict) -> None:
    right = {
        "agreement": AGREEMENT, "provider": PROVIDER, "slice": 3, "receipt": RECEIPT_ID, "total": 50, "preimage": bytes(32),
        "issued_ms": 1,
    }  # fmt: skip
    check_cheque(Cheque(**right), AGREEMENT, PROVIDER, receipt(), RECEIPT_ID)
    with pytest.raises(ProtocolViolation):
        check_cheque(Cheque(**(right | change)), AGREEMENT, PROVIDER, receipt(), RECEIPT_ID)
