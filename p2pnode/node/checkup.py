"""Gathers what `net doctor` judges: what the node knows of itself, and a fresh trial of each bootstrap entry."""

from dataclasses import replace
from typing import Final

import trio

from p2pnode.discovery.addresses import parse_static_peer
from p2pnode.discovery.doctor import EntryTrial, Facts, Finding, examine
from p2pnode.errors import ConfigError, PeerError
from p2pnode.node.config import load_config
from p2pnode.node.layer_settings import bootstrap_entries
from p2pnode.node.node import Node

TRIAL_SECONDS: Final = 6.0
TRIALS_MAX: Final = 32
# What a node that has just started needs to find its first peers and to be dialled back once.
SETTLE_SECONDS: Final = 8.0


async def check_up(node: Node, *, is_daemon: bool) -> list[Finding]:
    """Give every finding about a node. Dials the bootstrap entries, so it takes up to six seconds; leaves links to idle out.

    is_daemon: it runs for long; one started for this question is first given a few seconds to settle.
    """
    if not is_daemon:
        with trio.move_on_after(SETTLE_SECONDS):
            while not node.discovery.roles.is_decided:  # noqa: ASYNC110 - the first dial-back has no event for a command
                await trio.sleep(0.1)
    trials = await _try_entries(node)
    facts = _facts(node, trials, is_daemon)
    return examine(facts if is_daemon else await _with_configured_port(node, facts))


async def _with_configured_port(node: Node, facts: Facts) -> Facts:
    """Replace the port of a node that was started for the question by the one that a daemon would listen on."""
    address = load_config().network.listen
    try:
        listener = await node.environment.network.listen(address)
    except ConfigError as error:
        return replace(facts, listen=str(error), bound=())
    await listener.aclose()
    return replace(facts, listen=address, bound=(f"{address} (free, for a daemon to take)",))


async def _try_entries(node: Node) -> tuple[EntryTrial, ...]:
    entries = bootstrap_entries(node.config)[:TRIALS_MAX]
    errors = dict.fromkeys(entries, f"no answer within {TRIAL_SECONDS:g} s")

    async def attempt(entry: str) -> None:
        with trio.move_on_after(TRIAL_SECONDS):
            try:
                address, node_id = parse_static_peer(entry)
                await node.transport.connect((address,), node_id)
                errors[entry] = ""
            except PeerError as error:
                errors[entry] = str(error)

    async with trio.open_nursery() as nursery:
        for entry in entries:
            nursery.start_soon(attempt, entry)
    return tuple(EntryTrial(entry, error) for entry, error in errors.items())


def _facts(node: Node, trials: tuple[EntryTrial, ...], is_daemon: bool) -> Facts:
    discovery, network = node.discovery, node.config.network
    status = discovery.status()
    reached, failed = discovery.roles.counts
    return Facts(
        is_daemon=is_daemon,
        profile=network.profile,
        listen=network.listen,
        bound=node.transport.bound_addresses,
        own_addresses=discovery.own_addresses(),
        mdns_state=status["mdns"]["state"],
        mdns_reason=status["mdns"]["reason"],
        mdns_advice=status["mdns"]["advice"],
        role=status["role"],
        reached=reached,
        failed=failed,
        confirmed=discovery.roles.confirmed,
        seen_as=discovery.roles.seen_addresses,
        ports=tuple(discovery.introductions.mapped_ports.values()),
        skew_seconds=discovery.introductions.skew_seconds,
        skew_peers=len(discovery.introductions.skews_seconds),
        is_duplicate=status["duplicate_identity"],
        entries=trials,
        peers_connected=status["peers_connected"],
        peers_known=status["peers_known"],
        table_entries=status["table_entries"],
        network_size=status["network_size"],
        publications=tuple(
            (row.salt.decode("utf-8", "replace"), row.acks, row.asked, row.stored_ms > 0) for row in discovery.own_records.rows()
        ),
    )
