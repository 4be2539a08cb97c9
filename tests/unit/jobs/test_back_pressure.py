"""A provider that is well and has no room for more: calls wait in line, nobody is banned, and no attempt is used up."""

from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import trio

from p2pnode.errors import P2PNodeError, PeerError, Refused, TooSlow
from p2pnode.jobs.back_pressure import ENDLESS, Ceiling
from p2pnode.jobs.budget import Budget
from p2pnode.jobs.placement import Candidate, Placement, Ranked
from p2pnode.jobs.sessions import ModelView, Session
from p2pnode.jobs.settings import JobSettings
from p2pnode.jobs.spec import Terms
from p2pnode.jobs.suppliers import Suppliers
from p2pnode.jobs.supply import Supply
from p2pnode.reasons import EndReason, Reason
from p2pnode.sim.clock import SimClock
from p2pnode.sim.machine import SeededEntropy, TrioClock

MODEL = b"m" * 32
TRIP_SECONDS = 0.01
# One refusal that uses up an attempt ends the call.
ONE_ATTEMPT = JobSettings(attempts_max=1)


class Ticket:
    """A call at the fake provider."""

    def __init__(self, agreement, value, on_answer):
        self.agreement, self.value, self.on_answer = agreement, value, on_answer
        self.number, self.scope, self.is_over = len(agreement.sent), trio.CancelScope(), False

    def poll(self):
        pass

    def cancel(self):
        assert not self.is_over
        self.is_over = True
        self.scope.cancel()

    def end(self, answer):
        if not self.is_over:
            self.is_over = True
            self.on_answer(answer)


@dataclass
class Agreement:
    """A fake agreement: executes so many calls at once, each for so long, and refuses the others a round trip later."""

    nursery: trio.Nursery
    id: bytes
    places: int
    seconds: float = 1.0
    refusal: Reason = Reason.BUSY
    is_open: bool = True
    is_connected: bool = True
    end_reason: EndReason | None = None
    spent: int = 0
    at_risk: int = 0
    sent: list = field(default_factory=list)
    answered: list = field(default_factory=list)
    refused: int = 0
    running: list = field(default_factory=list)
    most: int = 0

    def call_nowait(self, values, outputs, priority, timeout, *, on_answer, keep, deadline):
        assert self.is_open, "a call on an agreement that has ended"
        ticket = Ticket(self, int(values["x"][0]), on_answer)
        self.sent.append((ticket.value, trio.current_time()))
        self.nursery.start_soon(self._serve, ticket, deadline)
        return ticket

    async def _serve(self, ticket, deadline):
        with trio.move_on_at(deadline):
            await self._execute(ticket)
        ticket.end(TooSlow("late"))

    async def _execute(self, ticket):
        with ticket.scope:
            await trio.sleep(TRIP_SECONDS + ticket.number * 1e-6)  # in the order in which they were sent
            if len(self.running) >= self.places:
                self.refused += 1
                ticket.end(Refused(self.refusal, "no room for the attachment"))
                return
            self.running.append(ticket)
            self.most = max(self.most, len(self.running))
            try:
                await trio.sleep(self.seconds)
            finally:
                self.running.remove(ticket)
            self.answered.append(ticket.value)
            ticket.end(SimpleNamespace(outputs={"y": ticket.value}, amount=1, payload=b"", number=ticket.number))

    def fail(self, error):
        """End it, and every call with it."""
        self.is_open, self.end_reason = False, EndReason.PEER_LOST
        for ticket in list(self.running):
            ticket.scope.cancel()
            ticket.end(error)

    async def close(self, reason):
        self.is_open, self.end_reason = False, reason


class Market(Suppliers):
    """Real books about providers; every order is answered with the next of some agreements."""

    def __init__(self, settings):
        environment = SimpleNamespace(clock=TrioClock(), entropy=SeededEntropy(1, "bob"))
        super().__init__(environment, settings, None, lambda: {b"p": None})
        self.environment, self.agreements, self.orders = environment, deque(), 0

    async def place(self, model_id, shapes, terms, exclude=frozenset(), actual=()):
        candidate = Candidate(b"%032d" % self.orders, 1, 1.0)
        return Placement((Ranked(candidate, 1.0, 0.5, 0.5),) if self.agreements else ())

    async def order(self, candidate, terms, amount_max, job=None, shapes=()):
        self.orders += 1
        return Supply(candidate.peer, self.agreements.popleft(), {item.name: item.shape for item in shapes}, amount_max)


