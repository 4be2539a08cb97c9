"""Which interfaces are announced on."""

import pytest

from p2pnode.discovery.interfaces import Adapter, choose_interfaces
from p2pnode.discovery.settings import DiscoverySettings
from p2pnode.errors import ConfigError

LO = Adapter("lo", "127.0.0.1")
ETH = Adapter("eth0", "192.168.1.5")
WIFI = Adapter("wlan0", "192.168.1.6")
DOCKER = Adapter("docker0", "172.17.0.1")
VPN = Adapter("wg0", "10.8.0.2")
AUTO = Adapter("eth1", "169.254.3.4")


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
