"""From a model and the shapes of its inputs to providers under agreement: quotes, ranking, orders.

A `Supply` is one agreement with what it covers. Quotes of several providers are asked at the same time, each within its
deadline; who refuses or does not answer is remembered with the reason, for the dry run, for `job why`, and for the bans.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import msgspec
import trio

from p2pnode.environment import Environment
from p2pnode.errors import PeerError, Refused, TooSlow, WorkError
from p2pnode.jobs.budget import Budget
from p2pnode.jobs.hedging import Latencies
from p2pnode.jobs.placement import Candidate, Placement, Rejected, is_wanted, place
from p2pnode.jobs.retries import BanBook, reason_of
from p2pnode.jobs.settings import JobSettings
from p2pnode.jobs.shapes import Shapes
from p2pnode.jobs.spec import Terms
from p2pnode.jobs.supply import Supply
from p2pnode.market.negotiation import OrderTerms
from p2pnode.market.pricing import call_amount, shapes_elements
from p2pnode.reasons import EndReason, Reason

_HISTORIES_MAX = 4096
_RECENT_MAX = 1024


class RecentCall(msgspec.Struct, frozen=True):
    """One answered call, for the owner's eyes. provider: node id; amount: micro-credits; bytes of the tensors alone."""

    model_id: bytes
    provider: bytes
    amount: int
    seconds: float
    bytes_sent: int
    bytes_received: int


@dataclass(slots=True)
class History:
    """What this node saw of one provider and model."""

    latencies: Latencies
    accepted: float = 0.0
    failed: float = 0.0


