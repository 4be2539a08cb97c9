"""A real daemon process: starts, answers its owner, reads settings again, refuses a second one, stops in order."""

import os
import signal
import subprocess
import sys
import time

import pytest

from p2pnode.control.client import ControlClient

pytestmark = pytest.mark.slow

PROGRAM = (
    "from p2pnode.api.server import ControlServer\n"
    "from p2pnode.errors import P2PNodeError\n"
    "from p2pnode.node.config import load_config\n"
    "from p2pnode.node.main import run_daemon\n"
    "try:\n"
    "    run_daemon(load_config(), ControlServer)\n"
    "except P2PNodeError as error:\n"
    "    raise SystemExit(f'{type(error).__name__}: {error}')\n"
)


def start(home, **settings):
    environment = {**os.environ, "P2PNODE_HOME": str(home), "P2PNODE_NETWORK_PROFILE": "local", **settings}
    return subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment, stderr=subprocess.PIPE, text=True)


def wait(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)


@pytest.fixture
def home(tmp_path):
    (tmp_path / "config").mkdir()
    return tmp_path


@pytest.fixture
def daemon(home):
    process = start(home)
    client = ControlClient(home / "data")
    wait(lambda: process.poll() is not None or client.alive())
    assert process.poll() is None, process.stderr.read()
    yield process, client
    client.close()
    if process.poll() is None:
        process.kill()
    process.wait()
    process.stderr.close()


def test_the_owner_sees_and_steers_it(daemon, home):
    process, client = daemon
    status = client.get("/v1/status")
    assert status["state"] == "taking work"
    assert status["listen"][0].startswith("127.0.0.1:")
    assert (home / "data" / "daemon.pid").read_text() == f"{process.pid}\n"
    assert client.post("/v1/pause", {"seconds": 60})["state"] == "paused"
    assert any("resume" in sentence for sentence in client.get("/v1/why")["sentences"])
    assert client.post("/v1/resume")["state"] == "taking work"
    assert "p2pnode_store_commits_total" in client.text("/v1/metrics")
    assert client.get("/v1/ledger")["accounts"] == []
    assert len(client.get("/v1")["routes"]) > 30


def test_settings_are_read_again_on_sighup_and_by_patch(daemon, home):
    process, client = daemon
    (home / "config" / "config.toml").write_text('[provide]\nprice = "2"\n')
    process.send_signal(signal.SIGHUP)
    wait(lambda: client.get("/v1/status")["market"]["operations_price"] == 2000)


def test_a_second_daemon_on_the_same_folder_is_refused(daemon, home):
    process, client = daemon
    second = start(home)
    _, told = second.communicate(timeout=20)
    assert second.returncode != 0
    assert str(process.pid) in told
    assert "P2PNODE_HOME" in told
    assert client.alive()


@pytest.mark.parametrize("how", ["signal", "api"])
def test_it_stops_in_order(daemon, home, how):
    process, client = daemon
    if how == "signal":
        process.send_signal(signal.SIGTERM)
    else:
        client.post("/v1/stop")
    _, told = process.communicate(timeout=20)
    assert process.returncode == 0, told
    assert "Traceback" not in told
    assert not (home / "data" / "api.sock").exists()
    assert not (home / "data" / "daemon.pid").exists()


def test_killed_it_starts_again(daemon, home):
    process, client = daemon
    node = client.get("/v1/status")["node"]
    process.kill()
    process.communicate()
    again = start(home)
    try:
        wait(lambda: again.poll() is not None or client.alive())
        assert client.get("/v1/status")["node"] == node
    finally:
        again.terminate()
        again.communicate(timeout=20)


def test_an_idle_daemon_is_small_and_does_not_import_the_engine(daemon):
    process, _ = daemon
    with open(f"/proc/{process.pid}/status") as file:
        size = next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))
    assert size < 120 * 1024
    with open(f"/proc/{process.pid}/maps") as file:
        assert "onnxruntime" not in file.read()
