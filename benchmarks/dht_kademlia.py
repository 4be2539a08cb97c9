"""PyPI's `kademlia` as a contender: its own defaults (k = 20, alpha = 3, UDP, no authentication) on loopback."""

import asyncio
import logging
import sys
from collections.abc import Awaitable

from dht_trial import serve
from kademlia.network import Server
from kademlia.protocol import KademliaProtocol
from kademlia.utils import digest

OPERATION_SECONDS = 60.0


class CountingProtocol(KademliaProtocol):
    """Counts the requests that arrive: in rpcudp a datagram that begins with 0 is one."""

    answered = 0

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if data[:1] == b"\0":
            CountingProtocol.answered += 1
        super().datagram_received(data, addr)


class CountingServer(Server):
    protocol_class = CountingProtocol


class Nodes:
    """`Swarm` over kademlia.network.Server."""

    def __init__(self) -> None:
        self._nodes: list[Server] = []

    async def start(self, count: int, bootstrap: str | None) -> str:
        for _ in range(count):
            node = CountingServer()
            await node.listen(0, interface="127.0.0.1")
            entry = bootstrap or (self._address(0) if self._nodes else "")
            if entry:
                host, _, port = entry.rpartition(":")
                await node.bootstrap([(host, int(port))])
            self._nodes.append(node)
        return self._address(0)

    def _address(self, node: int) -> str:
        host, port = self._nodes[node].transport.get_extra_info("sockname")
        return f"{host}:{port}"

    async def settle(self) -> None:
        """One more lookup of its own place for each node, now that all are there."""
        for node in self._nodes:
            await node.bootstrap(node.bootstrappable_neighbors()[:3])

    async def put(self, node: int, number: int, value: bytes) -> tuple[str, bool]:
        name = f"key {number}"
        return name, bool(await self._bounded(self._nodes[node].set(name, value)))

    async def get(self, node: int, name: str) -> bytes | None:
        return await self._bounded(self._nodes[node].get(name))

    def holds(self, node: int, name: str) -> bool:
        return self._nodes[node].storage.get(digest(name)) is not None

    @staticmethod
    async def _bounded(operation: Awaitable) -> object:
        try:
            return await asyncio.wait_for(operation, OPERATION_SECONDS)
        except TimeoutError:
            return None

    def requests(self) -> int:
        return CountingProtocol.answered

    def neighbours(self) -> float:
        return sum(len(bucket.nodes) for node in self._nodes for bucket in node.protocol.router.buckets) / len(self._nodes)


async def main() -> None:
    logging.disable(logging.CRITICAL)
    loop = asyncio.get_running_loop()
    await serve(Nodes(), lambda: loop.run_in_executor(None, sys.stdin.readline), asyncio.sleep)


asyncio.run(main())
