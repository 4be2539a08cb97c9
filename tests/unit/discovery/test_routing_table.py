"""The routing table, rule by rule (docs/explanation/discovery.md). Ids are chosen by distance: node n of bucket b."""

import pytest

from p2pnode.discovery.dht import routing_table
from p2pnode.discovery.dht.routing_table import RoutingTable, place_of
from p2pnode.discovery.settings import KademliaSettings
from p2pnode.wire.messages.discovery import Contact

OWN = bytes(32)
SETTINGS = KademliaSettings()


def node(bucket, number=0, address=None):
    """A node whose distance from OWN has `bucket` bits; each in its own /24 unless told otherwise."""
    distance = (1 << (bucket - 1)) + number
    return Contact(distance.to_bytes(32, "big"), (address or f"{20 + bucket % 60}.{number >> 8}.{number & 255}.1:1",))


def table(**settings):
    return RoutingTable(OWN, KademliaSettings(**settings))


def full(*, buckets=(256,), extra=()):
    """Sixteen near nodes, so that nothing farther is a sibling, and a full bucket for each of `buckets`."""
    made = table()
    for number in range(16):
        assert made.answered(node(100, number), 0.0)
    for bucket in buckets:
        for number in range(16):
            assert made.answered(node(bucket, number), float(number))
    for contact in extra:
        made.answered(contact, 50.0)
    return made


def test_rule_1_a_full_bucket_keeps_its_old_live_entries_and_caches_the_newcomer():
    made = full()
    newcomer = node(256, 99)
    assert not made.answered(newcomer, 100.0)
    assert newcomer.node_id not in made
    assert made.why(newcomer.node_id) == routing_table.WAITING
    assert [entry.contact for entry in made.bucket(256).entries] == [node(256, number) for number in range(16)]


def test_rule_1_the_replacement_cache_is_bounded_and_forgets_the_longest_unmet():
    made = full()
    for number in range(100, 110):
        assert not made.heard(node(256, number), 1.0)
    made.heard(node(256, 102), 2.0)
    waiting = [contact.node_id for contact in made.bucket(256).replacements]
    assert waiting == [node(256, number).node_id for number in (103, 104, 105, 106, 107, 108, 109, 102)]


def test_rule_1_hearsay_displaces_nobody_in_the_cache():
    made = full()
    for number in range(100, 108):
        made.heard(node(256, number), 1.0)
    made.heard(node(256, 120), 1.0, is_met=False)
    assert node(256, 120) not in made.bucket(256).replacements


def test_rule_1_three_strikes_in_a_row_and_out():
    made = full()
    victim = node(256, 3).node_id
    assert [made.failed(victim) for _ in range(2)] == [False, False]
    made.answered(node(256, 3), 10.0)
    assert [made.failed(victim) for _ in range(3)] == [False, False, True]
    assert victim not in made
    assert made.why(victim) == routing_table.SILENT


def test_rule_1_a_replacement_is_given_out_for_a_check_and_counts_only_when_it_answered():
    made = full()
    made.heard(node(256, 99), 1.0)
    assert made.take_replacement(256) is None, "there is no room yet"
    for _ in range(3):
        made.failed(node(256, 3).node_id)
    candidate = made.take_replacement(256)
    assert candidate == node(256, 99)
    assert candidate.node_id not in made
    assert made.answered(candidate, 2.0)
    assert len(made.bucket(256).entries) == 16


def test_rule_1_nobody_leaves_while_nobody_at_all_answers():
    made = full()
    for _ in range(5):
        assert not made.failed(node(256, 3).node_id, may_leave=False)
    assert node(256, 3).node_id in made
    assert made.live() == 31
    made.answered(node(256, 3), 5.0)
    assert made.live() == 32


def test_rule_2_only_the_own_range_has_room_for_more_than_k():
    """Buckets are told apart by the length of the common prefix: the whole far half of the key space is one bucket."""
    made = full(buckets=(256, 255, 254))
    assert [(index, len(bucket.entries)) for index, bucket in made.buckets()] == [(100, 16), (254, 16), (255, 16), (256, 16)]


def test_rule_2_the_k_nearest_are_exact_whatever_the_bucket_holds():
    """A bucket full of far nodes takes a nearer one in when it is among the k nearest of all."""
    made = table()
    far = [node(250, 1000 + number) for number in range(16)]
    for contact in far:
        made.answered(contact, 0.0)
    near = [node(250, number) for number in range(10)]
    for contact in near:
        assert made.heard(contact, 1.0), "worth a check though its bucket is full"
        assert made.answered(contact, 1.0)
    assert made.siblings() == near + far[:6]
    assert not made.answered(node(250, 5000), 2.0), "what is no sibling meets a full bucket"
    assert len(made.bucket(250).entries) <= 17


def test_rule_2_siblings_that_are_overtaken_make_room_again():
    made = table()
    for number in reversed(range(64)):
        made.answered(node(250, number), 0.0)
    assert made.siblings() == [node(250, number) for number in range(16)]
    assert len(made.bucket(250).entries) <= 17


def test_rule_3_what_was_only_heard_of_is_never_inserted_or_relayed():
    made = table()
    assert made.heard(node(256, 1), 0.0)
    assert len(made) == 0
    assert made.closest(place_of(node(256, 1).node_id), 16) == []