class Suppliers:
    """Finds providers for this node as a client. links: gives the open links by node id."""

    def __init__(
        self, environment: Environment, settings: JobSettings, market: Any, links: Callable[[], Mapping[Any, Any]]
    ) -> None:
        self._environment = environment
        self.settings = settings
        self._market = market
        self._links = links
        self.bans = BanBook(settings)
        self.refusals: Counter[str] = Counter()
        self._histories: OrderedDict[tuple[bytes, bytes], History] = OrderedDict()
        self.recent: deque[RecentCall] = deque(maxlen=_RECENT_MAX)

    def history(self, peer: bytes, model_id: bytes) -> History:
        """Give the record of one provider and model; the least recently used ones are forgotten first."""
        key = (peer, model_id)
        found = self._histories.get(key)
        if found is None:
            found = self._histories[key] = History(Latencies(self.settings))
            while len(self._histories) > _HISTORIES_MAX:
                self._histories.popitem(last=False)
        return found

    def succeeded(self, peer: bytes, model_id: bytes, seconds: float) -> None:
        """Record a call that was answered."""
        record = self.history(peer, model_id)
        record.latencies.add(seconds)
        record.accepted += 1.0
        if record.failed:
            self.bans.forgive(peer, model_id)
            record.failed *= 0.9

    def records(self) -> dict[bytes, History]:
        """Give peer -> what was seen of it over all models: counts added up, latencies of the model used last."""
        found: dict[bytes, History] = {}
        for (peer, _), record in self._histories.items():
            total = found.get(peer)
            if total is None:
                total = found[peer] = History(record.latencies)
            total.latencies = record.latencies
            total.accepted += record.accepted
            total.failed += record.failed
        return found

    def failed(self, peer: bytes, model_id: bytes, error: Exception) -> None:
        """Record a failure: the reason is counted and the peer may be banned for a while, for this model or altogether."""
        self.refusals[reason_of(error).value] += 1
        if self.bans.record(peer, model_id, error, self._environment.clock.monotonic()) is not None:
            self.history(peer, model_id).failed += 1.0

    def is_banned(self, peer: bytes, model_id: bytes = b"") -> bool:
        """Say whether a peer is not to be asked for this model, or without one for anything, now."""
        return self.bans.ban(peer, model_id, self._environment.clock.monotonic()) is not None

    def anybody(self) -> bool:
        """Say whether any peer is connected at all."""
        return bool(self._links())

    async def place(
        self, model_id: bytes, shapes: Shapes, terms: Terms, exclude: frozenset[bytes] = frozenset(), actual: Shapes = ()
    ) -> Placement:
        """Ask providers for quotes up to `shapes` and rank them by the price of one call of the `actual` ones.

        Asked are linked ones and, where offers are known of others, the cheapest of those. Cancelling leaves nothing behind
        but links.
        """
        await self._reach(terms, exclude)
        await self._somebody(terms)
        now = self._environment.clock.monotonic()
        rejected: list[Rejected] = []
        asked: list[tuple[bytes, Any]] = []
        for peer, link in sorted(self._links().items()):
            refusal = is_wanted(peer, terms)
            ban = self.bans.ban(peer, model_id, now)
            if refusal is None and peer in self.settings.providers_deny:
                refusal = Rejected(peer, Reason.DENIED, "on this node's deny list (client.providers_deny)")
            if refusal is None and peer in exclude:
                refusal = Rejected(peer, Reason.BUSY, "already used by this job")
            if refusal is None and ban is not None:
                refusal = Rejected(peer, ban.reason, f"not asked for {ban.until - now:.0f} s more ({ban.cause.value})")
            if refusal is None:
                asked.append((peer, link))
            else:
                rejected.append(refusal)
        candidates: list[Candidate] = []
        quoting = _Quoting(model_id, shapes, shapes_elements(actual or shapes), terms, candidates, rejected)
        await self._gather(self._promising(asked, model_id, rejected), quoting)
        for refusal in rejected:
            self.refusals[refusal.reason.value] += 1
        return place(candidates, terms, self.settings.latency_weight, rejected)

    async def _reach(self, terms: Terms, exclude: frozenset[bytes]) -> None:
        """Open links to the most promising providers among those whose offers are known."""

        def may_be_asked(peer: bytes) -> bool:
            return (
                is_wanted(peer, terms) is None
                and peer not in exclude
                and peer not in self.settings.providers_deny
                and not self.is_banned(peer)
            )

        await self._market.finding.links(self._links(), terms.numeric_class, may_be_asked, self.settings.quotes_max)

    async def _somebody(self, terms: Terms) -> None:
        """Wait, within the match deadline, until a wanted peer is connected: a node that just started knows nobody yet."""
        started = self._environment.clock.monotonic()
        while not any(is_wanted(peer, terms) is None for peer in self._links()):
            has_choice = terms.local_fallback or self.anybody()
            patience = self.settings.lonely_seconds if has_choice else self.settings.match_seconds
            if self._environment.clock.monotonic() - started >= patience:
                return
            await trio.sleep(0.05)

    async def _gather(self, asked: list[tuple[bytes, Any]], quoting: "_Quoting") -> None:
        """Quote all at once. One who first has to fetch the model delays the others by the match deadline at most."""
        progress = [trio.Event()]

        async def one(peer: bytes, link: Any) -> None:
            await self._quote(peer, link, quoting)
            progress[0].set()

        async def lose_patience(scope: trio.CancelScope) -> None:
            await trio.sleep(self.settings.match_seconds)
            while not quoting.candidates:
                progress[0] = trio.Event()
                await progress[0].wait()
            heard = {item.peer for item in quoting.candidates} | {item.peer for item in quoting.rejected}
            late = [peer for peer, _ in asked if peer not in heard]
            quoting.rejected.extend(Rejected(peer, Reason.TOO_SLOW, "no quote in time") for peer in late)
            scope.cancel()

        async with trio.open_nursery() as outer:
            outer.start_soon(lose_patience, outer.cancel_scope)
            async with trio.open_nursery() as nursery:
                for peer, link in asked:
                    nursery.start_soon(one, peer, link)
            outer.cancel_scope.cancel()

    async def order(
        self, candidate: Candidate, terms: Terms, amount_max: int, job: bytes | None = None, shapes: Shapes = ()
    ) -> Supply:
        """Sign an order for this quote and give the standing agreement. Raises PeerError."""
        wanted = OrderTerms(
            amount_max=amount_max,
            deadline_seconds=terms.deadline_seconds or self.settings.agreement_seconds,
            slice_calls=self.settings.slice_calls,
            slice_seconds=self.settings.slice_seconds,
            share_worker=terms.share_worker,
            accept_tolerance=terms.accept_tolerance,
        )
        with trio.move_on_after(self.settings.start_seconds):
            agreement = await self._market.order(candidate.quote, wanted, job=job)
            return Supply(candidate.peer, agreement, {item.name: tuple(item.shape) for item in shapes}, amount_max)
        raise TooSlow("the provider did not answer the order in time")

    def agreement(self, agreement_id: bytes) -> Any:
        """Give a standing agreement by id, one of an earlier process too, or None when it has ended."""
        return self._market.agreement(agreement_id)

    async def close(self, supply: Supply, reason: EndReason, *, is_urgent: bool = False) -> int:
        """End an agreement and give what it has cost, micro-credits: what is paid, and what may still have to be.

        Bounded in time: beyond it the agreement's own task goes on with the last receipt and cheque. is_urgent: a provider that
        is not connected is not waited for at all.
        """
        has_time = supply.agreement.is_connected or not is_urgent
        with trio.move_on_after(self.settings.close_seconds if has_time else 0):
            await supply.agreement.close(reason)
        if supply.agreement.end_reason is not None:
            return int(supply.agreement.spent)
        return supply.charged

    def send(
        self, supply: Supply, values: Mapping[str, Any], outputs: Sequence[str], terms: Terms, on_answer: Callable[[Any], None],
        deadline: float = inf,
    ) -> Any:  # fmt: skip
        """Send one call without waiting; `on_answer` gets a CallAnswer or an error, also for a refusal at once.

        deadline: on the node's clock; at it `on_answer` gets TooSlow.
        """
        try:
            return supply.agreement.call_nowait(
                values, outputs, terms.priority, self.settings.run_seconds, on_answer=on_answer, keep=False, deadline=deadline
            )
        except PeerError as error:
            on_answer(error)
            return None

    async def call(self, supply: Supply, values: Mapping[str, Any], outputs: Sequence[str], terms: Terms, number: int) -> Any:
        """Make one call whose output is not paid before `confirm`. Raises PeerError."""
        return await supply.agreement.call(values, outputs, terms.priority, self.settings.run_seconds, number=number, hold=True)

    async def again(self, supply: Supply, values: Mapping[str, Any], outputs: Sequence[str], terms: Terms, number: int) -> Any:
        """Ask for the answer of a held call whose link broke; executed before, it is not charged again. Raises PeerError."""
        return await supply.agreement.call(
            values, outputs, terms.priority, self.settings.run_seconds, number=number, hold=True, keep=False
        )

    def _promising(self, asked: list[tuple[bytes, Any]], model_id: bytes, rejected: list[Rejected]) -> list[tuple[bytes, Any]]:
        """The peers worth asking: known good ones first, then those that list a low price, at most quotes_max."""
        price = self._market.finding.price_hint
        ordered = sorted(asked, key=lambda entry: (-self._standing(entry[0], model_id), price(entry[0]), entry[0]))
        for peer, _ in ordered[self.settings.quotes_max :]:
            rejected.append(Rejected(peer, Reason.BUSY, f"only {self.settings.quotes_max} providers are asked at once"))
        return ordered[: self.settings.quotes_max]

    def _standing(self, peer: bytes, model_id: bytes) -> float:
        record = self._histories.get((peer, model_id))
        return 0.5 if record is None else (record.accepted + 1.0) / (record.accepted + record.failed + 2.0)

    async def _quote(self, peer: bytes, link: Any, quoting: "_Quoting") -> None:
        model_id, rejected = quoting.model_id, quoting.rejected
        try:
            with trio.fail_after(self.settings.transfer_seconds):
                quote = await self._market.quote(link, model_id, quoting.shapes, quoting.terms.numeric_class)
            price = call_amount(quote.document, quoting.elements)
        except trio.TooSlowError:
            rejected.append(Rejected(peer, Reason.TOO_SLOW, "no quote in time"))
            return
        except (PeerError, WorkError) as error:
            self.failed(peer, model_id, error)
            rejected.append(Rejected(peer, reason_of(error), getattr(error, "detail", "") or str(error)))
            return
        record = self._histories.get((peer, model_id))
        quoting.candidates.append(
            Candidate(
                peer=peer,
                price=price,
                expected_seconds=quote.document.expected_us / 1e6,
                measured_seconds=record.latencies.median_seconds if record else None,
                accepted=record.accepted if record else 0.0,
                failed=record.failed if record else 0.0,
                quote=quote,
            )
        )


