"""From the owner's settings to each layer's own: the one place where the two vocabularies meet."""

import os
from pathlib import Path

from p2pnode.discovery.settings import DiscoverySettings, KademliaSettings
from p2pnode.jobs.settings import JobSettings
from p2pnode.market.settings import MarketSettings
from p2pnode.node.config import NodeConfig
from p2pnode.node.setting import FILE_PREFIX, read_entries
from p2pnode.transport.limits import Limits
from p2pnode.work.settings import WorkSettings

_PPM = 1_000_000
# In a public network: peers in so many different /16 networks must have reached a node, or agree on its address.
PUBLIC_CONFIRMATIONS = 3
BOOTSTRAP_ENTRIES_MAX = 1000
# What the owner may add by hand; what strangers' orders may make this node fetch is the smaller provide.model_size_max.
OWN_MODEL_BYTES_MAX = 16 << 30


def discovery_settings(config: NodeConfig) -> DiscoverySettings:
    """Give the discovery layer's settings."""
    network = config.network
    return DiscoverySettings(
        mdns=network.mdns,
        interfaces=network.mdns_interfaces,
        virtual_interfaces=network.mdns_virtual,
        static_peers=network.static_peers,
        bootstrap=bootstrap_entries(config),
        links_max=config.limits.links_max,
        local_links_max=config.limits.local_links_max,
        anchors_max=config.limits.anchors_max,
        publish_address=network.publish_address,
        confirmations=PUBLIC_CONFIRMATIONS if network.profile == "public" else 1,
        dials_private=network.profile != "public",
        ask_dials_max=min(config.limits.ask_dials_max, max(1, config.limits.connections_max // 4)),
        peers_max=config.limits.peers_max,
    )


def kademlia_settings(config: NodeConfig) -> KademliaSettings:
    """Give the hash table's numbers: the protocol's own but for what the network's settings say."""
    network = config.network
    return KademliaSettings(strict_diversity=network.diversity == "strict", puzzle_bits=network.puzzle_bits)


def bootstrap_entries(config: NodeConfig) -> tuple[str, ...]:
    """Give every bootstrap peer, those in files included. Raises ConfigError for a file that cannot be used."""
    found: dict[str, None] = {}
    for entry in config.network.bootstrap:
        for each in read_entries(Path(entry.removeprefix(FILE_PREFIX))) if entry.startswith(FILE_PREFIX) else (entry,):
            found[each] = None
    return tuple(found)[:BOOTSTRAP_ENTRIES_MAX]


def transport_limits(config: NodeConfig) -> Limits:
    """Give the transport's limits."""
    limits = config.limits
    return Limits(
        connections_max=limits.connections_max,
        inbound_max=limits.inbound_max,
        outbound_reserved=limits.outbound_reserved,
        per_address_max=limits.per_address_max,
        per_network_max=limits.per_network_max,
        idle_seconds=limits.idle,
        buffer_bytes_max=limits.buffers,
    )


def work_settings(config: NodeConfig, cores: int | None = None) -> WorkSettings:
    """Give the work layer's settings. cores: of this machine, counted when None."""
    provide = config.provide
    cores = cores or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores or os.cpu_count() or 1
    return WorkSettings(
        cpu_fraction=provide.cpu_fraction(cores),
        cores=cores,
        threads_per_worker=provide.threads,
        worker_idle_seconds=provide.worker_idle,
        memory_bytes=provide.memory,
        worker_memory_bytes=provide.worker_memory,
        disk_bytes=provide.disk,
        bandwidth_bytes_per_second=provide.bandwidth,
        queue_max=provide.queue_max,
        queue_per_owner_max=provide.queue_per_client_max,
        load_seconds=provide.load_time_max,
        call_seconds_max=provide.call_time_max,
        batch_size_max=provide.batch_max,
        batch_delay_seconds=provide.batch_delay,
        model_bytes_max=max(provide.model_size_max, OWN_MODEL_BYTES_MAX),
        share_workers=provide.share_workers,
        sandbox_min=provide.sandbox_level_min,
        allow_clients=frozenset(provide.clients_allow),
        deny_clients=frozenset(provide.clients_deny),
        allow_models=frozenset(provide.models_allow),
        deny_models=frozenset(provide.models_deny),
        execution_providers=provide.engines or ("CPUExecutionProvider",),
    )


def market_settings(config: NodeConfig) -> MarketSettings:
    """Give the market's settings."""
    provide, credit, client = config.provide, config.credit, config.client
    return MarketSettings(
        selling=provide.enabled,
        operations_price=provide.operations_price_micro,
        call_price=provide.call_price,
        region=provide.region,
        input_bytes_max=provide.input_size_max,
        output_bytes_max=provide.output_size_max,
        model_bytes_max=provide.model_size_max,
        call_seconds_max=provide.call_time_max,
        stranger_slice_amount=credit.slice_amount,
        credit_growth_ppm=round(credit.growth * _PPM),
        credit_slice_amount_max=credit.slice_amount_max,
        credit_half_life_seconds=credit.half_life,
        debt_amount_max=credit.debt_max,
        cheque_seconds=credit.cheque_time,
        slice_calls=client.slice_calls,
        slice_seconds=client.slice_time,
    )


def job_settings(config: NodeConfig) -> JobSettings:
    """Give the client side's settings."""
    client = config.client
    return JobSettings(
        run_seconds=client.call_time_max,
        providers_max=client.providers_max,
        in_flight_per_provider=client.in_flight,
        hedging=client.hedging,
        hedge_deviations=client.hedge_deviations,
        price_max=client.max_price,
        local_fallback=client.local_fallback,
        share_worker=client.share_worker,
        providers_deny=frozenset(client.providers_deny),
        latency_weight=client.latency_weight,
        agreement_seconds=client.deadline,
        agreement_amount_max=client.max_total,
        slice_calls=client.slice_calls,
        slice_seconds=client.slice_time,
    )
