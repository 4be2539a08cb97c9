"""`p2pnode sim`: what it prints, writes and exits with; and that the page about it can be typed as it stands."""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from p2pnode.cli.exit_codes import ExitCode
from p2pnode.cli.main import app

HOW_TO = Path(__file__).parents[3] / "docs" / "how-to" / "simulate.md"
SMALL = """
question = "Is it found?"
seeds = [1]
seconds = 20

[options]
nodes = 10
stable = 4
settle_seconds = 15.0
latency = "lan"

[[step]]
at = 0
do = "publish"
records = 2

[[step]]
at = 5
do = "gets"
count = 5
over = 5.0

[must]
get_success = ">= 0.9"
"""


@pytest.fixture
def small(tmp_path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["sim", *map(str, arguments), "--engine", "here"])


def test_a_met_figure_is_exit_code_0_and_json_holds_all(small) -> None:
    done = run(small, "--json")
    assert done.exit_code == 0
    results = json.loads(done.output)
    assert results["is_met"]
    assert results["cases"][0]["measures"]["gets"] == 5
    assert "Is it found?" in run(small).output


def test_a_missed_figure_has_its_own_exit_code_and_is_named(small) -> None:
    small.write_text(SMALL.replace(">= 0.9", ">= 1.1"))
    done = run(small)
    assert done.exit_code == ExitCode.FIGURES
    assert "MISSED" in done.output
    assert "get_success >= 1.1, not 1.0" in done.output


def test_options_of_the_command_line_win(small) -> None:
    results = json.loads(run(small, "--nodes", 12, "--seed", 5, "--seed", 6, "--set", "loss=0.01", "--json").output)
    assert results["seeds"] == [5, 6]
    assert results["cases"][0]["options"]["nodes"] == 12
    assert results["cases"][0]["options"]["loss"] == 0.01
    assert len(results["cases"][0]["runs"]) == 2


def test_how_much_is_counted_is_asked_of_the_whole_and_not_of_a_part(small) -> None:
    small.write_text(SMALL.replace("seeds = [1]", "seeds = [1, 2]").replace("[must]", '[must]\ngets = ">= 10"'))
    assert run(small).exit_code == 0, "five gets a seed"
    assert run(small, "--seed", 1).exit_code == 0
    small.write_text(small.read_text().replace(">= 10", ">= 11"))
    assert run(small).exit_code == ExitCode.FIGURES
    assert run(small, "--seed", 1, "--seed", 2).exit_code == ExitCode.FIGURES


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "speed=3"], "speed"),
        (["--set", "speed"], "NAME=VALUE"),
        (["--case", "stormy"], "stormy"),
        (["--engine", "steam"], "steam"),
        (["--nodes", "1"], "between 2"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(small, arguments, words) -> None:
    done = CliRunner().invoke(app, ["sim", str(small), *arguments])
    assert done.exit_code in (ExitCode.USAGE, ExitCode.CONFIG)
    assert words in done.output


def test_results_and_page_are_written(small, tmp_path) -> None:
    done = run(small, "--out", tmp_path / "out", "--no-plots")
    assert done.exit_code == 0
    assert json.loads((tmp_path / "out" / "small.json").read_text())["scenario"] == "small"
    assert "<table>" in (tmp_path / "out" / "small.html").read_text()


def test_a_replay_is_the_same_and_another_seeds_is_not(small, tmp_path) -> None:
    trace = tmp_path / "small.trace"
    assert run(small, "--trace", trace).exit_code == 0
    assert trace.read_text().count("\n") > 200
    same = run(small, "--replay", trace, "--json")
    assert same.exit_code == 0
    assert json.loads(same.output)["is_same"]
    other = run(small, "--replay", trace, "--seed", 2)
    assert other.exit_code == ExitCode.VERIFICATION
    assert "line" in other.output
    assert run(small, "--replay", tmp_path / "none").exit_code == ExitCode.USAGE


@pytest.mark.slow
def test_a_failure_is_shrunk_to_a_file_that_fails(small, tmp_path) -> None:
    small.write_text(SMALL.replace(">= 0.9", ">= 1.1").replace("nodes = 10", "nodes = 20"))
    done = run(small, "--shrink", "--out", tmp_path, "--no-plots")
    assert done.exit_code == ExitCode.FIGURES
    shrunk = tmp_path / "small-shrunk.toml"
    assert "smallest run found" in shrunk.read_text()
    assert "nodes = 8\n" in shrunk.read_text()
    assert run(shrunk).exit_code == ExitCode.FIGURES


@pytest.mark.slow
def test_the_page_about_it_can_be_typed_as_it_stands(tmp_path, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    page = HOW_TO.read_text()
    for name, text in re.findall(r"<!-- file: (\S+) -->\n```\w*\n(.*?)```", page, re.S):
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    lines = [line for block in re.findall(r"<!-- command -->\n```sh\n(.*?)```", page, re.S) for line in block.splitlines()]
    assert len(lines) >= 5
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "p2pnode"
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, f"{line}\n{done.output}"
    assert (tmp_path / "results" / "third.html").exists()
