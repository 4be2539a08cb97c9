"""`map` killed with SIGKILL again and again: it continues, loses nothing and pays nothing twice."""

import sqlite3
import subprocess
import sys
import textwrap
import time

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

pytestmark = pytest.mark.slow

ITEMS = 300
PROGRAM = textwrap.dedent("""
    import sys
    import p2pnode

    model, data, output, total = sys.argv[1:]
    with p2pnode.connect(embed=True) as network:
        for event in network.map(model, data, output, batch=1, max_total=total):
            print(event["done"], event["end_reason"], flush=True)
""")


@pytest.fixture
def model(tmp_path):
    """Squares a row, after enough work that kills fall into every state."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 64])
    weights = helper.make_tensor("w", TensorProto.FLOAT, [64, 64], np.eye(64, dtype=np.float32).tobytes(), raw=True)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("Mul", ["a", "a"], ["y"])]
    graph = helper.make_graph(nodes, "square", [x], [y], [weights])
    path = tmp_path / "square.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def spent(buyer):
    with sqlite3.connect(buyer.home / "data" / "p2pnode.db", timeout=10) as connection:
        paid, open_count = connection.execute(
            "SELECT coalesce(sum(paid), 0), coalesce(sum(state <> 'ended'), 0) FROM agreements WHERE role = 'client'"
        ).fetchone()
    connection.close()
    return paid, open_count


@pytest.mark.parametrize("at_the_end", [0.0, 0.01])
def test_killed_at_any_point_it_continues_and_pays_once(make_daemon, model, tmp_path, at_the_end):
    sellers = [make_daemon(name, {"provide.call_price": "0.001"}).start() for name in ("one", "two")]
    # A hedge is a second copy that is paid on purpose; here every item has one.
    addresses = ",".join(seller.address for seller in sellers)
    buyer = make_daemon("buyer", {"network.static_peers": addresses, "client.hedging": "false"})
    data, output = tmp_path / "data.npy", tmp_path / "out.npy"
    rows = np.arange(ITEMS * 64, dtype=np.float32).reshape(ITEMS, 64)
    np.save(data, rows)

    def start():
        command = [sys.executable, "-c", PROGRAM, str(model), str(data), str(output), "1"]
        return subprocess.Popen(command, env=buyer.environment, stdout=subprocess.PIPE, text=True)

    for enough in (1, 30, 80, 81, 130, 180):
        process = start()
        for line in process.stdout:
            if int(line.split()[0]) >= enough:
                break
        process.kill()
        process.wait()
        process.stdout.close()
    process = start()
    first = next(done for line in process.stdout if (done := int(line.split()[0])))
    assert first >= 180, "what was done before the last kill is not done again"
    # Once more where it looks complete: the output is there, its parts go, its end is being written.
    while not output.exists() and process.poll() is None:
        time.sleep(0.0005)
    time.sleep(at_the_end)
    process.kill()
    process.wait()
    process.stdout.close()
    process = start()
    lines = process.stdout.read().splitlines()
    process.stdout.close()
    assert process.wait() == 0
    assert lines[-1].split() == [str(ITEMS), "completed"]
    assert np.array_equal(np.load(output), rows * rows)
    paid, open_count = spent(buyer)
    assert open_count == 0
    assert ITEMS * 1000 <= paid <= ITEMS * 1002, "every item was paid exactly once"
    # Both sides hold the same books.
    deadline = time.monotonic() + 20
    while any(seller.query("SELECT 1 FROM agreements WHERE state <> 'ended'") for seller in sellers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    earned = sum(seller.query("SELECT coalesce(sum(paid), 0) FROM agreements")[0][0] for seller in sellers)
    assert earned == paid
