"""The router answers every request once, whatever the handler does, and a bug costs the peer its link at most."""

from types import SimpleNamespace

import pytest
import trio

from p2pnode.errors import ProtocolViolation, Refused, WorkError
from p2pnode.metrics import Metrics
from p2pnode.node.router import Router
from p2pnode.reasons import Reason
from p2pnode.wire.messages.discovery import WhoAreYou
from p2pnode.wire.messages.market import OfferRequest


class FakeIncoming:
    def __init__(self, message):
        self.message = message
        self.link = SimpleNamespace(peer=SimpleNamespace(node_id=b"\1" * 32), closed=None, close=self._close)
        self.refusals = []

    def _close(self, reason):
        self.link.closed = reason

    def refuse(self, reason, detail=""):
        self.refusals.append((reason, detail))


def route(handler, *, strict=False, message=None):
    metrics, blamed = Metrics(), []
    router = Router(metrics, lambda node_id, reason: blamed.append((node_id, reason)), strict=strict)
    router.register([WhoAreYou], handler)
    incoming = FakeIncoming(message or WhoAreYou())
    router(incoming)
    return incoming, metrics, blamed


def raising(error):
    def handler(incoming):
        raise error

    return handler


def test_a_handler_gets_its_message():
    seen = []
    incoming, _, _ = route(lambda incoming: seen.append(incoming) or True)
    assert seen == [incoming]
    assert incoming.refusals == []


def test_an_unknown_message_is_refused():
    incoming, _, _ = route(lambda incoming: True, message=OfferRequest())
    assert incoming.refusals == [(Reason.UNKNOWN_MESSAGE, "")]


def test_a_handler_that_does_not_take_it_refuses():
    incoming, _, _ = route(lambda incoming: False)
    assert incoming.refusals == [(Reason.UNKNOWN_MESSAGE, "")]


@pytest.mark.parametrize("error", [Refused(Reason.BUSY, "full"), WorkError(Reason.BUSY, "full")])
def test_refusals_are_answered_and_cost_nothing(error):
    incoming, _, blamed = route(raising(error))
    assert incoming.refusals == [(Reason.BUSY, "full")]
    assert incoming.link.closed is None
    assert blamed == []


def test_a_violation_closes_the_link_and_lowers_the_score():
    incoming, metrics, blamed = route(raising(ProtocolViolation(Reason.BAD_SIGNATURE)))
    assert incoming.link.closed is Reason.BAD_SIGNATURE
    assert blamed == [(b"\1" * 32, Reason.BAD_SIGNATURE)]
    assert metrics.labels("violations_total") == {"bad-signature": 1}


def test_a_bug_costs_the_link_and_is_counted(caplog):
    incoming, metrics, _ = route(raising(ZeroDivisionError("oops")))
    assert incoming.link.closed is Reason.INTERNAL
    assert metrics.labels("bugs_total") == {"ZeroDivisionError": 1}


def test_under_strict_a_bug_stops_everything():
    with pytest.raises(ZeroDivisionError):
        route(raising(ZeroDivisionError()), strict=True)


def test_two_handlers_for_one_message_are_a_mistake():
    router = Router(Metrics(), lambda node_id, reason: None)
    router.register([WhoAreYou], lambda incoming: True)
    with pytest.raises(RuntimeError, match="WhoAreYou"):
        router.register([WhoAreYou], lambda incoming: True)


async def test_tasks_are_bounded():
    metrics = Metrics()
    router = Router(metrics, lambda node_id, reason: None, tasks_max=1)
    release = trio.Event()

    async def slow(incoming):
        await release.wait()

    router.register_task([WhoAreYou], slow)
    early = FakeIncoming(WhoAreYou())
    router(early)
    assert early.refusals == [(Reason.SHUTTING_DOWN, "")]
    async with trio.open_nursery() as nursery:
        await nursery.start(router.run)
        first, second, third = (FakeIncoming(WhoAreYou()) for _ in range(3))
        router(first)
        router(second)
        assert second.refusals == [(Reason.BUSY, "")]
        assert metrics.labels("limit_hits_total") == {"router_tasks_max": 1}
        release.set()
        await trio.testing.wait_all_tasks_blocked()
        router(third)
        assert third.refusals == []
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()


async def test_a_task_that_fails_is_handled_like_a_function():
    blamed = []
    router = Router(Metrics(), lambda node_id, reason: blamed.append(reason))

    async def bad(incoming):
        raise ProtocolViolation(Reason.WRONG_SIGNER)

    router.register_task([WhoAreYou], bad)
    async with trio.open_nursery() as nursery:
        await nursery.start(router.run)
        incoming = FakeIncoming(WhoAreYou())
        router(incoming)
        await trio.testing.wait_all_tasks_blocked()
        assert incoming.link.closed is Reason.WRONG_SIGNER
        assert blamed == [Reason.WRONG_SIGNER]
        nursery.cancel_scope.cancel()
