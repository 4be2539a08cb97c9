"""Who watches whom, whose word counts, and what a liar can do."""

from hashlib import blake2b
from itertools import pairwise

import pytest

from p2pnode.discovery.gossip.items import ItemStore, Kind, make_item
from p2pnode.discovery.gossip.monitoring import Accuse, Attend, Monitoring, Roll, Try
from p2pnode.discovery.gossip.settings import GossipSettings

NOW = 1_790_000_000.0
SETTINGS = GossipSettings()


def node(number):
    return blake2b(b"%d" % number, digest_size=32).digest()


def offer(publisher, sequence=1, addresses=("80.1.2.3:1",)):
    expires_ms = round((NOW + 1800) * 1000)
    return make_item(Kind.OFFER, publisher, publisher, sequence, sequence, expires_ms, b"%d" % sequence, addresses)


class Watch:
    """One node's monitoring over a book of offers of nodes 0 to count - 1; it is node `own`."""

    def __init__(self, count, own=0, hidden=()):
        self.store = ItemStore(SETTINGS)
        self.machine = Monitoring(node(own), self.store, SETTINGS)
        self.now = NOW
        for number in range(count):
            self.take(offer(node(number), addresses=() if number in hidden else ("80.1.2.3:1",)))

    def take(self, item):
        _, dropped = self.store.put(item, self.now)
        self.machine.arrived(item, dropped, self.now)

    def suspect(self, monitor, publisher, about=1):
        made = round(self.now * 1000)
        self.take(make_item(Kind.SUSPICION, monitor, publisher, made, about, round((NOW + 1800) * 1000), b"s"))

    def run(self, seconds, alive=lambda publisher: True):
        """Let time pass; gives what was effected, trials answered at once."""
        effects, end = [], self.now + seconds
        while self.machine.deadline <= end:
            self.now = max(self.now, self.machine.deadline)
            todo = self.machine.tick(self.now)
            while todo:
                effect = todo.pop(0)
                effects.append((self.now, effect))
                if isinstance(effect, Try):
                    todo += self.machine.tried(effect.publisher, alive(effect.publisher), self.now)
        self.now = end
        return effects


@pytest.mark.parametrize("count", [1, 5, 200])
def test_the_nearest_by_xor_are_those_of_a_full_scan(count):
    roll = Roll()
    for number in range(count):
        assert roll.add(node(number))
        assert not roll.add(node(number))
    for place in (int.from_bytes(node(number + 999), "big") for number in range(30)):
        everybody = sorted((node(number) for number in range(1, count)), key=lambda each: int.from_bytes(each, "big") ^ place)
        assert roll.nearest(place, 6, node(0)) == everybody[:6]
    assert roll.discard(node(0))
    assert not roll.discard(node(0))


@pytest.mark.slow
def test_three_act_for_each_publisher_and_everybody_agrees_who():
    watches = [Watch(60, own) for own in range(60)]
    for watch in watches:
        watch.run(10)
    watched = [publisher for watch in watches for publisher in watch.machine.watched()]
    assert all(watched.count(node(number)) == 3 for number in range(60))
    assert all(node(own) not in watches[own].machine.watched() for own in range(60)), "nobody watches itself"
    for own, watch in enumerate(watches):
        for publisher in watch.machine.watched():
            assert all(other.machine.is_assigned(node(own), publisher, NOW) for other in watches)


def test_a_living_publisher_is_tried_every_twenty_seconds_and_a_dead_one_accused_in_time():
    watch = Watch(30)
    watch.run(25)
    effects = watch.run(200)
    tried = {}
    for when, effect in effects:
        tried.setdefault(effect.publisher, []).append(when)
    assert tried
    gaps = [after - before for times in tried.values() for before, after in pairwise(times)]
    assert all(gap == pytest.approx(SETTINGS.probe_seconds) for gap in gaps)
    dead, died_at = next(iter(tried)), watch.now
    accused = [(when, each) for when, each in watch.run(60, lambda each: each != dead) if isinstance(each, Accuse)]
    assert {each.offer.publisher for _, each in accused} == {dead}
    assert accused[0][0] - died_at <= SETTINGS.probe_seconds + SETTINGS.tries * SETTINGS.retry_seconds


def test_one_missed_answer_is_forgiven():
    watch = Watch(30)
    watch.run(25)
    flaky = next(iter(watch.machine.watched()))
    answers = iter([False, False, True] * 20)
    assert not [each for _, each in watch.run(200, lambda each: each != flaky or next(answers)) if isinstance(each, Accuse)]


