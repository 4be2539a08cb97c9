"""The hash table beside PyPI's `kademlia` and `libp2p`: 50 nodes each, real sockets on loopback, one contender after the other.

35 nodes live in one process and 15 in another, which is then killed with SIGKILL: 30 % of the network is gone without a word.
Values are put and got by nodes of the first process; a value is got by a node that does not hold it, and values that all of
them hold are left out. `--nodes N`, `--values N`, `--seed N`, `--only NAME`. kademlia and libp2p are installed, pinned and
hashed, into environments of their own under the user's cache folder; libp2p needs a C compiler and libgmp for that, and is
left out, with the reason, where it does not install.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
from processes import Part

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "dht.json"
KILLED_SHARE = 0.3
# After the kill fewer are got: a contender that waits five seconds for each dead node would take all day.
KILLED_VALUES_MAX = 60
# What nodes do of themselves after joining should be over before anything is measured.
WARM_SECONDS = 60.0
REST_SECONDS = 20.0
PEERS = ("kademlia", "libp2p")


def installed(name: str) -> str:
    """Give the interpreter of a peer's environment, made at the first call. Raises OSError with the reason if it cannot be."""
    lock = HERE / "dht_requirements" / f"{name}.lock"
    mark = hashlib.blake2b(lock.read_bytes() + sys.version.encode(), digest_size=6).hexdigest()
    folder = platformdirs.user_cache_path("p2pnode") / "benchmarks" / f"{name}-{mark}"
    python = folder / "bin" / "python"
    done = folder / ".installed"
    if not done.exists():
        print(f"installing {name} into {folder}", file=sys.stderr)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--require-hashes", "-r", str(lock)]
        for command in ([sys.executable, "-m", "venv", str(folder)], pip):
            ran = subprocess.run(command, capture_output=True, text=True, check=False)
            if ran.returncode:
                raise OSError((ran.stderr.strip() or "it gave no reason").splitlines()[-1])
        done.touch()
    return str(python)


def plans(nodes: int, values: int, seed: int) -> tuple[list[tuple[int, int]], Callable[[list[str]], list[tuple[int, Any]]]]:
    """Give who puts which value, and a function from their names to who gets which: the same for every contender."""
    draw = random.Random(seed)
    puts = [(draw.randrange(nodes), number) for number in range(values)]
    readers = [draw.randrange(nodes) for _ in range(values)]
    return puts, lambda names: [
        (reader, (name, number)) for number, (reader, name) in enumerate(zip(readers, names, strict=True))
    ]


def measure(name: str, python: str, nodes: int, values: int, seed: int) -> dict[str, float]:
    """Run one contender and give its figures: times in milliseconds, memory in bytes, shares from 0 to 1."""
    mortal = round(nodes * KILLED_SHARE)
    stay = nodes - mortal
    script = str(HERE / f"dht_{name}.py")
    survivors, victims = Part(script, python=python), Part(script, python=python)
    parts = (survivors, victims)
    try:
        first = survivors.ask(do="start", count=stay, bootstrap=None)
        second = victims.ask(do="start", count=mortal, bootstrap=first["address"])
        settled = [part.ask(do="settle") for part in parts]

        def requests() -> int:
            return sum(part.ask(do="requests")["requests"] for part in parts)

        survivors.ask(**{"do": "rest", "for": WARM_SECONDS})
        rested = requests()
        survivors.ask(**{"do": "rest", "for": REST_SECONDS})
        at_rest = requests() - rested
        puts, gets_of = plans(stay, values, seed)
        before = requests()
        put = survivors.ask(do="put", plan=puts, nodes=stay)
        between = requests()
        gets = gets_of([name for name, _ in put["results"]])
        got = survivors.ask(do="get", plan=gets, nodes=stay)
        after = requests()
        memory = survivors.ask(do="requests")["memory_bytes"]
        empty = survivors.hello["memory_bytes"]
        victims.kill()
        killed = survivors.ask(do="get", plan=gets[:KILLED_VALUES_MAX], nodes=stay)
    finally:
        for part in parts:
            part.close()
    rest = at_rest / REST_SECONDS
    return {
        "join_seconds": first["seconds"] + second["seconds"] + max(part["seconds"] for part in settled),
        "join_cpu_seconds": sum(part["cpu_seconds"] for part in (first, second, *settled)),
        "neighbours": settled[0]["neighbours"],
        "put_p50": quantile(put["times"], 0.5),
        "put_p95": quantile(put["times"], 0.95),
        "put_stored": statistics.mean(stored for _, stored in put["results"]),
        "put_requests": max(0.0, between - before - rest * put["seconds"]) / values,
        "get_p50": quantile(got["times"], 0.5),
        "get_p95": quantile(got["times"], 0.95),
        "get_found": statistics.mean(got["results"]),
        "get_requests": max(0.0, after - between - rest * got["seconds"]) / len(got["times"]),
        "copies": statistics.mean(got["copies"]),
        "killed_p50": quantile(killed["times"], 0.5),
        "killed_p95": quantile(killed["times"], 0.95),
        "killed_found": statistics.mean(killed["results"]),
        "rest_requests": rest * 60 / nodes,
        "memory_bytes": (memory - empty) / stay,
        "cpu_ms_per_get": 1000 * got["cpu_seconds"] / len(got["times"]),
    }


