"""Counters, gauges and histograms of one node, named once, readable as a snapshot.

A node owns one `Metrics`; nothing here is global, so hundreds of simulated nodes count apart. Every name is declared in
`CATALOGUE` with its meaning; a test holds the reference page to it. Labels come from closed lists (reasons, kinds), never
from peers' bytes, so the number of series is bounded.
"""

from collections.abc import Iterator
from typing import Final

CATALOGUE: Final[dict[str, str]] = {
    "refusals_total": "refusals we sent, by reason",
    "refused_total": "refusals we received, by reason",
    "violations_total": "protocol violations by peers, by reason",
    "connections_total": "sessions opened, by direction",
    "connections_open": "sessions open now",
    "handshakes_failed_total": "handshakes that failed, by reason",
    "requests_total": "requests received, by message",
    "requests_in_flight": "requests being answered now",
    "sent_bytes_total": "bytes sent on sessions, encrypted",
    "received_bytes_total": "bytes received on sessions, encrypted",
    "frames_sent_total": "frames sent",
    "frames_received_total": "frames received",
    "limit_hits_total": "how often a named limit stopped something, by limit",
    "calls_total": "calls executed, by outcome",
    "calls_queued": "calls waiting for a worker now",
    "call_seconds": "time of a call in the worker, seconds",
    "queue_seconds": "time of a call in the queue, seconds",
    "batches_total": "batches executed",
    "batch_items_total": "items executed in batches",
    "workers_running": "worker processes alive now",
    "workers_started_total": "worker processes started",
    "workers_died_total": "worker processes that ended unasked, by reason",
    "model_loads_total": "models loaded into a worker",
    "model_fetched_bytes_total": "model bytes fetched from peers",
    "receipts_issued_total": "receipts signed as provider",
    "receipts_accepted_total": "receipts accepted as client",
    "cheques_issued_total": "cheques signed as client",
    "cheques_accepted_total": "cheques accepted as provider",
    "earned_microcredits_total": "micro-credits earned, by cheque",
    "written_off_microcredits_total": "micro-credits of calls as provider whose answers were lost and not asked for again",
    "spent_microcredits_total": "micro-credits spent, by cheque",
    "offers_known": "offers of others, and our own, held now",
    "offer_documents_signed_total": "documents for gossip signed, by kind: listing, withdrawal, suspicion",
    "peers_known": "peers in the peer book",
    "asks_total": "requests of the hash table and of gossip to peers, by outcome: answered, refused, timed out, unreachable",
    "gossip_bytes_total": "bytes of gossip messages without framing, by way: sent, received",
    "lookups_total": "lookups in the hash table that this node began for somebody, by outcome",
    "lookup_seconds": "time of such a lookup, seconds",
    "table_entries": "nodes in the routing table now",
    "network_size": "how many nodes the network has, estimated from lookups",
    "publish_acks": "nodes that took the record published last",
    "server_role": "1 while peers can reach this node and it answers for the hash table, 0 while it only asks",
    "dial_backs_total": "connections opened to see whether a peer can be reached, by outcome",
    "bootstraps_total": "times this node entered the network, at its start or because its routing table had run empty",
    "peers_found_again_total": "lost peers that answered again, perhaps after a partition",
    "mdns_events_total": "mDNS events, by kind",
    "mdns_dropped_total": "mDNS events dropped because the channel was full",
    "records_held": "records held for others now",
    "record_bytes_held": "bytes of the records held for others now",
    "record_conflicts_total": "pairs of records met whose publisher signed both with one sequence",
    "signature_checks_total": "signature checks of documents from the network, by outcome: good, bad, remembered, over-budget",
    "publications_total": "publications of own records, by outcome: stored, short",
    "providers_held": "provider records held for others now",
    "store_transactions_total": "committed transactions",
    "store_commits_total": "group commits",
    "loop_lag_seconds": "how late the event loop woke the watchdog, seconds",
    "bugs_total": "unexpected exceptions while serving a peer, by kind",
}

BUCKET_BOUNDS_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """The counters of one node. Every name must stand in `CATALOGUE`."""

    def __init__(self) -> None:
        self._counters: dict[tuple[str, str], float] = {}
        self._histograms: dict[str, list[float]] = {}

    def add(self, name: str, label: str = "", amount: float = 1) -> None:
        """Add to a counter."""
        key = name, label
        if key in self._counters:
            self._counters[key] += amount
        else:
            self._counters[_known(name), label] = amount

    def set(self, name: str, value: float, label: str = "") -> None:
        """Set a gauge."""
        self._counters[_known(name), label] = value

    def observe(self, name: str, seconds: float) -> None:
        """Put one duration into a histogram."""
        cells = self._histograms.get(name)
        if cells is None:
            cells = self._histograms[_known(name)] = [0.0] * (len(BUCKET_BOUNDS_SECONDS) + 3)
        cells[0] += 1
        cells[1] += seconds
        for index, bound in enumerate(BUCKET_BOUNDS_SECONDS):
            if seconds <= bound:
                cells[2 + index] += 1
                return
        cells[-1] += 1

    def value(self, name: str, label: str = "") -> float:
        """Give a counter or gauge, 0 when it was never touched."""
        return self._counters.get((_known(name), label), 0.0)

    def total(self, name: str) -> float:
        """Give the sum of a counter over its labels."""
        return sum(value for (key, _), value in self._counters.items() if key == _known(name))

    def labels(self, name: str) -> dict[str, float]:
        """Give label -> value of one counter."""
        return {label: value for (key, label), value in self._counters.items() if key == _known(name)}

    def snapshot(self) -> dict[str, float]:
        """Give every series as `name` or `name{label}` -> value, in a stable order; histograms as `_count` and `_sum`."""
        return dict(sorted(self._series()))

    def _series(self) -> Iterator[tuple[str, float]]:
        for (name, label), value in self._counters.items():
            yield (f"{name}{{{label}}}" if label else name), value
        for name, cells in self._histograms.items():
            yield f"{name}_count", cells[0]
            yield f"{name}_sum", cells[1]


def _known(name: str) -> str:
    if name not in CATALOGUE:
        raise KeyError(f"metric {name!r} is not in metrics.CATALOGUE")
    return name
