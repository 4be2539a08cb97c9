"""p2pnode as a contender: whole nodes that sell nothing, on the real environment, each with a database of its own.

Sessions are encrypted and authenticated, records are signed and checked, and nodes take part once others have dialled them back:
neither of the other contenders does that for the values they store.
"""

import logging
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

import trio
from dht_trial import serve

from p2pnode.crypto.keys import Identity
from p2pnode.discovery.records.record import open_record, record_key
from p2pnode.errors import P2PNodeError
from p2pnode.metrics import Metrics
from p2pnode.node.config import load_config, with_settings
from p2pnode.node.machine import SystemEntropy, open_machine
from p2pnode.node.node import Node
from p2pnode.node.scopes import running
from p2pnode.work.runtime import SandboxRuntime

OPERATION_SECONDS = 60.0
SETTLE_SECONDS_MAX = 120.0
LIFE_SECONDS = 3600.0
# Of this many others a node knows all it can place; fewer are known where the network is smaller.
NEIGHBOURS_MIN = 16


class Nodes:
    """`Swarm` over whole nodes. Nothing is executed for anybody, so no worker process is started."""

    def __init__(self, stack: AsyncExitStack, folder: Path) -> None:
        self._stack = stack
        self._folder = folder
        self._nodes: list[Node] = []

    async def start(self, count: int, bootstrap: str | None) -> str:
        for number in range(count):
            home = self._folder / f"node{number}"
            settings = {
                "network.profile": "local", "network.id": "benchmark", "network.mdns": "false",
                "network.listen": "127.0.0.1:0", "provide.enabled": "false",
                "network.bootstrap": bootstrap or (self._address(0) if self._nodes else ""),
            }  # fmt: skip
            config = with_settings(load_config({"P2PNODE_HOME": str(home)}), settings)
            metrics = Metrics()
            runtime = SandboxRuntime(metrics=metrics)
            environment = await self._stack.enter_async_context(open_machine(config.database_file, runtime, metrics))
            node = Node(config, environment, Identity(SystemEntropy().token(32)), metrics=metrics, mdns=None)
            await self._stack.enter_async_context(running(node))
            self._nodes.append(node)
        return self._address(0)

    def _address(self, node: int) -> str:
        return self._nodes[node].transport.bound_addresses[0]

    async def settle(self) -> None:
        """Wait until every node was dialled back and knows its neighbours; nothing is asked for."""
        with trio.move_on_after(SETTLE_SECONDS_MAX):
            while not all(self._is_settled(node) for node in self._nodes):  # noqa: ASYNC110 - no event tells of it
                await trio.sleep(0.05)

    def _is_settled(self, node: Node) -> bool:
        return node.discovery.dht.is_server and len(node.discovery.dht.table) >= min(NEIGHBOURS_MIN, len(self._nodes) - 1)

    async def put(self, node: int, number: int, value: bytes) -> tuple[str, bool]:
        salt = f"value {number}".encode()
        discovery = self._nodes[node].discovery
        name = record_key(self._nodes[node].identity.node_id, salt).hex()
        with trio.move_on_after(OPERATION_SECONDS):
            try:
                return name, (await discovery.publish(salt, value, LIFE_SECONDS)).is_stored
            except P2PNodeError:
                return name, False
        return name, False

    async def get(self, node: int, name: str) -> bytes | None:
        with trio.move_on_after(OPERATION_SECONDS):
            outcome = await self._nodes[node].discovery.get_record(bytes.fromhex(name))
            return outcome.record and open_record(outcome.record, self._nodes[node].network_id, time.time()).value
        return None

    def holds(self, node: int, name: str) -> bool:
        return self._nodes[node].discovery.dht._records.get(bytes.fromhex(name), time.time()) is not None

    def requests(self) -> int:
        return round(sum(node.metrics.total("requests_total") for node in self._nodes))

    def neighbours(self) -> float:
        return sum(len(node.discovery.dht.table) for node in self._nodes) / len(self._nodes)


async def main() -> None:
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        async with AsyncExitStack() as stack:
            await serve(Nodes(stack, Path(folder)), lambda: trio.to_thread.run_sync(sys.stdin.readline), trio.sleep)


trio.run(main)
