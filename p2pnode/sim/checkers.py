"""What must never happen, each told by one small class that looks from outside: none of these asks the code it judges.

A checker sees the driver and the population at every sample and at the end, and gives a sentence for each breach.
"""

import resource
from collections.abc import Sequence
from statistics import median
from typing import Final, Protocol

from p2pnode.sim.book_checkers import CreditsConserved, NoDoublePayment, NoLostJob
from p2pnode.sim.driver import Driver
from p2pnode.sim.population import Population

# A node may be without contacts for so long after it came up, and after something happened to the network.
EMPTY_SECONDS: Final = 300.0
# Growth from the second quarter of the samples to the last that counts as a leak, beyond a floor that noise may reach.
GROWTH_MAX: Final = 1.5
MEMORY_FLOOR_MB: Final = 100.0
TASKS_FLOOR: Final = 2000.0
SAMPLES_MIN: Final = 16


class Checker(Protocol):
    """One invariant."""

    def look(self, driver: Driver, population: Population) -> list[str]:
        """Look at the network now; gives the breaches seen."""
        ...

    def end(self, driver: Driver, population: Population) -> list[str]:
        """Look back when the run is over."""
        ...


class TablesNeverEmpty:
    """A node that has been up for five minutes knows somebody, whatever has happened; two samples in a row forgive nothing."""

    def __init__(self) -> None:
        self._empty: dict[int, float] = {}

    def look(self, driver: Driver, population: Population) -> list[str]:
        """Give the nodes whose tables have been empty for too long."""
        found = []
        still: dict[int, float] = {}
        for index in population.settled():
            if driver.table(index):
                continue
            since = still[index] = self._empty.get(index, driver.now)
            if since + EMPTY_SECONDS <= driver.now:
                found.append(f"node {index} has known nobody for {driver.now - since:.0f} s at {driver.now:.0f} s")
                del still[index]
        self._empty = still
        return found

    def end(self, driver: Driver, population: Population) -> list[str]:
        """Nothing more to say."""
        return []


class Flat:
    """Something that may wander but must not grow while the number of nodes stays: memory, tasks."""

    def __init__(self, name: str, unit: str, floor: float) -> None:
        self._name = name
        self._unit = unit
        self._floor = floor
        self._samples: list[float] = []
        self._nodes: list[int] = []

    def value(self, driver: Driver) -> float:
        """Give what is watched, now."""
        return driver.counters()["tasks"]

    def look(self, driver: Driver, population: Population) -> list[str]:
        """Take a sample."""
        self._samples.append(self.value(driver))
        self._nodes.append(len(population.up_since))
        return []

    def end(self, driver: Driver, population: Population) -> list[str]:
        """Compare the medians of the last quarter and of the second, if there were as many nodes in both.

        A sample that falls into a burst says nothing about what stays.
        """
        quarter = len(self._samples) // 4
        if len(self._samples) < SAMPLES_MIN:
            return []
        early, late = self._samples[quarter : 2 * quarter], self._samples[3 * quarter :]
        if _mean(self._nodes[3 * quarter :]) > 1.1 * _mean(self._nodes[quarter : 2 * quarter]):
            return []
        before, after = median(early), median(late)
        if after > GROWTH_MAX * before and after - before > self._floor:
            return [f"{self._name} grew from {before:.0f} to {after:.0f} {self._unit}"]
        return []


class FlatTasks(Flat):
    """The number of tasks, or of waiting events."""

    def __init__(self) -> None:
        super().__init__("the number of tasks", "tasks", TASKS_FLOOR)


class FlatMemory(Flat):
    """The memory of the process."""

    def __init__(self) -> None:
        super().__init__("memory", "MB", MEMORY_FLOOR_MB)

    def value(self, driver: Driver) -> float:
        """Give the largest resident size so far, in MB."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def default_checkers() -> list[Checker]:
    """Give the checkers of every run."""
    return [TablesNeverEmpty(), FlatTasks(), FlatMemory(), NoLostJob(), NoDoublePayment(), CreditsConserved()]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
