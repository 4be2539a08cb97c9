"""Two nodes over both networks: the same suite must hold in memory and on sockets."""

import pytest
import trio

from p2pnode.errors import ProtocolViolation, Refused, Unreachable
from p2pnode.reasons import Reason
from p2pnode.transport.requests import Pending
from p2pnode.wire.messages.session import Done

SIZES = [0, 1, 4096, 61_000, 61_440, 70_000, 262_144, 1_000_003]


def pattern(size: int) -> bytes:
    return bytes(index * 7 & 255 for index in range(min(size, 4096))) * (size // 4096 + 1)


def test_request_and_reply_with_attachments_of_every_kind(run, kit) -> None:
    async def scenario(world) -> None:
        alice, bob = world.party("alice"), world.party("bob")
        async with world.running(alice, bob):
            link = await alice.service.connect(bob.addresses, bob.node_id)
            for size in SIZES:
                data = pattern(size)[:size]
                reply = await link.request(Done(note=f"{size}"), [data])
                assert reply.message == Done(note=f"{size}")
                assert reply.attachment == data
            await kit.eventually(lambda: bob.link_to(alice))
            assert bob.link_to(alice).peer.inbound
            assert not link.peer.inbound
            assert link.peer.node_id == bob.node_id
            assert link.peer.addresses == bob.addresses
        assert alice.service.buffered_bytes == bob.service.buffered_bytes == 0

    run(scenario)


def test_the_answering_side_can_ask_over_the_same_link(run, kit) -> None:
    async def scenario(world) -> None:
        alice, bob = world.party("alice", listen=()), world.party("bob")
        async with world.running(alice, bob):
            await alice.service.connect(bob.addresses, bob.node_id)
            await kit.eventually(lambda: bob.ups)
            reply = await bob.ups[0].request(Done(note="from behind a NAT"), [b"x" * 100_000])
            assert reply.message.note == "from behind a NAT"
            assert len(reply.attachment) == 100_000

    run(scenario)


def test_attachments_go_into_the_sinks_that_both_sides_name(run) -> None:
    async def scenario(world) -> None:
        arena = bytearray(500_000)

        def router(incoming) -> None:
            incoming.receive(lambda: memoryview(arena), lambda view: incoming.reply(Done(), [view[:3], view[3:]]))

        alice, bob = world.party("alice"), world.party("bob", router=router)
        async with world.running(alice, bob):
            link = await alice.service.connect(bob.addresses, bob.node_id)
            for size in (10, 400_000):
                back = bytearray(size)
                data = pattern(size)[:size]
                reply = await link.request(
                    Done(), [data[: size // 2], data[size // 2 :]], sink=lambda n, b=back: memoryview(b)[:n]
                )
                assert arena[:size] == data == back == reply.attachment

    run(scenario)


def test_many_at_once_each_get_their_own_answer(run) -> None:
    async def scenario(world) -> None:
        alice, bob = world.party("alice"), world.party("bob")
        async with world.running(alice, bob) as nursery:
            link = await alice.service.connect(bob.addresses, bob.node_id)
            done = []

            async def ask(number: int) -> None:
                data = bytes([number & 255]) * (number * 300)
                reply = await link.request(Done(note=str(number)), [data])
                assert reply.message.note == str(number)
                assert reply.attachment == data
                done.append(number)

            async with trio.open_nursery() as askers:
                for number in range(400):
                    askers.start_soon(ask, number)
            assert len(done) == 400
            assert nursery

    run(scenario)


def test_a_refusal_arrives_with_its_reason(run) -> None:
    async def scenario(world) -> None:
        def router(incoming) -> None:
            if incoming.message.note == "raise":
                raise Refused(Reason.PAUSED, "until noon")
            incoming.refuse(Reason.BUSY, "full")

        alice, bob = world.party("alice"), world.party("bob", router=router)
        async with world.running(alice, bob):
            link = await alice.service.connect(bob.addresses, bob.node_id)
            for note, reason, detail in (("refuse", Reason.BUSY, "full"), ("raise", Reason.PAUSED, "until noon")):
                with pytest.raises(Refused) as caught:
                    await link.request(Done(note=note), [b"x" * 1_000_000])
                assert (caught.value.reason, caught.value.detail) == (reason, detail)
            assert bob.metrics.value("refusals_total", "busy") == 1
            assert alice.metrics.value("refused_total", "busy") == 1

    run(scenario)


def test_cancelling_tells_the_peer_and_leaves_nothing(run, kit) -> None:
    async def scenario(world) -> None:
        cancelled = []

        def router(incoming) -> None:
            if incoming.message.note == "wait":
                incoming.on_cancel = lambda: cancelled.append(incoming)
            else:
                incoming.reply(Done(), [b"y" * 5_000_000])

        alice, bob = world.party("alice"), world.party("bob", router=router)
        async with world.running(alice, bob):
            link = await alice.service.connect(bob.addresses, bob.node_id)
            with trio.move_on_after(0.02):
                await link.request(Done(note="wait"), [b"x" * 10_000_000])
            with trio.move_on_after(0):
                await link.request(Done(note="large reply"))
            await kit.eventually(lambda: cancelled)
            assert cancelled[0].cancelled
            cancelled[0].reply(Done())
            await kit.eventually(lambda: link.requests_in_flight == 0)
            await kit.eventually(lambda: bob.link_to(alice).answering == 0)
            assert len((await link.request(Done(note="again"))).attachment) == 5_000_000

    run(scenario)


def test_requests_fail_when_the_link_ends(run, kit) -> None:
    async def scenario(world) -> None:
        alice, bob = world.party("alice"), world.party("bob", router=lambda incoming: None)
        async with world.running(alice, bob):
            link = await alice.service.connect(bob.addresses, bob.node_id)
            outcome = []

            async def ask() -> None:
                with pytest.raises(Unreachable):
                    await link.request(Done(note="never answered"))
                outcome.append("ended")

            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask)
                await kit.eventually(lambda: bob.link_to(alice) and bob.link_to(alice).answering)
                bob.link_to(alice).close(Reason.DRAINING)
            assert outcome == ["ended"]
            await kit.eventually(lambda: alice.downs and bob.downs)
            assert alice.downs[0][1] is Reason.DRAINING
            with pytest.raises(Unreachable):
                await link.request(Done())

    run(scenario)


def test_a_stopping_node_says_goodbye(run, kit) -> None:
    async def scenario(world) -> None:
        alice, bob = world.party("alice"), world.party("bob")
        async with world.running(alice):
            async with world.running(bob):
                await alice.service.connect(bob.addresses, bob.node_id)
                await kit.eventually(lambda: bob.ups)
            await kit.eventually(lambda: alice.downs)
            assert alice.downs[0][1] is Reason.SHUTTING_DOWN
            assert not alice.service.links()

    run(scenario)


def test_connect_gives_the_open_link_and_dials_once(run) -> None:
    async def scenario(world) -> None:
        alice, bob = world.party("alice"), world.party("bob")
        async with world.running(alice, bob):
            links = []

            async def connect() -> None:
                links.append(await alice.service.connect(bob.addresses, bob.node_id))

            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(connect)
            assert len(links) == 5
            assert len(set(links)) == 1
            assert alice.metrics.value("connections_total", "outbound") == 1

    run(scenario)


def test_simultaneous_dials_leave_the_same_one_session(run, kit) -> None:
    async def scenario(world) -> None:
        for round_number in range(4):
            alice, bob = world.party(f"alice {round_number}"), world.party(f"bob {round_number}")
            async with world.running(alice, bob):
                answers = []

                async def ask(one, other, answers=answers) -> None:
                    link = await one.service.connect(other.addresses, other.node_id)
                    answers.append(await link.request(Done(note="hello"), [b"z" * 300_000]))

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(ask, alice, bob)
                    nursery.start_soon(ask, bob, alice)
                assert len(answers) == 2
                await kit.eventually(lambda a=alice, b=bob: [p.metrics.value("connections_open") for p in (a, b)] == [1, 1])
                smaller = min(alice, bob, key=lambda party: party.node_id)
                larger = max(alice, bob, key=lambda party: party.node_id)
                if smaller.metrics.total("connections_total") == 2:
                    assert not smaller.link_to(larger).peer.inbound
                    assert larger.link_to(smaller).peer.inbound
                assert (await alice.link_to(bob).request(Done(note="after"))).message.note == "after"

    run(scenario)


def test_the_wrong_peer_network_or_self_is_named(run, kit) -> None:
    async def scenario(world) -> None:
        alice, bob, carol = world.party("alice"), world.party("bob"), world.party("carol", network_id=b"\x01" * 32)
        async with world.running(alice, bob, carol):
            expected = [
                (bob.addresses, carol.node_id, Reason.WRONG_PEER),
                (carol.addresses, carol.node_id, Reason.WRONG_NETWORK),
                (alice.addresses, bob.node_id, Reason.SELF_DIAL),
                (alice.addresses, alice.node_id, Reason.SELF_DIAL),
            ]
            for addresses, node_id, reason in expected:
                with pytest.raises(ProtocolViolation) as caught:
                    await alice.service.connect(addresses, node_id)
                assert caught.value.reason is reason
            assert not alice.ups
            assert not bob.ups
            assert not carol.ups
            assert alice.metrics.labels("handshakes_failed_total")["wrong-peer"] == 1

    run(scenario)


def test_a_daemon_with_the_same_identity_is_named(run) -> None:
    async def scenario(world) -> None:
        alice = world.party("alice")
        twin = world.party("alice", instance=b"2")
        async with world.running(alice, twin):
            with pytest.raises(ProtocolViolation) as caught:
                await alice.service.connect(twin.addresses)
            assert caught.value.reason is Reason.DUPLICATE_IDENTITY
            assert not twin.ups

    run(scenario)


def test_two_daemons_of_one_identity_at_a_third_peer_hear_of_it(run, kit) -> None:
    async def scenario(world) -> None:
        alice, twin, bob = world.party("alice"), world.party("alice", instance=b"2"), world.party("bob")
        async with world.running(alice, twin, bob):
            await alice.service.connect(bob.addresses, bob.node_id)
            await kit.eventually(lambda: bob.ups)
            await twin.service.connect(bob.addresses, bob.node_id)
            await kit.eventually(lambda: alice.downs)
            assert alice.downs[0][1] is Reason.DUPLICATE_IDENTITY
            assert len(bob.service.links()) == 1

    run(scenario)


def test_a_dead_address_is_unreachable_and_the_next_one_is_tried(run) -> None:
    async def scenario(world) -> None:
        alice, bob = world.party("alice"), world.party("bob")
        async with world.running(alice, bob):
            dead = "127.0.0.1:1" if world.kind == "tcp" else "10.9.9.9:1"
            with pytest.raises(Unreachable):
                await alice.service.connect([dead, "not an address"])
            link = await alice.service.connect([dead, *bob.addresses], bob.node_id)
            assert (await link.request(Done(note="found"))).message.note == "found"

    run(scenario)


def test_a_message_that_does_not_decode_costs_only_its_request(run, kit) -> None:
    async def scenario(world) -> None:
        alice, bob = world.party("alice"), world.party("bob")
        async with world.running(alice, bob):
            link = await alice.service.connect(bob.addresses, bob.node_id)
            outcome = []
            for body, reason in (
                (b"\xff\xff\x80", "unknown-message"),
                (b"\x00\x05\xc1", "reserved-byte"),
                (b"\x00", "truncated"),
            ):
                link._session.send_request(Pending(outcome.append, None), body)
                link._pump.flush()
                await kit.eventually(lambda: outcome)
                assert outcome.pop().reason.value == reason
                assert bob.metrics.value("violations_total", reason) == 1
            assert (await link.request(Done(note="fine"))).message.note == "fine"

    run(scenario)


def test_a_bug_in_a_handler_costs_the_link_and_is_counted(run, kit) -> None:
    async def scenario(world) -> None:
        def router(incoming) -> None:
            raise ZeroDivisionError

        alice, bob = world.party("alice"), world.party("bob", router=router, strict=False)
        async with world.running(alice, bob):
            link = await alice.service.connect(bob.addresses, bob.node_id)
            with pytest.raises(Unreachable):
                await link.request(Done())
            assert bob.metrics.value("bugs_total", "RequestArrived") == 1
            await kit.eventually(lambda: alice.downs)
            assert alice.downs[0][1] is Reason.INTERNAL
            assert (await alice.service.connect(bob.addresses, bob.node_id)).closed is None

    run(scenario)


@pytest.mark.parametrize("suite", [1, 2])
def test_both_suites_are_answered(run, suite) -> None:
    async def scenario(world) -> None:
        alice, bob = world.party("alice", suite=suite), world.party("bob")
        async with world.running(alice, bob):
            link = await alice.service.connect(bob.addresses, bob.node_id)
            assert (await link.request(Done(), [b"x" * 200_000])).attachment == b"x" * 200_000

    run(scenario)
