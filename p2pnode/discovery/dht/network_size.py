"""How many servers the network has, estimated from this node's own lookups. Pure.

Ids are uniform, so the distance of the k-th nearest node to a random point is k parts of a whole divided by the number of
nodes. Only lookups for points that nobody else chose are used (random ids, for refresh), after the limits per network, and the
median of them: an attacker who crowds around one key must not shrink everybody's idea of its region. Around our own id the
table knows who is there now; what it knows counts half, since whoever wants to mislead this node in particular crowds there.
Lookups of our own id add nothing to that, and the first one is made when the network may still be small.
"""

from typing import Final

SAMPLES_MAX: Final = 16
HALF_LIFE_SECONDS: Final = 1200.0
OWN_ID_WEIGHT: Final = 0.5
_SPACE: Final = 1 << 256


class NetworkSize:
    """A weighted median over the latest lookups; newer ones weigh more. `estimate` counts this node too."""

    __slots__ = ("_samples",)

    def __init__(self) -> None:
        self._samples: list[tuple[float, float, float]] = []

    def note(self, distances: list[int], wanted: int, now: float) -> None:
        """A lookup for a random id found nodes at these distances, nearest first; it looked for `wanted`."""
        if distances:
            self._samples.append((now, size_from(distances, wanted), 1.0))
            del self._samples[:-SAMPLES_MAX]

    def estimate(self, siblings: list[int], wanted: int) -> float:
        """Give the number of nodes. siblings: distances of the nearest entries of the table, which count like one more lookup.

        Until lookups have ended they are all there is, and in a growing network they know it first.
        """
        samples = self._samples
        if siblings or not samples:
            samples = [*samples, (samples[-1][0] if samples else 0.0, size_from(siblings, wanted), OWN_ID_WEIGHT)]
        newest = samples[-1][0]
        weighted = sorted((size, weight * 0.5 ** (max(0.0, newest - at) / HALF_LIFE_SECONDS)) for at, size, weight in samples)
        half = sum(weight for _, weight in weighted) / 2
        passed = 0.0
        for position, (size, weight) in enumerate(weighted):
            passed += weight
            if passed > half * (1 + 1e-9):
                return size
            if passed >= half * (1 - 1e-9):
                return (size + weighted[min(position + 1, len(weighted) - 1)][0]) / 2
        return weighted[-1][0]


def size_from(distances: list[int], wanted: int) -> float:
    """Give the number of nodes, with the one that asks, that one list of nearest distances speaks for.

    Fewer than wanted are all there are. The median of the k-th distance is k - 1/3 parts (gamma distribution), which makes
    the median of many such numbers unbiased.
    """
    if len(distances) < wanted:
        return len(distances) + 1.0
    return max(wanted + 1.0, (wanted - 1 / 3) * _SPACE / max(1, distances[wanted - 1]))


def radius_for(count: float, size: float) -> int:
    """Give the distance within which `count` of `size` nodes are expected around any key."""
    return _SPACE - 1 if size <= count else int(count / size * 2**64) << 192
