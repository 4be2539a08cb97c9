import pytest

from p2pnode.errors import ProtocolViolation, Refused
from p2pnode.market.negotiation import IssuedQuote, OrderTerms, QuoteBook, check_order, check_quote, make_order, make_quote
from p2pnode.market.pricing import largest_amount
from p2pnode.market.settings import MarketSettings
from p2pnode.reasons import Reason
from p2pnode.wire.messages.market import InputShape, Order, Quote, QuoteRequest

CLIENT, PROVIDER, MODEL, QUOTE_ID, ORDER_ID = b"c" * 32, b"p" * 32, b"m" * 32, b"q" * 32, b"o" * 32
NOW, SETTINGS = 1_700_000_000_000, MarketSettings(operations_price=1_000_000)
SHAPES = (InputShape("x", (4,)),)
REQUEST = QuoteRequest(MODEL, "fast", SHAPES)


def a_quote(operations=10**6, room=5_000, settings=SETTINGS) -> Quote:
    return make_quote(REQUEST, CLIENT, b"f" * 32, operations, 100, room, settings, NOW, bytes(16))


def an_order(**changes) -> Order:
    order = make_order(a_quote(), QUOTE_ID, PROVIDER, OrderTerms(amount_max=10**6), SETTINGS, b"z" * 32, NOW, bytes(16))
    fields = {name: getattr(order, name) for name in order.__struct_fields__}
    return Order(**(fields | changes))


def issued() -> IssuedQuote:
    return IssuedQuote(a_quote(), QUOTE_ID, b"")


def test_a_quote_binds_price_and_slice() -> None:
    quote = a_quote()
    assert largest_amount(quote) == 1000
    assert quote.slice_amount_max == 5_000
    check_quote(quote, CLIENT, MODEL, SHAPES, "fast", NOW)


def test_a_slice_always_holds_one_call_and_a_call_beyond_all_credit_is_refused() -> None:
    assert a_quote(room=10).slice_amount_max == 1000
    with pytest.raises(Refused) as refusal:
        a_quote(operations=10**16, room=10)
    assert refusal.value.reason is Reason.CREDIT


@pytest.mark.parametrize(
    "question",
    [(b"x" * 32, MODEL, SHAPES, "fast"), (CLIENT, b"x" * 32, SHAPES, "fast"), (CLIENT, MODEL, (), "fast"),
     (CLIENT, MODEL, SHAPES, "exact")],
)  # fmt: skip
def test_a_quote_for_another_question_is_refused(question: tuple) -> None:
    with pytest.raises(ProtocolViolation):
        check_quote(a_quote(), *question, NOW)


def test_an_old_quote_is_of_no_use_to_either_side() -> None:
    late = NOW + 61_000
    with pytest.raises(Refused, match="expired"):
        check_quote(a_quote(), CLIENT, MODEL, SHAPES, "fast", late)
    book = QuoteBook(4)
    book.add(issued(), NOW)
    assert book.find(QUOTE_ID, CLIENT, NOW).document == QUOTE_ID
    for client, moment, reason in ((CLIENT, late, Reason.EXPIRED), (b"x" * 32, NOW, Reason.UNKNOWN_QUOTE)):
        with pytest.raises(Refused) as refusal:
            book.find(QUOTE_ID, client, moment)
        assert refusal.value.reason is reason


def test_a_full_quote_book_makes_room_by_expiry_only() -> None:
    book = QuoteBook(1)
    book.add(issued(), NOW)
    with pytest.raises(Refused) as refusal:
        book.add(IssuedQuote(a_quote(), b"2" * 32, b""), NOW)
    assert refusal.value.reason is Reason.BUSY
    book.add(IssuedQuote(a_quote(), b"2" * 32, b""), NOW + 61_000)


def test_an_order_within_its_quote_is_accepted() -> None:
    check_order(an_order(), issued(), ORDER_ID, PROVIDER, SETTINGS, NOW)
    again = issued()
    again.order = ORDER_ID
    check_order(an_order(), again, ORDER_ID, PROVIDER, SETTINGS, NOW)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"provider": b"x" * 32}, Reason.UNKNOWN_QUOTE),
        ({"model_id": b"x" * 32}, Reason.UNKNOWN_QUOTE),
        ({"numeric_class": "exact"}, Reason.UNKNOWN_QUOTE),
        ({"expires_ms": NOW}, Reason.EXPIRED),
        ({"deadline_ms": NOW}, Reason.EXPIRED),
        ({"deadline_ms": NOW + 10**9}, Reason.DEADLINE),
        ({"slice_amount": 5_001}, Reason.CREDIT),
        ({"slice_amount": 999}, Reason.PRICE),
        ({"chain_length": 65_537}, Reason.TOO_LARGE),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_order_outside_its_quote_is_refused(changes: dict, reason: Reason) -> None:
    with pytest.raises(Refused) as refusal:
        check_order(an_order(**changes), issued(), ORDER_ID, PROVIDER, SETTINGS, NOW)
    assert refusal.value.reason is reason


def test_a_quote_is_ordered_once() -> None:
    used = issued()
    used.order = b"1" * 32
    with pytest.raises(Refused) as refusal:
        check_order(an_order(), used, ORDER_ID, PROVIDER, SETTINGS, NOW)
    assert refusal.value.reason is Reason.ALREADY_USED


def test_a_budget_below_one_call_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(Refused) as refusal:
        make_order(a_quote(), QUOTE_ID, PROVIDER, OrderTerms(amount_max=999), SETTINGS, b"z" * 32, NOW, bytes(16))
    assert refusal.value.reason is Reason.BUDGET
