"""Many runs at once: the same results whatever the engine, in the order of the plan, and clear words for what is missing."""

import builtins

import pytest

from p2pnode.errors import ConfigError, InputError
from p2pnode.sim.scenario import parse_scenario
from p2pnode.sim.sweep import run_plan


def a_plan(seeds=(1, 2), **options):
    data = {
        "seconds": 10,
        "options": {"nodes": 8, "stable": 2, "settle_seconds": 10.0, "latency": "lan", **options},
        "step": [{"do": "lookups", "count": 3, "over": 2.0}],
    }
    case = parse_scenario("small", data, {}).cases[0]
    return [(case, seed) for seed in seeds]


@pytest.mark.slow
def test_processes_give_what_this_process_gives_in_the_order_of_the_plan() -> None:
    told = []
    here = run_plan(a_plan(), "here", on_progress=lambda number, now, end: told.append((number, now, end)))
    apart = run_plan(a_plan(), "processes", workers=2, on_progress=lambda number, now, end: told.append((number, now, end)))
    assert [run.digest for run in here] == [run.digest for run in apart]
    assert here[0].digest != here[1].digest
    assert [run.seed for run in apart] == [1, 2]
    assert {number for number, _, _ in told} == {0, 1}


def test_an_error_in_a_run_is_the_plans_error() -> None:
    with pytest.raises(InputError, match="no setting 'speed'"):
        run_plan(a_plan(seeds=(1,), settings={"speed": 3}), "here")


def test_an_engine_that_is_not_there_is_named(monkeypatch) -> None:
    with pytest.raises(ConfigError, match="steam"):
        run_plan(a_plan(), "steam")
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name == "ray":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"p2pnode\[ray\]"):
        run_plan(a_plan(), "ray")


@pytest.mark.slow
def test_ray_gives_what_this_process_gives() -> None:
    pytest.importorskip("ray")
    assert [run.digest for run in run_plan(a_plan(), "ray")] == [run.digest for run in run_plan(a_plan(), "here")]
