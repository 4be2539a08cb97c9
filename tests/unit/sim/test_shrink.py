"""The shrinker keeps the failure and drops the rest; what it writes is read back as the same case."""

import tomllib
from dataclasses import replace

import pytest

from p2pnode.errors import InputError
from p2pnode.sim.scenario import Case, Options, parse_scenario, parse_step
from p2pnode.sim.shrink import NODES_MIN, RUNS_MAX, scenario_text, shrink, shrink_scenario


def case(**options) -> Case:
    steps = tuple(
        parse_step(step)
        for step in (
            {"at": 0.0, "do": "publish", "records": 40},
            {"at": 10.0, "do": "gets", "count": 100},
            {"at": 20.0, "do": "partition"},
            {"at": 30.0, "do": "kill", "fraction": 0.3},
            {"at": 50.0, "do": "heal"},
            {"at": 60.0, "do": "lookups"},
        )
    )
    made = parse_scenario("try", {"must": {"recovery_seconds": "<= 5"}}, {}).cases[0]
    return replace(made, options=Options(nodes=200, loss=0.05, churn="weibull", **options), steps=steps, seconds=900.0)


def test_only_what_the_failure_needs_is_left() -> None:
    runs = []

    def fails(tried: Case, seed: int) -> bool:
        runs.append((repr(tried.options), repr(tried.steps), tried.seconds, seed))
        done = [step.do for step in tried.steps]
        return "partition" in done and "heal" in done and tried.options.nodes >= 30 and tried.options.loss > 0

    said: list[str] = []
    smallest, seed = shrink(case(), 3, fails, said.append)
    assert [step.do for step in smallest.steps] == ["partition", "heal"]
    assert 30 <= smallest.options.nodes < 60
    assert smallest.options.loss == 0.05
    assert smallest.options.churn == "none"
    assert smallest.seconds < 200
    assert seed == 1
    assert len(runs) <= RUNS_MAX
    assert said
    assert len(runs) == len(set(runs)), "nothing is tried twice"


def test_the_number_of_runs_is_bounded() -> None:
    runs = []

    def fails(tried: Case, seed: int) -> bool:
        runs.append(tried)
        return False

    assert shrink(case(), 1, fails, print, runs_max=7) == (case(), 1)
    assert len(runs) == 7


def test_a_network_is_never_smaller_than_what_makes_sense() -> None:
    smallest, _ = shrink(case(stable=40), 1, lambda tried, seed: True, lambda text: None, runs_max=200)
    assert smallest.options.nodes == NODES_MIN
    assert smallest.options.stable <= NODES_MIN // 2
    assert smallest.steps == ()


def test_the_file_it_writes_is_the_same_case() -> None:
    made = case(settings={"alpha": 2})
    data = tomllib.loads(scenario_text(made, 7, 'why "this"?'))
    read = parse_scenario("try", data, {})
    assert read.seeds == (7,)
    assert read.question == 'why "this"?'
    assert read.cases[0].options == made.options
    assert read.cases[0].steps == made.steps
    assert read.cases[0].thresholds == made.thresholds
    assert read.cases[0].seconds == made.seconds


@pytest.mark.slow
def test_a_real_failure_shrinks_and_still_fails() -> None:
    data = {
        "seconds": 20,
        "options": {"nodes": 24, "stable": 8, "settle_seconds": 20.0, "latency": "lan", "loss": 0.01},
        "step": [
            {"at": 0, "do": "publish", "records": 4},
            {"at": 5, "do": "lookups", "count": 4, "over": 5.0},
            {"at": 10, "do": "loss", "fraction": 0.97},
            {"at": 12, "do": "gets", "count": 10, "over": 5.0},
        ],
        "must": {"get_success": ">= 0.99"},
    }
    broken = parse_scenario("try", data, {}).cases[0]
    smallest, seed = shrink_scenario(broken, [1], lambda text: None)
    assert [step.do for step in smallest.steps] == ["publish", "loss", "gets"]
    assert smallest.options.nodes < 24
    assert seed == 1
    whole = replace(broken, steps=broken.steps[:2])
    with pytest.raises(InputError, match="no single seed"):
        shrink_scenario(whole, [1], lambda text: None)
