"""Rule 7: provider records are taken only for the connection's own peer, sampled, short-lived and bounded."""

import random

import pytest

from p2pnode.discovery.records.providers import ProviderSettings, ProviderStore
from p2pnode.errors import Refused
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.wire.messages.discovery import PROVIDERS_MAX, Contact, StoreProvider

NOW = 1_800_000_000.0
KEY = b"k" * 32


def contact(number, address="1.2.3.4:1"):
    return Contact(number.to_bytes(32, "big"), (address,))


def store(metrics=None, uniform=None, **settings):
    return ProviderStore(ProviderSettings(**settings), uniform or random.Random(1).random, metrics)


def refused(action):
    with pytest.raises(Refused) as caught:
        action()
    return caught.value.reason


def fill(providers, numbers, now=NOW, key=KEY):
    for number in numbers:
        providers.add(key, contact(number), now, f"20.{number >> 8}.{number & 255}.1:1")


def test_a_node_can_name_only_itself():
    """The message has no field for a node: the caller passes the id that the link's handshake has proven."""
    assert StoreProvider.__struct_fields__ == ("key", "addresses", "is_server")


def test_a_provider_is_found_under_its_key_with_its_newest_addresses():
    providers = store()
    providers.add(KEY, contact(1), NOW)
    providers.add(KEY, contact(1, "5.6.7.8:9"), NOW)
    assert providers.find(KEY, NOW) == (contact(1, "5.6.7.8:9"),)
    assert providers.find(b"o" * 32, NOW) == ()
    assert len(providers) == 1


def test_at_most_20_are_given():
    providers = store()
    fill(providers, range(50))
    found = providers.find(KEY, NOW)
    assert len(found) == len({each.node_id for each in found}) == PROVIDERS_MAX == 20


def test_the_sample_is_random():
    providers = store()
    fill(providers, range(40))
    counts = dict.fromkeys(range(40), 0)
    for _ in range(1000):
        for each in providers.find(KEY, NOW):
            counts[int.from_bytes(each.node_id, "big")] += 1
    # 500 expected each, standard deviation 16: six of them on either side.
    assert min(counts.values()) > 400
    assert max(counts.values()) < 600


def test_the_sample_comes_from_the_injected_randomness():
    first, second = (store(uniform=random.Random(7).random) for _ in range(2))
    for providers in (first, second):
        fill(providers, range(40))
    assert first.find(KEY, NOW) == second.find(KEY, NOW)


def test_a_provider_is_forgotten_after_30_minutes_unless_it_says_so_again():
    providers = store()
    fill(providers, (1, 2))
    fill(providers, (1,), NOW + 900)
    assert providers.deadline == NOW + 1800
    assert {each.node_id for each in providers.find(KEY, NOW + 1799)} == {contact(1).node_id, contact(2).node_id}
    assert providers.find(KEY, NOW + 1800) == (contact(1),)
    assert providers.expire(NOW + 1799) == 0
    assert providers.expire(NOW + 1800) == 1
    assert (len(providers), providers.deadline) == (1, NOW + 2700)
    assert providers.expire(NOW + 2700) == 1
    assert (len(providers), providers.deadline) == (0, float("inf"))


def test_a_full_key_forgets_the_one_that_expires_first():
    providers = store(providers_per_key_max=3)
    for number in (1, 2, 3, 1, 4):
        fill(providers, (number,))
    assert {int.from_bytes(each.node_id, "big") for each in providers.find(KEY, NOW)} == {1, 3, 4}
    assert len(providers) == 3


def test_a_budget_of_keys():
    metrics = Metrics()
    providers = store(metrics, keys_max=2)
    fill(providers, (1,), key=b"a" * 32)
    fill(providers, (1,), key=b"b" * 32)
    assert refused(lambda: fill(providers, (1,), key=b"c" * 32)) is Reason.STORE_FULL
    assert metrics.value("limit_hits_total", "keys_max") == 1
    fill(providers, (2,), key=b"a" * 32)
    assert metrics.value("providers_held") == 3
    fill(providers, (1,), NOW + 1800, key=b"c" * 32)  # what has expired makes room
    assert len(providers) == 1


def test_a_budget_of_keys_per_provider():
    providers = store(keys_per_provider_max=2)
    for key in (b"a" * 32, b"b" * 32, b"a" * 32):
        fill(providers, (1,), key=key)
    assert refused(lambda: fill(providers, (1,), key=b"c" * 32)) is Reason.STORE_FULL
    fill(providers, (2,), key=b"c" * 32)


def test_one_network_cannot_crowd_out_the_others():
    providers = store(providers_per_network_max=2, entries_per_network_max=3)
    for number in (1, 2):
        providers.add(KEY, contact(number), NOW, f"20.0.0.{number}:1")
    assert refused(lambda: providers.add(KEY, contact(3), NOW, "20.0.0.3:1")) is Reason.STORE_FULL
    providers.add(KEY, contact(3), NOW, "20.0.1.3:1")
    providers.add(b"o" * 32, contact(4), NOW, "20.0.0.4:1")
    assert refused(lambda: providers.add(b"p" * 32, contact(5), NOW, "20.0.0.5:1")) is Reason.STORE_FULL


@pytest.mark.parametrize("strict", [True, False])
def test_a_household_is_exempt_unless_diversity_is_strict(strict):
    providers = store(providers_per_network_max=1, exempt_private=not strict)
    providers.add(KEY, contact(1), NOW, "192.168.0.1:1")
    if strict:
        assert refused(lambda: providers.add(KEY, contact(2), NOW, "192.168.0.2:1")) is Reason.STORE_FULL
    else:
        providers.add(KEY, contact(2), NOW, "192.168.0.2:1")


def test_five_puts_a_second_per_peer():
    metrics = Metrics()
    providers = store(metrics, puts_burst=5.0)
    for _ in range(5):
        providers.add(KEY, contact(1), NOW)
    assert refused(lambda: providers.add(KEY, contact(1), NOW)) is Reason.RATE
    assert metrics.value("limit_hits_total", "puts_per_second") == 1
    providers.add(KEY, contact(1), NOW + 0.2)


def test_an_empty_store_costs_next_to_nothing():
    providers = store()
    assert providers._held is None
    assert (providers.find(KEY, NOW), len(providers), providers.deadline, providers.expire(NOW)) == ((), 0, float("inf"), 0)
