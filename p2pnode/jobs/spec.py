"""What a client asks for: one run, a map over a data set, or a session that stays open.

A specification is a value: it is stored with its job, shown by `p2pnode job describe`, and read again after a crash.
Money is integer micro-credits; durations are seconds.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from p2pnode.errors import InputError

STANDARD_CLASS = "fast"


@dataclass(frozen=True, slots=True)
class Terms:
    """The conditions under which the client buys.

    max_price: most micro-credits for one call. max_total: most for the whole job, a hard stop. deadline_seconds: for the
    whole job. provider: start of a node id; only such providers are asked. deny: starts of node ids never asked.
    local_fallback: run in this node's own sandbox when no provider can. priority: 0 highest, 9 lowest.
    share_worker and accept_tolerance: what the order allows the provider (one worker for two clients; batching that changes
    last bits). providers: how many to use at once; 0 is one for a run or a session, and the node's setting for a map.
    """

    max_price: int | None = None
    max_total: int | None = None
    deadline_seconds: float | None = None
    provider: str = ""
    deny: tuple[str, ...] = ()
    local_fallback: bool = False
    numeric_class: str = STANDARD_CLASS
    priority: int = 5
    share_worker: bool = False
    accept_tolerance: bool = False
    providers: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be meant, in words."""
        if self.max_price is not None and self.max_price < 0:
            raise InputError("the highest price must not be below 0")
        if self.max_total is not None and self.max_total < 0:
            raise InputError("the highest total must not be below 0")
        if self.deadline_seconds is not None and self.deadline_seconds <= 0:
            raise InputError("the deadline must lie in the future")
        if not 0 <= self.priority <= 9:
            raise InputError(f"the priority must lie between 0 and 9, not {self.priority}")
        if self.providers < 0:
            raise InputError("the number of providers must not be below 0")


@dataclass(frozen=True, slots=True)
class JobSpec:
    """One inference. model: a model id, the start of one, or the path of an ONNX file. outputs: empty means all."""

    model: str
    inputs: Mapping[str, Any]
    outputs: tuple[str, ...] = ()
    terms: Terms = field(default_factory=Terms)


@dataclass(frozen=True, slots=True)
class MapSpec:
    """One model over a data set. data and output are paths; batch: rows of one call (0: the node's setting).

    A folder holds one item a file; .npy, .npz, .jsonl, .parquet and .csv hold rows along the first axis.
    """

    model: str
    data: str
    output: str
    outputs: tuple[str, ...] = ()
    batch: int = 0
    terms: Terms = field(default_factory=Terms)

    def encoded(self) -> bytes:
        """Give the specification as it is stored: JSON with sorted keys, so that equal ones have equal bytes."""
        return json.dumps(asdict(self), sort_keys=True).encode()


@dataclass(frozen=True, slots=True)
class SessionSpec:
    """A model kept warm at one or a few providers."""

    model: str
    terms: Terms = field(default_factory=Terms)


def decode_map_spec(data: bytes) -> MapSpec:
    """Give the MapSpec behind `MapSpec.encoded`. Keys of another version are ignored. Raises InputError."""
    try:
        raw = json.loads(data)
        terms = {key: value for key, value in raw["terms"].items() if key in {item.name for item in fields(Terms)}}
        terms["deny"] = tuple(terms.get("deny", ()))
        return MapSpec(
            model=raw["model"],
            data=raw["data"],
            output=raw["output"],
            outputs=tuple(raw["outputs"]),
            batch=raw["batch"],
            terms=Terms(**terms),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"this is not a stored map specification: {error}") from error
