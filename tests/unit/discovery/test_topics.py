"""Adverts by topic: found by those who look, gone when taken back, and no registrar overrun."""

import pytest

from p2pnode.discovery.gossip.items import Kind
from p2pnode.discovery.gossip.registrar import Registrar, RegistrarSettings
from p2pnode.discovery.gossip.topics import ENOUGH, TOPICS_MAX, bucket_of, topic, topic_labels
from p2pnode.errors import ProtocolViolation
from p2pnode.sim.gossip_swarm import plain_check, plain_document
from p2pnode.sim.topic_swarm import TopicSwarm
from p2pnode.wire.messages.gossip import ADVERTS_MAX

NOW = 1_790_000_000.0
SETTINGS = RegistrarSettings(adverts_max=100, held_seconds=900.0)
CPU, RARE = topic("cpu"), topic("model:rare")


def offer(number, sequence=1, kind=Kind.OFFER):
    publisher = number.to_bytes(32, "big")
    return plain_document(kind, publisher, publisher, sequence, sequence, round((NOW + 7200) * 1000))


def registrar(**changes):
    return Registrar(
        RegistrarSettings(**{"adverts_max": 100, "held_seconds": 900.0, **changes}), plain_check(), b"s" * 32, lambda: 0.5
    )


def fill(cache, count, place=CPU, first=0, network=""):
    """Put adverts in as fast as tickets allow; gives when each came in, seconds after the start."""
    came = []
    for number in range(first, first + count):
        now, ticket = NOW, b""
        while (admission := cache.register(place, offer(number), ticket, network, now)).held_seconds == 0:
            now, ticket = now + admission.wait_seconds, admission.ticket
            if now > NOW + 800:
                return came
        came.append(now - NOW)
    return came


def test_a_rare_topic_gets_in_at_once_and_a_popular_one_ever_more_slowly():
    cache = registrar()
    waits = fill(cache, 60)
    assert waits[0] == 0
    assert waits == sorted(waits)
    assert 5 < len(waits) < 60, "one topic does not fill the cache"
    held = len(cache)
    assert cache.wait(CPU, "") > 10 * cache.wait(RARE, "") > 0
    assert fill(cache, 1, RARE, first=900) == [0]
    assert len(cache) == held + 1


def test_one_network_waits_for_itself_not_for_others():
    cache = registrar()
    for number in range(12):
        fill(cache, 1, topic(f"topic {number}"), first=number, network="80.1.1")
    assert cache.wait(RARE, "80.1.1") > 10 * cache.wait(RARE, "80.2.2")


def test_a_ticket_is_worth_the_wait_it_proves_and_nothing_to_others():
    cache = registrar()
    fill(cache, 8)
    refused = cache.register(CPU, offer(50), b"", "", NOW)
    assert refused.wait_seconds > 5
    early = cache.register(CPU, offer(50), refused.ticket, "", NOW + 1)
    assert early.held_seconds == 0
    assert early.wait_seconds >= refused.wait_seconds - 1, "coming early starts again"
    stolen = cache.register(CPU, offer(51), refused.ticket, "", NOW + refused.wait_seconds)
    assert stolen.held_seconds == 0
    forged = refused.ticket[:8] + bytes([refused.ticket[8] ^ 1]) + refused.ticket[9:]
    assert cache.register(CPU, offer(50), forged, "", NOW + refused.wait_seconds).held_seconds == 0
    assert cache.register(CPU, offer(50), refused.ticket, "", NOW + refused.wait_seconds).held_seconds == 900


def test_an_advert_is_held_for_its_time_and_its_word_may_change():
    cache = registrar()
    fill(cache, 1)
    assert cache.sample(CPU, NOW) == (offer(0),)
    assert cache.register(CPU, offer(0, 2), b"", "", NOW + 100).held_seconds == 800, "news do not lengthen its time"
    assert cache.sample(CPU, NOW + 100) == (offer(0, 2),)
    cache.register(CPU, offer(0, 1), b"", "", NOW + 100)
    assert cache.sample(CPU, NOW + 100) == (offer(0, 2),)
    cache.register(CPU, offer(0, 3, Kind.WITHDRAWAL), b"", "", NOW + 100)
    assert cache.sample(CPU, NOW + 100) == ()
    cache.register(CPU, offer(0, 2), b"", "", NOW + 100)
    assert cache.sample(CPU, NOW + 100) == (), "a withdrawn offer stays away"
    assert cache.sample(CPU, NOW + 901) == ()
    assert len(cache) == 0


def test_a_full_cache_takes_nobody_and_samples_are_small():
    cache = registrar(adverts_max=20, occupancy_power=0.0, floor=0.0)
    for number in range(20):
        fill(cache, 1, topic(f"{number}"), first=number)
    assert len(cache) == 20
    assert cache.register(RARE, offer(99), b"", "", NOW).wait_seconds == 900
    cache = registrar(adverts_max=10_000)
    fill(cache, 10)
    assert len(cache.sample(CPU, NOW)) == ADVERTS_MAX


def test_a_forged_advert_is_a_violation():
    with pytest.raises(ProtocolViolation):
        registrar().register(CPU, b"forged", b"", "", NOW)


def test_labels_say_what_there_is_in_steps():
    gigabyte = 10**9
    assert topic_labels([], 0, 1000) == ["cpu", "cpu price<2^10"]
    labels = topic_labels([b"\1" * 32], 17 * gigabyte, 0)
    assert labels == ["gpu", "gpu>=8g", "gpu>=16g", "gpu price<2^0", f"model:{'01' * 32}"]
    assert len(topic_labels([bytes([number]) * 32 for number in range(99)], 0, 1)) == TOPICS_MAX


def test_buckets_count_shared_bits():
    assert bucket_of(b"\xff" * 32, bytes(32)) == 0
    assert bucket_of(b"\x0f" + bytes(31), bytes(32)) == 4
    assert bucket_of(bytes(32), bytes(32)) == 19


@pytest.mark.slow
def test_adverts_in_a_network_are_found_and_lie_on_many():
    swarm = TopicSwarm(400, seed=3)
    rare = list(range(5, 400, 40))
    for index in range(0, 400, 2):
        swarm.publish(index, [CPU])
    for index in rare:
        swarm.publish(index, [RARE])
    swarm.run(120)
    load = swarm.load()
    assert sum(held > 0 for held in load.values()) > 350, "nearly everybody is registrar for somebody"
    for asker in (1, 77, 399):
        found = swarm.search(asker, [RARE])
        assert found.is_complete
        assert {item.publisher for item in found.items} == {swarm.nodes[index].contact.node_id for index in rare}
        assert len(swarm.search(asker, [CPU]).items) >= ENOUGH, "a search ends when it has enough"
    assert swarm.search(1, [topic("nothing like it")]).items == ()
    asked = sum(node.answered for node in swarm.nodes)
    swarm.search(9, [CPU], seconds=1.5)
    assert sum(node.answered for node in swarm.nodes) - asked < 40

    swarm.publish(rare[0], [], is_withdrawal=True)
    swarm.run(5)
    assert len(swarm.search(1, [RARE]).items) == len(rare) - 1

    for node in swarm.nodes:
        node.is_up = node.index in (1, *rare) or swarm.random.random() > 0.3
    found = swarm.search(1, [RARE])
    assert not found.is_complete, "it says that some did not answer"
    assert len(found.items) >= 0.6 * (len(rare) - 1)
