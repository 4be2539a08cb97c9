import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pnode.errors import Refused
from p2pnode.market.pricing import CallPricer, call_amount, expected_microseconds, largest_amount, shapes_elements, work_price
from p2pnode.reasons import Reason
from p2pnode.wire.messages.market import InputShape, Quote
from p2pnode.wire.tensors import encode_values

SHAPES = (InputShape("x", (8, 100)), InputShape("y", (3,)))


def quote(operations=5 * 10**9, operations_price=1000, call_price=7, shapes=SHAPES) -> Quote:
    return Quote(
        bytes(32), bytes(32), bytes(32), "fast", shapes, operations, shapes_elements(shapes), operations_price, call_price, 1,
        10**9, 10**12, bytes(16),
    )  # fmt: skip


def headers(**values):
    return encode_values(values)[0]


def test_the_formula_of_the_quote() -> None:
    assert shapes_elements(SHAPES) == 803
    assert largest_amount(quote()) == 7 + 5000
    assert call_amount(quote(), 803 // 2) == 7 + -(-1000 * 5 * 401 // 803)
    assert call_amount(quote(operations=0), 803) == 7


@given(st.integers(0, 10**6), st.integers(0, 10**15), st.integers(0, 10**6), st.integers(1, 10**6))
def test_the_price_is_a_ceiling_and_never_beyond_the_largest(price: int, operations: int, part: int, whole: int) -> None:
    part = min(part, whole)
    exact_times_unit = price * operations * part
    given_price = work_price(price, operations, part, whole)
    assert (given_price - 1) * whole * 10**9 < exact_times_unit <= given_price * whole * 10**9
    assert given_price <= work_price(price, operations, whole, whole)


def test_a_model_without_input_elements_costs_its_whole_work() -> None:
    assert work_price(1000, 10**9, 0, 0) == 1000


def test_a_pricer_charges_by_shape_and_remembers_it() -> None:
    pricer = CallPricer(quote())
    small = headers(x=np.zeros((1, 100), np.float32), y=np.zeros(3, np.float32))
    assert pricer.price(small) == pricer.price(small) == (7 + -(-5000 * 103 // 803), -(-(5 * 10**9) * 103 // 803))


@pytest.mark.parametrize(
    "values",
    [
        {"x": np.zeros((9, 1), np.float32)},
        {"x": np.zeros((1, 101), np.float32)},
        {"x": np.zeros((100,), np.float32)},
        {"z": np.zeros((1,), np.float32)},
    ],
    ids=["rows", "columns", "rank", "name"],
)
def test_every_dimension_has_to_be_within_the_quote(values: dict) -> None:
    with pytest.raises(Refused) as refusal:
        CallPricer(quote()).price(headers(**values))
    assert refusal.value.reason is Reason.SHAPE_OVER_QUOTE


def test_a_sequence_is_priced_by_its_elements() -> None:
    pricer = CallPricer(quote(shapes=(InputShape("x", (2, 10)),)))
    assert pricer.price(headers(x=[np.zeros(10, np.float32), np.zeros(10, np.float32)]))[0] == 5007
    with pytest.raises(Refused):
        pricer.price(headers(x=[np.zeros(10, np.float32), np.zeros(11, np.float32)]))


def test_latency_is_predicted_from_the_model_first() -> None:
    assert expected_microseconds(10**9, 0.5, 0, 10**9) == 500_000
    assert expected_microseconds(2 * 10**9, 0.5, 10**9, 1) == 1_000_000
    assert expected_microseconds(10**9, 0.0, 0, 10**10) == 100_000
    assert expected_microseconds(10**9, 0.0, 0, 0) == 0
