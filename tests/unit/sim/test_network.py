"""The simulated network: delays, order, bandwidth, cuts, clogs, translators, machines that are off."""

import itertools

import pytest
import trio

from p2pnode.errors import Unreachable
from p2pnode.sim.clock import SimClock
from p2pnode.sim.latency import latency_model
from p2pnode.sim.nat import CONE, FIREWALLED, NONE, SYMMETRIC, Nat
from p2pnode.sim.network import MemoryNetwork


def on_virtual_time(scenario) -> None:
    async def main() -> None:
        with trio.fail_after(10_000):
            await scenario()

    trio.run(main, clock=SimClock())


async def joined(network, source="80.0.0.1", target="80.0.0.2"):
    """Give both ends of a connection from one host to another."""
    listener = await network.host(target).listen(f"{target}:7")
    near = await network.host(source).dial(f"{target}:7")
    return near, await listener.accept()


async def read(stream, size: int) -> bytes:
    data, buffer = b"", memoryview(bytearray(65_536))
    while len(data) < size:
        count = await stream.receive_into(buffer[: size - len(data)])
        if count == 0:
            break
        data += buffer[:count]
    return data


def test_bytes_keep_their_order_however_the_deliveries_are_delayed() -> None:
    async def scenario() -> None:
        network = MemoryNetwork(model=latency_model("continents"), seed=3)
        network.reordering = 0.5
        near, far = await joined(network)
        sent = b"".join(index.to_bytes(2, "big") for index in range(500))

        async def send() -> None:
            for index in range(0, len(sent), 2):
                near.send_nowait([sent[index : index + 2]])
                await trio.sleep(0.001)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            assert await read(far, len(sent)) == sent

    on_virtual_time(scenario)


def test_deliveries_on_different_connections_overtake_each_other() -> None:
    async def scenario() -> None:
        network = MemoryNetwork(0.05, seed=3)
        network.reordering = 0.5
        listener = await network.host("80.0.0.2").listen("80.0.0.2:7")
        pairs = []
        for _ in range(20):
            near = await network.host("80.0.0.1").dial("80.0.0.2:7")
            pairs.append((near, await listener.accept()))
        arrived: list[int] = []

        async def wait(index, far) -> None:
            await read(far, 1)
            arrived.append(index)

        async with trio.open_nursery() as nursery:
            for index, (near, far) in enumerate(pairs):
                nursery.start_soon(wait, index, far)
                near.send_nowait([b"x"])
                await trio.sleep(0.001)
        assert sorted(arrived) == list(range(20))
        assert arrived != sorted(arrived)

    on_virtual_time(scenario)


def test_bandwidth_is_shared_by_what_leaves_one_machine_and_by_what_reaches_one() -> None:
    async def scenario() -> None:
        network = MemoryNetwork(0.01)
        network.bandwidth_bytes_per_second = 100_000
        first, far_first = await joined(network, "80.0.0.1", "80.0.0.2")
        second, far_second = await joined(network, "80.0.0.1", "80.0.0.3")
        begin = trio.current_time()
        first.send_nowait([bytes(50_000)])
        second.send_nowait([bytes(50_000)])
        await read(far_first, 50_000)
        assert trio.current_time() - begin == pytest.approx(0.51)
        await read(far_second, 50_000)
        assert trio.current_time() - begin == pytest.approx(1.01)
        third, far_third = await joined(network, "80.0.0.4", "80.0.0.5")
        fourth = await network.host("80.0.0.6").dial("80.0.0.5:7")
        begin = trio.current_time()
        third.send_nowait([bytes(50_000)])
        fourth.send_nowait([bytes(50_000)])
        await read(far_third, 50_000)
        reached_first = trio.current_time() - begin
        assert reached_first == pytest.approx(0.51)
        assert network.hosts["80.0.0.5"].comes_at - begin == pytest.approx(1.01)

    on_virtual_time(scenario)


