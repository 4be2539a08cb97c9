"""A call on its way through a worker, and the checks of what the worker answers."""

from collections.abc import Callable
from typing import Any, Final

import msgspec

from p2pnode.environment import Slot, WorkerOutcome
from p2pnode.errors import ProtocolViolation
from p2pnode.reasons import Reason
from p2pnode.wire import tensors
from p2pnode.work.channel import GarbledResponse

_REMEMBERED_MAX: Final = 256
# What a worker may give as the reason of a failed call.
WORKER_REASONS: Final = frozenset(
    {
        Reason.MEMORY, Reason.CANCELLED, Reason.MISSING_INPUT, Reason.UNKNOWN_INPUT, Reason.UNKNOWN_OUTPUT, Reason.WRONG_DTYPE,
        Reason.WRONG_SHAPE, Reason.RUN_FAILED, Reason.OUTPUT_TOO_LARGE, Reason.BAD_TENSOR, Reason.TRUNCATED,
        Reason.TRAILING_BYTES, Reason.TOO_LARGE, Reason.TOO_DEEP, Reason.TOO_MANY_ITEMS, Reason.WRONG_TYPE, Reason.BAD_UTF8,
        Reason.DUPLICATE_KEY, Reason.NOT_MINIMAL, Reason.BAD_KEY, Reason.RESERVED_BYTE, Reason.EXTENSION_TYPE,
    }
)  # fmt: skip


class PendingCall(msgspec.Struct, eq=False):
    """One call. target: where its outputs go; plan_slot: where headers too long for the socket lie; needs: the size of
    outputs that wait for a larger slot; dropped: why they were given up, and in words; times are trio's.
    """

    call_id: int
    sequence: int
    slot: Slot
    plan: bytes
    names: tuple[str, ...]
    deadline_seconds: float
    on_done: Callable[[WorkerOutcome], None]
    target: Slot | None = None
    plan_slot: Slot | None = None
    is_cancelled: bool = False
    is_overdue: bool = False
    cancelled_at: float = 0.0
    needs: int = 0
    dropped: tuple[Reason, str] | None = None


def remember(cache: dict[Any, Any], key: Any, value: Any) -> Any:
    """Put into a bounded cache and give the value; a full one starts anew, which costs a few slow calls."""
    if len(cache) >= _REMEMBERED_MAX and key not in cache:
        cache.clear()
    cache[key] = value
    return value


def check_headers(encoded: bytes, names: tuple[str, ...], size: int) -> int:
    """Give `size` when a worker's headers have these names and describe that many bytes. Raises GarbledResponse."""
    try:
        headers = tensors.parse_headers(encoded)
        if tuple(header.name for header in headers) != names or tensors.check_headers(headers) != size:
            raise GarbledResponse("headers do not fit the call")
    except ProtocolViolation as error:
        raise GarbledResponse(f"headers: {error}") from error
    return size
