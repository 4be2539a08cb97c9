"""A provider that is well and has no room for more now: fewer calls at once there, and nobody is to blame.

Pure. Source of the rule: congestion control as TCP has it (RFC 5681), with calls in place of segments.
"""

from typing import Final

from p2pnode.reasons import Reason

# The provider did not begin with the call; it may be welcome as soon as another one has ended.
BACK_PRESSURE_REASONS: Final = frozenset({Reason.BUSY, Reason.RATE, Reason.TOO_MANY_REQUESTS})
# The provider is well and the agreement stands. A call that ran out of memory was executed at least in part and may do the same
# again, so it is worth a few attempts and not as many as there is time for.
PASSING_REASONS: Final = BACK_PRESSURE_REASONS | {Reason.MEMORY}
# More calls than anybody has under way: nothing was refused so far.
ENDLESS: Final = 1 << 30


def is_back_pressure(error: Exception) -> bool:
    """Say whether an error means no more than: not so many at once."""
    return getattr(error, "reason", None) in BACK_PRESSURE_REASONS


class Ceiling:
    """How many calls may be under way at once at one provider, learnt from its refusals.

    It falls to what is under way beside the refused call: for that there was room. Of many refused at once each takes one off,
    so the rest is what fits. TCP halves instead, because a loss does not say by how much it was too much. It rises by one when
    as many calls as it allows were answered. That needs no sizes and follows the provider's other work both ways; the price is
    one refused call, a round trip, per round of calls where the room stays the same.
    """

    __slots__ = ("_answered", "calls")

    def __init__(self) -> None:
        self.calls = ENDLESS
        self._answered = 0

    def refused(self, under_way: int) -> None:
        """A call was refused while so many others were under way. One is always allowed: somebody has to try."""
        self.calls = max(1, min(self.calls, under_way))
        self._answered = 0

    def answered(self) -> bool:
        """A call was answered; says whether one more is allowed from now on."""
        self._answered += 1
        if self.calls == ENDLESS or self._answered < self.calls:
            return False
        self.calls += 1
        self._answered = 0
        return True
