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
    bootstrap: of the same form, asked only while too few peers are known. links_max: links kept at once; of these
    local_links_max with peers that mDNS found, anchors_max outbound ones that are kept across restarts.
    publish_address: say in the hash table where this node is. confirmations: peers in different /16 networks that must have
    reached this node, or agree on where they see it, before that is believed. dials_private: also dial private addresses for
    others that ask, as a local network needs. ask_dials_max: connections opened at once for single requests.
    dials_max: attempts at once; peers_max: entries in the book; addresses_max: per peer.
    backoff_seconds doubles per failure up to backoff_seconds_max, each with jitter in [0.5, 1).
    probe_seconds: how often one lost peer is tried whatever its backoff says, so that a healed partition is noticed.
    forget_seconds: a peer never reached or not reached for so long leaves the book.
    """

    mdns: bool = True
    interfaces: str = INTERFACE_ALL
    virtual_interfaces: bool = False
    static_peers: tuple[str, ...] = ()
    bootstrap: tuple[str, ...] = ()
    links_max: int = 64
    local_links_max: int = 16
    anchors_max: int = 4
    publish_address: bool = True
    confirmations: int = 1
    dials_private: bool = True
    ask_dials_max: int = 16
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


@dataclass(frozen=True, slots=True)
class KademliaSettings:
    """The hash table of nodes. Times in seconds; `docs/explanation/discovery.md` says why each is what it is.

    bucket_size: k, also how many nodes hold a record. alpha: asks in flight per lookup. replacements_max: per bucket.
    strikes: failures in a row after which an entry leaves. per_bucket_group_max, per_table_group_max: entries of one /24
    (IPv6 /48) in a bucket and in the table; result_group_max: in the result of a lookup. strict_diversity: private and
    loopback addresses count too. timeout_seconds_min, timeout_seconds_max: of one ask; between them it follows what this
    node measures. lookup_seconds: of a whole lookup. region: find everybody near a key where records are stored and read.
    region_asks_max: bound of asks of such a lookup. quorum: equal answers that end the search for a record.
    fill: entries that every bucket should have soon after joining. operations_max: lookups at once; in_flight_max: asks of
    all kinds at once. puzzle_bits: leading zero bits that a node's id must show to be asked at all.
    """

    bucket_size: int = 16
    alpha: int = 3
    replacements_max: int = 8
    strikes: int = 3
    per_bucket_group_max: int = 2
    per_table_group_max: int = 10
    result_group_max: int = 2
    strict_diversity: bool = False
    # An ask that must dial first takes three round trips, where most of the measured ones took one: with 0.5 s one in fifty
    # asks of a calm network over continents was given up too early, and a lookup missed 3 % of the nearest nodes; with 1.5 none.
    timeout_seconds_min: float = 1.5
    timeout_seconds_max: float = 3.0
    lookup_seconds: float = 30.0
    region: bool = True
    region_asks_max: int = 160
    quorum: int = 3
    fill: int = 3
    check_seconds: float = 10.0
    self_lookup_seconds: float = 600.0
    idle_bucket_seconds: float = 3600.0
    operations_max: int = 64
    in_flight_max: int = 256
    puzzle_bits: int = 0
