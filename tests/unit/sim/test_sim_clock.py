"""Virtual time: it jumps, it stands still, and it orders what it wakes."""

import math

import trio

from p2pnode.sim.clock import EPOCH_MS, SimClock, TrioClock


def test_sleeping_costs_no_time_and_wakes_in_order() -> None:
    woken = []

    async def sleeper(seconds: float) -> None:
        await trio.sleep(seconds)
        woken.append((seconds, trio.current_time()))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for seconds in (86_400.0, 1.0, 3600.0):
                nursery.start_soon(sleeper, seconds)

    trio.run(main, clock=SimClock())
    assert woken == [(1.0, 1.0), (3600.0, 3600.0), (86_400.0, 86_400.0)]


def test_time_stands_still_while_tasks_run() -> None:
    async def main() -> None:
        for _ in range(1000):
            await trio.lowlevel.checkpoint()
        assert trio.current_time() == 0.0

    trio.run(main, clock=SimClock())


def test_without_a_deadline_it_really_waits() -> None:
    clock = SimClock()
    assert clock.deadline_to_sleep_time(math.inf) == math.inf
    assert clock.current_time() == 0.0


def test_time_never_goes_back() -> None:
    clock = SimClock()
    assert clock.deadline_to_sleep_time(5.0) == 0.0
    assert clock.deadline_to_sleep_time(3.0) == 0.0
    assert clock.current_time() == 5.0


def test_the_environments_clock_has_a_wall_and_a_skew() -> None:
    async def main() -> None:
        clock = TrioClock(skew_ms=250)
        await trio.sleep(1.5)
        assert clock.monotonic() == 1.5
        assert clock.wall_ms() == EPOCH_MS + 1750

    trio.run(main, clock=SimClock())


def test_steps_are_never_too_short_and_what_falls_into_one_happens_together() -> None:
    clock = SimClock(grain_seconds=0.002)
    happened = []
    for number in range(1, 1000):
        moment = number * 0.0007
        clock.call_at(moment, lambda moment=moment: happened.append((moment, clock.current_time())))
    while clock.pending:
        before = clock.pending
        assert clock.deadline_to_sleep_time(math.inf) == 0.0
        assert clock.pending < before
    assert [moment for moment, _ in happened] == sorted(moment for moment, _ in happened)
    assert all(0 <= now - moment < 0.002 + 1e-9 for moment, now in happened)
    for number in range(1000):
        deadline = clock.current_time() + 0.0001 * (number + 1)
        clock.deadline_to_sleep_time(deadline)
        assert clock.current_time() >= deadline


def test_planned_actions_run_in_order_of_time_and_then_of_their_keys() -> None:
    clock = SimClock()
    happened = []
    for when, key in ((2.0, 5), (1.0, 9), (1.0, 3)):
        clock.call_at(when, lambda key=key: happened.append(key), key)
    assert clock.deadline_to_sleep_time(1.5) == 0.0
    assert (happened, clock.current_time()) == ([3, 9], 1.0)
    assert clock.deadline_to_sleep_time(1.5) == 0.0
    assert (happened, clock.current_time()) == ([3, 9], 1.5)
    assert clock.deadline_to_sleep_time(math.inf) == 0.0
    assert happened == [3, 9, 5]
