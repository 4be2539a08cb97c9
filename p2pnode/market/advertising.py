"""This node's offer where others find it: listed when it sells, renewed when it changes or half its life is over, taken back
when it stops selling; and the listings of others, as gossip brings them.

Gossip itself is below, in discovery: it is reached by `publish` and heard through `heard`. A withdrawal takes its sequence
when the listing is signed, so that it can be signed and sent at once when the node stops.
"""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

import trio

from p2pnode.crypto.keys import Identity
from p2pnode.discovery.gossip.events import Arrived, Gone, Republish, Suspect
from p2pnode.discovery.gossip.items import Kind
from p2pnode.environment import Environment
from p2pnode.errors import ProtocolViolation, Refused
from p2pnode.market import records
from p2pnode.market.bell import Bell
from p2pnode.market.listings import ListingBook, make_listing, seal_listing, seal_suspicion, seal_withdrawal
from p2pnode.market.offers import OFFER_LIFE_MS_MAX, OfferBook, SignedOffer
from p2pnode.metrics import Metrics

# How often the offer is compared with what the node is now. Gossip takes one update in ten seconds from a publisher.
CHECK_SECONDS: Final = 15.0


class Advertising:
    """The market's side of gossip.

    offers: those that were asked for; a withdrawal takes them away, too. own_offer: gives the signed offer or raises Refused.
    forget_offer: makes it be signed anew. is_open: whether the owner takes work now. start: runs an async function in the
    service's nursery.
    """

    def __init__(
        self,
        environment: Environment,
        identity: Identity,
        network_id: bytes,
        metrics: Metrics,
        offers: OfferBook,
        own_offer: Callable[[], Awaitable[SignedOffer]],
        forget_offer: Callable[[], None],
        is_open: Callable[[], bool],
        start: Callable[..., None],
    ) -> None:
        self.book = ListingBook()
        # Set by the node: spreads a signed document; without it nothing is listed and nobody is asked.
        self.publish: Callable[[bytes], None] | None = None
        # Set by the node: where it may be dialled, and whether strangers have done so.
        self.place: Callable[[], tuple[tuple[str, ...], bool]] | None = None
        self._environment = environment
        self._identity = identity
        self._network_id = network_id
        self._metrics = metrics
        self._offers = offers
        self._own_offer = own_offer
        self._forget_offer = forget_offer
        self._is_open = is_open
        self._start = start
        self._bell = Bell()
        self._is_closed = False
        # What is listed now: the offer's hash and the place; and the withdrawal kept ready for it.
        self._listed: tuple[bytes, tuple[tuple[str, ...], bool]] | None = None
        self._withdrawal: tuple[int, int] | None = None

    async def run(self) -> None:
        """Keep the listing as the offer is, until cancelled."""
        self._is_closed = False
        while True:
            if self.publish is not None and not self._is_closed:
                await self._advertise()
            await self._bell.heard(trio.current_time() + CHECK_SECONDS)

    def changed(self) -> None:
        """Look soon whether the listing still fits."""
        self._bell.ring()

    def close(self) -> None:
        """Take the offer back at once and list none again: the node stops."""
        self._is_closed = True
        self._withdraw()

    def heard(self, news: Arrived | Gone | Suspect | Republish) -> None:
        """Take what gossip says, in order; never waits."""
        match news:
            case Arrived(item):
                self.book.put(item)
                if item.kind is Kind.WITHDRAWAL:
                    self._offers.remove((item.publisher,))
            case Gone(item):
                self.book.remove(item)
            case Suspect(publisher, sequence, expires_ms):
                now_ms = self._environment.clock.wall_ms()
                self._send(
                    "suspicion", seal_suspicion(publisher, sequence, expires_ms, now_ms, self._identity, self._network_id)
                )  # fmt: skip
            case Republish(above):
                with suppress(Refused):  # the market closes, and takes the offer back by itself
                    self._start(self._outbid, above)
        self._metrics.set("offers_known", len(self.book))

    # --- inside -------------------------------------------------------------------------------------------------------

    async def _advertise(self) -> None:
        try:
            offer = await self._own_offer() if self._is_open() else None
        except Refused:
            offer = None
        if offer is None:
            self._withdraw()
            return
        place = self.place() if self.place is not None else (tuple(offer.offer.addresses), True)
        if self._listed == (offer.document, place):
            return
        if self._listed is not None and self._listed[0] == offer.document:
            # The same offer from another place: it needs a sequence of its own.
            self._forget_offer()
            offer = await self._own_offer()
        reserved = await self._environment.database.write(records.next_offer_sequence)
        if self._is_closed:
            return
        listing = make_listing(offer.offer, place[0], reachable=place[1])
        self._listed, self._withdrawal = (offer.document, place), (reserved, listing.expires_ms)
        self._send("listing", seal_listing(listing, self._identity, self._network_id))

    def _withdraw(self) -> None:
        if self._withdrawal is None:
            return
        (sequence, expires_ms), self._withdrawal, self._listed = self._withdrawal, None, None
        self._forget_offer()
        self._send("withdrawal", seal_withdrawal(sequence, expires_ms, self._identity, self._network_id))

    async def _outbid(self, above: int) -> None:
        """Sign above what the network holds of this node: it is suspected, or an older data folder has been put back."""
        await self._environment.database.write(lambda connection: records.raise_offer_sequence(connection, above))
        self._forget_offer()
        if self._listed is None and not self._is_closed and self.book.get(self._identity.node_id) is not None:
            reserved = await self._environment.database.write(records.next_offer_sequence)
            self._withdrawal = reserved, self._environment.clock.wall_ms() + OFFER_LIFE_MS_MAX
        self._listed = None
        self.changed()

    def _send(self, kind: str, document: bytes) -> None:
        if self.publish is None:
            return
        self._metrics.add("offer_documents_signed_total", kind)
        try:
            self.publish(document)
        except ProtocolViolation as error:
            # Our own clock or settings are beyond what others accept; the offer is signed again at the next look.
            self._metrics.add("limit_hits_total", f"own_{kind}_{error.reason.value}")
            self._listed = None
