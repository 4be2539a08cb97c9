"""How far a map is, as the progress bar and `job describe` show it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from p2pnode.jobs.batches import Finished, MapMachine
from p2pnode.reasons import Reason


@dataclass(frozen=True, slots=True)
class MapProgress:
    """How far a map is. rate: items a second; spent and expected in micro-credits; eta_seconds None while unknown."""

    state: str
    done: int
    failed: int
    total: int
    rows: int
    in_flight: int
    providers: int
    rate: float
    spent: int
    reserved: int
    expected_total: int | None
    eta_seconds: float | None
    waits_for: str
    end_reason: str
    detail: str

    def as_json(self) -> dict[str, Any]:
        """Give it as JSON."""
        return asdict(self)


def running_progress(
    machine: MapMachine, rows: int, done_before: int, seconds: float, providers: int, spent: int, reserved: int,
    waits_for: Reason | None, finished: Finished | None,
) -> MapProgress:  # fmt: skip
    """Give the progress of a map that runs since so many seconds, with what was done before it began."""
    fresh = machine.done - done_before
    rate = fresh / seconds if fresh and seconds > 0 else 0.0
    left = machine.count - machine.done - machine.failed
    return MapProgress(
        state="ended" if finished else "running",
        done=machine.done,
        failed=machine.failed,
        total=machine.count,
        rows=rows,
        in_flight=machine.in_flight,
        providers=providers,
        rate=rate,
        spent=spent,
        reserved=reserved,
        expected_total=round(spent / fresh * (fresh + left)) if fresh else None,
        eta_seconds=left / rate if rate else None,
        waits_for=waits_for.value if waits_for else "",
        end_reason=finished.end.value if finished else "",
        detail=finished.detail if finished else "",
    )


def past_progress(description: Mapping[str, Any]) -> MapProgress:
    """Give the progress of a job that does not run now, from its description."""
    counts = description["items_by_state"]
    return MapProgress(
        state=description["state"],
        done=counts.get("done", 0),
        failed=counts.get("failed", 0),
        total=description["items"],
        rows=0,
        in_flight=0,
        providers=0,
        rate=0.0,
        spent=description["spent_microcredits"],
        reserved=description["promised_microcredits"],
        expected_total=None,
        eta_seconds=None,
        waits_for=description["waits_for"],
        end_reason=description["end_reason"],
        detail=description["end_detail"],
    )
