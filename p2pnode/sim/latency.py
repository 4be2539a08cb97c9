"""How long bytes are under way between two simulated machines: a local network, one country, or continents.

A machine has a place, drawn once from the seed: a region and the delay of its own access line. A pair's one-way delay is what
lies between the regions, times what the pair's route makes of it, plus both access lines. All three are log-normal, which is
how measured round trips between hosts of the internet spread: most pairs near the middle, a long tail above.

The regions' table is of the order of the round trips that public measurement platforms report between cities of those
continents, halved; two machines of one continent are 5 to 25 ms apart, opposite sides of the world about 150.
"""

import hashlib
import math
import random  # noqa: TID251 - seeded, like everything in a simulation
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from p2pnode.errors import ConfigError

REGIONS: Final = ("north america", "south america", "europe", "africa", "asia", "oceania")
# Where machines are: roughly the shares of hosts that peer-to-peer measurements see.
_REGION_SHARES: Final = (0.30, 0.06, 0.36, 0.03, 0.21, 0.04)
# One way between regions, milliseconds, without the access lines; on the diagonal: within the region.
_REGION_MS: Final = (
    (16.0, 65.0, 48.0, 95.0, 80.0, 85.0),
    (65.0, 14.0, 98.0, 130.0, 145.0, 140.0),
    (48.0, 98.0, 10.0, 62.0, 75.0, 135.0),
    (95.0, 130.0, 62.0, 24.0, 115.0, 150.0),
    (80.0, 145.0, 75.0, 115.0, 26.0, 62.0),
    (85.0, 140.0, 135.0, 150.0, 62.0, 12.0),
)
_ROUTE_SIGMA: Final = 0.18
_FLOOR_SECONDS: Final = 0.00005


@dataclass(frozen=True, slots=True)
class Place:
    """Where a machine is: its region's number and the one-way delay of its access line in seconds."""

    region: int
    access_seconds: float


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """One kind of network. jitter: mean of the exponential delay added to each delivery, as a share of the pair's delay."""

    name: str
    jitter: float
    _place: Callable[[random.Random], Place]
    _between: Callable[[Place, Place], float]
    _route_sigma: float

    def place(self, seed: int, host: str) -> Place:
        """Give a machine's place: the same for the same seed and name."""
        return self._place(random.Random(f"{seed}/place/{host}"))

    def one_way(self, seed: int, source: str, here: Place, target: str, there: Place) -> float:
        """Give the pair's one-way delay in seconds, the same in both directions and in every run of the seed."""
        seconds = self._between(here, there)
        if self._route_sigma:
            seconds *= math.exp(self._route_sigma * _normal(seed, *sorted((source, target))))
        return max(_FLOOR_SECONDS, seconds + here.access_seconds + there.access_seconds)


def flat(seconds: float) -> LatencyModel:
    """Give a network in which every pair is exactly this far apart, without jitter: for tests that count round trips."""
    nowhere = Place(0, 0.0)
    return LatencyModel("flat", 0.0, lambda draw: nowhere, lambda here, there: seconds, 0.0)


def latency_model(name: str, seconds: float = 0.01) -> LatencyModel:
    """Give a model by name: flat (with `seconds`), lan, wan or continents. Raises ConfigError."""
    if name == "flat":
        return flat(seconds)
    if name == "lan":
        # Switches and wireless: a quarter of a millisecond each side, now and then two.
        return LatencyModel("lan", 0.1, lambda draw: Place(0, draw.lognormvariate(math.log(0.00025), 0.6)), _nothing, 0.0)
    if name == "wan":
        # One country: 6 ms between cities, cable and DSL lines of 2 to 15 ms.
        return LatencyModel("wan", 0.05, lambda draw: Place(0, _access(draw)), lambda here, there: 0.006, _ROUTE_SIGMA)
    if name == "continents":
        return LatencyModel("continents", 0.05, _on_earth, _between_regions, _ROUTE_SIGMA)
    raise ConfigError(f"there is no latency model {name!r}; choose flat, lan, wan or continents")


def _on_earth(draw: random.Random) -> Place:
    return Place(draw.choices(range(len(REGIONS)), _REGION_SHARES)[0], _access(draw))


def _access(draw: random.Random) -> float:
    """A home's line, one way: 4 ms in the middle, one in twenty above 12."""
    return draw.lognormvariate(math.log(0.004), 0.7)


def _between_regions(here: Place, there: Place) -> float:
    return _REGION_MS[here.region][there.region] / 1000


def _nothing(here: Place, there: Place) -> float:
    return 0.0


def _normal(seed: int, first: str, second: str) -> float:
    """A standard normal value that belongs to a pair: Box and Muller's transform of a hash."""
    digest = hashlib.blake2b(f"{seed}/route/{first}/{second}".encode(), digest_size=12).digest()
    one = (int.from_bytes(digest[:6], "big") + 1) / 2**48
    two = int.from_bytes(digest[6:], "big") / 2**48
    return math.sqrt(-2 * math.log(one)) * math.cos(2 * math.pi * two)
