"""Runs one case with one seed on its driver, and gives what came out in a form that travels between processes."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from p2pnode.discovery.settings import KademliaSettings
from p2pnode.errors import InputError
from p2pnode.sim.experiment import Experiment
from p2pnode.sim.fast_driver import FastDriver
from p2pnode.sim.latency import latency_model
from p2pnode.sim.measures import Measures
from p2pnode.sim.scenario import Case, Options, options_row
from p2pnode.sim.swarm import drawn_case
from p2pnode.sim.topic_experiment import run_topics
from p2pnode.sim.trace import Divergence, Trace, recorded_lines

Progress = Callable[[float, float], None]


@dataclass(frozen=True, slots=True)
class Run:
    """What one run gave. digest: of every event; the same for the same case, seed and code, in every process.

    notes: what a reader of the result must know about how it was made.
    """

    case: str
    seed: int
    measures: Measures
    digest: str
    notes: tuple[str, ...] = ()
    divergence: Divergence | None = None


def run_case(
    case: Case, seed: int, on_progress: Progress | None = None, trace_file: Path | None = None, replay: Path | None = None
) -> Run:
    """Run one case. trace_file: every event is written there. replay: a trace of an earlier run to compare with.

    Raises InputError for options that the driver does not have.
    """
    name = case.name
    if case.is_swarm:
        case = drawn_case(case, seed)
    experiment = Experiment(case, seed, on_progress)
    if replay is not None and not replay.is_file():
        raise InputError(f"there is no trace {replay}")
    try:
        recorded = None if replay is None else recorded_lines(replay)
        trace = Trace("messages" if trace_file or replay else _level(case), file=trace_file, recorded=recorded)
    except OSError as error:
        raise InputError(f"cannot use the trace: {error}") from error
    began = time.perf_counter()  # noqa: TID251 - what a run costs is measured outside of it
    trace.head([f"case {case.name}, seed {seed}, {case.driver} driver", str(case.options)])
    if case.driver == "fast":
        digest = run_fast(experiment, trace)
    elif case.driver == "topics":
        digest = run_topics(case, seed, experiment.measures, trace, on_progress)
    else:
        from p2pnode.sim.world_driver import run_on_world

        digest = run_on_world(experiment, trace)
    experiment.measures.wall_seconds.add(time.perf_counter() - began)  # noqa: TID251
    return Run(name, seed, experiment.measures, digest, notes_on(case), trace.divergence)


def run_fast(experiment: Experiment, trace: Trace) -> str:
    """Run an experiment on the fast driver; gives the digest."""
    options = experiment.case.options
    driver = FastDriver(
        experiment.seed,
        latency_model(options.latency),
        kademlia_settings(options),
        has_offers=options.offer_bytes > 0,
        record_seconds=options.record_seconds,
        trace=trace,
    )
    # Tables of 100 000 nodes are twenty million objects, none of them in a cycle: to look for cycles costs a fifth of a run.
    gc.disable()
    try:
        return driver.run(experiment, experiment.seconds)
    finally:
        gc.enable()


def kademlia_settings(options: Options) -> KademliaSettings:
    """Give the hash table's settings of a case. Raises InputError for a name or value that it does not have."""
    known = KademliaSettings.__dataclass_fields__
    for name, value in options.settings.items():
        if name not in known:
            raise InputError(f"there is no setting {name!r} of the hash table; choose from {', '.join(known)}")
        if type(value) is not type(getattr(KademliaSettings(), name)) and not isinstance(value, int | float):
            raise InputError(f"settings.{name} is like {getattr(KademliaSettings(), name)!r}, not {value!r}")
    changes: dict[str, Any] = {"strict_diversity": True, **options.settings}
    return replace(KademliaSettings(), **changes)


def notes_on(case: Case) -> tuple[str, ...]:
    """Say what is modelled and not real in a run of this case."""
    if case.driver == "topics":
        return ("topic machines alone; routing tables filled by an oracle, links cost nothing, offers are unsigned stand-ins",)
    if case.driver == "world":
        return ("real nodes on virtual time; above 100 nodes sessions are in the clear",)
    notes = ["pure machines on one heap; links, loss and latency modelled, message bodies encoded for their size"]
    if case.options.offer_bytes:
        notes.append("offers are unsigned stand-ins of the true size")
    if case.is_swarm:
        notes.append(f"drawn: {options_row(case.options)}, steps {[step.do for step in case.steps]}")
    if case.options.tables == "oracle":
        notes.append("routing tables were filled by an oracle, not by joining")
    return tuple(notes)


def _level(case: Case) -> str:
    """Digests of every message cost a tenth of a run; the largest do with the events."""
    return "events" if case.options.nodes > 20_000 else "messages"
