"""The hash table on the real transport: performs what `kademlia.Kademlia` asks for and gives callers async operations.

Requests go over whatever link is open, or over one that is dialled for the purpose and closed when idle; no task is spent
where a link stands. Entering the network and entering it again, from more than one source, is decided here.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import trio

from p2pnode.crypto.keys import Identity
from p2pnode.discovery.addresses import claimed_addresses
from p2pnode.discovery.dht.asker import Answer, Asker
from p2pnode.discovery.dht.asks import Answered, Ask, Effect, Ended, Event, Failed, LookupOutcome, Met, NeedContacts
from p2pnode.discovery.dht.kademlia import Kademlia
from p2pnode.discovery.dht.publishing import Publication
from p2pnode.discovery.records.checks import GuardSettings, RecordChecker, SignatureGuard
from p2pnode.discovery.records.providers import ProviderSettings, ProviderStore
from p2pnode.discovery.records.record import RecordSettings, RecordStore
from p2pnode.discovery.settings import KademliaSettings
from p2pnode.environment import Environment
from p2pnode.errors import Unreachable
from p2pnode.ids import NodeId
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.transport.link import Link
from p2pnode.transport.requests import Incoming
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

Result = TypeVar("Result", LookupOutcome, Publication)

REQUESTS: Final[tuple[type[Message], ...]] = (FindNode, FindRecord, StoreRecord, FindProviders, StoreProvider)
# Those that only ask.
LOOKUPS: Final[tuple[type[Message], ...]] = (FindNode, FindRecord, FindProviders)
ANSWERS: Final[dict[type[Message], type[Message]]] = {
    FindNode: Closest,
    FindRecord: FoundRecord,
    StoreRecord: Done,
    FindProviders: FoundProviders,
    StoreProvider: Done,
}
CONTACT_ADDRESSES_MAX: Final = 4
# Entering again is spaced so that a network that is gone costs one attempt in this time, doubling up to the longest.
JOIN_SECONDS: Final = 2.0
JOIN_SECONDS_MAX: Final = 120.0
# After a partition many lost peers come back at once; one of them leads to all others.
AGAIN_SECONDS: Final = 5.0
# The first self-lookup tells the neighbourhood of us, and clients are not listened to: so it waits a moment for the role.
PATIENCE_SECONDS: Final = 3.0
ENTRY_POINTS_MAX: Final = 12


class _Waiter:
    """A task that waits for an operation."""

    __slots__ = ("done", "outcome")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.outcome: LookupOutcome | Publication | None = None


class DhtService:
    """Drives one Kademlia. entry_points: contacts to enter the network by, from several sources, best first.

    now: seconds of Unix time that never jump. on_deadline: told when `tick` must run earlier than thought. on_needy: told
    whether bootstrap nodes are needed.
    """

    def __init__(
        self,
        environment: Environment,
        identity: Identity,
        network_id: bytes,
        settings: KademliaSettings,
        asker: Asker,
        metrics: Metrics,
        now: Callable[[], float],
        entry_points: Callable[[], Sequence[Contact]],
        on_deadline: Callable[[float], None],
        on_needy: Callable[[bool], None],
    ) -> None:
        self.dht = make_kademlia(environment, identity, network_id, settings, metrics, now())
        self._asker = asker
        self._metrics = metrics
        self._now = now
        self._entry_points = entry_points
        self._on_deadline = on_deadline
        self._on_needy = on_needy
        self._waiters: dict[int, _Waiter] = {}
        self._effects: deque[Effect] = deque()
        self._is_performing = False
        self._wants_entry = False
        self._next_entry = 0.0
        self._last_entry = -math.inf
        self._hold_until = math.inf
        self._last_again = -math.inf
        self._entry_wait = JOIN_SECONDS

    @property
    def deadline(self) -> float:
        """When `tick` should run next."""
        return min(self.dht.deadline, self._next_entry) if self._wants_entry else self.dht.deadline

    def tick(self) -> None:
        """Do what is due."""
        now = self._now()
        if now >= self.dht.deadline:
            self.perform(self.dht.tick(now))
        if self._wants_entry and now >= self._next_entry:
            self._enter(now)

    # --- operations --------------------------------------------------------------------------------------------------

    async def find_node(self, target: bytes, *, region: bool = False) -> LookupOutcome:
        """Give the contacts nearest to a target."""
        return await self._lookup(self.dht.find_node(target, self._now(), region=region))

    async def find_record(self, key: bytes) -> LookupOutcome:
        """Give the best record under a key, as an envelope; empty when nobody has one."""
        return await self._lookup(self.dht.find_record(key, self._now()))

    async def find_providers(self, key: bytes) -> LookupOutcome:
        """Give who said that they provide what a key names."""
        return await self._lookup(self.dht.find_providers(key, self._now()))

    async def publish(self, record: bytes) -> Publication:
        """Store a record, an encoded envelope, near its key; says how many took it."""
        return await self._publication(self.dht.publish(record, self._now()))

    async def provide(self, key: bytes) -> Publication:
        """Say near a key that this node provides what it names; says how many took it."""
        return await self._publication(self.dht.provide(key, self._now()))

    async def _lookup(self, begun: tuple[int, list[Effect]]) -> LookupOutcome:
        outcome = await self._wait(begun)
        if not isinstance(outcome, LookupOutcome):
            raise Unreachable("the lookup ended without an outcome")
        self._metrics.add("lookups_total", "answered" if outcome.contacts else "nobody answered")
        self._metrics.observe("lookup_seconds", outcome.seconds)
        return outcome

    async def _publication(self, begun: tuple[int, list[Effect]]) -> Publication:
        outcome = await self._wait(begun)
        if not isinstance(outcome, Publication):
            raise Unreachable("the publication ended without an outcome")
        return outcome

    async def _wait(self, begun: tuple[int, list[Effect]]) -> LookupOutcome | Publication | None:
        operation_id, effects = begun
        waiter = self._waiters[operation_id] = _Waiter()
        try:
            self.perform(effects)
            await waiter.done.wait()
        finally:
            del self._waiters[operation_id]
            if waiter.outcome is None:
                self.dht.cancel(operation_id)
        return waiter.outcome

    # --- entering the network ----------------------------------------------------------------------------------------

    def enter(self) -> None:
        """Enter the network by whatever entry points there are, now and until the routing table has filled."""
        self._want_entry()

    def enter_again(self, contact: Contact) -> None:
        """Find the other half of a network that was split, by a node that was lost and answers again."""
        now = self._now()
        if now >= self._last_again + AGAIN_SECONDS:
            self._last_again = now
            self.perform(self.dht.bootstrap([contact], now))

    def role_is(self, is_server: bool) -> None:
        """Use the role that was found out; entering need not wait for it any longer."""
        self.dht.is_server = is_server
        self._hold_until = 0.0
        if self._wants_entry:
            self._enter_soon()
        self._on_deadline(self.deadline)

    def _want_entry(self) -> None:
        if not self._wants_entry:
            self._wants_entry = True
            self._on_needy(True)
            self._enter_soon()

    def _enter_soon(self) -> None:
        self._next_entry = max(self._last_entry + JOIN_SECONDS, min(self._hold_until, self._now() + PATIENCE_SECONDS))
        self._on_deadline(self._next_entry)

    def _enter(self, now: float) -> None:
        if not self.dht.needs_bootstrap:
            self._wants_entry, self._entry_wait = False, JOIN_SECONDS
            self._on_needy(False)
            return
        self._last_entry = now
        self._next_entry = now + self._entry_wait
        contacts = list(self._entry_points())[:ENTRY_POINTS_MAX]
        if contacts:
            self._entry_wait = min(JOIN_SECONDS_MAX, self._entry_wait * 2)
            self._metrics.add("bootstraps_total")
            self.perform(self.dht.bootstrap(contacts, now))

    # --- between the machine and the transport -----------------------------------------------------------------------

    def link_up(self, link: Link) -> None:
        """A verified link stands: its peer is a candidate, and the way in where there was none."""
        self.feed(Met(contact_of(link)))
        if self._wants_entry and self.dht.needs_bootstrap:
            self._hold_until = min(self._hold_until, self._now() + PATIENCE_SECONDS)
            self._enter_soon()

    def handle(self, incoming: Incoming) -> bool:
        """Answer one of the hash table's requests at once. Raises Refused or ProtocolViolation for the router to answer."""
        link = incoming.link
        incoming.reply(self.dht.answer(contact_of(link), link.peer.seen_address, incoming.message, self._now()))
        self._on_deadline(self.dht.deadline)
        return True

    def feed(self, event: Event) -> None:
        """Give the machine an event and perform what it wants."""
        self.perform(self.dht.handle(event, self._now()))

    def perform(self, effects: Sequence[Effect]) -> None:
        """Perform effects in order; those that come of performing follow after them."""
        self._effects.extend(effects)
        if self._is_performing:
            return
        self._is_performing = True
        try:
            while self._effects:
                self._perform(self._effects.popleft())
        finally:
            self._is_performing = False
        self._on_deadline(self.deadline)

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Ask():
                self._ask(effect)
            case Ended(operation_id, outcome):
                waiter = self._waiters.get(operation_id)
                if waiter is not None:
                    waiter.outcome = outcome
                    waiter.done.set()
            case NeedContacts():
                self._want_entry()

    def _ask(self, ask: Ask) -> None:
        def on_answer(answer: Answer) -> None:
            if answer.message is not None:
                self.feed(Answered(ask.ask_id, answer.message, answer.address))
            else:
                self.feed(Failed(ask.ask_id, Reason.BUSY if answer.is_ours else answer.reason))

        message, contact = ask.message, ask.contact
        node_id = NodeId(contact.node_id)
        self._asker.ask(node_id, contact.addresses, message, ANSWERS[type(message)], ask.timeout_seconds, on_answer)