def test_rule_3_a_node_that_failed_lately_is_not_relayed_though_it_stays():
    made = full()
    suspect = node(256, 3)
    made.failed(suspect.node_id)
    assert suspect not in made.closest(place_of(suspect.node_id), 16)
    assert suspect in made.closest(place_of(suspect.node_id), 1, SETTINGS.strikes), "own lookups may still try it"
    made.answered(suspect, 1.0)
    assert suspect in made.closest(place_of(suspect.node_id), 1)


def test_a_struck_entry_that_speaks_to_us_is_worth_a_check_but_hearsay_is_not():
    made = full()
    made.failed(node(256, 3).node_id)
    assert made.heard(node(256, 3), 1.0)
    assert not made.heard(node(256, 3), 1.0, is_met=False)
    assert not made.heard(node(256, 4), 1.0)


def test_rule_9_two_of_one_network_in_a_bucket():
    made = table()
    crowd = [node(256, number, f"8.8.8.{number + 1}:1") for number in range(4)]
    assert [made.answered(contact, 0.0) for contact in crowd] == [True, True, False, False]
    assert made.why(crowd[2].node_id) == routing_table.BUCKET_GROUP
    assert not made.heard(crowd[3], 0.0)
    assert made.answered(node(255, 0, "8.8.8.77:1"), 0.0), "another bucket has room for it"
    made.remove(crowd[0].node_id, routing_table.CLIENT)
    assert made.answered(crowd[3], 1.0)


def test_rule_9_ten_of_one_network_in_the_table():
    made = table()
    taken = sum(made.answered(node(256 - number // 2, number, f"8.8.8.{number + 1}:1"), 0.0) for number in range(40))
    assert taken == 10
    assert made.why(node(256 - 20, 39).node_id) in (routing_table.UNKNOWN, routing_table.TABLE_GROUP)
    assert not made.heard(node(3, 0, "8.8.8.250:1"), 0.0)
    assert made.why(node(3, 0).node_id) == routing_table.TABLE_GROUP


def test_rule_9_one_network_cannot_fill_a_replacement_cache():
    made = full()
    for number in range(100, 120):
        made.heard(node(256, number, f"8.8.8.{number}:1"), 1.0)
    assert len(made.bucket(256).replacements) == 2


@pytest.mark.parametrize(("strict", "taken"), [(False, 12), (True, 2)])
def test_rule_9_a_lan_is_exempt_unless_strict(strict, taken):
    made = table(strict_diversity=strict)
    assert sum(made.answered(node(256, number, f"192.168.1.{number + 1}:1"), 0.0) for number in range(12)) == taken


def test_rule_9_moving_to_a_crowded_network_is_not_believed():
    made = table()
    for number in range(2):
        made.answered(node(256, number, f"8.8.8.{number + 1}:1"), 0.0)
    made.answered(node(256, 7), 0.0)
    made.answered(node(256, 7, "8.8.8.99:1"), 1.0)
    assert made.get(node(256, 7).node_id).contact == node(256, 7)
    moved = node(256, 7, "9.9.9.9:1")
    made.answered(moved, 2.0)
    assert made.get(moved.node_id).contact == moved
    assert made.answered(node(256, 8, node(256, 7).addresses[0]), 3.0), "its old network was counted down"


def test_ids_without_the_puzzle_and_contacts_without_an_address_stay_out():
    made = RoutingTable(OWN, SETTINGS, is_acceptable=lambda node_id: node_id[-1] == 0)
    assert made.answered(node(256, 0), 0.0)
    assert not made.answered(node(256, 1), 0.0)
    assert made.why(node(256, 1).node_id) == routing_table.NO_PUZZLE
    hidden = Contact(node(256, 256).node_id, ())
    assert not made.heard(hidden, 0.0)
    assert made.why(hidden.node_id) == routing_table.NO_ADDRESS
    assert not made.heard(Contact(OWN, ("8.8.8.8:1",)), 0.0)
    assert made.why(OWN) == routing_table.OWN


def test_closest_is_in_order_of_distance_for_any_target():
    made = full(buckets=(256, 255, 254, 120))
    contacts = [entry.contact for entry in made.entries()]
    for target in (0, 1 << 255, 3 << 254, 7 << 253, (1 << 256) - 1, (1 << 254) + 12345, 1 << 119, 5 << 97):
        expected = sorted(contacts, key=lambda contact, target=target: place_of(contact.node_id) ^ target)
        assert made.closest(target, 24) == expected[:24]
    asker = made.closest(0, 1)[0]
    assert asker not in made.closest(0, 24, but=asker.node_id)


def test_rule_8_anchors_are_those_that_lived_longest():
    made = full()
    made.failed(node(100, 0).node_id)
    assert made.anchors() == [node(100, 1), node(100, 2), node(100, 3), node(100, 4)]


def test_why_is_remembered_for_a_bounded_number():
    made = table()
    for number in range(1000):
        made.remove(node(256, number).node_id, routing_table.CLIENT)
    assert made.why(node(256, 999).node_id) == routing_table.CLIENT
    assert made.why(node(256, 1).node_id) == routing_table.UNKNOWN
    assert made.answered(node(256, 999), 0.0)
    assert made.why(node(256, 999).node_id) == routing_table.IN_TABLE
    made.failed(node(256, 999).node_id)
    assert made.why(node(256, 999).node_id) == routing_table.STRUCK
