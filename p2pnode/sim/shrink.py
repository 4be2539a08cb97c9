"""Finds the smallest run that still fails: fewer steps, fewer nodes, fewer troubles, less time, the smallest seed.

Delta debugging by greedy passes (Zeller & Hildebrandt 2002): every change that keeps the failure is kept, until none does. What
counts as failing is a function, so a missed figure, a broken invariant and a crash shrink alike.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, Final

from p2pnode.errors import InputError
from p2pnode.sim.measures import Measures
from p2pnode.sim.running import run_case
from p2pnode.sim.scenario import STEPS, Case, Options

NODES_MIN: Final = 8
SECONDS_MIN: Final = 60.0
# Runs that shrinking may take; each is at most as large as the one it began with.
RUNS_MAX: Final = 120
Fails = Callable[[Case, int], bool]


def shrink_scenario(case: Case, seeds: Sequence[int], say: Callable[[str], None]) -> tuple[Case, int]:
    """Give the smallest case and a seed that miss a threshold or break an invariant as this case does with these seeds.

    Raises InputError when no single seed fails by itself.
    """
    for seed in seeds:
        if is_failing(case, seed):
            return shrink(case, seed, is_failing, say)
    raise InputError("no single seed misses a figure; only all of them together do")


def is_failing(case: Case, seed: int) -> bool:
    """Say whether a run misses a threshold, breaks an invariant or ends in an error.

    Thresholds on how much was counted say nothing about a smaller run, and neither do those that nothing was counted for.
    """
    try:
        measures = run_case(case, seed).measures
    except (RuntimeError, InputError):
        return True
    return bool(measures.violations) or not _meets(case, measures)


def _meets(case: Case, measures: Measures) -> bool:
    figures = measures.summary()
    judged = [each for each in case.thresholds if each.measure not in ("gets", "lookups") and each.measure in figures]
    return all(each.is_met(figures[each.measure]) for each in judged)


def shrink(case: Case, seed: int, fails: Fails, say: Callable[[str], None], runs_max: int = RUNS_MAX) -> tuple[Case, int]:
    """Give the smallest case and seed found for which `fails` holds, as it does for these.

    Tries nothing twice and no more than runs_max runs; say: told of each success.
    """
    tried: dict[tuple[Case, int], None] = {}
    runs = 0
    has_shrunk = True
    while has_shrunk:
        has_shrunk = False
        for smaller, smaller_seed in _smaller(case, seed):
            key = (_hashable(smaller), smaller_seed)
            if key in tried:
                continue
            if runs >= runs_max:
                return case, seed
            tried[key] = None
            runs += 1
            if fails(smaller, smaller_seed):
                case, seed, has_shrunk = smaller, smaller_seed, True
                say(
                    f"fails with {case.options.nodes} nodes, {len(case.steps)} steps, {case.seconds:g} s, seed {seed} "
                    f"(run {runs})"
                )  # fmt: skip
                break
    return case, seed


def _smaller(case: Case, seed: int) -> Iterator[tuple[Case, int]]:
    """Give what is smaller in one way, the boldest first."""
    steps = case.steps
    for size in _halvings(len(steps)):
        for start in range(0, len(steps), size):
            yield replace(case, steps=steps[:start] + steps[start + size :]), seed
    options = case.options
    for nodes in (NODES_MIN, options.nodes // 4, options.nodes // 2, options.nodes * 3 // 4, options.nodes - 1):
        if NODES_MIN <= nodes < options.nodes:
            stable = min(options.stable, nodes // 2)
            yield replace(case, options=replace(options, nodes=nodes, stable=stable)), seed
    last = max((step.at + step.parameters.get("over", 0.0) for step in steps), default=0.0)
    for seconds in (last + SECONDS_MIN, case.seconds / 2):
        if SECONDS_MIN <= seconds < case.seconds:
            kept = tuple(step for step in steps if step.at < seconds)
            yield replace(case, seconds=seconds, steps=kept), seed
    defaults = Options()
    for each in fields(Options):
        # Troubles that are on go off; sizes were dealt with above.
        if each.name not in ("nodes", "stable", "tables", "latency") and getattr(options, each.name) != getattr(
            defaults, each.name
        ):
            yield replace(case, options=replace(options, **{each.name: getattr(defaults, each.name)})), seed
    for number, step in enumerate(steps):
        for name, value in step.parameters.items():
            if isinstance(value, int) and not isinstance(value, bool) and value > 1:
                lesser = replace(step, parameters={**step.parameters, name: value // 2})
                yield replace(case, steps=(*steps[:number], lesser, *steps[number + 1 :])), seed
    for smaller_seed in range(1, min(seed, 4)):
        yield case, smaller_seed


def _halvings(length: int) -> Iterator[int]:
    size = (length + 1) // 2
    while size:
        yield size
        size = 0 if size == 1 else (size + 1) // 2


def _hashable(case: Case) -> Any:
    return (case.name, repr(case.options), repr(case.steps), case.seconds)


def scenario_text(case: Case, seed: int, question: str) -> str:
    """Give a case as a scenario file that runs it again."""
    options = {each.name: getattr(case.options, each.name) for each in fields(Options)}
    defaults = Options()
    lines = [
        f"question = {_toml(question)}",
        f"driver = {_toml(case.driver)}",
        f"seeds = [{seed}]",
        f"seconds = {case.seconds}",
        "",
    ]
    lines += ["[options]", f"nodes = {case.options.nodes}"]
    lines += [
        f"{name} = {_toml(value)}" for name, value in options.items() if name != "nodes" and value != getattr(defaults, name)
    ]
    for step in case.steps:
        lines += ["", "[[step]]", f"at = {step.at}", f"do = {_toml(step.do)}"]
        lines += [f"{name} = {_toml(value)}" for name, value in step.parameters.items() if value != STEPS[step.do].get(name)]
    lines += ["", "[must]"]
    lines += [f"{each.measure} = {_toml(str(each).partition(' ')[2])}" for each in case.thresholds]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_toml(each)}" for name, each in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(each) for each in value) + "]"
    return repr(value)
