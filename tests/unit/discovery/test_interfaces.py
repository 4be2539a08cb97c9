"""Which interfaces are announced on."""

import pytest

from p2pnode.discovery.peers.interfaces import Adapter, choose_interfaces
from p2pnode.discovery.settings import DiscoverySettings
from p2pnode.errors import ConfigError

LO = Adapter("lo", "127.0.0.1")
ETH = Adapter("eth0", "192.168.1.5")
WIFI = Adapter("wlan0", "192.168.1.6")
DOCKER = Adapter("docker0", "172.17.0.1")
VPN = Adapter("wg0", "10.8.0.2")
AUTO = Adapter("eth1", "169.254.3.4")
LO6 = Adapter("lo", "::1")
ETH6 = Adapter("eth0", "2a00:1::5")
ETH_LOCAL = Adapter("eth0", "fe80::5")
AD_HOC = Adapter("eth2", "fe80::7")


@pytest.mark.parametrize(
    ("adapters", "settings", "hosts", "addresses", "left_out"),
    [
        ([LO, ETH, DOCKER, VPN], {}, ["0.0.0.0"], ("192.168.1.5",), ("docker0", "wg0")),
        ([LO, ETH, DOCKER], {"virtual_interfaces": True}, ["0.0.0.0"], ("192.168.1.5", "172.17.0.1"), ()),
        ([LO], {}, ["0.0.0.0"], ("127.0.0.1",), ()),
        ([LO, DOCKER], {}, ["0.0.0.0"], ("127.0.0.1",), ("docker0",)),
        ([LO, ETH], {}, ["127.0.0.1"], ("127.0.0.1",), ()),
        ([], {}, ["127.0.0.1"], ("127.0.0.1",), ()),
        ([LO, ETH, WIFI], {}, ["192.168.1.6"], ("192.168.1.6",), ("eth0",)),
        ([LO, ETH, AUTO], {}, ["0.0.0.0"], ("192.168.1.5",), ()),
        ([LO, ETH, DOCKER], {"interfaces": "docker0"}, ["0.0.0.0"], ("172.17.0.1",), ("eth0",)),
        ([LO, ETH, WIFI], {"interfaces": "wlan0, 192.168.1.5"}, ["0.0.0.0"], ("192.168.1.6", "192.168.1.5"), ()),
        ([LO, ETH], {"interfaces": "default"}, ["0.0.0.0"], ("192.168.1.5",), ()),
    ],
)
def test_choice(adapters, settings, hosts, addresses, left_out):
    choice = choose_interfaces(adapters, DiscoverySettings(**settings), hosts)
    assert choice.addresses == addresses
    assert choice.left_out == left_out


def test_an_unknown_interface_is_named_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"'wlan7'.*lo, eth0"):
        choose_interfaces([LO, ETH], DiscoverySettings(interfaces="wlan7"), ["0.0.0.0"])


@pytest.mark.parametrize(
    ("adapters", "settings", "hosts", "addresses", "announced", "senders"),
    [
        # Every address: both families, sent from the link-local one, which is not told where there is another.
        ([LO, LO6, ETH, ETH6, ETH_LOCAL], {}, ["[::]"],
         ("192.168.1.5", "[2a00:1::5]"), ("192.168.1.5", "2a00:1::5"), ("192.168.1.5", "fe80::5")),
        # Nobody listens on IPv6: nothing of it is told.
        ([LO, LO6, ETH, ETH6, ETH_LOCAL], {}, ["0.0.0.0"], ("192.168.1.5",), ("192.168.1.5",), ("192.168.1.5",)),
        ([LO, ETH, ETH6], {"interfaces": "eth0"}, ["0.0.0.0"], ("192.168.1.5",), ("192.168.1.5",), ("192.168.1.5",)),
        # A wire with nothing but link-local addresses: told by multicast, to nobody else.
        ([LO, AD_HOC], {}, ["[::]"], (), ("fe80::7",), ("fe80::7",)),
        ([LO, AD_HOC, ETH], {}, ["[::]"], ("192.168.1.5",), ("192.168.1.5", "fe80::7"), ("192.168.1.5", "fe80::7")),
        # One IPv6 address.
        ([LO, ETH, ETH6, ETH_LOCAL], {}, ["[2a00:1::5]"], ("[2a00:1::5]",), ("2a00:1::5",), ("fe80::5",)),
        # Loopback only: multicast goes over IPv4 there, whatever it tells.
        ([LO, LO6, ETH], {}, ["[::1]"], ("[::1]",), ("::1",), ("127.0.0.1",)),
        ([LO, LO6], {}, ["[::]"], ("127.0.0.1",), ("127.0.0.1",), ("127.0.0.1",)),
    ],
)  # fmt: skip
def test_both_families(adapters, settings, hosts, addresses, announced, senders):
    choice = choose_interfaces(adapters, DiscoverySettings(**settings), hosts)
    assert choice.addresses == addresses
    assert choice.announced == announced
    assert choice.senders == senders
