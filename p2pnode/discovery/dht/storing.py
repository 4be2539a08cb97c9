"""Sending records and provider notices to the nodes that lookups found. Pure; one `PublishMachine` for each publication."""

from collections.abc import Callable, Sequence
from math import inf

from p2pnode.discovery.dht.ask_book import AskBook
from p2pnode.discovery.dht.asks import Effect, Ended
from p2pnode.discovery.dht.operations import Errand, Operation, PublishOperation
from p2pnode.discovery.dht.publishing import PublishMachine, PublishSettings
from p2pnode.discovery.dht.routing_table import place_of
from p2pnode.discovery.records.providers import ProviderStore
from p2pnode.discovery.records.record import RecordStore
from p2pnode.discovery.settings import KademliaSettings
from p2pnode.errors import Refused
from p2pnode.reasons import Reason
from p2pnode.wire.messages.discovery import Contact, StoreRecord


class Storing:
    """The publications under way."""

    __slots__ = ("_asks", "_open", "_providers", "_publishing", "_records", "_settings", "_uniform")

    def __init__(
        self,
        asks: AskBook[Operation | None],
        publishing: PublishSettings,
        settings: KademliaSettings,
        records: RecordStore,
        providers: ProviderStore,
        uniform: Callable[[], float],
    ) -> None:
        self._asks = asks
        self._publishing = publishing
        self._settings = settings
        self._records = records
        self._providers = providers
        self._uniform = uniform
        self._open: dict[int, PublishOperation] = {}

    def __len__(self) -> int:
        return len(self._open)

    @property
    def deadline(self) -> float:
        """When `tick` has something to do."""
        return min((operation.machine.deadline for operation in self._open.values()), default=inf) if self._open else inf

    def begin(
        self, operation_id: int, errand: Errand, contacts: Sequence[Contact], others: int, holder: Contact | None, now: float
    ) -> list[Effect]:
        """Store with these contacts, nearest first. others: nodes there are beside us. holder: ourselves, if a server."""
        machine = PublishMachine(errand.key, errand.sequence, contacts, others, self._publishing, self._uniform)
        operation = self._open[operation_id] = PublishOperation(operation_id, errand, machine)
        if holder is not None and self._is_near(errand.key, holder, contacts):
            self._hold(errand, holder, now)
        return self._advance(operation, now)

    def answered(self, operation: PublishOperation, contact: Contact, now: float) -> list[Effect]:
        """A node holds it now."""
        if operation.operation_id not in self._open:
            return []
        operation.machine.answered(contact.node_id, now)
        return self._advance(operation, now)

    def failed(self, operation: PublishOperation, contact: Contact, reason: Reason | None, now: float) -> list[Effect]:
        """A node refused or did not answer."""
        if operation.operation_id not in self._open:
            return []
        operation.machine.failed(contact.node_id, reason, now)
        return self._advance(operation, now)

    def tick(self, now: float) -> list[Effect]:
        """Try again where it is due."""
        effects: list[Effect] = []
        for operation in list(self._open.values()):
            if operation.machine.deadline <= now:
                effects += self._advance(operation, now)
        return effects

    def cancel(self, operation_id: int) -> None:
        """Forget a publication; what was sent stays sent."""
        self._open.pop(operation_id, None)

    def _advance(self, operation: PublishOperation, now: float) -> list[Effect]:
        machine = operation.machine
        effects: list[Effect] = []
        while waiting := machine.next(now):
            for contact in waiting:
                if len(self._asks) < self._settings.in_flight_max:
                    effects.append(self._asks.ask(contact, operation.errand.message, operation, 0, now))
                else:
                    machine.failed(contact.node_id, Reason.BUSY, now)
        if machine.is_over and self._open.pop(operation.operation_id, None) is not None:
            effects.append(Ended(operation.operation_id, machine.publication))
        return effects

    def _is_near(self, key: bytes, holder: Contact, contacts: Sequence[Contact]) -> bool:
        place, size = place_of(key), self._settings.bucket_size
        if len(contacts) < size:
            return True
        return place_of(holder.node_id) ^ place < place_of(contacts[size - 1].node_id) ^ place

    def _hold(self, errand: Errand, holder: Contact, now: float) -> None:
        """This node is one of those that should hold it."""
        try:
            if isinstance(errand.message, StoreRecord):
                self._records.put(errand.message.record, holder.node_id, "", now)
            else:
                self._providers.add(errand.key, holder, now)
        except Refused:
            return  # the own store is full, or has a newer one; the others are asked all the same
