"""Calls whose answers were lost with their link and that are made elsewhere: their provider is asked to charge nothing for them.

A caller may take such a call back for a moment, to ask for its answer again; then it is withdrawn. While its provider is away,
or has not said yes, no cheque covers it. A provider that says no has executed it, and is paid: what it lets go is its own risk,
which it bounds.
"""

from collections.abc import Callable, Iterable
from math import inf
from typing import Any, Final

from p2pnode.errors import PeerError, ProtocolViolation, Refused
from p2pnode.market.agreements import CallsWithdrawn
from p2pnode.market.bell import Bell
from p2pnode.market.bought_calls import BoughtCalls
from p2pnode.reasons import Reason
from p2pnode.wire.messages.market import WithdrawCalls, WithdrawnCalls

_NUMBERS_MAX: Final = 4096
_AGAIN_SECONDS: Final = 2.0
# The provider is too busy to say; every other refusal is a no.
_NOT_NOW: Final = frozenset({Reason.BUSY, Reason.RATE, Reason.TOO_MANY_REQUESTS, Reason.SHUTTING_DOWN, Reason.MEMORY})


class LostCalls:
    """The lost calls of one agreement. bell: its task's. happen, broken and settle: told what the provider says."""

    def __init__(
        self, agreement_id: bytes, calls: BoughtCalls, bell: Bell, happen: Callable[[CallsWithdrawn], None],
        broken: Callable[[ProtocolViolation], None], settle: Callable[[int], None],
    ) -> None:  # fmt: skip
        self._agreement_id = agreement_id
        self._calls = calls
        self._bell = bell
        self._happen = happen
        self._broken = broken
        self._settle = settle
        # By number: when to withdraw it, seconds on the node's clock.
        self._due: dict[int, float] = {}
        self._asked: frozenset[int] = frozenset()

    @property
    def due_at(self) -> float:
        """When `tell` has something to do, given a link."""
        return inf if self._asked else min(self._due.values(), default=inf)

    def hurry(self, now: float) -> None:
        """Nobody will ask for an answer any more."""
        self._due = dict.fromkeys(self._due, now)

    def add(self, number: int, due_at: float) -> bool:
        """Withdraw an unanswered call at this time; False when there is nothing to withdraw."""
        call = self._calls.by_number.get(number)
        if call is None or call.is_answered or not self._calls.hold(number):
            return False
        self._calls.lost(number)
        self._due[number] = due_at
        self._bell.ring()
        return True

    def take_back(self, number: int) -> bool:
        """Keep a call after all; False when its provider has been told already."""
        self._due.pop(number, None)
        return number not in self._asked

    def tell(self, link: Any, now: float) -> None:
        """Ask the provider to charge nothing for what is due."""
        due = [number for number, at in self._due.items() if at <= now and number in self._calls.by_number][:_NUMBERS_MAX]
        self._due = {number: at for number, at in self._due.items() if at > now or number in due}
        if self._asked or not due:
            return
        for number in due:
            del self._due[number]
        self._asked = frozenset(due)
        try:
            link.request_nowait(WithdrawCalls(self._agreement_id, tuple(due)), (), lambda reply: self._answered(reply, now))
        except PeerError as error:
            self._answered(error, now)

    def link_down(self, now: float) -> None:
        """What was asked on the link may have been heard or not: it is asked again on the next one, which does no harm."""
        self._ask_again(now)

    def _ask_again(self, at: float) -> None:
        self._due.update(dict.fromkeys(self._asked & self._calls.by_number.keys(), at))
        self._asked = frozenset()
        self._bell.ring()

    def _answered(self, reply: Any, asked_at: float) -> None:
        asked = self._asked
        if isinstance(reply, Refused) and reply.reason not in _NOT_NOW:
            self._asked = frozenset()
            self._pay(asked)
        elif isinstance(reply, PeerError):
            # Not at once: the link may be over, and nobody has said so here yet.
            self._ask_again(asked_at + _AGAIN_SECONDS)
        elif not isinstance(reply.message, WithdrawnCalls):
            self._broken(ProtocolViolation(Reason.WRONG_TYPE, "a withdrawal is answered with what became of the calls"))
        else:
            self._asked = frozenset()
            freed, charged = (frozenset(numbers) & asked for numbers in (reply.message.freed, reply.message.charged))
            self._happen(CallsWithdrawn(tuple(sorted(asked)), freed, charged))
            self._pay(charged)

    def _pay(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._calls.give_up(number)
            self._settle(number)
