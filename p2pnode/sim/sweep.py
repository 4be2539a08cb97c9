"""Many runs at once: in processes of this machine, or on an existing Ray engine where one machine is not enough.

Each run is a process of its own, so memory and processor time are the run's. Results come back in the order of the plan,
whatever finished first.
"""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing.managers import SyncManager
from queue import Empty, Queue
from typing import Any, Final

from p2pnode.errors import ConfigError
from p2pnode.sim.running import Run, run_case
from p2pnode.sim.scenario import Case

ENGINES: Final = ("processes", "ray", "here")
POLL_SECONDS: Final = 0.2
# Told (number of the run, virtual seconds passed, virtual seconds in all).
OnProgress = Callable[[int, float, float], None]
Plan = Sequence[tuple[Case, int]]


def run_plan(plan: Plan, engine: str = "processes", workers: int = 0, on_progress: OnProgress | None = None) -> list[Run]:
    """Run every (case, seed) and give the results in order.

    engine: `processes` (workers of them, 0: one per processor), `ray`, or `here`: in this process, one after the other.
    Raises ConfigError for an engine that is not there, and whatever a run raised.
    """
    if engine not in ENGINES:
        raise ConfigError(f"there is no engine {engine!r}; choose from {', '.join(ENGINES)}")
    if engine == "ray":
        return _on_ray(plan, on_progress)
    workers = min(workers or os.cpu_count() or 1, len(plan))
    if engine == "here" or (workers == 1 and len(plan) == 1):
        return [_run(number, case, seed, on_progress) for number, (case, seed) in enumerate(plan)]
    return _in_processes(plan, workers, on_progress)


def _run(number: int, case: Case, seed: int, on_progress: OnProgress | None) -> Run:
    report = None if on_progress is None else lambda now, end: on_progress(number, now, end)
    return run_case(case, seed, report)


def _in_processes(plan: Plan, workers: int, on_progress: OnProgress | None) -> list[Run]:
    # Spawned, not forked: a run must not inherit what this process has imported or drawn.
    context = multiprocessing.get_context("spawn")
    with SyncManager(ctx=context) as manager:
        told = manager.Queue()
        with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
            futures = [pool.submit(_in_child, number, case, seed, told) for number, (case, seed) in enumerate(plan)]
            waiting: set[Future[Run]] = set(futures)
            try:
                while waiting:
                    _, waiting = wait(waiting, POLL_SECONDS, FIRST_COMPLETED)
                    _tell(told, on_progress)
                return [future.result() for future in futures]
            except BaseException:  # an interrupt included: the other runs must not go on for minutes
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _in_child(number: int, case: Case, seed: int, told: "Queue[tuple[int, float, float]]") -> Run:
    return _run(number, case, seed, lambda each, now, end: told.put((each, now, end)))


def _tell(told: "Queue[tuple[int, float, float]]", on_progress: OnProgress | None) -> None:
    while True:
        try:
            news = told.get_nowait()
        except Empty:
            return
        if on_progress is not None:
            on_progress(*news)


def _on_ray(plan: Plan, on_progress: OnProgress | None) -> list[Run]:
    ray = _ray()
    is_ours = not ray.is_initialized()
    if is_ours:
        # An address in RAY_ADDRESS is joined; without one Ray starts on this machine.
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        remote = ray.remote(max_calls=1)(run_case)
        references = [remote.remote(case, seed) for case, seed in plan]
        number_of = {reference: number for number, reference in enumerate(references)}
        waiting = list(references)
        while waiting:
            done, waiting = ray.wait(waiting)
            for reference in done:
                if on_progress is not None:
                    on_progress(number_of[reference], 1.0, 1.0)
        return list(ray.get(references))
    finally:
        if is_ours:
            ray.shutdown()


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ConfigError("the engine `ray` needs the package ray: pip install 'p2pnode[ray]'") from error
    return ray
