"""Joining calls of one model into one run: a pure machine per model, and the bytes behind it.

Calls are joined along dimension 0 when everything else about them is the same. Tensors are row-major, so joining and parting
are plain copies of bytes. A model is batched only after `prove_batchable` has measured that its outputs do not depend on
batch mates: bit for bit, or within a tolerance, and then only for orders that accept one.
"""

import heapq
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import numpy as np

from p2pnode.environment import Buffer
from p2pnode.errors import ProtocolViolation
from p2pnode.wire import tensors
from p2pnode.wire.messages.work import ValueHeader
from p2pnode.work.calls import WorkRequest
from p2pnode.work.facts import ModelFacts, ValueFact
from p2pnode.work.settings import WorkSettings

ALIGNMENT: Final = 64
# Batch sizes at which a model is tried besides the largest: kernels change their ways with the number of rows.
PROOF_SIZES: Final = (2, 3)
# Lengths that are tried for the free dimensions of a measurement's inputs, until the model runs: token models take any,
# convolutions need enough rows to halve five times.
FREE_DIMENSIONS: Final = (4, 32, 1)

Key = tuple[Any, ...]
Item = TypeVar("Item")
_NONE: Final = object()


def batch_key(headers: Sequence[ValueHeader], outputs: Sequence[str], tolerance: bool) -> Key | None:
    """Give what calls must have in common to be joined; None for a call that cannot be: not all tensors, or no rows."""
    parts: list[Any] = [tuple(outputs), tolerance]
    rows = None
    for header in headers:
        if header.kind or not header.shape or header.dtype == 8:
            return None
        if rows is None:
            rows = header.shape[0]
        if header.shape[0] != rows or not rows:
            return None
        parts.append((header.name, header.dtype, header.shape[1:]))
    return tuple(parts) if rows else None


def key_of_request(request: WorkRequest, facts: ModelFacts, bytes_max: int) -> Key | None:
    """Give the batch key of a call of a batchable model; None for one that must run alone or gains nothing from company."""
    if request.exact or not (facts.batch_exact or request.tolerance):
        return None
    if 2 * len(request.payload) > bytes_max or facts.fault(request.headers, request.outputs):
        return None
    try:
        if tensors.check_headers(request.headers) != len(request.payload):
            return None
    except ProtocolViolation:
        return None
    return batch_key(request.headers, request.outputs, request.tolerance)


def rows_of(headers: Sequence[ValueHeader]) -> int:
    """Rows of a call that has a batch key."""
    return int(headers[0].shape[0])


@dataclass(slots=True)
class _Entry(Generic[Item]):
    """One waiting call, ordered by rank."""

    rank: tuple[int, int]
    since: float
    rows: int
    size_bytes: int
    item: Item

    def __lt__(self, other: "_Entry[Item]") -> bool:
        return self.rank < other.rank


@dataclass(slots=True)
class _Group(Generic[Item]):
    """Calls that may be joined, a heap."""

    entries: list[_Entry[Item]]
    rows: int = 0
    bytes: int = 0
    oldest: float = 0.0


