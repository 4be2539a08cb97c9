"""Connects the market with the gossip below it: what is signed goes down, what has come goes up, and searches learn what the
rest of the node knows of a provider.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from p2pnode.discovery.gossip.events import Arrived, Gone, Republish, Suspect
from p2pnode.market.query import Fields

if TYPE_CHECKING:
    from p2pnode.node.node import Node


def connect_offers(node: "Node") -> None:
    """Let a node's market and discovery serve each other. Without gossip only linked peers' offers are known."""
    market, discovery = node.market, node.discovery
    market.finding.peer_fields = lambda: peer_fields(node)
    market.finding.reach = discovery.reach  # type: ignore[assignment]  # ids are plain bytes in the market
    discovery.address_hints = market.finding.addresses
    if discovery.offers is None:
        return

    def heard(news: Any) -> None:
        if isinstance(news, Arrived | Gone | Suspect | Republish):
            market.advertising.heard(news)

    discovery.offers.on_news = heard
    market.advertising.publish = discovery.offers.publish
    market.advertising.place = lambda: (
        tuple(dict.fromkeys((*discovery.roles.confirmed, *discovery.own_addresses()))), discovery.roles.is_server
    )  # fmt: skip


def peer_fields(node: "Node") -> Fields:
    """Give, for one search, what this node knows of a peer: its calls there, its links, its word on conduct, the monitors'."""
    records, links = node.jobs.suppliers.records(), node.transport.links()
    discovery, jobs = node.discovery, node.jobs.suppliers
    gossip, now, book = discovery.gossip, discovery.now(), discovery.keeper.book

    def fields(peer: bytes) -> Mapping[str, Any]:
        known: dict[str, Any] = {
            "linked": peer in links,
            "suspected": gossip is not None and gossip.is_suspected(peer, now),
            "banned": book.is_banned(peer, now) or jobs.is_banned(peer),
            "rating": book.score(peer, now) if book.entry(peer) is not None else None,
        }
        record = records.get(peer)
        if record is not None:
            made = record.accepted + record.failed
            known |= {
                "calls": round(made),
                "new": made == 0,
                "reliability": record.accepted / made if made else None,
                "latency": record.latencies.median_seconds,
            }
        return known

    return fields
