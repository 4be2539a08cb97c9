"""The budget: spent and reserved together never pass the limit, whatever the order of events."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pnode.errors import LedgerError
from p2pnode.jobs.budget import Budget


def test_a_reservation_that_does_not_fit_changes_nothing():
    budget = Budget(100, spent=40)
    assert budget.reserve("a", 60)
    assert not budget.reserve("b", 1)
    assert (budget.free, budget.reserved) == (0, 60)


def test_settling_frees_what_was_not_used():
    budget = Budget(100)
    budget.reserve("a", 80)
    budget.settle("a", 30)
    assert (budget.spent, budget.reserved, budget.free) == (30, 0, 70)


def test_nobody_is_charged_more_than_was_reserved():
    budget = Budget(100)
    budget.reserve("a", 10)
    with pytest.raises(LedgerError):
        budget.settle("a", 11)
    with pytest.raises(LedgerError):
        budget.settle("b", 0)
    assert budget.reserved_for("a") == 10


def test_after_a_crash_reservations_count_as_spent():
    budget = Budget(100, spent=20, reserved={b"x": 70})
    assert budget.free == 10
    assert budget.holders() == [b"x"]
    assert not budget.reserve(b"y", 11)


def test_a_reservation_changes_hands():
    budget = Budget(100)
    holder = object()
    budget.reserve(holder, 60)
    budget.rename(holder, b"agreement")
    assert budget.reserved_for(b"agreement") == 60
    with pytest.raises(LedgerError):
        budget.reserve(b"agreement", 1)


def test_without_a_limit_everything_fits():
    budget = Budget(None)
    assert budget.reserve("a", 10**15)
    assert budget.free is None


@given(st.integers(0, 1000), st.lists(st.tuples(st.integers(0, 5), st.sampled_from("rsx"), st.integers(0, 400))))
def test_the_limit_holds_in_every_order(limit, steps):
    budget = Budget(limit)
    for holder, action, amount in steps:
        if action == "r" and not budget.reserved_for(holder):
            try:
                budget.reserve(holder, amount)
            except LedgerError:
                budget.settle(holder, 0)
        elif action == "s" and budget.reserved_for(holder):
            budget.settle(holder, min(amount, budget.reserved_for(holder)))
        elif action == "x":
            budget.release(holder)
        assert budget.spent + budget.reserved <= limit
        assert budget.free == limit - budget.spent - budget.reserved
