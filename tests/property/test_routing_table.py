"""The routing table under any order of events, against what must hold of it whatever happens."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from p2pnode.discovery.dht.routing_table import CLIENT, RoutingTable, place_of
from p2pnode.discovery.diversity import contact_group
from p2pnode.discovery.settings import KademliaSettings
from p2pnode.wire.messages.discovery import Contact

OWN = b"\x5a" * 32
SETTINGS = KademliaSettings(bucket_size=4, replacements_max=3, per_table_group_max=6)
# Few buckets and few networks, so that all of them fill.
buckets = st.sampled_from([256, 255, 254, 250, 12, 3, 2, 1])
networks = st.sampled_from(["8.8.8", "9.9.9", "192.168.1"])
addresses = st.one_of(
    st.builds("{}.{}:1".format, networks, st.integers(1, 250)),
    st.builds("20.{}.{}.1:1".format, st.integers(0, 250), st.integers(0, 250)),
)


@st.composite
def contacts(draw):
    bucket = draw(buckets)
    offset = draw(st.integers(0, min(40, (1 << (bucket - 1)) - 1)))
    place = place_of(OWN) ^ ((1 << (bucket - 1)) + offset)
    return Contact(place.to_bytes(32, "big"), tuple(draw(st.lists(addresses, max_size=2))))


class Tables(RuleBasedStateMachine):
    """Events of any kind in any order; `answering` is what answered us and has not been told to leave since."""

    known = Bundle("known")

    @initialize()
    def begin(self):
        self.table = RoutingTable(OWN, SETTINGS)
        self.now = 0.0
        self.answering = {}

    @rule(target=known, contact=contacts())
    def meet(self, contact):
        before = [entry.contact for entry in self.table.entries()]
        self.table.heard(contact, self.now)
        assert [entry.contact for entry in self.table.entries()] == before, "hearing inserts nobody and moves nobody"
        return contact

    @rule(contact=known)
    def hearsay(self, contact):
        before = {index: list(bucket.replacements) for index, bucket in self.table.buckets()}
        self.table.heard(contact, self.now, is_met=False)
        for index, waiting in before.items():
            after = self.table.bucket(index).replacements
            assert all(each in after for each in waiting), "hearsay displaces nobody"

    @rule(contact=known)
    def answer(self, contact):
        self.now += 1.0
        old = {entry.contact.node_id for entry in self.table.entries()}
        is_in = self.table.answered(contact, self.now)
        assert is_in == (contact.node_id in self.table)
        if is_in:
            self.answering[contact.node_id] = None
            assert self.table.get(contact.node_id).strikes == 0
        gone = old - {entry.contact.node_id for entry in self.table.entries()}
        assert not any(self.table.is_sibling(place_of(node_id)) for node_id in gone), "who makes room is none of the nearest"
        assert len(gone) <= 1

    @rule(contact=known, may_leave=st.booleans())
    def fail(self, contact, may_leave):
        entry = self.table.get(contact.node_id)
        strikes = entry.strikes if entry else 0
        went = self.table.failed(contact.node_id, may_leave)
        assert went == (entry is not None and may_leave and strikes + 1 >= SETTINGS.strikes)

    @rule(contact=known)
    def turn_client(self, contact):
        self.table.remove(contact.node_id, CLIENT)
        self.answering.pop(contact.node_id, None)
        assert contact.node_id not in self.table

    @rule(bucket=buckets)
    def promote(self, bucket):
        candidate = self.table.take_replacement(bucket)
        if candidate is not None:
            assert candidate.node_id not in self.table
            assert len(self.table.bucket(bucket).entries) < SETTINGS.bucket_size

    @rule(place=st.integers(0, (1 << 256) - 1), count=st.integers(1, 12))
    def find(self, place, count):
        found = self.table.closest(place, count, SETTINGS.strikes)
        everybody = sorted((entry.contact for entry in self.table.entries()), key=lambda each: place_of(each.node_id) ^ place)
        assert found == everybody[:count]

    @invariant()
    def only_what_answered_is_inside(self):
        assert all(entry.contact.node_id in self.answering for entry in self.table.entries())
        assert OWN not in self.table

    @invariant()
    def buckets_hold_what_belongs_there_and_no_more_than_allowed(self):
        total = 0
        for index, bucket in self.table.buckets():
            total += len(bucket.entries)
            assert len(bucket.entries) <= 2 * SETTINGS.bucket_size
            assert len(bucket.replacements) <= SETTINGS.replacements_max
            inside = {entry.contact.node_id for entry in bucket.entries}
            assert all((entry.place ^ place_of(OWN)).bit_length() == index for entry in bucket.entries)
            assert not any(contact.node_id in inside for contact in bucket.replacements)
            groups = [entry.group for entry in bucket.entries if entry.group]
            assert all(groups.count(group) <= SETTINGS.per_bucket_group_max for group in groups)
        assert total == len(self.table)

    @invariant()
    def networks_are_counted_right(self):
        groups = [entry.group for entry in self.table.entries() if entry.group]
        assert all(groups.count(group) <= SETTINGS.per_table_group_max for group in groups)
        assert self.table._groups == {group: groups.count(group) for group in groups}
        assert all(entry.group == contact_group(entry.contact) for entry in self.table.entries())
        assert self.table.live() == sum(not entry.strikes for entry in self.table.entries())

    @invariant()
    def siblings_are_exact(self):
        everybody = sorted(entry.place ^ place_of(OWN) for entry in self.table.entries())
        assert self.table.sibling_distances() == everybody[: SETTINGS.bucket_size]


Tables.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestTables = pytest.mark.slow(Tables.TestCase)
