"""A link under limits that need time, or a peer that misbehaves below the session: virtual time over memory."""

import dataclasses

import pytest
import trio

from p2pnode.errors import ProtocolViolation, Refused, Unreachable
from p2pnode.reasons import Reason
from p2pnode.transport.handshake import Handshake, Introduction, Peer
from p2pnode.transport.service import Precedence, precedence
from p2pnode.wire.messages.session import Done


def in_memory(kit, scenario, **options) -> None:
    kit.run("memory", scenario, **options)


async def drain(stream) -> bytes:
    """Read until the end or a break."""
    data, buffer = b"", bytearray(65_536)
    while True:
        try:
            count = await stream.receive_into(memoryview(buffer))
        except Unreachable:
            return data
        if count == 0:
            return data
        data += buffer[:count]


async def by_hand(world, kit, party, name: str):
    """Shake hands with a party over a stream that the test then owns."""
    mallory = kit.Party(name, world.network())
    stream = await mallory.service._environment.network.dial(party.addresses[0])
    introduction = Introduction(mallory.identity, kit.NETWORK_ID, "instance")
    handshake = Handshake(introduction, initiator=True, ephemeral=b"\x11" * 32, seen_address="")
    stream.send_nowait([handshake.start()])
    buffer = memoryview(bytearray(65_536))
    while handshake.established is None:
        answer = handshake.receive(buffer[: await stream.receive_into(buffer)])
    stream.send_nowait([answer])
    return stream, handshake.established


def test_first_byte_seconds(kit) -> None:
    async def scenario(world) -> None:
        bob = world.party("bob")
        async with world.running(bob):
            stream = await world.network().dial(bob.addresses[0])
            started = trio.current_time()
            assert await drain(stream) == b""
            assert trio.current_time() - started == pytest.approx(5.0, abs=0.1)
            assert bob.hits() == {"first_byte_seconds": 1}
            assert bob.metrics.value("handshakes_failed_total", "too-slow") == 1

    in_memory(kit, scenario)


def test_handshake_seconds_for_the_answerer_and_the_dialler(kit) -> None:
    async def scenario(world) -> None:
        bob = world.party("bob")
        async with world.running(bob):
            stream = await world.network().dial(bob.addresses[0])
            started = trio.current_time()
            stream.send_nowait([b"\x01"])
            await drain(stream)
            assert trio.current_time() - started == pytest.approx(10.0, abs=0.1)
            assert bob.hits() == {"handshake_seconds": 1}
            silent = await world.network("10.7.7.7").listen("silent:1")
            with pytest.raises(Unreachable, match="handshake"):
                await bob.service.connect([silent.address])
            assert bob.hits() == {"handshake_seconds": 2}

    in_memory(kit, scenario)


def test_dial_seconds(kit) -> None:
    async def scenario(world) -> None:
        bob = world.party("bob")
        async with world.running(bob):
            world.memory.latency_seconds = 1000.0
            with pytest.raises(Unreachable, match="no answer"):
                await bob.service.connect(["10.7.7.7:1"])
            assert bob.hits() == {"dial_seconds": 1}

    in_memory(kit, scenario)


def test_handshake_message_bytes_max(kit) -> None:
    async def scenario(world) -> None:
        bob = world.party("bob")
        async with world.running(bob):
            stream = await world.network().dial(bob.addresses[0])
            handshake = Handshake(
                Introduction(bob.identity, kit.NETWORK_ID, ""), initiator=True, ephemeral=b"1" * 32, seen_address=""
            )
            stream.send_nowait([handshake.start()[:8] + b"\xff\xff"])
            assert await drain(stream) == b"\0\0\x09too-large"
            assert bob.hits() == {"handshake_message_bytes_max": 1}

    in_memory(kit, scenario)


def test_a_connection_over_a_limit_is_told_why(kit) -> None:
    async def scenario(world) -> None:
        bob = world.party("bob", limits=kit.Limits(per_address_max=1), exempt_private=False)
        alice, carol = world.party("alice", host="8.8.8.8"), world.party("carol", host="8.8.8.8")
        async with world.running(alice, bob, carol):
            link = await alice.service.connect(bob.addresses, bob.node_id)
            with pytest.raises(ProtocolViolation) as caught:
                await carol.service.connect(bob.addresses, bob.node_id)
            assert caught.value.reason is Reason.TOO_MANY_CONNECTIONS
            assert bob.hits() == {"per_address_max": 1}
            link.close(Reason.DRAINING)
            await kit.eventually(lambda: bob.downs)
            await carol.service.connect(bob.addresses, bob.node_id)

    in_memory(kit, scenario)