class Batcher(Generic[Item]):
    """The waiting calls for one model's workers, by priority and then arrival; those with the same key may run as one.

    A call with the key None runs alone and is always ready. A batch is ready when it is full, when the model has no run under
    way (then waiting would gain nothing), or when its oldest call has waited for the delay.
    """

    def __init__(self, settings: WorkSettings) -> None:
        self.settings = settings
        self._groups: dict[Key | None, _Group[Item]] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def items(self) -> list[Item]:
        """Give all waiting calls."""
        return [entry.item for group in self._groups.values() for entry in group.entries]

    def add(self, key: Key | None, item: Item, rows: int, size_bytes: int, rank: tuple[int, int], now: float) -> None:
        """Put a call into its group. rank: (priority, number in order of arrival); `item` must be compared by identity."""
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group([], oldest=now)
        self._length += 1
        heapq.heappush(group.entries, _Entry(rank, now, rows, size_bytes, item))
        group.rows += rows
        group.bytes += size_bytes

    def remove(self, key: Key | None, item: Item) -> bool:
        """Take a cancelled or expired call out; False when it is not waiting any more."""
        group = self._groups.get(key)
        entry = next((entry for entry in group.entries if entry.item is item), None) if group else None
        if group is None or entry is None:
            return False
        group.entries.remove(entry)
        heapq.heapify(group.entries)
        self._count_out(key, group, [entry])
        return True

    def head(self, now: float, *, idle: bool) -> tuple[tuple[int, int], Item] | None:
        """Give (rank, call) of the first call among the ready ones, without taking it; the smallest rank goes first."""
        key = self._first(now, idle)
        return None if key is _NONE else (self._groups[key].entries[0].rank, self._groups[key].entries[0].item)

    def take(self, now: float, *, idle: bool) -> list[Item]:
        """Take the first ready call and those that run with it; empty when none is ready."""
        key = self._first(now, idle)
        return [] if key is _NONE else self._take(key)

    @property
    def deadline(self) -> float:
        """When the next batch becomes ready by waiting; infinity when no batch waits."""
        oldest = min((group.oldest for key, group in self._groups.items() if key is not None), default=float("inf"))
        return oldest + self.settings.batch_delay_seconds

    def _first(self, now: float, idle: bool) -> Any:
        best: Any = _NONE
        for key, group in self._groups.items():
            if (key is None or idle or self._is_full(group) or now >= group.oldest + self.settings.batch_delay_seconds) and (
                best is _NONE or group.entries[0] < self._groups[best].entries[0]
            ):
                best = key
        return best

    def _is_full(self, group: _Group[Item]) -> bool:
        return group.rows >= self.settings.batch_size_max or group.bytes >= self.settings.batch_bytes_max

    def _take(self, key: Key | None) -> list[Item]:
        group = self._groups[key]
        taken = [heapq.heappop(group.entries)]
        rows, size = taken[0].rows, taken[0].size_bytes
        while key is not None and group.entries:
            following = group.entries[0]
            if (
                rows + following.rows > self.settings.batch_size_max
                or size + following.size_bytes > self.settings.batch_bytes_max
            ):
                break
            taken.append(heapq.heappop(group.entries))
            rows, size = rows + following.rows, size + following.size_bytes
        self._count_out(key, group, taken)
        return [entry.item for entry in taken]

    def _count_out(self, key: Key | None, group: _Group[Item], taken: Sequence[_Entry[Item]]) -> None:
        self._length -= len(taken)
        group.rows -= sum(entry.rows for entry in taken)
        group.bytes -= sum(entry.size_bytes for entry in taken)
        if not group.entries:
            del self._groups[key]
        elif key is not None:
            group.oldest = min(entry.since for entry in group.entries)


def joined_headers(calls: Sequence[Sequence[ValueHeader]]) -> tuple[ValueHeader, ...]:
    """Give the headers of a batch. All calls have the same batch key."""
    rows = sum(rows_of(headers) for headers in calls)
    return tuple(
        ValueHeader(first.name, 0, first.dtype, (rows, *first.shape[1:]), sum(headers[index].size for headers in calls))
        for index, first in enumerate(calls[0])
    )


def join_into(target: memoryview, calls: Sequence[tuple[Sequence[ValueHeader], Buffer]]) -> None:
    """Write the batch's payload: for each input, the calls' bytes one after another."""
    views = [(headers, memoryview(payload).cast("B"), _offsets(headers)) for headers, payload in calls]
    position = 0
    for index in range(len(calls[0][0])):
        position += -position % ALIGNMENT if any(headers[index].size for headers, _, _ in views) else 0
        for headers, view, offsets in views:
            size = headers[index].size
            target[position : position + size] = view[offsets[index] : offsets[index] + size]
            position += size


