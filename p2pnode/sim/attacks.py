"""How an experiment attacks: adversaries come up, work, and go; with ground ids, one key after the other."""

from typing import Final

from p2pnode.discovery.records.record import record_key
from p2pnode.errors import InputError
from p2pnode.sim.adversaries import GROUND, KINDS, Attackers, plan
from p2pnode.sim.chance import seeded
from p2pnode.sim.driver import Driver
from p2pnode.sim.population import Population
from p2pnode.sim.workload import Workload
from p2pnode.wire.messages.discovery import Contact

# An attack on one key: the ids come up and speak to everybody, then the record is put, then put anew, then read by many.
FIRST_PUT_SECONDS: Final = 50.0
SECOND_PUT_SECONDS: Final = 60.0
GETS_SECONDS: Final = 75.0
GETS_OVER_SECONDS: Final = 20.0
READERS_MAX: Final = 20
END_SECONDS: Final = 105.0
ROUND_SECONDS: Final = 120.0


class Attacks:
    """The attacks of one experiment."""

    def __init__(self, driver: Driver, population: Population, workload: Workload) -> None:
        self._driver = driver
        self._population = population
        self._workload = workload
        self._chance = seeded(driver.seed, "attacks")
        self._running: list[Attackers] = []
        self._rounds = 0

    def begin(self, kind: str, ids: int, subnets: int, keys: int) -> None:
        """Begin an attack. With ground ids: one round of `ROUND_SECONDS` for each of so many keys. Raises InputError."""
        if kind not in KINDS:
            raise InputError(f"there is no attack {kind!r}; choose from {', '.join(KINDS)}")
        if kind not in GROUND:
            self._bring_up(kind, ids, subnets, b"", 0)
            return
        for number in range(keys):
            self._driver.schedule(number * ROUND_SECONDS, lambda: self._attack_key(kind, ids, subnets))

    def end(self) -> None:
        """Take every adversary down."""
        for attackers in self._running:
            self._take_down(attackers)
        self._running.clear()

    def _attack_key(self, kind: str, ids: int, subnets: int) -> None:
        """Stand around a key that a publisher is about to use, and see whether readers find the newest version."""
        driver, population, workload = self._driver, self._population, self._workload
        publisher = self._chance.choice(population.publishers)
        self._rounds += 1
        salt = b"attacked %d" % self._rounds
        key = record_key(driver.contact(publisher).node_id, salt)
        nearest = population.census().closest(key, 1)[0]
        within = int.from_bytes(nearest, "big") ^ int.from_bytes(key, "big")
        attackers = self._bring_up(kind, ids, subnets, key, within)

        def read() -> None:
            # Whoever published it, stored or not, must be heard: a publication that fell short counts against us.
            workload.records.setdefault(key, 1)
            readers = population.live_readers()
            chosen = readers if len(readers) <= READERS_MAX else self._chance.sample(readers, READERS_MAX)
            for number, reader in enumerate(chosen):
                driver.schedule(GETS_OVER_SECONDS * number / len(chosen), lambda reader=reader: workload.get(reader, key))  # type: ignore[misc]

        driver.schedule(FIRST_PUT_SECONDS, lambda: workload.put(publisher, salt, 1))
        driver.schedule(SECOND_PUT_SECONDS, lambda: workload.put(publisher, salt, 2))
        driver.schedule(GETS_SECONDS, read)
        driver.schedule(END_SECONDS, lambda: self._take_down(attackers))

    def _bring_up(self, kind: str, ids: int, subnets: int, key: bytes, within: int) -> Attackers:
        driver = self._driver

        def victims() -> list[Contact]:
            return [driver.contact(index) for index in self._population.up_since]

        attackers, options = plan(kind, driver, victims, ids, subnets, key, within)
        for each in options:
            attackers.indices.append(driver.add_node(each))
        self._running.append(attackers)
        return attackers

    def _take_down(self, attackers: Attackers) -> None:
        if attackers.is_on:
            attackers.is_on = False
            for index in attackers.indices:
                self._driver.crash(index)
