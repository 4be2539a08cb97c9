"""One provider under agreement, as a job sees it: what its quote covers, and the calls under way there."""

from collections.abc import Mapping
from dataclasses import dataclass
from operator import gt
from typing import Any

import numpy as np

from p2pnode.jobs.shapes import Shapes, input_shapes


@dataclass(slots=True)
class Supply:
    """One standing agreement. limits: the largest shape per input that its quote covers. in_flight: calls under way."""

    peer: bytes
    agreement: Any
    limits: Mapping[str, tuple[int, ...]]
    amount_max: int
    in_flight: int = 0
    failed: bool = False

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
