"""The table of all simulations: what each asks, what must come out, what came out, and the command that shows it.

`python -m p2pnode.sim.overview simulations` writes `simulations/README.md` from the scenario files and `results/`.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from p2pnode.sim.scenario import load_scenario

_HEAD: Final = """# Simulations

<!-- written by `python -m p2pnode.sim.overview simulations` from the files beside it -->

Each file asks one question of a simulated network; [how to simulate](../docs/how-to/simulate.md) explains them, and
[what counts as success](../docs/decisions/gets-count-newest-versions.md) is the same for all. `results/` holds what came
out at the commit it names: one JSON file with seeds, options, digests and all figures, and pictures. `make sim` runs the heart
of them in minutes, `make sim-figures` all of them with all seeds, which writes `results/` and this page again.

Figures of the processor (`cpu_seconds`, `wall_seconds`, `memory_mb`) are those of the machine that made them, two virtual
processors shared with other work; everything else is the same on every machine.
"""
_FOOT: Final = """
`fast`: the discovery machines on one heap, with modelled links. `world`: complete nodes on virtual time
([what each leaves out](../docs/decisions/two-drivers.md)). `topics`: the machines of
[adverts by topic](../docs/decisions/adverts-by-topic.md) alone.
"""


def overview(folder: Path) -> str:
    """Give the page. folder: holds the scenario files and `results`."""
    lines = [_HEAD, "| question | network | must | measured | seeds | command |", "|---|---|---|---|---|---|"]
    for path in sorted(folder.glob("*.toml")):
        scenario = load_scenario(path)
        results = _results(folder / "results" / f"{path.stem}.json")
        found = {case["case"]: case for case in results.get("cases", [])}
        command = f"`p2pnode sim simulations/{path.name}`"
        question = scenario.question
        for case in scenario.cases:
            size = "drawn" if case.is_swarm else f"{case.options.nodes} nodes"
            name = f"{size}, {case.driver}" if case.name == scenario.name else f"{case.name} ({size}, {case.driver})"
            judged = [str(each) for each in case.thresholds]
            measured = _measured(judged, found.get(case.name))
            runs = found[case.name]["runs"] if case.name in found else []
            must = "<br>".join(f"`{each}`" for each in judged)
            lines.append(f"| {question} | {name} | {must} | {measured} | {len(runs) or ''} | {command} |")
            question = command = ""
        for each in results.get("agreement", []):
            value = "" if each["value"] is None else f"{each['value']:.4g}"
            lines.append(f"| | | {each['must']} | {_mark(value, each['is_met'])} | | |")
    return "\n".join([*lines, _FOOT, *_pictures(folder)]).rstrip() + "\n"


def _pictures(folder: Path) -> list[str]:
    """Give what happened over time in each simulation that has such a picture, with a link to its whole report."""
    lines: list[str] = []
    for path in sorted(folder.glob("*.toml")):
        if (folder / "results" / f"{path.stem}-over-time.png").is_file():
            question = load_scenario(path).question
            lines += [
                f"**{question}** ([report](results/{path.stem}.html))",
                "",
                f"![{path.stem} over time](results/{path.stem}-over-time.png)",
                "",
            ]
    return ["## Over time", "", *lines] if lines else []


def _measured(judged: list[str], case: Mapping[str, Any] | None) -> str:
    """Give the measured values in the order of the thresholds, a missed one in bold; nothing for what was never run."""
    if case is None:
        return ""
    rows = {each["must"]: each for each in case["thresholds"]}
    cells = []
    for must in judged:
        row = rows.get(must)
        if row is None or row["value"] is None:
            cells.append("**not measured**")
            continue
        value = f"{row['value']:.4g}"
        if must.startswith("get_success") and "get_success_interval" in case:
            low, high = case["get_success_interval"]
            value += f" ({low:.4f} to {high:.4f}, {case['measures']['gets']:.0f} gets)"
        cells.append(_mark(value, row["is_met"]))
    cells += [f"**{violation}**" for violation in case.get("violations", [])]
    return "<br>".join(cells)


def _mark(value: str, is_met: bool) -> str:
    return value if is_met else f"**{value}, missed**"


def _results(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return read


if __name__ == "__main__":
    place = Path(sys.argv[1])
    (place / "README.md").write_text(overview(place), encoding="utf-8")
