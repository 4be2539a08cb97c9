"""The market of one node: what it sells, what it buys, and the tasks behind both.

Requests 40-59 and 80-89 come in through `handle`. Calls are answered on the spot; what saves or waits runs in tasks here.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import trio

from p2pnode.crypto.keys import Identity
from p2pnode.environment import Environment
from p2pnode.errors import ProtocolViolation, Refused
from p2pnode.market import records
from p2pnode.market.advertising import Advertising
from p2pnode.market.buying import ClientAgreement
from p2pnode.market.finding import Finding
from p2pnode.market.ledger import NullSettlement, Settlement
from p2pnode.market.model_transfer import ModelDesk
from p2pnode.market.negotiation import OrderTerms
from p2pnode.market.offers import OfferBook, OfferFacts, SignedOffer
from p2pnode.market.pins import Pins
from p2pnode.market.purchasing import Purchasing, SignedQuote
from p2pnode.market.receipt_file import write_bundle
from p2pnode.market.settings import MarketSettings
from p2pnode.market.storefront import Storefront, answered
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.wire.messages.market import (
    DeliverReceipt,
    EndAgreement,
    InputShape,
    OfferRequest,
    PlaceOrder,
    QuoteRequest,
    ResumeAgreement,
    SliceRequest,
    WithdrawCalls,
)
from p2pnode.wire.messages.work import BlobRequest, Call, FetchResult, ManifestRequest
from p2pnode.work.models import ModelStore
from p2pnode.work.service import WorkService

GOODBYE_SECONDS: Final = 4.0
# Requests of all peers together that wait for a disk or another peer.
REQUESTS_WAITING_MAX: Final = 512

REQUESTS: Final = (
    OfferRequest, QuoteRequest, PlaceOrder, DeliverReceipt, EndAgreement, ResumeAgreement, SliceRequest, WithdrawCalls,
    ManifestRequest, BlobRequest, Call, FetchResult,
)  # fmt: skip


class MarketService:
    """Sells and buys work.

    offer_facts: gives what the rest of the node puts into its offer. on_violation: told (node id, reason) when a peer breaks
    the market's rules, so that its score may be lowered.
    """

    def __init__(
        self,
        environment: Environment,
        identity: Identity,
        network_id: bytes,
        settings: MarketSettings,
        metrics: Metrics,
        transport: Any,
        work: WorkService,
        models: ModelStore,
        reputation: Any = None,
        settlement: Settlement | None = None,
        offer_facts: Callable[[], OfferFacts] = OfferFacts,
    ) -> None:
        self.settings = settings
        self.settlement = settlement or NullSettlement()
        self.reputation = reputation
        self.offer_facts = offer_facts
        self.on_violation: Callable[[bytes, Reason], None] = lambda node_id, reason: None
        # Told of a bug met while answering a request; by default it stops the node.
        self.on_bug: Callable[[Any, Exception], None] = _raise
        self._environment = environment
        self._network_id = network_id
        self._metrics = metrics
        self._nursery: trio.Nursery | None = None
        self._waiting = 0
        self._stopping = trio.Event()
        pins = Pins()
        self.holds_link = pins.holds
        self.models = ModelDesk(settings, metrics, models)
        self.storefront = Storefront(
            environment, identity, network_id, settings, metrics, work, self.models, self.settlement,
            lambda: self.offer_facts(), pins, self._violated, self._start,
        )  # fmt: skip
        self.purchasing = Purchasing(
            environment, identity, network_id, settings, metrics, transport, self.models, pins, self._violated, self._start
        )
        self.advertising = Advertising(
            environment, identity, network_id, metrics, self.purchasing.offers, self.own_offer, self.storefront.forget_offer,
            lambda: not (work.admission.is_draining or work.admission.is_paused(environment.clock.monotonic())), self._start,
        )  # fmt: skip
        self.finding = Finding(environment, identity.node_id, transport, self.purchasing.offers, self.advertising.book)
        self._at_once: dict[type, Callable[[Any], None]] = {
            Call: self.storefront.desk.call,
            FetchResult: self.storefront.desk.fetch,
            ManifestRequest: self.models.serve_manifest,
            BlobRequest: self.models.serve_blob,
            DeliverReceipt: self._receipt_arrived,
        }
        self._in_a_task: dict[type, Callable[[Any], Any]] = {
            OfferRequest: self.storefront.answer_offer,
            QuoteRequest: self.storefront.answer_quote,
            PlaceOrder: self.storefront.answer_order,
            ResumeAgreement: self.storefront.answer_resume,
            EndAgreement: self.storefront.answer_end,
            SliceRequest: self.storefront.answer_slice,
            WithdrawCalls: self.storefront.answer_withdrawal,
        }

    # --- life ---------------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take up open agreements, then run until cancelled; cancelled, it takes a few seconds for last receipts and cheques."""
        self._stopping = trio.Event()
        async with trio.open_nursery() as nursery:
            await nursery.start(self._serve)
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._stopping.set()

    async def _serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        try:
            # The shield lets the agreements' tasks finish their last documents; the time for that is bounded below.
            with trio.CancelScope(shield=True):
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    await self.storefront.load()
                    await self.purchasing.load()
                    nursery.start_soon(self.advertising.run)
                    task_status.started()
                    await self._stopping.wait()
                    with trio.move_on_after(GOODBYE_SECONDS):
                        await self.purchasing.stop()
                        await self.storefront.stop()
                    nursery.cancel_scope.cancel()
        finally:
            self._nursery = None

    def _start(self, function: Callable[..., Any], *arguments: Any) -> None:
        if self._nursery is None:
            raise Refused(Reason.SHUTTING_DOWN, "the market is closed")
        try:
            self._nursery.start_soon(function, *arguments)
        except RuntimeError as error:  # its last task has just ended
            raise Refused(Reason.SHUTTING_DOWN, "the market is closed") from error

    def apply(self, settings: MarketSettings) -> None:
        """Use changed settings: prices touch new quotes, limits new requests; open agreements keep their terms."""
        self.settings = self.models.settings = self.purchasing.settings = settings
        self.storefront.apply(settings)
        self.advertising.changed()

    def link_up(self, link: Any) -> None:
        """Tell the market about a new link."""
        self.purchasing.link_up(link)

    def link_down(self, link: Any, reason: Reason) -> None:
        """Tell the market that a link is gone."""
        self.purchasing.link_down(link)
        self.storefront.link_down(link)

    async def reconcile(self) -> None:
        """Wake every agreement's task, so that a missed event is noticed, and prove the books.

        Raises LedgerError when the books do not balance.
        """
        for sale in list(self.storefront.sales.values()):
            if sale.link is not None and sale.link.closed is not None:
                sale.detach(sale.link)
            sale.bell.ring()
        for agreement in list(self.purchasing.agreements.values()):
            payments = agreement.payments
            if payments.link is not None and payments.link.closed is not None:
                payments.detach(payments.link)
            payments.bell.ring()
        await self._environment.database.read(records.check_books)

    # --- requests -----------------------------------------------------------------------------------------------------

    def handle(self, incoming: Any) -> bool:
        """Take a request if it is one of the market's; plain code, called by the link's reader."""
        kind = type(incoming.message)
        at_once = self._at_once.get(kind)
        if at_once is not None:
            at_once(incoming)
            return True
        handler = self._in_a_task.get(kind)
        if handler is None:
            return False
        if self._nursery is None or self._stopping.is_set() or self._waiting >= REQUESTS_WAITING_MAX:
            reason = Reason.BUSY if self._waiting >= REQUESTS_WAITING_MAX else Reason.SHUTTING_DOWN
            incoming.refuse(reason, "")
            return True
        self._nursery.start_soon(self._answer, incoming, handler)
        return True

    async def _answer(self, incoming: Any, handler: Callable[[Any], Any]) -> None:
        self._waiting += 1
        try:
            await answered(incoming, handler, self._violated)
        except Exception as error:  # a bug met while serving a peer costs that link; the node decides
            self.on_bug(incoming, error)
        finally:
            self._waiting -= 1

    def _receipt_arrived(self, incoming: Any) -> None:
        try:
            self.purchasing.receipt_arrived(incoming)
        except Refused as error:
            incoming.refuse(error.reason, error.detail)
        except ProtocolViolation as error:
            # The reason leaves first: a violation may close the link.
            incoming.refuse(error.reason, error.detail)
            self._violated(incoming.link, error.reason)

    def _violated(self, link: Any, reason: Reason) -> None:
        self._metrics.add("violations_total", reason.value)
        if link is not None:
            self.on_violation(link.peer.node_id, reason)

    # --- what the rest of the node uses -------------------------------------------------------------------------------

    async def own_offer(self) -> SignedOffer:
        """Give this node's signed offer. Raises Refused(NOT_SELLING)."""
        return await self.storefront.own_offer()

    @property
    def offers(self) -> OfferBook:
        """The offers of others."""
        return self.purchasing.offers

    async def fetch_offers(self, links: Iterable[Any]) -> Mapping[bytes, SignedOffer]:
        """Ask peers for their offers; gives provider -> offer."""
        return await self.purchasing.fetch_offers(links)

    async def quote(self, link: Any, model_id: bytes, shapes: Sequence[InputShape], numeric_class: str) -> SignedQuote:
        """Ask a provider for a binding price. Raises PeerError."""
        return await self.purchasing.quote(link, model_id, shapes, numeric_class)

    async def order(self, signed: SignedQuote, terms: OrderTerms, job: bytes | None = None) -> ClientAgreement:
        """Order at a quote's price. Raises PeerError."""
        return await self.purchasing.order(signed, terms, job)

    def agreement(self, agreement_id: bytes) -> ClientAgreement | None:
        """Give a standing agreement of ours as a client, from before a restart too, by id."""
        return self.purchasing.agreements.get(agreement_id)

    async def fetch_model(self, link: Any, model_id: bytes) -> None:
        """Have a model here, from this peer if need be. Raises PeerError, WorkError."""
        await self.models.fetch(link, model_id)

    async def receipt(self, agreement_id: bytes, number: int) -> bytes | None:
        """Give the `.receipt` bundle of a call, on either side, or None while it has none."""
        bundle = await self._environment.database.read(
            lambda connection: records.load_bundle(connection, self._network_id, agreement_id, number)
        )
        return None if bundle is None else write_bundle(bundle)

    def status(self) -> dict[str, Any]:
        """Give how the market is, in plain values."""
        return {
            "sales": self.storefront.status(),
            "purchases": self.purchasing.status(),
            "operations_price": self.settings.operations_price,
            "call_price": self.settings.call_price,
            "outputs_kept_bytes": self.storefront.desk.outputs.size_bytes,
            "bound_per_stranger": self.settings.stranger_slice_amount,
        }


def _raise(incoming: Any, error: Exception) -> None:
    raise error