class Bench:
    """A session with one agreement and, as told, others to follow."""

    def __init__(self, nursery, settings, terms):
        self.nursery, self.market, self.results = nursery, Market(settings), {}
        self.ended = {}
        self.session = Session(
            self.market, self.market.environment, ModelView(MODEL, (), (), {}), terms, Budget(None), is_single=True
        )

    def agreement(self, places, **more):
        found = Agreement(self.nursery, b"%032d" % len(self.market.agreements), places, **more)
        self.market.agreements.append(found)
        return found

    @property
    def supply(self):
        return self.session._supplies[-1]

    async def call(self, number):
        try:
            answer = await self.session.call({"x": np.array([number])}, ("y",))
            self.results[number] = answer.outputs["y"]
        except P2PNodeError as error:
            self.results[number] = error
        self.ended[number] = trio.current_time()

    async def calls(self, count, apart=0.0):
        async with trio.open_nursery() as nursery:
            for number in range(count):
                nursery.start_soon(self.call, number)
                await trio.sleep(apart)

    def check_all_answered(self, count):
        assert self.results == {number: number for number in range(count)}

    def check_nobody_is_blamed(self):
        assert not self.market.bans._bans
        assert not self.market.refusals
        assert all(not record.failed for record in self.market.records().values())

    def check_nothing_is_left(self):
        for supply in self.session._supplies:
            assert supply.in_flight == 0
            assert not supply._line


@pytest.fixture
def on_bench():
    def run(scenario, settings=ONE_ATTEMPT, terms=None):
        async def main():
            async with trio.open_nursery() as nursery:
                await scenario(Bench(nursery, settings, terms or Terms()))
                nursery.cancel_scope.cancel()

        trio.run(main, clock=SimClock())

    return run


def test_many_calls_to_a_provider_with_little_room_are_all_answered(on_bench):
    async def scenario(bench):
        agreement = bench.agreement(3)
        await bench.calls(16)
        bench.check_all_answered(16)
        assert agreement.most == 3
        # Thirteen at first, and a try for one more after some of the answers.
        assert 13 <= agreement.refused <= 20
        assert trio.current_time() < 7, "the provider has always something to do"
        bench.check_nobody_is_blamed()
        bench.check_nothing_is_left()
        assert bench.market.orders == 1, "no second agreement is bought where one takes such calls"

    on_bench(scenario)


@pytest.mark.parametrize("reason", [Reason.RATE, Reason.TOO_MANY_REQUESTS])
def test_every_refusal_that_means_too_many_at_once_is_waited_out(on_bench, reason):
    async def scenario(bench):
        bench.agreement(2, refusal=reason)
        await bench.calls(8)
        bench.check_all_answered(8)
        bench.check_nobody_is_blamed()

    on_bench(scenario)


def test_whoever_waits_longest_is_next_and_newcomers_come_last(on_bench):
    async def scenario(bench):
        agreement = bench.agreement(1)
        await bench.calls(12, apart=0.3)
        bench.check_all_answered(12)
        assert agreement.answered == list(range(12))

    on_bench(scenario)


def test_a_call_that_ends_wakes_one_that_waits(on_bench):
    async def scenario(bench):
        agreement = bench.agreement(1, seconds=10.0)
        bench.nursery.start_soon(bench.calls, 6)
        await trio.sleep(5)
        assert len(agreement.sent) == 6
        before = len(agreement.sent)
        agreement.seconds = 100.0
        await trio.sleep(10)
        # One in the place of the one that ended, and one to see whether there is more room by now; it was refused.
        assert len(agreement.sent) == before + 2
        assert (bench.supply.in_flight, bench.supply.room, len(bench.supply._line)) == (1, 0, 4)

    on_bench(scenario)


