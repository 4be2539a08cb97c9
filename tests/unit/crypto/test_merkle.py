"""Merkle roots and paths."""

import pytest
from blake3 import blake3

from p2pnode.crypto.merkle import leaf_hash, path, path_of_hashes, root, root_of_hashes, verify_path

LEAVES = [bytes([i]) * (i + 1) for i in range(9)]


def textbook_root(leaves: list[bytes]) -> bytes:
    """RFC 6962 section 2.1, word for word, with blake3."""
    if not leaves:
        return blake3(b"").digest()
    if len(leaves) == 1:
        return blake3(b"\x00" + leaves[0]).digest()
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    return blake3(b"\x01" + textbook_root(leaves[:split]) + textbook_root(leaves[split:])).digest()


def textbook_path(leaves: list[bytes], index: int) -> list[bytes]:
    """RFC 6962 section 2.1.1."""
    if len(leaves) == 1:
        return []
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    if index < split:
        return [*textbook_path(leaves[:split], index), textbook_root(leaves[split:])]
    return [*textbook_path(leaves[split:], index - split), textbook_root(leaves[:split])]


@pytest.mark.parametrize("count", range(10))
def test_root_is_rfc_6962s(count: int) -> None:
    assert root(LEAVES[:count]) == textbook_root(LEAVES[:count])
    assert root_of_hashes([leaf_hash(leaf) for leaf in LEAVES[:count]]) == root(LEAVES[:count])


@pytest.mark.parametrize("count", range(1, 10))
def test_every_leaf_has_a_path_that_proves_it_and_nothing_else(count: int) -> None:
    leaves = LEAVES[:count]
    top = root(leaves)
    for index, leaf in enumerate(leaves):
        steps = path(leaves, index)
        assert list(steps) == textbook_path(leaves, index)
        assert path_of_hashes([leaf_hash(each) for each in leaves], index) == steps
        assert verify_path(top, leaf, index, count, steps)
        assert not verify_path(top, leaf + b"x", index, count, steps)
        assert not verify_path(bytes(32), leaf, index, count, steps)
        assert not verify_path(top, leaf, index, count, (*steps, bytes(32)))
        if steps:
            assert not verify_path(top, leaf, index, count, steps[:-1])
        for other in range(count):
            assert other == index or not verify_path(top, leaf, other, count, steps)


def test_a_node_does_not_pass_for_a_leaf() -> None:
    node = leaf_hash(LEAVES[0]) + leaf_hash(LEAVES[1])
    assert root([node]) != root(LEAVES[:2])


@pytest.mark.parametrize(("index", "count"), [(-1, 3), (3, 3), (0, 0), (0, -1), (2**70, 2**71)])
def test_impossible_places_prove_nothing(index: int, count: int) -> None:
    assert not verify_path(root(LEAVES[:3]), LEAVES[0], index, count, [bytes(32)] * 70)


def test_path_outside_the_leaves() -> None:
    with pytest.raises(IndexError):
        path(LEAVES, len(LEAVES))


def test_a_leaf_may_be_a_view() -> None:
    assert leaf_hash(memoryview(bytearray(b"chunk"))) == leaf_hash(b"chunk")
