"""Virtual time: a trio clock that jumps to the next deadline as soon as no task can run, and its environment twin."""

import math

import trio

# An arbitrary fixed day, so that documents made in a simulation are the same in every run: 2026-01-01 UTC.
EPOCH_MS = 1_767_225_600_000


class SimClock(trio.abc.Clock):
    """Pass it to `trio.run(..., clock=SimClock())`. Time stands still while anything can run.

    trio asks for the time to sleep only when nothing is runnable, so that is the moment to jump. With no deadline at all it
    really waits: only a thread or a socket could wake the run then, and a simulation has neither.
    """

    def __init__(self) -> None:
        self._now = 0.0

    def start_clock(self) -> None:
        """Nothing to start: virtual time begins at 0."""

    def current_time(self) -> float:
        """Seconds since the start of the simulation."""
        return self._now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Jump to the deadline and give no time to sleep."""
        if math.isinf(deadline):
            return deadline
        self._now = max(self._now, deadline)
        return 0.0


class TrioClock:
    """`environment.Clock` of a simulated machine: trio's time, and a wall clock that starts at `EPOCH_MS` plus its skew."""

    def __init__(self, skew_ms: int = 0) -> None:
        self.skew_ms = skew_ms

    def monotonic(self) -> float:
        """Seconds on trio's clock."""
        return trio.current_time()

    def wall_ms(self) -> int:
        """Unix time in milliseconds."""
        return EPOCH_MS + self.skew_ms + round(trio.current_time() * 1000)
