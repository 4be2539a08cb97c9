"""Every file of `simulations/`, small and brief, gives the same events in two processes whose hash seeds differ."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from p2pnode.sim.scenario import load_scenario

pytestmark = pytest.mark.slow
SIMULATIONS = Path(__file__).parents[2] / "simulations"

PROGRAM = """
import json, sys
from dataclasses import replace
from pathlib import Path
from p2pnode.sim.running import run_case
from p2pnode.sim.scenario import load_scenario

SMALL = {"nodes": "20", "stable": "6", "join_seconds": "0.5", "settle_seconds": "30", "record_seconds": "600"}

def pressed(case):
    factor = 60.0 / case.seconds
    def step(each):
        most = {"count": 10, "records": 6, "ids": 6, "subnets": 3, "keys": 1, "to": 30, "gets": 10, "times": 2}
        changes = {name: min(value, each.parameters[name]) for name, value in most.items() if name in each.parameters}
        changes |= {name: each.parameters[name] * factor for name in ("over", "every") if name in each.parameters}
        return replace(each, at=each.at * factor, parameters={**each.parameters, **changes})
    return replace(case, seconds=60.0, steps=tuple(map(step, case.steps)))

digests = {}
for file in sorted(Path(sys.argv[1]).glob("*.toml")):
    for case in load_scenario(file, SMALL).cases:
        run = run_case(pressed(case), 5)
        digests[f"{file.stem}/{case.name}"] = [run.digest, len(run.measures.violations)]
print(json.dumps(digests))
"""


def test_every_simulation_gives_the_same_events_in_two_processes_with_different_hash_seeds() -> None:
    def start(hash_seed: int) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(SIMULATIONS)], env=environment, stdout=subprocess.PIPE, text=True
        )

    processes = [start(1), start(77_777)]
    first, second = (json.loads(process.communicate()[0]) for process in processes)
    cases = {f"{file.stem}/{case.name}" for file in SIMULATIONS.glob("*.toml") for case in load_scenario(file, {}).cases}
    assert first.keys() == cases
    assert first == second
    assert len({digest for digest, _ in first.values()}) > len(cases) / 2, "the files ask different things"
    assert not any(violations for _, violations in first.values())
