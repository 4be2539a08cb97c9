"""From a node's id to an open link with it: by what is known, then by a lookup, then by the record the node published."""

from collections.abc import Awaitable, Callable, Iterable
from typing import Final

from p2pnode.discovery.dht.asks import LookupOutcome
from p2pnode.discovery.records.address_record import address_key, decode_addresses
from p2pnode.discovery.records.record import open_record
from p2pnode.errors import PeerError, Unreachable
from p2pnode.ids import NodeId, short
from p2pnode.transport.link import Link
from p2pnode.transport.service import TransportService

ADDRESSES_MAX: Final = 8


class Reaching:
    """Opens links by id. known: addresses from the book, the routing table or an offer, best first."""

    def __init__(
        self,
        network_id: bytes,
        transport: TransportService,
        now: Callable[[], float],
        known: Callable[[NodeId], Iterable[str]],
        find_node: Callable[[bytes], Awaitable[LookupOutcome]],
        find_record: Callable[[bytes], Awaitable[LookupOutcome]],
    ) -> None:
        self._network_id = network_id
        self._transport = transport
        self._now = now
        self._known = known
        self._find_node = find_node
        self._find_record = find_record

    async def reach(self, node_id: NodeId) -> Link:
        """Give the open link with a node, or open one. Raises Unreachable, with what was tried."""
        link = self._transport.links().get(node_id)
        if link is not None:
            return link
        tried: dict[str, None] = {}
        failure = "nothing is known of it"
        for addresses_of in (self._from_memory, self._from_lookup, self._from_record):
            fresh = [each for each in await addresses_of(node_id) if each not in tried][:ADDRESSES_MAX]
            if not fresh:
                continue
            tried.update(dict.fromkeys(fresh))
            try:
                return await self._transport.connect(fresh, node_id)
            except PeerError as error:
                failure = str(error)
        raise Unreachable(f"{short(node_id)} cannot be reached: {failure}")

    async def _from_memory(self, node_id: NodeId) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self._known(node_id)))

    async def _from_lookup(self, node_id: NodeId) -> tuple[str, ...]:
        outcome = await self._find_node(node_id)
        return next((contact.addresses for contact in outcome.contacts if contact.node_id == node_id), ())

    async def _from_record(self, node_id: NodeId) -> tuple[str, ...]:
        outcome = await self._find_record(address_key(node_id))
        if not outcome.record:
            return ()
        try:
            return decode_addresses(open_record(outcome.record, self._network_id, self._now()), node_id).addresses
        except PeerError:
            return ()
