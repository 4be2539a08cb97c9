"""Finding nodes on the local network with multicast DNS (RFC 6762, 6763), through zeroconf's synchronous interface.

zeroconf keeps its own thread; what it hears crosses into trio through one bounded door (`run_sync_soon` + `send_nowait`).
Records are unauthenticated: they give address hints, and the handshake alone says who is there. Where multicast does not
work, the node sees that its own announcement never comes back, and says so with what to do.
"""

import ipaddress
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import trio

from p2pnode.discovery.addresses import is_wildcard
from p2pnode.discovery.peers.interfaces import Adapter, Choice, choose_interfaces
from p2pnode.discovery.settings import INTERFACE_DEFAULT, DiscoverySettings
from p2pnode.errors import ConfigError
from p2pnode.ids import NODE, NodeId, node_text, parse_id, short
from p2pnode.metrics import Metrics

SERVICE_TYPE: Final = "_p2pnode._tcp.local."
PROTOCOL_VERSION_KEY: Final = "version"
RESOLVE_MILLISECONDS: Final = 1500
INTERFACES_CHECK_SECONDS: Final = 60.0
GOODBYE_SECONDS: Final = 2.0
NETWORK_LABEL_BYTES: Final = 8
ADDRESSES_PER_SIGHTING_MAX: Final = 8


@dataclass(frozen=True, slots=True)
class Sighting:
    """A node announced itself. Only hints: nothing here is proven."""

    node_id: NodeId
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MdnsStatus:
    """How multicast discovery does. state: off, starting, working or not-working; advice: what to do about it."""

    state: str
    reason: str = ""
    advice: str = ""
    interfaces: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Announcement:
    """What a node says about itself. listen_addresses: `host:port` as bound."""

    node_id: NodeId
    network_id: bytes
    version: int
    listen_addresses: tuple[str, ...]


def system_adapters() -> list[Adapter]:
    """Give this machine's addresses with their interfaces; IPv4 first, because every peer can use those."""
    import ifaddr

    found = [(adapter, address) for adapter in ifaddr.get_adapters() for address in adapter.ips]
    found.sort(key=lambda pair: not pair[1].is_IPv4)
    # ifaddr gives an IPv6 address as (address, flow, scope).
    return [Adapter(str(adapter.nice_name), str(address.ip if address.is_IPv4 else address.ip[0])) for adapter, address in found]


def reachable_addresses(listen: Sequence[str], settings: DiscoverySettings) -> tuple[str, ...]:
    """Give where others may reach a node that listens there; a wildcard stands for every real interface."""
    found: dict[str, None] = {}
    for address in listen:
        host, _, port = address.rpartition(":")
        if not is_wildcard(address):
            found[address] = None
            continue
        with suppress(ConfigError):
            for each in choose_interfaces(system_adapters(), settings, (host,)).addresses:
                found[f"{each}:{port}"] = None
    return tuple(found)


