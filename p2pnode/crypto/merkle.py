"""Merkle trees over blake3: one 32-byte root commits to a list, and a short path proves one entry of it.

The shape and the prefixes are RFC 6962's (section 2.1), with blake3 in place of SHA-256: leaves are hashed with a byte 0
before them and nodes with a byte 1, so that no node passes for a leaf. The root of n > 1 leaves joins the root of the
first k with that of the rest, k the largest power of two below n.
"""

from collections.abc import Sequence
from typing import Final

from blake3 import blake3

from p2pnode.environment import Buffer

_LEAF: Final = b"\x00"
_NODE: Final = b"\x01"
# A path over 2^64 leaves has 64 hashes.
PATH_LENGTH_MAX: Final = 64


def leaf_hash(leaf: Buffer) -> bytes:
    """Give the hash of a leaf; it may be a view of a large chunk."""
    hasher = blake3(_LEAF)
    hasher.update(leaf)
    return hasher.digest()


def root(leaves: Sequence[Buffer]) -> bytes:
    """Give the root over leaves; of no leaves, the hash of nothing."""
    return root_of_hashes([leaf_hash(leaf) for leaf in leaves])


def root_of_hashes(hashes: Sequence[bytes]) -> bytes:
    """Give the root over leaves that are already hashed with `leaf_hash`."""
    if not hashes:
        return blake3().digest()
    # Joining neighbours level by level, an odd last one going up as it is, gives RFC 6962's shape without recursion.
    level = list(hashes)
    while len(level) > 1:
        level = _level_above(level)
    return level[0]


def path(leaves: Sequence[Buffer], index: int) -> tuple[bytes, ...]:
    """Give the hashes that prove leaf `index`, from the leaf's level upwards. Raises IndexError outside the leaves."""
    return path_of_hashes([leaf_hash(leaf) for leaf in leaves], index)


def path_of_hashes(hashes: Sequence[bytes], index: int) -> tuple[bytes, ...]:
    """Give the path as `path` does, over leaves that are already hashed."""
    if not 0 <= index < len(hashes):
        raise IndexError(f"leaf {index} of {len(hashes)}")
    steps = []
    level = list(hashes)
    while len(level) > 1:
        neighbour = index ^ 1
        if neighbour < len(level):
            steps.append(level[neighbour])
        level = _level_above(level)
        index >>= 1
    return tuple(steps)


def verify_path(root: bytes, leaf: Buffer, index: int, count: int, path: Sequence[bytes]) -> bool:
    """Say whether `path` proves that `leaf` is entry `index` of `count` under `root`. Never raises on a peer's path."""
    return verify_hash_path(root, leaf_hash(leaf), index, count, path)


def verify_hash_path(root: bytes, hashed_leaf: bytes, index: int, count: int, path: Sequence[bytes]) -> bool:
    """Say the same as `verify_path` for a leaf that is already hashed."""
    if not 0 <= index < count or len(path) > PATH_LENGTH_MAX:
        return False
    current, last, used = hashed_leaf, count - 1, 0
    while last > 0:
        neighbour = index ^ 1
        if neighbour <= last:
            if used == len(path):
                return False
            step = path[used]
            used += 1
            current = _join(step, current) if index & 1 else _join(current, step)
        index >>= 1
        last >>= 1
    return used == len(path) and current == root


def _level_above(level: list[bytes]) -> list[bytes]:
    above = [_join(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
    if len(level) % 2:
        above.append(level[-1])
    return above


def _join(left: bytes, right: bytes) -> bytes:
    return blake3(_NODE + left + right).digest()
