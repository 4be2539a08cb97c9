"""The gate, the buckets and the budget, one test per limit; limits inside a session are in test_session.py."""

import dataclasses
from pathlib import Path

import pytest

from p2pnode.errors import Refused
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.transport.limits import BufferBudget, ConnectionGate, Limits, TokenBucket, address_groups, is_private


def gate(exempt_private: bool = False, **changes) -> tuple[ConnectionGate, Metrics]:
    metrics = Metrics()
    return ConnectionGate(Limits(**changes), metrics, exempt_private, 0.0), metrics


def addresses(count: int) -> list[str]:
    return [f"8.{index // 200}.{index % 200}.1:5000" for index in range(count)]


def admit_open(machine: ConnectionGate, address: str, now: float = 0.0) -> None:
    machine.admit(address, now)
    machine.verified()


def refused(machine: ConnectionGate, metrics: Metrics, address: str, limit: str, now: float = 0.0) -> Reason:
    before = metrics.value("limit_hits_total", limit)
    with pytest.raises(Refused) as caught:
        machine.admit(address, now)
    assert metrics.value("limit_hits_total", limit) == before + 1
    return caught.value.reason


def test_half_open_max() -> None:
    machine, metrics = gate(half_open_max=3)
    for address in addresses(3):
        machine.admit(address, 0.0)
    assert refused(machine, metrics, "9.9.9.9:1", "half_open_max") is Reason.TOO_MANY_CONNECTIONS
    machine.verified()
    machine.admit("9.9.9.9:1", 0.0)


def test_inbound_max() -> None:
    machine, metrics = gate(inbound_max=3)
    for address in addresses(3):
        admit_open(machine, address)
    refused(machine, metrics, "9.9.9.9:1", "inbound_max")
    machine.leave(addresses(1)[0])
    admit_open(machine, "9.9.9.9:1")


def test_outbound_reserved_keeps_places_for_our_own_dials() -> None:
    machine, metrics = gate(connections_max=5, outbound_reserved=2)
    for address in addresses(3):
        admit_open(machine, address)
    refused(machine, metrics, "9.9.9.9:1", "outbound_reserved")
    machine.dial()
    refused(machine, metrics, "9.9.9.9:1", "outbound_reserved")
    machine.dial()
    refused(machine, metrics, "9.9.9.9:1", "connections_max")
    machine.hang_up()
    refused(machine, metrics, "9.9.9.9:1", "outbound_reserved")


def test_connections_max_binds_our_own_dials_too() -> None:
    machine, metrics = gate(connections_max=2)
    machine.dial()
    machine.dial()
    with pytest.raises(Refused):
        machine.dial()
    assert metrics.value("limit_hits_total", "connections_max") == 1


def test_per_address_max() -> None:
    machine, metrics = gate(per_address_max=2)
    for port in (1, 2):
        admit_open(machine, f"8.8.8.8:{port}")
    refused(machine, metrics, "8.8.8.8:3", "per_address_max")
    admit_open(machine, "8.8.8.9:1")
    machine.leave("8.8.8.8:1")
    admit_open(machine, "8.8.8.8:3")


@pytest.mark.parametrize("form", ["8.8.8.{}:1", "[2001:db8:7:{}::1]:1", "[::ffff:8.8.8.{}]:1"])
def test_per_network_max_counts_a_slash_24_or_48(form) -> None:
    machine, metrics = gate(per_network_max=2)
    for host in (1, 2):
        admit_open(machine, form.format(host))
    refused(machine, metrics, form.format(3), "per_network_max")
    admit_open(machine, "[2001:db8:8::1]:1")


def test_private_addresses_are_exempt_unless_diversity_is_strict() -> None:
    relaxed, _ = gate(exempt_private=True, per_address_max=1, per_network_max=1, accept_burst=1)
    for port in range(5):
        admit_open(relaxed, f"127.0.0.1:{port + 1}")
    strict, metrics = gate(exempt_private=False, per_address_max=1)
    admit_open(strict, "127.0.0.1:1")
    refused(strict, metrics, "127.0.0.1:2", "per_address_max")


def test_accept_rate_and_accept_burst() -> None:
    machine, metrics = gate(accept_rate=2.0, accept_burst=3.0)
    for address in addresses(3):
        admit_open(machine, address)
    assert refused(machine, metrics, "9.9.9.9:1", "accept_rate") is Reason.RATE
    assert refused(machine, metrics, "9.9.9.9:1", "accept_rate", now=0.4) is Reason.RATE
    admit_open(machine, "9.9.9.9:1", now=0.6)


def test_a_bucket_never_holds_more_than_its_burst_and_ignores_a_clock_that_stands() -> None:
    bucket = TokenBucket(10.0, 5.0, 0.0)
    assert [bucket.take(1000.0) for _ in range(6)] == [True] * 5 + [False]
    assert not bucket.take(999.0)
    assert bucket.take(1000.11)
    assert not bucket.take(1000.11, 2.0)


def test_buffer_bytes_max() -> None:
    metrics = Metrics()
    budget = BufferBudget(100, metrics)
    assert budget.take(60)
    assert not budget.take(41)
    assert metrics.value("limit_hits_total", "buffer_bytes_max") == 1
    budget.give(60)
    assert budget.take(100)


@pytest.mark.parametrize(
    ("address", "groups", "private"),
    [
        ("8.8.4.4:53", ("8.8.4.4", "8.8.4.0/24"), False),
        ("127.0.0.1:1", ("127.0.0.1", "127.0.0.0/24"), True),
        ("[2001:4860:4860::8888]:1", ("2001:4860:4860::8888", "2001:4860:4860::/48"), False),
        ("[fe80::1%eth0]:1", ("fe80::1", "fe80::/48"), True),
        ("name.example:1", ("name.example", "name.example"), False),
    ],
)
def test_address_groups(address, groups, private) -> None:
    assert address_groups(address) == groups
    assert is_private(address) is private


def test_every_limit_is_named_in_a_test() -> None:
    sources = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    missing = [field.name for field in dataclasses.fields(Limits) if field.name not in sources]
    assert missing == []
