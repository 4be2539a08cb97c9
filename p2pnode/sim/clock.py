"""Virtual time: a trio clock that jumps to whatever is next, and its environment twin.

What a simulated network has under way stands in one heap beside trio's own deadlines. trio asks its clock how long to sleep
only when no task can run, so that is the moment to jump, and to deliver: one delivery costs a heap entry and the wake-up of
its receiver, not a task, a timer and a cancelled scope (a quarter of the time).
"""

import heapq
import math
from collections.abc import Callable

import trio

# An arbitrary fixed day, so that documents made in a simulation are the same in every run: 2026-01-01 UTC.
EPOCH_MS = 1_767_225_600_000


class SimClock(trio.abc.Clock):
    """Pass it to `trio.run(..., clock=SimClock())`. Time stands still while anything can run.

    With nothing due and no deadline it really waits: only a thread or a socket could wake the run then, and a simulation has
    neither. grain_seconds: time moves in steps of this size, and what falls within one step happens at its end, in order; each
    step costs one turn of trio's loop, so that a thousand nodes are simulated twice as fast at 2 ms. 0: no steps.
    """

    def __init__(self, grain_seconds: float = 0.0) -> None:
        self._now = 0.0
        self._grain = grain_seconds
        # (when, key, action): the key orders what is due at the same moment, so it must be unique and the same in every run.
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._next_key = 0

    def start_clock(self) -> None:
        """Nothing to start: virtual time begins at 0."""

    def current_time(self) -> float:
        """Seconds since the start of the simulation."""
        return self._now

    @property
    def pending(self) -> int:
        """How many actions are planned."""
        return len(self._due)

    def call_at(self, when: float, action: Callable[[], None], key: int | None = None) -> None:
        """Run a plain function at a time, between tasks. It may reschedule tasks and start them, and must not raise.

        key: orders actions of one moment; unique among those of the same moment. Without one, in the order of the calls.
        """
        if key is None:
            self._next_key -= 1
            key = self._next_key
        heapq.heappush(self._due, (when, key, action))

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Jump to what comes first, the deadline or a planned action, and give no time to sleep."""
        due = self._due
        first = min(due[0][0], deadline) if due else deadline
        if math.isinf(first):
            return first
        if self._grain:
            # Rounding may fall short of the moment by its last bit; then it would never come.
            first = max(first, math.ceil(first / self._grain) * self._grain)
        self._now = now = max(self._now, first)
        while due and due[0][0] <= now:
            heapq.heappop(due)[2]()
        return 0.0


class TrioClock:
    """`environment.Clock` of a simulated machine: trio's time, and a wall clock that starts at `EPOCH_MS` plus its skew.

    skew_ms: how far the wall clock is ahead; it may change while the machine runs, as a real one's does. monotonic: trio's time,
    or that of the simulation's clock asked directly, which nodes do a thousand times a minute.
    """

    def __init__(self, skew_ms: int = 0, monotonic: Callable[[], float] = trio.current_time) -> None:
        self.skew_ms = skew_ms
        self._monotonic = monotonic

    def monotonic(self) -> float:
        """Seconds on trio's clock."""
        return self._monotonic()

    def wall_ms(self) -> int:
        """Unix time in milliseconds."""
        return EPOCH_MS + self.skew_ms + round(self._monotonic() * 1000)
