"""At the limit of connections the link that nobody keeps and that was idle longest makes room; others are never closed for it."""

import pytest
import trio

from p2pnode.errors import Refused
from p2pnode.reasons import Reason
from p2pnode.wire.messages.session import Done


def in_memory(kit, scenario) -> None:
    kit.run("memory", scenario)


async def joined(me, *others):
    """Dial parties one after the other, a second apart."""
    links = []
    for other in others:
        links.append(await me.service.connect(other.addresses, other.node_id))
        await trio.sleep(1)
    return links


def test_a_dial_at_the_limit_closes_the_link_that_was_idle_longest(kit) -> None:
    async def scenario(world) -> None:
        alice = world.party("alice", limits=kit.Limits(connections_max=3, outbound_reserved=0))
        others = [world.party(name) for name in ("bob", "carol", "dave", "erin")]
        async with world.running(alice, *others):
            links = await joined(alice, *others[:3])
            await links[0].request(Done(note="bob was used last"))
            await trio.sleep(3)
            await alice.service.connect(others[3].addresses, others[3].node_id)
            assert [link.closed for link in links] == [None, Reason.IDLE, None]
            await kit.eventually(lambda: others[1].downs)
            assert others[1].downs[0][1] is Reason.IDLE
            assert alice.hits() == {"evict_idle_seconds": 1}
            assert len(alice.service.links()) == 3

    in_memory(kit, scenario)


def test_what_is_kept_or_in_use_or_was_just_used_is_never_closed_for_room(kit) -> None:
    async def scenario(world) -> None:
        held = []
        limits = kit.Limits(connections_max=3, outbound_reserved=0)
        alice = world.party("alice", limits=limits)
        bob, carol, dave, erin = (world.party(name, router=held.append) for name in ("bob", "carol", "dave", "erin"))
        async with world.running(alice, bob, carol, dave, erin) as nursery:
            pinned, busy, fresh = await joined(alice, bob, carol, dave)
            pinned.pinned = True
            nursery.start_soon(busy.request, Done())
            await trio.sleep(10)
            nursery.start_soon(fresh.request, Done())
            await trio.sleep(0.01)
            for incoming in held:
                if incoming.link.peer.node_id == alice.node_id and incoming.link is dave.link_to(alice):
                    incoming.reply(Done())
            await trio.sleep(limits.evict_idle_seconds / 2)
            with pytest.raises(Refused):
                await alice.service.connect(erin.addresses, erin.node_id)
            assert [link.closed for link in (pinned, busy, fresh)] == [None, None, None]
            await trio.sleep(limits.evict_idle_seconds)
            await alice.service.connect(erin.addresses, erin.node_id)
            assert fresh.closed is Reason.IDLE

    in_memory(kit, scenario)


def test_a_newcomer_takes_the_place_of_an_idle_inbound_link_and_never_of_an_own_one(kit) -> None:
    async def scenario(world) -> None:
        alice = world.party("alice", limits=kit.Limits(inbound_max=1))
        bob, carol, dave = (world.party(name) for name in ("bob", "carol", "dave"))
        async with world.running(alice, bob, carol, dave):
            own = await alice.service.connect(bob.addresses, bob.node_id)
            await carol.service.connect(alice.addresses, alice.node_id)
            await trio.sleep(5)
            await dave.service.connect(alice.addresses, alice.node_id)
            await kit.eventually(lambda: alice.link_to(dave) is not None)
            assert own.closed is None
            assert alice.link_to(carol) is None
            await trio.sleep(5)
            # The places of those that left were given back once, not twice.
            assert (alice.service._gate.inbound, alice.service._gate.outbound) == (1, 1)

    in_memory(kit, scenario)


def test_a_request_after_a_long_silence_carries_a_probe(kit) -> None:
    async def scenario(world) -> None:
        alice, bob = world.party("alice"), world.party("bob", router=lambda incoming: None)
        async with world.running(alice, bob) as nursery:
            link = await alice.service.connect(bob.addresses, bob.node_id)
            await trio.sleep(50)
            world.memory.partition([[bob.addresses[0].rpartition(":")[0]]])

            async def ask() -> None:
                with pytest.raises(Exception, match="deadline"):
                    await link.request(Done())

            began = trio.current_time()
            nursery.start_soon(ask)
            await kit.eventually(lambda: link.closed is not None, 60)
            assert link.closed is Reason.DEADLINE
            assert trio.current_time() - began < 15 + 6

    in_memory(kit, scenario)
