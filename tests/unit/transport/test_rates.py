"""Rates of what discovery asks: per peer and per network, forgotten in order, refused with a reason and counted."""

from types import SimpleNamespace

import pytest

from p2pnode.errors import Refused
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.transport.limits import Limits
from p2pnode.transport.rates import RequestRates, Traffic

ALICE, BOB = b"a" * 32, b"b" * 32
HERE, BESIDE, ELSEWHERE = "8.8.8.8:1", "8.8.8.9:1", "9.9.9.9:1"


def rates(exempt_private: bool = True, **changes) -> tuple[RequestRates, Metrics]:
    metrics = Metrics()
    return RequestRates(Limits(**changes), metrics, exempt_private), metrics


def admitted(machine: RequestRates, peer: bytes, address: str, now: float, traffic=Traffic.LOOKUP) -> int:
    """Ask until it is refused; give how often it was not."""
    for count in range(1000):
        try:
            machine.admit(traffic, peer, address, now)
        except Refused:
            return count
    raise AssertionError("never refused")


@pytest.mark.parametrize(
    ("traffic", "name", "per_second", "burst"),
    [(Traffic.LOOKUP, "lookup_rate", 20, 60), (Traffic.DISCOVERY, "discovery_rate", 50, 200)],
)
def test_each_kind_has_its_rate_and_burst(traffic, name, per_second, burst):
    machine, metrics = rates()
    assert admitted(machine, ALICE, HERE, 0.0, traffic) == burst
    assert metrics.labels("limit_hits_total") == {name: 1}
    later = 10 / per_second
    assert admitted(machine, ALICE, HERE, later, traffic) == min(burst, 10)


def test_the_limits_are_the_owners():
    machine, _ = rates(lookup_rate=1.0, lookup_burst=4.0, discovery_rate=2.0, discovery_burst=3.0)
    assert [admitted(machine, ALICE, HERE, 0.0, traffic) for traffic in Traffic] == [4, 3]
    assert [admitted(machine, ALICE, HERE, 1.0, traffic) for traffic in Traffic] == [1, 2]


def test_kinds_do_not_take_from_each_other():
    machine, _ = rates()
    admitted(machine, ALICE, HERE, 0.0, Traffic.LOOKUP)
    assert admitted(machine, ALICE, HERE, 0.0, Traffic.DISCOVERY) == 200


def test_identities_of_one_network_share_its_rate():
    machine, metrics = rates(lookup_burst=10.0)
    for number in range(5):
        for _ in range(2):
            machine.admit(Traffic.LOOKUP, bytes([number]) * 32, HERE if number % 2 else BESIDE, 0.0)
    assert admitted(machine, BOB, BESIDE, 0.0) == 0
    assert metrics.labels("limit_hits_total") == {"lookup_rate_per_network": 1}
    assert admitted(machine, BOB, ELSEWHERE, 0.0) == 9


def test_networks_are_24_bits_of_ipv4_and_48_of_ipv6():
    machine, _ = rates(lookup_burst=1.0)
    for index, address in enumerate(["8.8.8.8:1", "8.8.9.8:1", "[2a00:1:2:3::1]:1", "[2a00:1:3::1]:1"]):
        assert admitted(machine, bytes([index]) * 32, address, 0.0) == 1
    for index, address in enumerate(["8.8.8.200:9", "[::ffff:8.8.9.1]:1", "[2a00:1:2:ffff::1]:1"]):
        assert admitted(machine, bytes([100 + index]) * 32, address, 0.0) == 0


def test_a_peer_that_is_refused_takes_nothing_from_its_network():
    machine, _ = rates(lookup_burst=10.0, lookup_rate=1.0)
    admitted(machine, ALICE, HERE, 0.0)
    for _ in range(100):
        with pytest.raises(Refused, match=r"lookup_rate$"):
            machine.admit(Traffic.LOOKUP, ALICE, HERE, 0.5)
    assert admitted(machine, BOB, BESIDE, 5.0) == 5


@pytest.mark.parametrize("address", ["127.0.0.1:1", "192.168.1.7:1", "[fe80::1%eth0]:1"])
def test_private_networks_are_exempt_but_their_peers_are_not(address):
    machine, _ = rates(lookup_burst=3.0)
    assert [admitted(machine, bytes([number]) * 32, address, 0.0) for number in range(4)] == [3, 3, 3, 3]
    strict, _ = rates(exempt_private=False, lookup_burst=3.0)
    assert [admitted(strict, bytes([number]) * 32, address, 0.0) for number in range(4)] == [3, 0, 0, 0]


def test_rate_buckets_max_forgets_the_least_recently_used():
    machine, _ = rates(rate_buckets_max=4, lookup_burst=1.0)
    admitted(machine, ALICE, "192.168.1.1:1", 0.0)
    for number in range(3):
        admitted(machine, bytes([number]) * 32, "192.168.1.1:1", 0.0)
    assert admitted(machine, ALICE, "192.168.1.1:1", 0.0) == 0
    admitted(machine, BOB, "192.168.1.1:1", 0.0)
    assert admitted(machine, ALICE, "192.168.1.1:1", 0.0) == 0
    assert admitted(machine, b"\0" * 32, "192.168.1.1:1", 0.0) == 1
    assert len(machine._buckets) == 4


def test_a_limited_handler_sees_only_what_is_admitted():
    machine, metrics = rates(discovery_burst=2.0)
    seen = []
    handler = machine.limited(Traffic.DISCOVERY, lambda incoming: not seen.append(incoming), lambda: 7.0)
    incoming = SimpleNamespace(link=SimpleNamespace(peer=SimpleNamespace(node_id=ALICE, seen_address=HERE)))
    assert handler(incoming)
    assert handler(incoming)
    with pytest.raises(Refused) as caught:
        handler(incoming)
    assert caught.value.reason is Reason.RATE
    assert seen == [incoming, incoming]
    assert metrics.value("limit_hits_total", "discovery_rate") == 1
