"""When a second copy of a slow call is worth its price: at median + k x MAD of this model's own latencies.

MAD (median absolute deviation) ignores the stragglers that a standard deviation would let dominate. Each model has its own
window, because a fixed timeout is wrong for every model but one.
"""

from collections import deque
from statistics import median

from p2pnode.jobs.settings import JobSettings


class Latencies:
    """The last latencies of one model, seconds, at all providers or at one."""

    def __init__(self, settings: JobSettings) -> None:
        self._settings = settings
        self._samples: deque[float] = deque(maxlen=settings.hedge_samples_max)

    def add(self, seconds: float) -> None:
        """Take one completed call."""
        self._samples.append(seconds)

    @property
    def median_seconds(self) -> float | None:
        """The median, or None before the first sample."""
        return median(self._samples) if self._samples else None

    def hedge_after_seconds(self) -> float | None:
        """Give how long a call may take before a second copy is sent, or None while too little is known
        or the owner wants no copies."""
        if not self._settings.hedging or len(self._samples) < self._settings.hedge_samples_min:
            return None
        middle = median(self._samples)
        deviation = median(abs(sample - middle) for sample in self._samples)
        # Equal latencies give a deviation near zero; a tenth of the median keeps jitter from counting as lateness.
        deviation = max(deviation, middle / 10)
        return max(middle + self._settings.hedge_deviations * deviation, self._settings.hedge_seconds_min)
