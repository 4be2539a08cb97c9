"""Networks of gossip machines on a heap: how fast news travel, what rest costs, what failures and forgers change."""

import pytest

from p2pnode.discovery.gossip.events import Arrived, Compare, Failed, Learned, LinkUp, Replied, Republish, Tell, Violated
from p2pnode.discovery.gossip.gossip import OfferGossip
from p2pnode.discovery.gossip.items import Kind
from p2pnode.discovery.gossip.settings import GossipSettings
from p2pnode.errors import Refused
from p2pnode.reasons import Reason
from p2pnode.sim.gossip_swarm import GossipSwarm, plain_check, plain_document
from p2pnode.wire.messages.discovery import Contact
from p2pnode.wire.messages.gossip import Announce, Neighbour, Neighbours, Reconcile, Wanted
from p2pnode.wire.messages.session import Done

NOW = 1_790_000_000.0


def grown(nodes, seed=1, clients=0.0, **options):
    """Let a network grow, each new node knowing a few servers, and come to rest."""
    swarm = GossipSwarm(seed, **options)
    for _ in range(nodes):
        servers = [node.index for node in swarm.nodes if node.contact.addresses]
        is_server = len(servers) < 3 or swarm.random.random() >= clients
        swarm.add(is_server=is_server, known=swarm.random.sample(servers, min(5, len(servers))))
        swarm.run(0.1)
    swarm.run(40)
    return swarm


def suspected_by(swarm, index):
    publisher = swarm.nodes[index].contact.node_id
    return sum(node.machine.is_suspected(publisher, swarm.now) for node in swarm.nodes if node.is_up)


def test_twenty_nodes_hold_each_others_offers_and_a_withdrawal_reaches_all():
    swarm = grown(20)
    assert [len(node.machine.store) for node in swarm.nodes] == [20] * 20
    gone = swarm.withdraw(4)
    assert swarm.run_until(lambda: swarm.holders(gone) == 20, 10) < 5
    assert [len(list(node.machine.store.offers())) for node in swarm.nodes] == [19] * 20
    assert sum(node.violations for node in swarm.nodes) == 0


@pytest.mark.slow
def test_two_hundred_nodes_news_in_seconds_and_little_traffic_at_rest():
    swarm = grown(200)
    assert all(len(node.machine.store) == 200 for node in swarm.nodes)
    neighbours = [len(node.machine.views.active) for node in swarm.nodes]
    assert 2 <= min(neighbours) <= max(neighbours) <= 8
    swarm.run(60)
    for node in swarm.nodes:
        node.sent_bytes = node.handshake_bytes = 0
    swarm.run(300)
    rest = sum(node.sent_bytes + node.handshake_bytes for node in swarm.nodes) / 200 / 300
    assert rest < 320, "bytes a second and node; a thousand nodes measured 830"
    tree = sum(node.machine._spreading.is_tree(peer) for node in swarm.nodes for peer in node.machine.views.active) / 200
    assert 1.8 < tree < 2.6, "links on the tree are about two a node: no document crosses many links twice"
    for _ in range(3):
        item = swarm.publish(swarm.random.randrange(200))
        assert swarm.run_until(lambda item=item: swarm.holders(item) >= 198, 30) <= 10
        swarm.run(11)
    assert sum(node.violations for node in swarm.nodes) == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_dead_node_is_suspected_by_all_within_a_minute_and_nobody_else_is(seed):
    swarm = grown(60, seed)
    swarm.run(120)
    assert [suspected_by(swarm, index) for index in range(60)] == [0] * 60
    swarm.crash(17, notice_seconds=60.0)
    took = swarm.run_until(lambda: suspected_by(swarm, 17) == 59, 90)
    assert took <= 60
    swarm.run(120)
    assert [suspected_by(swarm, index) for index in range(60) if index != 17] == [0] * 59
    swarm.restart(17, known=[1, 2, 3])
    assert swarm.run_until(lambda: suspected_by(swarm, 17) == 0, 60) < 15, "a newer sequence answers suspicion"


@pytest.mark.slow
def test_four_fifths_that_nobody_can_dial_take_part_all_the_same():
    swarm = grown(80, clients=0.8)
    swarm.run(60)
    assert all(len(node.machine.store) == 80 for node in swarm.nodes)
    assert min(len(node.machine.views.active) for node in swarm.nodes) >= 2
    swarm.run(120)
    assert [suspected_by(swarm, index) for index in range(80)] == [0] * 80
    dead = next(node.index for node in swarm.nodes if not node.contact.addresses)
    swarm.crash(dead, notice_seconds=20.0)
    assert swarm.run_until(lambda: suspected_by(swarm, dead) >= 79, 90) <= 60


