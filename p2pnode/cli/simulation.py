"""`p2pnode sim`: run a scenario of the simulated network, judge it by its thresholds, and leave a report."""

from pathlib import Path
from typing import Annotated, Any

import typer

from p2pnode.cli.output import Json, guarded, show

Scenario = Annotated[Path, typer.Argument(help="A scenario file, such as simulations/churn.toml.", metavar="SCENARIO")]
Nodes = Annotated[int | None, typer.Option("--nodes", help="Nodes, instead of the file's number.", envvar="P2PNODE_SIM_NODES")]
Seeds = Annotated[
    list[int] | None, typer.Option("--seed", help="Seed, instead of the file's; may be repeated.", envvar="P2PNODE_SIM_SEED")
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", help="NAME=VALUE: an option of the network, or driver; may be repeated.", envvar="P2PNODE_SIM_SET"),
]
Cases = Annotated[
    list[str] | None, typer.Option("--case", help="Run only this case of the file; may be repeated.", envvar="P2PNODE_SIM_CASE")
]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="Folder for results, pictures and report; without it none are written.", envvar="P2PNODE_SIM_OUT"),
]
Engine = Annotated[
    str,
    typer.Option("--engine", help="Where runs take place: processes of this machine, ray, or here.", envvar="P2PNODE_SIM_ENGINE"),
]
Workers = Annotated[int, typer.Option("--workers", help="Runs at once; 0: one per processor.", envvar="P2PNODE_SIM_WORKERS")]
TraceFile = Annotated[
    Path | None,
    typer.Option("--trace", help="Run the first case and seed and write every event here.", envvar="P2PNODE_SIM_TRACE"),
]
Replay = Annotated[
    Path | None,
    typer.Option("--replay", help="Run the first case and seed and compare with this trace.", envvar="P2PNODE_SIM_REPLAY"),
]
Shrink = Annotated[
    bool,
    typer.Option("--shrink", help="If a figure is missed, find the smallest run that misses it.", envvar="P2PNODE_SIM_SHRINK"),
]
Plots = Annotated[bool, typer.Option("--plots/--no-plots", help="Draw pictures into --out.", envvar="P2PNODE_SIM_PLOTS")]


@guarded
def sim(
    scenario: Scenario,
    nodes: Nodes = None,
    seed: Seeds = None,
    change: Changes = None,
    case: Cases = None,
    out: Out = None,
    engine: Engine = "processes",
    workers: Workers = 0,
    trace: TraceFile = None,
    replay: Replay = None,
    shrink: Shrink = False,
    plots: Plots = True,
    as_json: Json = False,
) -> None:
    """Run a scenario of the simulated network and judge it by the figures that it must reach."""
    from p2pnode.sim.report import make_results

    changes = dict(_split(text) for text in change or ())
    if nodes is not None:
        changes["nodes"] = str(nodes)
    wanted = _chosen(scenario, changes, seed or [], case or [])
    if trace is not None or replay is not None:
        _traced(wanted, trace, replay, as_json)
        return
    runs = _run(wanted, engine, workers, quiet=as_json)
    results = make_results(wanted, runs)
    written = _write(results, out, plots) if out is not None else []
    if shrink and not results["is_met"]:
        results["shrunk"] = _shrunk(wanted, results, out)
    show(results, lambda: _text(results, written), as_json=as_json)
    _judge(results)


def _judge(results: Any) -> None:
    """Raise FiguresMissed, which says what was missed."""
    from p2pnode.cli.exit_codes import FiguresMissed

    missed = [f"{each['must']}, not {each['value']}" for each in results["agreement"] if not each["is_met"]]
    for row in results["cases"]:
        missed += [f"{row['case']}: {each['must']}, not {each['value']}" for each in row["thresholds"] if not each["is_met"]]
        missed += [f"{row['case']}: {violation}" for violation in row.get("violations", [])]
    if missed:
        raise FiguresMissed("; ".join(missed))


