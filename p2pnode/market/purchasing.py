"""The buying side of a node: offers of others, quotes, orders, and the agreements that come of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from typing import Any, Final

import trio

from p2pnode.crypto.keys import Identity
from p2pnode.environment import Environment
from p2pnode.errors import PeerError, ProtocolViolation, Refused, Unreachable
from p2pnode.ids import short
from p2pnode.market import records
from p2pnode.market.bell import Bell
from p2pnode.market.bought_agreement import BoughtProgress
from p2pnode.market.buying import ClientAgreement
from p2pnode.market.cheques import HashChain
from p2pnode.market.model_transfer import ModelDesk
from p2pnode.market.negotiation import OrderTerms, check_quote, make_order, make_terms
from p2pnode.market.offers import OfferBook, SignedOffer, open_offer
from p2pnode.market.pins import Pins
from p2pnode.market.pricing import largest_amount
from p2pnode.market.settings import MarketSettings
from p2pnode.market.way_back import PurchaseSurroundings
from p2pnode.market.withdrawals import REASON as WITHDRAWN
from p2pnode.market.withdrawals import Withdrawals
from p2pnode.metrics import Metrics
from p2pnode.reasons import EndReason, Reason
from p2pnode.wire.codec import decode
from p2pnode.wire.envelope import decode_envelope, document_id, encode_envelope, open_envelope, seal
from p2pnode.wire.messages.market import (
    Agreement,
    DeliverReceipt,
    Document,
    InputShape,
    OfferRequest,
    PlaceOrder,
    Quote,
    QuoteRequest,
    Receipt,
)

_OFFER_SECONDS: Final = 10.0
_SEED_SIZE: Final = 32
_NONCE_SIZE: Final = 16


@dataclass(frozen=True, slots=True)
class SignedQuote:
    """A quote that was checked. document: the quote itself; id: its hash; envelope: the bytes as received."""

    document: Quote
    id: bytes
    envelope: bytes
    link: Any

    @property
    def provider(self) -> bytes:
        """Node id of the provider."""
        return self.link.peer.node_id  # type: ignore[no-any-return]

    @property
    def largest_amount(self) -> int:
        """Price of the largest call that it covers, micro-credits."""
        return largest_amount(self.document)


class Purchasing:
    """Buys other nodes' work. start: runs an async function in the service's nursery, for as long as the service lives."""

    def __init__(
        self,
        environment: Environment,
        identity: Identity,
        network_id: bytes,
        settings: MarketSettings,
        metrics: Metrics,
        transport: Any,
        models: ModelDesk,
        pins: Pins,
        violated: Callable[[Any, Reason], None],
        start: Callable[..., None],
    ) -> None:
        self.settings = settings
        self.offers = OfferBook(settings.offers_known_max)
        self.agreements: dict[bytes, ClientAgreement] = {}
        self._environment = environment
        self._identity = identity
        self._network_id = network_id
        self._transport = transport
        self._models = models
        self._start = start
        self._ended = Bell()
        self._withdrawals = Withdrawals(start)
        self._addresses: dict[bytes, tuple[str, ...]] = {}
        self._jobs: dict[bytes, bytes | None] = {}
        self._around = PurchaseSurroundings(
            environment, identity, network_id, settings, metrics, pins, violated, self._connect, self._finished
        )  # fmt: skip

    # --- offers and quotes --------------------------------------------------------------------------------------------

    async def fetch_offers(self, links: Iterable[Any]) -> Mapping[bytes, SignedOffer]:
        """Ask these peers for their offers, all at once, and give provider -> offer of all that are known and current.

        A peer that refuses or does not answer in time is left out.
        """
        async with trio.open_nursery() as nursery:
            for link in links:
                nursery.start_soon(self._fetch_offer, link)
        return dict(self.offers.current(self._environment.clock.wall_ms()))

    async def _fetch_offer(self, link: Any) -> None:
        try:
            with trio.fail_after(_OFFER_SECONDS):
                reply = await link.request(OfferRequest())
            now_ms = self._environment.clock.wall_ms()
            self.offers.add(open_offer(_document(reply), self._network_id, now_ms, link.peer.node_id))
        except ProtocolViolation as error:
            self._around.violated(link, error.reason)
        except (PeerError, trio.TooSlowError):
            return  # A refusal is counted by the session; who does not answer has no offer.

    async def quote(self, link: Any, model_id: bytes, shapes: Sequence[InputShape], numeric_class: str) -> SignedQuote:
        """Ask a provider for a binding price; it may fetch the model from here first, so allow for that time.

        Raises Refused, Unreachable, ProtocolViolation for a quote that is not an answer to the question.
        """
        self._models.allow(model_id, link.peer.node_id)
        reply = await link.request(QuoteRequest(model_id, numeric_class, tuple(shapes)))
        data = _document(reply)
        envelope = decode_envelope(data)
        quote = open_envelope(envelope, Quote, self._network_id, link.peer.public_key)
        check_quote(quote, self._identity.node_id, model_id, shapes, numeric_class, self._environment.clock.wall_ms())
        return SignedQuote(quote, document_id(envelope), bytes(data), link)

    # --- orders -------------------------------------------------------------------------------------------------------

    async def order(self, signed: SignedQuote, terms: OrderTerms, job: bytes | None = None) -> ClientAgreement:
        """Sign an order for a quote and give the standing agreement. It is saved before it is sent.

        Raises Refused, Unreachable, ProtocolViolation. Cancelled or failed: the order ends, nothing is owed, and a provider
        that may have agreed is told.
        """
        environment, link, quote = self._environment, signed.link, signed.document
        length = terms.chain_length or self.settings.chain_length
        seed = environment.entropy.token(_SEED_SIZE)
        chain = HashChain(seed, length)
        now_ms = environment.clock.wall_ms()
        nonce = environment.entropy.token(_NONCE_SIZE)
        order = make_order(quote, signed.id, signed.provider, terms, self.settings, chain.value(0), now_ms, nonce)
        envelope = seal(order, self._identity, self._network_id)
        data, order_id = encode_envelope(envelope), document_id(envelope)
        own = self._identity
        frozen = make_terms(
            order, order_id, quote, link.peer.public_key, own.node_id, own.public_key, now_ms, order.amount_max
        )  # fmt: skip
        await environment.database.write(
            lambda connection: records.save_order(connection, frozen, signed.envelope, data, False, job, seed, now_ms)
        )
        try:
            reply = await link.request(PlaceOrder(data))
            agreed_data = bytes(_document(reply))
            agreed = open_envelope(decode_envelope(agreed_data), Agreement, self._network_id, link.peer.public_key)
            if agreed.order != order_id or agreed.client != own.node_id:
                raise ProtocolViolation(Reason.WRONG_TYPE, "the agreement is for another order")
            await environment.database.write(
                lambda connection: records.save_agreement(connection, order_id, agreed_data, False, now_ms)
            )
        except Refused:
            self._end_order(order_id, signed.provider, EndReason.REFUSED)
            raise
        except BaseException:  # cancelled too: whatever it was, the provider may have agreed
            self._end_order(order_id, signed.provider, WITHDRAWN)
            raise
        self._addresses[signed.provider] = tuple(link.peer.addresses)
        agreement = ClientAgreement(self._around, frozen, chain, BoughtProgress(), link if link.closed is None else None)
        self._open(agreement, job)
        return agreement

    def _end_order(self, order_id: bytes, provider: bytes, reason: EndReason) -> None:
        """End an order of which nothing came. The market may be closing: then the next start does it."""
        with suppress(Refused):
            self._start(self._save_end, order_id, provider, reason)

    async def _save_end(self, order_id: bytes, provider: bytes, reason: EndReason) -> None:
        now_ms = self._environment.clock.wall_ms()
        await self._environment.database.write(lambda connection: records.end_agreement(connection, order_id, reason, now_ms))
        if reason is WITHDRAWN:
            self._withdrawals.add(order_id, provider, self._transport.links().get(provider))

    def _open(self, agreement: ClientAgreement, job: bytes | None) -> None:
        self.agreements[agreement.id] = agreement
        self._jobs[agreement.id] = job
        self._start(agreement.payments.run)

    def _finished(self, agreement: ClientAgreement) -> None:
        self.agreements.pop(agreement.id, None)
        self._jobs.pop(agreement.id, None)
        self._ended.ring()

    async def _connect(self, provider: bytes) -> Any:
        link = self._transport.links().get(provider)
        if link is not None and link.closed is None:
            return link
        addresses = self._addresses.get(provider, ())
        if not addresses:
            raise Unreachable("no address of the provider is known")
        return await self._transport.connect(addresses, provider)

    # --- agreements in progress ---------------------------------------------------------------------------------------

    def receipt_arrived(self, incoming: Any) -> None:
        """Hand a DeliverReceipt to its agreement's task. Raises Refused(UNKNOWN_AGREEMENT), ProtocolViolation."""
        message: DeliverReceipt = incoming.message
        receipt = decode(Receipt, decode_envelope(message.receipt).body)
        agreement = self.agreements.get(receipt.agreement)
        if agreement is None or agreement.peer != incoming.link.peer.node_id:
            raise Refused(Reason.UNKNOWN_AGREEMENT, "no open agreement with this id")
        agreement.payments.receipt_arrived(incoming, message.receipt)

    def link_up(self, link: Any) -> None:
        """A link is there: agreements with this provider go on."""
        if link.peer.addresses:
            self._addresses[link.peer.node_id] = tuple(link.peer.addresses)
        for agreement in self.agreements.values():
            if agreement.peer == link.peer.node_id:
                agreement.payments.attach(link)
        self._withdrawals.link_up(link)

    def link_down(self, link: Any) -> None:
        """A link is gone."""
        for agreement in list(self.agreements.values()):
            agreement.payments.detach(link)
        if self.agreements:
            self._ended.ring()

    async def load(self) -> None:
        """Take up what earlier runs left open. It gets no new calls, so it ends as soon as its old ones are decided.

        Agreements with calls to recall (`ClientAgreement.fetch`, then `confirm` or `give_up`) are ended by who recalls them.
        """
        now_ms = self._environment.clock.wall_ms()

        def write(connection: Any) -> tuple[list[tuple[records.StoredAgreement, BoughtProgress]], list[tuple[bytes, bytes]]]:
            found = [
                (stored, records.bought_progress(connection, stored.row)) for stored in records.load_open("client")(connection)
            ]
            records.end_unsigned(connection, "client", tuple(stored.row.id for stored, _ in found), WITHDRAWN, now_ms)
            return found, records.withdrawn_orders(connection, WITHDRAWN, now_ms)

        found, withdrawn = await self._environment.database.write(write)
        links = self._transport.links()
        for order_id, provider in withdrawn:
            self._withdrawals.add(order_id, provider, links.get(provider))
        for stored, progress in found:
            self._take_up(stored, progress)

    def _take_up(self, stored: records.StoredAgreement, progress: BoughtProgress) -> None:
        own, row = self._identity, stored.row
        if row.chain_seed is None:
            return
        chain = HashChain(row.chain_seed, row.chain_length)
        terms = make_terms(
            stored.order, row.id, stored.quote, stored.provider_key, own.node_id, own.public_key, stored.agreed_ms, row.amount_max
        )
        agreement = ClientAgreement(self._around, terms, chain, progress, None)
        self._open(agreement, row.job)
        link = self._transport.links().get(agreement.peer)
        if link is not None:
            agreement.payments.attach(link)
        if not progress.recalled:
            agreement.payments.end_soon(EndReason.CLIENT_STOPPED)

    async def stop(self) -> None:
        """End every agreement that no job will take up again: last receipts, last cheques; the caller bounds the time."""
        for agreement in self.agreements.values():
            if self._jobs.get(agreement.id) is None:
                agreement.payments.end_soon(EndReason.CLIENT_STOPPED)
        closing = [agreement for agreement in self.agreements.values() if not agreement.is_open]
        while any(agreement.id in self.agreements and agreement.payments.link is not None for agreement in closing):
            await self._ended.heard(inf)

    def status(self) -> list[dict[str, Any]]:
        """Give the open purchases in plain values."""
        return [
            {
                "agreement": short(agreement.id),
                "provider": short(agreement.peer),
                "phase": agreement.machine.phase.value,
                "spent": agreement.spent,
                "at_risk": agreement.at_risk,
                "connected": agreement.payments.link is not None,
            }
            for agreement in self.agreements.values()
        ]


def _document(reply: Any) -> bytes:
    if not isinstance(reply.message, Document):
        raise ProtocolViolation(Reason.WRONG_TYPE, "a document was asked for")
    return reply.message.envelope
