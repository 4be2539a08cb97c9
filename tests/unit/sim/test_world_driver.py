"""The driver over real nodes keeps the same Protocol: operations, faults, adversaries, offers and jobs, in callbacks."""

import pytest

from p2pnode.errors import ConfigError
from p2pnode.sim.adversaries import plan
from p2pnode.sim.driver import NodeOptions
from p2pnode.sim.options import WorldOptions
from p2pnode.sim.trace import Trace
from p2pnode.sim.world_driver import WorldDriver

pytestmark = pytest.mark.slow


class Story:
    """Nodes that join, and then what a test lets happen at which second; `told` holds what came back."""

    def __init__(self, count: int, *happenings, options=None, seconds=60.0, seed=1) -> None:
        self.driver = WorldDriver(WorldOptions(seed=seed, nodes=count, latency="lan"), Trace("messages"), record_seconds=120.0)
        self.told: list = []
        self.count = count
        self.options = options or {}
        self.happenings = happenings
        self.digest = self.driver.run(self, seconds)

    def __call__(self, driver) -> None:
        for index in range(self.count):
            changes = self.options.get(index, {})
            known = tuple(range(min(index, 2)))
            driver.schedule(index * 0.3, lambda k=known, c=changes: driver.add_node(NodeOptions(entry_points=k, **c)))
        for at, happening in self.happenings:
            driver.schedule(at, lambda happening=happening: happening(driver, self.told.append))


def test_a_record_outlives_a_crash_of_its_publisher_and_clients_are_in_no_table() -> None:
    keys = []

    def look(driver, tell) -> None:
        tell([driver.is_server(index) for index in range(8)])
        hidden = driver.contact(5).node_id
        tell([hidden in driver.table(index) for index in range(8)])

    story = Story(
        8,
        (20.0, lambda driver, tell: keys.append(driver.put(3, b"salt", b"value", tell))),
        (25.0, look),
        (26.0, lambda driver, tell: driver.crash(3)),
        (26.5, lambda driver, tell: tell(driver.is_up(3))),
        (30.0, lambda driver, tell: driver.restart(3)),
        (40.0, lambda driver, tell: driver.get(6, keys[0], tell)),
        (45.0, lambda driver, tell: driver.lookup(4, b"\x11" * 32, tell)),
        options={5: {"is_reachable": False}},
    )
    stored, servers, holding, is_up, found, looked = story.told
    assert stored.is_stored
    assert stored.key == keys[0]
    assert servers == [True, True, True, True, True, False, True, True]
    assert not any(holding)
    assert is_up is False
    assert found.value == b"value"
    assert len(looked.contacts) == 6
    assert looked.hops >= 1


def test_a_cut_keeps_apart_and_healing_joins_again() -> None:
    keys = []

    def publish(driver, tell) -> None:
        keys.append(driver.put(0, b"salt", b"value", lambda stored: None))

    story = Story(
        6,
        (14.0, lambda driver, tell: driver.partition([[0, 1, 2], [3, 4, 5]])),
        (15.0, publish),
        (30.0, lambda driver, tell: driver.get(4, keys[0], tell)),
        (45.0, lambda driver, tell: driver.get(1, keys[0], tell)),
        (70.0, lambda driver, tell: driver.heal()),
        (170.0, lambda driver, tell: driver.get(4, keys[0], tell)),
        seconds=190.0,
    )
    assert [each.value for each in story.told] == [b"", b"value", b"value"]


def test_ground_ids_are_real_keys_and_attackers_are_asked_like_anybody() -> None:
    key = b"\x40" * 32
    asked = []

    def attack(driver, tell) -> None:
        within = 1 << 249
        attackers, options = plan("eclipse", driver, lambda: [driver.contact(index) for index in range(5)], 2, 2, key, within)
        for each in options:
            attackers.indices.append(driver.add_node(each))
        tell([int.from_bytes(each.node_id, "big") ^ int.from_bytes(key, "big") < within for each in options])
        asked.append(attackers)

    def look(driver, tell) -> None:
        evil = {contact.node_id for contact in asked[0].own()}
        tell([len(evil & set(driver.table(index))) for index in range(5)])

    story = Story(5, (12.0, attack), (50.0, look), seconds=55.0)
    near, known = story.told
    assert near == [True, True]
    assert sum(known) >= 5, "they answered the check, so they are in tables"


def test_offers_are_announced_withdrawn_and_bought_and_books_can_be_read() -> None:
    versions = []

    def note(driver, tell) -> None:
        versions.append([driver.offer(index, driver.contact(1).node_id) for index in range(4)])

    def books(driver, tell) -> None:
        jobs = [book.execute("SELECT count(*) FROM jobs").fetchone()[0] for book in driver.books().values()]
        tell((len(jobs), sum(jobs)))
        tell(driver.neighbours(0) != [])
        tell(driver.counters()["gossip_bytes"] > 0)

    story = Story(
        4,
        (40.0, note),
        (40.5, lambda driver, tell: driver.announce(1, 400)),
        (60.0, note),
        (61.0, lambda driver, tell: driver.buy(3, tell)),
        (75.0, books),
        (76.0, lambda driver, tell: driver.withdraw(1)),
        (110.0, note),
        options={index: {"offer_bytes": 400} for index in range(3)},
        seconds=115.0,
    )
    assert story.told == ["completed", (4, 1), True, True]
    first, second, third = versions
    assert all(first)
    assert all(after > before for before, after in zip(first, second, strict=True))
    assert third == [0, 0, 0, 0]


def test_the_same_seed_gives_the_same_events_and_errors_of_callbacks_end_the_run() -> None:
    assert Story(4, seconds=20.0).digest == Story(4, seconds=20.0).digest != Story(4, seconds=20.0, seed=2).digest

    def explode(driver, tell) -> None:
        raise ZeroDivisionError("in a callback")

    with pytest.raises(ZeroDivisionError):
        Story(2, (5.0, explode), seconds=20.0)
    with pytest.raises(RuntimeError, match="never"):
        Story(2, (5.0, lambda driver, tell: driver.fail("must never be")), seconds=20.0)
    with pytest.raises(ConfigError):
        Story(2, (5.0, lambda driver, tell: driver.fill_tables()), seconds=20.0)
