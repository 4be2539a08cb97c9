"""Seeded draws: the distributions of sessions, and that one purpose does not disturb another."""

import statistics

import pytest

from p2pnode.sim.chance import exponential, seeded, weibull


def test_draws_depend_on_the_seed_and_the_purpose_alone() -> None:
    first = [seeded(3, "churn").random() for _ in range(3)]
    seeded(3, "other").random()
    assert first == [seeded(3, "churn").random() for _ in range(3)]
    assert seeded(3, "churn").random() != seeded(4, "churn").random()
    assert seeded(3, "churn").random() != seeded(3, "faults").random()


def test_both_models_of_sessions_have_the_mean_that_was_asked_for() -> None:
    chance = seeded(1, "sessions")
    assert statistics.fmean(exponential(chance, 60.0) for _ in range(20_000)) == pytest.approx(60.0, rel=0.03)
    lengths = [weibull(chance, 60.0, 0.5) for _ in range(60_000)]
    assert statistics.fmean(lengths) == pytest.approx(60.0, rel=0.05)
    assert statistics.median(lengths) == pytest.approx(60 / 2 * 0.4805, rel=0.05), "most sessions are short: ln(2)^2 of the scale"
