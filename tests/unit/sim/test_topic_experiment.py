"""The driver of topics walks a timeline and counts what searches gave."""

import pytest

from p2pnode.errors import InputError
from p2pnode.sim.running import run_case
from p2pnode.sim.scenario import parse_scenario


def case(*steps, nodes=300):
    data = {"driver": "topics", "seconds": 400, "options": {"nodes": nodes}, "step": list(steps)}
    return parse_scenario("topics", data, {}).cases[0]


ADVERTISE = {"at": 0, "do": "advertise", "fraction": 0.5, "rare": 10}
SEARCHES = {"at": 200, "do": "searches", "count": 10, "over": 50.0}


def test_searches_find_the_rare_offers_and_enough_of_the_popular_ones():
    run = run_case(case(ADVERTISE, SEARCHES), 1)
    figures = run.measures.summary()
    assert figures["rare_offers_found"] >= 0.99
    assert 20 <= figures["popular_offers_found"] < 150
    assert figures["adverts_held_most"] > 1
    assert figures["busiest_bytes_per_second"] > figures["bytes_per_node_second"] > 0
    assert not run.measures.violations
    assert run_case(case(ADVERTISE, SEARCHES), 1).digest == run.digest
    assert run_case(case(ADVERTISE, SEARCHES), 2).digest != run.digest


def test_without_adverts_nothing_is_found_and_the_dead_cost_some():
    assert run_case(case({**ADVERTISE, "fraction": 0.0, "rare": 0}, SEARCHES), 1).measures.summary()["popular_offers_found"] == 0
    dead = run_case(case(ADVERTISE, {"at": 150, "do": "kill", "fraction": 0.5}, SEARCHES), 1).measures.summary()
    assert 0.5 < dead["rare_offers_found"] <= 1.0


@pytest.mark.parametrize(("driver", "step"), [("topics", {"do": "publish"}), ("fast", ADVERTISE), ("fast", {"do": "jobs"})])
def test_a_step_that_the_driver_does_not_have_is_refused(driver, step):
    with pytest.raises(InputError, match=f"the {driver} driver has no step"):
        parse_scenario("topics", {"driver": driver, "step": [step]}, {})
