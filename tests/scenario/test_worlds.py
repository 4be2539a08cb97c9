"""Worlds of real nodes: the same in every process, crashes that lose exactly what was not committed, a hundred nodes."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from p2pnode.errors import StoreError, Unreachable
from p2pnode.reasons import Reason
from p2pnode.sim.faults import After, MassFailure, RollingPartitions, run_faults
from p2pnode.sim.options import WorldOptions
from p2pnode.sim.trace import Trace, recorded_lines
from p2pnode.sim.world import run_world
from p2pnode.store.database import recall, remember
from p2pnode.wire.messages.discovery import Introduction, WhoAreYou
from p2pnode.wire.messages.session import Done

pytestmark = pytest.mark.slow
ONE_WORLD = Path(__file__).with_name("one_world.py")


def in_a_process(hash_seed: int, *arguments: object) -> str:
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    command = [sys.executable, str(ONE_WORLD), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("cipher", ["plain", "noise"])
def test_a_seed_gives_the_same_trace_in_processes_with_different_hash_seeds(cipher, tmp_path) -> None:
    first = in_a_process(1, 5, cipher, 20, tmp_path / "first")
    second = in_a_process(20_000, 5, cipher, 20, tmp_path / "second")
    assert first == second
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    digest, count, lost, messages, *_ = first.split()
    assert int(count) > 500
    assert int(lost) > 5
    assert int(messages) > 200
    other = in_a_process(1, 6, cipher, 20)
    assert other.split()[0] != digest


def test_a_replay_finds_no_divergence_and_another_seed_at_once(tmp_path) -> None:
    def world(seed: int, trace: Trace) -> None:
        async def scenario(world) -> None:
            for index in range(4):
                await world.start(f"n{index}", knows=["n0"] if index else [])
            await trio.sleep(30)

        run_world(scenario, options=WorldOptions(seed=seed, latency="wan"), trace=trace)

    world(1, Trace(file=tmp_path / "trace"))
    same = Trace(recorded=recorded_lines(tmp_path / "trace"))
    world(1, same)
    assert same.divergence is None
    assert same.count > 10
    other = Trace(recorded=recorded_lines(tmp_path / "trace"))
    world(2, other)
    assert other.divergence is not None


def test_a_crash_loses_exactly_what_was_not_committed_and_the_disk_comes_back() -> None:
    async def scenario(world) -> None:
        node = await world.start("alice")
        lost: list[str] = []

        async def write(key: str) -> None:
            try:
                await node.environment.database.write(lambda connection: remember(connection, key, b"x"))
            except StoreError:
                lost.append(key)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, "early")
            await trio.sleep(0.6)
            nursery.start_soon(write, "late")
            await trio.sleep(0.1)
            before = world.now
            await world.crash("alice")
            assert world.now == before, "a crash takes no time"
        assert world.residents["alice"].node is None
        assert lost == ["late"]
        again = await world.restart("alice")
        assert again.node_id == node.node_id
        assert again.transport.instance != node.transport.instance, "another process of the same node"
        kept = await again.environment.database.read(lambda connection: [recall(connection, key) for key in ("early", "late")])
        assert kept == [b"x", None]

    run_world(scenario, options=WorldOptions(commit_seconds=0.5))


@pytest.mark.parametrize("silent", [False, True])
def test_peers_of_a_crashed_node_learn_by_a_reset_or_by_silence(silent) -> None:
    async def scenario(world) -> None:
        alice = await world.start("alice")
        bob = await world.start("bob", knows=["alice"])
        await world.settle(lambda: alice.transport.links() and bob.transport.links())
        link = next(iter(bob.transport.links().values()))
        link.pinned = True
        await trio.sleep(1)
        crashed = world.now
        await world.crash("alice", silent=silent)
        await world.settle(lambda: link.closed is not None)
        if silent:
            assert link.closed is Reason.DEADLINE
            assert world.now - crashed > 15
        else:
            assert link.closed is Reason.CONNECTION_LOST
            assert world.now - crashed < 0.1
        again = await world.restart("alice")
        fresh = await bob.transport.connect([world.residents["alice"].address], again.node_id)
        assert isinstance((await fresh.request(WhoAreYou())).message, Introduction)

    run_world(scenario)


@pytest.mark.parametrize("cipher", ["noise", "plain"])
def test_lost_requests_and_replies_never_arrive_and_the_link_lives(cipher) -> None:
    async def scenario(world) -> tuple[int, int]:
        served = 0

        def serve(incoming) -> None:
            nonlocal served
            served += 1
            incoming.reply(Done())

        alice = await world.join("alice", serve)
        bob = await world.join("bob", serve)
        link = await bob.transport.connect((alice.address,), alice.identity.node_id)
        answered = 0
        world.worsen(loss=0.3)
        for _ in range(300):
            with trio.move_on_after(1):
                await link.request(WhoAreYou())
                answered += 1
        world.worsen(loss=0.0)
        await link.request(WhoAreYou())
        assert link.closed is None
        assert not link.requests_in_flight
        assert 0.62 < served / 301 < 0.78, "a share of the requests never arrives"
        assert 0.40 < answered / 300 < 0.58, "and the same share of the replies"
        assert world.network.stats.lost == 300 - answered
        return served, answered

    assert run_world(scenario, options=WorldOptions(cipher=cipher)) == run_world(scenario, options=WorldOptions(cipher=cipher))


def test_a_world_says_which_cipher_it_has_and_outsiders_join_it() -> None:
    async def scenario(world) -> str:
        await world.start("alice")
        heard = []

        def answer(incoming) -> None:
            heard.append(incoming.message)
            incoming.refuse(Reason.BUSY)

        mallory = await world.join("mallory", answer, subnet="185.1.2")
        assert mallory.address == "185.1.2.1:7470"
        alice = world.residents["alice"]
        link = await mallory.transport.connect((alice.address,), alice.identity.node_id)
        assert (await link.request(WhoAreYou())).message.seen_address.startswith("185.1.2.1:")
        return world.info()["cipher"]

    assert run_world(scenario) == "noise"
    assert run_world(scenario, options=WorldOptions(nodes=101)) == "plain"
    assert run_world(scenario, options=WorldOptions(nodes=101, cipher="noise")) == "noise"


def test_a_partition_splits_and_heals_and_machines_behind_translators_cannot_be_dialled() -> None:
    async def scenario(world) -> None:
        names = ["alice", "bob", "carol", "hidden"]
        for name in names:
            await world.start(name, nat="cone" if name == "hidden" else "none")
        place = world.residents

        async def reaches(one: str, other: str) -> bool:
            node = place[one].node
            link = node.transport.links().get(place[other].identity.node_id)
            if link is not None:
                link.close(Reason.IDLE)
                await trio.sleep(1)
            try:
                address = f"{place[other].host.nat.outside}:7470"
                await node.transport.connect((address,), place[other].identity.node_id)
            except Unreachable:
                return False
            return True

        assert await reaches("alice", "bob")
        assert not await reaches("alice", "hidden")
        assert await reaches("hidden", "alice")
        world.partition(["alice", "carol"])
        assert await reaches("alice", "carol")
        assert not await reaches("bob", "alice")
        world.heal()
        assert await reaches("bob", "alice")

    run_world(scenario)


def test_a_hundred_nodes_join_publish_fail_and_find_again() -> None:
    """Everybody joins and some publish; a fifth lose power, a partition comes and goes; then everything is found again."""

    async def scenario(world) -> dict[str, float]:
        for index in range(100):
            await world.start(f"n{index}", knows=[f"n{(index - 1) // 2}"] if index else [])
            await trio.sleep(0.1)
        await trio.sleep(15)
        keys = []
        for index in range(0, 100, 10):
            published = await world.residents[f"n{index}"].node.discovery.publish(b"test", f"value of n{index}".encode())
            assert published.acks >= published.needed
            keys.append(published.key)

        async def found(count: int) -> float:
            answers = 0

            async def get(name: str, key: bytes) -> None:
                nonlocal answers
                outcome = await world.residents[name].node.discovery.get_record(key)
                answers += bool(outcome.record)

            async with trio.open_nursery() as nursery:
                for _ in range(count):
                    nursery.start_soon(get, world.random.choice(list(world.residents)), world.random.choice(keys))
                    await trio.sleep(0.1)
            return answers / count

        before = await found(50)
        partition = RollingPartitions(seconds=15, pause_seconds=0, times=1)
        plans = [MassFailure(0.2, down_seconds=15, silent=True), After(5, partition)]
        await run_faults(world, plans)
        await trio.sleep(60)
        assert max(len(resident.node.transport.links()) for resident in world.residents.values()) <= 32
        assert min(resident.node.discovery.dht.table.live() for resident in world.residents.values()) > 0
        return {"before": before, "after": await found(50)}

    result = run_world(scenario, options=WorldOptions(nodes=101, latency="continents", seed=4))
    assert result["before"] >= 0.98
    assert result["after"] >= 0.98


def test_tasks_and_connections_stay_flat_over_virtual_hours() -> None:
    async def scenario(world) -> tuple[list[int], list[int], list[int]]:
        names = [f"n{index}" for index in range(8)]
        for name in names:
            await world.start(name, knows=["n0"] if name != "n0" else [])

        async def meet(one: str, other: str) -> None:
            target = world.residents[other]
            link = await world.residents[one].node.transport.connect((target.address,), target.identity.node_id)
            await link.request(WhoAreYou())

        for one, other in itertools.combinations(names, 2):
            await meet(one, other)
        tasks, streams, held = [], [], []
        for _ in range(3):
            for _ in range(20):
                await meet(*world.random.sample(names, 2))
                await trio.sleep(60)
            tasks.append(trio.lowlevel.current_statistics().tasks_living)
            streams.append(sum(len(host.streams) for host in world.network.hosts.values()))
            held.append(world.clock.pending)
        return tasks, streams, held

    tasks, streams, held = run_world(scenario, options=WorldOptions(cipher="plain"))
    assert max(tasks[1:]) <= tasks[0] + 8
    assert max(streams[1:]) <= streams[0] + 8
    assert max(held) < 50
