"""The hash table as one pure machine: table, lookups, upkeep, storing and answering, driven by events and `tick`.

The service (`dht_service.DhtService`) drives it over the real transport, simulations drive it from a heap; nothing here
knows which. Rules and figures: docs/explanation/discovery.md.
"""

from collections.abc import Callable, Sequence
from math import inf
from typing import Final

from p2pnode.crypto.keys import check_puzzle
from p2pnode.discovery.dht.answering import Answerer
from p2pnode.discovery.dht.ask_book import AskBook, Pending
from p2pnode.discovery.dht.asks import Answered, Ask, Effect, Ended, Event, Failed, LookupOutcome, Met, NeedContacts
from p2pnode.discovery.dht.lookup import Lookup
from p2pnode.discovery.dht.network_size import NetworkSize, radius_for
from p2pnode.discovery.dht.operations import (
    CHECKS,
    PUSH,
    CheckOperation,
    Errand,
    LookupOperation,
    Operation,
    PublishOperation,
    Question,
)
from p2pnode.discovery.dht.publishing import Publication, PublishSettings
from p2pnode.discovery.dht.routing_table import WRONG_RECORD, RoutingTable, place_of
from p2pnode.discovery.dht.storing import Storing
from p2pnode.discovery.dht.upkeep import BACKGROUND, FILL, Check, Look, Need, Upkeep, Wish
from p2pnode.discovery.records.providers import ProviderSettings, ProviderStore
from p2pnode.discovery.records.record import CheckRecord, RecordStore
from p2pnode.discovery.settings import KademliaSettings
from p2pnode.errors import ProtocolViolation, Refused
from p2pnode.reasons import Reason
from p2pnode.wire.messages.discovery import (
    CONTACTS_MAX,
    PROVIDERS_MAX,
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

__all__ = [
    "Answered", "Ask", "Effect", "Ended", "Event", "Failed", "Kademlia", "LookupOutcome", "Met", "NeedContacts", "Publication",
]  # fmt: skip

FOUND: Final = (Closest, FoundRecord, FoundProviders)
# A region is drawn for this many times k nodes: the estimate of the network's size errs by a fifth, and 1/sqrt(k) is chance.
REGION_MARGIN: Final = 1.25
# Nodes that a reader hands the newest record to, of those near the key that lacked it.
PUSHES_MAX: Final = 4
# Providers that one lookup collects: more than anybody tries.
PROVIDERS_FOUND_MAX: Final = 3 * PROVIDERS_MAX


class Kademlia:
    """One node's part in the hash table.

    own: this node's id and the addresses others can reach. uniform: a float in [0, 1) each call. records, providers: what
    this node holds for others. check_record: opens the records in answers to our asks. now: seconds of Unix time.
    """

    __slots__ = (
        "_answerer", "_asks", "_check_record", "_is_server", "_last_operation", "_lookups", "_next_late", "_next_lookup_end",
        "_out", "_providers", "_records", "_settings", "_size", "_storing", "_uniform", "_upkeep", "own", "table",
    )  # fmt: skip

    def __init__(
        self,
        own: Contact,
        settings: KademliaSettings,
        uniform: Callable[[], float],
        records: RecordStore,
        now: float,
        check_record: CheckRecord,
        providers: ProviderStore | None = None,
        publish_settings: PublishSettings | None = None,
    ) -> None:
        self.own = own
        self.table = RoutingTable(own.node_id, settings, self._is_acceptable if settings.puzzle_bits else None)
        self._settings = settings
        self._uniform = uniform
        self._records = records
        self._providers = providers or ProviderStore(ProviderSettings(), uniform)
        self._answerer = Answerer(self.table, records, self._providers)
        self._check_record = check_record
        self._is_server = False
        self._asks: AskBook[Operation | None] = AskBook(settings)
        self._upkeep = Upkeep(self.table, settings, uniform, now)
        self._size = NetworkSize()
        self._lookups: dict[int, LookupOperation] = {}
        publishing = publish_settings or PublishSettings(holders=settings.bucket_size)
        self._storing = Storing(self._asks, publishing, settings, records, self._providers, uniform)
        self._next_lookup_end = inf
        self._next_late = inf
        self._last_operation = 0
        self._out: list[Effect] = []

    # --- what callers ask for ------------------------------------------------------------------------------------------

    def find_node(self, target: bytes, now: float, *, region: bool = False) -> tuple[int, list[Effect]]:
        """Find the k nodes nearest to a target; with `region` all nodes where k are expected. Raises Refused(BUSY).

        Gives the id under which `Ended` will report a LookupOutcome, which may be at once, and what to do.
        """
        return self._begin(self._lookup(FindNode, target, now, region), now)

    def find_record(self, key: bytes, now: float, *, region: bool | None = None) -> tuple[int, list[Effect]]:
        """Find the newest record under a key. region: None as set. Raises Refused(BUSY). Ends with a LookupOutcome."""
        operation = self._lookup(FindRecord, key, now, self._settings.region if region is None else region)
        held = self._records.get(key, now)
        if held is not None:
            operation.lookup.holds(self.own.node_id, held)
        return self._begin(operation, now)

    def find_providers(self, key: bytes, now: float) -> tuple[int, list[Effect]]:
        """Find who said that they provide what a key names. Raises Refused(BUSY). Ends with a LookupOutcome."""
        operation = self._lookup(FindProviders, key, now, self._settings.region)
        for contact in self._providers.find(key, now):
            operation.lookup.providers[contact.node_id] = contact
        return self._begin(operation, now)

    def publish(self, record: bytes, now: float) -> tuple[int, list[Effect]]:
        """Store a record, an encoded envelope, near its key. Ends with a Publication.

        Raises Refused(BUSY), and what `check_record` raises for a record that nobody would take.
        """
        checked = self._check_record(record, now)
        operation = self._lookup(FindNode, checked.key, now, self._settings.region)
        operation.errand = Errand(checked.key, checked.sequence, StoreRecord(record, self._is_server))
        return self._begin(operation, now)

    def provide(self, key: bytes, now: float) -> tuple[int, list[Effect]]:
        """Tell the nodes near a key that this node provides what it names. Raises Refused(BUSY). Ends with a Publication."""
        operation = self._lookup(FindNode, key, now, self._settings.region)
        operation.errand = Errand(key, 0, StoreProvider(key, self.own.addresses, self._is_server))
        return self._begin(operation, now)

    def cancel(self, operation_id: int) -> None:
        """Forget an operation; it will not be reported. Answers still under way count as checks."""
        self._lookups.pop(operation_id, None)
        self._storing.cancel(operation_id)

    def bootstrap(self, contacts: Sequence[Contact], now: float) -> list[Effect]:
        """Enter the network by these, beginning with a lookup of our own id: entry points are asked, never believed."""
        joining = next((operation for operation in self._lookups.values() if operation.is_self), None)
        if joining is not None:
            joining.lookup.add_seeds(contacts)
            self._advance(joining, now)
        else:
            self._look(Look(self.own.node_id, True), now, contacts)
        return self._flush()

    # --- state --------------------------------------------------------------------------------------------------------

    @property
    def is_server(self) -> bool:
        """Whether this node says of itself that it answers others; set by its roles."""
        return self._is_server

    @is_server.setter
    def is_server(self, is_server: bool) -> None:
        if is_server and not self._is_server and len(self.table):
            # Those near us have met us as a client only, and keep none.
            self._upkeep.look_soon(0.0)
        self._is_server = is_server

    @property
    def needs_bootstrap(self) -> bool:
        """Whether so few live entries are left that the network must be entered again."""
        return self._upkeep.is_needy

    @property
    def timeout_seconds(self) -> float:
        """How long an ask may take now, by the answers measured."""
        return self._asks.round_trips.timeout_seconds

    @property
    def deadline(self) -> float:
        """When `tick` should run next."""
        return min(self._upkeep.deadline, self._next_lookup_end, self._next_late, self._storing.deadline)

    def network_size(self) -> float:
        """Give the number of servers in the network, estimated from own lookups; this node counts.

        Never fewer than have answered us: in a network of a few dozen the estimate errs by half, and a region drawn for it
        would hold everybody, so that every lookup asked everybody.
        """
        estimate = self._size.estimate(self.table.sibling_distances(), self._settings.bucket_size)
        return max(estimate, self.table.live() + 1.0)

    def why(self, node_id: bytes) -> str:
        """Say in words why a peer is in or out of the table."""
        return self.table.why(node_id)

    # --- events -------------------------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take in what happened and give what to do."""
        if type(event) is Answered:
            pending = self._asks.take(event.ask_id)
            if pending is not None:
                self._asks.round_trips.answered(now - pending.sent_at)
                self._answered(pending, event, now)
        elif type(event) is Failed:
            pending = self._asks.take(event.ask_id)
            if pending is not None:
                self._failed(pending, event.reason, now)
        elif type(event) is Met and (event.is_server is not None or not self._asks.is_asking(event.contact.node_id)):
            self._upkeep.met(event.contact, event.is_server, now)
        return self._flush()

    def tick(self, now: float) -> list[Effect]:
        """Do what is due."""
        if now >= self._next_lookup_end:
            for operation in [operation for operation in self._lookups.values() if operation.deadline <= now]:
                operation.lookup.is_over = True
                self._finish(operation, now)
            self._next_lookup_end = min((operation.deadline for operation in self._lookups.values()), default=inf)
        if now >= self._next_late:
            # Some asks are late: without their answers nothing else would make the lookups go on before the time-out.
            self._next_late = inf
            for operation in list(self._lookups.values()):
                self._advance(operation, now)
        self._out += self._storing.tick(now)
        wishes = self._upkeep.tick(now)
        if wishes:
            for ask_id in self._asks.lost(now):
                lost = self._asks.take(ask_id)
                if lost is not None:
                    self._failed(lost, None, now)
            self._records.expire(now)
            self._providers.expire(now)
            self._grant(wishes, now)
        return self._flush()

    def answer(self, asker: Contact, seen_address: str, message: Message, now: float) -> Message:
        """Answer a request of a verified peer at once. Raises Refused, or ProtocolViolation for what no honest peer sends.

        Whoever asks as a server becomes a candidate for a check, which the next `tick` makes; look at `deadline` after this.
        """
        answer, is_server = self._answerer.answer(asker, seen_address, message, self._is_server, now)
        if asker.node_id != self.own.node_id and not self._asks.is_asking(asker.node_id):
            self._upkeep.met(asker, is_server, now)
        return answer

    # --- lookups ------------------------------------------------------------------------------------------------------

    def _lookup(self, question: Question, target: bytes, now: float, region: bool) -> LookupOperation:
        if len(self._lookups) + len(self._storing) >= self._settings.operations_max:
            raise Refused(Reason.BUSY, "operations_max")
        settings = self._settings
        radius = radius_for(REGION_MARGIN * settings.bucket_size, self.network_size()) if region else 0
        quorum = settings.quorum if question is FindRecord else 0
        lookup = Lookup(target, self.own.node_id, settings, radius, quorum, self._is_acceptable if settings.puzzle_bits else None)
        place = place_of(target)
        lookup.add_seeds(self.table.closest(place, CONTACTS_MAX if region else settings.bucket_size, settings.strikes))
        self.table.touch(place, now)
        self._last_operation += 1
        deadline = now + settings.lookup_seconds
        operation = LookupOperation(self._last_operation, question, lookup, self._is_server, now, deadline)
        self._lookups[operation.operation_id] = operation
        self._next_lookup_end = min(self._next_lookup_end, deadline)
        return operation

    def _begin(self, operation: LookupOperation, now: float) -> tuple[int, list[Effect]]:
        self._advance(operation, now)
        return operation.operation_id, self._flush()

    def _look(self, look: Look, now: float, seeds: Sequence[Contact] = ()) -> None:
        """Make a lookup of our own, unless there are too many."""
        try:
            operation = self._lookup(FindNode, look.target, now, region=False)
        except Refused:
            return
        operation.is_own = True
        operation.is_self = look.is_self
        operation.lookup.add_seeds(seeds)
        self._advance(operation, now)

    def _advance(self, operation: LookupOperation, now: float) -> None:
        for candidate in operation.lookup.next(now, self._asks.round_trips.patience_seconds):
            message, wanted = operation.message(candidate)
            self._out.append(self._asks.ask(candidate.contact, message, operation, wanted, now))
        if operation.lookup.is_over:
            self._finish(operation, now)
        else:
            self._next_late = min(self._next_late, operation.lookup.impatient_at(now, self._asks.round_trips.patience_seconds))

    def _finish(self, operation: LookupOperation, now: float) -> None:
        if self._lookups.pop(operation.operation_id, None) is None:
            return
        size = self._settings.bucket_size
        if not self._lookups:
            self._next_lookup_end = self._next_late = inf
        if operation.is_own:
            # Around our own id the table knows better; and what is left of a lookup that met the dead is not all there are.
            if not operation.is_self and (len(distances := operation.distances()) >= size or not operation.lookup.failures):
                self._size.note(distances, size, now)
            if operation.is_self:
                self._grant(self._upkeep.begin_fill(operation.lookup.unasked(), now), now)
            return
        outcome = operation.outcome(now)
        if operation.errand is not None:
            others = round(self.network_size()) - 1
            holder = self.own if self._is_server else None
            self._out += self._storing.begin(operation.operation_id, operation.errand, outcome.contacts, others, holder, now)
            return
        for contact in operation.lookup.outdated()[:PUSHES_MAX]:
            if len(self._asks) < self._settings.in_flight_max:
                push = StoreRecord(outcome.record, self._is_server)
                self._out.append(self._asks.ask(contact, push, CHECKS[PUSH], 0, now))
        self._out.append(Ended(operation.operation_id, outcome))

    # --- answers and failures -------------------------------------------------------------------------------------------

    def _answered(self, pending: Pending[Operation | None], event: Answered, now: float) -> None:
        owner, contact, message = pending.owner, pending.contact, event.message
        if isinstance(message, FOUND):
            if event.address and event.address != contact.addresses[0]:
                others = tuple(address for address in contact.addresses if address != event.address)
                contact = Contact(contact.node_id, (event.address, *others)[:4])
            self._upkeep.answered(contact, message.is_server, now)
        elif not isinstance(message, Done):
            self._failed(pending, Reason.WRONG_TYPE, now)
            return
        if type(owner) is LookupOperation:
            if owner.operation_id in self._lookups:
                self._looked(owner, pending, event, now)
        elif type(owner) is PublishOperation:
            self._out += self._storing.answered(owner, contact, now)
        elif type(owner) is CheckOperation and owner.kind != PUSH:
            contacts = message.contacts[: pending.wanted] if isinstance(message, Closest) else ()
            self._upkeep.check_ended(owner.kind, contact.node_id)
            if owner.kind == FILL:
                self._grant(self._upkeep.filled(contacts, now), now)
            else:
                self._upkeep.told(contacts, owner.kind == BACKGROUND, now)

    def _looked(self, operation: LookupOperation, pending: Pending[Operation | None], event: Answered, now: float) -> None:
        """An answer for a lookup: take its record or providers, then its contacts."""
        lookup, message, node_id = operation.lookup, event.message, pending.contact.node_id
        if not isinstance(message, FOUND):
            lookup.failed(node_id)
        elif (
            isinstance(message, FoundRecord) and message.record and not self._is_record_good(lookup, node_id, message.record, now)
        ):
            lookup.failed(node_id)
            self.table.remove(node_id, WRONG_RECORD)
        else:
            if isinstance(message, FoundProviders):
                for contact in message.providers:
                    if len(lookup.providers) < PROVIDERS_FOUND_MAX and contact.addresses:
                        lookup.providers.setdefault(contact.node_id, contact)
            lookup.answered(node_id, message.contacts, pending.wanted, event.address, message.is_server)
        self._advance(operation, now)

    def _is_record_good(self, lookup: Lookup, node_id: bytes, data: bytes, now: float) -> bool:
        """Take in a record from an answer; False when no honest holder would have sent it."""
        best = lookup.best
        if best is not None and best.data == data:
            lookup.holds(node_id, best)
            return True
        try:
            record = self._check_record(data, now)
        except Refused:
            return True  # expired on the way, or clocks apart: as good as none
        except ProtocolViolation:
            return False
        if record.key != lookup.target:
            return False
        lookup.holds(node_id, record)
        return True

    def _failed(self, pending: Pending[Operation | None], reason: Reason | None, now: float) -> None:
        owner, contact = pending.owner, pending.contact
        if reason is None or reason is Reason.TOO_SLOW:
            self._asks.round_trips.failed()
        if type(owner) is PublishOperation or owner is CHECKS[PUSH]:
            # A refusal to store says that the node lives.
            if reason is None or reason in (Reason.TOO_SLOW, Reason.CONNECTION_LOST, Reason.WRONG_PEER):
                self._upkeep.failed(contact, reason, now)
        else:
            self._upkeep.failed(contact, reason, now)
        if type(owner) is LookupOperation:
            if owner.operation_id in self._lookups:
                owner.lookup.failed(contact.node_id)
                self._advance(owner, now)
        elif type(owner) is PublishOperation:
            self._out += self._storing.failed(owner, contact, reason, now)
        elif type(owner) is CheckOperation and owner.kind != PUSH:
            self._upkeep.check_ended(owner.kind, contact.node_id)
            if owner.kind == FILL:
                self._grant(self._upkeep.go_on_filling(now), now)

    # --- inside ---------------------------------------------------------------------------------------------------------

    def _grant(self, wishes: Sequence[Wish], now: float) -> None:
        for wish in wishes:
            if type(wish) is Check:
                count = self._settings.bucket_size
                message = FindNode(wish.target, self._is_server, count)
                self._out.append(self._asks.ask(wish.contact, message, CHECKS[wish.kind], count, now))
            elif type(wish) is Look:
                self._look(wish, now)
            elif type(wish) is Need:
                self._out.append(NeedContacts(wish.live))

    def _is_acceptable(self, node_id: bytes) -> bool:
        return check_puzzle(node_id, self._settings.puzzle_bits)

    def _flush(self) -> list[Effect]:
        out, self._out = self._out, []
        return out
