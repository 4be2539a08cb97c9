"""Finding providers among everything that is known to be on sale: searches for people, and links for those about to buy.

What is known is what gossip has brought, and what linked peers have told when asked. What this node knows of the providers
beside their offers comes from layers above, through `peer_fields`.
"""

from collections.abc import Awaitable, Callable, Mapping
from math import inf
from typing import Any, Final

import trio

from p2pnode.environment import Environment
from p2pnode.errors import PeerError
from p2pnode.market.listings import Listed, ListingBook, make_listing
from p2pnode.market.offers import OfferBook
from p2pnode.market.query import LIMIT_MAX, Answer, Fields, Search

REACH_SECONDS: Final = 10.0


class Finding:
    """Looks through the books. own: this node's id, which is never found.

    peer_fields: set by the node; gives, for one search, what this node knows of a peer. reach: set by the node; gives a link to
    a peer, opening one if need be, or raises PeerError.
    """

    def __init__(self, environment: Environment, own: bytes, transport: Any, offers: OfferBook, listings: ListingBook) -> None:
        self.peer_fields: Callable[[], Fields] = lambda: lambda peer: {}
        self.reach: Callable[[bytes], Awaitable[Any]] | None = None
        self._environment = environment
        self._own = own
        self._transport = transport
        self._offers = offers
        self._listings = listings

    def listings(self) -> list[Listed]:
        """Give every offer of others that stands: as gossip brought it, else as the provider told on a link that stands."""
        now_ms = self._environment.clock.wall_ms()
        known = [listed for listed in self._listings.current(now_ms) if listed.provider != self._own]
        linked = self._transport.links()
        asked = [
            Listed(provider, make_listing(signed.offer))
            for provider, signed in self._offers.current(now_ms).items()
            if provider in linked and self._listings.get(provider) is None
        ]
        return [*known, *asked]

    def listed(self, provider: bytes) -> Listed | None:
        """Give one provider's listing."""
        return self._listings.get(provider)

    def addresses(self, provider: bytes) -> tuple[str, ...]:
        """Give where a provider says it can be dialled: a hint."""
        listed = self._listings.get(provider)
        return listed.listing.addresses if listed is not None else ()

    def price_hint(self, provider: bytes) -> float:
        """Give the price that a provider lists, micro-credits per 10^9 operations; infinite while none is known."""
        listed = self._listings.get(provider)
        return inf if listed is None else listed.listing.price

    def search(
        self, query: str, order: str = "", *, limit: int = 50, explain: bool = False, use_default: bool = True
    ) -> Answer:  # fmt: skip
        """Search all offers. Raises QueryError."""
        search = Search(query, order, use_default=use_default)
        return search.run(
            self.listings(), self.peer_fields(), self._environment.clock.wall_ms(), limit=limit, explain=explain
        )  # fmt: skip

    async def links(
        self, linked: Mapping[Any, Any], numeric_class: str, is_wanted: Callable[[bytes], bool], wanted: int
    ) -> dict[bytes, Any]:
        """Give links to the `wanted` cheapest providers that the safe filter leaves, beside those that stand.

        linked: the links that stand. Bounded in time; who cannot be reached is left out. Cancelled: links that were opened stay
        until they are idle.
        """
        if self.reach is None:
            return {}
        chosen: list[bytes] = []
        for found in self.search("", "price", limit=LIMIT_MAX).found:
            listed = found.listed
            if len(chosen) < wanted and numeric_class in listed.listing.classes and is_wanted(listed.provider):
                chosen.append(listed.provider)
        reached: dict[bytes, Any] = {}

        async def one(provider: bytes, reach: Callable[[bytes], Awaitable[Any]]) -> None:
            try:
                reached[provider] = await reach(provider)
            except PeerError:
                return  # It is gone, or nobody can dial it: the monitors will find out, too.

        with trio.move_on_after(REACH_SECONDS):
            async with trio.open_nursery() as nursery:
                for provider in chosen:
                    if provider not in linked:
                        nursery.start_soon(one, provider, self.reach)
        return reached
