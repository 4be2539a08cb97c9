"""Which network interfaces to announce on. Pure: the list of adapters is an argument.

Announcing on a container bridge or a VPN tells nobody or the wrong people, and an address from there is a dead hint for
everybody else; so they are left out unless the owner says otherwise.
"""

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from p2pnode.discovery.settings import INTERFACE_ALL, INTERFACE_DEFAULT, VIRTUAL_INTERFACES, DiscoverySettings
from p2pnode.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Adapter:
    """One IPv4 address of one interface."""

    name: str
    address: str


@dataclass(frozen=True, slots=True)
class Choice:
    """addresses: of the interfaces to announce on. left_out: names of interfaces not used, for `status`."""

    addresses: tuple[str, ...]
    left_out: tuple[str, ...]


def choose_interfaces(adapters: Iterable[Adapter], settings: DiscoverySettings, listen_hosts: Sequence[str] = ()) -> Choice:
    """Choose by the owner's setting and by where the node listens.

    A node that listens on loopback only is announced on loopback only. Loopback is otherwise used when there is nothing
    else, because its address means another machine to everybody else. Raises ConfigError for an unknown interface name.
    """
    adapters = [adapter for adapter in adapters if _is_usable(adapter.address)]
    loopback = [adapter for adapter in adapters if ipaddress.ip_address(adapter.address).is_loopback]
    if listen_hosts and all(_is_loopback(host) for host in listen_hosts):
        return Choice(tuple(dict.fromkeys(adapter.address for adapter in loopback)) or ("127.0.0.1",), ())
    bound = {host for host in listen_hosts if host not in ("", "0.0.0.0", "::")}
    if settings.interfaces in (INTERFACE_ALL, INTERFACE_DEFAULT):
        real = [adapter for adapter in adapters if adapter not in loopback]
        if not settings.virtual_interfaces:
            real = [adapter for adapter in real if not adapter.name.startswith(VIRTUAL_INTERFACES)]
        chosen = [adapter for adapter in real if not bound or adapter.address in bound] or loopback
    else:
        chosen = _listed(adapters, settings.interfaces)
    names = dict.fromkeys(adapter.name for adapter in chosen)
    left_out = dict.fromkeys(adapter.name for adapter in adapters if adapter.name not in names and adapter not in loopback)
    return Choice(tuple(dict.fromkeys(adapter.address for adapter in chosen)), tuple(left_out))


def _listed(adapters: Sequence[Adapter], text: str) -> list[Adapter]:
    chosen = []
    for wanted in filter(None, (part.strip() for part in text.split(","))):
        found = [adapter for adapter in adapters if wanted in (adapter.name, adapter.address)]
        if not found:
            known = ", ".join(dict.fromkeys(adapter.name for adapter in adapters)) or "none"
            raise ConfigError(f"there is no network interface {wanted!r}; this machine has: {known}")
        chosen += found
    return chosen


def _is_usable(address: str) -> bool:
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    return ip.version == 4 and not ip.is_link_local and not ip.is_unspecified


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
