"""The watchdog sees a loop that was late."""

import trio

from p2pnode.metrics import Metrics
from p2pnode.node.watchdog import Watchdog


class JumpyClock:
    """Says that the second sleep took 0.3 s longer than asked."""

    def __init__(self):
        self.readings = iter([0.0, 1.0, 1.0, 2.3, 2.3])

    def monotonic(self):
        return next(self.readings, 2.3)

    def wall_ms(self):
        return 0


async def test_a_late_loop_is_measured_and_told(autojump_clock, caplog):
    metrics = Metrics()
    watchdog = Watchdog(JumpyClock(), metrics)
    with trio.move_on_after(2.5), caplog.at_level("WARNING", logger="p2pnode"):
        await watchdog.run()
    assert 0.29 < watchdog.worst_seconds < 0.31
    assert metrics.snapshot()["loop_lag_seconds_count"] == 2
    assert "late by 300 ms" in caplog.text