def test_a_partition_holds_bytes_back_and_healing_lets_them_go() -> None:
    async def scenario() -> None:
        network = MemoryNetwork(0.01)
        near, far = await joined(network)
        network.partition([["80.0.0.1"]])
        near.send_nowait([b"to far"])
        far.send_nowait([b"to near"])
        with trio.move_on_after(60) as waiting:
            await read(far, 6)
        assert waiting.cancelled_caught
        with trio.move_on_after(60) as waiting:
            await network.host("80.0.0.1").dial("80.0.0.2:7")
        assert waiting.cancelled_caught
        healed = trio.current_time()
        network.heal()
        assert await read(far, 6) == b"to far"
        assert await read(near, 7) == b"to near"
        assert trio.current_time() - healed == pytest.approx(0.01)
        await network.host("80.0.0.1").dial("80.0.0.2:7")

    on_virtual_time(scenario)


def test_a_cut_in_one_direction_leaves_the_other_open_but_no_dial_succeeds() -> None:
    async def scenario() -> None:
        network = MemoryNetwork(0.01)
        near, far = await joined(network)
        network.cut(["80.0.0.1"], ["80.0.0.2"])
        far.send_nowait([b"heard"])
        assert await read(near, 5) == b"heard"
        near.send_nowait([b"not heard"])
        with trio.move_on_after(60) as waiting:
            await read(far, 1)
        assert waiting.cancelled_caught
        for source, target in itertools.permutations(("80.0.0.1", "80.0.0.2")):
            listener = network.hosts[target].listeners or await network.host(target).listen(f"{target}:7")
            assert listener
            with trio.move_on_after(60) as waiting:
                await network.host(source).dial(f"{target}:7")
            assert waiting.cancelled_caught

    on_virtual_time(scenario)


def test_a_clogged_link_delivers_everything_at_once_when_it_opens() -> None:
    async def scenario() -> None:
        network = MemoryNetwork(0.01)
        near, far = await joined(network)
        network.clog("80.0.0.1", "80.0.0.2", 5.0)
        begin = trio.current_time()
        near.send_nowait([b"one"])
        await trio.sleep(1)
        near.send_nowait([b"two"])
        far.send_nowait([b"back"])
        assert await read(near, 4) == b"back"
        assert await read(far, 6) == b"onetwo"
        assert trio.current_time() - begin == pytest.approx(5.0)

    on_virtual_time(scenario)


def test_a_slow_machine_delays_both_directions() -> None:
    async def scenario() -> None:
        network = MemoryNetwork(0.01)
        near, far = await joined(network)
        network.hosts["80.0.0.2"].delay_seconds = 0.5
        for here, there in ((near, far), (far, near)):
            begin = trio.current_time()
            here.send_nowait([b"x"])
            await read(there, 1)
            assert trio.current_time() - begin == pytest.approx(0.51)

    on_virtual_time(scenario)


@pytest.mark.parametrize(
    ("kind", "is_dialled", "is_punched"),
    [(NONE, True, True), (FIREWALLED, False, True), (CONE, False, True), (SYMMETRIC, False, False)],
)
def test_who_can_be_dialled_behind_what(kind, is_dialled, is_punched) -> None:
    async def scenario() -> None:
        network = MemoryNetwork(0.01)
        nat = Nat(kind, "80.0.0.9")
        hidden = network.host("10.0.0.2" if nat.is_translating else "80.0.0.9", nat=nat)
        listener = await hidden.listen(f"{hidden.name}:7")
        outside = network.host("80.0.0.1")

        async def reaches() -> bool:
            with trio.move_on_after(20):
                near = await outside.dial("80.0.0.9:7")
                far = await listener.accept()
                near.send_nowait([b"x"])
                return await read(far, 1) == b"x"
            return False

        assert await reaches() is is_dialled
        nat.open_towards("80.0.0.1", trio.current_time())
        assert await reaches() is is_punched
        await trio.sleep(60)
        assert await reaches() is is_dialled
        nat.is_forwarded = True
        assert await reaches()
        with trio.move_on_after(20) as waiting:
            await outside.dial("10.0.0.2:7")
        assert waiting.cancelled_caught, "a private address leads nowhere from outside"

    on_virtual_time(scenario)


