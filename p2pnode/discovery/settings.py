"""What the owner can set about finding peers. Every limit here is a bound that some attack or accident would otherwise lack."""

from dataclasses import dataclass
from typing import Final

INTERFACE_ALL: Final = "all"
INTERFACE_DEFAULT: Final = "default"
# Names of interfaces that lead to containers, virtual machines and tunnels: announcing there tells nobody or the wrong people.
VIRTUAL_INTERFACES: Final = (
    "docker", "br-", "veth", "virbr", "vmnet", "vboxnet", "tun", "tap", "wg", "tailscale", "zt", "ppp", "utun", "cni", "flannel",
    "cali", "lxc", "lxdbr", "podman", "nordlynx", "proton",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class DiscoverySettings:
    """How peers are found and how many links are kept.

    mdns: announce and browse on the local network. interfaces: `all` (every real interface, virtual ones left out),
    `default` (the system's choice) or names and addresses separated by commas. virtual_interfaces: with `all`, also use
    container, virtual-machine and VPN interfaces. static_peers: `host:port` or `node-…@host:port`.
    links_max: links kept at once; dials_max: attempts at once; peers_max: entries in the book; addresses_max: per peer.
    backoff_seconds doubles per failure up to backoff_seconds_max, each with jitter in [0.5, 1).
    probe_seconds: how often one lost peer is tried whatever its backoff says, so that a healed partition is noticed.
    forget_seconds: a peer never reached or not reached for so long leaves the book.
    """

    mdns: bool = True
    interfaces: str = INTERFACE_ALL
    virtual_interfaces: bool = False
    static_peers: tuple[str, ...] = ()
    links_max: int = 64
    dials_max: int = 4
    peers_max: int = 2000
    addresses_max: int = 8
    dial_seconds: float = 15.0
    backoff_seconds: float = 2.0
    backoff_seconds_max: float = 600.0
    probe_seconds: float = 30.0
    forget_seconds: float = 14 * 86400.0
    ban_seconds: float = 3600.0
    ban_seconds_max: float = 86400.0
    mdns_events_max: int = 256
    mdns_check_seconds: float = 6.0