def test_places_are_given_back_whatever_happens(kit) -> None:
    async def scenario(world) -> None:
        limits = kit.Limits(connections_max=4, inbound_max=2, outbound_reserved=0, half_open_max=2, per_address_max=99)
        alice, bob = world.party("alice", limits=limits), world.party("bob", limits=limits)
        wrong = world.party("wrong", network_id=b"\x01" * 32)
        async with world.running(alice, bob, wrong):
            for _ in range(10):
                with pytest.raises(ProtocolViolation):
                    await wrong.service.connect(bob.addresses)
                with pytest.raises(Unreachable):
                    await alice.service.connect(["10.9.9.9:9"])
                with trio.move_on_after(0.003):
                    await alice.service.connect(bob.addresses)
                link = await alice.service.connect(bob.addresses, bob.node_id)
                await kit.eventually(lambda: bob.link_to(alice))
                link.close(Reason.DRAINING)
                await kit.eventually(lambda: not bob.service.links() and not alice.service.links())
                await trio.sleep(0.01)
            for party in (alice, bob, wrong):
                gate = party.service._gate
                assert (gate.half_open, gate.inbound, gate.outbound) == (0, 0, 0)
            assert bob.hits() == {}

    in_memory(kit, scenario)


def test_idle_links_are_closed_and_pinned_ones_are_not(kit) -> None:
    async def scenario(world) -> None:
        alice, bob, carol = world.party("alice"), world.party("bob"), world.party("carol")
        async with world.running(alice, bob, carol):
            await alice.service.connect(bob.addresses, bob.node_id)
            pinned = await alice.service.connect(carol.addresses, carol.node_id)
            pinned.pinned = True
            await trio.sleep(600)
            assert [reason for _, reason in alice.downs] == [Reason.IDLE]
            assert alice.service.links() == {carol.node_id: pinned}
            assert carol.link_to(alice) is not None

    in_memory(kit, scenario)


def test_a_peer_that_vanishes_is_noticed(kit) -> None:
    async def scenario(world) -> None:
        alice, bob = world.party("alice"), world.party("bob")
        async with world.running(alice, bob):
            stream, _ = await by_hand(world, kit, bob, "mallory")
            await kit.eventually(lambda: bob.ups)
            bob.ups[0].pinned = True
            started = trio.current_time()
            await drain(stream)
            limits = kit.Limits()
            assert trio.current_time() - started <= limits.keepalive_seconds + limits.pong_seconds + 3
            assert bob.downs[0][1] is Reason.DEADLINE

    in_memory(kit, scenario)


def test_minimum_rate_of_a_record_that_never_ends(kit) -> None:
    async def scenario(world) -> None:
        bob = world.party("bob", limits=kit.Limits(keepalive_seconds=1e6, pong_seconds=1e6, idle_seconds=1e6))
        async with world.running(bob):
            stream, _ = await by_hand(world, kit, bob, "mallory")
            await kit.eventually(lambda: bob.ups)
            for _ in range(30):
                try:
                    stream.send_nowait([b"\xff"])
                except Unreachable:
                    break
                await trio.sleep(1)
            assert bob.downs[0][1] is Reason.TOO_SLOW
            assert bob.hits() == {"minimum_rate": 1}

    in_memory(kit, scenario)


def test_send_stall_seconds_and_goodbye_seconds(kit) -> None:
    async def scenario(world) -> None:
        limits = kit.Limits(window_initial_bytes=4_000_000, keepalive_seconds=1e6, pong_seconds=1e6)
        bob = world.party("bob", limits=limits)
        async with world.running(bob):
            await by_hand(world, kit, bob, "mallory")
            await kit.eventually(lambda: bob.ups)
            started = trio.current_time()
            with pytest.raises(Unreachable, match="too-slow"):
                await bob.ups[0].request(Done(), [bytes(3_000_000)])
            assert limits.send_stall_seconds <= trio.current_time() - started <= limits.send_stall_seconds + 2
            await kit.eventually(lambda: bob.downs)
            assert bob.hits() == {"send_stall_seconds": 1, "goodbye_seconds": 1}

    in_memory(kit, scenario)


def test_a_record_that_was_tampered_with_ends_the_link(kit) -> None:
    async def scenario(world) -> None:
        bob = world.party("bob")
        async with world.running(bob):
            stream, _ = await by_hand(world, kit, bob, "mallory")
            await kit.eventually(lambda: bob.ups)
            stream.send_nowait([b"\x00\x20" + bytes(32)])
            await drain(stream)
            assert bob.downs[0][1] is Reason.BAD_SIGNATURE
            assert bob.metrics.value("violations_total", "bad-signature") == 1

    in_memory(kit, scenario)


