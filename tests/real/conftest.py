"""Real daemons as real processes, and clients beside them: what the tests of this folder share."""

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import p2pnode
from p2pnode.api.client import ControlClient
from p2pnode.client import Connection
from p2pnode.node.config import load_config

START_SECONDS = 30.0


def wait_until(condition: Callable[[], Any], seconds: float = START_SECONDS, pause: float = 0.01) -> Any:
    """Give the condition's first true value; fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"nothing came of it within {seconds:g} s"
        time.sleep(pause)
    return value


def free_port() -> int:
    """Give a port of the loopback interface that nobody uses now, below those that the kernel hands out by itself."""
    for port in range(20_000 + os.getpid() % 8000, 32_000):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                sock.bind(("127.0.0.1", port))
                if port not in _taken:
                    _taken.add(port)
                    return port
    raise AssertionError("no port is free")


_taken: set[int] = set()


class Daemon:
    """A daemon process with its own folder and a fixed port, which can be killed and started again on the same data."""

    def __init__(self, home: Path, network: str, settings: Mapping[str, str]) -> None:
        self.home = home
        self.address = f"127.0.0.1:{free_port()}"
        self.settings = {
            "network.profile": "local", "network.id": network, "network.mdns": "false", "network.listen": self.address,
            **settings,
        }  # fmt: skip
        self.control = ControlClient(home / "data")
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """The environment of every process that works on this folder."""
        variables = {f"P2PNODE_{name.upper().replace('.', '_')}": value for name, value in self.settings.items()}
        return {**os.environ, "P2PNODE_HOME": str(self.home), "NO_COLOR": "1", **variables}

    @property
    def log(self) -> str:
        """Everything the process said, over all its lives."""
        return (self.home / "log").read_text(errors="replace")

    def spawn(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start the command line on this folder."""
        with (self.home / "log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "p2pnode.cli.main", *arguments], env=self.environment, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log,
            )  # fmt: skip

    def start(self) -> "Daemon":
        """Start it and wait until it answers its owner."""
        self.home.mkdir(parents=True, exist_ok=True)
        process = self.process = self.spawn("up", "--foreground")
        wait_until(lambda: process.poll() is not None or self.control.alive())
        assert process.poll() is None, self.log
        return self

    def kill(self) -> None:
        """SIGKILL, as a power cut would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def stop(self) -> None:
        """Stop it in order."""
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(25)
            self.kill()

    def counter(self, name: str, label: str = "") -> float:
        """Give one series of the daemon's counters, 0 before its first count."""
        start = f"p2pnode_{name}" + (f'{{label="{label}"}}' if label else "")
        lines = (line.rpartition(" ") for line in self.control.text("/v1/metrics").splitlines())
        return sum(float(value) for series, _, value in lines if series == start or (not label and series.startswith(start + "{")))

    def workers(self) -> list[int]:
        """Give the process ids of the model workers: the zygote's children."""
        if self.process is None:
            return []
        return [worker for zygote in children(self.process.pid) for worker in children(zygote)]

    @contextlib.contextmanager
    def database(self) -> Iterator[sqlite3.Connection]:
        """Read the database beside whoever writes it."""
        connection = sqlite3.connect(self.home / "data" / "p2pnode.db", timeout=10)
        try:
            connection.execute("PRAGMA query_only=ON")
            yield connection
        finally:
            connection.close()

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Give the rows of a query; none while there is no database yet."""
        try:
            with self.database() as connection:
                return connection.execute(sql).fetchall()
        except sqlite3.Error:
            return []


def children(process: int) -> list[int]:
    """Give the process ids of a process's children."""
    found = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{process}/task"):
            found += [int(child) for child in Path(f"/proc/{process}/task/{task}/children").read_text().split()]
    return found


@pytest.fixture(scope="session")
def network_name() -> str:
    """A network of this test run alone."""
    return f"test-{os.getpid()}-{time.time_ns()}"


@pytest.fixture
def make_daemon(tmp_path: Path, network_name: str) -> Iterator[Callable[..., Daemon]]:
    """Make daemons (not started) that are gone after the test: `make_daemon(name, {"section.setting": "text"})`."""
    made: list[Daemon] = []

    def make(name: str, settings: Mapping[str, str] | None = None) -> Daemon:
        made.append(Daemon(tmp_path / name, network_name, settings or {}))
        return made[-1]

    yield make
    for daemon in made:
        daemon.kill()
        daemon.control.close()


@pytest.fixture(scope="session")
def provider(tmp_path_factory: pytest.TempPathFactory, network_name: str) -> Iterator[Daemon]:
    """A daemon that sells, for all tests that leave it as it was."""
    daemon = Daemon(tmp_path_factory.mktemp("provider"), network_name, {}).start()
    yield daemon
    daemon.stop()
    daemon.control.close()


@pytest.fixture(scope="session")
def client(provider: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Connection]:
    """A connection whose node runs inside this process and knows the provider's address."""
    buyer = Daemon(tmp_path_factory.mktemp("client"), provider.settings["network.id"], {"network.static_peers": provider.address})
    with p2pnode.connect(config=load_config(buyer.environment), embed=True) as connection:
        yield connection
