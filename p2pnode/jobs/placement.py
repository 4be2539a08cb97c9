"""Which provider gets the work: a pure ranking of quotes by price, measured latency and this node's own experience.

The score of a candidate is its expected cost: relative price and relative time, mixed by the latency weight, divided by
how often it delivered. Price and time are relative to the best candidate, so the score has no unit. Lowest wins.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from p2pnode.ids import NODE, matches_prefix, node_text
from p2pnode.jobs.spec import Terms
from p2pnode.reasons import Reason


@dataclass(frozen=True, slots=True)
class Candidate:
    """One provider with a binding quote.

    price: micro-credits for one call of this job. expected_seconds: the quote's word. measured_seconds: our own median for
    this provider and model, None before the first call. accepted, failed: our own counts. quote: what `market` orders with.
    """

    peer: bytes
    price: int
    expected_seconds: float
    measured_seconds: float | None = None
    accepted: float = 0.0
    failed: float = 0.0
    quote: Any = None

    @property
    def seconds(self) -> float:
        """The latency to plan with: measured where we have it."""
        return self.expected_seconds if self.measured_seconds is None else self.measured_seconds

    @property
    def reliability(self) -> float:
        """Chance to deliver: mean of a Beta distribution with one success and no failure as prior belief."""
        return (self.accepted + 1.0) / (self.accepted + self.failed + 1.0)


@dataclass(frozen=True, slots=True)
class Rejected:
    """A peer that will not be used, and why."""

    peer: bytes
    reason: Reason
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Ranked:
    """A candidate with its score (lower is better) and the parts of it."""

    candidate: Candidate
    score: float
    price_part: float
    time_part: float


@dataclass(frozen=True, slots=True)
class Placement:
    """The candidates in order of preference, and everybody who was left out."""

    ranked: tuple[Ranked, ...] = ()
    rejected: tuple[Rejected, ...] = field(default=())

    @property
    def best(self) -> Candidate | None:
        """The first choice, or None."""
        return self.ranked[0].candidate if self.ranked else None

    def explanation(self) -> dict[str, Any]:
        """Give what `--dry-run --json` prints: choices with the parts of their scores, rejected peers with reasons."""
        return {
            "chosen": [
                {
                    "provider": node_text(item.candidate.peer),
                    "price_microcredits": item.candidate.price,
                    "expected_seconds": item.candidate.seconds,
                    "measured": item.candidate.measured_seconds is not None,
                    "reliability": round(item.candidate.reliability, 4),
                    "score": round(item.score, 4),
                    "price_part": round(item.price_part, 4),
                    "time_part": round(item.time_part, 4),
                }
                for item in self.ranked
            ],
            "rejected": [
                {"provider": node_text(item.peer), "reason": item.reason.value, "detail": item.detail} for item in self.rejected
            ],
        }


def is_wanted(peer: bytes, terms: Terms) -> Rejected | None:
    """Give None when the terms allow this peer at all, else why not. Needs no quote, so nobody is asked in vain."""
    if terms.provider and not matches_prefix(NODE, peer, terms.provider):
        return Rejected(peer, Reason.DENIED, f"only {terms.provider} is wanted")
    if any(matches_prefix(NODE, peer, denied) for denied in terms.deny):
        return Rejected(peer, Reason.DENIED, "on this job's deny list")
    return None


def place(candidates: Iterable[Candidate], terms: Terms, latency_weight: float, rejected: Sequence[Rejected] = ()) -> Placement:
    """Rank the candidates that fit the terms. rejected: peers that were left out before, kept for the explanation."""
    fitting: list[Candidate] = []
    out = list(rejected)
    for candidate in candidates:
        refusal = is_wanted(candidate.peer, terms) or _over_limits(candidate, terms)
        if refusal is None:
            fitting.append(candidate)
        else:
            out.append(refusal)
    if not fitting:
        return Placement((), tuple(out))
    cheapest = min(item.price for item in fitting) + 1
    fastest = max(min(item.seconds for item in fitting), 1e-4)
    ranked = []
    for item in fitting:
        price_part = (item.price + 1) / cheapest
        time_part = latency_weight * max(item.seconds, 1e-4) / fastest
        ranked.append(Ranked(item, (price_part + time_part) / item.reliability, price_part, time_part))
    # The node id breaks ties, so equal quotes give the same choice in every run of a simulation.
    ranked.sort(key=lambda entry: (entry.score, entry.candidate.peer))
    return Placement(tuple(ranked), tuple(out))


def _over_limits(candidate: Candidate, terms: Terms) -> Rejected | None:
    if terms.max_price is not None and candidate.price > terms.max_price:
        return Rejected(candidate.peer, Reason.PRICE, f"asks {candidate.price} micro-credits, the limit is {terms.max_price}")
    if terms.max_total is not None and candidate.price > terms.max_total:
        return Rejected(candidate.peer, Reason.BUDGET, f"asks {candidate.price} micro-credits, {terms.max_total} are left")
    if terms.deadline_seconds is not None and candidate.seconds > terms.deadline_seconds:
        return Rejected(candidate.peer, Reason.DEADLINE, f"expects {candidate.seconds:.3g} s")
    return None