def quantile(times: list[float], share: float) -> float:
    """Give the time that so many stay under, in milliseconds."""
    return 1000 * sorted(times)[min(len(times) - 1, int(share * len(times)))]


# name of the figure, what it is, its format, and whether less is better (None: no judgement, no ratio)
ROWS: tuple[tuple[str, str, str, bool | None], ...] = (
    ("put_p50", "put, p50, ms", "{:.1f}", True),
    ("put_p95", "put, p95, ms", "{:.1f}", True),
    ("put_stored", "put, said to be stored", "{:.1%}", None),
    ("put_requests", "requests per put", "{:.1f}", True),
    ("copies", "copies of a value among the 70 % that stay", "{:.1f}", None),
    ("get_p50", "get, p50, ms", "{:.1f}", True),
    ("get_p95", "get, p95, ms", "{:.1f}", True),
    ("get_found", "get, found", "{:.1%}", False),
    ("get_requests", "requests per get", "{:.1f}", True),
    ("cpu_ms_per_get", "CPU per get, the asking process, ms", "{:.1f}", True),
    ("killed_found", "get, found, 30 % killed", "{:.1%}", False),
    ("killed_p50", "get, p50, 30 % killed, ms", "{:.1f}", True),
    ("killed_p95", "get, p95, 30 % killed, ms", "{:.1f}", True),
    ("join_seconds", "all joined and settled, s", "{:.1f}", True),
    ("join_cpu_seconds", "CPU for that, s", "{:.1f}", True),
    ("neighbours", "known nodes per node", "{:.1f}", None),
    ("rest_requests", "requests per node and minute at rest, after a minute", "{:.1f}", None),
    ("memory_bytes", "memory per node, kB", "{:.0f}", True),
)


def table(results: dict[str, dict[str, float]]) -> str:
    """Give the figures as a table: each contender's, and p2pnode's divided by it."""
    head = "".join(f" {name} |" + (f" p2pnode / {name} |" if name != "p2pnode" else "") for name in results)
    lines = [f"| |{head}", "|---|" + "---|" * head.count("|")]
    ours = results.get("p2pnode")
    for key, title, form, better in ROWS:
        cells = ""
        for name, figures in results.items():
            value = figures[key] / (1000 if key == "memory_bytes" else 1)
            cells += f" {form.format(value)} |"
            if name != "p2pnode":
                judged = ours is not None and better is not None and figures[key]
                cells += f" {ours[key] / figures[key]:.2f} |" if ours is not None and judged else " |"
        lines.append(f"| {title} |{cells}")
    return "\n".join(lines)


def main() -> None:
    """Measure, print and write down."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--nodes", type=int, default=50)
    options.add_argument("--values", type=int, default=200)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--only", choices=("p2pnode", *PEERS))
    chosen = options.parse_args()
    results: dict[str, dict[str, float]] = {}
    left_out: dict[str, str] = {}
    for name in ("p2pnode", *PEERS):
        if chosen.only not in (None, name):
            continue
        try:
            python = sys.executable if name == "p2pnode" else installed(name)
        except OSError as error:
            left_out[name] = str(error)
            continue
        print(f"measuring {name}", file=sys.stderr)
        results[name] = measure(name, python, chosen.nodes, chosen.values, chosen.seed)
        print(json.dumps(results[name]), file=sys.stderr)
    machine = f"Python {platform.python_version()}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}"
    print(f"{machine}; {chosen.nodes} nodes, {chosen.values} values, seed {chosen.seed}\n\n{table(results)}")
    for name, reason in left_out.items():
        print(f"\n{name} was left out, because it does not install here: {reason}")
    if chosen.only is None:
        RESULTS.parent.mkdir(exist_ok=True)
        facts = {"machine": machine, "date": time.strftime("%Y-%m-%d"), **vars(chosen), "left_out": left_out}
        RESULTS.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
