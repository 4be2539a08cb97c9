"""Quotes and orders: how both sides come to the terms of an agreement. Pure; the service signs, saves and sends.

A quote binds its provider for about a minute, to one client. An order names the quote by hash, so the agreement's price can
be proven from documents alone. One quote becomes one agreement; the same order sent again gives the same agreement.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from p2pnode.errors import ProtocolViolation, Refused
from p2pnode.market.agreements import Terms
from p2pnode.market.pricing import largest_amount, shapes_elements
from p2pnode.market.settings import MarketSettings
from p2pnode.reasons import Reason
from p2pnode.wire.messages.market import InputShape, Order, Quote, QuoteRequest


@dataclass(frozen=True, slots=True)
class OrderTerms:
    """What a client wants of an agreement. Amounts in micro-credits; None or 0 means: the settings' or the quote's value."""

    amount_max: int
    deadline_seconds: float = 3_600.0
    slice_calls: int = 0
    slice_seconds: float = 0.0
    slice_amount: int | None = None
    chain_length: int = 0
    audit_ppm: int = 0
    auditors: int = 0
    share_worker: bool = True
    accept_tolerance: bool = False


@dataclass(slots=True)
class IssuedQuote:
    """A quote that this provider signed. order: the order that used it, empty before."""

    quote: Quote
    document: bytes
    envelope: bytes
    order: bytes = b""


class QuoteBook:
    """The quotes that this provider is bound to: bounded, and forgotten when they expire."""

    def __init__(self, quotes_max: int) -> None:
        self._quotes_max = quotes_max
        self._quotes: dict[bytes, IssuedQuote] = {}

    def add(self, issued: IssuedQuote, now_ms: int) -> None:
        """Keep a quote. Raises Refused(BUSY) when too many are open."""
        if len(self._quotes) >= self._quotes_max:
            expired = [key for key, entry in self._quotes.items() if entry.quote.expires_ms <= now_ms]
            for key in expired:
                del self._quotes[key]
            if not expired:
                raise Refused(Reason.BUSY, "too many open quotes")
        self._quotes[issued.document] = issued

    def find(self, document: bytes, client: bytes, now_ms: int) -> IssuedQuote:
        """Give a client's quote. Raises Refused(UNKNOWN_QUOTE or EXPIRED)."""
        issued = self._quotes.get(document)
        if issued is None or issued.quote.client != client:
            raise Refused(Reason.UNKNOWN_QUOTE, "ask for a new quote")
        if issued.quote.expires_ms <= now_ms:
            raise Refused(Reason.EXPIRED, "the quote; ask for a new one")
        return issued


def make_quote(
    request: QuoteRequest,
    client: bytes,
    offer: bytes,
    operations: int,
    expected_us: int,
    slice_amount_limit: int,
    settings: MarketSettings,
    now_ms: int,
    nonce: bytes,
) -> Quote:
    """Give a provider's quote, to be signed. slice_amount_limit: what the client's credit allows; one call is always within."""
    quote = Quote(
        client=client,
        offer=offer,
        model_id=request.model_id,
        numeric_class=request.numeric_class,
        shapes=request.shapes,
        operations=operations,
        elements=shapes_elements(request.shapes),
        operations_price=settings.operations_price,
        call_price=settings.call_price,
        expected_us=expected_us,
        slice_amount_max=slice_amount_limit,
        expires_ms=now_ms + round(settings.quote_seconds * 1000),
        nonce=nonce,
    )
    largest = largest_amount(quote)
    if largest > slice_amount_limit:
        if largest > settings.credit_slice_amount_max:
            raise Refused(Reason.CREDIT, f"one call costs {largest} micro-credits")
        quote = _with_slice(quote, largest)
    return quote


def _with_slice(quote: Quote, amount: int) -> Quote:
    return Quote(**{name: getattr(quote, name) for name in quote.__struct_fields__} | {"slice_amount_max": amount})


