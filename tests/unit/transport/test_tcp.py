"""TCP with both families: one listener for all, and peers' addresses as everybody writes them."""

import socket

import pytest
import trio

from p2pnode.errors import ConfigError
from p2pnode.transport import tcp
from p2pnode.transport.tcp import TcpNetwork


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


async def meet(listener, address: str) -> tuple[str, str]:
    """Connect, and give how each end names the dialler."""
    async with trio.open_nursery() as nursery:
        accepted = []

        async def accept() -> None:
            accepted.append(await listener.accept())

        nursery.start_soon(accept)
        stream = await TcpNetwork().dial(address)
    names = accepted[0].remote_address, stream.local_address
    await stream.aclose()
    await accepted[0].aclose()
    return names


@needs_ipv6
async def test_one_listener_takes_both_families_and_writes_ipv4_as_ipv4():
    listener = await TcpNetwork().listen("[::]:0")
    assert listener.address.startswith("[::]:")
    port = listener.address.rpartition(":")[2]
    with trio.fail_after(5):
        for host in ("127.0.0.1", "[::1]"):
            there, here = await meet(listener, f"{host}:{port}")
            assert there == here
            assert there.startswith(f"{host}:")
    await listener.aclose()


@needs_ipv6
async def test_a_link_local_address_is_dialled_with_its_interface():
    import ifaddr

    found = [
        (address.ip[0], adapter.nice_name)
        for adapter in ifaddr.get_adapters()
        for address in adapter.ips
        if address.is_IPv6 and address.ip[0].startswith("fe80:")
    ]
    if not found:
        pytest.skip("no interface of this machine has a link-local address")
    listener = await TcpNetwork().listen("[::]:0")
    with trio.fail_after(5):
        there, here = await meet(listener, "[{}%{}]:{}".format(*found[0], listener.address.rpartition(":")[2]))
    assert there == here
    assert "%" in there
    await listener.aclose()


async def test_without_ipv6_every_address_means_every_ipv4_address(monkeypatch):
    real = socket.socket

    def without(family=socket.AF_INET, *rest):
        if family == socket.AF_INET6:
            raise OSError(97, "Address family not supported by protocol")
        return real(family, *rest)

    monkeypatch.setattr(tcp.socket, "socket", without)
    listener = await TcpNetwork().listen("[::]:0")
    assert listener.address.startswith("0.0.0.0:")
    await listener.aclose()
    with pytest.raises(ConfigError, match="not supported"):
        await TcpNetwork().listen("[::1]:0")
