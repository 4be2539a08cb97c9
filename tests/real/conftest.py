"""Real daemons as real processes, and clients beside them: what the tests of this folder share."""

import contextlib
import math
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import p2pnode
from p2pnode.client import Connection
from p2pnode.control.client import ControlClient
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
    """A daemon process with its own folder and a fixed port, which can be killed and started again on the same data.

    prefix: words put before the command, such as those that enter a network namespace.
    """

    prefix: tuple[str, ...] = ()

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
                [*self.prefix, sys.executable, "-m", "p2pnode.cli.main", *arguments], env=self.environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
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
        found = 0.0
        for line in self.control.text("/v1/metrics").splitlines():
            series, _, value = line.rpartition(" ")
            if series == start or (not label and series.startswith(start + "{")):
                found += float(value)
        return found

    def workers(self) -> list[int]:
        """Give the process ids of the model workers: the zygote's children."""
        if self.process is None:
            return []
        return [worker for zygote in children(self.process.pid) for worker in children(zygote)]

    @contextlib.contextmanager
    def database(self) -> Iterator[sqlite3.Connection]:
        """Read the database beside whoever writes it."""
        # Read only: a connection that could write would make the file before its owner does.
        connection = sqlite3.connect(f"file:{self.home / 'data' / 'p2pnode.db'}?mode=ro", uri=True, timeout=10)
        try:
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


class Proxy:
    """A TCP relay in front of a daemon which can hold back what flows one way, so that a state between two messages lasts.

    up and down: how many bytes may still pass from the dialler to the daemon and back; infinite at first.
    """

    def __init__(self, target: str) -> None:
        self.up = self.down = math.inf
        self._target = target
        self._changed = threading.Condition()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", free_port()))
        self.address = "{}:{}".format(*self._listener.getsockname())
        self._run(self._accept)

    def allow(self, *, up: float = math.inf, down: float = math.inf) -> None:
        """Let so many more bytes pass each way: 0 holds a direction, infinity opens it."""
        with self._changed:
            self.up, self.down = up, down
            self._changed.notify_all()

    def cut(self) -> None:
        """Break every connection and lose what is held."""
        with self._changed:
            sockets, self._sockets = self._sockets, []
            for sock in sockets:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            self._changed.notify_all()

    def close(self) -> None:
        """End the relay and its threads."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        self.allow()
        for thread in list(self._threads):
            thread.join(5)

    def _run(self, function: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            host, _, port = self._target.rpartition(":")
            try:
                far = socket.create_connection((host, int(port)), 5)
            except OSError:
                near.close()
                continue
            for sock in (near, far):
                sock.settimeout(None)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._changed:
                self._sockets += [near, far]
            self._run(self._relay, near, far)

    def _relay(self, near: socket.socket, far: socket.socket) -> None:
        """Carry both directions of one connection; end both when either ends."""
        back = threading.Thread(target=self._pump, args=(far, near, "down"), daemon=True)
        back.start()
        self._pump(near, far, "up")
        back.join()
        near.close()
        far.close()

    def _pump(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                with self._changed:
                    self._changed.wait_for(lambda: getattr(self, way) > 0 or source not in self._sockets)
                    if source not in self._sockets:
                        break
                    setattr(self, way, getattr(self, way) - len(data))
                sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def make_proxy() -> Iterator[Callable[[str], Proxy]]:
    """Make relays in front of addresses: `make_proxy("127.0.0.1:4000")`."""
    made: list[Proxy] = []

    def make(target: str) -> Proxy:
        made.append(Proxy(target))
        return made[-1]

    yield make
    for proxy in made:
        proxy.close()
