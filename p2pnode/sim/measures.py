"""What is counted in a run and what is said about it: shares with their interval, distributions, series over virtual time.

A run's raw figures can be joined with those of other seeds, so a threshold is judged on all of them together.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

# Measure -> (unit, meaning). Thresholds of a scenario name these; docs/reference/simulations.md is made from them.
MEASURES: Final[dict[str, tuple[str, str]]] = {
    "get_success": ("share", "gets that gave the newest version of the record, with Wilson's 95 % interval"),
    "get_success_low": ("share", "lower end of that interval"),
    "gets": ("count", "gets that ended"),
    "get_seconds_median": ("s", "virtual time of a get, median"),
    "get_seconds_p95": ("s", "virtual time of a get, 95th percentile"),
    "put_stored": ("share", "publications that enough nodes acknowledged"),
    "acknowledgements": ("count", "nodes that acknowledged a publication, mean"),
    "closest_accuracy": ("share", "of the 16 servers truly nearest to a target, those that a lookup found"),
    "lookups": ("count", "lookups that ended"),
    "hops": ("count", "referral depth of the nearest node found, mean"),
    "hops_over_formula": ("count", "that mean less 1 + log2(N/k) / (1 + log2 k + 0.33)"),
    "lookup_requests": ("count", "requests of a lookup, mean"),
    "lookup_seconds_median": ("s", "virtual time of a lookup, median"),
    "lookup_seconds_p95": ("s", "virtual time of a lookup, 95th percentile"),
    "table_accuracy": ("share", "routing table entries that are servers and up, mean over nodes up for a minute and time"),
    "sibling_accuracy": ("share", "of the 16 servers truly nearest to a node, those in its table"),
    "tables_empty": ("count", "nodes up for 5 minutes with an empty routing table, the most at any sample"),
    "recovery_seconds": ("s", "from the fault's end until 200 gets have begun of which 99 % end well within 10 s, the slowest"),
    "offer_seconds_99": ("s", "until 99 of 100 nodes know a new offer, the slowest"),
    "withdrawal_seconds_99": ("s", "until 99 of 100 nodes have dropped a withdrawn offer, the slowest"),
    "offer_coverage": ("share", "live offers that a node knows, mean over nodes and time"),
    "views_connected": ("share", "samples in which every live node can reach every other by gossip neighbours"),
    "popular_offers_found": ("count", "offers that a search of the popular topic gave, the fewest"),
    "rare_offers_found": ("share", "of the live offers under the rare topic, those that a search gave, mean"),
    "adverts_held_most": ("count", "adverts at the node that holds the most"),
    "busiest_bytes_per_second": ("B/s", "bytes sent by the node that sends the most"),
    "jobs_completed": ("share", "jobs of nodes that stayed up which ended with an answer"),
    "messages_per_node_second": ("1/s", "requests sent per node and second, after the network was built"),
    "bytes_per_node_second": ("B/s", "bytes sent per node and second, after the network was built"),
    "gossip_bytes_per_node_second": ("B/s", "of these, gossip of offers at rest"),
    "timeouts": ("share", "requests without an answer"),
    "build_cpu_seconds": ("s", "processor time until the network was built"),
    "cpu_seconds": ("s", "processor time of the whole run, the most of any seed"),
    "wall_seconds": ("s", "time of the whole run, the most of any seed; depends on what else the machine does"),
    "memory_mb": ("MB", "resident memory of the process at its largest, the most of any seed"),
    "violations": ("count", "invariants that a checker found broken"),
}  # fmt: skip
# Measures that depend on the machine: they are reported, judged, and left out of the digest.
MACHINE_MEASURES: Final = ("build_cpu_seconds", "cpu_seconds", "wall_seconds", "memory_mb")
# A series keeps its resolution up to so many points.
SERIES_BUCKET_SECONDS: Final = 30.0
_WILSON_Z: Final = 1.959964


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Give the 95 % interval of a share (Wilson 1927); unlike the normal one it is right near 0 and 1."""
    if not trials:
        return 0.0, 1.0
    z2 = _WILSON_Z * _WILSON_Z
    share = successes / trials
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _WILSON_Z / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials * trials))
    return max(0.0, middle - half), min(1.0, middle + half)


