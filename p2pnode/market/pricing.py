"""What a call costs: arithmetic that both sides do alike, in integers.

Work is priced per call from the model's graph and the input's size, never per second, so a slow provider earns no more.
Measured speed enters only the expected latency. Source: the `Quote` message; MARKET.md.
"""

from collections.abc import Sequence
from typing import Final

from p2pnode.errors import Refused
from p2pnode.reasons import Reason
from p2pnode.wire.messages.market import InputShape, Quote
from p2pnode.wire.messages.work import ValueHeader
from p2pnode.wire.tensors import elements

OPERATIONS_UNIT: Final = 10**9
_REMEMBERED_SHAPES_MAX: Final = 1024
# ValueHeader.kind of an optional input without a value.
EMPTY_KIND: Final = 3


def work_price(operations_price: int, operations: int, part: int, whole: int) -> int:
    """Give ceil(operations_price * operations * part / (whole * 10^9)) micro-credits; all of it when `whole` is 0."""
    if whole == 0:
        part = whole = 1
    return -(-operations_price * operations * part // (whole * OPERATIONS_UNIT))


def call_amount(quote: Quote, input_elements: int) -> int:
    """Give the price of one call with this many input elements, in micro-credits.

    Raises Refused(SHAPE_OVER_QUOTE) for more elements than the quote covers.
    """
    if input_elements > quote.elements:
        raise Refused(Reason.SHAPE_OVER_QUOTE, f"{input_elements} input elements, the quote covers {quote.elements}")
    return quote.call_price + work_price(quote.operations_price, quote.operations, input_elements, quote.elements)


def largest_amount(quote: Quote) -> int:
    """Give the price of the largest call that a quote covers, in micro-credits."""
    return call_amount(quote, quote.elements)


def shapes_elements(shapes: Sequence[InputShape]) -> int:
    """Give the number of elements of the largest inputs."""
    total = 0
    for entry in shapes:
        count = 1
        for dimension in entry.shape:
            count *= dimension
        total += count
    return total


def expected_microseconds(operations: int, measured_seconds: float, measured_operations: int, operations_per_second: int) -> int:
    """Predict the time of one call from what was measured, in microseconds; 0 when nothing was.

    measured_seconds: of one call of this model that took `measured_operations`; preferred. operations_per_second: of the
    machine in general.
    """
    if measured_seconds > 0:
        scale = operations / measured_operations if measured_operations else 1.0
        return max(1, round(measured_seconds * scale * 1e6))
    return operations * 1_000_000 // operations_per_second if operations_per_second else 0


class CallPricer:
    """Prices the calls of one quote, remembering shapes that it has seen: a lookup for all calls but the first."""

    __slots__ = ("_limits", "_prices", "quote")

    def __init__(self, quote: Quote) -> None:
        self.quote = quote
        self._limits = {entry.name: entry.shape for entry in quote.shapes}
        self._prices: dict[object, tuple[int, int]] = {}

    def price(self, headers: Sequence[ValueHeader]) -> tuple[int, int]:
        """Give (micro-credits, operations) of a call with these inputs. Raises Refused(SHAPE_OVER_QUOTE).

        Every dimension must be within the quote's, not only the product: a model may cost the square of one of them.
        """
        if len(headers) == 1 and headers[0].kind == 0:
            key: object = (headers[0].name, headers[0].shape)
        else:
            key = tuple([(header.name, header.shape) if header.kind == 0 else header for header in headers])
        price = self._prices.get(key)
        if price is None:
            price = self._compute(headers)
            if len(self._prices) >= _REMEMBERED_SHAPES_MAX:
                self._prices.clear()
            self._prices[key] = price
        return price

    def _compute(self, headers: Sequence[ValueHeader]) -> tuple[int, int]:
        quote = self.quote
        for header in headers:
            limit = self._limits.get(header.name)
            if limit is None:
                if header.kind == EMPTY_KIND:
                    continue
                raise Refused(Reason.SHAPE_OVER_QUOTE, f"the quote has no input {header.name!r}")
            if header.kind == 0 and not _fits(header.shape, limit):
                raise Refused(Reason.SHAPE_OVER_QUOTE, f"{header.name!r}: {list(header.shape)} exceeds {list(limit)}")
        count = elements(headers)
        amount = call_amount(quote, count)
        operations = -(-quote.operations * count // quote.elements) if quote.elements else quote.operations
        return amount, operations


def _fits(shape: Sequence[int], limit: Sequence[int]) -> bool:
    return len(shape) == len(limit) and all(size <= largest for size, largest in zip(shape, limit, strict=True))
