"""The fast driver: real machines find each other, keep records over crashes, gossip, and repeat to the last event."""

import pytest

from p2pnode.discovery.records.record import record_key
from p2pnode.errors import ConfigError
from p2pnode.sim.driver import NodeOptions
from p2pnode.sim.fast_driver import FastDriver
from p2pnode.sim.latency import latency_model


def grown(count=24, seed=1, seconds=90.0, options=None, **arguments) -> FastDriver:
    """A network in which everybody has joined; time stands at `seconds`."""
    driver = FastDriver(seed, latency_model("wan"), **arguments)
    for index in range(count):
        known = tuple(range(min(index, 3)))
        changes = (options or {}).get(index, {})
        driver.network.at(index * 0.2, driver.add_node, NodeOptions(entry_points=known, **changes))
    driver.network.run(seconds, lambda: False)
    return driver


def after(driver: FastDriver, seconds: float) -> None:
    driver.network.run(driver.now + seconds, lambda: False)


def test_everybody_in_a_small_network_is_a_server_and_knows_its_sixteen_nearest() -> None:
    driver = grown()
    ids = [driver.contact(index).node_id for index in range(24)]
    for index, own in enumerate(ids):
        assert driver.is_server(index)
        nearest = sorted(ids, key=lambda each, own=own: int.from_bytes(each, "big") ^ int.from_bytes(own, "big"))[1:17]
        assert set(nearest) <= set(driver.table(index))


@pytest.mark.slow
def test_a_record_is_stored_found_and_outlives_its_holders_and_its_publishers_crash() -> None:
    driver = grown(options={9: {"is_reachable": False}}, record_seconds=120.0)
    stored, found = [], []
    key = driver.put(9, b"salt", b"value", stored.append)
    assert key == record_key(driver.contact(9).node_id, b"salt")
    after(driver, 5.0)
    assert stored[0].is_stored
    assert stored[0].acknowledgements >= 16
    driver.get(3, key, found.append)
    driver.get(3, bytes(32), found.append)
    after(driver, 10.0)
    assert sorted(each.value for each in found) == [b"", b"value"]
    for index in (*range(12, 20), 9):
        driver.crash(index)
    after(driver, 10.0)
    driver.restart(9)
    # The record lives for two minutes: it is there only if its publisher has written it again after its crash.
    after(driver, 240.0)
    driver.get(3, key, found.append)
    after(driver, 10.0)
    assert found[-1].value == b"value"


def test_who_cannot_be_reached_is_a_client_and_in_no_table() -> None:
    driver = grown(options={7: {"is_reachable": False}})
    assert not driver.is_server(7)
    assert all(driver.contact(7).node_id not in driver.table(index) for index in range(24))
    assert len(driver.table(7)) > 16


@pytest.mark.slow
def test_a_lookup_finds_the_truly_nearest_and_says_what_it_took() -> None:
    driver = grown(40)
    found = []
    driver.lookup(11, b"\x42" * 32, found.append)
    after(driver, 10.0)
    (outcome,) = found
    ids = [driver.contact(index).node_id for index in range(40) if index != 11]
    nearest = sorted(ids, key=lambda each: int.from_bytes(each, "big") ^ int.from_bytes(b"\x42" * 32, "big"))
    assert list(outcome.contacts) == nearest[:16]
    assert outcome.asked >= 16
    assert outcome.failed == 0
    assert 0 < outcome.seconds < 5
    assert outcome.hops >= 1


@pytest.mark.slow
def test_offers_reach_everybody_and_are_gone_when_they_are_withdrawn() -> None:
    driver = grown(options={index: {"offer_bytes": 400} for index in range(24)}, has_offers=True)
    publisher = driver.contact(5).node_id
    assert all(len(driver.offers(index)) == 24 for index in range(24))
    before = driver.offers(0)[publisher]
    driver.announce(5, 400)
    after(driver, 10.0)
    assert all(driver.offers(index)[publisher] > before for index in range(24))
    driver.withdraw(5)
    after(driver, 10.0)
    assert not any(publisher in driver.offers(index) for index in range(24))
    assert driver.counters()["gossip_bytes"] > 24 * 23 * 400


@pytest.mark.slow
def test_the_same_seed_gives_the_same_events() -> None:
    digests = [grown(seed=seed, has_offers=True).network.trace.digest() for seed in (4, 4, 5)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.slow
def test_tables_by_oracle_are_those_of_a_settled_network() -> None:
    driver = FastDriver(2)
    for _ in range(300):
        driver.add_node(NodeOptions())
    driver.fill_tables()
    assert all(len(driver.table(index)) > 60 for index in range(300))
    found = []
    driver.lookup(17, b"\x99" * 32, found.append)
    after(driver, 10.0)
    nearest = sorted(
        (driver.contact(index).node_id for index in range(300) if index != 17),
        key=lambda each: int.from_bytes(each, "big") ^ int.from_bytes(b"\x99" * 32, "big"),
    )
    assert list(found[0].contacts) == nearest[:16]
    assert found[0].failed == 0
    assert driver.nodes[17].dht.network_size() == pytest.approx(300, rel=0.5)


def test_there_is_no_market_here_and_an_error_ends_the_run() -> None:
    driver = FastDriver(1)
    driver.add_node(NodeOptions())
    assert driver.books() == {}
    with pytest.raises(ConfigError):
        driver.buy(0, lambda end: None)
    with pytest.raises(RuntimeError, match="never"):
        FastDriver(1).run(lambda each: each.schedule(1.0, lambda: each.fail("this must never be")), 10.0)
