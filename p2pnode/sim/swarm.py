"""Swarm testing: one seed draws a whole run, so that many seeds together try what nobody would write down.

A run has three parts (Groce et al. 2012 for the drawing; the phases after FoundationDB's and TigerBeetle's simulators). In the
safety phase everything may fail and only the checkers judge. Then all faults end. In the liveness phase the network must do
its work again, in a stated time. A quarter of the troubles is drawn for each run and the others are left out altogether:
features that are never on together with others hide fewer faults than all of them on all the time.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from p2pnode.sim.adversaries import GROUND, KINDS
from p2pnode.sim.chance import Random, seeded
from p2pnode.sim.scenario import Case, Options, Step, parse_step

SAFETY_SECONDS: Final = 900.0
# Between the end of all faults and the first judgement: the time that the network has to recover, as figures demand.
HEALING_SECONDS: Final = 180.0
LIVENESS_SECONDS: Final = 240.0
NODES: Final = (20, 40, 80, 120)
TROUBLE_SHARE: Final = 0.4


def drawn_case(case: Case, seed: int) -> Case:
    """Give the case of one seed: options that the file leaves at their defaults and the timeline are drawn.

    What the file says is kept: its options, its driver, its thresholds, and its own steps beside those drawn.
    """
    chance = seeded(seed, "swarm")
    options = _options(case.options, case.driver, chance)
    end = SAFETY_SECONDS
    steps = [*case.steps, *_safety(options, chance), *_liveness(options, end)]
    if case.driver == "world":
        # Real nodes have a market: jobs are bought while everything fails, and again when it is over.
        options = replace(options, offer_bytes=options.offer_bytes or 400)
        steps += [_step(60.0, "jobs", count=30, over=end - 60.0), _step(end + HEALING_SECONDS, "jobs", count=10, over=100.0)]
    return replace(
        case,
        options=options,
        steps=tuple(sorted(steps, key=lambda step: step.at)),
        seconds=end + HEALING_SECONDS + LIVENESS_SECONDS + 300.0,
    )


def _options(given: Options, driver: str, chance: Random) -> Options:
    defaults = Options()
    nodes = chance.choice(NODES) if given.nodes == defaults.nodes else given.nodes
    if driver == "world":
        nodes = min(nodes, NODES[1])
    drawn: dict[str, Any] = {
        "nodes": nodes,
        "stable": max(4, nodes // 5),
        "entry_points": chance.choice((1, 2, 5)),
        "latency": chance.choice(("lan", "wan", "continents")),
        "loss": _maybe(chance, (0.01, 0.02, 0.05), 0.0),
        "reachable": _maybe(chance, (0.9, 0.5, 0.3), 1.0),
        "slow": _maybe(chance, (0.1, 0.3), 0.0),
        "skew_seconds": _maybe(chance, (1.0, 60.0, 300.0), 0.0),
        "churn": _maybe(chance, ("exponential", "weibull"), "none"),
        "session_minutes": chance.choice((10.0, 30.0, 60.0)),
        "returning": chance.choice((0.0, 0.5, 1.0)),
        "offer_bytes": _maybe(chance, (400,), 0),
        "join_seconds": chance.choice((0.05, 0.2, 1.0)),
        "record_seconds": chance.choice((600.0, 1800.0, 7200.0)),
        "sample_seconds": 30.0,
    }
    changes = {name: value for name, value in drawn.items() if getattr(given, name) == getattr(defaults, name)}
    return replace(given, **changes)


def _maybe(chance: Random, choices: Any, off: Any) -> Any:
    """Draw whether a trouble is on, and then how bad it is."""
    is_on = chance.random() < TROUBLE_SHARE
    chosen = chance.choice(choices)
    return chosen if is_on else off


def _safety(options: Options, chance: Random) -> list[Step]:
    """Draw what goes wrong, and keep the network in use meanwhile."""
    steps = [_step(0.0, "publish", records=20), _step(60.0, "gets", count=200, over=SAFETY_SECONDS - 60.0)]
    steps.append(_step(60.0, "lookups", count=100, over=SAFETY_SECONDS - 60.0))
    faults: list[tuple[str, Mapping[str, Any]]] = [
        ("kill", {"fraction": chance.choice((0.1, 0.3, 0.5))}),
        ("leave", {"fraction": chance.choice((0.1, 0.3))}),
        ("flap", {"fraction": chance.choice((0.1, 0.3)), "times": 4, "every": chance.choice((10.0, 60.0))}),
        ("partition", {"shares": chance.choice(([0.5, 0.5], [0.8, 0.2], [0.4, 0.3, 0.3])), "symmetric": chance.random() < 0.7}),
        ("roll_partitions", {"times": 3, "every": 60.0, "share": 0.3}),
        ("lose_entry_points", {}),
        ("loss", {"fraction": chance.choice((0.1, 0.3))}),
    ]
    for do, parameters in faults:
        if chance.random() < TROUBLE_SHARE:
            steps.append(_step(chance.uniform(60.0, SAFETY_SECONDS - 240.0), do, **parameters))
    kinds = [kind for kind in KINDS if kind not in GROUND]
    if chance.random() < TROUBLE_SHARE:
        ids = max(1, options.nodes // 10)
        steps.append(
            _step(chance.uniform(0.0, 300.0), "attack", kind=chance.choice(kinds), ids=ids, subnets=chance.choice((1, ids)))
        )
    return steps


def _liveness(options: Options, end: float) -> list[Step]:
    """All faults end, everybody who went is switched on again, and the network must work."""
    healed = end + HEALING_SECONDS
    return [
        _step(end, "heal"),
        _step(end, "churn", model="none"),
        _step(end, "end_attack"),
        _step(end + 1.0, "restart", fraction=1.0),
        _step(end + 60.0, "update", version=2),
        _step(healed, "recovery", gets=100, every=10.0, for_at_most=LIVENESS_SECONDS, offers=options.offer_bytes > 0),
    ]


def _step(at: float, do: str, **parameters: Any) -> Step:
    return parse_step({"at": round(at, 3), "do": do, **parameters})
