"""Addresses as text: what peers claim, what owners type, and which network an address counts to. Pure."""

import ipaddress
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from p2pnode.errors import ConfigError
from p2pnode.ids import NODE, NodeId, parse_id

ADDRESS_LENGTH_MAX: Final = 262
_WILDCARDS: Final = ("0.0.0.0", "[::]", "")


def claimed_addresses(claimed: Iterable[str], seen_address: str) -> tuple[str, ...]:
    """Give the usable ones of a peer's own addresses; a wildcard host is replaced by where its bytes come from."""
    return _claimed(tuple(claimed), host_of(seen_address))


@lru_cache(maxsize=4096)
def _claimed(claimed: tuple[str, ...], seen_host: str) -> tuple[str, ...]:
    usable: dict[str, None] = {}
    for address in claimed:
        host, _, port = address.rpartition(":")
        whole = f"{seen_host}:{port}" if host in _WILDCARDS else address
        if is_address(whole) and not whole.endswith(":0"):
            usable[whole] = None
    return tuple(usable)


def parse_static_peer(text: str) -> tuple[str, NodeId | None]:
    """Give the address and, where stated, the id in `host:port` or `node-…@host:port`. Raises ConfigError."""
    id_part, _, address = text.strip().rpartition("@")
    if not is_address(address):
        raise ConfigError(f"{text!r} is not a peer: write HOST:PORT or node-…@HOST:PORT")
    try:
        return address, NodeId(parse_id(NODE, id_part)) if id_part else None
    except ValueError as error:
        raise ConfigError(f"{text!r} is not a peer: {error}") from error


def is_address(text: str) -> bool:
    """Say whether `host:port` is well formed, with a port that can be dialled; nothing is looked up."""
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536) or len(text) > ADDRESS_LENGTH_MAX:
        return False
    if host.startswith("["):
        try:
            return host.endswith("]") and ipaddress.ip_address(host[1:-1]).version == 6
        except ValueError:
            return False
    return bool(host) and all(character.isalnum() or character in "-._" for character in host)


def host_of(address: str) -> str:
    """Give the host of `host:port`, with its brackets if it has any."""
    return address.rpartition(":")[0]


def is_wildcard(address: str) -> bool:
    """Say whether an address stands for every interface of its machine."""
    return host_of(address) in _WILDCARDS


def is_global(address: str) -> bool:
    """Say whether the host of `host:port` is an address that the whole internet routes to; False for a name."""
    try:
        return ipaddress.ip_address(host_of(address).strip("[]").partition("%")[0]).is_global
    except ValueError:
        return False


def wide_group(address: str) -> str:
    """Give the network that one operator is likely to own: /16 of IPv4, /32 of IPv6; a name is its own.

    Several words from one group count as one (go-libp2p's peer diversity filter uses the same width for IPv4).
    """
    return _wide_group(host_of(address).strip("[]").partition("%")[0])


@lru_cache(maxsize=4096)
def _wide_group(host: str) -> str:
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return host
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return str(ipaddress.ip_network((ip, 16 if ip.version == 4 else 32), strict=False))


def check_usable(text: str) -> str:
    """Give `host:port` as it is. Raises ConfigError for what is none."""
    if not is_address(text.strip()):
        raise ConfigError(f"{text!r} is not an address, such as 192.0.2.7:7470")
    return text.strip()
