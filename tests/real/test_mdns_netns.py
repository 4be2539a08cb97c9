"""Two daemons on a network of their own, with nothing but multicast to find each other by.

Each runs in its own network namespace; a bridge in a third one is the switch between them. Needs root and `ip`; the test
says what is missing and skips.
"""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

FOUND_SECONDS = 30.0
# How `ip` ends when the kernel or its owner does not allow this at all.
LACKING = ("Operation not permitted", "not supported", "Unknown device type.")

pytestmark = [pytest.mark.netns, pytest.mark.slow]


def ip(*words: str) -> None:
    """Run `ip` with these words; a failure carries what it said."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


class Lan:
    """A switch with two machines at it, `a` and `b`, each with one interface `eth0`."""

    def __init__(self, family: str) -> None:
        self._family = family
        # What every address on it begins with.
        self.hosts = "10.77.0." if family == "IPv4" else "[fe80:"
        start = f"p2p{os.getpid() % 100_000}"
        self._switch = f"{start}s"
        self.spaces = {"a": f"{start}a", "b": f"{start}b"}

    def build(self) -> None:
        """Make the namespaces and wires. Raises OSError where the kernel or the user may not."""
        ip("netns", "add", self._switch)
        ip("-n", self._switch, "link", "add", "name", "br0", "type", "bridge", "forward_delay", "0", "mcast_snooping", "0")
        ip("-n", self._switch, "link", "set", "br0", "up")
        for number, (machine, space) in enumerate(self.spaces.items(), 1):
            ip("netns", "add", space)
            # No waiting until an address is known to be nobody else's: the wire is ours alone.
            for name, value in {"disable_ipv6": int(self._family == "IPv4"), "accept_dad": 0}.items():
                path = f"/proc/sys/net/ipv6/conf/default/{name}"
                ip("netns", "exec", space, "sh", "-c", f"! test -e {path} || echo {value} > {path}")
            ip("-n", self._switch, "link", "add", "name", f"to-{machine}", "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("-n", self._switch, "link", "set", f"to-{machine}", "master", "br0", "up")
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "link", "set", "eth0", "up")
            if self._family == "IPv4":
                ip("-n", space, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
                # Some kernels send multicast nowhere without a route, even from a socket that names its interface.
                ip("-n", space, "route", "add", "224.0.0.0/4", "dev", "eth0")

    def remove(self) -> None:
        """Remove whatever was built; wires and bridge go with their namespaces."""
        for space in (self._switch, *self.spaces.values()):
            with contextlib.suppress(OSError):
                ip("netns", "delete", space)


@pytest.fixture(params=["IPv4", "IPv6"])
def lan(request: pytest.FixtureRequest) -> Iterator[Lan]:
    """A network that only one family works on; the IPv6 one has link-local addresses and no others."""
    if shutil.which("ip") is None:
        pytest.skip("needs the `ip` command (package iproute2)")
    if os.geteuid() != 0:
        pytest.skip("needs root, to make network namespaces")
    if request.param == "IPv6" and not Path("/proc/sys/net/ipv6").exists():
        pytest.skip("needs a kernel with IPv6")
    network = Lan(request.param)
    try:
        try:
            network.build()
        except OSError as error:
            if not str(error).endswith(LACKING):
                raise
            pytest.skip(f"needs the right and the kernel for network namespaces, veth and bridge: {error}")
        yield network
    finally:
        network.remove()


def test_two_daemons_find_each_other_by_multicast_alone(lan: Lan, make_daemon: Callable[..., Any]) -> None:
    daemons = []
    settings = {
        "network.profile": "lan", "network.mdns": "true", "network.listen": "[::]:7470", "provide.enabled": "false",
    }  # fmt: skip
    for machine, space in lan.spaces.items():
        daemons.append(make_daemon(machine, settings))
        daemons[-1].prefix = ("ip", "netns", "exec", space)
        daemons[-1].start()
    nodes = [daemon.control.get("/v1/status")["node"] for daemon in daemons]
    for daemon, other in zip(daemons, reversed(nodes), strict=True):
        row = found(daemon, other)
        assert all(address.startswith(lan.hosts) for address in row["addresses"]), row["addresses"]
        status = daemon.control.get("/v1/status")["discovery"]
        assert status["mdns"]["state"] == "working", status["mdns"]
        assert all(address.startswith("10.77.0.") for address in status["own_addresses"]), "link-local ones go to nobody else"


def found(daemon: Any, node: str) -> dict[str, Any]:
    """Wait until a daemon is connected to a node and has heard it by multicast itself; give what it knows of it."""
    deadline = time.monotonic() + FOUND_SECONDS
    while True:
        rows = {row["node_id"]: row for row in daemon.control.get("/v1/peers")["peers"]}
        if node in rows and rows[node]["connected"] and "mdns" in rows[node]["sources"]:
            return rows[node]
        if time.monotonic() > deadline:
            mdns = daemon.control.get("/v1/status")["discovery"]["mdns"]
            pytest.fail(f"not found within {FOUND_SECONDS:g} s; multicast: {mdns}; peers: {rows}; log: {daemon.log[-2000:]}")
        time.sleep(0.05)
