"""A session: one model at one or a few providers, agreements reused call after call, replaced when they end or fail.

`call_nowait` is the hot path: one dictionary look-up, one request on a standing agreement, one callback. Whatever it cannot
do at once (no agreement yet, a larger shape, a lost provider) `call` does: quote, order, wait in line where a provider has no
room for more, retry with back-off, and at the end, where the terms allow it, this node's own sandbox.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import msgspec
import trio

from p2pnode.environment import Environment
from p2pnode.errors import P2PNodeError, PeerError, Refused, TooSlow, Unreachable, WorkError
from p2pnode.jobs.back_pressure import PASSING_REASONS, is_back_pressure
from p2pnode.jobs.budget import Budget
from p2pnode.jobs.feeds import ValueInfo, as_values
from p2pnode.jobs.placement import Candidate
from p2pnode.jobs.retries import Attempts, Cause, Entered, Failed, GiveUp, State, cause_of
from p2pnode.jobs.shapes import Shapes, grown_shapes, input_shapes
from p2pnode.jobs.spec import Terms
from p2pnode.jobs.suppliers import RecentCall, Suppliers, no_provider, order_within
from p2pnode.jobs.supply import Supply
from p2pnode.reasons import EndReason, Reason

OnAnswer = Callable[["Answer | P2PNodeError"], None]
_LOST_MAX = 256
# So many calls in a row may be answered without a turn of the event loop.
_AT_ONCE_MAX = 8


class Answer(msgspec.Struct, frozen=True):
    """One call's outputs and what they cost. provider: node id, empty for this node's own sandbox; amount: micro-credits."""

    outputs: Mapping[str, Any]
    provider: bytes
    amount: int
    seconds: float
    bytes_sent: int = 0
    bytes_received: int = 0
    agreement: bytes = b""
    number: int = -1


Local = Callable[[Mapping[str, Any], Sequence[str]], Any]


@dataclass(frozen=True, slots=True)
class ModelView:
    """A model as its user sees it. metadata: what the model says about itself."""

    model_id: bytes
    inputs: tuple[ValueInfo, ...]
    outputs: tuple[ValueInfo, ...]
    metadata: Mapping[str, Any]


class Session:
    """Open until `aclose`. Made by `JobService.session`; inputs and outputs describe the model.

    local: runs a call in this node's own sandbox, None when the terms forbid it. is_single: one call is all there will be.
    """

    def __init__(
        self, suppliers: Suppliers, environment: Environment, model: ModelView, terms: Terms, budget: Budget, *,
        local: Local | None = None, job: bytes | None = None, is_single: bool = False,
    ) -> None:  # fmt: skip
        self._suppliers = suppliers
        self._clock = environment.clock
        self._jitter = environment.entropy.uniform
        self.model_id = model.model_id
        self.inputs = model.inputs
        self.outputs = model.outputs
        self.metadata = model.metadata
        self.terms = terms
        self.budget = budget
        self._local = local
        self._is_single = is_single
        self.job = job
        self._supplies: list[Supply] = []
        # Calls whose link broke under them, by what they asked: who asks the same again may have their answers.
        self._at_once = 0
        self._lost: OrderedDict[tuple[bytes, tuple[str, ...]], _Lost] = OrderedDict()
        self._ordering = trio.Lock()
        self._closed = False
        self.waits_for: Reason | None = None

    @property
    def providers(self) -> tuple[bytes, ...]:
        """Who serves it now."""
        return tuple(supply.peer for supply in self._supplies if supply.usable)

    async def run(self, output_names: Sequence[str] | None, feed: Mapping[str, Any]) -> list[Any]:
        """Compute outputs in the order of `output_names` (all, when None). Raises Refused, TooSlow, WorkError …"""
        names = tuple(output_names) if output_names else tuple(info.name for info in self.outputs)
        answer = await self.call(as_values(self.inputs, feed), names)
        return [answer.outputs[name] for name in names]

    def call_nowait(self, values: Mapping[str, Any], outputs: Sequence[str], on_answer: OnAnswer) -> bool:
        """Send a call on a standing agreement; False, and nothing done, when there is none that covers it and has room.

        on_answer runs once in the event loop. An error it gets has been recorded; `call` would try elsewhere.
        """
        supply = self._covering(values)
        if supply is None or self._closed:
            return False
        self._send(supply, values, outputs, on_answer)
        return True

    async def call(self, values: Mapping[str, Any], outputs: Sequence[str]) -> Answer:
        """Call until it is answered, the retries are used up, or the budget is. Cancelling cancels the call."""
        started, settings = self._clock.monotonic(), self._suppliers.settings
        supply, attempts = self._covering(values), None
        while True:
            try:
                if self._lost and (answer := await self._recalled(values, outputs)) is not None:
                    return answer
                if attempts is None and supply is not None and self.terms.deadline_seconds is None:
                    # The usual case: an agreement stands. Nothing is prepared for a failure before there is one.
                    return await self._through(supply, values, outputs, started + settings.run_seconds)
                attempts = attempts or Attempts(settings, started, self.terms.deadline_seconds)
                return await self._attempt(values, outputs, attempts)
            except (PeerError, WorkError) as error:
                attempts = attempts or Attempts(settings, started, self.terms.deadline_seconds)
                now = self._clock.monotonic()
                if is_back_pressure(error) and self._is_under_way(values) and now < attempts.enter_line(now):
                    continue  # the provider is well and at work for this session: there will be room
                verdict = attempts.handle(Failed(error, self._jitter()), now)
                if isinstance(verdict, GiveUp):
                    if self._local is not None and verdict.end in _LOCAL_HELPS and cause_of(error) is not Cause.INPUT:
                        return await self._run_locally(values, outputs)
                    raise
                self.waits_for = getattr(error, "reason", None)
                if self._local is not None and isinstance(error, Refused) and not self._suppliers.anybody():
                    return await self._run_locally(values, outputs)
                assert verdict is not None
                await trio.sleep(max(0.0, verdict.when - self._clock.monotonic()))

    async def aclose(self) -> None:
        """End the agreements: last receipts, last cheques. Bounded in time, also when cancelled."""
        self._closed = True
        for supply in self._supplies:
            self._give_up(supply)
        with trio.move_on_after(self._suppliers.settings.return_seconds, shield=True):
            async with trio.open_nursery() as nursery:
                for supply in self._supplies:
                    nursery.start_soon(self._close, supply, EndReason.COMPLETED)
        self._supplies.clear()

    async def _attempt(self, values: Mapping[str, Any], outputs: Sequence[str], attempts: Attempts) -> Answer:
        supply = self._covering(values)
        while supply is None:
            full = next((each for each in self._supplies if each.room < 1 and each.usable and each.takes(values)), None)
            supply = await (self._order(values, attempts) if full is None else self._turn(full, attempts))
        attempts.handle(Entered(State.RUN), self._clock.monotonic())
        with trio.move_on_at(attempts.deadline):
            return await self._through(supply, values, outputs, inf)
        error = TooSlow("the provider did not answer in time")
        if not attempts.has_waited_too_long(self._clock.monotonic()):
            self._suppliers.failed(supply.peer, self.model_id, error)
            self._give_up(supply)
        raise error

    async def _turn(self, supply: Supply, attempts: Attempts) -> Supply | None:
        """Wait in line for room at this agreement, which then has to be used at once. None: it ended.

        Raises Refused(BUSY) when the time for that is over, Refused(CANCELLED) when the session is closed.
        """
        self.waits_for = Reason.BUSY
        with trio.move_on_at(attempts.enter_line(self._clock.monotonic())):
            await supply.wait_in_line(attempts.in_line_since)
            if self._closed:
                raise Refused(Reason.CANCELLED, "the session was closed")
            return supply if supply.usable else None
        raise Refused(Reason.BUSY, "the provider had no room for this call in time")

    def _give_up(self, supply: Supply) -> None:
        supply.failed = True
        supply.let_in()

    async def _through(self, supply: Supply, values: Mapping[str, Any], outputs: Sequence[str], deadline: float) -> Answer:
        """Make one call on this agreement. deadline: on the node's clock. Raises P2PNodeError.

        No event and no scope: they would cost a short call a tenth of what p2pnode adds to it. The agreement's task watches the
        deadline, in its own time: it may come some seconds late.
        """
        task, is_waiting = trio.lowlevel.current_task(), False
        box: list[Answer | P2PNodeError] = []

        def on_answer(answer: Answer | P2PNodeError) -> None:
            box.append(answer)
            if is_waiting:
                trio.lowlevel.reschedule(task)

        def abort(_: object) -> trio.lowlevel.Abort:
            ticket.cancel()
            supply.room += 1
            supply.let_in()
            return trio.lowlevel.Abort.SUCCEEDED

        ticket = self._send(supply, values, outputs, on_answer, deadline)
        if ticket is not None:
            ticket.poll()
        if box:
            # Answered without a turn of the event loop: the other tasks get theirs every few calls.
            self._at_once += 1
            if self._at_once % _AT_ONCE_MAX:
                await trio.lowlevel.checkpoint_if_cancelled()
            else:
                await trio.lowlevel.checkpoint()
        else:
            is_waiting = True
            await trio.lowlevel.wait_task_rescheduled(abort)
        self.waits_for = None
        answer = box[0]
        if isinstance(answer, P2PNodeError):
            raise answer
        return answer

    async def _recalled(self, values: Mapping[str, Any], outputs: Sequence[str]) -> Answer | None:
        """Ask again for a call whose link broke, if its provider is back soon. None: it costs nothing, or nobody can know.

        Raises P2PNodeError for a call that the provider refuses after all.
        """
        lost = self._take_lost(values, outputs)
        if lost is None or not lost.supply.agreement.hold(lost.number):
            return None
        supply, agreement, started, is_held = lost.supply, lost.supply.agreement, self._clock.monotonic(), True
        supply.room -= 1
        try:
            if not await self._is_back(agreement):
                return None
            result = await self._suppliers.again(supply, values, outputs, self.terms, lost.number)
            agreement.confirm(lost.number)
            is_held = False
        except Unreachable:
            self._keep_lost(supply, lost.number, values, outputs)
            is_held = False
            raise
        except P2PNodeError:
            agreement.give_up(lost.number)
            is_held = False
            raise
        finally:
            supply.room += 1
            supply.let_in()
            if is_held:
                agreement.withdraw(lost.number)
        supply.failed = not agreement.is_open
        self.waits_for = None
        return self._answered(supply, result, self._clock.monotonic() - started, values_bytes(values))

    async def _is_back(self, agreement: Any) -> bool:
        until = self._clock.monotonic() + self._suppliers.settings.back_seconds
        while agreement.end_reason is None and self._clock.monotonic() < until:
            if agreement.is_connected:
                return True
            await trio.sleep(0.02)
        return False

    def _keep_lost(self, supply: Supply, number: int, values: Mapping[str, Any], outputs: Sequence[str]) -> None:
        if supply.agreement.end_reason is None:
            supply.agreement.withdraw(number, self._suppliers.settings.back_seconds)
            key = supply.agreement.described(values)[0], tuple(outputs)
            self._lost[key] = _Lost(supply, number, self._clock.monotonic())
            while len(self._lost) > _LOST_MAX:
                self._lost.popitem(last=False)

    def _take_lost(self, values: Mapping[str, Any], outputs: Sequence[str]) -> "_Lost | None":
        oldest = self._clock.monotonic() - self._suppliers.settings.back_seconds
        while self._lost and next(iter(self._lost.values())).since < oldest:
            self._lost.popitem(last=False)
        if not self._lost:
            return None
        try:
            input_hash = next(iter(self._lost.values())).supply.agreement.described(values)[0]
        except Refused:
            return None  # a shape beyond the quote was not under way on this agreement
        return self._lost.pop((input_hash, tuple(outputs)), None)

    def _covering(self, values: Mapping[str, Any]) -> Supply | None:
        best, most = None, 0
        for supply in self._supplies:
            if supply.room > most and supply.usable and supply.takes(values):
                best, most = supply, supply.room
        return best

    def _is_under_way(self, values: Mapping[str, Any]) -> bool:
        """Say whether calls are under way where these values may be sent."""
        return any(supply.in_flight and supply.usable and supply.takes(values) for supply in self._supplies)

    async def _order(self, values: Mapping[str, Any], attempts: Attempts) -> Supply | None:
        """Open one more agreement; several callers that need the same one wait for it. None: it is full by now."""
        async with self._ordering:
            if any(supply.usable and supply.takes(values) for supply in self._supplies):
                return self._covering(values)
            await self._drop_unusable()
            shapes = input_shapes(values)
            wanted = shapes if self._is_single else grown_shapes(shapes, self.inputs)
            placement = await self._suppliers.place(self.model_id, wanted, self.terms, actual=shapes)
            if placement.best is None and wanted != shapes:
                # The rounded-up shape may be over a provider's limit, or the owner's, where the exact one is not.
                wanted, placement = shapes, await self._suppliers.place(self.model_id, shapes, self.terms)
            if placement.best is None:
                raise no_provider(placement, self.terms)
            attempts.handle(Entered(State.START), self._clock.monotonic())
            return await self._first_willing([item.candidate for item in placement.ranked], wanted)

    async def _first_willing(self, candidates: Sequence[Candidate], shapes: Shapes) -> Supply:
        error: PeerError | None = None
        shares = 0 if self._is_single else max(self.terms.providers, 1)
        if self.budget.free is not None and self.budget.free < min(candidate.price for candidate in candidates):
            # What idle agreements hold back would pay for this one.
            await self._drop([supply for supply in self._supplies if not supply.in_flight], EndReason.COMPLETED)
        for candidate in candidates:
            try:
                supply = await order_within(self.budget, self._suppliers, candidate, self.terms, shares, self.job, shapes)
            except PeerError as refusal:
                if getattr(refusal, "reason", None) is Reason.BUDGET:
                    raise
                self._suppliers.failed(candidate.peer, self.model_id, refusal)
                error = refusal
                continue
            self._supplies.append(supply)
            return supply
        assert error is not None
        raise error

    async def _drop_unusable(self) -> None:
        await self._drop([supply for supply in self._supplies if not supply.usable and not supply.in_flight], EndReason.FAILED)

    async def _drop(self, supplies: Sequence[Supply], reason: EndReason) -> None:
        for supply in supplies:
            self._supplies.remove(supply)
            await self._close(supply, reason, is_urgent=True)

    async def _close(self, supply: Supply, reason: EndReason, is_urgent: bool = False) -> None:
        paid = await self._suppliers.close(supply, reason, is_urgent=is_urgent)
        self.budget.settle(supply.id, min(paid, self.budget.reserved_for(supply.id)))

    def _send(
        self, supply: Supply, values: Mapping[str, Any], outputs: Sequence[str], on_answer: OnAnswer, deadline: float = inf
    ) -> Any:
        supply.room -= 1
        started, sent = self._clock.monotonic(), 0
        ticket: Any = None

        def done(result: Any) -> None:
            supply.room += 1
            if not isinstance(result, P2PNodeError):
                if supply.ceiling is not None:
                    supply.answered()
                    supply.let_in()
                on_answer(self._answered(supply, result, self._clock.monotonic() - started, sent))
                return
            if isinstance(result, Unreachable) and ticket is not None:
                # Not paid, if the provider agrees, unless who asks again fetches it in time: see `_recalled`.
                self._keep_lost(supply, ticket.number, values, outputs)
            error = self._broken(supply, result)
            supply.let_in()
            on_answer(error)

        ticket = self._suppliers.send(supply, values, outputs, self.terms, done, deadline)
        sent = values_bytes(values)  # while the provider is at work already
        return ticket

    def _answered(self, supply: Supply, result: Any, seconds: float, sent: int) -> Answer:
        self._suppliers.succeeded(supply.peer, self.model_id, seconds)
        received = len(result.payload)
        self._suppliers.recent.append(RecentCall(self.model_id, supply.peer, result.amount, seconds, sent, received))
        return Answer(result.outputs, supply.peer, result.amount, seconds, sent, received, supply.id, result.number)

    def _broken(self, supply: Supply, error: P2PNodeError) -> P2PNodeError:
        reason = getattr(error, "reason", None)
        if reason in PASSING_REASONS:
            supply.refused()
            return error
        if reason in _USED_UP:
            # This agreement has no room left; the job may have. Another order settles which.
            supply.failed = True
            return Refused(Reason.AGREEMENT_ENDED, "the agreement is used up")
        if cause_of(error) in (Cause.INPUT, Cause.OURS):
            return error
        self._suppliers.failed(supply.peer, self.model_id, error)
        supply.failed = True
        return error

    async def _run_locally(self, values: Mapping[str, Any], outputs: Sequence[str]) -> Answer:
        assert self._local is not None
        started = self._clock.monotonic()
        result = await self._local(values, outputs)
        return Answer(result, b"", 0, self._clock.monotonic() - started)


@dataclass(frozen=True, slots=True)
class _Lost:
    """A call whose link broke under it, and when."""

    supply: Supply
    number: int
    since: float


def is_worth_another_try(error: Exception) -> bool:
    """Say whether `Session.call` could do better after `call_nowait` ended with this error."""
    return isinstance(error, P2PNodeError) and cause_of(error) not in (Cause.INPUT, Cause.OURS)


def values_bytes(values: Mapping[str, Any]) -> int:
    """Give how many bytes of tensors these values hold; texts and mappings count as nothing."""
    flat = [item for value in values.values() for item in (value if isinstance(value, list) else [value])]
    return sum(item.nbytes for item in flat if hasattr(item, "nbytes") and item.dtype != object)


_USED_UP = frozenset({Reason.BUDGET, Reason.AGREEMENT_ENDED, Reason.UNKNOWN_AGREEMENT})
_LOCAL_HELPS = frozenset({EndReason.REFUSED, EndReason.FAILED, EndReason.PEER_LOST, EndReason.EXPIRED, EndReason.BUDGET})
