"""Multicast discovery: what is believed of a record, what happens when the channel is full, and the real thing on loopback."""

import ipaddress

import pytest
import trio

from p2pnode.discovery.peers.interfaces import Adapter, Choice
from p2pnode.discovery.peers.mdns import Announcement, MdnsService, Sighting, system_adapters
from p2pnode.discovery.settings import DiscoverySettings
from p2pnode.ids import NodeId, node_text
from p2pnode.metrics import Metrics

NETWORK = bytes(range(32))
ME, ALICE = NodeId(b"\1" * 32), NodeId(b"\2" * 32)


def service(own=ME, port=7000, metrics=None, adapters=None, **settings) -> MdnsService:
    announcement = Announcement(own, NETWORK, 1, (f"127.0.0.1:{port}",))
    found = adapters or (lambda: [Adapter("lo", "127.0.0.1")])
    return MdnsService(announcement, DiscoverySettings(**settings), metrics or Metrics(), found)


def record(node_id=ALICE, network="0001020304050607"):
    return {b"id": node_text(node_id).encode(), b"network": network.encode(), b"version": b"1"}


def test_a_record_gives_address_hints():
    sighting = service().parse(7001, ["10.0.0.2", "224.0.0.1", "fe80::1", "nonsense"], record())
    assert sighting == Sighting(ALICE, ("10.0.0.2:7001",))


def test_hints_of_both_families_with_link_local_ones_last_and_only_with_their_interface():
    heard = ["fe80::9%3", "fe80::8", "2a00:1::7%3", "2a00:1::7", "::ffff:10.0.0.3", "ff02::fb", "::", "10.0.0.2"]
    sighting = service().parse(7001, heard, record())
    assert sighting == Sighting(ALICE, ("[2a00:1::7]:7001", "10.0.0.2:7001", "[fe80::9%3]:7001"))
    assert service().parse(7001, ["fe80::8"], record()) is None


def test_the_systems_adapters_hold_bare_addresses_of_both_families():
    adapters = system_adapters()
    assert Adapter("lo", "127.0.0.1") in adapters
    assert sorted(adapters, key=lambda adapter: adapter.is_six) == adapters
    for adapter in adapters:
        assert "%" not in adapter.address
        ipaddress.ip_address(adapter.address)


@pytest.mark.parametrize(
    ("port", "properties", "counted"),
    [
        (7001, record(network="00" * 8), "other-network"),
        (7001, {}, "other-network"),
        (7001, {**record(), b"id": b"node-wrong"}, "bad-record"),
        (7001, {**record(), b"id": b"\xff\xfe"}, "bad-record"),
        (7001, {**record(), b"id": None}, "bad-record"),
        (0, record(), "bad-record"),
        (None, record(), "bad-record"),
    ],
)
def test_records_that_are_not_of_this_network_are_counted_and_dropped(port, properties, counted):
    metrics = Metrics()
    assert service(metrics=metrics).parse(port, ["10.0.0.2"], properties) is None
    assert metrics.labels("mdns_events_total") == {counted: 1}


async def test_a_full_channel_drops_and_counts():
    metrics = Metrics()
    mdns = service(metrics=metrics)
    send, receive = trio.open_memory_channel[Sighting](1)
    for _ in range(3):
        mdns.take(7001, ["10.0.0.2"], record(), send)
    assert receive.receive_nowait().node_id == ALICE
    assert metrics.value("mdns_dropped_total") == 2


async def test_our_own_record_at_another_port_means_a_second_process():
    mdns = service(port=7000)
    send, receive = trio.open_memory_channel[Sighting](1)
    mdns.take(7000, ["127.0.0.1"], record(ME), send)
    assert mdns.identity_elsewhere == ""
    mdns.take(7009, ["127.0.0.1"], record(ME), send)
    assert mdns.identity_elsewhere == "127.0.0.1:7009"
    with pytest.raises(trio.WouldBlock):
        receive.receive_nowait()


async def test_turned_off_it_says_so():
    mdns = service(mdns=False)
    send, _ = trio.open_memory_channel[Sighting](1)
    await mdns.run(send)
    assert mdns.status.state == "off"
    assert "mdns" in mdns.status.reason


async def test_without_an_interface_it_gives_the_reason_and_what_to_do(autojump_clock):
    mdns = MdnsService(Announcement(ME, NETWORK, 1, ("10.0.0.1:7000",)), DiscoverySettings(interfaces="wlan9"), Metrics(), list)
    send, _ = trio.open_memory_channel[Sighting](1)
    await mdns.run(send)
    assert mdns.status.state == "not-working"
    assert "wlan9" in mdns.status.reason
    assert "config set" in mdns.status.advice


def test_ipv6_that_is_there_only_in_name_does_not_cost_ipv4(monkeypatch):
    tried = []

    def fake(interfaces, ip_version):
        tried.append((interfaces, ip_version.name))
        if ip_version.name != "V4Only":
            raise OSError("no IPv6 here")
        return "open"

    monkeypatch.setattr("zeroconf.Zeroconf", fake)
    both = Choice(("10.0.0.1",), (), ("10.0.0.1", "fe80::1"), ("10.0.0.1", "fe80::1"))
    assert service()._open(both) == "open"
    assert tried == [(["10.0.0.1", "fe80::1"], "All"), (["10.0.0.1"], "V4Only")]
    with pytest.raises(OSError, match="no IPv6"):
        service()._open(Choice((), (), ("fe80::1",), ("fe80::1",)))
    with pytest.raises(OSError, match="no network interface"):
        service()._open(Choice((), ()))


@pytest.mark.slow
async def test_two_nodes_find_each_other_over_real_multicast_on_loopback():
    alice, bob = service(ALICE, 7101), service(ME, 7102)
    to_alice, at_alice = trio.open_memory_channel[Sighting](8)
    to_bob, at_bob = trio.open_memory_channel[Sighting](8)
    async with trio.open_nursery() as nursery:
        await nursery.start(alice.run, to_alice)
        await nursery.start(bob.run, to_bob)
        with trio.move_on_after(8) as scope:
            assert (await at_alice.receive()) == Sighting(ME, ("127.0.0.1:7102",))
            assert (await at_bob.receive()) == Sighting(ALICE, ("127.0.0.1:7101",))
        nursery.cancel_scope.cancel()
    if scope.cancelled_caught:
        pytest.skip(f"multicast does not work here: {alice.status.reason}")