def contact_of(link: Link) -> Contact:
    """Give the peer of a link as a contact: where it was reached first, then where it says it listens.

    Kept with the link, because every request on it asks again.
    """
    contact = link.memo
    if not isinstance(contact, Contact):
        peer = link.peer
        claimed = claimed_addresses(peer.addresses, peer.seen_address)
        reached = () if peer.inbound else (peer.seen_address,)
        contact = Contact(peer.node_id, tuple(dict.fromkeys((*reached, *claimed)))[:CONTACT_ADDRESSES_MAX])
        link.memo = contact
    return contact


def make_kademlia(
    environment: Environment, identity: Identity, network_id: bytes, settings: KademliaSettings, metrics: Metrics, now: float
) -> Kademlia:
    """Give the hash table of a node that starts: empty stores, no address yet, a client until others have reached it."""
    guard = SignatureGuard(GuardSettings(), metrics)
    checker = RecordChecker(network_id, guard)
    exempt = not settings.strict_diversity
    records = RecordStore(RecordSettings(exempt_private=exempt), checker.unasked, metrics)
    providers = ProviderStore(ProviderSettings(exempt_private=exempt), environment.entropy.uniform, metrics)
    own = Contact(identity.node_id, ())
    return Kademlia(own, settings, environment.entropy.uniform, records, now, checker.asked, providers)
