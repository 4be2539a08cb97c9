"""Sees when the event loop is late: a handler that computes for 100 ms makes every peer wait 100 ms.

One timer a second, so that an idle node stays idle; a stall is seen when the timer that it delayed fires.
"""

import logging
from typing import Final

import trio

from p2pnode.environment import Clock
from p2pnode.metrics import Metrics

EVERY_SECONDS: Final = 1.0
WARN_SECONDS: Final = 0.1
_log = logging.getLogger(__name__)


class Watchdog:
    """Measures the loop's lag. worst_seconds: the largest so far."""

    def __init__(
        self, clock: Clock, metrics: Metrics, every_seconds: float = EVERY_SECONDS, warn_seconds: float = WARN_SECONDS
    ) -> None:
        self._clock = clock
        self._metrics = metrics
        self._every = every_seconds
        self._warn = warn_seconds
        self.worst_seconds = 0.0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watch until cancelled."""
        task_status.started()
        while True:
            before = self._clock.monotonic()
            await trio.sleep(self._every)
            lag = max(0.0, self._clock.monotonic() - before - self._every)
            self._metrics.observe("loop_lag_seconds", lag)
            self.worst_seconds = max(self.worst_seconds, lag)
            if lag >= self._warn:
                _log.warning("the event loop was late by %.0f ms", lag * 1000, extra={"lag_seconds": round(lag, 3)})
