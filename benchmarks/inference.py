"""p2pnode with every promise on, beside a gRPC + TLS ONNX server, beside the model itself, started anew for every round.

Prints, per tensor size, the median of paired rounds: time added per call over `session.run` (p50), calls per second with 32
in flight, and CPU seconds per call of all processes, each as p2pnode / gRPC. `--rounds N`, `--json`.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from models import reduce_model
from processes import Part, tree_cpu_seconds

HERE = Path(__file__).parent
SIZES = {"4 KB": (4096, 400, 1500), "600 KB": (600_000, 100, 300), "12 MB": (12_000_000, 12, 48)}
GOALS = {"added": {"4 KB": 0.7, "600 KB": 1.0, "12 MB": 0.5}, "rate": dict.fromkeys(SIZES, 1.5)}
GOALS["cpu"] = {"4 KB": 1.0, "600 KB": 1.0, "12 MB": 0.6}
IN_FLIGHT = 32


def direct_p50(size: int, calls: int) -> float:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(reduce_model(), options, providers=["CPUExecutionProvider"])
    array = np.random.default_rng(1).random(size // 4, np.float32)
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        session.run(None, {"x": array})
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure(client: Part, roots: tuple[int, ...], size: int, calls: int, many: int) -> dict[str, float]:
    latency = client.ask(what="latency", bytes=size, calls=calls)["p50"]
    before = tree_cpu_seconds(*roots)
    rate = client.ask(what="rate", bytes=size, calls=many, in_flight=IN_FLIGHT)["rate"]
    return {"p50": latency, "rate": rate, "cpu": (tree_cpu_seconds(*roots) - before) / many}


@contextmanager
def started() -> Iterator[dict[str, tuple[Part, tuple[int, ...]]]]:
    """Give both systems, freshly started: gRPC's 12 MB took 12 ms in some pairs of processes and 24 ms in others."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:

        def part(*arguments: str) -> Part:
            each = Part(*arguments)
            stack.callback(each.close)
            return each

        systems = {}
        for name, script, place in (("grpc", "grpc_peer.py", ()), ("p2pnode", "p2pnode_peer.py", (folder,))):
            server = part(str(HERE / script), "serve", *place)
            client = part(str(HERE / script), "client", *place, json.dumps(server.hello))
            systems[name] = client, (server.pid, client.pid)
        yield systems


def run_rounds(rounds: int) -> dict[str, dict[str, list[dict[str, float]]]]:
    results: dict[str, dict[str, list[dict[str, float]]]] = {name: {"grpc": [], "p2pnode": [], "direct": []} for name in SIZES}
    for number in range(rounds):
        with started() as systems:
            for name, (size, calls, many) in SIZES.items():
                for client, _ in systems.values():
                    client.ask(what="latency", bytes=size, calls=max(5, calls // 4))
                results[name]["direct"].append({"p50": direct_p50(size, calls)})
                for system in list(systems) if number % 2 else list(reversed(systems)):
                    results[name][system].append(measure(*systems[system], size, calls, many))
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    return results


def ratios(cell: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    added, rate, cpu = [], [], []
    for ours, theirs, direct in zip(cell["p2pnode"], cell["grpc"], cell["direct"], strict=True):
        added.append((ours["p50"] - direct["p50"]) / (theirs["p50"] - direct["p50"]))
        rate.append(ours["rate"] / theirs["rate"])
        cpu.append(ours["cpu"] / theirs["cpu"])
    return {"added": statistics.median(added), "rate": statistics.median(rate), "cpu": statistics.median(cpu)}


def table(results: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    words = {"added": "time added per call, p50", "rate": "calls/s, 32 in flight", "cpu": "CPU per call, all processes"}
    all_ratios = {size: ratios(cell) for size, cell in results.items()}
    lines = [f"| relative to gRPC + TLS | {' | '.join(results)} |", "|---|" + "---|" * len(results)]
    for key, text in words.items():
        cells = []
        for size in results:
            value, goal = all_ratios[size][key], GOALS[key][size]
            met = value >= goal if key == "rate" else value <= goal
            cells.append(f"{value:.2f} ({'meets' if met else 'misses'} {goal})")
        lines.append(f"| {text} | {' | '.join(cells)} |")
    lines.append("")
    for size, cell in results.items():
        for system in ("direct", "grpc", "p2pnode"):
            medians = {k: statistics.median(r[k] for r in cell[system]) for k in cell[system][0]}
            text = ", ".join(f"{k} {v:,.0f}/s" if k == "rate" else f"{k} {v * 1e3:.3f} ms" for k, v in medians.items())
            lines.append(f"- {size}, {system}: {text}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = run_rounds(options.rounds)
    if options.json:
        print(json.dumps(results))
        return
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, {options.rounds} paired rounds\n")
    print(table(results))


if __name__ == "__main__":
    main()
