"""The hard stop: money is reserved before anything that may cost it is sent, so a total can never be passed.

A reservation belongs to one holder (an order, then its agreement) and becomes spending when the agreement ends; what was
not used is free again. After a crash the reservations are read back and still count: what may have been
spent is treated as spent until the provider says otherwise.
"""

from collections.abc import Hashable, Mapping
from typing import Any

from p2pnode.errors import LedgerError


class Budget:
    """Integer micro-credits: `spent + reserved <= limit` holds always. limit None means no limit."""

    def __init__(self, limit: int | None, spent: int = 0, reserved: Mapping[Any, int] | None = None) -> None:
        self.limit = limit
        self.spent = spent
        self._reservations: dict[Hashable, int] = dict(reserved or {})
        self._reserved = sum(self._reservations.values())

    @property
    def reserved(self) -> int:
        """What is promised to calls that are not answered yet."""
        return self._reserved

    @property
    def free(self) -> int | None:
        """What may still be reserved, or None without a limit."""
        return None if self.limit is None else max(self.limit - self.spent - self._reserved, 0)

    def reserve(self, holder: Hashable, amount: int) -> bool:
        """Set aside `amount` for a holder; False, and nothing changed, when that would pass the limit."""
        if amount < 0:
            raise LedgerError(f"a reservation of {amount}")
        if holder in self._reservations:
            raise LedgerError("a second reservation for one holder")
        if self.limit is not None and self.spent + self._reserved + amount > self.limit:
            return False
        self._reservations[holder] = amount
        self._reserved += amount
        return True

    def rename(self, holder: Hashable, other: Hashable) -> None:
        """Hand a reservation to another holder, which has none."""
        if other in self._reservations:
            raise LedgerError("a second reservation for one agreement")
        self._reservations[other] = self._reservations.pop(holder)

    def settle(self, holder: Hashable, amount: int) -> None:
        """Turn a reservation into spending of at most its amount. Raises LedgerError when more is asked."""
        reserved = self._reservations.get(holder)
        if reserved is None or not 0 <= amount <= reserved:
            raise LedgerError(f"{amount} micro-credits charged where {reserved} were reserved")
        del self._reservations[holder]
        self._reserved -= reserved
        self.spent += amount

    def release(self, holder: Hashable) -> None:
        """Give a reservation back; unknown holders are ignored."""
        self._reserved -= self._reservations.pop(holder, 0)

    def holders(self) -> list[bytes]:
        """Give the agreements that hold a reservation."""
        return sorted(holder for holder in self._reservations if isinstance(holder, bytes))

    def reserved_for(self, holder: Hashable) -> int:
        """Give what is set aside for a holder, 0 for none."""
        return self._reservations.get(holder, 0)
