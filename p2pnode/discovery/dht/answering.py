"""Answering others: the nearest nodes this one vouches for, and what it holds for them. Pure; every answer is given at once."""

from p2pnode.discovery.dht.routing_table import RoutingTable, place_of
from p2pnode.discovery.records.providers import ProviderStore
from p2pnode.discovery.records.record import RecordStore
from p2pnode.errors import ProtocolViolation
from p2pnode.reasons import Reason
from p2pnode.wire.messages.discovery import (
    Closest,
    Contact,
    FindNode,
    FindProviders,
    FindRecord,
    FoundProviders,
    FoundRecord,
    StoreProvider,
    StoreRecord,
)
from p2pnode.wire.messages.session import Done
from p2pnode.wire.registry import Message


class Answerer:
    """The server's half of the hash table: reads table and stores, and takes what others want held."""

    __slots__ = ("_providers", "_records", "_table")

    def __init__(self, table: RoutingTable, records: RecordStore, providers: ProviderStore) -> None:
        self._table = table
        self._records = records
        self._providers = providers

    def answer(self, asker: Contact, seen_address: str, message: Message, is_server: bool, now: float) -> tuple[Message, bool]:
        """Give the answer to a request, and whether the asker calls itself a server.

        Raises Refused as the stores do, and ProtocolViolation for a request that is none of the hash table's, or a bad record.
        """
        if isinstance(message, FindNode):
            return Closest(self._nearest(message.target, message.count, asker), is_server), message.is_server
        if isinstance(message, FindRecord):
            held = self._records.get(message.key, now)
            contacts = self._nearest(message.key, message.count, asker)
            return FoundRecord(held.data if held is not None else b"", contacts, is_server), message.is_server
        if isinstance(message, FindProviders):
            contacts = self._nearest(message.key, message.count, asker)
            return FoundProviders(self._providers.find(message.key, now), contacts, is_server), message.is_server
        if isinstance(message, StoreRecord):
            self._records.put(message.record, asker.node_id, seen_address, now, message.replaces)
            return Done(), message.is_server
        if isinstance(message, StoreProvider):
            self._providers.add(message.key, Contact(asker.node_id, message.addresses), now, seen_address)
            return Done(), message.is_server
        raise ProtocolViolation(Reason.UNKNOWN_MESSAGE, type(message).__name__)

    def _nearest(self, target: bytes, count: int, asker: Contact) -> tuple[Contact, ...]:
        return tuple(self._table.closest(place_of(target), count, but=asker.node_id))