def test_requests_in_flight_max_makes_request_wait_and_request_nowait_refuse(kit) -> None:
    async def scenario(world) -> None:
        held = []
        alice = world.party("alice", limits=kit.Limits(requests_in_flight_max=2))
        bob = world.party("bob", router=held.append)
        async with world.running(alice, bob):
            link = await alice.service.connect(bob.addresses, bob.node_id)
            done = []

            async def ask(number: int) -> None:
                await link.request(Done(note=str(number)))
                done.append(number)

            async with trio.open_nursery() as nursery:
                for number in range(5):
                    nursery.start_soon(ask, number)
                await kit.eventually(lambda: len(held) == 2)
                await trio.sleep(1)
                assert len(held) == 2
                with pytest.raises(Refused) as caught:
                    link.request_nowait(Done(), (), done.append)
                assert caught.value.reason is Reason.TOO_MANY_REQUESTS
                answered = 0
                while answered < 5:
                    await kit.eventually(lambda: held)
                    held.pop().reply(Done())
                    answered += 1
            assert sorted(done) == [0, 1, 2, 3, 4]

    in_memory(kit, scenario)


def test_request_number_max_replaces_the_session(kit) -> None:
    async def scenario(world) -> None:
        alice, bob = world.party("alice", limits=kit.Limits(request_number_max=7)), world.party("bob")
        async with world.running(alice, bob):
            link = await alice.service.connect(bob.addresses, bob.node_id)
            for _ in range(5):
                await link.request(Done())
            await kit.eventually(lambda: alice.downs)
            assert alice.downs[0][1] is Reason.EXPIRED
            assert alice.hits() == {"request_number_max": 1}

    in_memory(kit, scenario)


def test_retire_seconds(kit) -> None:
    async def scenario(world) -> None:
        alice, bob = world.party("alice"), world.party("bob", router=lambda incoming: None)
        async with world.running(alice, bob) as nursery:
            link = await alice.service.connect(bob.addresses, bob.node_id)
            ended = []

            async def ask() -> None:
                with pytest.raises(Unreachable):
                    await link.request(Done())
                ended.append(trio.current_time())

            nursery.start_soon(ask)
            await trio.sleep(1)
            started = trio.current_time()
            link.retire(None)
            await kit.eventually(lambda: ended, 60)
            assert ended[0] - started == pytest.approx(10.0, abs=1.1)
            assert alice.hits() == {"retire_seconds": 1}

    in_memory(kit, scenario)


def test_a_retired_link_passes_requests_and_cancels_on(kit) -> None:
    async def scenario(world) -> None:
        alice, bob = world.party("alice"), world.party("bob", router=lambda incoming: None)
        async with world.running(alice, bob):
            first = await alice.service.connect(bob.addresses, bob.node_id)
            second = await alice.service.connect(bob.addresses)
            assert first.successor is second
            assert [link for link, _ in alice.downs] == [first]
            assert alice.ups == [first, second]
            request_id = first.request_nowait(Done(), (), lambda reply: None)
            assert second.requests_in_flight == 1
            first.cancel(request_id)
            assert second.requests_in_flight == 0
            await kit.eventually(lambda: first.closed)
            assert second.closed is None

    in_memory(kit, scenario)


def test_buffers_are_used_within_their_sizes(kit) -> None:
    async def scenario(world) -> None:
        limits = kit.Limits(receive_buffer_bytes=66_000, send_buffer_bytes=65_700)
        alice, bob = world.party("alice", limits=limits), world.party("bob", limits=limits)
        async with world.running(alice, bob):
            link = await alice.service.connect(bob.addresses, bob.node_id)
            reply = await link.request(Done(note="x" * 250), [bytes(1_234_567)])
            assert len(reply.attachment) == 1_234_567

    in_memory(kit, scenario)


@pytest.mark.parametrize("own_is_smaller", [True, False])
def test_precedence_is_the_same_on_both_sides(own_is_smaller) -> None:
    small, large = b"\x01" * 32, b"\x02" * 32
    own, other = (small, large) if own_is_smaller else (large, small)
    theirs = Peer(other, b"", 1, (), "", (), "", "i", inbound=True)
    mine = dataclasses.replace(theirs, inbound=False)
    assert precedence(own, mine, theirs) is (Precedence.RETIRE if own_is_smaller else Precedence.REPLACE)
    assert precedence(own, theirs, mine) is (Precedence.REPLACE if own_is_smaller else Precedence.RETIRE)
    assert precedence(own, theirs, theirs) is Precedence.REPLACE
    assert precedence(own, mine, mine) is Precedence.REPLACE
    assert precedence(own, mine, dataclasses.replace(theirs, instance="j")) is Precedence.RESTARTED
