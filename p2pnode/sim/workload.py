"""What the nodes of an experiment are used for, and how well it went: records, gets, lookups, offers, recovery."""

import math
from collections.abc import Callable
from typing import Final

from p2pnode.sim.chance import seeded
from p2pnode.sim.driver import Driver, Found, Stored
from p2pnode.sim.measures import Measures, hops_formula
from p2pnode.sim.population import Population, drawn_reader

K: Final = 16
# What "recovered" means: this share of the gets of one batch succeeds, and every node can reach every other by gossip.
RECOVERED_SHARE: Final = 0.99
# What "everybody knows" means for an offer.
KNOWN_SHARE: Final = 0.99
OFFER_POLL_SECONDS: Final = 0.25
OFFER_WAIT_SECONDS: Final = 120.0
_VALUE_BYTES: Final = 200


class Workload:
    """Uses the network and counts. began: virtual second at which the timeline began, for the series."""

    def __init__(self, driver: Driver, population: Population, measures: Measures) -> None:
        self.driver = driver
        self.population = population
        self.measures = measures
        self.began = 0.0
        # Key -> the newest version whose publication has ended well; every value that was put -> its version.
        self.records: dict[bytes, int] = {}
        self._versions: dict[bytes, int] = {}
        self._chance = seeded(driver.seed, "workload")
        self._published = 0
        self._owners: dict[bytes, tuple[int, bytes]] = {}

    # --- records ------------------------------------------------------------------------------------------------------

    def publish(self, count: int) -> None:
        """Let the publishers put so many records, in turn, a quarter of a second apart."""
        publishers = [index for index in self.population.publishers if index in self.population.up_since]
        for number in range(count if publishers else 0):
            index = publishers[number % len(publishers)]
            self._published += 1
            salt = b"record %d" % self._published
            self.driver.schedule(number * 0.25, lambda index=index, salt=salt: self.put(index, salt, 1))  # type: ignore[misc]

    def put(self, index: int, salt: bytes, version: int, done: Callable[[bytes, bool], None] | None = None) -> None:
        """Let a node publish one version of a record; done gets the key and whether enough nodes took it."""
        if index not in self.population.up_since:
            return
        value = (b"%s of %d, version %d " % (salt, index, version)).ljust(_VALUE_BYTES, b".")
        self._versions[value] = version

        def stored(outcome: Stored) -> None:
            self.measures.put_stored.add(outcome.is_stored)
            self.measures.acknowledgements.add(outcome.acknowledgements)
            if outcome.is_stored:
                self.records[outcome.key] = max(version, self.records.get(outcome.key, 0))
                self._owners[outcome.key] = (index, salt)
            if done is not None:
                done(outcome.key, outcome.is_stored)

        self.driver.put(index, salt, value, stored)

    def update(self, version: int) -> None:
        """Let every publisher put a new version of each of its records."""
        for key in list(self.records):
            index, salt = self._owners[key]
            self.put(index, salt, version)

    def gets(self, count: int, over: float, done: Callable[[bool], None] | None = None) -> None:
        """Let readers get so many records, evenly over a time."""
        for number in range(count):
            self.driver.schedule(over * number / count, lambda: self.get_some(done))

    def get_some(self, done: Callable[[bool], None] | None = None) -> None:
        """Let one reader get one record, both drawn."""
        reader = drawn_reader(self.population, self._chance)
        if reader is not None and self.records:
            self.get(reader, self._chance.choice(list(self.records)), done)

    def get(self, reader: int, key: bytes, done: Callable[[bool], None] | None = None) -> None:
        """Let a node get a record and count whether it is the newest version; a reader that goes meanwhile does not count."""
        since = self.population.up_since.get(reader)
        newest = self.records.get(key, 1)

        def found(outcome: Found) -> None:
            if self.population.up_since.get(reader) != since:
                return
            # A version whose publication has not ended yet, or fell short, is as good.
            is_success = self._versions.get(outcome.value, 0) >= newest
            self.measures.get_success.add(is_success)
            self.measures.get_seconds.add(outcome.seconds)
            self._over_time("get_success", is_success)
            self._count(outcome)
            if done is not None:
                done(is_success)

        self.driver.get(reader, key, found)

    # --- lookups ------------------------------------------------------------------------------------------------------

    def lookups(self, count: int, over: float) -> None:
        """Let random nodes look up random targets, evenly over a time, and compare what they find with the truth."""
        for number in range(count):
            self.driver.schedule(over * number / count, self.look_up)

    def look_up(self) -> None:
        """Let one node look up one target, both drawn."""
        live = self.population.live()
        index = self._chance.choice(live)
        target = self._chance.randbytes(32)
        self.driver.lookup(index, target, lambda outcome: self._looked_up(index, target, outcome))

    def _looked_up(self, index: int, target: bytes, outcome: Found) -> None:
        census = self.population.census()
        own = self.driver.contact(index).node_id
        truth = [node_id for node_id in census.closest(target, K + 1) if node_id != own][:K]
        if not truth:
            return
        hit = len(set(truth) & set(outcome.contacts[:K])) / len(truth)
        measures = self.measures
        measures.closest_accuracy.add(hit)
        measures.hops.add(outcome.hops)
        measures.hops_over_formula.add(outcome.hops - hops_formula(len(census), K))
        measures.lookup_seconds.add(outcome.seconds)
        measures.lookup_requests.add(outcome.asked)
        self._over_time("closest_accuracy", hit)
        self._over_time("hops", outcome.hops)
        self._count(outcome)

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def buy(self, count: int, over: float) -> None:
        """Let random nodes buy inferences, evenly over a time."""
        for number in range(count):
            self.driver.schedule(over * number / count, self._buy_one)

    def _buy_one(self) -> None:
        index = self._chance.choice(self.population.live())
        self.driver.buy(index, lambda end: self.measures.jobs_completed.add(end == "completed"))

    # --- recovery -----------------------------------------------------------------------------------------------------

    def recovery(self, gets: int, every: float, at_most: float, *, with_offers: bool) -> None:
        """Measure the time from now until the end of the first good batch of gets.

        A batch is good when 99 in 100 of its gets have succeeded before another `every` has passed: one that takes longer has
        not recovered. With offers, gossip must be one network at the batch's end, too.
        """
        began = self.driver.now
        is_over = False

        def batch() -> None:
            nonlocal is_over
            outcomes: list[bool] = []
            ends = self.driver.now + every
            is_whole = not with_offers

            def look() -> None:
                nonlocal is_whole
                is_whole = is_whole or self.views_are_connected()
                if not is_over:
                    batch()

            def judge() -> None:
                nonlocal is_over
                is_good = is_whole and sum(outcomes) >= RECOVERED_SHARE * gets
                if not is_over and (is_good or ends - began >= at_most):
                    is_over = True
                    self.measures.recovery_seconds.add(ends - began if is_good else math.inf)

            self.gets(gets, every, outcomes.append)
            self.driver.schedule(every, look)
            self.driver.schedule(2 * every, judge)

        batch()

    def views_are_connected(self) -> bool:
        """Say whether every live node can reach every other along gossip neighbours."""
        live = {self.driver.contact(index).node_id: index for index in self.population.live()}
        if not live:
            return False
        start = next(iter(live))
        seen, frontier = {start: None}, [start]
        both: dict[bytes, list[bytes]] = {node_id: [] for node_id in live}
        for node_id, index in live.items():
            for other in self.driver.neighbours(index):
                if other in both:
                    both[node_id].append(other)
                    both[other].append(node_id)
        while frontier:
            for other in both[frontier.pop()]:
                if other not in seen:
                    seen[other] = None
                    frontier.append(other)
        return len(seen) == len(live)

    # --- offers -------------------------------------------------------------------------------------------------------

    def new_offer(self) -> None:
        """Let one node change its offer, and measure until nearly everybody knows the new version."""
        index = self._seller()
        if index is None:
            return
        publisher = self.driver.contact(index).node_id
        before = self.driver.offer(index, publisher)
        self.driver.announce(index, self.population.options.offer_bytes)
        self._await_offers(publisher, lambda version: version > before, self.measures.offer_seconds.add)

    def withdraw_offer(self) -> None:
        """Let one node take its offer back, and measure until nearly everybody has dropped it."""
        index = self._seller()
        if index is None:
            return
        publisher = self.driver.contact(index).node_id
        self.driver.withdraw(index)
        self._await_offers(publisher, lambda version: version == 0, self.measures.withdrawal_seconds.add)

    def _seller(self) -> int | None:
        live = self.population.settled() or self.population.live()
        sellers = [index for index in live if self.driver.offer(index, self.driver.contact(index).node_id)]
        return self._chance.choice(sellers) if sellers else None

    def _await_offers(self, publisher: bytes, knows: Callable[[int], bool], done: Callable[[float], None]) -> None:
        began = self.driver.now

        def look() -> None:
            live = self.population.live()
            count = sum(knows(self.driver.offer(index, publisher)) for index in live)
            if count >= KNOWN_SHARE * len(live):
                done(self.driver.now - began)
            elif self.driver.now - began >= OFFER_WAIT_SECONDS:
                done(math.inf)
            else:
                self.driver.schedule(OFFER_POLL_SECONDS, look)

        self.driver.schedule(OFFER_POLL_SECONDS, look)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _count(self, outcome: Found) -> None:
        self.measures.timeouts.successes += outcome.failed
        self.measures.timeouts.trials += outcome.asked

    def _over_time(self, name: str, value: float) -> None:
        self.measures.over_time(name).add(self.driver.now - self.began, value)
