"""Slices: runs of calls whose leaves one Merkle root commits to."""

from collections.abc import Sequence

from p2pnode.crypto import merkle
from p2pnode.errors import ProtocolViolation
from p2pnode.reasons import Reason
from p2pnode.wire.codec import encode
from p2pnode.wire.messages.market import Leaf


def leaf_bytes(leaf: Leaf) -> bytes:
    """Give the bytes of a leaf as the tree commits to them."""
    return encode(leaf)


def slice_root(leaves: Sequence[Leaf]) -> bytes:
    """Give the Merkle root over a slice's leaves in order of position."""
    return merkle.root([encode(leaf) for leaf in leaves])


def leaf_path(leaves: Sequence[Leaf], position: int) -> tuple[bytes, ...]:
    """Give the hashes that prove a leaf's place under the root."""
    return merkle.path([encode(leaf) for leaf in leaves], position)


def check_leaves(leaves: Sequence[Leaf], root: bytes, amount: int) -> None:
    """Return if these leaves are what a receipt commits to. Raises ProtocolViolation(RECEIPT_MISMATCH)."""
    if not leaves or slice_root(leaves) != root:
        raise ProtocolViolation(Reason.RECEIPT_MISMATCH, "the root does not cover these calls")
    if sum(leaf.amount for leaf in leaves) != amount:
        raise ProtocolViolation(Reason.RECEIPT_MISMATCH, "the calls do not add up to the slice's amount")
    if len({leaf.number for leaf in leaves}) != len(leaves):
        raise ProtocolViolation(Reason.RECEIPT_MISMATCH, "a call is charged twice")
