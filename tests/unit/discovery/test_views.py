"""Who a node gossips with: small symmetric views that repair themselves and that nobody can fill cheaply."""

from p2pnode.discovery.gossip.events import Connect, Disconnect
from p2pnode.discovery.gossip.settings import GossipSettings
from p2pnode.discovery.gossip.views import AGAIN_SECONDS, JOIN, LEAVE, SHUFFLE, URGENT, Joined, Left, Views, Wish
from p2pnode.wire.messages.discovery import Contact
from p2pnode.wire.messages.gossip import SAMPLE_MAX, Neighbour, Neighbours

NOW = 1000.0
SETTINGS = GossipSettings()


def contact(number, network=None):
    return Contact(bytes([number]) * 32, (f"80.{number if network is None else network}.1.{number}:9470",))


def views(settings=SETTINGS, own=None):
    draws = iter(range(10**9))
    return Views(own or contact(250), settings, lambda: next(draws) * 0.37 % 1.0, NOW)


def join(machine, number, network=None, **about):
    """Let a peer link up and ask to become a neighbour."""
    peer = contact(number, network) if about.get("is_server", True) else Contact(bytes([number]) * 32, ())
    machine.link_up(peer, NOW)
    return machine.asked(peer.node_id, Neighbour(about.get("wish", JOIN), about.get("is_server", True)), NOW)


def test_a_lonely_node_dials_a_hint_and_asks_urgently():
    machine = views()
    assert machine.deadline > NOW + 100, "nobody to ask"
    machine.learn([contact(1)])
    assert machine.tick(NOW) == [Connect(contact(1).node_id, contact(1).addresses)]
    assert machine.link_up(contact(1), NOW) == [Wish(contact(1).node_id, Neighbour(URGENT, True))]
    assert machine.answered(contact(1).node_id, URGENT, Neighbours(True), NOW) == [Joined(contact(1).node_id, True)]
    machine.learn([contact(2)])
    machine.tick(NOW + 5)
    assert machine.link_up(contact(2), NOW + 5) == [Wish(contact(2).node_id, Neighbour(JOIN, True))]


def test_a_hint_that_leads_nowhere_is_dropped():
    machine = views()
    machine.learn([contact(1)])
    machine.tick(NOW)
    machine.not_reached(contact(1).node_id)
    assert not machine.passive
    machine.learn([contact(2)])
    machine.tick(NOW + 5)
    machine.tick(NOW + 5 + SETTINGS.connect_seconds)
    assert not machine.passive, "no answer within the time is no better"


def test_who_turned_us_down_is_left_alone_for_a_while():
    machine = views()
    machine.link_up(contact(1), NOW)
    assert machine.tick(NOW) == [Wish(contact(1).node_id, Neighbour(URGENT, True))]
    assert machine.answered(contact(1).node_id, URGENT, Neighbours(False, (contact(2),)), NOW) == [Disconnect(contact(1).node_id)]
    assert list(machine.passive) == [contact(1).node_id, contact(2).node_id], "its sample helps"
    asked = {effect.node_id for second in range(2, 50) for effect in machine.tick(NOW + second)}
    assert asked == {contact(2).node_id}
    machine.not_reached(contact(2).node_id)
    assert machine.tick(NOW + AGAIN_SECONDS + 2)[0].node_id == contact(1).node_id


def test_a_full_view_turns_a_joiner_down_and_makes_room_for_an_urgent_one():
    machine = views()
    for number in range(1, SETTINGS.active_max + 1):
        assert join(machine, number) == (Neighbours(True), [Joined(contact(number).node_id, False)])
    reply, effects = join(machine, 7)
    assert not reply.is_neighbour
    assert reply.sample, "others to try"
    assert not effects
    reply, effects = join(machine, 8, wish=URGENT)
    assert reply.is_neighbour
    assert [type(effect) for effect in effects] == [Left, Wish, Disconnect, Joined]
    assert effects[1].message == Neighbour(LEAVE)
    assert len(machine.active) == SETTINGS.active_max


def test_nodes_that_nobody_can_dial_find_more_room():
    machine = views()
    accepted = [join(machine, number, is_server=False)[0].is_neighbour for number in range(1, 40)]
    assert sum(accepted) == SETTINGS.active_clients_max
    assert not machine.passive, "and are no hints for others"


def test_two_of_one_network_at_most():
    machine = views()
    accepted = []
    for number in range(1, 6):
        peer = Contact(bytes([number]) * 32, (f"80.1.1.{number}:9470",))
        machine.link_up(peer, NOW)
        accepted.append(machine.asked(peer.node_id, Neighbour(JOIN, True), NOW)[0].is_neighbour)
    assert accepted == [True, True, False, False, False]
    for number in range(6, 10):
        peer = Contact(bytes([number]) * 32, (f"10.0.0.{number}:9470",))
        machine.link_up(peer, NOW)
        assert machine.asked(peer.node_id, Neighbour(JOIN, True), NOW)[0].is_neighbour, "a household shares one network"


def test_a_lost_neighbour_is_replaced():
    machine = views()
    join(machine, 1)
    machine.learn([contact(2)])
    assert machine.link_down(contact(1).node_id, NOW) == [Left(contact(1).node_id)]
    assert machine.deadline <= NOW + 1
    assert [effect.node_id for effect in machine.tick(NOW + 1)] == [contact(2).node_id]


def test_shuffles_exchange_samples_and_find_out_one_sided_friendships():
    machine = views()
    join(machine, 1)
    machine.learn([contact(number) for number in range(2, 40)])
    assert len(machine.passive) == SETTINGS.passive_max
    for _ in range(200):
        (wish,) = [effect for effect in machine.tick(machine.deadline) if isinstance(effect, Wish)] or [None]
        if wish is not None and wish.message.wish == SHUFFLE:
            break
    assert wish.node_id == contact(1).node_id
    assert wish.message.sample[0] == machine.own
    assert len(wish.message.sample) == SAMPLE_MAX
    assert contact(1) not in wish.message.sample
    assert machine.answered(contact(1).node_id, SHUFFLE, Neighbours(False), NOW) == [Left(contact(1).node_id)]


def test_leaving_ends_it_on_both_sides():
    machine = views()
    join(machine, 1)
    reply, effects = machine.asked(contact(1).node_id, Neighbour(LEAVE), NOW)
    assert not reply.is_neighbour
    assert effects == [Left(contact(1).node_id)]


def test_only_a_linked_peer_becomes_a_neighbour():
    machine = views()
    assert machine.asked(contact(1).node_id, Neighbour(JOIN, True), NOW)[0].is_neighbour is False
    assert machine.answered(contact(2).node_id, JOIN, Neighbours(True), NOW) == []
    assert not machine.active


def test_a_peer_from_a_part_that_was_lost_takes_a_place_in_a_full_view():
    machine = views()
    for number in range(1, SETTINGS.active_max + 1):
        join(machine, number)
    machine.link_up(contact(9), NOW)
    effects = machine.adopt(contact(9).node_id, NOW)
    assert [type(effect) for effect in effects] == [Left, Wish, Disconnect, Wish]
    assert effects[-1] == Wish(contact(9).node_id, Neighbour(URGENT, True))
    assert machine.answered(contact(9).node_id, URGENT, Neighbours(True), NOW) == [Joined(contact(9).node_id, True)]
