"""Which network interfaces to announce on. Pure: the list of adapters is an argument.

Announcing on a container bridge or a VPN tells nobody or the wrong people, and an address from there is a dead hint for
everybody else; so they are left out unless the owner says otherwise.

A link-local IPv6 address (fe80::…) means something only on its own wire, and there only with the receiver's interface beside
it. So it is used to send from, as RFC 6762 wants, but told only by multicast and only on a wire that has no other address.
"""

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from p2pnode.discovery.settings import INTERFACE_ALL, INTERFACE_DEFAULT, VIRTUAL_INTERFACES, DiscoverySettings
from p2pnode.errors import ConfigError

_EVERY_HOST = ("", "::")


@dataclass(frozen=True, slots=True)
class Adapter:
    """One address of one interface, without scope."""

    name: str
    address: str

    @property
    def is_six(self) -> bool:
        """True for an IPv6 address."""
        return ":" in self.address

    @property
    def is_link_local(self) -> bool:
        """True for an address that means something on its own wire only."""
        return ipaddress.ip_address(self.address).is_link_local


@dataclass(frozen=True, slots=True)
class Choice:
    """What is announced where.

    addresses: hosts to tell peers, as they stand in `host:port` (IPv6 in brackets), none of them link-local.
    left_out: names of interfaces not used, for `status`. announced: bare addresses for the multicast record.
    senders: bare addresses to send multicast from: every IPv4 address, and one IPv6 address for each interface.
    """

    addresses: tuple[str, ...]
    left_out: tuple[str, ...]
    announced: tuple[str, ...] = ()
    senders: tuple[str, ...] = ()


def choose_interfaces(adapters: Iterable[Adapter], settings: DiscoverySettings, listen_hosts: Sequence[str] = ()) -> Choice:
    """Choose by the owner's setting and by where the node listens: `0.0.0.0` is every IPv4 address, `::` every address.

    A node that listens on loopback only is announced on loopback only. Loopback is otherwise used when there is nothing
    else, because its address means another machine to everybody else. Raises ConfigError for an unknown interface name.
    """
    hosts = [host.strip("[]") for host in listen_hosts]
    everything = [adapter for adapter in adapters if _is_usable(adapter.address)]
    loopback = [adapter for adapter in everything if _is_loopback(adapter.address)]
    four_on_loopback = [adapter.address for adapter in loopback if not adapter.is_six] or ["127.0.0.1"]
    if hosts and all(_is_loopback(host) for host in hosts):
        # Multicast on loopback is sent over IPv4, whatever the address in it: the kernel routes no IPv6 multicast there.
        names = [host for host in hosts if host == "::1"] or four_on_loopback
        return _choice(names, (), names, four_on_loopback)
    served = [adapter for adapter in everything if _is_served(adapter, hosts)]
    if settings.interfaces in (INTERFACE_ALL, INTERFACE_DEFAULT):
        real = [adapter for adapter in served if adapter not in loopback]
        if not settings.virtual_interfaces:
            real = [adapter for adapter in real if not adapter.name.startswith(VIRTUAL_INTERFACES)]
        bound = {host for host in hosts if host not in (*_EVERY_HOST, "0.0.0.0")}
        chosen = [adapter for adapter in real if not bound or adapter.address in bound]
        chosen = chosen or [adapter for adapter in loopback if not adapter.is_six]
    else:
        chosen = _listed(everything, settings.interfaces)
        chosen = [adapter for adapter in chosen if adapter in served]
    names_chosen = dict.fromkeys(adapter.name for adapter in chosen)
    left_out = dict.fromkeys(adapter.name for adapter in served if adapter.name not in names_chosen and adapter not in loopback)
    routed = [adapter for adapter in chosen if not adapter.is_link_local]
    with_address = {adapter.name for adapter in routed}
    local_only = [adapter for adapter in chosen if adapter.is_link_local and adapter.name not in with_address]
    return _choice(
        [adapter.address for adapter in routed], left_out,
        [adapter.address for adapter in (*routed, *local_only)], _senders(everything, chosen),
    )  # fmt: skip


def _choice(told: Iterable[str], left_out: Iterable[str], announced: Iterable[str], senders: Iterable[str]) -> Choice:
    hosts = (f"[{address}]" if ":" in address else address for address in told)
    unique = [tuple(dict.fromkeys(each)) for each in (hosts, left_out, announced, senders)]
    return Choice(*unique)


def _senders(everything: Sequence[Adapter], chosen: Sequence[Adapter]) -> list[str]:
    """Give the addresses to send multicast from; for IPv6 the link-local one, so that receivers learn the wire it came by."""
    senders = [adapter.address for adapter in chosen if not adapter.is_six]
    for name in dict.fromkeys(adapter.name for adapter in chosen if adapter.is_six):
        six = [adapter for adapter in everything if adapter.name == name and adapter.is_six]
        senders.append(next((adapter.address for adapter in six if adapter.is_link_local), six[0].address))
    return senders


def _listed(adapters: Sequence[Adapter], text: str) -> list[Adapter]:
    chosen = []
    for wanted in filter(None, (part.strip() for part in text.split(","))):
        found = [adapter for adapter in adapters if wanted in (adapter.name, adapter.address)]
        if not found:
            known = ", ".join(dict.fromkeys(adapter.name for adapter in adapters)) or "none"
            raise ConfigError(f"there is no network interface {wanted!r}; this machine has: {known}")
        chosen += found
    return chosen


def _is_served(adapter: Adapter, hosts: Sequence[str]) -> bool:
    """Say whether the node listens to the address's family at all."""
    if not hosts or any(host in _EVERY_HOST for host in hosts):
        return True
    return any((":" in host) == adapter.is_six for host in hosts)


def _is_usable(address: str) -> bool:
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    return not ip.is_unspecified and (ip.version == 6 or not ip.is_link_local)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