@dataclass(frozen=True, slots=True)
class _Quoting:
    """One round of quotes. elements: of one actual call."""

    model_id: bytes
    shapes: Shapes
    elements: int
    terms: Terms
    candidates: list[Candidate]
    rejected: list[Rejected]


async def order_within(
    budget: Budget, suppliers: Suppliers, candidate: Candidate, terms: Terms, shares: int, job: bytes | None, shapes: Shapes
) -> Supply:
    """Reserve a share of the budget, order for at most that, and give the agreement, which then holds the reservation.

    shares: how many providers share what is left, 0 for all to one. Raises Refused(BUDGET) when one call does not fit, PeerError.
    """
    free, price = budget.free, candidate.price
    amount = max(suppliers.settings.agreement_amount_max, price)
    if free is not None:
        if free < price:
            raise Refused(Reason.BUDGET, f"the next call may cost {price} micro-credits, {free} are left of this job's total")
        # Half a provider's share at a time, so that something is left for the next order; not less than a sixteenth of the
        # whole, so that a small budget is not cut into many agreements. shares 0: one order is all there will be.
        part = free if not shares else max(price, free // (2 * shares), (budget.limit or 0) // (16 * shares))
        amount = min(free, part)
    holder = object()
    budget.reserve(holder, amount)
    try:
        supply = await suppliers.order(candidate, terms, amount, job, shapes)
        budget.rename(holder, supply.id)
        return supply
    finally:
        # Cancelled or refused: no call was sent, so nothing can be owed. A reservation that was handed on stays.
        budget.release(holder)


def no_provider(placement: Placement, terms: Terms) -> Refused:
    """Give the error to raise when nobody fits: the commonest reason, and how often each occurred.

    Most nodes of a network may be clients; that they sell nothing is the reason only where there is no other.
    """
    if not placement.rejected:
        return Refused(Reason.NOT_SELLING, "no provider is connected; `p2pnode net peers` shows who is known")
    counts = Counter(item.reason for item in placement.rejected)
    telling = Counter({reason: count for reason, count in counts.items() if reason is not Reason.NOT_SELLING})
    reason = (telling or counts).most_common(1)[0][0]
    parts = ", ".join(f"{item.value} {count}" for item, count in counts.most_common(5))
    limit = f" (limit {terms.max_price} micro-credits a call)" if reason is Reason.PRICE else ""
    first = next(item.detail for item in placement.rejected if item.reason is reason)
    return Refused(reason, f"no provider takes this work: {parts}{limit}; {first}")
