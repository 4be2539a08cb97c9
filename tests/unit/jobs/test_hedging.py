"""Hedging: no copy while little is known, then at median + k x MAD, whatever the stragglers did."""

import pytest

from p2pnode.jobs.hedging import Latencies
from p2pnode.jobs.settings import JobSettings


def filled(values, **settings):
    latencies = Latencies(JobSettings(**settings))
    for value in values:
        latencies.add(value)
    return latencies


def test_nothing_is_hedged_before_enough_samples():
    assert filled([1.0] * 7).hedge_after_seconds() is None
    assert filled([1.0] * 8).hedge_after_seconds() is not None


def test_median_and_mad():
    # median 5; deviations 4 3 2 1 0 1 2 3 4 -> MAD 2
    assert filled([1, 2, 3, 4, 5, 6, 7, 8, 9]).hedge_after_seconds() == pytest.approx(5 + 6 * 2)


def test_a_straggler_does_not_move_the_threshold():
    calm = filled([1.0] * 20).hedge_after_seconds()
    assert filled([1.0] * 19 + [1000.0]).hedge_after_seconds() == pytest.approx(calm)


def test_equal_latencies_still_leave_room_for_jitter():
    assert filled([1.0] * 10).hedge_after_seconds() == pytest.approx(1.6)
    assert filled([0.001] * 10).hedge_after_seconds() == 0.2


def test_the_window_forgets():
    latencies = filled([10.0] * 8 + [1.0] * 8, hedge_samples_max=8)
    assert latencies.median_seconds == 1.0


def test_the_owner_can_switch_copies_off():
    assert filled([1.0] * 20, hedging=False).hedge_after_seconds() is None
