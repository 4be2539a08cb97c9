"""One world with everything going wrong, and the digest of what happened: run in several processes, it must be the same.

python one_world.py SEED CIPHER NODES [TRACE]
"""

import sys
from pathlib import Path

import trio

from p2pnode.errors import PeerError
from p2pnode.sim.faults import (
    BadWires,
    CloggedLinks,
    Flapping,
    MassFailure,
    RollingPartitions,
    SkewedClocks,
    SlowMachines,
    run_faults,
)
from p2pnode.sim.options import WorldOptions
from p2pnode.sim.trace import Trace
from p2pnode.sim.world import World, run_world
from p2pnode.wire.messages.discovery import WhoAreYou

FAULTS = (
    Flapping(0.2, up_seconds=30, down_seconds=10, times=2),
    MassFailure(0.3, down_seconds=20, silent=True),
    RollingPartitions(seconds=20, pause_seconds=5, times=2),
    RollingPartitions(seconds=15, times=1, one_way=True),
    SlowMachines(seconds=30),
    SkewedClocks(seconds=30),
    CloggedLinks(clogs=10),
    BadWires(seconds=60),
)


async def chatter(world: World) -> None:
    """Let nodes meet others and ask them, over and over."""
    while True:
        one, other = world.random.sample(list(world.residents), 2)
        world.spawn(ask, world, one, other)
        await trio.sleep(0.25)


async def ask(world: World, one: str, other: str) -> None:
    """Let one node ask another; what comes of it is in the trace."""
    node, target = world.residents[one].node, world.residents[other]
    if node is None or not node.transport.bound_addresses:
        return
    outcome = "late"
    with trio.move_on_after(5):
        try:
            link = await node.transport.connect((target.address,), target.identity.node_id)
            await link.request(WhoAreYou())
            outcome = "answered"
        except PeerError as error:
            outcome = type(error).__name__
    world.say(f"{one} asked {other}: {outcome}")


def options(seed: int, cipher: str) -> WorldOptions:
    """Give the world's options."""
    return WorldOptions(
        seed=seed, cipher=cipher, latency="continents", nat={"symmetric": 0.2, "cone": 0.1, "firewalled": 0.1},
        bandwidth_bytes_per_second=1e6, commit_seconds=0.01, clock_skew_ms=500,
    )  # fmt: skip


def run(seed: int, cipher: str, nodes: int, path: Path | None = None) -> str:
    """Run the world; gives the digest, the number of lines and what was counted."""
    trace = Trace(file=path)

    async def scenario(world: World) -> str:
        for index in range(nodes):
            await world.start(f"n{index}", knows=[f"n{(index - 1) // 2}"] if index else [])
        world.spawn(chatter, world)
        await run_faults(world, FAULTS)
        stats = world.network.stats
        return f"{stats.lost} {sum(stats.messages.values())} {sum(stats.dials.values())} {stats.stream_bytes}"

    counted = run_world(scenario, options=options(seed, cipher), trace=trace)
    return f"{trace.digest()} {trace.count} {counted}"


if __name__ == "__main__":
    print(run(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]) if len(sys.argv) > 4 else None))
