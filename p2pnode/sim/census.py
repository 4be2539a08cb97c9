"""Who is really there: the true nearest nodes to a point, and the table that a node would have after a long calm.

The ids are sorted once, so the nearest k lie in one short stretch around the target: all that share a prefix with it. A table's
buckets are such stretches too. 100 000 nodes cost a bisection, not a scan.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from heapq import nsmallest
from typing import Final

from p2pnode.sim.chance import Random

ID_BITS: Final = 256


class Census:
    """The ids of all live servers as whole numbers, and whose they are."""

    def __init__(self) -> None:
        self._sorted: list[int] = []
        self._index: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._sorted)

    def enter(self, node_id: bytes, index: int) -> None:
        """Add a node that came up."""
        number = int.from_bytes(node_id, "big")
        if number not in self._index:
            insort(self._sorted, number)
            self._index[number] = index

    def strike(self, node_id: bytes) -> None:
        """Remove a node that went down. Does nothing for one that is not there."""
        number = int.from_bytes(node_id, "big")
        if self._index.pop(number, None) is not None:
            del self._sorted[bisect_left(self._sorted, number)]

    def refill(self, nodes: Iterable[tuple[bytes, int]]) -> None:
        """Start again with these nodes; cheaper than entering thousands one by one."""
        self._index = {int.from_bytes(node_id, "big"): index for node_id, index in nodes}
        self._sorted = sorted(self._index)

    def holds(self, node_id: bytes) -> bool:
        """Say whether a node is a live server."""
        return int.from_bytes(node_id, "big") in self._index

    def closest(self, target: bytes, count: int) -> list[bytes]:
        """Give the ids truly nearest to a target by XOR, nearest first."""
        point = int.from_bytes(target, "big")
        low, high = self._stretch(point, count)
        return [number.to_bytes(32, "big") for number in nsmallest(count, self._sorted[low:high], key=point.__xor__)]

    def perfect_table(self, node_id: bytes, bucket_size: int, siblings: int, chance: Random) -> list[int]:
        """Give the indices of the nodes that a settled table holds: its k nearest, and k at random of every farther bucket."""
        own = int.from_bytes(node_id, "big")
        low, high = self._stretch(own, siblings + 1)
        near = [number for number in nsmallest(siblings + 1, self._sorted[low:high], key=own.__xor__) if number != own]
        entries = dict.fromkeys(near[:siblings])
        low, high = 0, len(self._sorted)
        for bit in range(ID_BITS - 1, -1, -1):
            if high - low <= 1:
                break
            # low to high share every bit above this one with us; the half that differs in it is one bucket.
            middle = bisect_left(self._sorted, ((own >> bit) | 1) << bit, low, high)
            other = range(low, middle) if own >> bit & 1 else range(middle, high)
            low, high = (middle, high) if own >> bit & 1 else (low, middle)
            chosen = other if len(other) <= bucket_size else chance.sample(other, bucket_size)
            entries.update(dict.fromkeys(self._sorted[place] for place in chosen))
        return [self._index[number] for number in entries]

    def _stretch(self, point: int, count: int) -> tuple[int, int]:
        """Give the narrowest range of all ids with one prefix around a point that has at least `count` members."""
        total = len(self._sorted)
        if count >= total:
            return 0, total
        bits = max(0, ID_BITS - max(0, (total // max(1, count)).bit_length() + 3))
        while True:
            start = (point >> bits) << bits
            low = bisect_left(self._sorted, start)
            high = bisect_left(self._sorted, start + (1 << bits), low)
            if high - low >= count or bits >= ID_BITS:
                return low, high
            bits += 1
