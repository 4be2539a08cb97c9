"""One provider under agreement, as a job sees it: what its quote covers, and who has to wait for a call there to end."""

from bisect import insort
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import gt, itemgetter
from typing import Any

import numpy as np
import trio

from p2pnode.jobs.back_pressure import ENDLESS, Ceiling
from p2pnode.jobs.shapes import Shapes, input_shapes


@dataclass(slots=True)
class Supply:
    """One standing agreement. limits: the largest shape per input that its quote covers.

    room: how many more calls may be under way at once; each takes one off and gives it back at its end. ceiling: how many in
    all, None before the first refusal for lack of room. While anybody waits in line, there is no room: it is handed on.
    """

    peer: bytes
    agreement: Any
    limits: Mapping[str, tuple[int, ...]]
    amount_max: int
    room: int = ENDLESS
    failed: bool = False
    ceiling: Ceiling | None = None
    _line: list[tuple[float, trio.lowlevel.Task]] = field(default_factory=list)

    @property
    def id(self) -> bytes:
        """The agreement's id."""
        return bytes(self.agreement.id)

    @property
    def charged(self) -> int:
        """Micro-credits charged on it so far, paid by cheque or not yet."""
        return int(self.agreement.spent + self.agreement.at_risk)

    def next_number(self) -> int:
        """Set a call number aside; it is never used twice, after a crash neither."""
        return int(self.agreement.next_number())

    @property
    def usable(self) -> bool:
        """True while calls may be sent on it."""
        return not self.failed and self.agreement.is_open

    @property
    def in_flight(self) -> int:
        """Calls under way, with those whose turn has just come."""
        return (ENDLESS if self.ceiling is None else self.ceiling.calls) - self.room

    def refused(self) -> None:
        """Note that a call, which is not counted any more, was refused for lack of room: no more than now for a while."""
        under_way = self.in_flight
        if self.ceiling is None:
            self.ceiling = Ceiling()
        self.ceiling.refused(under_way)
        self.room = self.ceiling.calls - under_way

    def answered(self) -> None:
        """Note that a call was answered; now and then that makes room for one more."""
        if self.ceiling is not None and self.ceiling.answered():
            self.room += 1

    def let_in(self) -> None:
        """Give room to the first in line, who wakes the next if there is more; once no call may be sent here, wake them all."""
        if self._line and (self.room > 0 or not self.usable):
            self.room -= 1
            trio.lowlevel.reschedule(self._line.pop(0)[1])

    async def wait_in_line(self, since: float) -> None:
        """Wait for a call's end to make room for one more, or until no call may be sent here any more.

        since: when this call had to wait for the first time; the oldest goes first, one that was refused again too. The room is
        the caller's until its next checkpoint. Cancelled: nothing is left behind.
        """
        entry = (since, trio.lowlevel.current_task())
        insort(self._line, entry, key=itemgetter(0))

        def abort(_: object) -> trio.lowlevel.Abort:
            self._line.remove(entry)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
        self.let_in()  # who is next runs after this one, and so sends its call after it
        self.room += 1

    def covers(self, shapes: Shapes) -> bool:
        """Say whether calls of these shapes are within the quote."""
        for item in shapes:
            limit = self.limits.get(item.name)
            if limit is None or len(limit) != len(item.shape) or any(map(gt, item.shape, limit)):
                return False
        return True

    def takes(self, values: Mapping[str, Any]) -> bool:
        """Say whether a call with these values is within the quote."""
        for name, value in values.items():
            if type(value) is not np.ndarray:
                return self.covers(input_shapes(values))
            limit = self.limits.get(name)
            if limit is None or len(limit) != value.ndim or any(map(gt, value.shape, limit)):
                return False
        return True
