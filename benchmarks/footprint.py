"""What p2pnode costs while it does nothing: processor time of `p2pnode --help`, memory and processor share of an idle daemon.

Run it with `python benchmarks/footprint.py`; it prints one table with the goals. The daemon runs on loopback with a folder of
its own, and its zygote (the process that forks workers) is counted apart.
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = 15
SETTLE_SECONDS = 3.0
IDLE_SECONDS = 20.0
HELP_SECONDS_MAX, MEMORY_MB_MAX, SHARE_MAX = 0.25, 120.0, 0.005
COMMAND = [sys.executable, "-m", "p2pnode.cli.main"]


def cpu_of_help() -> float:
    """Give the processor seconds, user and system, of one `p2pnode --help`."""
    process = subprocess.Popen([*COMMAND, "--help"], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"p2pnode --help ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime


def memory_mb(process: int) -> tuple[float, float]:
    """Give a process's proportional and resident memory in MB (10^6 bytes)."""
    sizes = {}
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in ("Pss", "Rss"):
            sizes[name] = int(rest.split()[0]) * 1024 / 1e6
    return sizes["Pss"], sizes["Rss"]


def cpu_seconds(process: int) -> float:
    """Give the processor seconds that a process has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def children(process: int) -> list[int]:
    """Give the process ids of a process's children."""
    tasks = Path(f"/proc/{process}/task")
    return [int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()]


def start_daemon(home: Path) -> subprocess.Popen[bytes]:
    """Start a daemon and wait until its control socket is there."""
    environment = {**os.environ, "P2PNODE_HOME": str(home), "P2PNODE_NETWORK_PROFILE": "local"}
    daemon = subprocess.Popen([*COMMAND, "up", "--foreground"], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not (home / "data" / "api.sock").exists():
        if daemon.poll() is not None or time.monotonic() > deadline:
            daemon.kill()
            daemon.wait()
            raise SystemExit("the daemon did not start")
        time.sleep(0.05)
    return daemon


def main() -> None:
    """Measure and print the table."""
    cpu_of_help()  # the first run compiles and fills the page cache
    cold = statistics.median(cpu_of_help() for _ in range(RUNS))
    with tempfile.TemporaryDirectory(prefix="p2pnode-footprint-") as folder:
        daemon = start_daemon(Path(folder))
        try:
            time.sleep(SETTLE_SECONDS)
            family = [daemon.pid, *children(daemon.pid)]
            before, began = [cpu_seconds(process) for process in family], time.monotonic()
            time.sleep(IDLE_SECONDS)
            seconds = time.monotonic() - began
            shares = [(cpu_seconds(process) - used) / seconds for process, used in zip(family, before, strict=True)]
            memory = [memory_mb(process) for process in family]
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(30)
    rows = [
        (f"`p2pnode --help`, CPU, median of {RUNS}", f"{cold:.3f} s", f"{HELP_SECONDS_MAX:g} s", cold < HELP_SECONDS_MAX),
        ("idle daemon, RSS", f"{memory[0][1]:.0f} MB", f"{MEMORY_MB_MAX:g} MB", memory[0][1] < MEMORY_MB_MAX),
        ("idle daemon, PSS", f"{memory[0][0]:.0f} MB", "", None),
        ("its zygote, PSS", f"{sum(pss for pss, _ in memory[1:]):.0f} MB", "", None),
        (
            f"idle daemon and zygote, CPU over {IDLE_SECONDS:g} s",
            f"{sum(shares):.2%}",
            f"{SHARE_MAX:.1%}",
            sum(shares) < SHARE_MAX,
        ),
    ]
    print("| | measured | goal | |\n|---|---|---|---|")
    for name, measured, goal, is_met in rows:
        print(f"| {name} | {measured} | {goal} | {'' if is_met is None else 'met' if is_met else 'MISSED'} |")


if __name__ == "__main__":
    main()
