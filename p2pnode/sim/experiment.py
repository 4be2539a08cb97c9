"""One run of one case: builds the network on a driver, walks the timeline, samples, and gives what was measured.

The experiment is callbacks alone, so it is the same on both drivers.
"""

import resource
from collections.abc import Callable
from typing import Final

from p2pnode.sim.attacks import Attacks
from p2pnode.sim.chance import seeded
from p2pnode.sim.checkers import Checker, default_checkers
from p2pnode.sim.driver import Driver
from p2pnode.sim.measures import Measures
from p2pnode.sim.population import Population
from p2pnode.sim.scenario import Case, Step
from p2pnode.sim.workload import K, Workload

# Nodes whose tables, and nodes whose offers, are looked at in one sample of a large network.
TABLES_SAMPLED_MAX: Final = 300
OFFERS_SAMPLED_MAX: Final = 50
# Nodes count for tables and offers once they have been up for so long: newcomers learn for some seconds.
GROWN_SECONDS: Final = 60.0
PROGRESS_SECONDS: Final = 5.0


class Experiment:
    """Call it with a driver to begin; `measures` is complete when the driver's run has ended.

    on_progress: told now and then how many virtual seconds have passed of how many.
    """

    def __init__(self, case: Case, seed: int, on_progress: Callable[[float, float], None] | None = None) -> None:
        self.case = case
        self.seed = seed
        self.measures = Measures()
        self.checkers: list[Checker] = default_checkers()
        self._on_progress = on_progress
        self._node_seconds = 0.0
        self._live = 0
        self._changed_at = 0.0
        self._began = 0.0
        self._counters: dict[str, float] = {}
        self._chance = seeded(seed, "experiment")
        self._driver: Driver
        self._population: Population
        self._workload: Workload
        self._attacks: Attacks

    @property
    def build_seconds(self) -> float:
        """Virtual time until the timeline begins."""
        options = self.case.options
        return (0.0 if options.tables == "oracle" else options.nodes * options.join_seconds) + options.settle_seconds

    @property
    def seconds(self) -> float:
        """Virtual length of the whole run."""
        return self.build_seconds + self.case.seconds + self.case.options.last_seconds

    def __call__(self, driver: Driver) -> None:
        """Begin."""
        self._driver = driver
        self._population = Population(driver, self.case.options, self._changed)
        self._workload = Workload(driver, self._population, self.measures)
        self._attacks = Attacks(driver, self._population, self._workload)
        self._population.build()
        if self.case.options.tables == "oracle":
            driver.schedule(0.0, driver.fill_tables)
        driver.schedule(self.build_seconds, self._begin)
        driver.schedule(self.seconds - 0.001, self._end)
        self._report()

    # --- the timeline -------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        driver, options = self._driver, self.case.options
        self._began = self._workload.began = driver.now
        self._node_seconds, self._changed_at = 0.0, driver.now
        self._counters = dict(driver.counters())
        self.measures.build_cpu_seconds.add(cpu_seconds())
        if options.loss:
            driver.set_loss(options.loss)
        if options.churn != "none":
            self._population.churn(options.churn)
        for step in self.case.steps:
            driver.schedule(step.at, lambda step=step: self._take(step))  # type: ignore[misc]
        self._sample()

    def _take(self, step: Step) -> None:
        self.measures.marks.append((step.at, step.do))
        _STEPS[step.do](self, dict(step.parameters))

    def _roll(self, times: int, every: float, share: float) -> None:
        for number in range(times):
            self._driver.schedule(number * every, lambda: self._driver.partition(self._population.groups([1 - share, share])))
            self._driver.schedule((number + 0.5) * every, self._driver.heal)

    def _every(self, times: int, every: float, action: Callable[[], None]) -> None:
        for number in range(times):
            self._driver.schedule(number * every, action)

    # --- sampling -----------------------------------------------------------------------------------------------------

    def _sample(self) -> None:
        driver, population = self._driver, self._population
        at = driver.now - self._began
        grown = population.up_for(GROWN_SECONDS)
        self._sample_tables(grown, at)
        if self.case.options.offer_bytes:
            self._sample_offers(grown, at)
        self.measures.over_time("nodes").add(at, len(population.up_since))
        for checker in self.checkers:
            self.measures.violations += checker.look(driver, population)
        if driver.now + self.case.options.sample_seconds < self.seconds:
            driver.schedule(self.case.options.sample_seconds, self._sample)

    def _sample_tables(self, grown: list[int], at: float) -> None:
        driver, census = self._driver, self._population.census()
        self.measures.tables_empty.add(sum(not driver.table(index) for index in self._population.settled()))
        chosen = grown if len(grown) <= TABLES_SAMPLED_MAX else self._chance.sample(grown, TABLES_SAMPLED_MAX)
        for index in chosen:
            table = dict.fromkeys(driver.table(index))
            if table:
                self.measures.over_time("table_accuracy").add(at, sum(census.holds(node_id) for node_id in table) / len(table))
            own = driver.contact(index).node_id
            near = [node_id for node_id in census.closest(own, K + 1) if node_id != own][:K]
            if near:
                self.measures.over_time("sibling_accuracy").add(at, sum(node_id in table for node_id in near) / len(near))

    def _sample_offers(self, grown: list[int], at: float) -> None:
        driver = self._driver
        ids = {index: driver.contact(index).node_id for index in grown}
        sellers = [node_id for index, node_id in ids.items() if driver.offer(index, node_id)]
        chosen = grown if len(grown) <= OFFERS_SAMPLED_MAX else self._chance.sample(grown, OFFERS_SAMPLED_MAX)
        for index in chosen:
            known = driver.offers(index)
            share = sum(publisher in known for publisher in sellers) / len(sellers) if sellers else 1.0
            self.measures.over_time("offer_coverage").add(at, share)
        if grown:
            self.measures.views_connected.add(self._workload.views_are_connected())

    # --- the end ------------------------------------------------------------------------------------------------------

    def _end(self) -> None:
        driver, measures = self._driver, self.measures
        self._changed(-1)
        for checker in self.checkers:
            measures.violations += checker.end(driver, self._population)
        sent = {name: total - self._counters.get(name, 0.0) for name, total in driver.counters().items()}
        if self._node_seconds:
            measures.messages_per_node_second.add(sent["messages"] / self._node_seconds)
            measures.bytes_per_node_second.add(sent["bytes"] / self._node_seconds)
            if self.case.options.offer_bytes:
                measures.gossip_bytes_per_node_second.add(sent["gossip_bytes"] / self._node_seconds)
        measures.cpu_seconds.add(cpu_seconds())
        measures.memory_mb.add(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)

    def _changed(self, index: int) -> None:
        now = self._driver.now
        self._node_seconds += self._live * (now - self._changed_at)
        self._changed_at, self._live = now, len(self._population.up_since)

    def _report(self) -> None:
        if self._on_progress is not None:
            self._on_progress(self._driver.now, self.seconds)
            self._driver.schedule(PROGRESS_SECONDS, self._report)


