"""Cheques and the hash chain that they open, one preimage per slice.

The chain lets a slice's audits be drawn from a value that nobody but the client knows before the cheque, and ties every
cheque to its slice even when earlier ones were lost. Source: DECISIONS 8; Lamport 1981 (one-time passwords by hash chain).
"""

from p2pnode.crypto.hashing import tagged_hash
from p2pnode.errors import ProtocolViolation
from p2pnode.reasons import Reason
from p2pnode.wire.messages.market import Cheque, Receipt


def chain_step(value: bytes) -> bytes:
    """Give the value before this one on a chain: hashing goes towards the anchor."""
    return tagged_hash("chain", value)


class HashChain:
    """A client's chain: `value(0)` is the anchor in the order, `value(n + 1)` opens slice n.

    Holds every 64th value and computes the rest, so a chain of 4096 takes 2 KB and at most 64 hashes per cheque.
    """

    _STRIDE = 64

    def __init__(self, seed: bytes, length: int) -> None:
        self.length = length
        self._marks: dict[int, bytes] = {length: seed}
        value = seed
        for index in range(length - 1, -1, -1):
            value = chain_step(value)
            if index % self._STRIDE == 0:
                self._marks[index] = value

    def value(self, index: int) -> bytes:
        """Give value `index`, 0 to length. Raises ValueError beyond."""
        if not 0 <= index <= self.length:
            raise ValueError(f"the chain has {self.length} values, not {index}")
        mark = min(-(-index // self._STRIDE) * self._STRIDE, self.length)
        value = self._marks[mark]
        for _ in range(mark - index):
            value = chain_step(value)
        return value


def check_preimage(preimage: bytes, slice_number: int, tip: bytes, slices_paid: int) -> None:
    """Return if `preimage` opens this slice on the chain whose value number `slices_paid` is `tip`.

    Raises ProtocolViolation(CHEQUE_MISMATCH). The caller bounds slice_number by the receipts that it has signed.
    """
    value = preimage
    for _ in range(slice_number + 1 - slices_paid):
        value = chain_step(value)
    if slice_number < slices_paid or value != tip:
        raise ProtocolViolation(Reason.CHEQUE_MISMATCH, f"the preimage of slice {slice_number} does not fit the chain")


def check_cheque(cheque: Cheque, agreement_id: bytes, provider: bytes, receipt: Receipt, receipt_id: bytes) -> None:
    """Return if a cheque covers this receipt of this provider. Raises ProtocolViolation(CHEQUE_MISMATCH)."""
    if cheque.agreement != agreement_id or cheque.provider != provider:
        raise ProtocolViolation(Reason.CHEQUE_MISMATCH, "the cheque belongs to another agreement")
    if (cheque.slice, cheque.receipt, cheque.total) != (receipt.slice, receipt_id, receipt.total):
        raise ProtocolViolation(Reason.CHEQUE_MISMATCH, "the cheque does not cover the receipt")