def check_quote(
    quote: Quote, client: bytes, model_id: bytes, shapes: Sequence[InputShape], numeric_class: str, now_ms: int
) -> None:
    """Return if a quote answers what this client asked. Raises ProtocolViolation or Refused(EXPIRED)."""
    asked = (client, model_id, tuple(shapes), numeric_class, shapes_elements(shapes))
    if (quote.client, quote.model_id, quote.shapes, quote.numeric_class, quote.elements) != asked:
        raise ProtocolViolation(Reason.UNKNOWN_QUOTE, "the quote answers another question")
    if quote.expires_ms <= now_ms:
        raise Refused(Reason.EXPIRED, "the quote")
    if quote.slice_amount_max < largest_amount(quote):
        raise ProtocolViolation(Reason.CREDIT, "the quote's slice does not hold one call")


def make_order(
    quote: Quote, quote_id: bytes, provider: bytes, terms: OrderTerms, settings: MarketSettings,
    anchor: bytes, now_ms: int, nonce: bytes,
) -> Order:  # fmt: skip
    """Give a client's order, to be signed. Raises Refused(BUDGET) when not even one call fits, EXPIRED for an old quote."""
    slice_calls = terms.slice_calls or settings.slice_calls
    largest = largest_amount(quote)
    # More than a slice's calls can cost is never at risk, and beyond four calls a quarter of the credit is enough: the
    # rest is left for other agreements with this provider.
    wanted = min(slice_calls * largest, max(quote.slice_amount_max // 4, 4 * largest))
    slice_amount = max(min(wanted if terms.slice_amount is None else terms.slice_amount, quote.slice_amount_max), largest)
    if terms.amount_max < largest:
        raise Refused(Reason.BUDGET, f"one call may cost {largest} micro-credits, the limit is {terms.amount_max}")
    if quote.expires_ms <= now_ms:
        raise Refused(Reason.EXPIRED, "the quote")
    lifetime = min(terms.deadline_seconds, settings.agreement_seconds_max)
    return Order(
        quote=quote_id,
        provider=provider,
        model_id=quote.model_id,
        numeric_class=quote.numeric_class,
        amount_max=terms.amount_max,
        deadline_ms=now_ms + round(lifetime * 1000),
        audit_ppm=terms.audit_ppm,
        auditors=terms.auditors,
        slice_calls=slice_calls,
        slice_ms=round((terms.slice_seconds or settings.slice_seconds) * 1000),
        slice_amount=slice_amount,
        chain_anchor=anchor,
        chain_length=terms.chain_length or settings.chain_length,
        auditor_root=b"",
        share_worker=terms.share_worker,
        accept_tolerance=terms.accept_tolerance,
        expires_ms=quote.expires_ms,
        nonce=nonce,
    )


def check_order(
    order: Order, issued: IssuedQuote, order_id: bytes, provider: bytes, settings: MarketSettings, now_ms: int
) -> None:
    """Return if this provider may countersign an order. Raises Refused with the reason."""
    quote = issued.quote
    if order.provider != provider or (order.model_id, order.numeric_class) != (quote.model_id, quote.numeric_class):
        raise Refused(Reason.UNKNOWN_QUOTE, "the order does not fit its quote")
    if issued.order and issued.order != order_id:
        raise Refused(Reason.ALREADY_USED, "the quote was ordered before")
    if order.expires_ms <= now_ms or order.deadline_ms <= now_ms:
        raise Refused(Reason.EXPIRED, "the order")
    if order.deadline_ms > now_ms + settings.agreement_seconds_max * 1000 + 60_000:
        raise Refused(Reason.DEADLINE, f"an agreement lasts at most {settings.agreement_seconds_max:.0f} s")
    if order.slice_amount > quote.slice_amount_max:
        raise Refused(Reason.CREDIT, f"a slice may hold {quote.slice_amount_max} micro-credits")
    if order.slice_amount < largest_amount(quote):
        raise Refused(Reason.PRICE, "a slice must hold one call")
    if order.chain_length > settings.chain_length_max:
        raise Refused(Reason.TOO_LARGE, f"a hash chain of more than {settings.chain_length_max}")


def make_terms(
    order: Order, order_id: bytes, quote: Quote, provider_key: bytes, client: bytes, client_key: bytes, agreed_ms: int,
    amount_max: int,
) -> Terms:  # fmt: skip
    """Give the frozen terms of an agreement."""
    return Terms(
        agreement_id=order_id, provider=order.provider, client=client, provider_key=provider_key, client_key=client_key,
        order=order, quote=quote, agreed_ms=agreed_ms, amount_max=min(amount_max, order.amount_max),
    )  # fmt: skip
