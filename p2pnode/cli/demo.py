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
    agreed = all(outcome["agrees"] for outcome in outcomes) and bool(checked) and all(checked.values())
    if as_json:
        print(json.dumps({"agreed": agreed, "jobs": outcomes, "receipts": checked}, indent=2))
    if not agreed:
        raise VerificationFailed("an answer or a receipt is not what it should be")
    say(f"\n{len(outcomes)} jobs agree with the packages' own answers, {len(checked)} receipts verify")


def _main_job(folder: Path, say: Callable[..., None]) -> tuple[list[dict[str, Any]], list[Path]]:
    from p2pnode.cli.demo_jobs import DEMO_JOBS

    network = f"demo-{os.getpid()}"
    with _daemons(folder, network, say) as homes, _client(folder, network, homes, say) as connection:
        outcomes = []
        for job in DEMO_JOBS:
            say(f"\n{job.title}")
            outcome = job.run(connection, folder)
            say(table(("input", "over the network", "the package itself", ""), outcome.pop("rows")))
            say(
                f"provider {', '.join(outcome['providers'])}   price {outcome['credits']} credits   "
                f"{outcome['calls']} calls, median {outcome['milliseconds']:.1f} ms   {outcome['bytes']} bytes"
            )
            outcomes.append(outcome)
        receipts = _save_receipts(connection, folder, say)
    return outcomes, receipts


@contextmanager
def _daemons(folder: Path, network: str, say: Callable[..., None]) -> Iterator[list[Path]]:
    """Run three providers as processes of their own; they are told no addresses."""
    import subprocess

    from p2pnode.api.client import ControlClient
    from p2pnode.errors import TooSlow

    homes = [folder / f"daemon{number}" for number in range(1, DAEMONS + 1)]
    processes = []
    try:
        for home in homes:
            home.mkdir()
            with (home / "log").open("wb") as log:
                command = [sys.executable, "-m", "p2pnode.cli.main", "up", "--foreground"]
                processes.append(
                    subprocess.Popen(command, env=_environment(home, network), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
                )
        deadline = time.monotonic() + FOUND_SECONDS  # noqa: TID251 - the command line runs outside any node
        clients = [ControlClient(home / "data") for home in homes]
        while not all(client.alive() for client in clients):
            if time.monotonic() > deadline or any(process.poll() is not None for process in processes):  # noqa: TID251
                logs = "\n".join((home / "log").read_text()[-2000:] for home in homes)
                raise TooSlow(f"the daemons did not start:\n{logs}")
            time.sleep(0.05)  # noqa: TID251
        for number, client in enumerate(clients, 1):
            status = client.get("/v1/status")
            say(f"daemon {number}: {status['node'][:21]}… on {status['listen'][0]}, sandbox {status['sandbox']}")
            client.close()
        yield homes
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


@contextmanager
def _client(folder: Path, network: str, homes: list[Path], say: Callable[..., None]) -> Iterator[Any]:
    """Run the client's node in this process; by static addresses only where multicast does not work."""
    import p2pnode
    from p2pnode.api.client import ControlClient
    from p2pnode.node.config import load_config

    home = folder / "client"
    connection = p2pnode.connect(config=load_config(_environment(home, network)), embed=True)
    try:
        if _wait_for_links(connection, DAEMONS, FOUND_SECONDS):
            say(f"the client found all {DAEMONS} by mDNS, without being told an address")
        else:
            say("multicast does not work on this machine; using the list of addresses instead (network.static_peers)")
            addresses = [ControlClient(each / "data").get("/v1/status")["listen"][0] for each in homes]
            connection.add_peers(addresses)
            if not _wait_for_links(connection, DAEMONS, FOUND_SECONDS):
                from p2pnode.errors import Unreachable

                raise Unreachable("the client could not reach the daemons, not even by address")
        yield connection
    finally:
        connection.close()


def _wait_for_links(connection: Any, wanted: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds  # noqa: TID251 - the command line runs outside any node
    while time.monotonic() < deadline:  # noqa: TID251
        if sum(1 for peer in connection.peers() if peer["connected"]) >= wanted:
            return True
        time.sleep(0.05)  # noqa: TID251
    return False


def _save_receipts(connection: Any, folder: Path, say: Callable[..., None]) -> list[Path]:
    """Write one .receipt file for every call of every slice."""
    from p2pnode.units import format_credits

    paths = []
    rows = connection.receipts()
    for row in rows:
        for call in range(row["calls"]):
            path = folder / f"{row['id'][-16:]}-{call}.receipt"
            path.write_bytes(connection.receipt_bundle(row["id"], call))
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
