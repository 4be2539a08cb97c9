"""How far a map is, as the progress bar and `job describe` show it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


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