def hops_formula(nodes: int, k: int) -> float:
    """Give the mean referral depth that Kademlia should have: each hop gains log2 k + 0.33 bits and the bucket's own one.

    k random contacts of a subtree come that much nearer on average; the first hop is the node's own table.
    """
    return 1.0 + max(0.0, math.log2(nodes / k)) / (1.0 + math.log2(k) + 0.33)


@dataclass(slots=True)
class Share:
    """Successes of trials."""

    successes: int = 0
    trials: int = 0

    def add(self, is_success: bool) -> None:
        """Count one trial."""
        self.successes += is_success
        self.trials += 1

    def join(self, other: "Share") -> None:
        """Add another run's trials."""
        self.successes += other.successes
        self.trials += other.trials

    @property
    def value(self) -> float:
        """The share; nan without trials."""
        return self.successes / self.trials if self.trials else math.nan


@dataclass(slots=True)
class Values:
    """A distribution, kept whole: runs have at most some ten thousand operations."""

    values: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        """Enter one value."""
        self.values.append(value)

    def join(self, other: "Values") -> None:
        """Add another run's values."""
        self.values += other.values

    @property
    def mean(self) -> float:
        """The mean; nan without values."""
        return math.fsum(self.values) / len(self.values) if self.values else math.nan

    @property
    def highest(self) -> float:
        """The largest value; nan without values."""
        return max(self.values, default=math.nan)

    def quantile(self, share: float) -> float:
        """Give the value below which this share of all lies; nan without values."""
        if not self.values:
            return math.nan
        ordered = sorted(self.values)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass(slots=True)
class Series:
    """A mean over virtual time, in buckets of `SERIES_BUCKET_SECONDS`; time 0 is when the network had been built."""

    sums: dict[int, float] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)

    def add(self, at: float, value: float) -> None:
        """Enter a value at a time."""
        bucket = math.floor(at / SERIES_BUCKET_SECONDS)
        self.sums[bucket] = self.sums.get(bucket, 0.0) + value
        self.counts[bucket] = self.counts.get(bucket, 0) + 1

    def join(self, other: "Series") -> None:
        """Add another run's values."""
        for bucket, value in other.sums.items():
            self.sums[bucket] = self.sums.get(bucket, 0.0) + value
            self.counts[bucket] = self.counts.get(bucket, 0) + other.counts[bucket]

    def points(self) -> list[tuple[float, float]]:
        """Give (seconds at the bucket's middle, mean) in order."""
        return [((b + 0.5) * SERIES_BUCKET_SECONDS, self.sums[b] / self.counts[b]) for b in sorted(self.sums)]

    @property
    def mean(self) -> float:
        """The mean of all values; nan without any."""
        count = sum(self.counts.values())
        return sum(self.sums.values()) / count if count else math.nan


