"""The stream, listener and network Protocols: one suite for the in-memory network and for TCP."""

import pytest
import trio

from p2pnode.environment import ByteStream, Listener, Network
from p2pnode.errors import ConfigError, Unreachable
from p2pnode.sim.clock import SimClock
from p2pnode.sim.network import MemoryNetwork, MemoryStream
from p2pnode.transport.tcp import TcpNetwork


@pytest.fixture(params=["memory", "tcp"])
def run(request):
    """Run `scenario(network, address to listen on)` in one of the worlds."""

    def runner(scenario) -> None:
        async def main() -> None:
            with trio.fail_after(5):
                if request.param == "tcp":
                    await scenario(TcpNetwork(), "127.0.0.1:0")
                else:
                    await scenario(MemoryNetwork(0.0001).host("10.0.0.1"), "10.0.0.1:0")

        trio.run(main, clock=SimClock() if request.param == "memory" else None)

    return runner


async def joined(network: Network, address: str) -> tuple[Listener, ByteStream, ByteStream]:
    listener = await network.listen(address)
    near = await network.dial(listener.address)
    return listener, near, await listener.accept()


async def read(stream: ByteStream, size: int) -> bytes:
    data, buffer = b"", memoryview(bytearray(65_536))
    while len(data) < size:
        count = await stream.receive_into(buffer[: size - len(data)])
        if count == 0:
            break
        data += buffer[:count]
    return data


def test_bytes_arrive_in_order_and_addresses_agree(run) -> None:
    async def scenario(network, address) -> None:
        listener, near, far = await joined(network, address)
        assert near.remote_address == far.local_address == listener.address
        assert far.remote_address == near.local_address
        assert near.send_nowait([b"one ", bytearray(b"two "), memoryview(b"three")]) == 13
        assert await read(far, 13) == b"one two three"
        assert far.send_nowait([b"back"]) == 4
        assert await read(near, 4) == b"back"
        for closing in (near, far, listener):
            await closing.aclose()
            await closing.aclose()

    run(scenario)


def test_a_full_stream_takes_nothing_until_it_is_read(run) -> None:
    async def scenario(network, address) -> None:
        listener, near, far = await joined(network, address)
        sent = 0
        while count := near.send_nowait([bytes(65_536)]):
            sent += count
        assert sent >= 65_536
        writable = []

        async def wait() -> None:
            await near.wait_writable()
            writable.append(near.send_nowait([b"more"]))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.sleep(0.001)
            assert writable == []
            assert len(await read(far, sent)) == sent
        assert writable[0] > 0
        for closing in (near, far, listener):
            await closing.aclose()

    run(scenario)


def test_the_end_is_read_after_what_was_sent(run) -> None:
    async def scenario(network, address) -> None:
        listener, near, far = await joined(network, address)
        near.send_nowait([b"last words"])
        await near.aclose()
        assert await read(far, 100) == b"last words"
        assert await far.receive_into(memoryview(bytearray(10))) == 0

        async def send_on() -> None:
            for _ in range(100):
                far.send_nowait([bytes(1000)])
                await trio.sleep(0.001)

        with pytest.raises(Unreachable):
            await send_on()
        for closing in (far, listener):
            await closing.aclose()

    run(scenario)


def test_closing_wakes_whoever_waits(run) -> None:
    async def scenario(network, address) -> None:
        listener, near, far = await joined(network, address)
        woken = []

        async def wait(function) -> None:
            with pytest.raises(Unreachable):
                await function()
            woken.append(function)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait, lambda: near.receive_into(memoryview(bytearray(10))))
            nursery.start_soon(wait, listener.accept)
            await trio.sleep(0.001)
            await near.aclose()
            await listener.aclose()
        assert len(woken) == 2
        await far.aclose()

    run(scenario)


def test_nobody_listening_and_addresses_in_use_are_named(run) -> None:
    async def scenario(network, address) -> None:
        listener = await network.listen(address)
        with pytest.raises(ConfigError):
            await network.listen(listener.address)
        await listener.aclose()
        with pytest.raises(Unreachable):
            await network.dial(listener.address)

    run(scenario)


@pytest.mark.parametrize("address", ["no port", "host:", "host:port", "host:99999", ":"])
async def test_tcp_refuses_what_is_no_address(address) -> None:
    with pytest.raises(Unreachable):
        await TcpNetwork().dial(address)
    with pytest.raises(ConfigError):
        await TcpNetwork().listen(address)


def test_latency_is_what_it_says_and_a_break_reaches_both_ends() -> None:
    async def main() -> None:
        world = MemoryNetwork(latency_seconds=0.2)
        listener = await world.host("a").listen("a:1")
        near = await world.host("b").dial("a:1")
        far = await listener.accept()
        assert trio.current_time() == pytest.approx(0.4)
        near.send_nowait([b"x"])
        await read(far, 1)
        assert trio.current_time() == pytest.approx(0.6)
        near.send_nowait([b"lost"])
        assert isinstance(near, MemoryStream)
        near.break_off()
        for stream in (near, far):
            with pytest.raises(Unreachable):
                await stream.receive_into(memoryview(bytearray(1)))

    trio.run(main, clock=SimClock())


def test_two_runs_of_the_same_exchange_take_the_same_virtual_time() -> None:
    def once() -> list[float]:
        times = []

        async def main() -> None:
            world = MemoryNetwork(latency_seconds=0.01, buffer_bytes=1000)
            listener = await world.host("a").listen("a:1")
            near = await world.host("b").dial("a:1")
            far = await listener.accept()

            async def send() -> None:
                left = 10_000
                while left:
                    left -= near.send_nowait([bytes(min(left, 300))])
                    if left:
                        await near.wait_writable()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                got = 0
                while got < 10_000:
                    got += await far.receive_into(memoryview(bytearray(777)))
                    times.append(trio.current_time())

        trio.run(main, clock=SimClock())
        return times

    assert once() == once()