class MdnsService:
    """Announces this node and reports others. One zeroconf at a time; a new one when the interfaces change."""

    def __init__(
        self,
        announcement: Announcement,
        settings: DiscoverySettings,
        metrics: Metrics,
        adapters: Callable[[], list[Adapter]] = system_adapters,
    ) -> None:
        self._announcement = announcement
        self._settings = settings
        self._metrics = metrics
        self._adapters = adapters
        self._own_seen = trio.Event()
        self.status = MdnsStatus("off")
        # Where this node's own identity is announced by another process; empty while it is not.
        self.identity_elsewhere = ""

    async def run(
        self, sightings: trio.MemorySendChannel[Sighting], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Announce and browse until cancelled, then say goodbye. A failure of multicast is a status, never an error."""
        task_status.started()
        if not self._settings.mdns:
            self.status = MdnsStatus("off", "turned off by network.mdns")
            return
        while True:
            try:
                choice = self._choose()
            except ConfigError as error:
                self._fails(str(error), "name one of them with `p2pnode config set network.mdns_interfaces NAME`")
                return
            await self._announce_until_change(choice, sightings)

    def _choose(self) -> Choice:
        hosts = [address.rpartition(":")[0] for address in self._announcement.listen_addresses]
        return choose_interfaces(self._adapters(), self._settings, hosts)

    async def _announce_until_change(self, choice: Choice, sightings: trio.MemorySendChannel[Sighting]) -> None:
        self.status = MdnsStatus("starting", interfaces=choice.addresses, left_out=choice.left_out)
        self._own_seen = trio.Event()
        zeroconf = None
        try:
            try:
                zeroconf = await trio.to_thread.run_sync(self._open, choice)
                listener = _Listener(self, trio.lowlevel.current_trio_token(), sightings)
                await trio.to_thread.run_sync(listener.browse, zeroconf)
                await trio.to_thread.run_sync(partial(self._register, zeroconf, choice))
            except Exception as error:  # zeroconf raises OSError, its own and bare errors alike; discovery goes on without it
                self._fails(f"{type(error).__name__}: {error}", _ADVICE)
            else:
                with trio.move_on_after(self._settings.mdns_check_seconds):
                    await self._own_seen.wait()
                if self._own_seen.is_set():
                    self._works()
                elif self.status.state != "working":
                    self._fails(f"own announcement did not come back on {', '.join(choice.addresses)}", _ADVICE)
            await self._wait_for_change(choice)
        finally:
            if zeroconf is not None:
                with trio.move_on_after(GOODBYE_SECONDS, shield=True):
                    await trio.to_thread.run_sync(_close, zeroconf, abandon_on_cancel=True)

    async def _wait_for_change(self, choice: Choice) -> None:
        """Wait until the interfaces differ: a laptop that changes networks must be found in the new one."""
        while True:
            await trio.sleep(INTERFACES_CHECK_SECONDS)
            try:
                if self._choose() != choice:
                    return
            except ConfigError as error:
                self._fails(str(error), _ADVICE)

    def _open(self, choice: Choice) -> Any:
        from zeroconf import InterfaceChoice, IPVersion, Zeroconf

        if self._settings.interfaces == INTERFACE_DEFAULT:
            return Zeroconf(interfaces=InterfaceChoice.Default, ip_version=IPVersion.V4Only)
        if not choice.senders:
            raise OSError("no network interface has an address that this node listens on")
        four = [address for address in choice.senders if ":" not in address]
        if len(four) == len(choice.senders):
            return Zeroconf(interfaces=four, ip_version=IPVersion.V4Only)
        try:
            return Zeroconf(interfaces=list(choice.senders), ip_version=IPVersion.All if four else IPVersion.V6Only)
        except (OSError, RuntimeError):
            if not four:
                raise
            # IPv6 that is there only in name must not cost IPv4.
            return Zeroconf(interfaces=four, ip_version=IPVersion.V4Only)

    def _register(self, zeroconf: Any, choice: Choice) -> None:
        from zeroconf import ServiceInfo

        announced = self._announcement
        port = self._own_port()
        name = short(announced.node_id)
        zeroconf.register_service(
            ServiceInfo(
                SERVICE_TYPE,
                f"{name}.{SERVICE_TYPE}",
                port=port,
                parsed_addresses=list(choice.announced)[:ADDRESSES_PER_SIGHTING_MAX],
                properties={
                    "id": node_text(announced.node_id),
                    "network": announced.network_id[:NETWORK_LABEL_BYTES].hex(),
                    PROTOCOL_VERSION_KEY: str(announced.version),
                },
                server=f"p2pnode-{name}.local.",
            ),
            allow_name_change=True,
        )

    def take(
        self,
        port: int | None,
        addresses: Sequence[str],
        properties: Mapping[bytes, bytes | None],
        sightings: trio.MemorySendChannel[Sighting],
    ) -> None:
        """Take what the listener's thread handed over; runs in trio, drops and counts when the channel is full."""
        sighting = self.parse(port, addresses, properties)
        if sighting is None:
            return
        if sighting.node_id == self._announcement.node_id:
            self._own_seen.set()
            if port != self._own_port():
                self.identity_elsewhere = ", ".join(sighting.addresses)
            if self.status.state in ("starting", "not-working"):
                self._works()
            return
        if self.status.state != "working":
            self._works()
        try:
            sightings.send_nowait(sighting)
            self._metrics.add("mdns_events_total", "seen")
        except trio.WouldBlock:
            self._metrics.add("mdns_dropped_total")
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    def parse(self, port: int | None, addresses: Sequence[str], properties: Mapping[bytes, bytes | None]) -> Sighting | None:
        """Give the sighting in one record, or None (counted) when it is not a node of this network. Never raises."""
        network = (properties.get(b"network") or b"").decode("ascii", "replace")
        if network != self._announcement.network_id[:NETWORK_LABEL_BYTES].hex():
            self._metrics.add("mdns_events_total", "other-network")
            return None
        try:
            node_id = NodeId(parse_id(NODE, (properties.get(b"id") or b"").decode("ascii", "replace")))
        except ValueError:
            self._metrics.add("mdns_events_total", "bad-record")
            return None
        if port is None or not 0 < port < 65536:
            self._metrics.add("mdns_events_total", "bad-record")
            return None
        hints = sorted(filter(_is_dialable, addresses), key=lambda address: "%" in address)[:ADDRESSES_PER_SIGHTING_MAX]
        if not hints:
            return None
        return Sighting(node_id, tuple(f"[{each}]:{port}" if ":" in each else f"{each}:{port}" for each in hints))

    def _own_port(self) -> int:
        return int(self._announcement.listen_addresses[0].rpartition(":")[2])

    def _works(self) -> None:
        self.status = MdnsStatus("working", interfaces=self.status.interfaces, left_out=self.status.left_out)

    def _fails(self, reason: str, advice: str) -> None:
        self.status = MdnsStatus("not-working", reason, advice, self.status.interfaces, self.status.left_out)


_ADVICE: Final = (
    "allow UDP port 5353 in the firewall, choose an interface with `p2pnode config set network.mdns_interfaces NAME`, "
    "or name peers with `p2pnode config set network.static_peers HOST:PORT`"
)


class _Listener:
    """Lives on zeroconf's browser thread and hands what it hears to trio."""

    def __init__(self, service: MdnsService, token: trio.lowlevel.TrioToken, sightings: trio.MemorySendChannel[Sighting]) -> None:
        self._service = service
        self._token = token
        self._sightings = sightings

    def browse(self, zeroconf: Any) -> None:
        """Start the browser; its thread ends when zeroconf closes."""
        from zeroconf import ServiceBrowser

        ServiceBrowser(zeroconf, SERVICE_TYPE, handlers=[self.on_change])

    def on_change(self, zeroconf: Any, service_type: str, name: str, state_change: Any) -> None:
        """Resolve one changed record (up to 1.5 s, on this thread) and hand it over."""
        from zeroconf import ServiceInfo, ServiceStateChange

        if state_change is ServiceStateChange.Removed:
            return
        info = ServiceInfo(service_type, name)
        if not info.request(zeroconf, RESOLVE_MILLISECONDS):
            return
        # The loop may have ended between the packet and here.
        with suppress(trio.RunFinishedError):
            # Scoped: a link-local address comes with the interface on which it was heard, which no sender can choose.
            addresses = info.parsed_scoped_addresses()
            self._token.run_sync_soon(self._service.take, info.port, addresses, info.properties, self._sightings)


def _close(zeroconf: Any) -> None:
    zeroconf.unregister_all_services()
    zeroconf.close()


def _is_dialable(address: str) -> bool:
    """Say whether a peer could be there. A link-local address without the interface it was heard on leads nowhere."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address) and (ip.ipv4_mapped is not None or ip.is_link_local != (ip.scope_id is not None)):
        return False
    return not ip.is_multicast and not ip.is_unspecified