def _chosen(path: Path, changes: dict[str, str], seeds: list[int], names: list[str]) -> Any:
    """Load a scenario and keep the seeds and cases that were asked for."""
    from dataclasses import replace

    from p2pnode.errors import InputError
    from p2pnode.sim.scenario import load_scenario, part_of

    wanted = load_scenario(path, changes)
    if not set(wanted.seeds) <= set(seeds or wanted.seeds) or "seconds" in changes:
        wanted = part_of(wanted, seeds)
    elif seeds:
        wanted = replace(wanted, seeds=tuple(seeds))
    if names:
        known = [each.name for each in wanted.cases]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise InputError(f"{path} has no case {unknown[0]!r}; it has: {', '.join(known)}")
        wanted = replace(wanted, cases=tuple(each for each in wanted.cases if each.name in names))
    return wanted


def _split(text: str) -> tuple[str, str]:
    from p2pnode.errors import InputError

    name, separator, value = text.partition("=")
    if not separator:
        raise InputError(f"--set takes NAME=VALUE, not {text!r}")
    return name.strip(), value.strip()


def _run(wanted: Any, engine: str, workers: int, *, quiet: bool) -> list[Any]:
    """Run every case with every seed, with one bar for all virtual time."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from p2pnode.sim.sweep import run_plan

    plan = [(each, seed) for each in wanted.cases for seed in wanted.seeds]
    done = [0.0] * len(plan)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True) as progress:
        bar = progress.add_task(f"{wanted.name}: {len(plan)} runs", total=float(len(plan)))

        def report(number: int, now: float, end: float) -> None:
            done[number] = min(1.0, now / end) if end else 1.0
            progress.update(bar, completed=sum(done))

        return run_plan(plan, engine, workers, report)


def _traced(wanted: Any, trace: Path | None, replay: Path | None, as_json: bool) -> None:
    """Run one case with one seed under a trace; a divergence from a recorded one is a failed check."""
    from p2pnode.cli.exit_codes import VerificationFailed
    from p2pnode.sim.running import run_case

    run = run_case(wanted.cases[0], wanted.seeds[0], None, trace, replay)
    parted = run.divergence
    if parted is not None:
        raise VerificationFailed(
            f"line {parted.line} of the trace is {parted.expected or 'missing'!r}, now it is {parted.found or 'missing'!r}"
        )
    compared = "the same as recorded" if replay is not None else f"written to {trace}"
    show(
        {"case": run.case, "seed": run.seed, "digest": run.digest, "is_same": replay is not None},
        lambda: f"{run.case}, seed {run.seed}: digest {run.digest}, {compared}",
        as_json=as_json,
    )


def _write(results: Any, out: Path, plots: bool) -> list[Path]:
    from p2pnode.sim.plots import draw
    from p2pnode.sim.report import write_page, write_results

    pictures = draw(results, out) if plots else []
    return [write_results(results, out), write_page(results, out, pictures), *pictures]


def _shrunk(wanted: Any, results: Any, out: Path | None) -> str:
    from p2pnode.sim.shrink import scenario_text, shrink_scenario

    name = next(row["case"] for row in results["cases"] if not row["is_met"])
    first = next(each for each in wanted.cases if each.name == name)
    smallest, seed = shrink_scenario(first, wanted.seeds, print_step)
    text = scenario_text(smallest, seed, f"smallest run found that misses what {name!r} of {wanted.name} misses")
    if out is not None:
        (out / f"{wanted.name}-shrunk.toml").write_text(text, encoding="utf-8")
    return text


def print_step(text: str) -> None:
    """Say on standard error how far shrinking is."""
    import sys

    print(text, file=sys.stderr)


def _text(results: Any, written: list[Path]) -> str:
    from p2pnode.cli.output import table

    rows = []
    for case in results["cases"]:
        for each in case["thresholds"]:
            value = "" if each["value"] is None else f"{each['value']:.5g}"
            rows.append((case["case"], each["must"], value, _verdict(each)))
        if not case["thresholds"]:
            rows += [(case["case"], name, f"{value:.5g}", "") for name, value in case["measures"].items()]
        rows += [(case["case"], violation, "", "BROKEN") for violation in case.get("violations", [])]
    for each in results["agreement"]:
        rows.append(("all", each["must"], "" if each["value"] is None else f"{each['value']:.5g}", _verdict(each)))
    lines = [results["question"], "", table(("case", "must", "measured", ""), rows)]
    if "shrunk" in results:
        lines += ["", results["shrunk"]]
    if written:
        lines += ["", "wrote " + ", ".join(str(path) for path in written)]
    return "\n".join(lines)


def _verdict(each: Any) -> str:
    return "met" if each["is_met"] else "MISSED"
