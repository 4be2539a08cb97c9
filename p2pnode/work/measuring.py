"""The first runs of a model on this machine: how long a call takes, and whether calls may be joined."""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Final

from p2pnode.work.batching import FREE_DIMENSIONS, can_sample, prove_batchable, sample_inputs
from p2pnode.work.facts import ModelFacts
from p2pnode.work.settings import WorkSettings

# (outputs, seconds in the worker), or None when the model failed on these inputs.
Measured = tuple[dict[str, Any], float] | None
Run = Callable[[dict[str, Any]], Awaitable[Measured]]

ELEMENTS_MAX: Final = 1 << 24
_REPEATS: Final = 3
# Models slower than this gain nothing from batching but would take long to prove.
_BATCHABLE_SECONDS_MAX: Final = 0.1


async def measure(facts: ModelFacts, settings: WorkSettings, run: Run) -> ModelFacts:
    """Give facts with seconds_per_call (the best of three, 0.0 if no made-up input works) and what batching does."""
    for free in FREE_DIMENSIONS:
        if not can_sample(facts.inputs, free, ELEMENTS_MAX):
            continue
        inputs = sample_inputs(facts.inputs, 0, free)
        first = await run(inputs)
        if first is None:
            continue
        times = [first[1]]
        while len(times) < _REPEATS and sum(times) < _BATCHABLE_SECONDS_MAX:
            again = await run(inputs)
            times.append(again[1] if again else first[1])
        measured = replace(facts, seconds_per_call=min(times))
        if min(times) > _BATCHABLE_SECONDS_MAX:
            return measured
        batchable, exact = await prove_batchable(_outputs_of(run), facts, settings, free)
        return replace(measured, batchable=batchable, batch_exact=exact)
    return facts


def _outputs_of(run: Run) -> Callable[[dict[str, Any]], Awaitable[dict[str, Any] | None]]:
    async def outputs(inputs: dict[str, Any]) -> dict[str, Any] | None:
        measured = await run(inputs)
        return measured[0] if measured else None

    return outputs
