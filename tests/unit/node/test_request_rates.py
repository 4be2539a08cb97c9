"""Who asks a node too much is refused, for what is free; what is paid for is not slowed."""

import pytest
import trio

from p2pnode.errors import Refused
from p2pnode.reasons import Reason
from p2pnode.sim.world import run_world
from p2pnode.wire.messages.discovery import FindNode, WhoAreYou
from p2pnode.wire.messages.market import OfferRequest

pytestmark = pytest.mark.slow


async def answered(link, message, count: int) -> int:
    """Ask so many times at once; give how many were answered, the rest being refused for their rate."""
    done = 0

    async def ask() -> None:
        nonlocal done
        try:
            await link.request(message)
        except Refused as error:
            if error.reason is not Reason.RATE:
                raise
        else:
            done += 1

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(ask)
    return done


def test_lookups_and_gossip_have_rates_and_the_market_has_none():
    async def scenario(world):
        alice = await world.start("alice")
        bob = await world.start("bob", knows=["alice"])
        await world.settle(lambda: alice.transport.links() and bob.transport.links())
        await trio.sleep(60)
        link = await bob.discovery.reach(alice.node_id)
        find = FindNode(bytes(32), False)
        assert 55 <= await answered(link, find, 120) <= 60, "the burst, less what bob's own lookups took"
        assert alice.metrics.value("limit_hits_total", "lookup_rate") >= 60
        await trio.sleep(1)
        assert 18 <= await answered(link, find, 60) <= 20, "the rate"
        assert await answered(link, WhoAreYou(), 100) == 100, "has a rate of its own"
        assert await answered(link, OfferRequest(), 200) == 200, "passes by the rates"
        assert 90 <= await answered(link, WhoAreYou(), 200) <= 110
        assert link.closed is None
        (view,) = [peer for peer in alice.discovery.peers() if peer.node_id == bob.node_id]
        assert view.score >= 0, "too fast is not false"

    run_world(scenario)