@pytest.mark.slow
def test_after_a_healed_partition_there_is_one_book_within_two_minutes():
    swarm = grown(60, loss=0.02)
    swarm.partition([range(30), range(30, 60)])
    swarm.run(300)
    one, other = swarm.publish(3), swarm.publish(40)
    gone = swarm.withdraw(5)
    swarm.run(60)
    assert swarm.holders(one) <= 30
    assert suspected_by(swarm, 40) >= 28, "each half thinks the other dead"
    swarm.heal()
    # What discovery does: one lost peer is tried now and then, and found again.
    for index in range(3):
        swarm.connect(index, 30 + index)
        swarm.later(1.0, lambda index=index: swarm.feed(index, Compare(swarm.nodes[30 + index].contact.node_id)))
    assert swarm.run_until(lambda: all(swarm.holders(each) == 60 for each in (one, other, gone)), 120) <= 30
    assert swarm.run_until(lambda: not any(suspected_by(swarm, index) for index in range(60)), 120) <= 120
    news = swarm.publish(50)
    assert swarm.run_until(lambda: swarm.holders(news) == 60, 60) <= 20


@pytest.mark.slow
def test_half_the_nodes_die_and_the_rest_goes_on():
    swarm = grown(80)
    for index in range(0, 80, 2):
        swarm.crash(index, notice_seconds=5.0)
    swarm.run(20)
    news = swarm.publish(1)
    assert swarm.run_until(lambda: swarm.holders(news) == 40, 60) <= 20
    dead = [node.index for node in swarm.nodes if not node.is_up]
    assert swarm.run_until(lambda: sum(suspected_by(swarm, index) >= 39 for index in dead) >= 38, 180) <= 120


# --- one machine against peers that a test plays ----------------------------------------------------------------------


class Player:
    """One machine; its peers are numbers that say what a test lets them say."""

    def __init__(self, **settings):
        self.check = plain_check()
        self.now = NOW
        self.own = Contact(self.id(0), ("80.0.1.1:1",))
        draws = iter(range(10**9))
        self.machine = OfferGossip(self.own, GossipSettings(**settings), lambda: next(draws) * 0.37 % 1.0, self.check, NOW)

    @staticmethod
    def id(number):
        return bytes([number]) * 32

    def document(self, number, sequence=1, kind=Kind.OFFER, about=None, subject=None, life=1800):
        about = sequence if about is None else about
        expires_ms = round((NOW + life) * 1000)
        subject = self.id(number if subject is None else subject)
        return plain_document(kind, self.id(number), subject, sequence, about, expires_ms, f"80.0.{number}.1:1")

    def link(self, number):
        return self.machine.handle(LinkUp(Contact(self.id(number), (f"80.0.{number}.1:1",))), self.now)

    def neighbour(self, number):
        self.link(number)
        reply, _ = self.machine.answer(self.id(number), Neighbour("join", True), self.now)
        assert reply.is_neighbour

    def tell(self, number, *documents, entries=b""):
        return self.machine.answer(self.id(number), Announce(entries, documents), self.now)

    def tick(self, seconds):
        """Let time pass; gives (peer number, message) of what was told."""
        told, end = [], self.now + seconds
        while self.machine.deadline <= end:
            self.now = max(self.now, self.machine.deadline)
            told += [(effect.node_id[0], effect.message) for effect in self.machine.tick(self.now) if isinstance(effect, Tell)]
        self.now = end
        return told


def test_a_forged_document_is_neither_held_nor_passed_on_and_its_bringer_reported():
    player = Player()
    player.neighbour(1)
    player.neighbour(2)
    good, late = player.document(5), player.document(6)
    reply, effects = player.tell(1, good, b"forged", late)
    assert [effect.item.publisher for effect in effects if isinstance(effect, Arrived)] == [player.id(5)]
    assert Violated(player.id(1), Reason.BAD_SIGNATURE) in effects
    assert player.machine.store.get(player.id(6)) is None, "nothing that follows a forgery is looked at"
    assert [message.documents for number, message in player.tick(1) if number == 2] == [(good,)]
    assert reply == Wanted()


def test_a_repeated_document_prunes_and_an_entry_that_is_missed_grafts():
    player = Player()
    player.neighbour(1)
    player.neighbour(2)
    assert player.tell(1, player.document(5))[0] == Wanted()
    player.tick(1)
    assert player.tell(2, player.document(5))[0] == Wanted(is_repeat=True)
    assert player.machine._spreading.is_tree(player.id(1))
    assert not player.machine._spreading.is_tree(player.id(2))
    missed = player.check(player.document(6), 0)
    reply, _ = player.tell(2, entries=missed.entry)
    assert reply == Wanted(missed.key[:8])
    assert player.machine._spreading.is_tree(player.id(2))
    assert player.tell(1, entries=missed.entry)[0] == Wanted(), "it is not asked of two at once"
    player.tick(6)
    assert player.tell(1, entries=missed.entry)[0] == Wanted(missed.key[:8]), "but again when it did not come"