def test_a_cone_shows_every_peer_the_same_port_and_a_symmetric_translator_does_not() -> None:
    cone, symmetric = Nat(CONE, "80.0.0.9", 1), Nat(SYMMETRIC, "80.0.0.9", 1)
    peers = [f"80.0.1.{index}:7" for index in range(20)]
    assert len({cone.seen_address(40_000, peer) for peer in peers}) == 1
    assert cone.seen_address(40_000, peers[0]) != cone.seen_address(40_001, peers[0])
    assert len({symmetric.seen_address(40_000, peer) for peer in peers}) > 15
    assert all(symmetric.seen_address(40_000, peer).startswith("80.0.0.9:") for peer in peers)
    assert Nat(FIREWALLED, "80.0.0.9").seen_address(40_000, peers[0]) == "80.0.0.9:40000"


def test_a_dead_process_resets_and_a_dead_machine_says_nothing_until_it_is_back() -> None:
    async def scenario() -> None:
        network = MemoryNetwork(0.01)
        near, far = await joined(network)
        network.hosts["80.0.0.2"].power_off(silent=False)
        with pytest.raises(Unreachable):
            await far.receive_into(memoryview(bytearray(1)))
        with pytest.raises(Unreachable):
            await near.receive_into(memoryview(bytearray(1)))
        with pytest.raises(Unreachable):
            await network.host("80.0.0.1").dial("80.0.0.2:7")

        near, far = await joined(network, "80.0.0.3", "80.0.0.4")
        network.hosts["80.0.0.4"].power_off(silent=True)
        near.send_nowait([b"anybody?"])
        with trio.move_on_after(100) as waiting:
            await near.receive_into(memoryview(bytearray(1)))
        assert waiting.cancelled_caught
        with trio.move_on_after(100) as waiting:
            await network.host("80.0.0.3").dial("80.0.0.4:7")
        assert waiting.cancelled_caught
        network.hosts["80.0.0.4"].power_on()
        near.send_nowait([b"and now?"])
        with pytest.raises(Unreachable):
            await near.receive_into(memoryview(bytearray(1)))

    on_virtual_time(scenario)


def test_a_doubled_connection_attempt_reaches_the_answerer_twice() -> None:
    async def scenario() -> None:
        network = MemoryNetwork(0.01)
        network.duplication = 0.999
        near, far = await joined(network)
        listener = network.hosts["80.0.0.2"].listeners["80.0.0.2:7"]
        ghost = await listener.accept()
        near.send_nowait([b"real"])
        assert await read(far, 4) == b"real"
        with pytest.raises(Unreachable):
            await read(ghost, 1)

    on_virtual_time(scenario)


def test_lost_connection_attempts_are_repeated_by_the_kernel() -> None:
    async def scenario() -> None:
        network = MemoryNetwork(0.01, seed=1)
        network.syn_loss = 0.5
        await network.host("80.0.0.2").listen("80.0.0.2:7")
        times = []
        for _ in range(40):
            begin = trio.current_time()
            await network.host("80.0.0.1").dial("80.0.0.2:7")
            times.append(round(trio.current_time() - begin, 2))
        assert times.count(0.02) in range(10, 31)
        assert 1.02 in times
        assert 3.02 in times

    on_virtual_time(scenario)


def test_latencies_change_for_open_connections_too() -> None:
    async def scenario() -> None:
        network = MemoryNetwork(0.01)
        near, far = await joined(network)
        network.latency_seconds = 0.3
        begin = trio.current_time()
        near.send_nowait([b"x"])
        await read(far, 1)
        assert trio.current_time() - begin == pytest.approx(0.3)

    on_virtual_time(scenario)


def test_one_arrival_costs_one_entry_of_the_heap_and_no_task() -> None:
    async def scenario() -> None:
        network = MemoryNetwork(0.01)
        near, far = await joined(network)
        tasks = trio.lowlevel.current_statistics().tasks_living
        for _ in range(100):
            near.send_nowait([b"x"])
        clock = trio.lowlevel.current_clock()
        assert isinstance(clock, SimClock)
        assert clock.pending == 1
        assert trio.lowlevel.current_statistics().tasks_living == tasks
        assert await read(far, 100) == b"x" * 100

    on_virtual_time(scenario)
