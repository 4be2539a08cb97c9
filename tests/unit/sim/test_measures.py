"""Figures: intervals, distributions, joining the seeds, and what a result says of them."""

import math

import pytest

from p2pnode.sim.measures import MACHINE_MEASURES, MEASURES, Measures, Series, Share, Values, as_row, hops_formula, wilson


def test_wilsons_interval_is_the_published_one_and_sane_at_the_ends() -> None:
    # Newcombe 1998, table I: 81 of 263 and 15 of 148.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    low, high = wilson(5500, 5500)
    assert high == 1.0
    assert 0.999 < low < 1.0
    assert wilson(0, 0) == (0.0, 1.0)


def test_the_formula_of_hops_gives_the_values_of_the_issue() -> None:
    assert hops_formula(16, 16) == 1.0
    assert hops_formula(1000, 16) == pytest.approx(1 + math.log2(1000 / 16) / 5.33)
    assert hops_formula(10_000, 16) == pytest.approx(2.743, abs=1e-3)


def test_joining_seeds_adds_trials_values_and_series() -> None:
    one, other = Measures(), Measures()
    for measures, outcome in ((one, True), (one, False), (other, True), (other, True)):
        measures.get_success.add(outcome)
        measures.hops.add(2.0 if outcome else 4.0)
        measures.over_time("get_success").add(10.0, outcome)
    other.violations.append("a table is empty")
    other.recovery_seconds.add(40.0)
    total = Measures().join([one, other])
    figures = total.summary()
    assert figures["get_success"] == 0.75
    assert figures["gets"] == 4
    assert figures["hops"] == 2.5
    assert figures["recovery_seconds"] == 40.0
    assert figures["violations"] == 1
    assert total.over_time("get_success").points() == [(15.0, 0.75)]
    assert one.get_success.trials == 2, "the seeds' own figures stay"


def test_nothing_counted_gives_no_figure_instead_of_zero() -> None:
    figures = Measures().summary()
    assert "get_success" not in figures
    assert "recovery_seconds" not in figures
    assert math.isnan(Share().value)
    assert math.isnan(Values().quantile(0.5))
    assert math.isnan(Series().mean)


def test_every_figure_is_in_the_catalogue_and_the_row_is_plain_data() -> None:
    measures = Measures()
    for name in measures.__slots__:
        value = getattr(measures, name)
        if isinstance(value, Share | Values):
            value.add(1)
    for name in ("table_accuracy", "sibling_accuracy", "offer_coverage"):
        measures.over_time(name).add(0.0, 1.0)
    assert set(measures.summary()) == set(MEASURES)
    assert set(MACHINE_MEASURES) <= set(MEASURES)
    row = as_row(measures)
    assert row["hops_histogram"] == {"1": 1}
    assert row["get_success_interval"][1] == 1.0


def test_a_quantile_is_a_value_that_occurred() -> None:
    values = Values([float(number) for number in range(100)])
    assert values.quantile(0.5) == 50.0
    assert values.quantile(0.95) == 95.0
    assert values.quantile(1.0) == 99.0
