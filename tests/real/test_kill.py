"""SIGKILL at every state of a job: provider, client and worker. Nothing is lost, and nothing is paid twice.

A state between two messages is made to last by a relay that holds one direction; one inside a process by SIGSTOP. Each case
ends with the same checks of the map's output and of both sides' books. Normal runs take a seeded sample of the cases;
`make kill-matrix` takes them all.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from p2pnode.store import accounts

pytestmark = pytest.mark.slow

ROWS, WIDTH, SLICE_CALLS = 24, 2048, 4
MAP_SECONDS = 90.0
BIG_MODEL_BYTES = 24 << 20

CLIENT = ("quoting", "ordered", "calling", "receipt-unseen", "cheque-unsent", "assembling", "finishing")
PROVIDER = ("fetching", "inspecting", "loading", "running", "receipt-undelivered", "cheque-unstored")
WORKER = ("loading", "running", "idle")
CASES = [("client", state) for state in CLIENT]
CASES += [("provider", state) for state in PROVIDER]
CASES += [("worker", state) for state in WORKER]
SAMPLE_SEED = 1
_draw = random.Random(SAMPLE_SEED)
_of = {victim: [case for case in CASES if case[0] == victim] for victim in ("client", "provider", "worker")}
SAMPLE = [*_draw.sample(_of["client"], 2), *_draw.sample(_of["provider"], 3), *_draw.sample(_of["worker"], 1)]


def slow_model(path: Path, *, big: bool = False, slow_to_load: bool = False) -> Path:
    """Write a model that takes some 20 ms a call: a Loop. big: long to fetch. slow_to_load: folds constants for a while."""
    body = helper.make_graph(
        [
            helper.make_node("Mul", ["v", "factor"], ["scaled"]),
            helper.make_node("Add", ["scaled", "shift"], ["next"]),
            helper.make_node("Identity", ["go"], ["still"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, None),
        ],
        [numpy_helper.from_array(np.float32(1.0001), "factor"), numpy_helper.from_array(np.float32(0.01), "shift")],
    )
    constants = [numpy_helper.from_array(np.int64(2500), "times"), numpy_helper.from_array(np.bool_(True), "yes")]
    nodes = [helper.make_node("Loop", ["times", "yes", "x"], ["looped"], body=body)]
    last = "looped"
    if big:
        weights = np.random.default_rng(7).random((BIG_MODEL_BYTES // 4 // WIDTH, WIDTH), np.float32)
        constants += [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(np.array([3]), "third")]
        nodes += [helper.make_node("Gather", ["weights", "third"], ["row"]), helper.make_node("Add", [last, "row"], ["moved"])]
        last = "moved"
    if slow_to_load:
        size = 1200
        constants.append(numpy_helper.from_array(np.array([size, size]), "square"))
        half = numpy_helper.from_array(np.array([1 / size], np.float32))
        nodes.append(helper.make_node("ConstantOfShape", ["square"], ["m0"], value=half))
        nodes += [helper.make_node("MatMul", [f"m{n}", "m0"], [f"m{n + 1}"]) for n in range(40)]
        nodes += [helper.make_node("ReduceMax", ["m40"], ["top"], keepdims=0), helper.make_node("Add", [last, "top"], ["lifted"])]
        last = "lifted"
    nodes.append(helper.make_node("Identity", [last], ["y"]))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", WIDTH]) for name in "xy")
    graph = helper.make_graph(nodes, "slow", [x], [y], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


class Scene:
    """A provider behind a relay, and a map over some rows whose client process can be killed and started again."""

    def __init__(self, folder: Path, make_daemon: Callable[..., Any], make_proxy: Callable[..., Any], state: str) -> None:
        self.folder = folder
        self.model = slow_model(folder / "model.onnx", big=state == "fetching", slow_to_load=state == "loading")
        self.data = folder / "rows.npy"
        np.save(self.data, np.random.default_rng(1).random((ROWS, WIDTH), np.float32))
        self.output = folder / "out.jsonl"
        self.provider = make_daemon("provider", {"provide.call_price": "0.001"})
        self.proxy = make_proxy(self.provider.address)
        self.provider.settings["network.announce"] = self.proxy.address
        self.client = make_daemon(
            "client",
            {
                "network.static_peers": self.proxy.address,
                "client.slice_calls": str(SLICE_CALLS),
                "provide.enabled": "false",
            },
        )
        self.client.home.mkdir()
        self.map: subprocess.Popen[bytes] | None = None
        self._stopped: list[int] = []

    def start_map(self) -> None:
        """Start the map: always the same command."""
        self.map = self.client.process = self.client.spawn(
            "map", str(self.model), str(self.data), "-o", str(self.output), "--batch", "1", "--max-total", "100", "--json"
        )

    def finish_map(self) -> None:
        """Wait for the map's end and insist that it completed."""
        assert self.map is not None
        assert self.map.wait(MAP_SECONDS) == 0, self.client.log
        self.client.process = None

    def until(self, condition: Callable[[], Any], seconds: float = 45.0) -> None:
        """Wait for a state of the running job; a map that ends before is a failure of the test."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.map is None or self.map.poll() is None, f"the map ended first: {self.client.log}"
            assert time.monotonic() < deadline, f"the state did not come: {self.client.log} {self.provider.log}"
            time.sleep(0.0005)

    def pause_process(self, process: int) -> None:
        """SIGSTOP until the case is over."""
        os.kill(process, signal.SIGSTOP)
        self._stopped.append(process)

    def wake_all(self) -> None:
        """SIGCONT whoever was stopped and lives."""
        for process in self._stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)
        self._stopped.clear()

    def items(self, state: str) -> int:
        """Count the map's items in a state, as the client's database has it."""
        rows = self.client.query(f"SELECT count(*) FROM items WHERE state = '{state}'")
        return int(rows[0][0]) if rows else 0

    def unpaid_receipts(self) -> int:
        """Count the provider's receipts that no cheque covers."""
        rows = self.provider.query("SELECT (SELECT count(*) FROM receipts) - (SELECT count(*) FROM cheques)")
        return int(rows[0][0]) if rows else 0

    def zygote(self) -> int:
        """Give the process that forks the provider's workers."""
        assert self.provider.process is not None
        found = _children(self.provider.process.pid)
        assert len(found) == 1, found
        return found[0]

    def busy_worker(self) -> int | None:
        """Give a child of the zygote that has used the processor for a while, if there is one."""
        return next((child for child in self.provider.workers() if _cpu_seconds(child) > 0.15), None)


