"""Lookups through worlds of honest, silent and lying nodes, answered in any order: they end, within bounds, with the truth."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from p2pnode.discovery.dht.lookup import ANSWERED, CANDIDATES_MAX, GROUP_CANDIDATES_MAX, Lookup
from p2pnode.discovery.records.record import CheckedRecord
from p2pnode.discovery.settings import KademliaSettings
from p2pnode.wire.messages.discovery import CONTACTS_MAX, Contact

TARGET = bytes(32)
OWN = b"\xff" * 32
SETTINGS = KademliaSettings(bucket_size=4, region_asks_max=24)


def node(distance, network):
    address = (
        f"{network}.{distance % 250 + 1}:1" if network else f"{20 + distance % 90}.{distance >> 8 & 255}.{distance & 255}.1:1"
    )
    return Contact(distance.to_bytes(32, "big"), (address,))


nodes = st.builds(node, st.integers(1, 5000), st.sampled_from(["", "", "8.8.8", "9.9.9", "192.168.0"]))
lists = st.lists(nodes, max_size=60)


class Lookups(RuleBasedStateMachine):
    """One lookup, driven by whatever comes."""

    @initialize(seeds=lists, radius=st.sampled_from([0, 300]), quorum=st.sampled_from([0, 3]))
    def begin(self, seeds, radius, quorum):
        self.lookup = Lookup(TARGET, OWN, SETTINGS, radius, quorum)
        self.lookup.add_seeds(seeds)
        self.flying = {}
        self.asked = {}
        self.was_over = False

    @rule()
    def go_on(self):
        for candidate in self.lookup.next():
            node_id = candidate.contact.node_id
            assert node_id not in self.asked, "nobody is asked twice"
            assert node_id != OWN
            assert not self.was_over
            self.asked[node_id] = None
            self.flying[node_id] = candidate
        assert len(self.flying) <= SETTINGS.alpha or self.lookup.is_over

    @precondition(lambda self: self.flying)
    @rule(contacts=lists, position=st.integers(0, 100), is_server=st.booleans(), address=st.sampled_from(["", "8.8.8.8:1"]))
    def answer(self, contacts, position, is_server, address):
        node_id = list(self.flying)[position % len(self.flying)]
        candidate = self.flying.pop(node_id)
        self.lookup.answered(node_id, contacts, self.lookup.wanted(candidate), address, is_server)

    @precondition(lambda self: self.flying)
    @rule(position=st.integers(0, 100))
    def fail(self, position):
        node_id = list(self.flying)[position % len(self.flying)]
        del self.flying[node_id]
        self.lookup.failed(node_id)
        assert node_id not in {candidate.contact.node_id for candidate in self.lookup.found()}

    @precondition(lambda self: self.flying)
    @rule(position=st.integers(0, 100), sequence=st.integers(1, 3))
    def hold(self, position, sequence):
        node_id = list(self.flying)[position % len(self.flying)]
        before = self.lookup.best
        self.lookup.holds(node_id, CheckedRecord(TARGET, sequence, 1e12, b"", b"", OWN, bytes([sequence])))
        assert self.lookup.best.sequence >= max(sequence, before.sequence if before else 0)

    @rule(contacts=lists, stranger=nodes)
    def unasked_answer(self, contacts, stranger):
        if stranger.node_id not in self.flying:
            before = self.lookup.unasked()
            self.lookup.answered(stranger.node_id, contacts, CONTACTS_MAX)
            self.lookup.failed(stranger.node_id)
            assert self.lookup.unasked() == before

    @invariant()
    def it_stays_within_bounds(self):
        lookup = self.lookup
        assert {candidate.contact.node_id for candidate in lookup._in_flight} == set(self.flying)
        assert len(lookup._order) <= CANDIDATES_MAX
        assert lookup._order == sorted(lookup._by_distance)
        assert lookup.asked == len(self.asked) <= max(SETTINGS.region_asks_max, 96) + SETTINGS.alpha
        groups = [candidate.group for candidate in lookup._by_distance.values() if candidate.group]
        assert {group: count for group, count in lookup._groups.items() if count} == {each: groups.count(each) for each in groups}
        waiting = [
            candidate.group for candidate in lookup._by_distance.values() if candidate.group and candidate.state != ANSWERED
        ]
        assert all(waiting.count(group) <= GROUP_CANDIDATES_MAX for group in waiting)
        assert not (self.was_over and not lookup.is_over)
        self.was_over = lookup.is_over

    @invariant()
    def the_result_is_in_order_live_and_spread(self):
        found = self.lookup.found()
        distances = [candidate.distance for candidate in found]
        assert distances == sorted(distances)
        assert all(
            candidate.contact.node_id in self.asked and candidate.contact.node_id not in self.flying for candidate in found
        )
        groups = [candidate.group for candidate in found if candidate.group]
        assert all(groups.count(group) <= SETTINGS.result_group_max for group in groups)
        assert sum(distance > self.lookup.radius for distance in distances) <= SETTINGS.bucket_size


Lookups.TestCase.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestLookups = pytest.mark.slow(Lookups.TestCase)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(data=st.data(), size=st.integers(1, 120), dead=st.floats(0, 0.5), radius=st.sampled_from([0, 400]), seed=st.randoms())
def test_in_a_connected_world_the_nearest_live_nodes_are_found_in_any_order_of_answers(data, size, dead, radius, seed):
    """Every node knows its neighbours in distance, so the live nodes are connected unless a run of dead ones is too long."""
    places = sorted(seed.sample(range(1, 5000), size))
    world = [node(place, "") for place in places]
    alive = {contact.node_id: seed.random() >= dead for contact in world}
    live = [contact for contact in world if alive[contact.node_id]]
    lookup = Lookup(TARGET, OWN, KademliaSettings(), radius)
    lookup.add_seeds(world[-8:])
    flying = lookup.next()
    while flying:
        candidate = flying.pop(data.draw(st.integers(0, len(flying) - 1)) if len(flying) > 1 else 0)
        node_id = candidate.contact.node_id
        if alive[node_id]:
            here = world.index(candidate.contact)
            lookup.answered(node_id, world[max(0, here - 12) : here + 4], 16)
        else:
            lookup.failed(node_id)
        flying += lookup.next()
    assert lookup.is_over
    longest = max((len(run) for run in "".join("x" if alive[each.node_id] else " " for each in world).split("x")), default=0)
    if longest < 8:
        found = [candidate.contact for candidate in lookup.found()]
        assert found[:16] == live[:16]
        if radius:
            assert set(found) >= {contact for contact in live if int.from_bytes(contact.node_id, "big") <= radius}
