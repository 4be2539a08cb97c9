"""p2pnode as a system under test: a provider node, and a client node that embeds, each in its own process.

Every promise is on: encrypted sessions, the sandboxed worker, receipts and cheques on a durable ledger.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import trio
from models import reduce_model
from processes import tell

from p2pnode.jobs.spec import SessionSpec
from p2pnode.metrics import Metrics
from p2pnode.node.config import load_config
from p2pnode.node.identity import load_or_create
from p2pnode.node.machine import SystemEntropy, open_machine
from p2pnode.node.node import Node
from p2pnode.node.scopes import running
from p2pnode.work.runtime import SandboxRuntime


@asynccontextmanager
async def node_at(home: Path, **settings: str) -> AsyncIterator[Node]:
    """Run a node as `p2pnode up` does."""
    variables = {"P2PNODE_HOME": str(home), "P2PNODE_NETWORK_PROFILE": "local", "P2PNODE_NETWORK_MDNS": "false", **settings}
    config = load_config(variables)
    metrics = Metrics()
    runtime = SandboxRuntime(metrics=metrics)
    async with open_machine(config.database_file, runtime, metrics) as environment, running(runtime):
        node = Node(config, environment, load_or_create(config, SystemEntropy()), metrics=metrics)
        async with running(node):
            yield node


async def serve(folder: Path) -> None:
    # A client with a long queue of large calls needs room; the credit is one slice, as always.
    settings = {"P2PNODE_CREDIT_SLICE_AMOUNT": "1000", "P2PNODE_PROVIDE_MEMORY": "8GiB"}
    async with node_at(folder / "provider", P2PNODE_PROVIDE_ENABLED="true", **settings) as node:
        tell({"address": node.transport.bound_addresses[0]})
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)


async def client(folder: Path, address: str) -> None:
    model = folder / "reduce.onnx"
    model.write_bytes(reduce_model())
    settings = {"P2PNODE_NETWORK_STATIC_PEERS": address, "P2PNODE_CLIENT_MAX_TOTAL": "1000000"}
    async with node_at(folder / "client", P2PNODE_PROVIDE_ENABLED="false", **settings) as node:
        with trio.fail_after(20):
            while not node.transport.links():  # noqa: ASYNC110 - a benchmark has no event to wait for
                await trio.sleep(0.02)
        tell({"ready": True})
        held, session = 0, None
        while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            command = json.loads(line)
            size = command["bytes"]
            if size != held:
                if session is not None:
                    await node.jobs.close_session(session)
                held, session = size, await node.jobs.session(SessionSpec(str(model)))
            array = np.random.default_rng(1).random(size // 4, np.float32)
            if command["what"] == "latency":
                tell({"p50": await _latency(session, array, command["calls"])})
            else:
                tell({"rate": await _rate(session, array, command["calls"], command["in_flight"])})


async def _latency(session: object, array: np.ndarray, calls: int) -> float:
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        await session.call({"x": array}, ("y",))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


async def _rate(session: object, array: np.ndarray, calls: int, in_flight: int) -> float:
    left = calls

    async def lane() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await session.call({"x": array}, ("y",))

    start = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(in_flight):
            nursery.start_soon(lane)
    return calls / (time.perf_counter() - start)


if __name__ == "__main__":
    if os.environ.get("P2PNODE_PROFILE"):
        import cProfile

        profile = cProfile.Profile()
        profile.enable()
    if sys.argv[1] == "serve":
        trio.run(serve, Path(sys.argv[2]))
    else:
        trio.run(client, Path(sys.argv[2]), json.loads(sys.argv[3])["address"])
    if os.environ.get("P2PNODE_PROFILE"):
        profile.dump_stats(f"{os.environ['P2PNODE_PROFILE']}-{sys.argv[1]}.prof")
