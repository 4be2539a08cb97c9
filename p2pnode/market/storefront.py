"""The selling side of a node: its offer, its quotes, its orders, and the sales that come of them."""

from collections.abc import Awaitable, Callable
from math import inf
from typing import Any, Final

import trio

from p2pnode.crypto.keys import Identity
from p2pnode.environment import Environment
from p2pnode.errors import PeerError, ProtocolViolation, Refused, WorkError
from p2pnode.ids import short
from p2pnode.market import ledger, records
from p2pnode.market.bell import Bell
from p2pnode.market.calls import CallDesk
from p2pnode.market.ledger import Settlement
from p2pnode.market.model_transfer import ModelDesk
from p2pnode.market.negotiation import IssuedQuote, QuoteBook, check_order, make_quote, make_terms
from p2pnode.market.offers import OfferFacts, SignedOffer, make_offer
from p2pnode.market.pins import Pins
from p2pnode.market.pricing import expected_microseconds
from p2pnode.market.selling import Sale, SaleSurroundings
from p2pnode.market.settings import FAST_CLASS, MarketSettings
from p2pnode.metrics import Metrics
from p2pnode.reasons import EndReason, Reason
from p2pnode.store.agreements import get_agreement
from p2pnode.wire.envelope import decode_envelope, document_id, encode_envelope, open_envelope, seal
from p2pnode.wire.messages.market import (
    Agreement,
    AgreementState,
    Document,
    EndAgreement,
    Order,
    PlaceOrder,
    QuoteRequest,
    ResumeAgreement,
    SliceRequest,
    WithdrawCalls,
)
from p2pnode.wire.messages.session import Done
from p2pnode.work.service import WorkService

# Quotes being worked out at once: each may have to fetch and load a model.
QUOTES_UNDER_WAY_MAX: Final = 32
_NONCE_SIZE: Final = 16