def test_alone_a_refused_call_is_tried_again_a_few_times_and_no_more(on_bench):
    async def scenario(bench):
        agreement = bench.agreement(0)
        await bench.call(0)
        assert bench.results[0].reason is Reason.BUSY
        assert len(agreement.sent) == JobSettings().attempts_max
        times = [when for _, when in agreement.sent]
        assert times[-1] - times[-2] > 2 * (times[1] - times[0]), "each wait is longer than the one before"
        bench.check_nobody_is_blamed()

    on_bench(scenario, JobSettings())


def test_a_call_that_ran_out_of_memory_is_not_repeated_without_end(on_bench):
    async def scenario(bench):
        agreement = bench.agreement(1, seconds=100.0, refusal=Reason.MEMORY)
        bench.nursery.start_soon(bench.call, 0)
        await trio.sleep(1)
        agreement.places = 0
        await bench.call(1)
        assert bench.results[1].reason is Reason.MEMORY
        assert len(agreement.sent) == 2
        bench.check_nobody_is_blamed()

    on_bench(scenario)


def test_room_that_comes_back_is_used_again(on_bench):
    async def scenario(bench):
        agreement = bench.agreement(1)
        await bench.calls(4)
        agreement.places, agreement.most = 8, 0
        await bench.calls(60)
        assert agreement.most == 8
        bench.check_all_answered(60)

    on_bench(scenario)


@pytest.mark.parametrize(
    ("settings", "terms"),
    [(ONE_ATTEMPT, Terms(deadline_seconds=5.0)), (JobSettings(run_seconds=5.0, attempts_max=1), Terms())],
    ids=["the caller's", "a run's"],
)
def test_a_deadline_ends_the_wait_in_line(on_bench, settings, terms):
    async def scenario(bench):
        bench.agreement(1, seconds=4.0)
        await bench.calls(5, apart=0.1)
        assert bench.results[0] == 0
        assert all(isinstance(bench.results[number], PeerError) for number in (2, 3, 4))
        assert [bench.ended[number] for number in (2, 3, 4)] == pytest.approx([5.2, 5.3, 5.4], abs=0.05)
        bench.check_nobody_is_blamed()
        bench.check_nothing_is_left()
        assert bench.supply.usable

    on_bench(scenario, settings, terms)


def test_a_provider_is_not_too_slow_for_a_call_whose_time_went_by_in_line(on_bench):
    async def scenario(bench):
        agreement = bench.agreement(1, seconds=4.0)
        bench.nursery.start_soon(bench.call, 0)
        await trio.sleep(0.5)
        bench.session.terms = Terms(deadline_seconds=5.0)
        await bench.call(1)
        assert isinstance(bench.results[1], TooSlow)
        assert trio.current_time() == pytest.approx(5.5)
        assert [value for value, _ in agreement.sent] == [0, 1, 1]
        bench.check_nobody_is_blamed()
        assert bench.supply.usable

    on_bench(scenario)


def test_whoever_gives_up_leaves_nothing_behind(on_bench):
    async def scenario(bench):
        agreement = bench.agreement(1, seconds=10.0)
        scopes = [trio.CancelScope() for _ in range(4)]
        for number, scope in enumerate(scopes):
            bench.nursery.start_soon(within, scope, bench.call, number)
            await trio.sleep(0.1)
        scopes[1].cancel()
        await trio.sleep(0.1)
        assert len(bench.supply._line) == 2
        # The next has its turn at the very moment at which it does not want it any more.
        scopes[0].cancel()
        scopes[2].cancel()
        await trio.sleep(11)
        assert agreement.answered == [3]
        bench.check_nothing_is_left()
        assert bench.supply.room == bench.supply.ceiling.calls

    on_bench(scenario)


async def within(scope, function, *arguments):
    with scope:
        await function(*arguments)