def cpu_seconds() -> float:
    """Give the processor time of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


_STEPS: Final[dict[str, Callable[..., None]]] = {
    "publish": lambda run, p: run._workload.publish(p["records"]),
    "update": lambda run, p: run._workload.update(p["version"]),
    "gets": lambda run, p: run._workload.gets(p["count"], p["over"]),
    "lookups": lambda run, p: run._workload.lookups(p["count"], p["over"]),
    "jobs": lambda run, p: run._workload.buy(p["count"], p["over"]),
    "grow": lambda run, p: run._population.grow(p["to"], p["over"]),
    "kill": lambda run, p: run._population.kill(p["fraction"]),
    "leave": lambda run, p: run._population.leave(p["fraction"]),
    "restart": lambda run, p: run._population.restart(p["fraction"]),
    "flap": lambda run, p: run._population.flap(p["fraction"], p["times"], p["every"]),
    "lose_entry_points": lambda run, p: run._population.lose_entry_points(),
    "partition": lambda run, p: run._driver.partition(run._population.groups(p["shares"]), is_symmetric=p["symmetric"]),
    "roll_partitions": lambda run, p: run._roll(p["times"], p["every"], p["share"]),
    "heal": lambda run, p: run._driver.heal(),
    "loss": lambda run, p: run._driver.set_loss(p["fraction"]),
    "churn": lambda run, p: run._population.churn(p["model"]),
    "attack": lambda run, p: run._attacks.begin(p["kind"], p["ids"], p["subnets"], p["keys"]),
    "end_attack": lambda run, p: run._attacks.end(),
    "recovery": lambda run, p: run._workload.recovery(p["gets"], p["every"], p["for_at_most"], with_offers=p["offers"]),
    "new_offer": lambda run, p: run._every(p["times"], p["every"], run._workload.new_offer),
    "withdraw_offer": lambda run, p: run._every(p["times"], p["every"], run._workload.withdraw_offer),
}
