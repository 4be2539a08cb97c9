"""Scenario files: what they mean, what is refused and in which words."""

from pathlib import Path

import pytest

from p2pnode.errors import InputError
from p2pnode.sim import scenario
from p2pnode.sim.adversaries import KINDS
from p2pnode.sim.experiment import _STEPS
from p2pnode.sim.scenario import Options, Threshold, load_scenario, options_row, parse_scenario

SIMULATIONS = Path(__file__).parents[3] / "simulations"


def parsed(**data):
    changes = data.pop("changes", {})
    return parse_scenario("try", data, changes)


def test_every_option_and_step_has_a_meaning_and_is_carried_out() -> None:
    assert set(scenario.OPTION_MEANINGS) == set(Options.__dataclass_fields__)
    assert set(scenario.STEPS) == set(scenario.STEP_MEANINGS) == set(_STEPS) | set(scenario.STEPS_OF_TOPICS)


@pytest.mark.parametrize("path", sorted(SIMULATIONS.glob("*.toml")), ids=lambda path: path.stem)
def test_the_files_of_this_project_are_read_and_ask_for_something(path) -> None:
    read = load_scenario(path)
    assert read.question.endswith("?")
    assert read.name == path.stem
    for case in read.cases:
        assert case.thresholds, "a simulation without a figure shows nothing"
        for step in case.steps:
            assert step.at + step.parameters.get("over", 0.0) <= case.seconds, f"{step.do} ends after the timeline"
            assert step.parameters.get("kind", "liar") in KINDS


def test_a_case_overrides_the_file_and_the_command_line_overrides_both() -> None:
    data = {
        "options": {"nodes": 50, "loss": 0.1},
        "case": [{"name": "a", "options": {"nodes": 60}, "must": {"hops": "<= 3"}}, {"name": "b", "seconds": 5}],
        "must": {"hops": "<= 2", "gets": ">= 1"},
        "seconds": 100,
    }
    a, b = parsed(**data).cases
    assert (a.options.nodes, a.options.loss, a.seconds) == (60, 0.1, 100.0)
    assert (b.options.nodes, b.seconds) == (50, 5.0)
    assert Threshold("hops", False, 3.0) in a.thresholds
    assert Threshold("gets", True, 1.0) in a.thresholds
    assert Threshold("hops", False, 2.0) in b.thresholds
    changed = parsed(
        **data, changes={"nodes": "70", "churn": "weibull", "settings.alpha": "5", "seeds": "[9]", "driver": "world"}
    )
    assert {case.options.nodes for case in changed.cases} == {70}
    assert changed.cases[0].options.churn == "weibull"
    assert changed.cases[0].options.settings == {"alpha": 5}
    assert changed.seeds == (9,)
    assert changed.cases[0].driver == "world"


def test_a_sweep_is_every_combination() -> None:
    read = parsed(sweep={"nodes": [10, 20], "loss": [0.0, 0.1, 0.2]})
    assert len(read.cases) == 6
    assert read.cases[0].name == "nodes=10, loss=0.0"
    assert (read.cases[5].options.nodes, read.cases[5].options.loss) == (20, 0.2)


def test_a_step_has_all_its_parameters() -> None:
    (step,) = parsed(step=[{"at": 3, "do": "gets", "count": 7}]).cases[0].steps
    assert step.parameters == {"count": 7, "over": 20.0}


@pytest.mark.parametrize(
    ("data", "word"),
    [
        ({"nodse": 3}, "nodse"),
        ({"options": {"node": 3}}, "node"),
        ({"options": {"nodes": "many"}}, "nodes"),
        ({"options": {"nodes": 1}}, "between 2"),
        ({"options": {"nodes": True}}, "nodes"),
        ({"options": {"loss": 2.0}}, "share"),
        ({"options": {"churn": "gamma"}}, "exponential"),
        ({"options": {"settle_seconds": -1}}, "negative"),
        ({"options": {"sample_seconds": 0.0}}, "sample_seconds"),
        ({"options": {"tables": "oracle"}, "driver": "world"}, "fast driver"),
        ({"driver": "slow"}, "driver"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1.5]}, "seeds"),
        ({"step": [{"do": "explode"}]}, "explode"),
        ({"step": [{"do": "gets", "number": 3}]}, "number"),
        ({"step": [{"do": "gets", "count": "all"}]}, "count"),
        ({"step": [{"do": "gets", "at": "noon"}]}, "at"),
        ({"must": {"speed": ">= 1"}}, "speed"),
        ({"must": {"hops": "3"}}, "hops"),
        ({"must": {"hops": ">= many"}}, "hops"),
        ({"case": [{"title": "x"}]}, "title"),
        ({"sweep": {"nodes": 10}}, "sweep.nodes"),
        ({"sweep": {"nodes": list(range(2, 300))}}, "cases"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_name_of_it(data, word) -> None:
    with pytest.raises(InputError, match=word):
        parsed(**data)


def test_unknown_options_of_the_command_line_and_broken_files_are_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="speed"):
        parsed(changes={"speed": "3"})
    with pytest.raises(InputError, match="cannot read"):
        load_scenario(tmp_path / "missing.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("nodes = = 3")
    with pytest.raises(InputError, match="not valid TOML"):
        load_scenario(broken)


def test_a_result_names_the_options_that_are_not_the_default() -> None:
    assert options_row(Options(loss=0.02)) == {"nodes": 300, "loss": 0.02}


def test_a_threshold_that_was_never_measured_is_missed() -> None:
    at_least = Threshold("get_success", True, 0.99)
    assert at_least.is_met(0.99)
    assert not at_least.is_met(0.98)
    assert not at_least.is_met(None)
    assert Threshold("recovery_seconds", False, 120.0).is_met(30.0)
    assert str(at_least) == "get_success >= 0.99"
