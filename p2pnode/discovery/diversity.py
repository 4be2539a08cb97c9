"""Limits per network: how many nodes of one /24 (IPv6 /48) may stand in a bucket, a table or a result. Pure.

Identities are cheap, addresses in many networks are not. Only globally routable addresses count, because on a LAN
everybody shares one network; `strict` counts them all. A contact counts to the network of its first address, which is the
one it answered at when that is known (`kademlia` puts it first): a claimed address must not make room for anybody.
"""

import ipaddress
from functools import lru_cache
from typing import Final

from p2pnode.wire.messages.discovery import Contact

IPV4_GROUP_BITS: Final = 24
IPV6_GROUP_BITS: Final = 48
# Groups remembered; a hit costs 0.1 us, a miss 5 us. 100 000 simulated nodes share this cache.
_GROUPS_MAX: Final = 1 << 17


@lru_cache(maxsize=_GROUPS_MAX)
def group_of(address: str, strict: bool = False) -> str:
    """Give the network that `host:port` counts to; empty where no limit holds.

    A name counts as its last two labels, which one owner controls. IPv4 inside IPv6 counts as IPv4.
    """
    host = address.rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return "name:" + ".".join(host.lower().rstrip(".").split(".")[-2:])
    if isinstance(ip, ipaddress.IPv6Address):
        ip = ip.ipv4_mapped or ip.sixtofour or ip
    if not (strict or ip.is_global):
        return ""
    bits = IPV4_GROUP_BITS if ip.version == 4 else IPV6_GROUP_BITS
    return f"{int(ip) >> (ip.max_prefixlen - bits):x}/{bits}"


def contact_group(contact: Contact, strict: bool = False) -> str:
    """Give the network that a contact counts to; empty where no limit holds."""
    return group_of(contact.addresses[0], strict) if contact.addresses else ""


def has_room(groups: dict[str, int], group: str, group_max: int) -> bool:
    """Count one more of a network in `groups`, unless it is there `group_max` times already; True if it was counted."""
    if not group:
        return True
    seen = groups.get(group, 0)
    if seen >= group_max:
        return False
    groups[group] = seen + 1
    return True
