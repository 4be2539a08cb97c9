"""What a peer sends wrongly costs the peer: a reason, a counter, its score, at worst its link. Nothing else is disturbed."""

import pytest
import trio

from p2pnode.errors import Refused
from p2pnode.reasons import Reason
from p2pnode.sim.world import run_world
from p2pnode.wire.messages.discovery import Introduction, WhoAreYou
from p2pnode.wire.messages.market import DeliverReceipt, PlaceOrder

pytestmark = pytest.mark.slow


async def meet(world):
    alice = await world.start("alice")
    bob = await world.start("bob", knows=["alice"])
    await world.settle(lambda: alice.transport.links() and bob.transport.links())
    return alice, bob


def test_a_message_nobody_handles_is_refused_and_harmless():
    async def scenario(world):
        alice, bob = await meet(world)
        link = bob.transport.links()[alice.node_id]
        with pytest.raises(Refused) as caught:
            await link.request(Introduction(bytes(32), (), "", ""))
        assert caught.value.reason is Reason.UNKNOWN_MESSAGE
        assert (await link.request(WhoAreYou())).message.node_id == alice.node_id

    run_world(scenario)


@pytest.mark.parametrize("message", [PlaceOrder(b"nonsense"), DeliverReceipt(b"\x81")])
def test_a_broken_document_has_a_reason_and_the_node_lives(message):
    async def scenario(world):
        alice, bob = await meet(world)
        with pytest.raises(Refused):
            await bob.transport.links()[alice.node_id].request(message)
        assert alice.metrics.total("violations_total") == 1
        assert alice.metrics.total("bugs_total") == 0
        (view,) = [peer for peer in alice.discovery.peers() if peer.node_id == bob.node_id]
        assert view.score < 0
        carol = await world.start("carol", knows=["alice"])
        await world.settle(lambda: carol.node_id in alice.transport.links())
        link = carol.transport.links()[alice.node_id]
        assert (await link.request(WhoAreYou())).message.node_id == alice.node_id

    run_world(scenario)


def test_bytes_that_are_no_message_lower_the_score(monkeypatch):
    async def scenario(world):
        alice, bob = await meet(world)
        await trio.sleep(1)
        link = bob.transport.links()[alice.node_id]
        monkeypatch.setattr("p2pnode.transport.link.encode_numbered", lambda message: b"\x00\x14\xc1")
        with pytest.raises(Refused) as caught:
            await link.request(WhoAreYou())
        monkeypatch.undo()
        assert caught.value.reason is Reason.RESERVED_BYTE
        (view,) = alice.discovery.peers()
        assert view.score < 0
        assert alice.metrics.value("violations_total", "reserved-byte") == 1

    run_world(scenario)
