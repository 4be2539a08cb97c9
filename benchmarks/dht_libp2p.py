"""PyPI's `libp2p` as a contender: TCP, Noise and yamux, its Kademlia in server mode with its defaults (k = 20, alpha = 10)."""

import logging
import sys
from contextlib import AsyncExitStack

import multiaddr
import trio
from dht_trial import serve
from libp2p import new_host
from libp2p.kad_dht.common import PROTOCOL_ID
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.records.validator import Validator
from libp2p.tools.anyio_service import background_trio_service

OPERATION_SECONDS = 60.0


class Anything(Validator):
    """Accepts every value, as the other contenders' unsigned ones are."""

    def validate(self, key: str, value: bytes) -> None:
        return

    def select(self, key: str, values: list[bytes]) -> int:
        return 0


class Nodes:
    """`Swarm` over KadDHT. Every request of its hash table is a stream of its own, so streams are what is counted."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self._tables: list[KadDHT] = []
        self._answered = 0

    async def start(self, count: int, bootstrap: str | None) -> str:
        for _ in range(count):
            host = new_host()
            await self._stack.enter_async_context(host.run(listen_addrs=[multiaddr.Multiaddr("/ip4/127.0.0.1/tcp/0")]))
            entry = bootstrap or (self._address(0) if self._tables else "")
            table = KadDHT(host, DHTMode.SERVER)
            table.register_validator("bench", Anything())
            host.set_stream_handler(PROTOCOL_ID, self._counted(table))
            if entry:
                there = info_from_p2p_addr(multiaddr.Multiaddr(entry))
                await host.connect(there)
                await table.add_peer(there.peer_id)
            await self._stack.enter_async_context(background_trio_service(table))
            self._tables.append(table)
        return self._address(0)

    def _counted(self, table: KadDHT):
        async def handle(stream) -> None:
            self._answered += 1
            await table.handle_stream(stream)

        return handle

    def _address(self, node: int) -> str:
        host = self._tables[node].host
        return str(host.get_addrs()[0]) if "/p2p/" in str(host.get_addrs()[0]) else f"{host.get_addrs()[0]}/p2p/{host.get_id()}"

    async def settle(self) -> None:
        """One refresh of every table, now that all are there."""
        for table in self._tables:
            await table.refresh_routing_table()

    async def put(self, node: int, number: int, value: bytes) -> tuple[str, bool]:
        """It gives no word of success: what counts is whether the value is found."""
        name = f"/bench/{number}"
        with trio.move_on_after(OPERATION_SECONDS) as scope:
            await self._tables[node].put_value(name, value)
        return name, not scope.cancelled_caught

    async def get(self, node: int, name: str) -> bytes | None:
        with trio.move_on_after(OPERATION_SECONDS):
            return await self._tables[node].get_value(name)
        return None

    def holds(self, node: int, name: str) -> bool:
        return self._tables[node].value_store.get(name.encode()) is not None

    def requests(self) -> int:
        return self._answered

    def neighbours(self) -> float:
        return sum(table.get_routing_table_size() for table in self._tables) / len(self._tables)


async def main() -> None:
    logging.disable(logging.CRITICAL)
    async with AsyncExitStack() as stack:
        await serve(Nodes(stack), lambda: trio.to_thread.run_sync(sys.stdin.readline), trio.sleep)


trio.run(main)