class Storefront:
    """Sells this node's work. start: runs an async function in the service's nursery, for as long as the service lives."""

    def __init__(
        self,
        environment: Environment,
        identity: Identity,
        network_id: bytes,
        settings: MarketSettings,
        metrics: Metrics,
        work: WorkService,
        models: ModelDesk,
        settlement: Settlement,
        facts: Callable[[], OfferFacts],
        pins: Pins,
        violated: Callable[[Any, Reason], None],
        start: Callable[..., None],
    ) -> None:
        self.settings = settings
        self.sales: dict[bytes, Sale] = {}
        self.desk = CallDesk(environment.clock, settings, metrics, work, self.sales)
        self._environment = environment
        self._identity = identity
        self._network_id = network_id
        self._metrics = metrics
        self._work = work
        self._models = models
        self._settlement = settlement
        self._facts = facts
        self._start = start
        self._quotes = QuoteBook(settings.quotes_open_max)
        self._quotes_under_way = 0
        self._offer: SignedOffer | None = None
        self._offer_basis: tuple[OfferFacts, MarketSettings] | None = None
        self._offering = trio.Lock()
        self._quiet = Bell()
        self._writing_off = trio.Lock()
        # Orders being saved, by id: (client, slice amount). They count as credit in use already.
        self._ordering: dict[bytes, tuple[bytes, int]] = {}
        self._around = SaleSurroundings(
            environment, identity, network_id, settings, metrics, self.desk.outputs, pins, violated, self._finished
        )  # fmt: skip

    def apply(self, settings: MarketSettings) -> None:
        """Use changed settings: prices from the next quote on, limits at once."""
        self.settings = self.desk.settings = settings

    # --- the offer ----------------------------------------------------------------------------------------------------

    async def own_offer(self) -> SignedOffer:
        """Give this node's signed offer: signed again when what it says has changed or half its life is over.

        Raises Refused(NOT_SELLING) when the owner sells nothing.
        """
        if not self.settings.selling:
            raise Refused(Reason.NOT_SELLING, "this node sells nothing now")
        async with self._offering:
            now_ms = self._environment.clock.wall_ms()
            basis = (self._facts(), self.settings)
            offer = self._offer
            if offer is None or basis != self._offer_basis or now_ms > (offer.offer.created_ms + offer.offer.expires_ms) // 2:
                sequence = await self._environment.database.write(records.next_offer_sequence)
                document = make_offer(*basis, sequence, now_ms)
                envelope = seal(document, self._identity, self._network_id)
                offer = SignedOffer(document, document_id(envelope), encode_envelope(envelope), self._identity.node_id)
                self._offer, self._offer_basis = offer, basis
            return offer

    def forget_offer(self) -> None:
        """Let the next offer be signed anew, above every sequence used before."""
        self._offer = None

    async def answer_offer(self, incoming: Any) -> None:
        """Answer an OfferRequest."""
        incoming.reply(Document((await self.own_offer()).envelope))

    # --- quotes -------------------------------------------------------------------------------------------------------

    async def answer_quote(self, incoming: Any) -> None:
        """Answer a QuoteRequest with a binding price, after fetching and measuring the model if that is still to be done."""
        if self._quotes_under_way >= QUOTES_UNDER_WAY_MAX:
            self._metrics.add("limit_hits_total", "QUOTES_UNDER_WAY_MAX")
            raise Refused(Reason.BUSY, "too many quotes at once")
        self._quotes_under_way += 1
        try:
            issued = await self._quote(incoming.link, incoming.message)
        finally:
            self._quotes_under_way -= 1
        incoming.reply(Document(issued.envelope))

    async def _quote(self, link: Any, request: QuoteRequest) -> IssuedQuote:
        client, settings = link.peer.node_id, self.settings
        offer = await self.own_offer()
        if request.numeric_class not in settings.numeric_classes:
            raise Refused(Reason.CLASS, f"this provider has {', '.join(settings.numeric_classes)}")
        self._check_owner(client, request.model_id)
        await self._models.fetch(link, request.model_id)
        facts = await self._work.prepare(request.model_id)
        if facts.random_operators and request.numeric_class != FAST_CLASS:
            raise Refused(Reason.RANDOM_OPERATOR, "a model that draws random numbers cannot be verified in this class")
        operations = await facts.operations({entry.name: entry.shape for entry in request.shapes})
        expected_us = expected_microseconds(operations, facts.seconds_per_call, 0, offer.offer.hardware.operations_per_second)
        room = await self._credit_room(client)
        now_ms = self._environment.clock.wall_ms()
        nonce = self._environment.entropy.token(_NONCE_SIZE)
        quote = make_quote(request, client, offer.document, operations, expected_us, room, settings, now_ms, nonce)
        envelope = seal(quote, self._identity, self._network_id)
        issued = IssuedQuote(quote, document_id(envelope), encode_envelope(envelope))
        self._quotes.add(issued, now_ms)
        return issued

    def _check_owner(self, client: bytes, model_id: bytes) -> None:
        reason = self._work.admission.check(client, model_id, self._environment.clock.monotonic())
        if reason is not None:
            raise Refused(reason)

    async def _credit_room(self, client: bytes) -> int:
        """Give how large a slice this client may have now, its open agreements counted. Raises Refused(CREDIT or UNPAID)."""
        backing = await self._settlement.backing(client)
        now_ms = self._environment.clock.wall_ms()
        since_ms = now_ms - round(self.settings.credit_half_life_seconds * 1000)
        limit, room, unpaid, fixed = await self._environment.database.read(
            lambda connection: (
                ledger.credit_limit(connection, client, self.settings, now_ms, backing),
                ledger.debt_room(connection, client, self.settings),
                ledger.left_unpaid(connection, client, since_ms),
                ledger.trust(connection, client),
            )
        )
        if unpaid and fixed is None:
            raise Refused(Reason.UNPAID, f"an earlier agreement ended with {unpaid} micro-credits unpaid")
        used = sum(amount for peer, amount in self._ordering.values() if peer == client)
        used += sum(sale.terms.order.slice_amount for sale in self.sales.values() if sale.terms.client == client)
        if room <= 0:
            raise Refused(Reason.CREDIT, "earlier cheques have to be settled first")
        if limit <= used:
            raise Refused(Reason.CREDIT, f"{used} micro-credits of open slices use up the credit of {limit}")
        return limit - used

    # --- orders -------------------------------------------------------------------------------------------------------

    async def answer_order(self, incoming: Any) -> None:
        """Answer a PlaceOrder: check it, save it, countersign it. The same order again gives the same agreement."""
        message: PlaceOrder = incoming.message
        peer = incoming.link.peer
        envelope = decode_envelope(message.order)
        order = open_envelope(envelope, Order, self._network_id, peer.public_key)
        order_id = document_id(envelope)
        if order_id in self.sales:
            data = await self._environment.database.read(lambda connection: records.countersignature(connection, order_id))
            incoming.reply(Document(data))
            return
        now_ms = self._environment.clock.wall_ms()
        issued = self._quotes.find(order.quote, peer.node_id, now_ms)
        check_order(order, issued, order_id, self._identity.node_id, self.settings, now_ms)
        self._check_owner(peer.node_id, order.model_id)
        if order_id in self._ordering:
            raise Refused(Reason.BUSY, "the order is being saved")
        issued.order = order_id
        self._ordering[order_id] = (peer.node_id, 0)
        try:
            data = await self._agree(incoming.link, order, order_id, issued, bytes(message.order), now_ms)
        except Refused:
            issued.order = b""
            raise
        finally:
            del self._ordering[order_id]
        incoming.reply(Document(data))

    async def _agree(
        self, link: Any, order: Order, order_id: bytes, issued: IssuedQuote, order_data: bytes, now_ms: int
    ) -> bytes:
        peer = link.peer
        own = [sale for sale in self.sales.values() if sale.terms.client == peer.node_id]
        if len(own) >= self.settings.agreements_per_peer_max or len(self.sales) >= self.settings.agreements_open_max:
            self._metrics.add("limit_hits_total", "agreements_open_max")
            raise Refused(Reason.BUSY, "too many open agreements")
        room = await self._credit_room(peer.node_id)
        if order.slice_amount > max(room, issued.quote.slice_amount_max if not own else room):
            raise Refused(Reason.CREDIT, f"a slice may hold {room} micro-credits now")
        self._ordering[order_id] = (peer.node_id, order.slice_amount)
        debt = await self._environment.database.read(lambda connection: ledger.debt_room(connection, peer.node_id, self.settings))
        terms = make_terms(order, order_id, issued.quote, self._identity.public_key, peer.node_id, peer.public_key, now_ms, debt)
        document = Agreement(order=order_id, client=peer.node_id, agreed_ms=now_ms)
        data = encode_envelope(seal(document, self._identity, self._network_id))

        def write(connection: Any) -> None:
            records.save_order(connection, terms, issued.envelope, order_data, True, None, None, now_ms)
            records.save_agreement(connection, order_id, data, True, now_ms)

        await self._environment.database.write(write)
        sale = Sale(self._around, terms)
        self.open(sale)
        if link.closed is None:
            sale.attach(link)
        return data

    def open(self, sale: Sale) -> None:
        """Put a sale, new or from the store, to work."""
        self.sales[sale.terms.agreement_id] = sale
        self._start(sale.run)

    def _finished(self, sale: Sale) -> None:
        self.sales.pop(sale.terms.agreement_id, None)
        self._quiet.ring()

    # --- agreements in progress ---------------------------------------------------------------------------------------

    async def answer_resume(self, incoming: Any) -> None:
        """Answer a ResumeAgreement: where this side stands, or how the agreement ended."""
        message: ResumeAgreement = incoming.message
        sale = self._sale(incoming, message.agreement)
        if sale is not None:
            sale.resume(incoming)
            return
        row = await self._ended(incoming, message.agreement)
        incoming.reply(AgreementState(message.agreement, row.slices, 0, row.total, row.paid, row.end_reason))

    async def answer_end(self, incoming: Any) -> None:
        """Answer an EndAgreement once the last cheque is here."""
        message: EndAgreement = incoming.message
        try:
            reason = EndReason(message.reason)
        except ValueError:
            raise ProtocolViolation(Reason.WRONG_TYPE, "an unknown end reason") from None
        sale = self._sale(incoming, message.agreement)
        if sale is not None:
            sale.end(reason, incoming)
            return
        if message.agreement in self._ordering:
            # Its client withdraws it while it is being saved: refused as unknown it would stand here until its deadline.
            raise Refused(Reason.BUSY, "the order is being saved")
        row = await self._ended(incoming, message.agreement)
        incoming.reply(Done(row.end_reason))

    async def answer_slice(self, incoming: Any) -> None:
        """Answer a SliceRequest."""
        message: SliceRequest = incoming.message
        sale = self._sale(incoming, message.agreement)
        if sale is None:
            raise Refused(Reason.UNKNOWN_AGREEMENT, "no open agreement with this id")
        await sale.answer_leaves(message.slice, incoming)

    async def answer_withdrawal(self, incoming: Any) -> None:
        """Answer a WithdrawCalls."""
        message: WithdrawCalls = incoming.message
        sale = self._sale(incoming, message.agreement)
        if sale is None:
            raise Refused(Reason.UNKNOWN_AGREEMENT, "no open agreement with this id")
        async with self._writing_off:  # one at a time: each has to see what the one before has used up
            now_ms = self._environment.clock.wall_ms()
            room = await self._environment.database.read(
                lambda connection: ledger.write_off_room(connection, sale.terms.client, self.settings, now_ms)
            )
            await sale.withdraw(incoming, message.numbers, room)

    def _sale(self, incoming: Any, agreement_id: bytes) -> Sale | None:
        sale = self.sales.get(agreement_id)
        if sale is not None and sale.terms.client != incoming.link.peer.node_id:
            raise Refused(Reason.UNKNOWN_AGREEMENT, "no open agreement with this id")
        return sale

    async def _ended(self, incoming: Any, agreement_id: bytes) -> Any:
        row = await self._environment.database.read(lambda connection: get_agreement(connection, agreement_id))
        if row is None or row.role != "provider" or row.peer != incoming.link.peer.node_id or row.state != "ended":
            raise Refused(Reason.UNKNOWN_AGREEMENT, "no agreement with this id")
        return row

    def link_down(self, link: Any) -> None:
        """A link is gone: sales that used it wait for their clients."""
        for sale in list(self.sales.values()):
            sale.detach(link)
        self._quiet.ring()

    async def load(self) -> None:
        """Take up what earlier runs left open; what was never countersigned is ended."""
        now_ms = self._environment.clock.wall_ms()
        client_of = {}

        def read(connection: Any) -> list[tuple[records.StoredAgreement, Any]]:
            return [
                (stored, records.sold_progress(connection, stored.row)) for stored in records.load_open("provider")(connection)
            ]

        for stored, progress in await self._environment.database.read(read):
            row = stored.row
            client_of[row.id] = row.peer
            terms = make_terms(
                stored.order,
                row.id,
                stored.quote,
                stored.provider_key,
                row.peer,
                stored.client_key,
                stored.agreed_ms,
                row.amount_max,
            )
            self.open(Sale(self._around, terms, progress))
        await self._environment.database.write(
            lambda connection: records.end_unsigned(connection, "provider", tuple(client_of), EndReason.REFUSED, now_ms)
        )

    async def stop(self) -> None:
        """Sign what is executed, deliver it, and wait for the last cheques; the caller bounds the time."""
        for sale in list(self.sales.values()):
            sale.end(EndReason.PROVIDER_STOPPED)
        while any(sale.link is not None for sale in self.sales.values()):
            await self._quiet.heard(inf)

    def status(self) -> list[dict[str, Any]]:
        """Give the open sales in plain values."""
        return [
            {
                "agreement": short(sale.terms.agreement_id),
                "client": short(sale.terms.client),
                "phase": sale.machine.phase.value,
                "total": sale.machine.total,
                "paid": sale.machine.paid,
                "at_risk": sale.machine.exposure,
                "calls_running": len(sale.running),
                "connected": sale.link is not None,
            }
            for sale in self.sales.values()
        ]


async def answered(incoming: Any, handler: Callable[[Any], Awaitable[None]], violated: Callable[[Any, Reason], None]) -> None:
    """Run a request's handler and turn what it raises into a refusal with the closed-list reason."""
    try:
        await handler(incoming)
    except (Refused, WorkError) as error:
        incoming.refuse(error.reason, error.detail)
    except ProtocolViolation as error:
        # The reason leaves first: a violation may close the link.
        incoming.refuse(error.reason, error.detail)
        violated(incoming.link, error.reason)
        if error.reason in (Reason.BAD_SIGNATURE, Reason.WRONG_SIGNER):
            incoming.link.close(error.reason)
    except PeerError as error:
        incoming.refuse(Reason.UNKNOWN_MODEL, str(error))
