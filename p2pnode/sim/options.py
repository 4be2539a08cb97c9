"""Everything that is chosen about a simulated world before it begins."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from p2pnode.errors import ConfigError
from p2pnode.sim.runtime import SecondsOf

# Up to so many nodes a world uses the real cipher; beyond, one in the clear, which its results say.
NOISE_NODES_MAX: Final = 100
# Three per cent of what lies between two machines of different continents.
_LARGE_WORLD_GRAIN: Final = 0.002
CIPHERS: Final = ("auto", "noise", "plain")


@dataclass(frozen=True, slots=True)
class WorldOptions:
    """One world. The same options give the same run.

    nodes: how many the scenario will start, for the choice of the cipher. latency: flat (latency_seconds between any two), lan,
    wan or continents. loss: share of requests, of replies and of connection attempts that never arrive. duplication,
    reordering: of connection attempts and of deliveries. bandwidth_bytes_per_second: of each machine, each way. nat: share of
    machines by kind (`sim.nat`); the rest are public. commit_seconds: until a write is durable. clock_skew_ms: each machine's
    wall clock is off by up to so much. settings: of every node, by dotted name. seconds_of: the modelled time of a call;
    None runs every call at once. grain_seconds: the step in which time moves; None chooses by the number of nodes.
    trace: messages, events or off.
    """

    seed: int = 1
    nodes: int = 0
    cipher: str = "auto"
    latency: str = "flat"
    latency_seconds: float = 0.01
    loss: float = 0.0
    duplication: float = 0.0
    reordering: float = 0.0
    bandwidth_bytes_per_second: float = math.inf
    nat: Mapping[str, float] = field(default_factory=dict)
    commit_seconds: float = 0.0
    clock_skew_ms: int = 0
    settings: Mapping[str, str] = field(default_factory=dict)
    seconds_of: SecondsOf | None = None
    grain_seconds: float | None = None
    trace: str = "messages"

    def __post_init__(self) -> None:
        if self.cipher not in CIPHERS:
            raise ConfigError(f"there is no cipher {self.cipher!r}; choose {', '.join(CIPHERS)}")
        for name in ("loss", "duplication", "reordering"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is a share: at least 0 and below 1")

    @property
    def grain(self) -> float:
        """The step in which time moves, seconds: none in small worlds, and none where distances are as short as the step."""
        if self.grain_seconds is not None:
            return self.grain_seconds
        return _LARGE_WORLD_GRAIN if self.nodes > NOISE_NODES_MAX and self.latency in ("wan", "continents") else 0.0

    @property
    def is_plain(self) -> bool:
        """True if sessions are in the clear."""
        return self.cipher == "plain" or (self.cipher == "auto" and self.nodes > NOISE_NODES_MAX)
