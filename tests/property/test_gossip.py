"""Gossip under any order, loss, duplication and forgery: nothing forged is held, the newest word wins, bounds hold, and what was
different becomes equal once messages pass again.

Four machines; the rules deliver, lose, repeat and reorder what is under way, change links, publish and forge. Documents carry a
keyed hash in place of a signature.
"""

from hashlib import blake2b

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from p2pnode.discovery.gossip.events import (
    Arrived,
    Connect,
    Failed,
    Gone,
    Learned,
    LinkDown,
    LinkUp,
    NotReached,
    Replied,
    Suspect,
    Tell,
)
from p2pnode.discovery.gossip.gossip import OfferGossip
from p2pnode.discovery.gossip.items import Kind, make_item
from p2pnode.discovery.gossip.settings import GossipSettings
from p2pnode.errors import ProtocolViolation, Refused
from p2pnode.reasons import Reason
from p2pnode.wire.messages.discovery import Contact
from p2pnode.wire.messages.gossip import Announce

NODES = 4
START = 1_790_000_000.0
SETTINGS = GossipSettings(offers_max=6, voices_max=3)
KINDS = (Kind.OFFER, Kind.WITHDRAWAL, Kind.SUSPICION)


def node_id(number):
    return blake2b(b"%d" % number, digest_size=32).digest()


def sign(kind, publisher, subject, sequence, about, expires_ms):
    body = (
        bytes((KINDS.index(kind),))
        + publisher
        + subject
        + b"".join(each.to_bytes(8, "big") for each in (sequence, about, expires_ms))
    )
    return body + blake2b(body, key=publisher, digest_size=16).digest()


def check(data, now_ms):
    body, seal = data[:-16], data[-16:]
    if len(body) != 89 or seal != blake2b(body, key=body[1:33], digest_size=16).digest():
        raise ProtocolViolation(Reason.BAD_SIGNATURE)
    sequence, about, expires_ms = (int.from_bytes(body[at : at + 8], "big") for at in (65, 73, 81))
    if expires_ms <= now_ms:
        raise ProtocolViolation(Reason.EXPIRED)
    return make_item(KINDS[body[0]], body[1:33], body[33:65], sequence, about, expires_ms, data, ("80.1.1.1:1",))