def test_an_expired_document_is_dropped_without_blame():
    player = Player()
    player.neighbour(1)
    _, effects = player.tell(1, player.document(5, life=-1))
    assert effects == []
    assert len(player.machine.store) == 0


def test_a_peer_that_brings_only_what_is_known_is_soon_not_looked_at():
    player = Player()
    player.neighbour(1)
    known = player.document(5)
    for _ in range(12):
        player.tell(1, *([known] * 64))
    player.tell(1, player.document(6))
    assert player.machine.store.get(player.id(6)) is None
    player.now += 60
    player.tell(1, player.document(6))
    assert player.machine.store.get(player.id(6)) is not None


def test_a_suspicion_of_somebody_unassigned_is_ignored():
    player = Player(monitors_trusted=2)
    player.neighbour(1)
    player.tell(1, *(player.document(number) for number in range(1, 31)))
    trusted = [number for number in range(1, 31) if player.machine.watch.is_assigned(player.id(number), player.id(9), NOW)]
    outsider = next(number for number in range(1, 31) if number not in trusted and number != 9)
    for monitor in (outsider, 9, 99):
        player.tell(1, player.document(monitor, 1, Kind.SUSPICION, 1, 9))
    assert not list(player.machine.store.voices(player.id(9)))
    player.tell(1, player.document(trusted[0], 1, Kind.SUSPICION, 1, 9))
    assert len(list(player.machine.store.voices(player.id(9)))) == 1


def test_a_node_that_hears_it_is_suspected_is_asked_to_sign_again():
    player = Player()
    player.neighbour(1)
    player.machine.publish(player.document(0, 4), NOW)
    player.tell(1, player.document(1), player.document(2))
    _, effects = player.tell(1, player.document(1, 1, Kind.SUSPICION, 4, 0))
    assert Republish(4) in effects
    _, effects = player.tell(1, player.document(2, 1, Kind.SUSPICION, 4, 0))
    assert Republish(4) not in effects, "once is enough"


def test_a_node_that_lost_its_memory_is_told_its_last_sequence():
    player = Player()
    player.neighbour(1)
    _, effects = player.tell(1, player.document(0, 7))
    assert Republish(7) in effects
    assert player.machine.publish(player.document(0, 3), NOW) == [Republish(7)]
    player.now += 11
    effects = player.machine.publish(player.document(0, 8), player.now)
    assert [effect.item.sequence for effect in effects if isinstance(effect, Arrived)] == [8]


def test_an_update_too_soon_after_others_leaves_when_it_may():
    player = Player()
    player.neighbour(1)
    for sequence in range(1, 6):
        player.machine.publish(player.document(0, sequence), player.now)
    assert player.machine.store.get(player.id(0)).sequence == 3
    documents = [document for _, message in player.tick(30) for document in getattr(message, "documents", ())]
    assert documents[-1] == player.document(0, 5)


def test_a_lost_push_is_repeated_as_an_entry():
    player = Player()
    player.neighbour(1)
    player.machine.publish(player.document(5), NOW)
    player.now += 1
    pushes = [effect for effect in player.machine.tick(player.now) if getattr(effect.message, "documents", ())]
    assert [push.message.documents for push in pushes] == [(player.document(5),)]
    player.machine.handle(Failed(pushes[0].ask_id), player.now)
    assert (1, Announce(player.check(player.document(5), 0).entry)) in player.tick(1)


def test_an_answer_of_another_kind_is_a_violation():
    player = Player()
    (wish,) = player.link(1) or player.machine.tick(NOW)
    assert isinstance(wish.message, Neighbour)
    assert player.machine.handle(Replied(wish.ask_id, Done()), NOW) == [Violated(player.id(1), Reason.WRONG_TYPE)]
    assert player.machine.handle(Replied(wish.ask_id, Neighbours(True)), NOW) == [], "an answer counts once"


def test_what_is_no_gossip_is_refused():
    with pytest.raises(Refused):
        Player().machine.answer(Player.id(1), Done(), NOW)


def test_an_orderly_stop_says_what_was_not_said_yet_and_goodbye():
    player = Player()
    player.neighbour(1)
    player.machine.publish(player.document(0, 2, Kind.WITHDRAWAL), NOW)
    told = [effect.message for effect in player.machine.bye(NOW)]
    assert told == [Announce(documents=(player.document(0, 2, Kind.WITHDRAWAL),)), Neighbour("leave")]


def test_a_new_neighbour_is_compared_with_at_once():
    player = Player()
    player.machine.handle(Learned((Contact(player.id(1), ("80.0.1.1:1",)),)), NOW)
    player.machine.tick(NOW)
    (wish,) = player.link(1)
    (question,) = player.machine.handle(Replied(wish.ask_id, Neighbours(True)), NOW)
    assert isinstance(question.message, Reconcile)
