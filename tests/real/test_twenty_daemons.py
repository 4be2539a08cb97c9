"""Twenty daemons as real processes on loopback: they join by one address, publish, find each other, lose half, and recover.

None of them sells, so that no worker is started; the rest is what an owner gets from `p2pnode up`.
"""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest

COUNT = 20
# k = 16 nodes take a record where there are so many; a publication is one only when half of them did.
ACKS_MIN = 8
PUBLISHED_MIN = 4
STEP_SECONDS = 60.0

pytestmark = pytest.mark.slow


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    """Give the condition's first true value."""
    deadline = time.monotonic() + STEP_SECONDS
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {STEP_SECONDS:g} s"
        time.sleep(0.1)
    return value


def start_all(daemons: Iterable[Any]) -> None:
    """Start them, a few at a time."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda daemon: daemon.start(), daemons))


def discovery(daemon: Any) -> dict[str, Any]:
    """Give what a daemon says of its place in the network."""
    return daemon.control.get("/v1/status")["discovery"]


def address_found(daemon: Any, node: str) -> str:
    """Look a node up by its id; give the address that comes back, empty where it is not found."""
    answer = daemon.control.get("/v1/net/lookup", id=node)
    assert answer["target"] == node
    return next((each["addresses"][0] for each in answer["nearest"] if each["node"] == node), "")


def test_twenty_daemons_join_publish_find_lose_half_and_recover(make_daemon: Callable[..., Any]) -> None:
    lean = {"provide.enabled": "false", "network.mdns": "false"}
    first = make_daemon("0", lean).start()
    daemons = [first, *(make_daemon(str(number), {**lean, "network.bootstrap": first.address}) for number in range(1, COUNT))]
    start_all(daemons[1:])
    nodes = [daemon.control.get("/v1/status")["node"] for daemon in daemons]

    # Join: each was dialled back, and knows nearly everybody although it was told of one.
    for daemon in daemons:
        wait_until(lambda d=daemon: discovery(d)["role"] == "server", "a server")
        wait_until(lambda d=daemon: discovery(d)["table_entries"] >= COUNT // 2, "a table")

    # Find: everyone by its id alone, from somebody who was not its bootstrap node.
    for (daemon, _), (other, node) in pairwise([*zip(daemons, nodes, strict=True), (first, nodes[0])]):
        assert wait_until(lambda d=daemon, n=node: address_found(d, n), "found") == other.address

    # Publish: where each is reached, stored by enough others to count.
    published = wait_until(lambda: _published(daemons), "published")
    assert all(daemon.counter("publish_acks") >= ACKS_MIN for daemon in published)
    assert sum(daemon.counter("records_held") for daemon in daemons) >= PUBLISHED_MIN * ACKS_MIN

    # Lose half, without a word; the bootstrap node among them.
    lost, left = daemons[: COUNT // 2], daemons[COUNT // 2 :]
    for daemon in lost:
        daemon.kill()
    for (daemon, _), (other, node) in pairwise(zip([*left, left[0]], [*nodes[COUNT // 2 :], nodes[COUNT // 2]], strict=True)):
        assert wait_until(lambda d=daemon, n=node: address_found(d, n), "found among the rest") == other.address
    assert not address_found(left[0], nodes[0]), "who does not answer is not handed out"

    # Recover: the dead leave the tables, and one that comes back elsewhere is found where it is now.
    for daemon in left:
        wait_until(lambda d=daemon: discovery(d)["table_entries"] <= len(left) + 2, "the dead out of the table")
        assert discovery(daemon)["table_entries"] >= len(left) // 2
    back = make_daemon("0", {**lean, "network.bootstrap": left[0].address})
    assert back.address != first.address
    back.start()
    assert wait_until(lambda: address_found(left[-1], nodes[0]), "the one that came back") == back.address
    for daemon in (*left, back):
        assert daemon.control.get("/v1/status")["bugs"] == 0


def _published(daemons: list[Any]) -> list[Any]:
    """Give those that have published their address, once there are some."""
    done = [daemon for daemon in daemons if daemon.counter("publications_total", "stored")]
    return done if len(done) >= PUBLISHED_MIN else []