class Gossip(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.now = START
        draws = iter(range(10**9))
        self.contacts = [Contact(node_id(number), (f"80.{number}.1.1:1",)) for number in range(NODES)]
        self.machines = [
            OfferGossip(contact, SETTINGS, lambda: next(draws) * 0.37 % 1.0, check, START) for contact in self.contacts
        ]
        self.links = set()
        self.under_way = []  # (from, to, what): a Tell to be answered, or (ask id, reply) to come back
        self.seen_by_market = [{} for _ in range(NODES)]
        self.sequence = [0] * 8
        self.signed = {}  # (publisher, sequence) -> the one document: who signs two divides the network about itself
        self.held_before = [{} for _ in range(NODES)]
        for number, machine in enumerate(self.machines):
            self.perform(number, machine.handle(Learned(tuple(self.contacts)), self.now))

    # --- performing ---------------------------------------------------------------------------------------------------

    def index(self, ident):
        return next((number for number in range(NODES) if node_id(number) == ident), None)

    def perform(self, number, effects):
        market = self.seen_by_market[number]
        for effect in effects:
            match effect:
                case Tell():
                    self.under_way.append((number, self.index(effect.node_id), effect))
                case Connect(ident):
                    peer = self.index(ident)
                    if peer is None:
                        self.perform(number, self.machines[number].handle(NotReached(ident), self.now))
                    else:
                        self.link(number, peer)
                case Arrived(item):
                    market[item.key] = item
                case Gone(item):
                    assert market[item.key].sequence == item.sequence
                    del market[item.key]
                case Suspect(publisher, sequence, expires_ms):
                    made = round(self.now * 1000)
                    data = sign(Kind.SUSPICION, node_id(number), publisher, made, sequence, expires_ms)
                    self.perform(number, self.machines[number].publish(data, self.now))

    def link(self, one, other):
        if one == other:
            return
        if (min(one, other), max(one, other)) not in self.links:
            self.links.add((min(one, other), max(one, other)))
            self.perform(other, self.machines[other].handle(LinkUp(self.contacts[one]), self.now))
        self.perform(one, self.machines[one].handle(LinkUp(self.contacts[other]), self.now))

    def pass_on(self, place, *, keep=False):
        """Deliver one of the messages under way; keep: it comes a second time later."""
        entry = self.under_way[place] if keep else self.under_way.pop(place)
        source, target, what = entry
        if isinstance(what, Tell):
            if (min(source, target), max(source, target)) not in self.links:
                self.perform(source, self.machines[source].handle(Failed(what.ask_id), self.now))
                return
            try:
                reply, effects = self.machines[target].answer(node_id(source), what.message, self.now)
            except Refused as error:
                self.perform(source, self.machines[source].handle(Failed(what.ask_id, error.reason), self.now))
                return
            self.under_way.append((target, source, (what.ask_id, reply)))
            self.perform(target, effects)
        else:
            self.perform(target, self.machines[target].handle(Replied(*what), self.now))

    # --- rules --------------------------------------------------------------------------------------------------------

    @rule(one=st.integers(0, NODES - 1), other=st.integers(0, NODES - 1))
    def connect(self, one, other):
        self.link(one, other)

    @precondition(lambda self: self.links)
    @rule(data=st.data())
    def disconnect(self, data):
        one, other = data.draw(st.sampled_from(sorted(self.links)))
        self.links.discard((one, other))
        for number, peer in ((one, other), (other, one)):
            self.perform(number, self.machines[number].handle(LinkDown(node_id(peer)), self.now))

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), twice=st.booleans())
    def deliver(self, data, twice):
        self.pass_on(data.draw(st.integers(0, len(self.under_way) - 1)), keep=twice)

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def lose(self, data):
        source, target, what = self.under_way.pop(data.draw(st.integers(0, len(self.under_way) - 1)))
        asker, ask_id = (source, what.ask_id) if isinstance(what, Tell) else (target, what[0])
        self.perform(asker, self.machines[asker].handle(Failed(ask_id), self.now))

    @rule(
        publisher=st.integers(0, 7),
        at=st.integers(0, NODES - 1),
        kind=st.sampled_from((Kind.OFFER, Kind.WITHDRAWAL)),
        step=st.integers(-2, 3),
    )
    def publish(self, publisher, at, kind, step):
        """A publisher signs, newer words mostly, and gives it to any node: as its own, or as a peer would."""
        self.sequence[publisher] = sequence = max(1, self.sequence[publisher] + step)
        ident = node_id(publisher)
        fresh = sign(kind, ident, ident, sequence, sequence, round((self.now + 600) * 1000))
        data = self.signed.setdefault((publisher, sequence), fresh)
        if data != fresh and check(data, 0).expires_ms <= self.now * 1000:
            return
        if publisher == at:
            self.perform(at, self.machines[at].publish(data, self.now))
        else:
            self.perform(at, self.machines[at].answer(ident, Announce(documents=(data,)), self.now)[1])

    @rule(monitor=st.integers(0, 7), publisher=st.integers(0, 7), at=st.integers(0, NODES - 1), about=st.integers(1, 6))
    def accuse(self, monitor, publisher, at, about):
        made = round(self.now * 1000)
        data = sign(Kind.SUSPICION, node_id(monitor), node_id(publisher), made, about, round((self.now + 600) * 1000))
        self.perform(at, self.machines[at].answer(node_id(99), Announce(documents=(data,)), self.now)[1])

    @rule(victim=st.integers(0, 7), at=st.integers(0, NODES - 1), sequence=st.integers(1, 2**40), place=st.integers(0, 104))
    def forge(self, victim, at, sequence, place):
        ident = node_id(victim)
        good = sign(Kind.OFFER, ident, ident, sequence, sequence, round((self.now + 600) * 1000))
        data = good[:place] + bytes((good[place] ^ 1,)) + good[place + 1 :]
        self.perform(at, self.machines[at].answer(node_id(99), Announce(entries=data[:28], documents=(data,)), self.now)[1])

    @rule(seconds=st.sampled_from((0.2, 5.0, 30.0, 400.0)))
    def wait(self, seconds):
        self.now += seconds
        for number, machine in enumerate(self.machines):
            self.perform(number, machine.tick(self.now))

    # --- what must hold -----------------------------------------------------------------------------------------------

    @invariant()
    def nothing_forged_and_nothing_unbounded(self):
        for machine in self.machines:
            items = list(machine.store.items())
            for item in items:
                assert check(item.data, 0) == item
            assert sum(item.kind is not Kind.SUSPICION for item in items) <= SETTINGS.offers_max
            for publisher in range(8):
                assert len(list(machine.store.voices(node_id(publisher)))) <= SETTINGS.voices_max
            assert len(machine.views.active) <= SETTINGS.active_clients_max
            assert set(machine.views.active) <= set(machine.views.linked)
            assert len(machine.views.passive) <= SETTINGS.passive_max

    @invariant()
    def the_newest_word_wins(self):
        for number, machine in enumerate(self.machines):
            before, now_held = self.held_before[number], {item.key: item for item in machine.store.items()}
            for key, item in before.items():
                if item.expires_ms > self.now * 1000 and key in now_held:
                    assert now_held[key].sequence >= item.sequence
                    if item.kind is Kind.WITHDRAWAL and now_held[key].kind is Kind.OFFER:
                        assert now_held[key].sequence > item.sequence, "a tombstone stays until a newer offer"
            self.held_before[number] = now_held

    @invariant()
    def the_market_is_told_exactly_what_is_held(self):
        for number, machine in enumerate(self.machines):
            assert self.seen_by_market[number] == {item.key: item for item in machine.store.items()}

    @invariant()
    def fingerprints_follow_the_contents(self):
        for machine in self.machines:
            mark = 0
            for item in machine.store.items():
                mark ^= item.mark
            assert machine.store.whole() == mark.to_bytes(8, "big")

    def teardown(self):
        """Let everything through from now on: the books of those that are linked become equal."""
        for one in range(NODES):
            for other in range(one):
                self.link(one, other)
        for _ in range(60):
            while self.under_way:
                self.pass_on(0)
            self.wait(5.0)
        books = [{(item.key, item.sequence) for item in machine.store.offers()} for machine in self.machines]
        full = any(
            sum(i.kind is not Kind.SUSPICION for i in machine.store.items()) >= SETTINGS.offers_max for machine in self.machines
        )
        # A full book turns newcomers away, and each node may have filled it with others.
        assert full or all(book == books[0] for book in books)


Gossip.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestGossip = pytest.mark.slow(Gossip.TestCase)
