"""Orders that left and were never countersigned here: their providers are told that nothing will come of them.

An order is saved before it is sent. Where its client dies or gives up before the countersignature is here, the provider may
have agreed, and would keep credit for it until the order's deadline. So it is told the end as soon as it is connected, until it
confirms; after a restart the rows say what is still to be told.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import trio

from p2pnode.errors import PeerError, Refused
from p2pnode.reasons import EndReason, Reason
from p2pnode.wire.messages.market import EndAgreement

REASON: Final = EndReason.CLIENT_STOPPED
_REPLY_SECONDS: Final = 10.0
_RETRY_SECONDS: Final = 0.5
_ORDERS_MAX: Final = 4096


class Withdrawals:
    """What is still to be told, by provider. start: runs an async function for as long as the market lives."""

    def __init__(self, start: Callable[..., None]) -> None:
        self._start = start
        self._orders: dict[bytes, bytes] = {}
        self._telling: set[Any] = set()

    def add(self, order: bytes, provider: bytes, link: Any) -> None:
        """Withdraw an order: now, if there is a link to its provider, else as soon as there is one."""
        self._orders[order] = provider
        while len(self._orders) > _ORDERS_MAX:
            del self._orders[next(iter(self._orders))]
        if link is not None:
            self.link_up(link)

    def link_up(self, link: Any) -> None:
        """A link is there: tell its peer what it has to know."""
        if link in self._telling or not self._of(link):
            return
        with suppress(Refused):  # the market is closing: the next start goes on
            self._start(self._tell, link)
            self._telling.add(link)

    def _of(self, link: Any) -> list[bytes]:
        return [order for order, provider in self._orders.items() if provider == link.peer.node_id]

    async def _tell(self, link: Any) -> None:
        try:
            while link.closed is None and (orders := self._of(link)):
                for order in orders:
                    if await self._is_told(link, order):
                        self._orders.pop(order, None)
                if self._of(link):
                    await trio.sleep(_RETRY_SECONDS)
        finally:
            self._telling.discard(link)

    async def _is_told(self, link: Any, order: bytes) -> bool:
        try:
            with trio.fail_after(_REPLY_SECONDS):
                await link.request(EndAgreement(order, REASON.value))
        except Refused as error:
            # Unknown: the provider never agreed. Any other refusal (the order is being saved there, say) means: again.
            return error.reason is Reason.UNKNOWN_AGREEMENT
        except (PeerError, trio.TooSlowError):
            return False
        return True