def part(
    headers: Sequence[ValueHeader], payload: Buffer, rows: Sequence[int]
) -> list[tuple[tuple[ValueHeader, ...], memoryview]] | None:
    """Divide a batch's outputs among its calls; each gets a payload of its own, laid out as if it had run alone.

    None when an output is no tensor with as many rows as went in: then the model must not be batched.
    """
    total = sum(rows)
    if any(header.kind or not header.shape or header.shape[0] != total or header.size % total for header in headers):
        return None
    view, offsets = memoryview(payload).cast("B"), _offsets(headers)
    parts = []
    first = 0
    for count in rows:
        own = tuple(
            ValueHeader(header.name, 0, header.dtype, (count, *header.shape[1:]), header.size // total * count)
            for header in headers
        )
        own_offsets = _offsets(own)
        buffer = bytearray(own_offsets[-1] + own[-1].size if own else 0)
        for index, header in enumerate(headers):
            start = offsets[index] + header.size // total * first
            buffer[own_offsets[index] : own_offsets[index] + own[index].size] = view[start : start + own[index].size]
        parts.append((own, memoryview(buffer)))
        first += count
    return parts


async def prove_batchable(
    run: Callable[[dict[str, Any]], Awaitable[dict[str, Any] | None]], facts: ModelFacts, settings: WorkSettings, free: int
) -> tuple[bool, bool]:
    """Say (batchable, exact) after running a model on single rows and on batches of them.

    run: inputs -> outputs, None when the model fails. free: length of free dimensions but the first. exact: every output of
    every batch had the bits of the single run. Otherwise batchable only if all were within settings.batch_rtol. The rows
    differ, so that a leak between them shows.
    """
    size = settings.batch_size_max
    if not facts.may_batch or size < 2:
        return False, False
    rows = [sample_inputs(facts.inputs, seed, free) for seed in range(size)]
    singles = []
    for row in rows:
        single = await run(row)
        if single is None:
            return False, False
        singles.append(single)
    exact = True
    for count in sorted({*(proof for proof in PROOF_SIZES if proof <= size), size}):
        batch = await run({name: np.concatenate([row[name] for row in rows[:count]]) for name in rows[0]})
        if batch is None:
            return False, False
        for name, joined in batch.items():
            wanted = np.concatenate([single[name] for single in singles[:count]]) if _has_rows(singles, name) else None
            if wanted is None or wanted.shape != joined.shape or wanted.dtype != joined.dtype:
                return False, False
            if wanted.tobytes() != joined.tobytes():
                exact = False
                if not _close(wanted, joined, settings.batch_rtol):
                    return False, False
    return True, exact


def sample_inputs(inputs: Sequence[ValueFact], seed: int, free: int) -> dict[str, Any]:
    """Give inputs of one row for a measurement: numbers in [0, 1) for floats, 0 and 1 for the rest; the same for a seed.

    free: length of the free dimensions but the first.
    """
    generator = np.random.default_rng(seed)
    values = {}
    for fact in inputs:
        shape = tuple(_sample_size(index, size, free) for index, size in enumerate(fact.shape or ()))
        dtype = _DTYPES[fact.dtype]
        if dtype.kind == "f":
            values[fact.name] = generator.random(shape).astype(dtype)
        else:
            values[fact.name] = generator.integers(0, 2, shape).astype(dtype)
    return values


def can_sample(inputs: Sequence[ValueFact], free: int, elements_max: int) -> bool:
    """Say whether `sample_inputs` can make these inputs: numeric tensors, not too large."""
    elements = 0
    for fact in inputs:
        if fact.kind != "tensor" or fact.dtype not in _DTYPES:
            return False
        count = 1
        for index, size in enumerate(fact.shape or ()):
            count *= _sample_size(index, size, free)
        elements += count
    return elements <= elements_max


def _sample_size(index: int, size: int | str | None, free: int) -> int:
    if isinstance(size, int):
        return size
    return free if index else 1


def _has_rows(singles: Sequence[dict[str, Any]], name: str) -> bool:
    return all(isinstance(single.get(name), np.ndarray) and single[name].ndim and len(single[name]) == 1 for single in singles)


def _close(wanted: Any, joined: Any, rtol: float) -> bool:
    if wanted.dtype.kind != "f":
        return False
    scale = float(np.max(np.abs(wanted), initial=0.0))
    return bool(np.allclose(joined, wanted, rtol=rtol, atol=rtol * scale * 1e-2, equal_nan=True))


def _offsets(headers: Sequence[ValueHeader]) -> list[int]:
    """Where each tensor's bytes start in a payload: on a 64-byte boundary, the last one not padded at its end."""
    offsets, position = [], 0
    for header in headers:
        position += -position % ALIGNMENT if header.size else 0
        offsets.append(position)
        position += header.size
    return offsets


_NAMES: Final = {
    1: "f4", 2: "u1", 3: "i1", 4: "u2", 5: "i2", 6: "i4", 7: "i8", 9: "?", 10: "f2", 11: "f8", 12: "u4", 13: "u8",
}  # fmt: skip
_DTYPES: Final[dict[int, np.dtype[Any]]] = {code: np.dtype(name) for code, name in _NAMES.items()}
