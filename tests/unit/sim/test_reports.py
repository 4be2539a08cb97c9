"""Results, pictures and the page: complete, self-contained, and the same for the same runs."""

import json
import struct
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from p2pnode.errors import ConfigError
from p2pnode.sim import plots
from p2pnode.sim.measures import Measures, wilson
from p2pnode.sim.overview import overview
from p2pnode.sim.report import commit, make_results, page, write_page, write_results
from p2pnode.sim.running import Run
from p2pnode.sim.scenario import Scenario, parse_scenario

SIMULATIONS = Path(__file__).parents[3] / "simulations"


def a_scenario(**data) -> Scenario:
    written = {
        "question": "Does <b>it</b> work?",
        "seeds": [1, 2],
        "must": {"get_success": ">= 0.9", "hops": "<= 3"},
        "case": [{"name": "calm"}, {"name": "stormy", "options": {"loss": 0.1}}],
        "agree": {"get_success": 0.3},
        **data,
    }
    return parse_scenario("storm", written, {})


def a_run(case: str, seed: int, successes: int) -> Run:
    measures = Measures()
    for number in range(100):
        measures.get_success.add(number < successes)
        measures.hops.add(1 + number % 3)
        for name in ("get_success", "table_accuracy", "nodes"):
            measures.over_time(name).add(number * 10.0, number < successes)
    measures.marks.append((300.0, "kill"))
    return Run(case, seed, measures, f"digest-{case}-{seed}", ("modelled",))


def the_results(stormy: int = 80) -> dict:
    scenario = a_scenario()
    return make_results(
        scenario, [a_run("calm", 1, 100), a_run("calm", 2, 98), a_run("stormy", 1, stormy), a_run("stormy", 2, 100)]
    )


def test_a_result_says_how_to_repeat_it_and_whether_it_reached_what_it_must() -> None:
    results = json.loads(json.dumps(the_results()))
    calm, stormy = results["cases"]
    assert results["seeds"] == [1, 2]
    assert results["commit"] == commit()
    assert [run["digest"] for run in calm["runs"]] == ["digest-calm-1", "digest-calm-2"]
    assert stormy["options"] == {"nodes": 300, "loss": 0.1}
    assert calm["measures"]["get_success"] == 0.99
    assert calm["get_success_interval"][0] < 0.99 < calm["get_success_interval"][1]
    assert stormy["measures"]["get_success"] == 0.9
    assert results["is_met"]
    assert results["agreement"][0]["value"] == pytest.approx(0.09)


def test_one_missed_figure_one_breach_or_one_disagreement_misses_the_whole() -> None:
    assert not the_results(stormy=79)["is_met"]
    broken = a_run("calm", 1, 100)
    broken.measures.violations.append("node 3 has known nobody for 400 s")
    runs = [broken, a_run("stormy", 1, 100)]
    results = make_results(a_scenario(), runs)
    assert not results["is_met"]
    assert "known nobody" in page(results, [])
    apart = make_results(a_scenario(must={}), [a_run("calm", 1, 100), a_run("stormy", 1, 50)])
    assert not apart["is_met"]
    assert not make_results(replace(a_scenario(must={}), agree=(("recovery_seconds", 5.0),)), runs[1:])["is_met"]


def test_the_page_holds_everything_and_trusts_nobody(tmp_path) -> None:
    picture = tmp_path / "storm-figures.png"
    picture.write_bytes(b"\x89PNG")
    path = write_page(the_results(stormy=10), tmp_path, [picture])
    text = path.read_text()
    assert "Does &lt;b&gt;it&lt;/b&gt; work?" in text
    assert "data:image/png;base64,iVBORw==" in text
    assert "digest-stormy-2" in text
    assert "a figure is missed" in text
    assert 'src="http' not in text


def test_the_results_file_is_the_same_for_the_same_runs(tmp_path) -> None:
    first = write_results(the_results(), tmp_path / "a").read_bytes()
    assert first == write_results(the_results(), tmp_path / "b").read_bytes()


@pytest.mark.slow
def test_the_pictures_are_drawn_and_the_same_each_time(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    drawn = plots.draw(the_results(), tmp_path / "a")
    assert [path.name for path in drawn] == ["storm-over-time.png", "storm-hops.png", "storm-figures.png"]
    for path, again in zip(drawn, plots.draw(the_results(), tmp_path / "b"), strict=True):
        data = path.read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert width > 400
        assert height > 200
        assert data == again.read_bytes()


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch, tmp_path) -> None:
    import builtins

    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"p2pnode\[sim\]"):
        plots.draw(the_results(), tmp_path)


def test_the_table_of_simulations_is_up_to_date() -> None:
    assert (SIMULATIONS / "README.md").read_text() == overview(SIMULATIONS), "run `python -m p2pnode.sim.overview simulations`"


def test_the_table_says_what_came_out_and_what_was_missed(tmp_path) -> None:
    text = """
        question = "Does it work?"
        seeds = [1, 2]
        must = { get_success = ">= 0.9", hops = "<= 3" }
        agree = { get_success = 0.3 }
        case = [{ name = "calm" }, { name = "stormy", options = { loss = 0.1 } }]
    """
    (tmp_path / "storm.toml").write_text(textwrap.dedent(text))
    assert "|  |  |" in overview(tmp_path)
    write_results(the_results(stormy=10), tmp_path / "results")
    page = overview(tmp_path)
    low, high = (round(bound, 5) for bound in wilson(198, 200))
    assert f"0.99 ({low:.4f} to {high:.4f}, 200 gets)<br>1.99" in page
    low, high = (round(bound, 5) for bound in wilson(110, 200))
    assert f"**0.55 ({low:.4f} to {high:.4f}, 200 gets), missed**" in page
    assert "all cases within 0.3 in get_success | **0.44, missed**" in page
