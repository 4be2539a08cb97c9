"""A lone request's caller polls for the answer before it sleeps: with a peer in another thread, over real sockets."""

import threading
import time

import pytest
import trio

from p2pnode.transport import link as link_module
from p2pnode.wire.messages.session import Done


@pytest.fixture
def bob(kit):
    """A party that runs in its own thread and answers after `delay` seconds."""
    ready, parties, stop = threading.Event(), [], []

    async def main() -> None:
        world = kit.World("tcp")

        def answer(incoming) -> None:
            if party.closes:
                incoming.link._stream.close()
                return
            time.sleep(party.delay)
            incoming.reply(Done(note=incoming.message.note))

        party = world.party("bob", router=answer)
        party.delay, party.closes = 0.0, False
        async with world.running(party) as nursery:
            token = trio.lowlevel.current_trio_token()
            stop.append(lambda: trio.from_thread.run_sync(nursery.cancel_scope.cancel, trio_token=token))
            parties.append(party)
            ready.set()
            await trio.sleep_forever()

    thread = threading.Thread(target=trio.run, args=(main,), daemon=True)
    thread.start()
    assert ready.wait(10)
    yield parties[0]
    stop[0]()
    thread.join(10)


def asked(kit, bob, scenario) -> None:
    """Run a scenario with a link to bob and what its stream's polls gave."""

    async def main(world) -> None:
        alice = world.party("alice")
        async with world.running(alice):
            link = await alice.service.connect(bob.addresses)
            await link.request(Done(note="the reader is at work"))
            polls: list[int] = []
            stream = link._stream
            poll = stream.poll

            def noted(buffer, seconds):
                polls.append(poll(buffer, seconds))
                return polls[-1]

            stream.poll = noted
            await scenario(link, polls)

    kit.run("tcp", main)


def ask(link, note: str) -> list:
    replies: list = []
    link.request_nowait(Done(note=note), (), replies.append)
    return replies


def test_an_answer_that_is_near_is_there_without_a_turn_of_the_loop(kit, bob, monkeypatch) -> None:
    monkeypatch.setattr(link_module, "_POLL_SECONDS", 5.0)

    async def scenario(link, polls) -> None:
        for number in range(20):
            replies = ask(link, str(number))
            link.poll()
            assert [reply.message.note for reply in replies] == [str(number)]
        assert all(count > 0 for count in polls)
        # The reader goes on as before.
        assert (await link.request(Done(note="asleep"))).message.note == "asleep"

    asked(kit, bob, scenario)


def test_polls_in_vain_become_rare_and_one_that_pays_brings_them_back(kit, bob) -> None:
    async def scenario(link, polls) -> None:
        bob.delay = 0.01
        for number in range(4 * link_module._POLL_AGAIN):
            replies = ask(link, str(number))
            link.poll()
            while not replies:  # noqa: ASYNC110 - the answer comes through the reader
                await trio.sleep(0.001)
        assert link_module._VAIN_POLLS_MAX <= len(polls) <= link_module._VAIN_POLLS_MAX + 4
        assert set(polls) == {-1}
        bob.delay = 0.0
        link._vain_polls, before = 0, len(polls)
        for number in range(10):
            await link.request(Done(note=str(number)))
            replies = ask(link, "quick")
            link.poll()
            while not replies:  # noqa: ASYNC110 - see above
                await trio.sleep(0.001)
        assert len(polls) > before

    asked(kit, bob, scenario)


def test_nobody_polls_while_several_requests_are_open_or_the_request_is_still_leaving(kit, bob) -> None:
    async def scenario(link, polls) -> None:
        bob.delay = 0.005
        replies = [ask(link, str(number)) for number in range(3)]
        link.poll()
        assert polls == []
        while not all(replies):  # noqa: ASYNC110 - see above
            await trio.sleep(0.001)
        pending: list = []
        link.request_nowait(Done(note="large"), [bytes(50_000_000)], pending.append)
        link.poll()
        assert polls == []

    asked(kit, bob, scenario)


def test_the_end_of_the_connection_is_noticed(kit, bob, monkeypatch) -> None:
    monkeypatch.setattr(link_module, "_POLL_SECONDS", 5.0)

    async def scenario(link, polls) -> None:
        bob.closes = True
        replies = ask(link, "last")
        link.poll()
        assert polls == [0]
        assert link.closed is not None
        assert len(replies) == 1

    asked(kit, bob, scenario)
