"""News between neighbours: a tree that prunes itself, and entries that repair it."""

from p2pnode.discovery.gossip.items import Kind, make_item
from p2pnode.discovery.gossip.settings import GossipSettings
from p2pnode.discovery.gossip.spreading import Spreading
from p2pnode.wire.messages.gossip import DOCUMENTS_MAX, Announce

NOW = 1000.0
A, B, C = (bytes([number]) * 32 for number in (1, 2, 3))
SETTINGS = GossipSettings()


def item(number, sequence=1, size=400):
    publisher = bytes([number % 256, number // 256]) * 16
    return make_item(Kind.OFFER, publisher, publisher, sequence, sequence, 10**13, b"x" * size)


def spreading(*neighbours):
    machine = Spreading(SETTINGS)
    for node_id in neighbours:
        machine.add(node_id)
    return machine


def test_news_go_to_every_tree_neighbour_but_where_they_came_from():
    machine = spreading(A, B, C)
    machine.news(item(1), A, NOW)
    assert not machine.due(NOW)
    assert machine.deadline == NOW + SETTINGS.push_seconds
    assert machine.due(NOW + 1) == [(node_id, Announce(documents=(item(1).data,))) for node_id in (B, C)]
    assert not machine.due(NOW + 99)
    assert machine.deadline == float("inf")


def test_a_pruned_link_gets_entries_later_and_a_grafted_one_documents_again():
    machine = spreading(A)
    machine.prune(A)
    machine.news(item(1), None, NOW)
    assert not machine.due(NOW + 1)
    assert machine.due(NOW + SETTINGS.digest_seconds) == [(A, Announce(item(1).entry))]
    machine.graft(A)
    machine.news(item(2), None, NOW)
    assert machine.due(NOW + 1) == [(A, Announce(documents=(item(2).data,)))]


def test_what_waits_when_a_link_is_pruned_becomes_an_entry():
    machine = spreading(A)
    machine.news(item(1), None, NOW)
    machine.prune(A)
    assert not machine.due(NOW + 1)
    assert machine.due(machine.deadline) == [(A, Announce(item(1).entry))]


def test_who_has_named_an_item_is_not_told_of_it():
    machine = spreading(A, B)
    machine.prune(B)
    machine.news(item(1, 3), None, NOW)
    machine.knows(A, item(1).key, 3)
    machine.knows(B, item(1).key, 2)
    assert machine.due(NOW + 99) == [(B, Announce(item(1, 3).entry))], "an older word is not this one"


def test_only_the_newest_of_a_place_travels():
    machine = spreading(A)
    machine.news(item(1, 1), None, NOW)
    machine.news(item(1, 2, 300), None, NOW)
    assert machine.due(NOW + 1) == [(A, Announce(documents=(item(1, 2, 300).data,)))]


def test_many_news_leave_in_messages_of_bounded_size():
    machine = spreading(A)
    machine.push(A, [item(number) for number in range(200)], NOW)
    sizes = []
    while due := machine.due(NOW):
        sizes.append(len(due[0][1].documents))
    assert sum(sizes) == 200
    assert max(sizes) == DOCUMENTS_MAX
    machine.push(A, [item(number, size=4000) for number in range(20)], NOW)
    assert len(machine.due(NOW)[0][1].documents) == 12, "48 kB"


def test_a_neighbour_that_left_is_told_nothing():
    machine = spreading(A)
    machine.news(item(1), None, NOW)
    machine.remove(A)
    machine.push(A, [item(2)], NOW)
    assert not machine.due(NOW + 99)
