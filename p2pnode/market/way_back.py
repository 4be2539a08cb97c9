"""How a bought agreement finds its provider again: a link that came up by itself, or one dialled with growing delays."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any, Final

import trio

from p2pnode.crypto.keys import Identity
from p2pnode.environment import Environment
from p2pnode.errors import PeerError, ProtocolViolation, Refused
from p2pnode.market.agreements import Terms
from p2pnode.market.pins import Pins
from p2pnode.market.settings import MarketSettings
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.wire.messages.market import AgreementState, ResumeAgreement

_FIRST_DELAY_SECONDS: Final = 0.25
_REPLY_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class PurchaseSurroundings:
    """What all purchases of one node share. connect: opens a link to a provider; finished: told once at the end."""

    environment: Environment
    identity: Identity
    network_id: bytes
    settings: MarketSettings
    metrics: Metrics
    pins: Pins
    violated: Callable[[Any, Reason], None]
    connect: Callable[[bytes], Any]
    finished: Callable[[Any], None]


class WayBack:
    """The way back to one provider. offered: a link that came up and was not tried yet; due_at: when to dial next."""

    def __init__(self, around: PurchaseSurroundings, terms: Terms) -> None:
        self.offered: Any = None
        self.due_at = inf
        self._around = around
        self._terms = terms
        self._delay = _FIRST_DELAY_SECONDS

    def lost(self, now: float) -> None:
        """There is no link any more: dial after the delay."""
        self.due_at = now + self._delay

    async def take_up(self, now: float, has_link: bool) -> tuple[Any, AgreementState] | None:
        """Give a link on which the provider has taken the agreement up, and where it stands; None when there is none now.

        Raises Refused when the provider does not know the agreement (any more), ProtocolViolation for a false answer.
        """
        link, self.offered = self.offered, None
        if link is None:
            if has_link or now < self.due_at:
                return None
            self._delay = min(self._delay * 2, self._around.settings.reconnect_seconds_max)
            self.due_at = now + self._delay
        try:
            with trio.fail_after(_REPLY_SECONDS):
                if link is None:
                    link = await self._around.connect(self._terms.provider)
                reply = await link.request(ResumeAgreement(self._terms.agreement_id))
        except Refused as error:
            if error.reason in (Reason.UNKNOWN_AGREEMENT, Reason.AGREEMENT_ENDED):
                raise
            return None
        except ProtocolViolation:
            raise
        except (PeerError, trio.TooSlowError):
            self.due_at = min(self.due_at, now + self._delay)
            return None
        if not isinstance(reply.message, AgreementState):
            raise ProtocolViolation(Reason.WRONG_TYPE, "a resumption is answered with a state")
        if link.closed is not None:
            return None
        self._delay, self.due_at = _FIRST_DELAY_SECONDS, inf
        return link, reply.message
