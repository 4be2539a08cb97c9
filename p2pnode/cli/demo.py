"""`p2pnode demo`: the main job on one machine. Three daemons, a client, three real models, every receipt verified from files."""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from p2pnode.cli.output import Json, guarded, table

DAEMONS = 3
FOUND_SECONDS = 20.0


@guarded
def demo(
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the folder with daemons, logs and receipts.", envvar="P2PNODE_DEMO_KEEP")
    ] = False,
    as_json: Json = False,
) -> None:
    """Start three daemons and a client here, run three real models over them, and verify every receipt from files."""
    import json

    from p2pnode.cli.exit_codes import VerificationFailed

    folder = Path(tempfile.mkdtemp(prefix="p2pnode-demo-"))
    say = (lambda *_: None) if as_json else print
    try:
        outcomes, receipts = _main_job(folder, say)
        say("\nall daemons are stopped; verifying every receipt again, from files alone")
        checked = _verify(receipts, say)
    finally:
        if keep:
            print(f"kept {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    agreed = all(outcome["agrees"] and outcome["receipts"] for outcome in outcomes) and bool(checked) and all(checked.values())
    if as_json:
        print(json.dumps({"agreed": agreed, "jobs": outcomes, "receipts": checked}, indent=2))
    if not agreed:
        raise VerificationFailed("an answer or a receipt is not what it should be")
    say(f"\n{len(outcomes)} jobs agree with the packages' own answers, {len(checked)} receipts verify")


def _main_job(folder: Path, say: Callable[..., None]) -> tuple[list[dict[str, Any]], list[Path]]:
    import p2pnode
    from p2pnode.cli.demo_jobs import DEMO_JOBS
    from p2pnode.control.client import ControlClient
    from p2pnode.node.config import load_config

    network = f"demo-{os.getpid()}"
    homes = [folder / f"daemon{number}" for number in range(1, DAEMONS + 1)]
    with _daemons(homes, network, say), _daemons([folder / "client"], network, say, PROVIDE_ENABLED="false"):
        control = ControlClient(folder / "client" / "data")
        _meet(control, homes, say)
        outcomes = []
        with p2pnode.connect(config=load_config(_environment(folder / "client", network)), embed=False) as connection:
            for job in DEMO_JOBS:
                say(f"\n{job.title}")
                outcome = job.run(connection, control, folder)
                say(table(("input", "over the network", "the package itself", ""), outcome.pop("rows")))
                say(
                    f"provider {', '.join(outcome['providers'])}…   price {outcome['credits']} credits   "
                    f"{outcome['calls']} calls, median {outcome['milliseconds']:.1f} ms   {outcome['bytes']} bytes   "
                    f"receipts {'verified' if outcome['receipts'] else 'MISSING'}"
                )
                outcomes.append(outcome)
        receipts = _save_receipts(control, folder, say)
        control.close()
    return outcomes, receipts


@contextmanager
def _daemons(homes: list[Path], network: str, say: Callable[..., None], **settings: str) -> Iterator[None]:
    """Run daemons as processes of their own; they are told no addresses."""
    import subprocess

    from p2pnode.control.client import ControlClient
    from p2pnode.errors import TooSlow

    processes = []
    try:
        for home in homes:
            home.mkdir()
            with (home / "log").open("wb") as log:
                command = [sys.executable, "-m", "p2pnode.cli.main", "up", "--foreground"]
                environment = _environment(home, network, **settings)
                processes.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
        deadline = time.monotonic() + FOUND_SECONDS  # noqa: TID251 - the command line runs outside any node
        clients = [ControlClient(home / "data") for home in homes]
        while not all(client.alive() for client in clients):
            if time.monotonic() > deadline or any(process.poll() is not None for process in processes):  # noqa: TID251
                logs = "\n".join((home / "log").read_text()[-2000:] for home in homes)
                raise TooSlow(f"the daemons did not start:\n{logs}")
            time.sleep(0.05)  # noqa: TID251
        for home, client in zip(homes, clients, strict=True):
            status = client.get("/v1/status")
            say(f"{home.name}: {status['node'][:21]}… on {status['listen'][0]}, sandbox {status['sandbox']}, {status['state']}")
            client.close()
        yield
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _environment(home: Path, network: str, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("P2PNODE_")}
    settings = {"HOME": str(home), "NETWORK_PROFILE": "local", "NETWORK_ID": network, **more}
    return kept | {f"P2PNODE_{name}": value for name, value in settings.items()}


def _meet(control: Any, homes: list[Path], say: Callable[..., None]) -> None:
    """Wait until the client is connected to every daemon; by static addresses only where multicast does not work."""
    from p2pnode.control.client import ControlClient
    from p2pnode.errors import Unreachable

    if _wait_for_links(control):
        say(f"\nthe client found all {DAEMONS} by mDNS, without being told an address")
        return
    say("\nmulticast does not work on this machine; using the list of addresses instead (network.static_peers)")
    for home in homes:
        with ControlClient(home / "data") as daemon:
            control.post("/v1/peers", {"address": daemon.get("/v1/status")["listen"][0]})
    if not _wait_for_links(control):
        raise Unreachable("the client could not reach the daemons, not even by address")


def _wait_for_links(control: Any) -> bool:
    deadline = time.monotonic() + FOUND_SECONDS  # noqa: TID251 - the command line runs outside any node
    while time.monotonic() < deadline:  # noqa: TID251
        if sum(1 for peer in control.get("/v1/peers")["peers"] if peer["connected"]) >= DAEMONS:
            return True
        time.sleep(0.05)  # noqa: TID251
    return False


def _save_receipts(control: Any, folder: Path, say: Callable[..., None]) -> list[Path]:
    """Write one .receipt file for every call of every slice."""
    from p2pnode.units import format_credits

    paths = []
    rows = control.get("/v1/receipts")["receipts"]
    for row in rows:
        for call in range(row["calls"]):
            path = folder / f"{row['id'][-16:]}-{call}.receipt"
            path.write_bytes(control.exchange("GET", f"/v1/receipts/{row['id']}?call={call}", b""))
            paths.append(path)
    spent = sum(row["amount"] for row in rows)
    say(f"\n{len(rows)} receipts over {len(paths)} calls, {format_credits(spent)} credits, written to files")
    return paths


def _verify(paths: list[Path], say: Callable[..., None]) -> dict[str, bool]:
    from p2pnode.market.receipt_file import verify_bundle

    checked = {}
    for path in paths:
        failed = [check for check in verify_bundle(path.read_bytes()) if not check.ok]
        checked[path.name] = not failed
        for check in failed:
            say(f"{path.name}: {check.name} failed: {check.detail}")
    return checked
