"""Who provides what a key names, as each said of itself on its own connection. Pure; memory only.

A provider record is not signed: it is taken only from the link of the node it names, and forgotten unless repeated within
half an hour, so it can neither be forged for another nor outlive its node by much.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from p2pnode.discovery.diversity import group_of
from p2pnode.discovery.records.record import PutRates, subtract
from p2pnode.errors import Refused
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.wire.messages.discovery import PROVIDERS_MAX, Contact


@dataclass(frozen=True, slots=True)
class ProviderSettings:
    """The budgets of provider records held for others.

    life_seconds: unless repeated. keys_max: distinct keys. providers_per_key_max: the one that expires first makes room.
    keys_per_provider_max: of one node. providers_per_network_max: of one key and one /24 (IPv6 /48), so that one network's
    identities cannot crowd out everybody else; entries_per_network_max: of one network, over all keys. exempt_private: as
    in RecordSettings.
    """

    life_seconds: float = 1800.0
    keys_max: int = 1024
    providers_per_key_max: int = 64
    keys_per_provider_max: int = 64
    providers_per_network_max: int = 8
    entries_per_network_max: int = 128
    puts_per_second: float = 5.0
    puts_burst: float = 60.0
    put_rates_max: int = 1024
    exempt_private: bool = True


@dataclass(frozen=True, slots=True)
class _Provider:
    contact: Contact
    network: str
    expires: float


class _Held:
    """keys: key -> node id -> provider, longest not repeated first. by_node, by_network: how many entries each has."""

    __slots__ = ("by_network", "by_node", "count", "keys", "rates", "soonest")

    def __init__(self, settings: ProviderSettings) -> None:
        self.keys: dict[bytes, dict[bytes, _Provider]] = {}
        self.by_node: dict[bytes, int] = {}
        self.by_network: dict[str, int] = {}
        self.rates = PutRates(settings.puts_per_second, settings.puts_burst, settings.put_rates_max)
        self.count = 0
        self.soonest = inf


class ProviderStore:
    """The provider records this node holds for others. uniform: a float in [0, 1) each call, for the sample."""

    __slots__ = ("_held", "_metrics", "_settings", "_uniform")

    def __init__(self, settings: ProviderSettings, uniform: Callable[[], float], metrics: Metrics | None = None) -> None:
        self._settings = settings
        self._uniform = uniform
        self._metrics = metrics
        self._held: _Held | None = None

    def __len__(self) -> int:
        return self._held.count if self._held else 0

    @property
    def deadline(self) -> float:
        """When the next entry may expire, for `expire`; infinite when nothing is held."""
        return self._held.soonest if self._held else inf

    def add(self, key: bytes, contact: Contact, now: float, from_address: str = "") -> None:
        """Note that a node provides what the key names, from now for `life_seconds`.

        contact: its node id is that of the link the request came on; no other can be named, as StoreProvider has no field
        for one. from_address: of that link. Raises Refused with RATE or STORE_FULL.
        """
        settings = self._settings
        held = self._held
        if held is None:
            held = self._held = _Held(settings)
        network = group_of(from_address, not settings.exempt_private) if from_address else ""
        if not held.rates.take(contact.node_id, network, now):
            self._refuse(Reason.RATE, "puts_per_second")
        providers = held.keys.get(key, {})
        known = providers.get(contact.node_id)
        if known is None:
            self._check_budgets(held, key, providers, contact.node_id, network, now)
            providers = held.keys.setdefault(key, {})
            held.by_node[contact.node_id] = held.by_node.get(contact.node_id, 0) + 1
            held.by_network[network] = held.by_network.get(network, 0) + 1
            held.count += 1
        else:
            network = known.network
            del providers[contact.node_id]  # last again: the longest not repeated stands first and makes room first
        providers[contact.node_id] = _Provider(contact, network, now + settings.life_seconds)
        held.soonest = min(held.soonest, now + settings.life_seconds)
        self._gauge(held)

    def find(self, key: bytes, now: float) -> tuple[Contact, ...]:
        """Give a random sample of at most 20 providers: all of them in turn are found, none can stand first for everybody."""
        if self._held is None:
            return ()
        live = [entry.contact for entry in self._held.keys.get(key, {}).values() if entry.expires > now]
        for position in range(min(PROVIDERS_MAX, len(live))):
            chosen = position + int(self._uniform() * (len(live) - position))
            live[position], live[chosen] = live[chosen], live[position]
        return tuple(live[:PROVIDERS_MAX])

    def expire(self, now: float) -> int:
        """Forget what has expired and give the number; costs nothing before `deadline`."""
        held = self._held
        if held is None or now < held.soonest:
            return 0
        gone = [(key, node) for key, nodes in held.keys.items() for node, entry in nodes.items() if entry.expires <= now]
        for key, node_id in gone:
            self._drop(held, key, node_id)
        times = (next(iter(providers.values())).expires for providers in held.keys.values())
        held.soonest = min(times, default=inf)
        return len(gone)

    def _check_budgets(
        self, held: _Held, key: bytes, providers: dict[bytes, _Provider], node_id: bytes, network: str, now: float
    ) -> None:
        settings = self._settings
        self.expire(now)
        if held.by_node.get(node_id, 0) >= settings.keys_per_provider_max:
            self._refuse(Reason.STORE_FULL, "keys_per_provider_max")
        if key not in held.keys and len(held.keys) >= settings.keys_max:
            self._refuse(Reason.STORE_FULL, "keys_max")
        if network and held.by_network.get(network, 0) >= settings.entries_per_network_max:
            self._refuse(Reason.STORE_FULL, "entries_per_network_max")
        if network and sum(entry.network == network for entry in providers.values()) >= settings.providers_per_network_max:
            self._refuse(Reason.STORE_FULL, "providers_per_network_max")
        if len(providers) >= settings.providers_per_key_max:
            self._drop(held, key, next(iter(providers)))

    def _drop(self, held: _Held, key: bytes, node_id: bytes) -> None:
        providers = held.keys[key]
        entry = providers.pop(node_id)
        if not providers:
            del held.keys[key]
        held.count -= 1
        subtract(held.by_node, node_id)
        subtract(held.by_network, entry.network)
        self._gauge(held)

    def _gauge(self, held: _Held) -> None:
        if self._metrics is not None:
            self._metrics.set("providers_held", held.count)

    def _refuse(self, reason: Reason, limit: str) -> None:
        if self._metrics is not None:
            self._metrics.add("limit_hits_total", limit)
        raise Refused(reason, limit)