@dataclass(slots=True)
class Measures:
    """Everything one run counted. `join` adds the figures of another seed; `summary` gives every measure that has a value."""

    get_success: Share = field(default_factory=Share)
    put_stored: Share = field(default_factory=Share)
    jobs_completed: Share = field(default_factory=Share)
    timeouts: Share = field(default_factory=Share)
    views_connected: Share = field(default_factory=Share)
    get_seconds: Values = field(default_factory=Values)
    acknowledgements: Values = field(default_factory=Values)
    closest_accuracy: Values = field(default_factory=Values)
    hops: Values = field(default_factory=Values)
    hops_over_formula: Values = field(default_factory=Values)
    lookup_requests: Values = field(default_factory=Values)
    lookup_seconds: Values = field(default_factory=Values)
    tables_empty: Values = field(default_factory=Values)
    recovery_seconds: Values = field(default_factory=Values)
    offer_seconds: Values = field(default_factory=Values)
    withdrawal_seconds: Values = field(default_factory=Values)
    popular_offers_found: Values = field(default_factory=Values)
    rare_offers_found: Values = field(default_factory=Values)
    adverts_held: Values = field(default_factory=Values)
    busiest_bytes_per_second: Values = field(default_factory=Values)
    violations: list[str] = field(default_factory=list)
    # Rates and costs: one value a run.
    messages_per_node_second: Values = field(default_factory=Values)
    bytes_per_node_second: Values = field(default_factory=Values)
    gossip_bytes_per_node_second: Values = field(default_factory=Values)
    build_cpu_seconds: Values = field(default_factory=Values)
    cpu_seconds: Values = field(default_factory=Values)
    wall_seconds: Values = field(default_factory=Values)
    memory_mb: Values = field(default_factory=Values)
    series: dict[str, Series] = field(default_factory=dict)
    # Virtual seconds and what happened then, for the plots.
    marks: list[tuple[float, str]] = field(default_factory=list)

    def over_time(self, name: str) -> Series:
        """Give the series of this name."""
        return self.series.setdefault(name, Series())

    def join(self, others: Iterable["Measures"]) -> "Measures":
        """Add the figures of other seeds to these and give these."""
        for other in others:
            for name in self.__slots__:
                mine, theirs = getattr(self, name), getattr(other, name)
                if isinstance(mine, Share | Values):
                    mine.join(theirs)
            self.violations += other.violations
            for name, series in other.series.items():
                self.over_time(name).join(series)
            self.marks = self.marks or list(other.marks)
        return self

    def summary(self) -> dict[str, float]:
        """Give measure -> value, for every measure that something was counted for."""
        low, _ = wilson(self.get_success.successes, self.get_success.trials)
        found = {
            "get_success": self.get_success.value,
            "get_success_low": low if self.get_success.trials else math.nan,
            "gets": float(self.get_success.trials),
            "get_seconds_median": self.get_seconds.quantile(0.5),
            "get_seconds_p95": self.get_seconds.quantile(0.95),
            "put_stored": self.put_stored.value,
            "acknowledgements": self.acknowledgements.mean,
            "closest_accuracy": self.closest_accuracy.mean,
            "lookups": float(len(self.closest_accuracy.values)),
            "hops": self.hops.mean,
            "hops_over_formula": self.hops_over_formula.mean,
            "lookup_requests": self.lookup_requests.mean,
            "lookup_seconds_median": self.lookup_seconds.quantile(0.5),
            "lookup_seconds_p95": self.lookup_seconds.quantile(0.95),
            "table_accuracy": self.over_time("table_accuracy").mean,
            "sibling_accuracy": self.over_time("sibling_accuracy").mean,
            "tables_empty": self.tables_empty.highest,
            "recovery_seconds": self.recovery_seconds.highest,
            "offer_seconds_99": self.offer_seconds.highest,
            "withdrawal_seconds_99": self.withdrawal_seconds.highest,
            "offer_coverage": self.over_time("offer_coverage").mean,
            "views_connected": self.views_connected.value,
            "messages_per_node_second": self.messages_per_node_second.mean,
            "bytes_per_node_second": self.bytes_per_node_second.mean,
            "gossip_bytes_per_node_second": self.gossip_bytes_per_node_second.mean,
            "popular_offers_found": min(self.popular_offers_found.values, default=math.nan),
            "rare_offers_found": self.rare_offers_found.mean,
            "adverts_held_most": self.adverts_held.highest,
            "busiest_bytes_per_second": self.busiest_bytes_per_second.highest,
            "jobs_completed": self.jobs_completed.value,
            "timeouts": self.timeouts.value,
            "build_cpu_seconds": self.build_cpu_seconds.highest,
            "cpu_seconds": self.cpu_seconds.highest,
            "wall_seconds": self.wall_seconds.highest,
            "memory_mb": self.memory_mb.highest,
            "violations": float(len(self.violations)),
        }
        return {name: value for name, value in found.items() if not math.isnan(value)}

    def interval(self) -> tuple[float, float]:
        """Give the 95 % interval of get success."""
        return wilson(self.get_success.successes, self.get_success.trials)


def as_row(measures: Measures) -> dict[str, Any]:
    """Give a run's or case's figures for the results file: rounded, so that the file is short and stays the same."""
    figures = {name: float(f"{value:.6g}") for name, value in measures.summary().items()}
    row: dict[str, Any] = {"measures": figures}
    if measures.get_success.trials:
        row["get_success_interval"] = [round(bound, 5) for bound in measures.interval()]
    if measures.violations:
        row["violations"] = measures.violations[:20]
    row["series"] = {
        name: [[round(at, 1), float(f"{value:.5g}")] for at, value in series.points()]
        for name, series in sorted(measures.series.items()) if series.counts
    }  # fmt: skip
    row["hops_histogram"] = histogram(measures.hops)
    row["marks"] = [[round(at, 1), text] for at, text in measures.marks]
    return row


def histogram(values: Values) -> dict[str, int]:
    """Give how often each whole number occurs."""
    counts: dict[int, int] = {}
    for value in values.values:
        counts[int(value)] = counts.get(int(value), 0) + 1
    return {str(number): counts[number] for number in sorted(counts)}