@pytest.mark.parametrize("error", [Refused(Reason.AGREEMENT_ENDED), Refused(Reason.BUDGET), TooSlow("late")])
def test_when_an_agreement_ends_nobody_is_left_waiting_for_it(on_bench, error):
    async def scenario(bench):
        first = bench.agreement(2, seconds=50.0)
        bench.agreement(16)
        bench.nursery.start_soon(bench.calls, 8)
        await trio.sleep(1)
        assert len(bench.supply._line) == 6
        first.fail(error)
        await trio.sleep(3)
        bench.check_all_answered(8)
        assert bench.market.orders == 2
        bench.check_nothing_is_left()

    on_bench(scenario, JobSettings())


def test_a_provider_that_does_not_answer_in_time_keeps_nobody_in_line(on_bench):
    async def scenario(bench):
        first = bench.agreement(1, seconds=1.0)
        await bench.calls(2)
        first.seconds = 1000.0
        bench.agreement(16)
        bench.nursery.start_soon(bench.calls, 6)
        await trio.sleep(9)
        assert len(bench.supply._line) == 5
        await trio.sleep(30)
        bench.check_all_answered(6)

    on_bench(scenario, JobSettings(run_seconds=10.0))


def test_a_session_that_is_closed_keeps_nobody_in_line(on_bench):
    async def scenario(bench):
        bench.agreement(1, seconds=50.0)
        bench.nursery.start_soon(bench.calls, 3, 0.1)
        await trio.sleep(1)
        supply = bench.supply
        await bench.session.aclose()
        await trio.sleep(1)
        assert sorted(bench.results) == [1, 2]
        assert {error.reason for error in bench.results.values()} == {Reason.CANCELLED}
        assert supply.in_flight == 1

    on_bench(scenario)


def test_a_call_without_waiting_is_not_sent_where_there_is_no_room(on_bench):
    async def scenario(bench):
        agreement = bench.agreement(2, seconds=5.0)
        await bench.call(0)
        assert bench.supply.ceiling is None, "nothing was refused: nothing is counted"
        box = []
        for number in range(1, 4):
            assert bench.session.call_nowait({"x": np.array([number])}, ("y",), box.append)
        await trio.sleep(1)
        assert [error.reason for error in box] == [Reason.BUSY]
        assert not bench.session.call_nowait({"x": np.array([4])}, ("y",), box.append)
        assert len(agreement.sent) == 4
        await bench.call(4)
        assert bench.results == {0: 0, 4: 4}
        bench.check_nobody_is_blamed()

    on_bench(scenario)


def test_a_provider_with_room_is_preferred_to_one_without(on_bench):
    async def scenario(bench):
        first, second = bench.agreement(1, seconds=9.0), bench.agreement(9)
        await bench.calls(2)
        supply = await bench.market.order(Candidate(b"q" * 32, 1, 1.0), Terms(), 1)
        supply.limits = bench.supply.limits
        bench.session._supplies.append(supply)
        before = len(first.sent)
        await bench.calls(6)
        assert len(second.sent) == 6
        assert len(first.sent) == before

    on_bench(scenario)


def test_a_ceiling_falls_to_what_fits_and_rises_by_one_a_round():
    ceiling = Ceiling()
    assert not ceiling.answered()
    assert ceiling.calls == ENDLESS
    for under_way in range(15, 2, -1):
        ceiling.refused(under_way)
    assert ceiling.calls == 3
    assert [ceiling.answered() for _ in range(7)] == [False, False, True, False, False, False, True]
    assert ceiling.calls == 5
    ceiling.refused(9)
    assert ceiling.calls == 5, "what was sent before does not raise it"
    ceiling.refused(0)
    assert ceiling.calls == 1, "somebody has to try"


def test_calls_that_are_answered_at_once_leave_others_their_turns(on_bench, monkeypatch):
    """The answer is there before the caller would sleep: it then sleeps for the others' sake only."""

    async def scenario(bench):
        bench.agreement(9)
        await bench.call(0)

        def poll(ticket):
            ticket.end(SimpleNamespace(outputs={"y": ticket.value}, amount=1, payload=b"", number=ticket.number))

        monkeypatch.setattr(Ticket, "poll", poll)
        turns = 0

        async def other():
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        bench.nursery.start_soon(other)
        for number in range(1, 65):
            await bench.call(number)
        bench.check_all_answered(65)
        assert 4 <= turns <= 24

    on_bench(scenario)
