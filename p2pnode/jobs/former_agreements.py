"""The agreements that a map's earlier processes left open: what they may still cost, and has cost once they ended.

They get no new calls. Each holds its whole limit of the budget until its end, because what an earlier process charged on it is
known to its own task alone.
"""

from typing import Any

import trio

from p2pnode.environment import Environment
from p2pnode.jobs.budget import Budget
from p2pnode.jobs.suppliers import Suppliers
from p2pnode.store import agreements


class FormerAgreements:
    """Those that hold a reservation of a budget when a run begins. open: ids of those that have not ended."""

    def __init__(self, environment: Environment, suppliers: Suppliers, budget: Budget) -> None:
        self._environment = environment
        self._suppliers = suppliers
        self._budget = budget
        self.open: set[bytes] = set(budget.holders())

    @property
    def charged(self) -> int:
        """Micro-credits charged on the open ones so far, as far as that is known here."""
        return sum(int(agreement.spent + agreement.at_risk) for agreement in self._standing())

    async def run(self) -> None:
        """Count what each has cost as soon as it has ended. Cancelled: the rest stays reserved."""
        async with trio.open_nursery() as nursery:
            for agreement_id in sorted(self.open):
                nursery.start_soon(self._settle, agreement_id)

    async def closed(self) -> None:
        """Wait for the last cheques. The caller bounds the time: a provider may be away."""
        for agreement in self._standing():
            await agreement.ended()

    def _standing(self) -> list[Any]:
        return [found for agreement_id in sorted(self.open) if (found := self._suppliers.agreement(agreement_id)) is not None]

    async def _settle(self, agreement_id: bytes) -> None:
        agreement = self._suppliers.agreement(agreement_id)
        if agreement is not None:
            await agreement.ended()
        row = await self._environment.database.read(lambda connection: agreements.get_agreement(connection, agreement_id))
        paid = 0 if row is None else row.paid
        self._budget.settle(agreement_id, min(paid, self._budget.reserved_for(agreement_id)))
        self.open.discard(agreement_id)