def _children(process: int) -> list[int]:
    return [
        int(child)
        for task in os.listdir(f"/proc/{process}/task")
        for child in Path(f"/proc/{process}/task/{task}/children").read_text().split()
    ]


def _is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _cpu_seconds(process: int) -> float:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- bringing a scene into a state ------------------------------------------------------------------------------------


def reach(scene: Scene, victim: str, state: str) -> None:
    """Start the map and hold everything in the state in which the victim is to die."""
    if state in ("quoting", "inspecting"):
        # Inspecting needs a child of the zygote: a zygote that sleeps keeps provider and client where they are.
        scene.pause_process(scene.zygote())
        scene.start_map()
        scene.until(lambda: scene.provider.counter("model_fetched_bytes_total") > 0)
        time.sleep(0.1)
        assert not scene.client.query("SELECT 1 FROM agreements")
        return
    if state == "fetching":
        scene.proxy.allow(up=BIG_MODEL_BYTES // 3)
    scene.start_map()
    match state:
        case "fetching":
            scene.until(lambda: scene.proxy.up <= 0)
            time.sleep(0.05)
            assert 0 < scene.provider.counter("model_fetched_bytes_total") < BIG_MODEL_BYTES
        case "loading":
            scene.until(scene.busy_worker)
            assert not scene.client.query("SELECT 1 FROM agreements")
        case "ordered":
            scene.until(lambda: scene.client.query("SELECT 1 FROM agreements"))
        case "calling" | "running":
            scene.until(lambda: scene.items("done") >= 3 and scene.items("placed"))
        case "receipt-unseen" | "receipt-undelivered":
            scene.until(lambda: scene.items("done") >= 3)
            scene.proxy.allow(down=0)
            scene.until(scene.unpaid_receipts)
        case "cheque-unsent" | "cheque-unstored":
            scene.until(lambda: scene.items("done") >= 3)
            scene.proxy.allow(up=0)
            scene.until(lambda: _cheques(scene.client) > _cheques(scene.provider))
        case "assembling":
            writing = scene.output.with_name(scene.output.name + ".writing")
            scene.until(writing.exists)
        case "finishing":
            # From here on its parts go and its end is written; it may even be over.
            while scene.map.poll() is None and not scene.output.exists():
                time.sleep(0.0002)
        case "idle":
            scene.finish_map()


def _cheques(daemon: Any) -> int:
    rows = daemon.query("SELECT count(*) FROM cheques")
    return int(rows[0][0]) if rows else 0


def strike(scene: Scene, victim: str, state: str) -> None:
    """Kill the victim in its state and start again what a user would start again."""
    if victim == "client":
        assert scene.map is not None
        scene.map.kill()
        scene.map.wait()
        scene.proxy.cut()
        scene.proxy.allow()
        scene.wake_all()
        scene.start_map()
    elif victim == "provider":
        scene.provider.kill()
        scene.proxy.cut()
        scene.proxy.allow()
        scene.wake_all()
        scene.provider.start()
    else:
        workers = [scene.busy_worker()] if state == "loading" else scene.provider.workers()
        assert workers
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        if state == "idle":
            scene.output.unlink()
            scene.start_map()


# --- what must be true afterwards -------------------------------------------------------------------------------------


def check_output(scene: Scene) -> None:
    """The map's output is the local answer, row by row, to the last bit."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(scene.model), options, providers=["CPUExecutionProvider"])
    rows = np.load(scene.data)
    lines = scene.output.read_text().splitlines()
    assert len(lines) == ROWS
    for row, line in zip(rows, lines, strict=True):
        (value,) = json.loads(line).values()
        assert np.array_equal(np.asarray(value, np.float32).reshape(1, -1), session.run(None, {"x": row[None]})[0])
    assert not scene.output.with_name(scene.output.name + ".parts").exists()


def check_books(scene: Scene, maps: int, slack: int) -> None:
    """Both ledgers balance and agree; every call is paid once; every job and agreement has one end or can go on."""
    bought, sold = _settled(scene)
    for daemon in (scene.client, scene.provider):
        with daemon.database() as connection:
            accounts.check_balanced(connection)
    # No input was ever charged twice: rows are all different, so is every leaf of every receipt that was paid.
    twice = scene.client.query("SELECT hex(input_hash), count(*) FROM calls GROUP BY 1 HAVING count(*) > 1")
    assert not twice or maps > 1, f"paid twice: {twice}"
    # What a provider had not signed when it was killed is its own loss: less than a slice.
    charged = scene.client.query("SELECT count(*) FROM calls")[0][0]
    assert ROWS * maps - slack <= charged <= ROWS * maps
    spent = scene.client.query("SELECT coalesce(sum(amount), 0) FROM balances WHERE account = 'spend'")[0][0]
    assert spent == scene.client.query("SELECT coalesce(sum(amount), 0) FROM receipts")[0][0]
    assert spent == sum(paid for paid, _, _ in bought.values())
    earned = -scene.provider.query("SELECT coalesce(sum(amount), 0) FROM balances WHERE account = 'income'")[0][0]
    assert spent == earned > 0
    for agreement, (paid, _, end) in bought.items():
        assert end, "the client's agreements have ended with its map"
        if agreement in sold:
            assert sold[agreement][0] == paid
            assert sold[agreement][1] == paid, "nothing is receipted and unpaid"
            assert sold[agreement][2] == end, "the same end on both sides"
    assert not set(sold) - set(bought)
    jobs = scene.client.query("SELECT state, end_reason FROM jobs WHERE kind = 'map'")
    assert jobs == [("ended", "completed")] * maps


def _settled(scene: Scene) -> tuple[dict[bytes, tuple[int, int, str]], dict[bytes, tuple[int, int, str]]]:
    """Give both sides' agreements as id -> (paid, receipted, end reason), once the provider has ended its own."""
    query = "SELECT id, paid, total, end_reason FROM agreements"
    deadline = time.monotonic() + 10
    while True:
        bought, sold = ({row[0]: row[1:] for row in daemon.query(query)} for daemon in (scene.client, scene.provider))
        if all(end for _, _, end in sold.values()) or time.monotonic() > deadline:
            return bought, sold
        time.sleep(0.05)


@pytest.fixture
def scene(tmp_path: Path, make_daemon: Callable[..., Any], make_proxy: Callable[..., Any], request: Any) -> Iterator[Scene]:
    made = Scene(tmp_path, make_daemon, make_proxy, request.param)
    made.provider.start()
    yield made
    made.wake_all()


def run_case(scene: Scene, victim: str, state: str) -> None:
    """One cell of the matrix."""
    reach(scene, victim, state)
    before = set(scene.provider.workers())
    strike(scene, victim, state)
    scene.finish_map()
    check_output(scene)
    check_books(scene, 2 if state == "idle" else 1, SLICE_CALLS if victim == "provider" else 0)
    assert scene.provider.control.alive(), "the provider lives"
    if victim == "provider":
        assert not [worker for worker in before if _is_alive(worker)], "workers die with their daemon"


def _cases(cases: list[tuple[str, str]]) -> Any:
    return pytest.mark.parametrize(
        ("victim", "state", "scene"), [pytest.param(victim, state, state, id=f"{victim}-{state}") for victim, state in cases],
        indirect=["scene"],
    )  # fmt: skip


@_cases(SAMPLE)
def test_killed(scene: Scene, victim: str, state: str) -> None:
    run_case(scene, victim, state)


@pytest.mark.matrix
@_cases([case for case in CASES if case not in SAMPLE])
def test_killed_in_every_other_state(scene: Scene, victim: str, state: str) -> None:
    run_case(scene, victim, state)