def test_two_assigned_voices_hide_and_a_newer_sequence_shows_again():
    watch = Watch(60)
    publisher = node(7)
    monitors = [node(number) for number in range(60) if watch.machine.is_assigned(node(number), publisher, NOW)]
    assert 12 <= len(monitors) <= 20, "trusted now, with those of the epochs beside"
    watch.suspect(monitors[0], publisher)
    assert not watch.machine.is_suspected(publisher, watch.now)
    watch.suspect(monitors[1], publisher)
    assert watch.machine.is_suspected(publisher, watch.now)
    watch.take(offer(publisher, 2))
    assert not watch.machine.is_suspected(publisher, watch.now)


def test_where_only_one_can_watch_one_voice_is_enough():
    watch = Watch(2, own=1)
    watch.suspect(node(1), node(0))
    assert watch.machine.is_suspected(node(0), watch.now)


def test_a_monitor_that_cries_wolf_is_not_listened_to():
    watch = Watch(60)
    publisher = node(7)
    liars = [node(number) for number in range(60) if watch.machine.is_assigned(node(number), publisher, NOW)][:2]
    hidden = []
    for sequence in range(1, 7):
        for liar in liars:
            watch.suspect(liar, publisher, sequence)
        hidden.append(watch.machine.is_suspected(publisher, watch.now))
        watch.now += 15
        watch.take(offer(publisher, sequence + 1))
    assert hidden == [True] * 3 + [False] * 3
    late = Watch(60)
    for sequence in range(1, 6):
        for liar in liars:
            late.suspect(liar, publisher, sequence)
        late.now += 120
        late.take(offer(publisher, sequence + 1))
    late.suspect(liars[0], publisher, 6)
    late.suspect(liars[1], publisher, 6)
    assert late.machine.is_suspected(publisher, late.now), "an answer after minutes proves nothing against the monitors"


def test_a_suspected_monitor_is_replaced_by_the_next():
    watches = {own: Watch(40, own) for own in range(40)}
    for watch in watches.values():
        watch.run(10)
    publisher = node(3)
    acting = [own for own, watch in watches.items() if publisher in watch.machine.watched()]
    others = [own for own in watches if own not in acting and own != 3]
    for watch in watches.values():
        watch.suspect(node(others[0]), node(acting[0]))
        watch.run(10)
    now_acting = [own for own, watch in watches.items() if publisher in watch.machine.watched()]
    assert acting[0] not in now_acting
    assert len(now_acting) == 3


def test_who_cannot_be_dialled_comes_to_its_monitors_and_is_accused_only_once_seen():
    watch = Watch(30, own=5, hidden=(5,))
    attended = {effect.node_id for _, effect in watch.run(25) if isinstance(effect, Attend)}
    assert len(attended) == 3
    assert not list(watch.machine.watched()), "and watches nobody"
    monitor = next(number for number in range(30) if node(number) in attended)
    watch = Watch(30, own=monitor, hidden=(5,))
    watch.run(10, lambda each: each != node(5))
    assert node(5) in watch.machine.watched()
    never = watch.run(200, lambda each: each != node(5))
    assert not [effect for _, effect in never if isinstance(effect, Accuse)]
    watch.machine.seen(node(5), watch.now)
    lost = watch.run(60, lambda each: each != node(5))
    assert {effect.offer.publisher for _, effect in lost if isinstance(effect, Accuse)} == {node(5)}


def test_monitors_change_with_the_hour_and_not_all_at_once():
    watch = Watch(60)
    places = [watch.machine._place(node(number), NOW) for number in range(60)]
    soon = [watch.machine._place(node(number), NOW + 360) for number in range(60)]
    later = [watch.machine._place(node(number), NOW + 3600) for number in range(60)]
    assert 0 < sum(a != b for a, b in zip(places, soon, strict=True)) < 20
    assert all(a != b for a, b in zip(places, later, strict=True))


def test_what_is_withdrawn_or_over_is_watched_no_more():
    watch = Watch(30)
    watch.run(10)
    first, second = list(watch.machine.watched())[:2]
    expires_ms = round((NOW + 1800) * 1000)
    watch.take(make_item(Kind.WITHDRAWAL, first, first, 2, 2, expires_ms, b"w"))
    for item in watch.store.expire(NOW + 1801):
        watch.machine.gone(item)
    assert first not in watch.machine.watched()
    assert second not in watch.machine.watched()
    assert len(watch.machine.roll) == 0
