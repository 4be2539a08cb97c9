"""What each hash table is asked to do, the same for all: this file runs in every contender's process and needs nothing installed.

A contender is a `Swarm`: some nodes in one process. The driver (`dht.py`) sends commands as lines of JSON and gets one line back
for each. Two processes make one network, so that part of it can be killed with SIGKILL, as machines are.
"""

import gc
import json
import resource
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

VALUE_BYTES = 100


class Swarm(Protocol):
    """The nodes of one contender in this process. Names are whatever its `get` needs to find what `put` stored."""

    async def start(self, count: int, bootstrap: str | None) -> str:
        """Start nodes, each joining through `bootstrap` or else the first of them; give the first one's address."""

    async def settle(self) -> None:
        """Return when the nodes have found their neighbours, by whatever the contender does for that."""

    async def put(self, node: int, number: int, value: bytes) -> tuple[str, bool]:
        """Store a value; give its name and whether it was stored."""

    async def get(self, node: int, name: str) -> bytes | None:
        """Find a value from another node."""

    def holds(self, node: int, name: str) -> bool:
        """Whether the node has the value itself, so that getting it there would measure nothing."""

    def requests(self) -> int:
        """How many requests the nodes have answered so far."""

    def neighbours(self) -> float:
        """How many others a node knows, on average."""


def value_of(number: int) -> bytes:
    """Give the value with a number."""
    return f"value {number} ".encode().ljust(VALUE_BYTES, b".")


async def serve(swarm: Swarm, read_line: Callable[[], Awaitable[str]], sleep: Callable[[float], Awaitable[Any]]) -> None:
    """Answer the driver until it closes our standard input."""
    tell({"memory_bytes": _memory_bytes()})
    while line := await read_line():
        command = json.loads(line)
        before, cpu = time.perf_counter(), _cpu_seconds()
        answer = await _answer(swarm, command, sleep)
        answer["seconds"] = time.perf_counter() - before
        answer["cpu_seconds"] = _cpu_seconds() - cpu
        tell(answer)


async def _answer(swarm: Swarm, command: dict[str, Any], sleep: Callable[[float], Awaitable[Any]]) -> dict[str, Any]:
    do = command["do"]
    if do == "start":
        return {"address": await swarm.start(command["count"], command["bootstrap"])}
    if do == "settle":
        await swarm.settle()
        return {"neighbours": swarm.neighbours()}
    if do == "rest":
        await sleep(command["for"])
        return {}
    if do == "requests":
        return {"requests": swarm.requests(), "memory_bytes": _memory_bytes()}
    times, results, copies = [], [], []
    for node, what in command["plan"]:
        if do == "get":
            name, number = what
            holders = [swarm.holds(each, name) for each in range(command["nodes"])]
            copies.append(sum(holders))
            if all(holders):
                continue
            while holders[node]:
                node = (node + 1) % command["nodes"]
        before = time.perf_counter()
        if do == "put":
            results.append(await swarm.put(node, what, value_of(what)))
        else:
            results.append(await swarm.get(node, name) == value_of(number))
        times.append(time.perf_counter() - before)
    return {"times": times, "results": results, "copies": copies}


def tell(answer: dict[str, Any]) -> None:
    """Answer the driver."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _memory_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
