"""A seeded sample of the simulations, small enough for every run of the tests; the whole is `make sim`.

Each is a file of `simulations/` with fewer nodes and less time: what must come out is what the file says.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from p2pnode.sim.running import run_case
from p2pnode.sim.scenario import Case, load_scenario, parse_scenario, part_of

pytestmark = pytest.mark.slow
SIMULATIONS = Path(__file__).parents[2] / "simulations"


def sample(name: str, case: str = "", seconds: float = 0.0, **changes: str) -> Case:
    """One case of a file with other options, its timeline pressed together to `seconds`."""
    cases = part_of(load_scenario(SIMULATIONS / f"{name}.toml", changes)).cases
    chosen = next(each for each in cases if case in ("", each.name))
    if seconds:
        factor = seconds / chosen.seconds
        steps = tuple(_pressed(step, factor) for step in chosen.steps)
        chosen = replace(chosen, seconds=seconds, steps=steps)
    return chosen


def _pressed(step, factor):
    over = {"over": step.parameters["over"] * factor} if "over" in step.parameters else {}
    counts = {name: max(20, int(step.parameters[name] * factor)) for name in ("count",) if name in step.parameters}
    return replace(step, at=step.at * factor, parameters={**step.parameters, **over, **counts})


def reaches(case: Case, seed: int = 1):
    measures = run_case(case, seed).measures
    figures = measures.summary()
    missed = [
        f"{each}, not {figures.get(each.measure)}" for each in case.thresholds if not each.is_met(figures.get(each.measure))
    ]
    assert not missed
    assert not measures.violations
    return figures


@pytest.mark.parametrize("case", ["exponential", "Weibull 0.5"])
def test_gets_succeed_under_churn(case) -> None:
    figures = reaches(sample("churn", case, 900.0, nodes="60", stable="12", session_minutes="15", record_seconds="600"))
    assert figures["gets"] > 100
    assert figures["table_accuracy"] < 1.0, "somebody did go"


def test_a_network_that_was_cut_in_two_is_one_again() -> None:
    figures = reaches(sample("partition", "in halves", 400.0, nodes="40", stable="10"))
    assert figures["recovery_seconds"] >= 10


def test_half_of_the_nodes_may_lose_power() -> None:
    reaches(sample("mass-failure", "", 400.0, nodes="60", stable="12"))


def test_ground_ids_around_a_key_do_not_hide_its_record() -> None:
    case = sample("eclipse", "45 ids, 45 subnets", nodes="120", stable="20")
    step = replace(case.steps[0], parameters={**case.steps[0].parameters, "keys": 2})
    figures = reaches(replace(case, steps=(step,), seconds=250.0))
    assert figures["gets"] >= 20


def test_the_same_attack_succeeds_where_regions_are_switched_off() -> None:
    """What the test above shows is the protocol's doing: without its region lookups the record cannot be found."""
    case = sample("eclipse", "45 ids, 45 subnets", **{"nodes": "120", "stable": "20", "settings.region": "false"})
    step = replace(case.steps[0], parameters={**case.steps[0].parameters, "keys": 1})
    measures = run_case(replace(case, steps=(step,), seconds=130.0), 1).measures
    assert measures.get_success.value < 0.5


def test_four_of_five_nodes_cannot_be_reached_and_gets_succeed() -> None:
    figures = reaches(sample("nat", "", 600.0, nodes="80", stable="16"))
    assert figures["gets"] > 50


def test_an_offer_is_everywhere_in_seconds_and_gossip_is_cheap() -> None:
    reaches(sample("offers", "", 600.0, nodes="80", stable="0", settle_seconds="120.0"))


def test_a_swarm_seed_breaks_nothing() -> None:
    reaches(sample("swarm", nodes="30"), seed=11)


def test_both_drivers_see_the_same_network() -> None:
    """The stated error of docs/decisions/two-drivers.md, at a size that fits here."""
    fast, real = (
        reaches(replace(sample("drivers", case, 200.0, nodes="30", stable="8", settle_seconds="60"), thresholds=()))
        for case in ("fast driver", "real nodes")
    )
    for measure, most in {"get_success": 0.03, "closest_accuracy": 0.1, "hops": 0.3}.items():
        assert fast[measure] == pytest.approx(real[measure], abs=most), measure


def test_jobs_and_books_survive_while_nodes_of_a_market_fail() -> None:
    data = {
        "driver": "world",
        "seconds": 150,
        "options": {"nodes": 6, "stable": 2, "entry_points": 1, "offer_bytes": 400, "latency": "wan", "settle_seconds": 40.0},
        "step": [
            {"at": 0, "do": "jobs", "count": 10, "over": 60.0},
            {"at": 10, "do": "flap", "fraction": 0.5, "times": 2, "every": 20.0},
            {"at": 70, "do": "restart"},
        ],
        "must": {"jobs_completed": ">= 0.5"},
    }
    reaches(parse_scenario("market", data, {}).cases[0])


PROGRAM = """
import sys
from p2pnode.sim.running import run_case
from p2pnode.sim.scenario import parse_scenario
data = {"seconds": 120, "swarm": True, "options": {"nodes": 24, "offer_bytes": 400}}
print(run_case(parse_scenario("digest", data, {}).cases[0], int(sys.argv[1])).digest)
"""


def test_a_seed_gives_the_same_events_in_processes_with_different_hash_seeds() -> None:
    def digest(seed: int, hash_seed: int) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
        command = [sys.executable, "-c", PROGRAM, str(seed)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    first = digest(2, 1)
    assert len(first) == 33
    assert digest(2, 77_777) == first
    assert digest(3, 1) != first
